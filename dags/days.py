"""Which day a run works on, whatever started it, and when runs are due."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

from airflow.sdk import CronDataIntervalTimetable, Param
from airflow.sdk.exceptions import AirflowFailException

START = datetime(2020, 1, 1, tzinfo=UTC)
"""Earliest day that can be backfilled; fixed, because a start date that moves loses runs."""

DAILY = CronDataIntervalTimetable("0 0 * * *", timezone="UTC")
"""One run a day, due when the day is over; its logical date is that day, in a schedule as in a backfill.

The cron hour is midnight: with a later one Airflow drops the last day of a range chosen in the UI.
"""


def day_param() -> Param:
    """Return the field of the trigger form that names the day.

    Airflow answers a value it refuses with the rule it breaks and the whole schema, of which ``hint`` is a part.
    """
    return Param(
        default=None,
        type=["null", "string"],
        format="date",
        hint="a day written YYYY-MM-DD, such as 2022-05-04",
        title="Day",
        description="Day to run. Empty: the day of the logical date; leave it empty in a backfill.",
    )


def run_day(context: Mapping[str, Any]) -> str:
    """Return the day (``YYYY-MM-DD``) of a run.

    In this order: the ``ds`` of the trigger form; the logical date; the
    partition key of a run that a partitioned asset started; the ``ds`` in the
    latest event of the asset that started the run.

    Raises:
        AirflowFailException: if the run says no day, one that is none, or one for all runs of a backfill; no retry
            can help.
    """
    given, logical = (context.get("params") or {}).get("ds"), context.get("logical_date")
    if is_backfill(context) and given and logical and str(given) != logical.astimezone(UTC).date().isoformat():
        raise AirflowFailException(
            f"The field Day says {given} in a backfill, so every one of its runs would work on that day. Start the "
            "backfill again and leave the field empty: each run then works on its own day."
        )
    for source, value in _candidates(context):
        if value in (None, ""):
            continue
        if isinstance(value, datetime):
            return value.astimezone(UTC).date().isoformat()
        try:
            return date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise AirflowFailException(
                f"The {source} of this run is {value!r}, which is not a day written YYYY-MM-DD."
            ) from None
    raise AirflowFailException(
        "This run does not say which day to work on: it has no logical date, no field ds and no asset event "
        "with one. Trigger it again and fill in the field Day."
    )


def is_backfill(context: Mapping[str, Any]) -> bool:
    """Tell whether a run is one of a backfill's."""
    # Not str(): of the SDK's members, which are strings too, that is "DagRunType.BACKFILL".
    return bool(getattr(context.get("dag_run"), "run_type", "") == "backfill")


def _candidates(context: Mapping[str, Any]) -> list[tuple[str, Any]]:
    events = [event for group in (context.get("triggering_asset_events") or {}).values() for event in group]
    latest = max(events, key=lambda event: event.timestamp, default=None)
    return [
        ("field ds", (context.get("params") or {}).get("ds")),
        ("logical date", context.get("logical_date")),
        ("partition key", context.get("partition_key")),
        ("asset event's ds", (latest.extra or {}).get("ds") if latest else None),
    ]
