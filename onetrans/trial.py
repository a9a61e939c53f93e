"""A trial: a day that was decided is judged anew, beside its record.

With ``gate.mode`` = ``dry_run`` or ``off`` nobody wants the day decided again.  So what
evaluation and gate find then goes to the folder ``trial`` of the plan, and to a folder of
that name among the artifacts of the day's MLflow run; scores, figures, verdict, page and
promotion of the decision stay as they are.  A day that was never decided has no record to
keep: there a dry run writes where the decision would.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from onetrans import storage
from onetrans.plan import PROMOTION_FILE, Plan
from onetrans.settings import Settings
from onetrans.tracking import log_beside, recorded_step

TRIAL_FOLDER = "trial"
"""In a plan's folder: what the last trial found."""


def is_trial(settings: Settings, plan: Plan) -> bool:
    """Tell whether these settings decide nothing, and the day was decided with settings that do."""
    path = storage.join(plan.path, PROMOTION_FILE)
    if settings.gate.mode == "enabled" or not storage.exists(path):
        return False
    return bool(storage.read_json(path).get("mode", "enabled") == "enabled")


def results_folder(settings: Settings, plan: Plan) -> str:
    """Return where evaluation and gate of a plan write: its own folder, or that of the trial."""
    return storage.join(plan.path, TRIAL_FOLDER) if is_trial(settings, plan) else plan.path


def step_of_day(settings: Settings, plan: Plan, step: str) -> AbstractContextManager[None]:
    """Return the context of a step: its failure is recorded on the day's run, unless it is one of a trial."""
    return nullcontext() if is_trial(settings, plan) else recorded_step(settings, plan, step)


def log_trial(settings: Settings, plan: Plan, files: Mapping[str, Mapping[str, Any] | str]) -> None:
    """Keep files of a trial among the artifacts of the day's MLflow run, if the plan has one."""
    if plan.mlflow_run_id:
        log_beside(settings, plan, TRIAL_FOLDER, files)
