"""The newest day that has a verdict: its plan, the gate's page, and MLflow's comparison of its two models."""

from __future__ import annotations

import urllib.parse

from onetrans import storage
from onetrans.errors import NotReadyError
from onetrans.plan import PAGE_FILE, Plan
from onetrans.report import planned_days, report
from onetrans.scores import BASELINE, CANDIDATE
from onetrans.settings import Settings
from onetrans.tracking import answering, find_model_run, require_answer


def newest_judged(settings: Settings) -> Plan:
    """Return the plan of the newest day that has a verdict.

    Raises:
        NotReadyError: if there is none.
    """
    for ds in reversed(planned_days(settings)):
        (day,) = report(settings, ds, ds)
        if day["verdict"] is not None:
            return Plan.load(day["path"])
    raise NotReadyError(f"no day of {settings.training.runs} has a verdict; run make demo, or a day of your own")


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
        NotReadyError: if MLflow does not answer, or has no run of either.
    """
    require_answer(settings.mlflow)
    with answering(settings.mlflow, look=True):
        return _comparison(settings, plan, mlflow)


def _comparison(settings: Settings, plan: Plan, mlflow: str) -> str:
    runs = [find_model_run(settings, plan, name) for name in (CANDIDATE, BASELINE)]
    there = [run.info for run in runs if run is not None]
    if not there:
        raise NotReadyError(f"MLflow has no run of either model of {plan.ds}")
    ids = ",".join(f'"{info.run_id}"' for info in there)
    asked = {"runs": f"[{ids}]", "experiments": f'["{there[0].experiment_id}"]'}
    return f"{mlflow}/#/compare-runs?{urllib.parse.urlencode(asked)}"
