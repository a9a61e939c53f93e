"""What a step has to know of other runs: those of the day before, and those that make what it reads.

``max_active_runs`` keeps days in order only among scheduled runs: a backfill
brings a limit of its own, which wins.  ``depends_on_past`` would hold a day
silently for hours when the day before has failed, and the failed one could not
be cleared meanwhile where days run one at a time.  So the first step of a run
asks Airflow itself, waits while the other run is under way, and says what to do
when that has failed.

A run is found by its logical date.  One that was triggered by hand without a
date is not seen; Airflow runs these one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

Failed = Literal["stop", "stop unless ready", "go on"]
State = Literal["none", "stuck", "queued", "running", "done", "failed"]


@dataclass(frozen=True)
class Other:
    """Another run, or one task of it, that a step looks at before and while it waits."""

    dag_id: str
    """DAG of the run."""
    task_id: str = ""
    """Task that matters; empty: the whole run."""
    days_back: int = 0
    """Whose run: that of the step's day less this many days."""
    if_failed: Failed = "stop"
    """What its failure means: stop, stop unless what is waited for is there all the same, or go on."""
    why: str = ""
    """Why it matters, a sentence for the person who reads that it failed."""
    patience_s: Mapping[State, float] | None = None
    """Seconds in one state after which its end is not waited for any more; a state not named: no limit of its own."""

    def of(self, ds: str) -> dict[str, Any]:
        """Return what a trigger needs to look at it, as plain data, for a run of the day ``ds``."""
        day = date.fromisoformat(ds) - timedelta(days=self.days_back)
        return {**asdict(self), "patience_s": dict(self.patience_s or {}), "day": day.isoformat()}


@dataclass(frozen=True)
class Seen:
    """What one look at the other runs gave."""

    stop: str = ""
    """Why the step must not run; empty: nothing stands against it."""
    unless_ready: str = ""
    """Why there is nothing to wait for, if what is waited for is not there by now."""
    waiting: str = ""
    """What has to end first."""
    states: tuple[State, ...] = ()
    """State of each other run, in the order of the question."""


def look_at(others: Sequence[Mapping[str, Any]]) -> Seen:
    """Return what stands against a step; blocks while Airflow is asked.

    Args:
        others: what :meth:`Other.of` gave.
    """
    states = tuple(state_of(other["dag_id"], other["task_id"], other["day"]) for other in others)
    seen = {"stop": "", "unless_ready": "", "waiting": ""}
    for other, state in zip(others, states, strict=True):
        name = name_of(other)
        if state == "failed" and other["if_failed"] != "go on":
            kind = "stop" if other["if_failed"] == "stop" else "unless_ready"
            seen[kind] = seen[kind] or (
                f"{name} has failed. {other['why']} Clear that run when its cause is mended (or mark it as success, if "
                "the day is to be left out), then clear this task."
            )
        elif state in ("stuck", "queued", "running"):
            words = "queued, and nothing of that DAG runs but this" if state == "stuck" else state
            seen["waiting"] = seen["waiting"] or f"{name} is {words}. {other['why']}"
    return Seen(**seen, states=states)


def name_of(other: Mapping[str, Any]) -> str:
    """Return what a person calls the other run or task."""
    task = f"'s task {other['task_id']}" if other["task_id"] else ""
    return f"{other['dag_id']}{task} of {other['day']}"


def state_of(dag_id: str, task_id: str, day: str) -> State:
    """Return the state of the run of a day, or of one of its tasks; a person's "mark as success" is done.

    A queued run is stuck if at most one run of its DAG is running: most likely the one that asks, whose end it needs
    where runs are made one at a time.
    """
    dates = [datetime.combine(date.fromisoformat(day), datetime.min.time(), tzinfo=UTC)]

    def runs(*states: str, of: list[datetime] | None = dates) -> int:
        count: int = _airflow().get_dr_count(dag_id=dag_id, logical_dates=of, states=list(states) or None)
        return count

    def tasks(*states: str) -> int:
        return _airflow().get_ti_count(
            dag_id=dag_id, task_ids=[task_id], logical_dates=dates, states=list(states) or None
        )

    if not runs():
        return "none"
    if task_id and tasks("success"):
        return "done"
    if task_id and tasks("failed", "upstream_failed"):
        return "failed"
    if runs("queued"):
        return "queued" if runs("running", of=None) > 1 else "stuck"
    if runs("running"):
        return "running"
    return "failed" if runs("failed") else "done"


def succeeded(dag_id: str, run_id: str, task_id: str) -> bool:
    """Tell whether a task of a run has succeeded, or was marked as success; blocks while Airflow is asked."""
    return bool(_airflow().get_ti_count(dag_id=dag_id, run_ids=[run_id], task_ids=[task_id], states=["success"]))


def _airflow() -> Any:
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    return RuntimeTaskInstance
