"""What a day of ``behaviors`` must be: each event once, known no earlier than it happened, delivered on this day."""

from __future__ import annotations

import great_expectations.expectations as gxe
from great_expectations.expectations.expectation import Expectation

from expectations import rules
from expectations.columns import Column, distinct, key, stored
from expectations.day import AuditDay
from onetrans.schema import FeatureSchema

KEY = ("event_id",)


def columns(schema: FeatureSchema) -> list[Column]:
    """Declare the columns."""
    return distinct(
        [
            key("ds", "date"),
            key("event_id", "bigint"),
            key("user_id"),
            key("item_id"),
            key("type"),
            key("ts", "timestamp"),
            key("available_at", "timestamp"),
            *stored(schema, "event"),
        ]
    )


def expectations(day: AuditDay) -> list[Expectation]:
    """Declare the rules of the rows."""
    events = [sequence.event for sequence in day.schema.sequences]
    return [
        *rules.row_count(day),
        rules.only_this_day(day),
        rules.one_row_per(*KEY),
        rules.busy_to_the_end(day, "available_at"),
        gxe.ExpectColumnValuesToBeBetween(
            column="delay_s",
            min_value=0,
            severity=rules.CRITICAL,
            description="an event is not known before it happened (available_at >= ts)",
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="ts",
            max_value=day.end_instant,
            strict_max=True,
            severity=rules.CRITICAL,
            description=f"an event delivered on {day.ds} happened before {day.end_instant:%Y-%m-%d %H:%M} UTC",
        ),
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="type",
            value_set=events,
            severity=rules.WARNING,
            description=f"every event type that feeds a sequence occurs: {', '.join(events)}",
        ),
    ]
