"""The newest day that has a verdict: its plan, the gate's page, and MLflow's comparison of its two models."""

from __future__ import annotations

import urllib.parse

from onetrans import storage
from onetrans.errors import NotReadyError
from onetrans.plan import GATE_FILE, PAGE_FILE, Plan
from onetrans.scores import BASELINE, CANDIDATE
from onetrans.settings import Settings
from onetrans.tracking import experiment_id, find_model_run
from onetrans.trial import TRIAL_FOLDER


def newest_judged(settings: Settings) -> Plan:
    """Return the plan of the newest day that has a verdict.

    Raises:
        NotReadyError: if there is none.
    """
    judged = storage.list_files(storage.resolve(settings.training.runs), GATE_FILE)
    folders = [path.rsplit("/", 1)[0] for path in judged]
    plans = [Plan.load(folder) for folder in folders if not folder.endswith(f"/{TRIAL_FOLDER}")]
    if not plans:
        raise NotReadyError(f"no day of {settings.training.runs} has a verdict; run make demo, or a day of your own")
    return max(plans, key=lambda plan: plan.ds)


def verdict_page(plan: Plan) -> str:
    """Return the address of the gate's page of a day."""
    path = storage.join(plan.path, PAGE_FILE)
    return storage.local_path(path).as_uri() if storage.is_local(path) else path


def comparison(settings: Settings, plan: Plan, mlflow: str) -> str:
    """Return the address of MLflow's comparison of a day's two models.

    Args:
        settings: where the runs are.
        plan: of the day.
        mlflow: address of MLflow's pages.

    Raises:
        NotReadyError: if MLflow does not answer.
    """
    runs = [find_model_run(settings, plan, name) for name in (CANDIDATE, BASELINE)]
    ids = ",".join(f'"{run.info.run_id}"' for run in runs if run is not None)
    asked = {"runs": f"[{ids}]", "experiments": f'["{experiment_id(settings.mlflow)}"]'}
    return f"{mlflow}/#/compare-runs?{urllib.parse.urlencode(asked)}"
