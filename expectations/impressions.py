"""What a day of ``impressions`` must be: one row per shown item, labels that make sense, times within the day."""

from __future__ import annotations

import great_expectations.expectations as gxe
from great_expectations.expectations.expectation import Expectation

from expectations import rules
from expectations.columns import Column, distinct, key, label, stored, truth
from expectations.day import AuditDay
from onetrans.schema import FeatureSchema

KEY = ("request_id", "item_id")


def columns(schema: FeatureSchema) -> list[Column]:
    """Declare the columns."""
    return distinct(
        [
            key("ds", "date"),
            key("request_id"),
            key("user_id"),
            key("item_id"),
            key("ts", "timestamp"),
            Column("position", "int", smallest=0),
            label("click"),
            label("conversion"),
            Column("conversion_at", "timestamp", optional=True, may_be_missing=1.0),
            *stored(schema, "context"),
            *truth(),
        ]
    )


def expectations(day: AuditDay) -> list[Expectation]:
    """Declare the rules of the rows."""
    low, high = day.settings.min_click_rate, day.settings.max_click_rate
    return [
        *rules.row_count(day),
        rules.only_this_day(day),
        rules.one_row_per(*KEY),
        rules.time_within_day(day, "ts"),
        rules.busy_to_the_end(day, "ts"),
        rules.binary("click"),
        rules.binary("conversion"),
        gxe.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A="click",
            column_B="conversion",
            or_equal=True,
            ignore_row_if="either_value_is_missing",
            severity=rules.CRITICAL,
            description="a conversion has a click",
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="click",
            min_value=low,
            max_value=high,
            severity=rules.CRITICAL,
            description=f"between {low:.2%} and {high:.2%} of the impressions are clicked",
        ),
        gxe.ExpectColumnMaxToBeBetween(
            column="conversion", min_value=1, severity=rules.WARNING, description="some impression converted"
        ),
        *rules.usual_rate(day, "click"),
        *rules.usual_rate(day, "conversion"),
    ]
