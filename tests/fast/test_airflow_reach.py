"""Where Airflow is found in production, and that what it runs is shown to who has a token, where it asks for one."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from infra import status
from infra.airflow import reach
from infra.local import homes

ROOT = Path(__file__).parents[2]


_RUN = {
    "dag_id": "ranking_model",
    "dag_run_id": "backfill__2022-05-04T00:00:00+00:00",
    "state": "failed",
    "logical_date": "2022-05-04T00:00:00Z",
    "end_date": "2022-05-05T03:12:09.5Z",
}
_GATE = {**_RUN, "task_id": "gate", "try_number": 4, "max_tries": 3}
_CASCADE = [
    {**_GATE, "dag_run_id": f"backfill__{day}", "logical_date": day, "task_id": "wait_for_day", "try_number": 1}
    for day in [f"2022-05-{number:02}" for number in range(1, 31)]
]
_FAILED: list[dict[str, object]] = [*_CASCADE, _GATE]
"""A month was not started for one day."""
_BUSY = [
    {"dag_id": dag_id, "dag_run_id": "night", "task_id": task_id, "state": state}
    for dag_id, task_id, state in (
        ("ranking_model", "train_onetrans", "deferred"),
        ("ranking_model", "train_dcnv2_din", "running"),
        ("ranking_model", "plan", "success"),
        ("feature_tables", "wait_for_log", "deferred"),
        ("retention", "retain", "up_for_retry"),
    )
]
"""A training in a pod, another on a worker, a wait, and a run that nothing of is under way."""
_Broken = threading.Event()


class _LoggedIn(BaseHTTPRequestHandler):
    """Airflow's routes as an auth manager with passwords answers them: no token for nothing, 401 without a good one."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/api/v2/monitor/health":
            self._answer(200, {part: {"status": "healthy"} for part in reach.SERVERS})
        elif path == "/auth/token" or self.headers.get("Authorization") != "Bearer good":
            self._answer(401, {"detail": "Invalid credentials"})
        elif path.endswith("/taskInstances"):
            if "state=failed&state=up_for_retry&start_date_gte=" in self.path:
                self._of(path, _FAILED)
            else:
                asked = parse_qs(urlsplit(self.path).query)["state"]
                self._answer(200, {"task_instances": [task for task in _BUSY if task["state"] in asked]})
        elif "state=failed" in self.path:
            self._answer(200, {"dag_runs": [_RUN | {"dag_run_id": "late"}, _RUN] if "ranking_model" in path else []})
        else:
            self._answer(200, {"dag_runs": [{"dag_id": dag_id, "dag_run_id": "night"} for dag_id in reach.OURS]})

    def _of(self, path: str, tasks: list[dict[str, object]]) -> None:
        """Answer for one DAG: of one that is not there as Airflow does, of another that it fails."""
        dag_id = path.split("/")[4]
        if dag_id == "ranking_model":
            self._answer(200, {"task_instances": tasks, "total_entries": len(tasks)})
        elif dag_id == "feature_tables":
            self._answer(404, {"detail": "DAG not found"})
        else:
            self._answer(500 if _Broken.is_set() else 200, {"task_instances": [], "total_entries": 0})

    def _answer(self, code: int, body: object) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _LoggedIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def _nothing_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AIRFLOW__API__BASE_URL", "AIRFLOW__CORE__EXECUTION_API_SERVER_URL", reach.TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))


