"""Faults during a day, through Airflow: its scheduler, its database, MLflow, the disk, and a person who clears a day.

Nobody repairs anything: servers that ended are started again, as a service manager does, room is made on a full disk,
and that is all.  After each fault every table equals that of a lake which one Spark session built from the same log,
undisturbed, and each day's model was promoted once.  Old days that are backfilled while tonight's run promotes are in
``test_nights.py``, faults of single steps in ``tests/component/test_faults.py``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date, timedelta

import pytest

from infra.airflow.api import AirflowApiError
from infra.local.processes import Server, stop
from onetrans import storage
from onetrans.lake import TABLES, Lake
from onetrans.registry import CHAMPION, Registry
from onetrans.settings import LakeSettings
from onetrans.tracking import TAG_DAY, TAG_DECISION, TAG_PLAN
from tests import mlflow_server, postgres
from tests.day.conftest import Deployment
from tests.day.deployment import PROMOTE_ALL, build, describe, rows

pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed")

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(bool(postgres.why_missing()), reason=postgres.why_missing()),
]

FIRST = date(2026, 3, 1)
HISTORY, SCHEDULER, DATABASE, AWAY, NEXT = DAYS = [FIRST + timedelta(days=offset) for offset in range(5)]
"""The history, and the days in which the scheduler is killed; in which the database is restarted; in which the disk
is full and MLflow away, and which is cleared later; in which that happens."""
DAGS = ("feature_tables", "ranking_model")
AWAY_S = 120.0
"""Seconds without MLflow."""
DOWN_S = 10.0
"""Seconds without a database."""
GOES_THROUGH_S = float(os.environ.get("GOES_THROUGH_S", "1800"))
"""Seconds in which what is left of a day has to be done; undisturbed, both DAGs take some minutes of two cores.

``tests/unprotected.py`` waits less long for a day that stands still."""

Run = tuple[str, str]
Runs = dict[str, Run]


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Postgres]:
    """Airflow's database."""
    with postgres.running() as started:
        yield started


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MLflow's server."""
    with mlflow_server.running(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, database: postgres.Postgres, tracking: Server
) -> Iterator[Deployment]:
    """A log of five days, the first built."""
    deployed = describe(
        tmp_path_factory.mktemp("faults"),
        FIRST,
        len(DAYS),
        PROMOTE_ALL,
        database.create("airflow"),
        environment={"ONETRANS_MLFLOW_TRACKING_URI": tracking.name},
    )
    build(deployed, HISTORY, HISTORY)
    with deployed.airflow:
        yield deployed


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> Lake:
    """A lake of the same days in which nothing went wrong."""
    warehouse = str(deployment.folder / "undisturbed")
    build(deployment, HISTORY, NEXT, {"ONETRANS_LAKE_WAREHOUSE": warehouse})
    return Lake(LakeSettings(warehouse=warehouse))


def _start(deployment: Deployment, ds: date) -> Runs:
    """Backfill a day; where a test is run by itself, the days before it are built first."""
    deployment.backfills_end(*DAGS)
    missing = [day for day in DAYS if day < ds and day not in deployment.lake.days("training_requests")]
    if missing:
        build(deployment, missing[0], missing[-1])
    return {dag_id: deployment.backfill(dag_id, ds) for dag_id in DAGS}


def _wait_for(deployment: Deployment, run: Run, task_id: str, state: str = "running") -> None:
    """Wait until a task of a run is in a state; an Airflow that does not answer is asked again."""
    deadline = time.monotonic() + GOES_THROUGH_S
    while True:
        deployment.airflow.revive()
        with suppress(OSError, AirflowApiError):
            tasks = deployment.tasks(*run)
            if (state, task_id) in {(task.state, task.task_id) for task in tasks}:
                return
            assert not deployment.airflow.api.run(*run).finished, f"{run} ended before {task_id} was {state}: {tasks}"
        assert time.monotonic() < deadline, f"{task_id} of {run} is not {state}"
        time.sleep(0.2)


