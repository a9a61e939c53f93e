"""A local Airflow: four servers on loopback, sized for a laptop.

API server, scheduler (LocalExecutor), DAG processor and triggerer run on a
SQLite database under one home folder, with ports of their own.  ``airflow
standalone`` does the same with a parallelism of 32 and listens on every
interface; here both follow the machine.

The scheduler creates no runs by the clock (``use_job_schedule``): on a laptop
yesterday's log is not there, so days are run from the UI or its API, as
backfills.  Everything else is as in production.
"""

from __future__ import annotations

import configparser
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from infra.local.airflow_api import AirflowApi
from infra.local.processes import Server, ServerError, free_port, listens, remember, stop, stop_remembered, wait_until
from onetrans.errors import BadConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
_ON_SQLITE = Path(__file__).parent / "on_sqlite"
_PREFERRED_PORT = 8080


def default_parallelism() -> int:
    """Tasks at once: one more than the cores, since a step waits for the disk and for its JVM at times."""
    return max(2, len(os.sched_getaffinity(0)) + 1) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


def configuration(home: Path, dags: Path, port: int, parallelism: int) -> dict[str, dict[str, str]]:
    """Return what ``airflow.cfg`` says; whatever is not named keeps Airflow's default."""
    address = f"http://127.0.0.1:{port}"
    return {
        "core": {
            "dags_folder": str(dags),
            "plugins_folder": str(home / "plugins"),
            "executor": "LocalExecutor",
            "parallelism": str(parallelism),
            "load_examples": "False",
            "dags_are_paused_at_creation": "False",
            "simple_auth_manager_all_admins": "True",
            # Tasks talk to the API server; this address must follow its port, or every task fails.
            "execution_api_server_url": f"{address}/execution/",
        },
        "database": {"sql_alchemy_conn": f"sqlite:///{home}/airflow.db"},
        # A step's last words are one long paragraph: unwrapped, its cause and remedy lie outside the window.
        "api": {"host": "127.0.0.1", "port": str(port), "base_url": address, "workers": "1", "default_wrap": "True"},
        "api_auth": {"jwt_secret": secrets.token_urlsafe(64)},
        "logging": {
            "base_log_folder": str(home / "logs"),
            "dag_processor_child_process_log_directory": str(home / "logs" / "dag_processor"),
            "colored_console_log": "False",
        },
        "scheduler": {
            "use_job_schedule": "False",
            # How soon the next task starts after one has ended, against CPU while nothing happens.
            "scheduler_idle_sleep_time": "0.25",
        },
        "dag_processor": {
            "parsing_processes": "1",
            "min_file_process_interval": "60",
            "refresh_interval": "300",
            "print_stats_interval": "300",
        },
        "triggerer": {"capacity": "100"},
        # A task's supervisor may miss the end of its process until its next heartbeat, and holds the slot until
        # then: with the default of 5 s every second task blocked its slot for 5 s more than it ran.
        "workers": {"min_heartbeat_interval": "1"},
    }


