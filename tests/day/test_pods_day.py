"""Trainings in pods through Airflow's own scheduler, workers and triggerer; the cluster is a stand-in on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster

from infra.local.airflow import REPOSITORY, LocalAirflow
from tests.images import image_environment
from tests.pod_template import own_template

pytest.importorskip("airflow.providers.cncf.kubernetes")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

DAG_FILE = """
from datetime import timedelta
from airflow.sdk import DAG
from dags.days import DAILY, START, day_param
from dags.launch import LaunchStep
from dags.steps import DAY, DEFAULTS

QUICK = {**DEFAULTS, "retries": 1, "retry_delay": timedelta(seconds=1), "retry_exponential_backoff": 0}
with DAG("pods", schedule=DAILY, start_date=START, catchup=False, default_args=QUICK, params={"ds": day_param()}):
    for how in ("fine", "bad", "lost"):
        LaunchStep(task_id=how, module="program", arguments=[how, DAY], execution_timeout=timedelta(minutes=5))
"""

PROGRAM = """
import pathlib, sys, time
sys.path.insert(0, "@REPOSITORY@")
from onetrans.settings import load_settings
load_settings()
how = sys.argv[1]
print("this is", how, flush=True)
if how == "lost" and not pathlib.Path("checkpoint").exists():
    pathlib.Path("checkpoint").touch()
    time.sleep(600)
if how == "bad":
    print("BadDataError: 3 rows", file=sys.stderr)
    sys.exit(65)
"""


def test_pods_end_as_their_exit_codes_say_and_a_lost_one_is_replaced(tmp_path: Path) -> None:
    from dags.pods import LOGS_EVERY_S

    for name in ("dags", "pods"):
        (tmp_path / name).mkdir()
    (tmp_path / "dags" / "pods.py").write_text(DAG_FILE, encoding="utf-8")
    (tmp_path / "pods" / "program.py").write_text(PROGRAM.replace("@REPOSITORY@", str(REPOSITORY)), encoding="utf-8")
    cluster = Cluster(tmp_path / "pods", image={"ONETRANS_CONFIG": image_environment("training")["ONETRANS_CONFIG"]})
    environment = {
        "AIRFLOW_CONN_KUBERNETES_DEFAULT": cluster.connection(),
        "ONETRANS_LAUNCH_PLACE": "kubernetes",
        "ONETRANS_LAUNCH_POD_TEMPLATE": str(own_template(tmp_path)),
        "ONETRANS_TRAINING_RUNS": str(tmp_path / "runs"),
        "ONETRANS_LAKE_WAREHOUSE": str(tmp_path / "lake"),
        "ONETRANS_MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
    }
    try:
        with LocalAirflow(tmp_path / "airflow", environment, dags=tmp_path / "dags") as airflow:
            run = airflow.api.trigger("pods", {"ds": "2026-01-02"})
            _wait(lambda: (tmp_path / "pods" / "checkpoint").exists(), "the pod that will be lost")
            # While it runs: of a pod that is gone nobody can be asked for its log.
            (lost,) = (task for task in airflow.api.tasks("pods", run.run_id) if task.task_id == "lost")
            _wait(lambda: "this is lost" in "\n".join(airflow.api.log(lost)), "its log", 4 * LOGS_EVERY_S)
            cluster.kill(next(name for name in cluster.made if name.startswith("lost")))
            _wait(lambda: airflow.api.run("pods", run.run_id).finished, "the run")
            tasks = {task.task_id: task for task in airflow.api.tasks("pods", run.run_id)}
            assert {name: (task.state, task.tries) for name, task in tasks.items()} == {
                "fine": ("success", 1),
                "bad": ("failed", 1),
                "lost": ("success", 2),
            }
            assert "this is fine" in "\n".join(airflow.api.log(tasks["fine"]))
            assert "bad of 2026-01-02: BAD DATA. BadDataError: 3 rows." in "\n".join(airflow.api.log(tasks["bad"]))
            assert "lost of 2026-01-02: POD LOST." in "\n".join(airflow.api.log(tasks["lost"], attempt=1))
            assert cluster.pods == {}
    finally:
        cluster.close()


def _wait(ready: Callable[[], bool], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.5)
