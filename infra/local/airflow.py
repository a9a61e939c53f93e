"""A local Airflow: four servers on loopback, sized for a laptop.

API server, scheduler (LocalExecutor), DAG processor and triggerer run under one
home folder, with ports of their own.  ``airflow standalone`` does the same with
a parallelism of 32 and listens on every interface; here both follow the machine.

The database is a SQLite file in the home, or a PostgreSQL that runs already.
By default the scheduler creates no runs by the clock (``use_job_schedule``): on
a laptop yesterday's log is not there, so days are run from the UI or its API, as
backfills.  Everything else is as in production.
"""

from __future__ import annotations

import configparser
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from infra.airflow.api import AirflowApi, AirflowApiError
from infra.airflow.pools import pools
from infra.local.processes import (
    Server,
    ServerError,
    free_port,
    listens,
    remember,
    stop,
    stop_processes,
    stop_remembered,
    tail,
    wait_until,
)
from onetrans.cores import usable_cores
from onetrans.errors import BadConfigError
from onetrans.settings import load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
# Each holds what Airflow imports as airflow_local_settings.
_ON_SQLITE = Path(__file__).parent / "on_sqlite"
_ON_POSTGRES = REPOSITORY / "infra" / "airflow" / "on_scheduler"
_PREFERRED_PORT = 8080
_PORTS_TRIED, _PORT_TAKEN = 3, "address already in use"
_REVIVALS, _REVIVALS_WITHIN_S = 5, 600.0
"""A server that ends more often than this within so many seconds is not started again."""
_DEFINES = re.compile(r"^with DAG\(", re.MULTILINE)
"""What a file of the DAGs folder says that makes a DAG; the others are parts of such files."""
_POSTGRES = re.compile(r"postgresql(?:\+psycopg)?://(?P<rest>.*)")


def default_parallelism() -> int:
    """Tasks at once: one more than the cores, since a step waits for the disk and for its JVM at times."""
    return usable_cores() + 1


def database_address(database: str, home: Path) -> str:
    """Return the address Airflow is given for its database: a file in ``home`` unless ``database`` names a server.

    Raises:
        BadConfigError: if it is no PostgreSQL, or its driver is not installed.
    """
    if not database:
        return f"sqlite:///{home}/airflow.db"
    found = _POSTGRES.match(database)
    if not found:
        kind = database.split(":", 1)[0]
        raise BadConfigError(
            f"airflow.database begins with {kind!r}; write postgresql://USER@HOST/NAME, or leave it empty for a "
            "SQLite file"
        )
    if find_spec("psycopg") is None:
        raise BadConfigError(
            "airflow.database names a PostgreSQL, whose driver is not installed; in a checkout `make env` brings it, "
            "elsewhere: pip install 'PATH/TO/onetrans.whl[postgres]'"
        )
    # One driver for the calls that wait and for those that do not; Airflow's default needs one of each.
    return f"postgresql+psycopg://{found['rest']}"