def _goes_through(deployment: Deployment, *runs: Run) -> list[str]:
    """Wait until runs have succeeded, with nothing but dead servers started again; return these.

    Servers are not looked at otherwise: whether a day stands still without one is what the day has to show.
    """
    deadline = time.monotonic() + GOES_THROUGH_S
    revived: list[str] = []
    while True:
        revived += deployment.airflow.revive()
        try:
            now = [deployment.airflow.api.run(*run) for run in runs]
        except (OSError, AirflowApiError):
            now = []  # the API server is one of them, or has no database
        if now and all(run.finished for run in now):
            states = [(run.dag_id, run.logical_date, run.state) for run in now]
            assert {state for *_, state in states} == {"success"}, (states, revived)
            return revived
        assert time.monotonic() < deadline, ([deployment.tasks(*run) for run in runs], revived)
        time.sleep(0.5)


def _server(deployment: Deployment, name: str) -> Server:
    return next(server for server in deployment.airflow.servers if server.name == f"airflow {name}")


def _promoted_once(deployment: Deployment, *days: date) -> None:
    """Check that each day has one version that was promoted, no plan two versions, and that the last day's serves."""
    registry = Registry(deployment.settings.mlflow)
    versions = registry.versions()
    plans = [version.tags[TAG_PLAN] for version in versions]
    assert len(plans) == len(set(plans)), "a model was registered twice"
    promoted = [version.tags[TAG_DAY] for version in versions if version.tags[TAG_DECISION] == "promoted"]
    assert [promoted.count(str(ds)) for ds in days] == [1] * len(days), promoted
    champion = registry.by_alias(CHAMPION)
    assert champion is not None
    assert champion.tags[TAG_DAY] == str(max(days))


def _is_whole(deployment: Deployment, undisturbed: Lake, *days: date) -> None:
    """Check every table of some days, and that no other day is there beside those before."""
    for table in TABLES:
        for ds in days:
            assert rows(deployment.lake, table, ds) == rows(undisturbed, table, ds), f"{table} {ds}"
        assert deployment.lake.days(table) == [ds for ds in DAYS if ds <= max(days)], table


def test_the_scheduler_is_killed_during_a_day(deployment: Deployment, undisturbed: Lake) -> None:
    runs = _start(deployment, SCHEDULER)
    _wait_for(deployment, runs["feature_tables"], "behaviors.build")
    scheduler = _server(deployment, "scheduler")
    assert scheduler.process is not None
    os.kill(scheduler.process.pid, signal.SIGKILL)
    scheduler.process.wait()
    assert "airflow scheduler" in _goes_through(deployment, *runs.values())
    _is_whole(deployment, undisturbed, SCHEDULER)
    _promoted_once(deployment, SCHEDULER)


def test_the_database_is_restarted_during_a_day(
    deployment: Deployment, undisturbed: Lake, database: postgres.Postgres
) -> None:
    """As by a power cut: once while Spark works and the model's run waits, once while both models train."""
    runs = _start(deployment, DATABASE)
    for dag_id, task_id in (("feature_tables", "behaviors.build"), ("ranking_model", "train_onetrans")):
        _wait_for(deployment, runs[dag_id], task_id)
        database.stop("immediate")
        with pytest.raises((OSError, AirflowApiError)):
            deployment.airflow.api.run(*runs[dag_id])
        time.sleep(DOWN_S)
        database.start()
        _answers(deployment)
    _goes_through(deployment, *runs.values())
    _is_whole(deployment, undisturbed, DATABASE)
    _promoted_once(deployment, DATABASE)


def _answers(deployment: Deployment) -> None:
    """Wait until Airflow's API answers again."""
    deadline = time.monotonic() + 600
    while True:
        deployment.airflow.revive()
        try:
            deployment.airflow.api.runs(DAGS[0])
        except (OSError, AirflowApiError):
            assert time.monotonic() < deadline, "Airflow does not answer though its database is back"
            time.sleep(0.5)
        else:
            return


