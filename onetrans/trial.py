"""A trial: a day that was decided is judged anew, beside its record.

With ``gate.mode`` = ``dry_run`` or ``off`` nobody wants the day decided again.  So what
evaluation and gate find of the plan that decided it goes to a folder of the plan that is
named after the mode, and to one of that name among the artifacts of the plan's MLflow
run: scores, figures, verdict, page and promotion of the decision stay as they are.
Another plan of the day (another preset, fresh weights, tables that were built again) has
no record to keep, and a run of its own; there a dry run writes where a decision would.

Either way no version is registered, the decision stays the outcome of the day in
reports, and its training stays the one that later days go on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from onetrans import storage
from onetrans.plan import PROMOTION_FILE, Plan, decision_in
from onetrans.settings import Settings
from onetrans.tracking import log_beside, recorded_step

TRIAL_FOLDER = "trial"
"""In a plan's folder: what the last trial of each mode found."""


def decision_of_day(plan: Plan) -> dict[str, Any] | None:
    """Return what a plan's day was decided last, the content of a ``promotion.json``: of that plan or another."""
    day = plan.path.rstrip("/").rsplit("/", 1)[0]
    folders = [path.rsplit("/", 1)[0] for path in storage.list_files(day, PROMOTION_FILE)]
    return max(filter(None, map(decision_in, folders)), key=lambda decision: str(decision["finished_at"]), default=None)


def is_trial(settings: Settings, plan: Plan) -> bool:
    """Tell whether these settings decide nothing, and the day was decided by this plan: it has a record to keep."""
    return settings.gate.mode != "enabled" and decision_in(plan.path) is not None


def results_folder(settings: Settings, plan: Plan) -> str:
    """Return where evaluation and gate of a plan write: its own folder, or that of the trial."""
    return storage.join(plan.path, TRIAL_FOLDER, settings.gate.mode) if is_trial(settings, plan) else plan.path


def step_of_day(settings: Settings, plan: Plan, step: str) -> AbstractContextManager[None]:
    """Return the context of a step: its failure is recorded on the day's run, unless it is one of a trial."""
    return nullcontext() if is_trial(settings, plan) else recorded_step(settings, plan, step)


def log_trial(settings: Settings, plan: Plan, files: Mapping[str, Mapping[str, Any] | str]) -> None:
    """Keep files of a trial among the artifacts of the plan's MLflow run, if it has one."""
    if plan.mlflow_run_id:
        log_beside(settings, plan, f"{TRIAL_FOLDER}/{settings.gate.mode}", files)


def forget_trials(plan: Plan) -> None:
    """Remove what trials of a plan found: they were of scores that are replaced."""
    storage.delete_tree(storage.join(plan.path, TRIAL_FOLDER))
