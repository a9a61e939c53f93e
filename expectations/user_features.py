"""What a day of ``user_features`` must be: one row per user, counts that agree with one another, rates within 0..1."""

from __future__ import annotations

from great_expectations.expectations.expectation import Expectation

from expectations import rules
from expectations.columns import Column, aggregates, distinct, key, stored
from expectations.day import AuditDay
from onetrans.schema import FeatureSchema

KEY = ("user_id",)


def columns(schema: FeatureSchema) -> list[Column]:
    """Declare the columns."""
    return distinct(
        [
            key("ds", "date"),
            key("user_id"),
            *aggregates(schema.aggregates, "user"),
            *stored(schema, "user"),
        ]
    )


def expectations(day: AuditDay) -> list[Expectation]:
    """Declare the rules of the rows."""
    return [
        *rules.row_count(day),
        rules.only_this_day(day),
        rules.one_row_per(*KEY),
        *rules.counts_agree(day, "user"),
    ]
