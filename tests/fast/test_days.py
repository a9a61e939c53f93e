"""Logical dates: parsing, ranges, and the bounds of days on which the clock changes."""

from datetime import UTC, date, datetime

import pytest

from onetrans.days import day_bounds, day_range, days_before, describe_days, parse_day, present_day
from onetrans.errors import BadConfigError


def test_parse_day() -> None:
    assert parse_day("2024-02-29") == date(2024, 2, 29)
    for wrong in ("2024-2-29", "2023-02-29", "20240229", "2024-02-29T00:00", "", "2024-02-29\n"):
        with pytest.raises(BadConfigError):
            parse_day(wrong)
    with pytest.raises(BadConfigError, match="instant"):
        parse_day(datetime(2024, 2, 29, tzinfo=UTC))


def test_ranges_cross_months_and_leap_days() -> None:
    assert [d.day for d in day_range(date(2024, 2, 28), date(2024, 3, 1))] == [28, 29, 1]
    assert days_before(date(2024, 3, 1), 2) == [date(2024, 2, 28), date(2024, 2, 29)]
    with pytest.raises(BadConfigError, match="before it begins"):
        day_range(date(2024, 3, 1), date(2024, 2, 28))


@pytest.mark.parametrize(
    ("ds", "hours"), [("2024-03-30", 24), ("2024-03-31", 23), ("2024-10-27", 25)], ids=["plain", "spring", "autumn"]
)
def test_a_day_is_as_long_as_its_clock_says(ds: str, hours: int) -> None:
    start, end = day_bounds(parse_day(ds), "Europe/Berlin")
    assert (end - start).total_seconds() == hours * 3600
    assert start.tzinfo is UTC


def test_describe_days() -> None:
    days = [date(2024, 3, d) for d in (3, 1, 2, 6)]
    assert describe_days(days) == "2024-03-01..2024-03-03, 2024-03-06"
    assert describe_days([]) == "none"


def test_a_lost_day_is_stepped_over_unless_it_is_published_after_all() -> None:
    first, second, third = day_range(date(2024, 2, 28), date(2024, 3, 1))
    assert present_day(third, [second], []) == third
    assert present_day(second, [second], []) == first, "published or not, the log has it"
    assert present_day(third, [second, third], [first]) == first
    assert present_day(third, [second, third], [first, second]) == second
