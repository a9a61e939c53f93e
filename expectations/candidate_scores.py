"""What a day of ``candidate_scores`` must be: one row per user and item, one model version."""

from __future__ import annotations

import great_expectations.expectations as gxe
from great_expectations.expectations.expectation import Expectation

from expectations import rules
from expectations.columns import Column, key
from expectations.day import AuditDay
from onetrans.schema import FeatureSchema

KEY = ("user_id", "item_id")


def columns(schema: FeatureSchema) -> list[Column]:
    """Declare the columns; they do not depend on the features."""
    return [
        key("ds", "date"),
        key("user_id"),
        key("item_id"),
        Column("rank", "int", required=True, smallest=1),
        *(Column(name, "double", required=True, smallest=0, largest=1) for name in ("ctr", "cvr", "ctcvr")),
        key("model_version"),
    ]


def expectations(day: AuditDay) -> list[Expectation]:
    """Declare the rules of the rows."""
    return [
        *rules.row_count(day),
        rules.only_this_day(day),
        rules.one_row_per(*KEY),
        rules.one_row_per("user_id", "rank"),
        rules.none_of("not_the_product", "ctcvr is ctr times cvr"),
        gxe.ExpectColumnUniqueValueCountToBeBetween(
            column="model_version",
            min_value=1,
            max_value=1,
            severity=rules.CRITICAL,
            description="all scores of a day are of one model version",
        ),
    ]
