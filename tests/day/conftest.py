"""One small deployment with a local Airflow, shared by all tests of the day."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest

from infra.airflow.api import Run, Task
from infra.local.airflow import REPOSITORY, LocalAirflow
from infra.local.homes import small_config
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import write_days
from onetrans.lake import Lake
from onetrans.settings import Settings, load_settings

if TYPE_CHECKING:
    from infra.local.airflow_page import AirflowPage

FIRST = date(2026, 1, 1)
SECRET = "whoever-has-this-can-write"
"""Part of the address of a webhook, which nobody may read in a log."""
HISTORY, TODAY, BAD = (FIRST + timedelta(days=offset) for offset in range(3))
LOG = WorldConfig(users=400, items=120, history_days=3, epoch=FIRST)

PROBES = '''
"""Steps that end in a given way, to see what Airflow does with them."""
from dataclasses import replace
from datetime import timedelta
from airflow.sdk import DAG, AsyncCallback, DeadlineAlert, DeadlineReference
from dags.notify import day_undecided, run_failed
from dags.days import DAILY, START, day_param
from dags.others import Other
from dags.steps import DAY, DEFAULTS, PREVIOUS_DAY, Step, WaitStep

QUICK = {**DEFAULTS, "retries": 2, "retry_delay": timedelta(seconds=1), "retry_exponential_backoff": 0}
COMMON = {"schedule": DAILY, "start_date": START, "catchup": False, "default_args": QUICK}
for name in ("transient", "lasting", "killed", "quick"):
    with DAG(name, params={"ds": day_param()}, on_failure_callback=run_failed, **COMMON):
        Step(task_id="step", module="probe", arguments=[name, DAY])
soon, when = timedelta(seconds=4), DeadlineReference.DAGRUN_LOGICAL_DATE
callback = AsyncCallback(day_undecided, kwargs={"decided_by": "step"})
alert = DeadlineAlert(reference=when, interval=soon, callback=callback)
with DAG("late", deadline=alert, **COMMON):
    Step(task_id="step", module="probe", arguments=["late", DAY])
alert = DeadlineAlert(reference=when, interval=timedelta(hours=1), callback=callback)
with DAG("decided", deadline=alert, **COMMON):  # As scores are computed once a model is promoted.
    first = Step(task_id="step", module="probe", arguments=["one_day", DAY])
    first >> Step(task_id="after", module="probe", arguments=["go", DAY])
with DAG("one_day", params={"ds": day_param()}, **COMMON):
    Step(task_id="step", module="probe", arguments=["one_day", DAY])
with DAG("ordered", params={"ds": day_param()}, **COMMON):
    before = Other("ordered", days_back=1, why="Each day is built on the one before.")
    wait = WaitStep(
        task_id="wait", module="probe", arguments=["ready", DAY], others=[before], at_most=timedelta(minutes=5)
    )
    wait >> Step(task_id="step", module="probe", arguments=["ordered", DAY])
last_night = Other(
    "night",
    days_back=1,
    why="Each day is built on the one before.",
    if_failed="stop unless ready",
    if_queued="wait unless ready",
    if_none="stop unless ready",
    if_done="stop unless ready",
    begins_with="wait",
)
with DAG("night", params={"ds": day_param()}, **COMMON):
    wait = WaitStep(
        task_id="wait",
        module="probe",
        arguments=["whole", PREVIOUS_DAY],
        if_nothing_before=["--or-first"],
        others=[last_night],
        others_of_a_backfill=[replace(last_night, if_failed="stop", if_queued="wait", begins_with="")],
        at_most=timedelta(minutes=5),
    )
    wait >> Step(task_id="step", module="probe", arguments=["go", DAY])
with DAG("alone", params={"ds": day_param()}, max_active_runs=1, **COMMON):
    before = Other("alone", days_back=1, why="Each day is built on the one before.", patience_s={"stuck": 3})
    wait = WaitStep(task_id="wait", others=[before], at_most=timedelta(minutes=5))
    Step(task_id="step", module="probe", arguments=["go", DAY]) >> wait
with DAG("crowded", params={"ds": day_param()}, **COMMON):
    Step(task_id="step", module="probe", arguments=["crowded", DAY], pool="one_slot")
'''

PROBE = '''
"""What the probes run."""
import pathlib, subprocess, sys, time
name, day = sys.argv[1:3]
here = pathlib.Path(__file__).parent
if name == "transient":  # A lost connection: fails twice, then works.
    tries = here / f"tries-{day}"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if len(tries.read_text()) < 3:
        print("ConnectionError: the catalog does not answer", file=sys.stderr)
        sys.exit(1)
    print("works now")
elif name == "quick":  # Tells that it ran, and fails on the day a file names.
    with (here / "quick").open("a") as told:
        print(day, file=told)
    broken = here / "broken"
    sys.exit(65 if broken.exists() and broken.read_text() == day else 0)
elif name == "late":
    time.sleep(6)
elif name == "killed":  # As by the system for want of memory: the whole worker of the task goes.
    import os, signal
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)
elif name == "one_day":
    print("done")
elif name == "go":  # Waits to be told, and with what to end.
    told = here / f"go-{day}"
    while not (told.exists() and told.read_text()):
        time.sleep(0.2)
    code = int(told.read_text())
    if code == 0:
        (here / f"whole-{day}").touch()
    sys.exit(code)
elif name == "whole":  # Nothing is before the first of May, nor of June, nor of July.
    first = "--or-first" in sys.argv and day in ("2020-04-30", "2020-05-31", "2020-06-30")
    sys.exit(0 if first or (here / f"whole-{day}").exists() else 75)
elif name == "crowded":
    time.sleep(1)
elif name == "ready":
    print("ready")
elif name == "ordered":  # One day after another; the second is bad.
    with (here / "order").open("a") as order:
        print("begins", day, file=order, flush=True)
        time.sleep(3)
        print("ends", day, file=order)
    sys.exit(65 if day == "2026-01-02" else 0)
else:  # Something long that started something else.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (here / "child").write_text(str(child.pid))
    time.sleep(600)
'''


@dataclass
class Deployment:
    """A log, a lake, an MLflow store and an Airflow, all in one folder."""

    folder: Path
    settings: Settings
    airflow: LocalAirflow
    told: list[dict[str, str]]
    """What the receiver of notifications was sent."""

    @property
    def lake(self) -> Lake:
        """The lake, read anew."""
        return Lake(self.settings.lake)

    def raw(self, table: str, ds: date) -> Path:
        """Return the raw file of one day."""
        return self.folder / "raw" / table / f"ds={ds}" / "part-0.parquet"

    def raw_rows(self, table: str, ds: date) -> int:
        """Return the rows of a raw file."""
        return pq.read_metadata(self.raw(table, ds)).num_rows

    def wait(self, *runs: tuple[str, str], seconds: float = 900.0) -> list[Run]:
        """Wait until runs, given as (dag id, run id), have ended."""
        deadline = time.monotonic() + seconds
        while True:
            self.airflow.check()
            now = [self.airflow.api.run(dag_id, run_id) for dag_id, run_id in runs]
            if all(run.finished for run in now):
                return now
            if time.monotonic() > deadline:
                states = [(task.task_id, task.state) for dag_id, run_id in runs for task in self.tasks(dag_id, run_id)]
                pytest.fail(f"not finished after {seconds:.0f} s: {states}")
            time.sleep(0.5)

    def tasks(self, dag_id: str, run_id: str) -> list[Task]:
        """Return the tasks of a run, by the time they ended."""
        return sorted(self.airflow.api.tasks(dag_id, run_id), key=lambda task: str(task.ended))

    def task(self, dag_id: str, run_id: str, task_id: str) -> Task:
        """Return one task of a run."""
        return next(task for task in self.tasks(dag_id, run_id) if task.task_id == task_id)

    def result(self, task: Task) -> str:
        """Return what a task left for others."""
        run = f"/dags/{task.dag_id}/dagRuns/{quote(task.run_id)}"
        answer = self.airflow.api.call("GET", f"{run}/taskInstances/{quote(task.task_id)}/xcomEntries/return_value")
        return str(answer["value"])

    def backfill(self, dag_id: str, ds: date) -> tuple[str, str]:
        """Create a backfill of one day and return (dag id, run id)."""
        return self.backfill_range(dag_id, ds, ds)[0]

    def backfill_range(self, dag_id: str, first: date, last: date, at_once: int = 1) -> list[tuple[str, str]]:
        """Create a backfill of several days and return (dag id, run id) of each."""
        self.airflow.api.backfill(dag_id, first, last, at_once=at_once)
        return self.runs(dag_id, first, last)

    def runs(self, dag_id: str, first: date, last: date) -> list[tuple[str, str]]:
        """Return (dag id, run id) of each day of a backfill, once it has created them."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            runs = {run.logical_date: run.run_id for run in self.airflow.api.runs(dag_id)}
            days = [first + timedelta(days=offset) for offset in range((last - first).days + 1)]
            if runs.keys() >= set(days):
                return [(dag_id, runs[ds]) for ds in days]
            time.sleep(0.2)
        return pytest.fail(f"the backfill of {dag_id} for {first} to {last} has not created every run")

    def backfills_end(self, *dag_ids: str, seconds: float = 240.0) -> None:
        """Wait until no backfill of the DAGs counts as running: Airflow looks every 30 s and refuses another before."""
        deadline = time.monotonic() + seconds
        for dag_id in dag_ids:
            while any(
                entry["completed_at"] is None
                for entry in self.airflow.api.call("GET", f"/backfills?dag_id={dag_id}")["backfills"]
            ):
                assert time.monotonic() < deadline, f"the backfill of {dag_id} has not ended"
                time.sleep(0.5)


