"""How the local Airflow starts: its API server first, and where another process takes the port it had found free."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from infra.airflow import reach
from infra.airflow.api import AirflowApi, AirflowApiError
from infra.local import airflow as local
from infra.local.processes import Server, free_port, tail

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


def test_a_port_that_is_lost_before_it_is_bound_costs_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        lost = other.getsockname()[1]
        found = iter([lost])
        monkeypatch.setattr(local, "free_port", lambda preferred: next(found, 0) or free_port())
        with local.LocalAirflow(tmp_path / "airflow") as airflow:
            assert airflow.port != lost
            assert airflow.api.healthy()
            assert f"127.0.0.1:{airflow.port}" in tail(tmp_path / "airflow" / "airflow.cfg", 100)
            monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
            where = reach.address()
            assert where == airflow.address
            assert set(reach.health(where).values()) == {"healthy"}
            assert reach.running(where) == []


def test_the_scheduler_starts_when_the_api_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on with an interrupted run at once, and a task that finds no API loses a try."""
    answered: dict[str, bool] = {}
    start = Server.start

    def noted(server: Server) -> None:
        try:
            answered[server.name] = bool(AirflowApi(airflow.address, timeout=5.0).health())
        except (OSError, AirflowApiError):
            answered[server.name] = False
        start(server)

    monkeypatch.setattr(Server, "start", noted)
    airflow = local.LocalAirflow(tmp_path / "airflow")
    with airflow:
        assert airflow.api.healthy()
    assert answered.pop("airflow api-server") is False
    assert set(answered) == {f"airflow {name}" for name in ("scheduler", "dag-processor", "triggerer")}
    assert all(answered.values())
