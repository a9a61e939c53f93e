"""Expectations that several suites share, each with its severity and the sentence a person reads.

A ``critical`` expectation that fails stops the day; a ``warning`` is recorded
and shown, and the day goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import great_expectations.expectations as gxe
from great_expectations.expectations.expectation import Expectation
from great_expectations.expectations.metadata_types import FailureSeverity
from great_expectations.expectations.row_conditions import Column

from expectations.day import AuditDay
from onetrans.days import day_bounds

CRITICAL = FailureSeverity.CRITICAL
WARNING = FailureSeverity.WARNING

COLUMN_KEY = ("column", "declared", "found", "file")
"""Columns of the table of columns that are shown beside every example."""


def row_count(day: AuditDay) -> list[Expectation]:
    """As many rows as the job staged, at least one, and about as many as on the days before."""
    rules: list[Expectation] = [
        gxe.ExpectTableRowCountToEqual(
            value=day.staged.rows,
            severity=CRITICAL,
            description=f"the files hold the {day.staged.rows:,} rows the job says it staged",
        ),
        gxe.ExpectTableRowCountToBeBetween(min_value=1, severity=CRITICAL, description="the day is not empty"),
    ]
    usual = day.usual_rows
    if usual is None:
        return rules
    for severity, spread in ((WARNING, 1), (CRITICAL, 5)):
        low = int(usual * day.settings.min_row_share / spread)
        high = int(usual * day.settings.max_row_share * spread) + 1
        rules.append(
            gxe.ExpectTableRowCountToBeBetween(
                min_value=low,
                max_value=high,
                severity=severity,
                description=(
                    f"{low:,} to {high:,} rows; the {len(day.earlier)} published days before have {usual:,.0f} "
                    f"in the middle"
                ),
            )
        )
    return rules


def one_row_per(*columns: str) -> Expectation:
    """The columns together name one row."""
    description = f"there is one row per ({', '.join(columns)})"
    if len(columns) == 1:
        return gxe.ExpectColumnValuesToBeUnique(column=columns[0], severity=CRITICAL, description=description)
    return gxe.ExpectCompoundColumnsToBeUnique(column_list=list(columns), severity=CRITICAL, description=description)


def only_this_day(day: AuditDay) -> Expectation:
    """Every row carries the day it is staged for."""
    return gxe.ExpectColumnValuesToBeInSet(
        column="ds", value_set=[str(day.ds)], severity=CRITICAL, description=f"ds is {day.ds} in every row"
    )


def time_within_day(day: AuditDay, column: str) -> Expectation:
    """A time lies in the day, in the log's time zone, give or take the schema's tolerance."""
    return gxe.ExpectColumnValuesToBeBetween(
        column=column,
        min_value=day.first_instant,
        max_value=day.end_instant,
        strict_max=True,
        severity=CRITICAL,
        description=(
            f"{column} lies in {day.ds} ({day.schema.timezone}, give or take {day.schema.day_tolerance_minutes} "
            f"minutes): from {day.first_instant:%Y-%m-%d %H:%M} to {day.end_instant:%Y-%m-%d %H:%M} UTC"
        ),
    )


def busy_to_the_end(day: AuditDay, time: str) -> Expectation:
    """Something happened in the last hours of the day: the log was not cut off early."""
    hours = day.settings.max_quiet_hours
    last = day_bounds(day.ds, day.schema.timezone)[1]
    return gxe.ExpectColumnMinToBeBetween(
        column="hours_to_end",
        max_value=hours,
        severity=WARNING,
        description=f"the latest {time} lies in the last {hours:g} hours of the day, which ends at "
        f"{last:%Y-%m-%d %H:%M} UTC",
    )


def usual_rate(day: AuditDay, label: str) -> list[Expectation]:
    """A label's rate is about that of the days before; what chance explains (four standard errors) is allowed.

    While conversions may still come, a low rate of them says little and fails no day; a high one does, as more can
    only come.  Days of which most had none set no bound.
    """
    usual = day.usual_rate(label)
    if not usual:  # most of the days before had none: they do not say what is usual
        return []
    chance = 4 * math.sqrt(usual * (1 - usual) / max(day.staged.rows, 1))
    rules: list[Expectation] = []
    change = day.settings.max_rate_change
    for severity, factor, near in ((WARNING, change, "near"), (CRITICAL, 2 * change, "not far from")):
        low, high = max(usual / factor - chance, 0.0), min(usual * factor + chance, 1.0)
        forgiven = severity is CRITICAL and label == "conversion" and day.labels_open
        bounds = f"at most {high:.2%} while more may come" if forgiven else f"{low:.2%} to {high:.2%}"
        rules.append(
            gxe.ExpectColumnMeanToBeBetween(
                column=label,
                min_value=None if forgiven else low,
                max_value=high,
                severity=severity,
                description=f"the rate of {label} is {near} that of the days before: {bounds}, as {usual:.2%} is the "
                f"median of {len(day.trailing)} days",
            )
        )
    return rules


def few_unknown(column: str, day: AuditDay, description: str) -> Expectation:
    """Few rows point to something that is not there: a view's share of such rows has a bound."""
    share = day.settings.max_unknown_share
    return gxe.ExpectColumnMeanToBeBetween(
        column=column, max_value=share, severity=WARNING, description=f"{description} for at most {share:.0%}"
    )


