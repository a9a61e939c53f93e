"""Which run gets a free slot first: tonight's, then the days that a backfill makes up for.

Airflow starts the waiting task with the highest priority, and among equals the
one of the *earliest* day: without this, a month's backfill would go before
tonight's run in every pool.  A task's priority is declared with the task, so it
cannot tell runs apart; Airflow asks ``task_instance_mutation_hook`` as it
creates or clears the tasks of a run, and that one knows the run.

What runs already is never stopped: tonight's run waits at most until one task of
the backfill ends.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

STEPS = ("Step", "WaitStep", "LaunchStep")
"""Operators of ``dags/steps.py``, whose tasks are put in order; other DAGs of the same Airflow are left alone."""

TONIGHT = timedelta(hours=36)
"""A run that was due longer ago than this makes up for a day, whoever started it.

Airflow clears a run before it makes it one of a backfill, so a day that is run again is known by its age alone.
"""

LAST = 0
"""Priority of a task that makes up for a day; those declared begin at 1.  Among these the earliest day is first."""


def task_instance_mutation_hook(task_instance: Any, dag_run: Any) -> None:
    """Lower the priority of a task whose run can wait; Airflow calls this."""
    if dag_run is None or task_instance.operator not in STEPS:
        return
    late = dag_run.run_after is not None and datetime.now(UTC) - dag_run.run_after > TONIGHT
    if str(dag_run.run_type) == "backfill" or late:
        task_instance.priority_weight = LAST