@pytest.fixture(scope="module")
def disk_is_full(deployment: Deployment) -> Iterator[Callable[[], bool]]:
    """A disk without room for the next day's impressions; what is returned makes room, and tells if there was none."""
    data = storage.local_path(deployment.lake.new_stage_path("impressions", AWAY)).parent
    data.mkdir(parents=True)
    as_root = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    mounted = False
    with suppress(FileNotFoundError):  # no sudo
        full = [*as_root, "mount", "-t", "tmpfs", "-o", "size=4k,mode=1777", "tmpfs", str(data)]
        mounted = subprocess.run(full, capture_output=True).returncode == 0
    was_full = mounted

    def make_room() -> bool:
        nonlocal mounted
        if mounted:
            subprocess.run([*as_root, "umount", str(data)], check=True)
            mounted = False
        return was_full

    yield make_room
    make_room()


@pytest.fixture(scope="module")
def away(deployment: Deployment, disk_is_full: Callable[[], bool]) -> Runs:
    """The runs of the day of the next three tests; its first step has met the full disk, if there is one."""
    runs = _start(deployment, AWAY)
    if os.path.ismount(storage.local_path(deployment.lake.new_stage_path("impressions", AWAY)).parent):
        _wait_for(deployment, runs["feature_tables"], "impressions.build", "up_for_retry")
    disk_is_full()
    return runs


def test_the_disk_is_full_while_a_day_is_staged(
    deployment: Deployment, undisturbed: Lake, disk_is_full: Callable[[], bool], away: Runs
) -> None:
    """Nothing is published, the log says what to do, and once there is room the next try does it."""
    if not disk_is_full():
        pytest.skip("a small file system cannot be mounted here (it needs root, or sudo without a password)")
    run = away["feature_tables"]
    assert AWAY not in deployment.lake.days("impressions")
    _goes_through(deployment, run)
    build_step = deployment.task(*run, "impressions.build")
    assert build_step.tries == 2
    told = "\n".join(deployment.airflow.api.log(build_step, attempt=1))
    for words in ("No space left on device", "The disk is full: make room for it", "this was try 1 of 4"):
        assert words in told
    _is_whole(deployment, undisturbed, AWAY)


def test_mlflow_is_away_for_two_minutes_while_models_train(
    deployment: Deployment, away: Runs, tracking: Server
) -> None:
    run = away["ranking_model"]
    _wait_for(deployment, run, "train_onetrans")
    stop([tracking], grace=0)
    time.sleep(AWAY_S)
    assert deployment.task(*run, "evaluate").state != "success", "the day needed no MLflow"
    mlflow_server.start(tracking)
    _goes_through(deployment, run)
    _promoted_once(deployment, AWAY)
    client = Registry(deployment.settings.mlflow).client
    experiment = client.get_experiment_by_name(deployment.settings.mlflow.experiment)
    assert experiment is not None
    recorded = client.search_runs([experiment.experiment_id], f"tags.{TAG_DAY} = '{AWAY}'")
    assert [run.info.status for run in recorded] == ["FINISHED"] * 3  # the day's, and one of each model


def test_a_day_is_cleared_and_run_again_while_the_next_one_trains(
    deployment: Deployment, undisturbed: Lake, away: Runs
) -> None:
    _goes_through(deployment, *away.values())
    runs = _start(deployment, NEXT)
    _wait_for(deployment, runs["ranking_model"], "train_onetrans")
    for dag_id, run_id in away.values():
        again = {"dag_run_id": run_id, "dry_run": False, "only_failed": False, "reset_dag_runs": True}
        deployment.airflow.api.call("POST", f"/dags/{dag_id}/clearTaskInstances", again)
    published = {table: deployment.lake.snapshot_id(table) for table in TABLES}
    _goes_through(deployment, *runs.values(), *away.values())
    assert all(deployment.lake.snapshot_id(table) != published[table] for table in TABLES), "it was not run again"
    _is_whole(deployment, undisturbed, AWAY, NEXT)
    _promoted_once(deployment, AWAY, NEXT)
