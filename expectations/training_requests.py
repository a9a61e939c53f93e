"""What a day of ``training_requests`` must be: one row per request, a past that is past, every impression once."""

from __future__ import annotations

import great_expectations.expectations as gxe
from great_expectations.expectations.expectation import Expectation

from expectations import rules
from expectations.columns import LIST_OF_STRUCT, Column, encoded, key, label, truth
from expectations.day import AuditDay
from onetrans.schema import FeatureSchema

KEY = ("request_id",)


def columns(schema: FeatureSchema) -> list[Column]:
    """Declare the columns; fields of sequences and candidates by path."""
    declared = [
        key("ds", "date"),
        key("request_id"),
        key("user_id"),
        key("ts", "timestamp"),
        *encoded(schema.of_side("user")),
        *encoded(schema.of_side("context")),
    ]
    for name in (sequence.column for sequence in schema.sequences):
        declared += [
            Column(name, LIST_OF_STRUCT, may_be_missing=1.0),
            key(f"{name}.ts", "timestamp"),
            *encoded(schema.of_side("event"), f"{name}."),
        ]
    return [
        *declared,
        Column("candidates", LIST_OF_STRUCT, required=True),
        key("candidates.item_id"),
        Column("candidates.position", "int", smallest=0),
        *encoded(schema.of_side("item"), "candidates."),
        label("candidates.click"),
        label("candidates.conversion"),
        *truth("candidates."),
    ]


def expectations(day: AuditDay) -> list[Expectation]:
    """Declare the rules of the rows."""
    declared = [
        *rules.row_count(day),
        rules.only_this_day(day),
        rules.one_row_per(*KEY),
        rules.time_within_day(day, "ts"),
        rules.busy_to_the_end(day, "ts"),
    ]
    for sequence in day.schema.sequences:
        name = sequence.column
        declared += [
            rules.none_of(f"{name}_not_before_request", f"every event of {name} lies strictly before the request"),
            rules.none_of(f"{name}_unordered", f"events of {name} are in order of time"),
            rules.at_most(f"{name}_length", sequence.max_length, f"{name} has at most {sequence.max_length} events"),
        ]
    declared += [
        gxe.ExpectColumnValuesToBeBetween(
            column="candidates_count",
            min_value=1,
            severity=rules.CRITICAL,
            description="a request has at least one candidate",
        ),
        rules.none_of("candidates_repeated", "no item stands twice among a request's candidates"),
        rules.none_of("candidates_bad_labels", "click and conversion of every candidate are 0 or 1"),
        rules.none_of("candidates_unclicked_conversions", "a candidate's conversion has a click"),
    ]
    if day.impressions is not None:
        text = f"each of the {day.impressions:,} published impressions is a candidate, once"
        declared.append(rules.adds_up_to("candidates_count", day.impressions, text))
    if day.labels is not None:
        for name, total in zip(("clicks", "conversions"), day.labels, strict=True):
            text = f"the candidates have the {name} of the published impressions, {total:,}"
            declared.append(rules.adds_up_to(f"candidates_{name}", total, text))
    if "user_id" in {*day.known, *day.too_many}:
        declared.append(rules.few_unknown("user_unknown", day, "the user has no row in user_features"))
    if "item_id" in {*day.known, *day.too_many}:
        declared.append(rules.few_unknown("candidates_unknown", day, "a candidate has no row in item_features"))
    return declared
