"""What a day of ``behavior_sequences`` must be: one row per user, events in order, once, and no more than allowed."""

from __future__ import annotations

import great_expectations.expectations as gxe
from great_expectations.expectations.expectation import Expectation

from expectations import rules
from expectations.columns import LIST_OF_STRUCT, Column, encoded, key
from expectations.day import AuditDay
from onetrans.schema import FeatureSchema

KEY = ("user_id",)


def columns(schema: FeatureSchema) -> list[Column]:
    """Declare the columns; a sequence's fields by path."""
    declared = [key("ds", "date"), key("user_id")]
    for name in (sequence.column for sequence in schema.sequences):
        declared += [
            Column(name, LIST_OF_STRUCT, may_be_missing=1.0),
            key(f"{name}.ts", "timestamp"),
            key(f"{name}.available_at", "timestamp"),
            key(f"{name}.event_id", "bigint"),
            *encoded(schema.of_side("event"), f"{name}."),
        ]
    return declared


def expectations(day: AuditDay) -> list[Expectation]:
    """Declare the rules of the rows."""
    declared = [*rules.row_count(day), rules.only_this_day(day), rules.one_row_per(*KEY)]
    if day.rows_the_day_before is not None:
        declared.append(
            gxe.ExpectTableRowCountToBeBetween(
                min_value=day.rows_the_day_before,
                severity=rules.CRITICAL,
                description=f"no user of the day before is lost: at least {day.rows_the_day_before:,} rows",
            )
        )
    for sequence in day.schema.sequences:
        name = sequence.column
        declared += [
            rules.none_of(f"{name}_unordered", f"events of {name} rise strictly by (ts, event_id), none stands twice"),
            rules.none_of(f"{name}_known_too_early", f"no event of {name} is known before it happened"),
            rules.at_most(
                f"{name}_settled",
                sequence.max_length,
                f"of the events of {name} known before {day.settled_before:%Y-%m-%d %H:%M} UTC, the last "
                f"{sequence.max_length} at most are kept",
            ),
        ]
    return declared
