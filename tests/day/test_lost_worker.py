"""What Airflow itself ends: a worker that is killed with everything on it, a run that takes too long."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from infra.local.airflow import LocalAirflow
from tests.day.conftest import Receiver

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

DAG_FILE = """
from datetime import timedelta
from airflow.sdk import DAG
from dags.days import DAILY, START, day_param
from dags.notify import run_failed
from dags.steps import DAY, DEFAULTS, Step

COMMON = {
    "schedule": DAILY, "start_date": START, "catchup": False, "params": {"ds": day_param()},
    "on_failure_callback": run_failed,
    "default_args": {**DEFAULTS, "retries": 1, "retry_delay": timedelta(seconds=1), "retry_exponential_backoff": 0},
}
with DAG("lost_worker", **COMMON):
    Step(task_id="step", module="kills_its_worker", arguments=[DAY])
with DAG("too_long", dagrun_timeout=timedelta(seconds=8), **COMMON):
    Step(task_id="step", module="sleeps", arguments=[DAY])
"""

KILLS_ITS_WORKER = """
import time
import psutil
task = psutil.Process().parent()
worker = task.parent()
worker.kill()
task.kill()
time.sleep(20)
"""


def test_a_lost_worker_and_a_run_that_takes_too_long_are_told_of(tmp_path: Path, receiver: Receiver) -> None:
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "lost.py").write_text(DAG_FILE, encoding="utf-8")
    (tmp_path / "kills_its_worker.py").write_text(KILLS_ITS_WORKER, encoding="utf-8")
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(40)", encoding="utf-8")
    environment = {
        "ONETRANS_AIRFLOW_NOTIFY": "receiver",
        "AIRFLOW_CONN_RECEIVER": json.dumps({"conn_type": "http", "password": receiver.address}),
    }
    airflow = LocalAirflow(tmp_path / "airflow", environment, dags=tmp_path / "dags")
    airflow.environment |= {
        "PYTHONPATH": airflow.environment["PYTHONPATH"] + os.pathsep + str(tmp_path),
        # Five minutes, as it is by default, would be five minutes of waiting here.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "8",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
    }
    wanted = {
        ("lost_worker", "step"): "step of 2026-01-02: ENDED WITHOUT A WORD. Its worker was killed",
        ("lost_worker", ""): "a task has failed",
        ("too_long", ""): "it took longer than dagrun_timeout allows",
    }
    with airflow:
        runs = [airflow.api.trigger(dag_id, {"ds": "2026-01-02"}) for dag_id in ("lost_worker", "too_long")]
        deadline = time.monotonic() + 240
        told: dict[tuple[str, str], str] = {}
        while not told.keys() >= wanted.keys():
            assert time.monotonic() < deadline, f"people were told of {told} only"
            time.sleep(0.5)
            told = {(message["dag_id"], message["task_id"]): message["text"] for message in receiver.got}
        for key, words in wanted.items():
            assert words in told[key]
        (step,) = airflow.api.tasks("lost_worker", runs[0].run_id)
        assert (step.state, step.tries) == ("failed", 2)
        assert ("too_long", "step") not in told
