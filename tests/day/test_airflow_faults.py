"""Faults of Airflow during a day: its scheduler is killed.

Nobody repairs anything: servers that ended are started again, as a service manager does, and that is all.  After the
fault every table equals that of a lake which one Spark session built from the same log, undisturbed, and the day's
model was promoted once.  Faults of single steps are in ``tests/component/test_faults.py``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import date, timedelta

import pytest

from infra.local.processes import Server
from onetrans.lake import TABLES, Lake
from onetrans.registry import TAG_DAY, Registry
from onetrans.settings import LakeSettings
from tests import postgres
from tests.day.conftest import Deployment
from tests.day.deployment import PROMOTE_ALL, build, describe, rows

pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed")

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(postgres.why_missing()), reason=postgres.why_missing()),
]

FIRST = date(2026, 3, 1)
HISTORY, SCHEDULER = FIRST, FIRST + timedelta(days=1)
"""The history, and the day in which the scheduler is killed."""
DAGS = ("feature_tables", "ranking_model")

Runs = dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Postgres]:
    """Airflow's database."""
    with postgres.running() as started:
        yield started


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, server: postgres.Postgres) -> Iterator[Deployment]:
    """A log of two days, the first built."""
    deployed = describe(tmp_path_factory.mktemp("faults"), FIRST, 2, PROMOTE_ALL, server.create("airflow"))
    build(deployed, HISTORY, HISTORY)
    with deployed.airflow:
        yield deployed


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> Lake:
    """A lake of the same days in which nothing went wrong."""
    warehouse = str(deployment.folder / "undisturbed")
    build(deployment, HISTORY, SCHEDULER, {"ONETRANS_LAKE_WAREHOUSE": warehouse})
    return Lake(LakeSettings(warehouse=warehouse))


def _start(deployment: Deployment, ds: date) -> Runs:
    return {dag_id: deployment.backfill(dag_id, ds) for dag_id in DAGS}


def _wait_for(deployment: Deployment, run: tuple[str, str], task_id: str) -> None:
    """Wait until a task of a run runs."""
    deadline = time.monotonic() + 600
    while ("running", task_id) not in {(task.state, task.task_id) for task in deployment.tasks(*run)}:
        assert time.monotonic() < deadline, deployment.tasks(*run)
        assert not deployment.airflow.api.run(*run).finished, "the run ended before the fault"
        time.sleep(0.1)


def _goes_through(deployment: Deployment, runs: Runs) -> list[str]:
    """Wait until both runs have succeeded, with nothing but dead servers started again; return these."""
    deadline = time.monotonic() + 1800
    revived: list[str] = []
    while True:
        revived += deployment.airflow.revive()
        try:
            now = [deployment.airflow.api.run(*run) for run in runs.values()]
        except OSError:
            now = []  # the API server is one of them
        if now and all(run.finished for run in now):
            assert [run.state for run in now] == ["success"] * len(now), revived
            return revived
        assert time.monotonic() < deadline, [deployment.tasks(*run) for run in runs.values()]
        time.sleep(0.5)


def _server(deployment: Deployment, name: str) -> Server:
    return next(server for server in deployment.airflow.servers if server.name == f"airflow {name}")


def _versions(deployment: Deployment) -> list[str]:
    """Return the days of all versions in the order of their registration."""
    versions = Registry(deployment.settings.mlflow).versions()
    return [version.tags[TAG_DAY] for version in reversed(versions)]


def _is_whole(deployment: Deployment, undisturbed: Lake, ds: date) -> None:
    for table in TABLES:
        assert rows(deployment.lake, table, ds) == rows(undisturbed, table, ds), f"{table} {ds}"


def test_the_scheduler_is_killed_during_a_day(deployment: Deployment, undisturbed: Lake) -> None:
    runs = _start(deployment, SCHEDULER)
    _wait_for(deployment, runs["feature_tables"], "behaviors.build")
    scheduler = _server(deployment, "scheduler")
    assert scheduler.process is not None
    os.kill(scheduler.process.pid, signal.SIGKILL)
    scheduler.process.wait()
    assert "airflow scheduler" in _goes_through(deployment, runs)
    _is_whole(deployment, undisturbed, SCHEDULER)
    assert _versions(deployment) == [str(SCHEDULER)]
