"""Logical dates: the one place that parses, lists and bounds days.

A *logical date* ``ds`` names the day a table partition describes.  Where that
day begins on the clock depends on the log's time zone, so the bounds of a day
are always asked for here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from onetrans.errors import BadConfigError

_ISO_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def parse_day(text: str | date) -> date:
    """Return the day written as ``YYYY-MM-DD``.

    Raises:
        BadConfigError: if ``text`` is not such a day.
    """
    if isinstance(text, datetime):
        raise BadConfigError(f"expected a day written YYYY-MM-DD, got the instant {text.isoformat()}")
    if isinstance(text, date):
        return text
    if not _ISO_DAY.fullmatch(text):
        raise BadConfigError(f"expected a day written YYYY-MM-DD, got {text!r}")
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise BadConfigError(f"{text!r} is not a day of the calendar: {error}") from error


def day_range(first: date, last: date) -> list[date]:
    """Return the days from ``first`` to ``last``, both included.

    Raises:
        BadConfigError: if ``last`` is before ``first``.
    """
    if last < first:
        raise BadConfigError(f"the range ends on {last}, before it begins on {first}")
    return [first + timedelta(days=offset) for offset in range((last - first).days + 1)]


def days_before(ds: date, count: int) -> list[date]:
    """Return the ``count`` days before ``ds``, oldest first; ``ds`` itself is not among them."""
    return [ds - timedelta(days=back) for back in range(count, 0, -1)]


def present_day(ds: date, absent: Collection[date], published: Collection[date]) -> date:
    """Return ``ds``, or where the log lost it the latest day before it that is to be expected.

    That is one which the log did not lose, or which is published all the same.

    Args:
        ds: the day that is asked for.
        absent: days that the log lost (``source.absent_days``).
        published: the days of the table that is to be read; tables may differ.
    """
    while ds in absent and ds not in published:
        ds -= timedelta(days=1)
    return ds


def day_bounds(ds: date, timezone: str) -> tuple[datetime, datetime]:
    """Return the first instant of ``ds`` and of the next day in ``timezone``, both in UTC.

    The two are 23 or 25 hours apart on days when the clock changes.
    """
    zone = ZoneInfo(timezone)
    start = datetime.combine(ds, time(), tzinfo=zone)
    end = datetime.combine(ds + timedelta(days=1), time(), tzinfo=zone)
    return start.astimezone(UTC), end.astimezone(UTC)


def spans(days: list[date]) -> Iterator[tuple[date, date]]:
    """Yield the unbroken runs in ``days`` as (first, last): how a person reads a list of days."""
    ordered = sorted(set(days))
    if not ordered:
        return
    first = previous = ordered[0]
    for day in ordered[1:]:
        if day - previous > timedelta(days=1):
            yield first, previous
            first = day
        previous = day
    yield first, previous


def describe_days(days: list[date]) -> str:
    """Write ``days`` as text for a message, e.g. ``2022-05-01..2022-05-03, 2022-05-06``."""
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in spans(days)) or "none"