def configuration(
    home: Path, dags: Path, port: int, parallelism: int, database: str = "", schedule: bool = False
) -> dict[str, dict[str, str]]:
    """Return what ``airflow.cfg`` says; whatever is not named keeps Airflow's default.

    Args:
        home: ``AIRFLOW_HOME``.
        dags: folder of DAG files.
        port: port of the API server.
        parallelism: tasks that may run at once.
        database: address of a PostgreSQL; empty: SQLite.
        schedule: whether the scheduler creates runs by the clock.
    """
    address = f"http://127.0.0.1:{port}"
    connection = database_address(database, home)
    # Without the second, Airflow takes another driver for it.
    servers = {"sql_alchemy_conn_async": connection} if database else {}
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
        "database": {"sql_alchemy_conn": connection, **servers},
        # A step's last words are one long paragraph: unwrapped, its cause and remedy lie outside the window.
        "api": {"host": "127.0.0.1", "port": str(port), "base_url": address, "workers": "1", "default_wrap": "True"},
        "api_auth": {"jwt_secret": secrets.token_urlsafe(64)},
        "logging": {
            "base_log_folder": str(home / "logs"),
            "dag_processor_child_process_log_directory": str(home / "logs" / "dag_processor"),
            "colored_console_log": "False",
        },
        "scheduler": {
            "use_job_schedule": str(schedule),
            # How soon a scheduler that was started again takes up the tasks of the one that died.
            "orphaned_tasks_check_interval": "15",
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
        database: str = "",
        schedule: bool = False,
    ) -> None:
        """Describe an Airflow; nothing starts yet.

        Args:
            home: ``AIRFLOW_HOME``; holds configuration, logs and the SQLite database, and survives a stop.
            environment: variables for the servers, and so for every step, on top of this process's own.
            dags: folder of DAG files; default: the repository's.
            database: ``postgresql://...``, empty or one that served before; default: SQLite in ``home``.
            schedule: whether the scheduler creates runs by the clock.

        Raises:
            BadConfigError: if ``home`` has a ``%`` in its path, or the database cannot be used.
        """
        self.home = home.resolve()
        if "%" in str(self.home):
            raise BadConfigError(
                f"{self.home} has a '%' in its path, which Airflow and MLflow read as a placeholder in the "
                "address of their database; use a folder without it"
            )
        self.dags = (dags or REPOSITORY / "dags").resolve()
        self.port = 0
        self.parallelism = default_parallelism()
        self.database = database
        self.schedule = schedule
        database_address(database, self.home)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW__")},
            **(environment or {}),
            "AIRFLOW_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(
                filter(
                    None,
                    [str(REPOSITORY), str(_ON_POSTGRES if database else _ON_SQLITE), os.environ.get("PYTHONPATH")],
                )
            ),
            # The servers' output goes to files; a forked worker must not hold lines back.
            "PYTHONUNBUFFERED": "1",
        }
        # Another Airflow's settings in the caller's shell must not leak in: they may name its database.
        self.environment.pop("AIRFLOW_CONFIG", None)
        self.servers: list[Server] = []
        self._revived: dict[str, list[float]] = {}
        self.api = AirflowApi(self.address)

    @property
    def address(self) -> str:
        """Address of the UI; :meth:`start` chooses the port, 8080 if it is free, and a later start keeps it."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, seconds: float = 300.0) -> float:
        """Start everything and wait until all four servers are healthy and the DAGs are parsed; return the seconds.

        Raises:
            ServerError: if a server ends, or is not healthy in time; the text shows the end of its log.
        """
        begun = time.monotonic()
        self.home.mkdir(parents=True, exist_ok=True)
        stop_remembered(self._processes_file)
        named = self.port
        for left in reversed(range(_PORTS_TRIED)):
            # Not before: minutes may have gone by since this object was made, and another may have taken the port.
            self.port = named or free_port(_PREFERRED_PORT)
            if self.port != (named or _PREFERRED_PORT):
                print(f"  port {_PREFERRED_PORT} is taken, so Airflow listens on {self.port}", flush=True)
            self.api = AirflowApi(self.address)
            self._write_configuration()
            print("  its database is made, or brought to this version", flush=True)
            self._prepare_database()
            try:
                self._start_servers(seconds)
                break
            except ServerError:
                # Seconds go by until the API server binds its port, and another may take it in them.
                if named or not left or _PORT_TAKEN not in tail(self.servers[0].log, 50):
                    raise
        return time.monotonic() - begun

    def _start_servers(self, seconds: float) -> None:
        self.servers = [
            self._server("api-server", "--host", "127.0.0.1", "--port", str(self.port)),
            self._server("scheduler", "--skip-serve-logs"),
            self._server("dag-processor"),
            self._server("triggerer", "--skip-serve-logs"),
        ]
        try:
            # First what tasks talk to: a scheduler that goes on with an interrupted run starts them at once, and each
            # that finds nobody loses a try.
            api, *others = self.servers
            api.start()
            remember(self._processes_file, [api], self.address)
            wait_until(lambda: self._answers() and listens(api, self.port), [api], "Airflow's API server", seconds)
            for server in others:
                server.start()
            remember(self._processes_file, self.servers, self.address)
            # Whoever answers on the port must be the server started here: days sent to another Airflow would be built
            # with its configuration.
            wait_until(
                lambda: self.api.healthy() and listens(self.servers[0], self.port), self.servers, "Airflow", seconds
            )
            self.api.set_pools(pools(load_settings(self.environment).airflow))
            wait_until(self._parsed, self.servers, f"the DAGs of {self.dags}", seconds)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        try:
            self.api.health()
        except (OSError, AirflowApiError):
            return False
        return True

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

    def revive(self) -> list[str]:
        """Start servers that have ended again, as a service manager does in production; return their names.

        What a dead server left running is stopped first: Airflow gives its tasks another try.

        Raises:
            ServerError: if one ends again and again, with the end of its log.
        """
        ended = [server for server in self.servers if server.pid is None]
        for server in ended:
            assert server.process is not None
            now = time.monotonic()
            times = [at for at in self._revived.get(server.name, []) if now - at < _REVIVALS_WITHIN_S]
            if len(times) >= _REVIVALS:
                server.check()
            self._revived[server.name] = [*times, now]
            stop_processes([], grace=3.0, sessions=[server.process.pid])
            server.start(again=True)
        if ended:
            remember(self._processes_file, self.servers, self.address)
        return [server.name for server in ended]

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
        sections = configuration(self.home, self.dags, self.port, self.parallelism, self.database, self.schedule)
        # Airflow reads '%' as the start of a placeholder.
        parser.read_dict({name: {k: v.replace("%", "%%") for k, v in part.items()} for name, part in sections.items()})
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
        # One file after another: the first DAG that is there says nothing of the others.
        wanted = {path.name for path in self.dags.glob("*.py") if _DEFINES.search(path.read_text(encoding="utf-8"))}
        return wanted <= self.api.dag_files()

    def __enter__(self) -> LocalAirflow:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
