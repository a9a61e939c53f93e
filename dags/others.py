"""What a step has to know of other runs: those of the day before, and those that make what it reads.

``max_active_runs`` keeps days in order only among scheduled runs: a backfill
brings a limit of its own, which wins.  ``depends_on_past`` would hold a day
silently for hours when the day before has failed, and the failed one could not
be cleared meanwhile where days run one at a time.  So the first step of a run
asks Airflow itself, waits while the other run is under way, and says what to do
when that has failed.

A run is found by its logical date, which is the day at midnight for one by the
clock and one of a backfill.  The page's form gives a run the moment of the click:
such a run is found by its field Day, if it is under way when a step first looks.
One that the API made without any date is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from airflow.sdk.exceptions import AirflowFailException

Failed = Literal["stop", "stop unless ready", "go on"]
Queued = Literal["wait", "wait unless ready"]
Unless = Literal["go on", "stop unless ready"]
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
    if_queued: Queued = "wait"
    """What it means that it has not begun: wait, or wait unless what is waited for is there all the same."""
    if_none: Unless = "go on"
    """What it means that there is no such run: nothing, or stop unless what is waited for is there all the same."""
    if_done: Unless = "go on"
    """What its success means, which may be a person's mark: nothing, or stop unless what is waited for is there."""
    begins_with: str = ""
    """Its task that waits for its turn: until that has ended, a run under way counts as queued; empty: it does not."""
    why: str = ""
    """Why it matters, a sentence for the person who reads that it failed."""
    patience_s: Mapping[State, float] | None = None
    """Seconds in one state after which its end is not waited for any more; a state not named: no limit of its own."""

    def of(self, ds: str) -> dict[str, Any]:
        """Return what a trigger needs to look at it, as plain data, for a run of the day ``ds``."""
        day = (date.fromisoformat(ds) - timedelta(days=self.days_back)).isoformat()
        return {**asdict(self), "patience_s": dict(self.patience_s or {}), "day": day, "run_ids": []}


@dataclass(frozen=True)
class Seen:
    """What one look at the other runs gave."""

    stop: str = ""
    """Why the step must not run; empty: nothing stands against it."""
    unless_ready: str = ""
    """Why there is nothing to wait for, if what is waited for is not there by now."""
    waiting: str = ""
    """What has to end first."""
    queued: str = ""
    """What has to end first, if what is waited for is not there by now."""
    states: tuple[State, ...] = ()
    """State of each other run, in the order of the question."""

    behind_failure: bool = False
    """Whether the reason is another run's failure, which people are told of by itself."""

    @property
    def nothing_before(self) -> bool:
        """Whether one of them is not there, or has ended well: there may be nothing that it should have made."""
        return bool({"none", "done"} & set(self.states))

    def stops_for(self, missing: str) -> str:
        """Return why there is nothing to wait for, and what the look found missing."""
        said = missing.strip().rpartition("\n")[2].removeprefix("NotReadyError: ").rstrip(".")
        return f"{self.unless_ready} What is missing: {said}." if said else self.unless_ready


class NotStartedError(AirflowFailException):
    """Another run keeps a step from beginning; the text is the paragraph that the log ends with."""

    def __init__(self, text: str, *, behind_failure: bool = False) -> None:
        """Take the text, and whether it is for another run's failure, which people are told of by itself."""
        super().__init__(text)
        self.behind_failure = behind_failure


_LEFT_OUT = "If the log lost that day, name it in source.absent_days first."


def look_at(others: Sequence[Mapping[str, Any]], states: Sequence[State] | None = None) -> Seen:
    """Return what stands against a step; blocks while Airflow is asked.

    Args:
        others: what :meth:`Other.of` gave.
        states: how they stand (:func:`states_of`); None: ask.
    """
    states = states_of(others) if states is None else tuple(states)
    seen = {"stop": "", "unless_ready": "", "waiting": "", "queued": ""}
    behind = False
    for other, state in zip(others, states, strict=True):
        name = name_of(other)
        if state == "failed" and other["if_failed"] != "go on":
            kind = "stop" if other["if_failed"] == "stop" else "unless_ready"
            behind = behind or not (seen["stop"] or seen["unless_ready"])
            all_the_same = " If what it makes is published all the same, mark this task as success to go on with that."
            seen[kind] = seen[kind] or (
                f"{_failed(other)}. {other['why']} Clear that run when its cause is mended, then clear this task. "
                f"{_LEFT_OUT}{all_the_same if kind == 'stop' else ''}"
            )
        elif state == "done" and other.get("if_done", "go on") != "go on":
            seen["unless_ready"] = seen["unless_ready"] or (
                f"{name} has ended, and what it makes is not published: was it marked as success? {other['why']} Clear "
                f"that run, then clear this task. {_LEFT_OUT}"
            )
        elif state == "none" and other.get("if_none", "go on") != "go on":
            seen["unless_ready"] = seen["unless_ready"] or (
                f"{name} has no run by the clock or of a backfill. {other['why']} Airflow makes no run of a day that "
                "went by while it stood still: backfill from there on (Missing Runs), then clear this task."
            )
        elif state in ("stuck", "queued", "running"):
            words: str = "queued, and cannot begin" if state == "stuck" else state
            if state == "queued" and other.get("begins_with"):
                words = "queued, or waits to begin"
            kind = "waiting" if state == "running" or other.get("if_queued", "wait") == "wait" else "queued"
            seen[kind] = seen[kind] or f"{name} is {words}. {other['why']}"
    return Seen(**seen, states=tuple(states), behind_failure=behind)