def test_it_is_found_by_what_the_compose_file_sets(tmp_path: Path) -> None:
    written = (ROOT / "infra" / "compose.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load(written)["x-airflow"]["environment"]
    environ = {"AIRFLOW_HOME": str(tmp_path), **{k: v for k, v in given.items() if re.fullmatch("AIRFLOW__.*", k)}}
    elsewhere = environ | {"AIRFLOW__API__BASE_URL": "https://airflow.example/"}
    for given, shown in ((environ, "http://127.0.0.1:8080"), (elsewhere, "https://airflow.example")):
        assert reach.address(given) == "http://airflow-api-server:8080", "what a browser opens no container reaches"
        assert reach.pages(given) == shown
    del elsewhere["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"]
    assert reach.address(elsewhere) == reach.pages(elsewhere) == "https://airflow.example"


def test_it_is_found_by_the_file_that_the_chart_mounts(tmp_path: Path) -> None:
    (tmp_path / "airflow.cfg").write_text(
        "[api]\nbase_url = https://airflow.example\n"
        "[core]\nexecution_api_server_url = http://airflow-api-server:8080/execution/\n"
    )
    environ = {"AIRFLOW_HOME": str(tmp_path)}
    assert reach.address(environ) == "http://airflow-api-server:8080"
    assert reach.pages(environ) == "https://airflow.example"
    assert reach.address(environ | {"AIRFLOW__API__BASE_URL": "http://other:1"}) == "http://other:1", "a person says so"


def test_nothing_set_up_is_nothing_found(tmp_path: Path) -> None:
    assert reach.address({"AIRFLOW_HOME": str(tmp_path)}) is None
    assert reach.pages({"AIRFLOW_HOME": str(tmp_path)}) is None


def test_the_demos_is_found_by_its_configuration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its runs would stand beside the tables of other settings."""
    monkeypatch.setattr(homes, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    demo = tmp_path / homes.DEMO_CONFIG
    (demo.parent / "airflow").mkdir(parents=True)
    demo.touch()
    (demo.parent / "airflow" / "airflow.cfg").write_text("[api]\nbase_url = http://127.0.0.1:8080\n")
    assert reach.address({}) is None
    assert reach.address({"ONETRANS_CONFIG": str(demo)}) == "http://127.0.0.1:8080"


def test_status_shows_the_runs_to_a_token_only(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", f"{address}/execution/")
    for given in ("", "bad"):
        monkeypatch.setenv(reach.TOKEN, given)
        told = status._running_text([], status._airflow(7))
        assert told == f"Airflow at {address}: healthy\nits runs are shown to who logs in: AIRFLOW_CLI_TOKEN"
    monkeypatch.setenv(reach.TOKEN, "good")
    told = status._running_text([], status._airflow(7))
    assert told.splitlines() == [
        f"Airflow at {address}: healthy",
        "feature_tables night: wait_for_log (deferred)",
        "ranking_model night: train_onetrans (deferred), train_dcnv2_din",
        "retention night: waits",
    ]


def test_status_leads_to_the_tasks_that_failed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTION_API_SERVER_URL", f"{address}/execution/")
    assert status._troubled_part(status._airflow(7)) == {}, "those who log in see them"
    monkeypatch.setenv(reach.TOKEN, "good")
    run = "backfill__2022-05-04T00:00:00+00:00"
    link = f"{address}/dags/ranking_model/runs/backfill__2022-05-04T00%3A00%3A00%2B00%3A00/tasks/gate"
    lines = status._troubled_part(status._airflow(7))["Failed, or tried again"].splitlines()
    assert lines[:4] == [
        f"ranking_model {run}: gate FAILED (after try 4, 2022-05-05T03:12Z)",
        f"  {link}",
        "ranking_model late: the run FAILED (2022-05-05T03:12Z)",
        f"  {address}/dags/ranking_model/runs/late",
    ]
    assert lines[4].startswith("ranking_model backfill__2022-05-01: wait_for_day FAILED")
    assert lines[-1] == "and 22 more"
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/")
    lines = status._troubled_part(status._airflow(7))["Failed, or tried again"].splitlines()
    assert lines[1] == f"  {link.replace(address, 'https://airflow.example')}", "where a browser opens it"
    _Broken.set()
    try:
        told = status._troubled_part(status._airflow(7))["Failed, or tried again"]
    finally:
        _Broken.clear()
    assert told.startswith("not known: Airflow answered 500 to GET /api/v2/dags/retention/")


def test_what_is_no_airflow_is_a_line_of_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """A login before it, or another server on the port where a local Airflow was."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Log in</html>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("AIRFLOW__API__BASE_URL", where)
        told = status._running_text([], status._airflow(7))
        server.shutdown()
    wrong = f"what answers GET /api/v2/monitor/health at {where} is no API of Airflow's"
    assert told == f"Airflow at {where}: does not answer ({wrong})"
