"""A trial: a day that was decided is judged anew, beside its record.

With ``gate.mode`` = ``dry_run`` or ``off`` nobody wants the day decided again.  So what
evaluation and gate find then, of whatever plan, goes to a folder of the plan that is named
after the mode, and to one of that name among the artifacts of the plan's MLflow run; no
version is registered.  Scores, figures, verdict, page and promotion of the decision stay
as they are, its training stays the one that later days go on from, and it stays the
outcome of the day in reports.  A day that was never decided has no record to keep: there
a dry run writes where the decision would.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from onetrans import storage
from onetrans.plan import PROMOTION_FILE, Plan, decides
from onetrans.settings import Settings
from onetrans.tracking import log_beside, recorded_step

TRIAL_FOLDER = "trial"
"""In a plan's folder: what the last trial of each mode found."""


def decided(plan: Plan) -> dict[str, Any] | None:
    """Return the newest decision of a plan's day, the content of its ``promotion.json``: of that plan or another."""
    day = plan.path.rstrip("/").rsplit("/", 1)[0]
    found = [storage.read_json(path) for path in storage.list_files(day, PROMOTION_FILE)]
    return max(filter(decides, found), key=lambda promotion: str(promotion["finished_at"]), default=None)


def is_trial(settings: Settings, plan: Plan) -> bool:
    """Tell whether these settings decide nothing, and the day was decided with settings that do."""
    return settings.gate.mode != "enabled" and decided(plan) is not None


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
