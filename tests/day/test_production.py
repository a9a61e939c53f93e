"""The processes of ``infra/compose.yaml``, from that file and those it names, without containers: a day through them.

PostgreSQL holds Airflow's database, MLflow's and the Iceberg catalog, MLflow is a server, files are in an S3 server,
and two schedulers share the steps.  Only addresses and folders are exchanged for those of this machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import psycopg
import pytest

from infra.airflow.api import AirflowApi
from infra.local.airflow import REPOSITORY
from infra.local.processes import Server, free_port, stop, wait_until
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import write_days
from onetrans import storage
from onetrans.lake import TABLES, Lake
from onetrans.registry import CHAMPION, Registry
from onetrans.settings import load_settings
from tests import postgres, s3
from tests.compose_file import SECRETS, services

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(postgres.why_missing()), reason=postgres.why_missing()),
]

FIRST = date(2026, 1, 1)
SECRET = "kept-in-the-environment-alone"
LENIENT = {
    "MIN_LIFT_CTR_AUC": "-1.0", "MIN_LIFT_CVR_AUC": "-1.0", "MAX_LOSS_TO_CHAMPION": "1.0", "MIN_ROWS": "1",
    "MIN_POSITIVES": "1", "MIN_USERS": "1", "MAX_UAUC_LOSS": "1.0", "MAX_LOG_LOSS_INCREASE": "1e6",
    "MAX_CALIBRATION_ERROR": "1e6", "REPLICATES": "100",
}  # fmt: skip
"""A gate that asks for no lift over the baseline; to be better than a coin and than popularity it asks always."""


class Deployment:
    """The services of the compose file as processes of this machine."""

    def __init__(self, folder: Path, store: s3.ObjectStore, database: postgres.Postgres) -> None:
        self.folder = folder
        fernet = "cnlwdG9ncmFwaHktZm9yLXRlc3RzLW9ubHktMzJieXQ="
        self.services = services(dict.fromkeys(SECRETS, SECRET) | {"AIRFLOW_FERNET_KEY": fernet})
        self.ports = {name: free_port() for name in ("mlflow", "airflow-api-server", "data-docs", "serving")}
        self._store, self._database = store, database
        self.servers: list[Server] = []

    def environment(self, service: str) -> dict[str, str]:
        """Return a service's variables, with this machine's addresses and folders in place of the containers'."""
        home = self.folder / "airflow"
        named = self.services[service].get("environment") or {}
        given = {name: self._here(value) for name, value in named.items()}
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "ONETRANS"))},
            **given,
            **self._store.environment,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "PYTHONPATH": self._here(given.get("PYTHONPATH", "/opt/onetrans")),
            "PGHOST": str(self._database.folder),
            "PGUSER": self._database.user,
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "ONETRANS_CONFIG": str(REPOSITORY / "infra" / "production" / "onetrans.toml"),
            "ONETRANS_MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.ports['mlflow']}",
            "ONETRANS_TRAINING_PRESET": "tiny",
            "ONETRANS_TRAINING_THREADS": "1",
            **{f"ONETRANS_GATE_{name}": value for name, value in LENIENT.items()},
        }

    def command(self, service: str) -> list[str]:
        """Return what a service starts, its program as a module of this Python."""
        given = self.services[service].get("command") or ["onetrans.cli", "serve", "--host", "0.0.0.0"]
        given = [str(self.ports[service]) if word == "8088" else word for word in given]
        arguments = [self._here(word.replace("0.0.0.0", "127.0.0.1")) for word in given]
        if service in ("serving", "airflow-api-server"):
            arguments += ["--port", str(self.ports[service])]
        return [sys.executable, "-m", *arguments]

    def _here(self, text: str) -> str:
        for name, port in (("mlflow", 5000), ("airflow-api-server", 8080), ("data-docs", 8088)):
            text = re.sub(rf"\b(?:{name}|127\.0\.0\.1):{port}\b", f"127.0.0.1:{self.ports[name]}", text)
        text = text.replace("--port=5000", f"--port={self.ports['mlflow']}")
        for folder, here in (("/opt/onetrans", REPOSITORY), ("/opt/airflow", self.folder / "airflow"),
                             ("/data-docs", self.folder / "data-docs")):  # fmt: skip
            text = text.replace(folder, str(here))
        return text

    def run(self, *arguments: str, service: str = "airflow-scheduler") -> str:
        """Run a process to its end with a service's variables."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            env=self.environment(service), cwd=self.folder, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def start(self, service: str, number: int = 0) -> Server:
        """Start a service; ``number`` tells those of one kind apart."""
        log = self.folder / "logs" / f"{service}-{number}.log"
        server = Server(service, self.command(service), self.environment(service), log, self.folder)
        server.start()
        self.servers.append(server)
        return server


@contextmanager
def _running(folder: Path) -> Iterator[Deployment]:
    with s3.running() as store, postgres.running() as database:
        deployment = Deployment(folder, store, database)
        subprocess.run(
            ["psql", "--dbname=postgres", "--quiet", f"--file={REPOSITORY}/infra/production/databases.sql"],
            env={**os.environ, "PGHOST": str(database.folder), "PGUSER": database.user}, check=True,
        )  # fmt: skip
        try:
            yield deployment
        finally:
            stop(reversed(deployment.servers))


def _answers(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=3) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_day_through_the_services_of_the_compose_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history, today = FIRST, FIRST + timedelta(days=1)
    with _running(tmp_path) as deployment:
        *_, command = deployment.services["prepare"]["command"]
        assert "Airflow: nothing -> " in deployment.run(command, service="prepare")
        assert deployment.run(command, service="prepare").strip() == "ready"  # again, at the next start

        write_days(WorldConfig(users=400, items=120, history_days=3, epoch=FIRST), "s3://onetrans/log", FIRST, 2)
        deployment.run("jobs.backfill", "--ds", str(history))

        deployment.start("mlflow")
        mlflow = f"http://127.0.0.1:{deployment.ports['mlflow']}"
        wait_until(lambda: _answers(f"{mlflow}/health"), deployment.servers, "MLflow", 180)
        for service in ("airflow-api-server", "airflow-dag-processor", "airflow-triggerer"):
            deployment.start(service)
        for number in range(2):
            deployment.start("airflow-scheduler", number)
        api = AirflowApi(f"http://127.0.0.1:{deployment.ports['airflow-api-server']}")
        wait_until(api.healthy, deployment.servers, "Airflow", 300)
        wanted = {"feature_tables.py", "ranking_model.py"}
        wait_until(lambda: wanted <= api.dag_files(), deployment.servers, "DAGs", 300)
        assert api.import_errors() == []

        runs = [api.trigger(name, logical_date=today) for name in ("feature_tables", "ranking_model")]
        deadline = time.monotonic() + 2400
        while not all(api.run(run.dag_id, run.run_id).finished for run in runs):
            for server in deployment.servers:
                server.check()
            assert time.monotonic() < deadline
            time.sleep(2)
        for run in runs:
            tasks = {task.task_id: task.state for task in api.tasks(run.dag_id, run.run_id)}
            assert api.run(run.dag_id, run.run_id).state == "success", tasks

        for name, value in deployment.environment("airflow-scheduler").items():
            if name.startswith(("ONETRANS", "PG", "AWS")):
                monkeypatch.setenv(name, value)
        settings = load_settings()
        lake = Lake(settings.lake)
        assert all(lake.days(table) == [history, today] for table in TABLES)
        # The link in a step's log is opened by a browser.
        deployment.start("data-docs")
        docs = f"http://127.0.0.1:{deployment.ports['data-docs']}"
        wait_until(lambda: _answers(f"{docs}/index.html"), deployment.servers, "Data Docs", 60)
        verdict = lake.verdict_in(lake.files("impressions", [today])[0].rsplit("/", 1)[0])
        assert verdict is not None
        assert verdict["data_docs"].startswith(f"{docs}/")
        assert _answers(verdict["data_docs"])
        # A day is too short to be learned from: the gate declines, as it should, and a person has the model promoted.
        (plan,) = storage.list_files(settings.training.runs, "plan.json")
        deployment.run("onetrans.cli", "promote", "--plan", plan, "--force", "the registry is to be reached")
        champion = Registry(settings.mlflow).by_alias(CHAMPION)
        assert champion is not None
        assert champion.tags["ds"] == str(today)

        # Both schedulers took steps, and every step's log is there to be read.
        with psycopg.connect("dbname=airflow", host=str(deployment._database.folder)) as connection:
            query = "SELECT count(DISTINCT queued_by_job_id) FROM task_instance WHERE queued_by_job_id IS NOT NULL"
            (schedulers,) = connection.execute(query).fetchone() or (0,)
        assert schedulers == 2

        deployment.start("serving")
        address = f"http://127.0.0.1:{deployment.ports['serving']}"
        wait_until(lambda: _answers(f"{address}/readyz"), deployment.servers, "the service", 180)

        # Nothing lies on this disk but Airflow's logs and Data Docs; the secret is in none of them.
        assert not (tmp_path / "var").exists()
        written = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size < 50_000_000]
        assert not [path for path in written if SECRET.encode() in path.read_bytes()]