def _failed(other: Mapping[str, Any]) -> str:
    """Say what has failed of another run: the task that matters, or what kept it from running."""
    name, failed = name_of(other), failed_tasks(other["dag_id"], other["day"])
    tasks = " and ".join([", ".join(failed[:-1]), failed[-1]] if failed[1:] else failed)
    if other["task_id"] in failed:
        return f"{name} has failed"
    if not other["task_id"]:
        return f"{name} has failed{f' at {tasks}' if tasks else ''}"
    return f"{name} was not run: {tasks or 'its run'} has failed"


def states_of(others: Sequence[Mapping[str, Any]]) -> tuple[State, ...]:
    """Return the state of each other run; blocks while Airflow is asked."""
    return tuple(
        state_of(
            other["dag_id"], other["task_id"], other["day"], other.get("run_ids", ()), other.get("begins_with", "")
        )
        for other in others
    )


def name_of(other: Mapping[str, Any]) -> str:
    """Return what a person calls the other run or task."""
    task = f"'s task {other['task_id']}" if other["task_id"] else ""
    return f"{other['dag_id']}{task} of {other['day']}"


def state_of(dag_id: str, task_id: str, day: str, run_ids: Sequence[str] = (), begins_with: str = "") -> State:
    """Return the state of the run of a day, or of one of its tasks; a person's "mark as success" is done.

    A queued run is stuck if at most one run of its DAG is running: most likely the one that asks, whose end it needs
    where runs are made one at a time.

    Args:
        dag_id: DAG of the run.
        task_id: task that matters; empty: the whole run.
        day: of the run.
        run_ids: further runs of the day (:func:`by_hand`); while one of them is under way, the day is.
        begins_with: task of the run that waits for its turn (:attr:`Other.begins_with`).
    """
    dates = [datetime.combine(date.fromisoformat(day), datetime.min.time(), tzinfo=UTC)]

    def runs(*states: str, of: list[datetime] | None = dates) -> int:
        count: int = _airflow().get_dr_count(dag_id=dag_id, logical_dates=of, states=list(states) or None)
        return count

    def tasks(*states: str, of: str = task_id) -> int:
        count: int = _airflow().get_ti_count(dag_id=dag_id, task_ids=[of], logical_dates=dates, states=list(states))
        return count

    if any(_under_way(dag_id, task_id, run_id) for run_id in run_ids):
        return "running"
    if not runs():
        return "none"
    if task_id and tasks("success"):
        return "done"
    if task_id and tasks("failed", "upstream_failed"):
        return "failed"
    if runs("queued"):
        return "queued" if runs("running", of=None) > 1 else "stuck"
    if runs("running"):
        began = not begins_with or tasks("success", "skipped", "failed", "upstream_failed", of=begins_with)
        return "running" if began else "queued"
    return "failed" if runs("failed") else "done"


def failed_tasks(dag_id: str, day: str) -> list[str]:
    """Return the tasks that failed in the run of a day, not those that were not run for it; blocks meanwhile."""
    midnight = datetime.combine(date.fromisoformat(day), datetime.min.time(), tzinfo=UTC)
    runs = _airflow().get_task_states(dag_id=dag_id, logical_dates=[midnight])
    return sorted({task for tasks in runs.values() for task, state in tasks.items() if state == "failed"})


def by_hand(dag_id: str, day: str) -> list[str]:
    """Return the runs of a day that a person started and that are under way; only a worker can ask, no trigger.

    They are found by their field Day, or, where it is empty, by the day of the click.
    """
    from airflow.sdk.execution_time import task_runner
    from airflow.sdk.execution_time.comms import GetPreviousDagRun

    found: list[str] = []
    latest = datetime.now(UTC) + timedelta(days=1)
    while True:
        asked = GetPreviousDagRun(dag_id=dag_id, logical_date=latest, state="running")
        run = task_runner.SUPERVISOR_COMMS.send(asked).dag_run  # type: ignore[union-attr]
        if run is None or run.logical_date is None:
            return found
        latest = run.logical_date
        ds = (run.conf or {}).get("ds") or latest.astimezone(UTC).date().isoformat()
        if run.run_type != "backfill" and ds == day:
            found.append(run.run_id)


def _under_way(dag_id: str, task_id: str, run_id: str) -> bool:
    if not _airflow().get_dr_count(dag_id=dag_id, run_ids=[run_id], states=["running"]):
        return False
    return not (task_id and succeeded(dag_id, run_id, task_id))


def succeeded(dag_id: str, run_id: str, task_id: str) -> bool:
    """Tell whether a task of a run has succeeded, or was marked as success; blocks while Airflow is asked."""
    return bool(_airflow().get_ti_count(dag_id=dag_id, run_ids=[run_id], task_ids=[task_id], states=["success"]))


def _airflow() -> Any:
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    return RuntimeTaskInstance