class Receiver:
    """A webhook on loopback that keeps what it is sent."""

    def __init__(self) -> None:
        self.got: list[dict[str, str]] = []
        got = self.got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="session")
def receiver() -> Iterator[Receiver]:
    """The receiver of all notifications of the session."""
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Deployment]:
    """Write a small log, build its first day, and start Airflow."""
    folder = tmp_path_factory.mktemp("deployment")
    config = small_config(folder)
    write_days(LOG, str(folder / "raw"), FIRST, 3)
    (folder / "dags").mkdir()
    for name in ("feature_tables.py", "ranking_model.py", "retention.py"):
        (folder / "dags" / name).symlink_to(REPOSITORY / "dags" / name)
    (folder / "dags" / "probes.py").write_text(PROBES, encoding="utf-8")
    (folder / "probe.py").write_text(PROBE, encoding="utf-8")
    environment = {
        "ONETRANS_CONFIG": str(config),
        "ONETRANS_AUDIT_ADDRESS": "http://127.0.0.1:8088",
        "ONETRANS_AIRFLOW_NOTIFY": "down, receiver",
        "AIRFLOW_CONN_RECEIVER": json.dumps({"conn_type": "http", "password": f"{receiver.address}/{SECRET}"}),
        "AIRFLOW_CONN_DOWN": json.dumps({"conn_type": "http", "password": f"http://127.0.0.1:1/{SECRET}"}),
    }
    airflow = LocalAirflow(folder / "airflow", environment, dags=folder / "dags")
    airflow.environment["PYTHONPATH"] += os.pathsep + str(folder)
    built = subprocess.run(
        [sys.executable, "-m", "jobs.backfill", "--ds", str(HISTORY)],
        env=airflow.environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    with airflow:
        yield Deployment(folder, load_settings({**os.environ, **environment}), airflow, receiver.got)


@pytest.fixture(scope="session")
def day(deployment: Deployment) -> dict[str, tuple[str, str]]:
    """Backfill the day of both DAGs, created together: the second has to wait for the first.

    From the web page, as a person does, where there is a browser; else by the call that the page makes.
    """
    runs = {}
    with _page(deployment) as page:
        for dag_id in ("ranking_model", "feature_tables"):
            if page is None:
                runs[dag_id] = deployment.backfill(dag_id, TODAY)
            else:
                assert page.backfill(dag_id, TODAY, TODAY, "Missing Runs") == 1
                (runs[dag_id],) = deployment.runs(dag_id, TODAY, TODAY)
    ended = deployment.wait(*runs.values())
    for run in ended:
        unfinished = [task for task in deployment.tasks(run.dag_id, run.run_id) if task.state != "success"]
        logs = "\n".join("\n".join(deployment.airflow.api.log(task)[-25:]) for task in unfinished if task.tries)
        assert run.state == "success", f"{[(task.task_id, task.state) for task in unfinished]}\n{logs}"
    return runs


def why_no_page() -> str:
    """Say why Airflow's page cannot be used here; empty: it can."""
    if find_spec("playwright") is None:
        return "Playwright is not installed"
    from infra.local.airflow_page import chromium

    return "" if chromium() else "there is no Chromium (Debian: apt-get install chromium)"


@contextmanager
def _page(deployment: Deployment) -> Iterator[AirflowPage | None]:
    if why_no_page():
        yield None
        return
    from infra.local.airflow_page import AirflowPage

    with AirflowPage(deployment.airflow.address) as page:
        yield page