class LocalAirflow:
    """The four servers of one Airflow home; use as a context manager, or :meth:`start` and :meth:`stop`."""

    def __init__(
        self,
        home: Path,
        environment: Mapping[str, str] | None = None,
        dags: Path | None = None,
        port: int | None = None,
        parallelism: int | None = None,
    ) -> None:
        """Describe an Airflow; nothing starts yet.

        Args:
            home: ``AIRFLOW_HOME``; holds database, configuration and logs, and survives a stop.
            environment: variables for the servers, and so for every step, on top of this process's own.
            dags: folder of DAG files; default: the repository's.
            port: port of the API server and UI; default: 8080 if it is free, else any.
            parallelism: tasks that may run at once; default: :func:`default_parallelism`.

        Raises:
            BadConfigError: if ``home`` has a ``%`` in its path.
        """
        self.home = home.resolve()
        if "%" in str(self.home):
            raise BadConfigError(
                f"{self.home} has a '%' in its path, which Airflow and MLflow read as a placeholder in the "
                "address of their database; use a folder without it"
            )
        self.dags = (dags or REPOSITORY / "dags").resolve()
        self.port = port or 0
        self.parallelism = parallelism or default_parallelism()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW__")},
            **(environment or {}),
            "AIRFLOW_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(
                [str(REPOSITORY), str(_ON_SQLITE), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            # The servers' output goes to files; a forked worker must not hold lines back.
            "PYTHONUNBUFFERED": "1",
        }
        # Another Airflow's settings in the caller's shell must not leak in: they may name its database.
        self.environment.pop("AIRFLOW_CONFIG", None)
        self.servers: list[Server] = []
        self.api = AirflowApi(self.address)

    @property
    def address(self) -> str:
        """Address of the UI; the port is known once :meth:`start` has chosen it."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, seconds: float = 120.0) -> float:
        """Start everything and wait until all four servers are healthy and the DAGs are parsed; return the seconds.

        Raises:
            ServerError: if a server ends, or is not healthy in time; the text shows the end of its log.
        """
        begun = time.monotonic()
        self.home.mkdir(parents=True, exist_ok=True)
        stop_remembered(self._processes_file)
        # Not before: minutes may have gone by since this object was made, and another Airflow may have taken the port.
        self.port = self.port or free_port(_PREFERRED_PORT)
        self.api = AirflowApi(self.address)
        self._write_configuration()
        self._prepare_database()
        self.servers = [
            self._server("api-server", "--host", "127.0.0.1", "--port", str(self.port)),
            self._server("scheduler", "--skip-serve-logs"),
            self._server("dag-processor"),
            self._server("triggerer", "--skip-serve-logs"),
        ]
        try:
            for server in self.servers:
                server.start()
            remember(self._processes_file, self.servers, self.address)
            # Whoever answers on the port must be the server started here: days sent to another Airflow would be built
            # with its configuration.
            wait_until(
                lambda: self.api.healthy() and listens(self.servers[0], self.port), self.servers, "Airflow", seconds
            )
            wait_until(self._parsed, self.servers, f"the DAGs of {self.dags}", seconds)
        except BaseException:
            self.stop()
            raise
        return time.monotonic() - begun

    def stop(self) -> None:
        """Stop the servers and every step that is still running."""
        if self.servers:  # else the file, if there is one, is another launcher's
            stop(self.servers)
            self._processes_file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise if a server has ended.

        Raises:
            ServerError: naming it, with the end of its log.
        """
        for server in self.servers:
            server.check()

    @property
    def _processes_file(self) -> Path:
        return self.home / "processes.json"

    def _server(self, *arguments: str) -> Server:
        name = arguments[0]
        return Server(
            name=f"airflow {name}",
            command=[sys.executable, "-m", "airflow", *arguments],
            environment=self.environment,
            log=self.home / "logs" / f"{name}.log",
            folder=REPOSITORY,
        )

    def _write_configuration(self) -> None:
        """Write ``airflow.cfg``, readable by its owner alone: it holds the key that signs tokens."""
        parser = configparser.RawConfigParser()
        parser.read_dict(configuration(self.home, self.dags, self.port, self.parallelism))
        path = self.home / "airflow.cfg"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("# Written by infra/local/airflow.py at every start.\n")
            parser.write(file)

    def _prepare_database(self) -> None:
        """Create the database, or migrate that of an older Airflow."""
        done = subprocess.run(
            [sys.executable, "-m", "airflow", "db", "migrate"],
            env=self.environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
            raise ServerError(
                f"`airflow db migrate` failed with exit code {done.returncode}; its output ends with:\n{lines}"
            )

    def _parsed(self) -> bool:
        errors = self.api.import_errors()
        if errors:
            raise ServerError("DAG files could not be imported:\n" + "\n".join(errors))
        return bool(self.api.dag_ids())

    def __enter__(self) -> LocalAirflow:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
