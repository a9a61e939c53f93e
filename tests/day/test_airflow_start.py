"""How the local Airflow starts where another process takes the port it had found free."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from infra.airflow import reach
from infra.local import airflow as local
from infra.local.processes import free_port, tail

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
