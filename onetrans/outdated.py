"""Which published days are not the last word: their labels may still change, or what they were built from did.

A day's conversions are complete when the attribution window of its last request
has closed (:meth:`onetrans.schema.FeatureSchema.labels_close`).  A day of
``impressions`` is *final* if it was built after that, and a day of
``training_requests``, which carries the same labels, if it was built from such a day.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from typing import Literal

from onetrans.lake import Lake
from onetrans.schema import FeatureSchema

LABELLED = ("impressions", "training_requests")
"""Tables whose rows carry labels, in the order of building."""

Labels = Literal["final", "open", "rebuild", "unknown"]
"""``open``: conversions may still come; ``rebuild``: none can come any more, but the day was built before that."""


def label_states(lake: Lake, schema: FeatureSchema, table: str, now: datetime) -> dict[date, Labels]:
    """Return what is known of the labels of every published day of ``impressions`` or ``training_requests``."""
    built = {day: staged.created_at for day, staged in lake.built_days(table).items()}
    states: dict[date, Labels] = {ds: _state(built.get(ds), schema.labels_close(ds), now) for ds in lake.days(table)}
    if table == "impressions":
        return states
    beneath = label_states(lake, schema, "impressions", now)
    return {ds: state if state != "final" else beneath.get(ds, "unknown") for ds, state in states.items()}


def matured_days(lake: Lake, schema: FeatureSchema, now: datetime) -> list[date]:
    """Return the days whose labels are complete by now, but were not when ``impressions`` was built."""
    return [ds for ds, state in label_states(lake, schema, "impressions", now).items() if state == "rebuild"]


def described(states: Mapping[date, Labels], schema: FeatureSchema) -> dict[date, str]:
    """Return the states in words, for a list of days."""
    words = {
        "final": "final",
        "rebuild": "closed, built before: python -m jobs.rebuild",
        "unknown": "not known when it was built",
    }
    return {
        ds: words.get(state, f"open until {schema.labels_close(ds):%Y-%m-%d %H:%M} UTC") for ds, state in states.items()
    }


def not_final(states: Mapping[date, Labels]) -> Iterable[date]:
    """Return the days that are not final."""
    return (ds for ds, state in states.items() if state != "final")


def _state(built_at: str | None, close: datetime, now: datetime) -> Labels:
    if now < close:
        return "open"
    if not built_at:
        return "unknown"
    return "final" if datetime.fromisoformat(built_at).astimezone(UTC) >= close else "rebuild"
