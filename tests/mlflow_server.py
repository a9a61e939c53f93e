"""MLflow's own server on loopback for tests that take it away: stopped and started again on the same port and data."""

from __future__ import annotations

import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.local.processes import Server, free_port, stop, wait_until


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Start a server whose data lies in ``folder``; its name is its address.  It is stopped at the end."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = Server(f"http://127.0.0.1:{port}", command, environment, folder / "server.log", folder)
    try:
        start(server)
        yield server
    finally:
        stop([server])


def start(server: Server) -> None:
    """Start it and wait until it answers."""

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{server.name}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    server.start()
    wait_until(answers, [server], "MLflow", 300)