def adds_up_to(column: str, total: int, description: str) -> Expectation:
    """A view's counts add up to what another table says, exactly."""
    return gxe.ExpectColumnSumToBeBetween(
        column=column, min_value=total, max_value=total, severity=CRITICAL, description=description
    )


def counts_agree(day: AuditDay, key: str) -> list[Expectation]:
    """The counts of users, or items, agree with one another, and in all with the impressions they were counted from."""
    found = [
        none_of("impossible_counts", "clicks are at most impressions, conversions at most clicks"),
        none_of("shrinking_windows", "a count is not larger in a shorter window than in a longer one"),
    ]
    if day.window_impressions is not None:
        longest, counted = max(day.schema.aggregates.windows), day.window_impressions
        text = f"every published impression of {longest} days is counted for one {key}: {counted:,} in all"
        found.append(adds_up_to("counted", counted, text))
    return found


def none_of(column: str, description: str, severity: FailureSeverity = CRITICAL) -> Expectation:
    """A view's count of something wrong is zero in every row."""
    return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[0], severity=severity, description=description)


def binary(column: str) -> Expectation:
    """A label is 0 or 1."""
    return gxe.ExpectColumnValuesToBeInSet(
        column=column, value_set=[0, 1], severity=CRITICAL, description=f"{column} is 0 or 1"
    )


def at_most(column: str, largest: int, description: str) -> Expectation:
    """No value is larger than a bound."""
    return gxe.ExpectColumnValuesToBeBetween(
        column=column, max_value=largest, severity=CRITICAL, description=description
    )


def columns_as_declared() -> Sequence[Expectation]:
    """The rules of the column table, one row per declared or found column (:mod:`expectations.columns`)."""
    return (
        gxe.ExpectColumnPairValuesToBeEqual(
            column_A="declared",
            column_B="found",
            severity=CRITICAL,
            description="every declared column is in every file, with its type",
            row_condition=Column("use") != "extra",
        ),
        gxe.ExpectColumnValuesToNotBeInSet(
            column="use",
            value_set=["extra"],
            severity=WARNING,
            description="there is no column besides the declared ones",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="missing",
            value_set=[0],
            severity=CRITICAL,
            description="keys, times, labels and the numbers of a list are never missing or empty",
            row_condition=Column("use") == "required",
        ),
        gxe.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A="missing_share_allowed",
            column_B="missing_share",
            or_equal=True,
            severity=WARNING,
            description="no feature is missing from more rows than allowed",
        ),
        gxe.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A="shift_allowed",
            column_B="shift",
            or_equal=True,
            severity=WARNING,
            description="no feature's values are spread otherwise than on the days before (population stability index)",
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="not_finite",
            value_set=[0],
            severity=CRITICAL,
            description="numbers are finite: neither NaN nor infinite",
        ),
        gxe.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A="smallest",
            column_B="smallest_allowed",
            or_equal=True,
            ignore_row_if="either_value_is_missing",
            severity=CRITICAL,
            description="no number is below the smallest one its column allows",
        ),
        gxe.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A="largest_allowed",
            column_B="largest",
            or_equal=True,
            ignore_row_if="either_value_is_missing",
            severity=CRITICAL,
            description="no number is above the largest one its column allows",
        ),
    )
