"""Three days of the whole pipeline, from nothing, through Airflow: ``python -m examples.demo [--data DIR]``.

Without ``--data`` a small simulated shop writes its log; with it the KuaiRand
release in DIR is read.  The days before the three are built in one Spark
session, as a team would load its history.  Then a local Airflow runs both DAGs
for three days, as a backfill created by the call that its UI makes.

Everything is written under ``var/demo`` (or the folder that ``ONETRANS_DEMO_HOME`` names), which is emptied first.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

from infra.airflow.api import Run, Task
from infra.local.airflow import REPOSITORY, LocalAirflow
from infra.local.homes import airflow_home, chosen_config
from infra.local.processes import stop_processes, stop_remembered
from infra.local.watch import MemoryWatch
from onetrans.cores import usable_cores
from onetrans.days import day_range
from onetrans.errors import EXIT_OK, BadConfigError, PipelineError
from onetrans.process import EXIT_CODES, Parser, exit_code_of
from onetrans.schema import load_schema
from onetrans.settings import SourceSettings

HOME = Path(os.environ.get("ONETRANS_DEMO_HOME") or REPOSITORY / "var" / "demo").resolve()
DAGS = ("feature_tables", "ranking_model")
_LOOK_EVERY_S = 1.5
_LOG_LINES = 30
_FEW_LINES = 3
_ENDED_WITH = re.compile(r"^Airflow\w*(?:Exception|Timeout): ", re.MULTILINE)
_TUNED_ON_KUAIRAND: dict[str, Any] = {"batch_size": 512, "dense_lr": 0.001}
"""Tuned on 3 May, the day before those shown (benchmarks/results/accuracy.md)."""


@dataclass(frozen=True)
class Log:
    """The raw log a demo runs on."""

    kind: str
    """Source kind of the settings."""
    path: Path
    """Folder of the raw files."""
    history_from: date
    """First day built before Airflow takes over."""
    days: tuple[date, ...]
    """Days run through Airflow."""
    preset: str
    """Size of both models."""
    minutes: int
    """About how long the demo takes on two free cores, at most (benchmarks/results/demo.md)."""
    batch_size: int = 256
    """Impressions of a step: a pass over so small a log must still be many steps."""
    dense_lr: float = 0.0
    """Learning rate of both models; 0: the preset's."""

    @property
    def history_to(self) -> date:
        """Last day of the history."""
        return self.days[0] - timedelta(days=1)


def simulated() -> Log:
    """Return the simulated shop: nine days of history, then three days."""
    first = date(2026, 1, 1)
    return Log("files", HOME / "raw", first, _three_days(first + timedelta(days=9)), "tiny", 13)


def kuairand(path: Path) -> Log:
    """Return the real log: days to 3 May 2022 as history, then 4, 5 and 6 May.

    Raises:
        BadConfigError: if the folder does not hold these days.
    """
    if not path.is_dir():
        raise BadConfigError(f"--data {path} is not a folder; give the folder of the KuaiRand release")
    log = Log(
        "kuairand", path.resolve(), date(2022, 4, 25), _three_days(date(2022, 5, 4)), "tiny", 15, **_TUNED_ON_KUAIRAND
    )
    _require_days(log)
    return log


def _require_days(log: Log) -> None:
    """Refuse a log that lacks a day, before what an earlier demo wrote is removed.

    Raises:
        BadConfigError: naming the day, or what the folder should hold.
    """
    from jobs.sources import open_source  # Spark's package: the generated log is made without it.

    settings = SourceSettings(kind="kuairand", path=str(log.path))
    source = open_source(settings, load_schema(settings))
    for ds in day_range(log.history_from, log.days[-1]):
        missing = source.missing(ds)
        if missing:
            raise BadConfigError(f"--data {log.path}: {missing}")


def _three_days(first: date) -> tuple[date, ...]:
    return tuple(first + timedelta(days=offset) for offset in range(3))


def configuration(log: Log, cores: int) -> str:
    """Return the configuration file of the demo."""
    threads = max(1, cores // 2)  # Two models train side by side.
    return f"""# Written by examples/demo.py.
[source]
kind = "{log.kind}"
path = "{log.path}"

[lake]
warehouse = "{HOME / "lake"}"

[spark]
master = "local[{min(cores, 4)}]"

[training]
preset = "{log.preset}"
batch_size = {log.batch_size}
dense_lr = {log.dense_lr}  # 0: the preset's.
runs = "{HOME / "runs"}"
threads = {threads}

[mlflow]
tracking_uri = "sqlite:///{HOME / "mlflow" / "mlflow.db"}"
artifacts = "{HOME / "mlflow" / "artifacts"}"

[airflow]
deadline_hours = 0  # Its days are long past: each would be told as late.
"""


class DemoError(PipelineError):
    """A part of the demo failed."""


@dataclass
class Stopwatch:
    """Seconds of each stage of the demo."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and take its time."""
        say(f"== {name}")
        begun = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begun


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = Parser(
        prog="python -m examples.demo",
        description=__doc__,
        epilog="examples:\n  python -m examples.demo\n  python -m examples.demo --data /path/to/KuaiRand-Pure\n"
        f"  ONETRANS_DEMO_HOME=/tmp/demo python -m examples.demo\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the KuaiRand release (default: generate)")
    signal.signal(signal.SIGTERM, _interrupt)

    def ran() -> int:
        arguments = parser.parse_args(argv)
        log = kuairand(arguments.data) if arguments.data else simulated()
        try:
            run(log)
        except KeyboardInterrupt:
            say(
                f"what is built so far stays in {_short(HOME)}: {_make_ui(HOME / 'onetrans.toml')} shows it; make demo "
                "begins from nothing"
            )
            raise
        return EXIT_OK

    return exit_code_of(ran)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Costs:
    """What a demo took."""

    config: Path
    """Its configuration file."""
    total_s: float
    """Seconds in all."""
    peak_bytes: int
    """Most memory that all processes held together."""
    pairs_s: dict[date, float]
    """Seconds from the first step of a day's two runs to the last, its own waiting for another day's steps included."""


def run(log: Log) -> Costs:
    """Run all stages, print what they gave, took and held, and return it.

    Raises:
        PipelineError: if one fails.
    """
    watch = Stopwatch()
    begun = time.monotonic()
    config = _start_clean(log)
    say(
        f"The history of {(log.history_to - log.history_from).days + 1} days in one session, then {len(log.days)} days "
        f"through Airflow: about {log.minutes} minutes on two free cores. Logs: {_short(HOME / 'logs')}"
    )
    environment = {"ONETRANS_CONFIG": str(config)}
    airflow = LocalAirflow(airflow_home(config), environment)
    with MemoryWatch(every=1.0) as memory:
        if log.kind == "files":
            days = (log.days[-1] - log.history_from).days + 1
            with watch.stage(f"simulate {days} days of a shop's log"):
                _process(
                    airflow.environment,
                    *("onetrans.cli", "simulate", "--out", str(log.path)),
                    *("--from", str(log.history_from), "--days", str(days)),
                )
        with watch.stage(f"build the history, {log.history_from} to {log.history_to}, in one session"):
            first, last = str(log.history_from), str(log.history_to)
            _process(airflow.environment, "jobs.backfill", "--from", first, "--to", last, shown=" published in ")
        try:
            with watch.stage("start Airflow"):
                airflow.start()
                say(f"   {airflow.address} shows every step while it runs")
            with watch.stage(f"run both DAGs for {log.days[0]} to {log.days[-1]}"):
                tasks = _run_days(airflow, log.days)
        finally:
            airflow.stop()
        with watch.stage("report"):
            _process(
                airflow.environment,
                *("onetrans.cli", "report", "--from", str(log.days[0]), "--to", str(log.days[-1])),
            )
    total = time.monotonic() - begun
    _print_costs(watch, [task for _, task in tasks], memory, total)
    say(
        f"\nTo open Airflow, MLflow and Data Docs on this data: {_make_ui(config)}"
        f"\nTo run a command on it: ONETRANS_CONFIG={_short(config)} .venv/bin/onetrans lake"
    )
    return Costs(config, total, memory.peak, _pairs(tasks))


def _make_ui(config: Path) -> str:
    """Return the command that shows this demo: a configuration of the user's own would go before it."""
    return "make ui" if chosen_config() == config else f"ONETRANS_CONFIG={_short(config)} make ui"


def _short(path: Path) -> Path:
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def _pairs(tasks: list[tuple[Run, Task]]) -> dict[date, float]:
    spans: dict[date, list[datetime]] = {}
    for run, task in tasks:
        if run.logical_date is not None:
            spans.setdefault(run.logical_date, []).extend(filter(None, [task.started, task.ended]))
    return {ds: (max(times) - min(times)).total_seconds() for ds, times in sorted(spans.items())}


def _start_clean(log: Log) -> Path:
    """Empty the demo's folder, stop what an earlier demo may have left running, and write the configuration."""
    stop_remembered(airflow_home(HOME / "onetrans.toml") / "processes.json")
    if HOME.exists():
        say(f"== empty {_short(HOME)}: tables, runs and models of an earlier demo go")
        shutil.rmtree(HOME)
    HOME.mkdir(parents=True)
    config = HOME / "onetrans.toml"
    config.write_text(configuration(log, usable_cores()), encoding="utf-8")
    return config


def _process(environment: Mapping[str, str], module: str, *arguments: str, shown: str = "") -> None:
    """Run one process: what it prints goes to the terminal, its log to a file; log lines with ``shown`` to both.

    Raises:
        DemoError: if it fails; with the end of its log.
    """
    log = HOME / "logs" / f"{'-'.join([module, *arguments[:1]]).replace('--', '')}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", module, *arguments]
    with (
        log.open("w", encoding="utf-8", buffering=1) as file,  # whoever waits looks into it
        subprocess.Popen(
            command, env=dict(environment), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process,
    ):
        assert process.stderr is not None
        try:
            for line in process.stderr:
                file.write(line)
                if shown and shown in line:
                    say(f"   {line.split(' INFO ')[-1].rstrip()}")
        except BaseException:
            # On Ctrl-C Popen does not end its process: it would go on writing to the lake.
            stop_processes([process.pid], grace=5.0)
            raise
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise DemoError(
            f"`python -m {module} {' '.join(arguments)}` ended with exit code {process.returncode}; "
            f"{log} ends with:\n" + "\n".join(lines)
        )


def _run_days(airflow: LocalAirflow, days: tuple[date, ...]) -> list[tuple[Run, Task]]:
    """Create one backfill per DAG, show each step as it ends, and return all tasks with their runs.

    Raises:
        DemoError: when a step has failed for good; with the end of its log.
    """
    for dag_id in DAGS:
        airflow.api.backfill(dag_id, days[0], days[-1])
    begun = time.monotonic()
    shown: dict[tuple[str, str, str], tuple[str, int]] = {}
    while True:
        airflow.check()
        runs = [run for dag_id in DAGS for run in airflow.api.runs(dag_id)]
        tasks = [(run, task) for run in runs for task in airflow.api.tasks(run.dag_id, run.run_id)]
        for run, task in sorted(tasks, key=lambda pair: str(pair[1].ended)):
            key = (task.dag_id, task.run_id, task.task_id)
            seen = (task.state, task.tries)
            if shown.get(key) != seen:
                shown[key] = seen
                _show(airflow, run, task, time.monotonic() - begun)
        if len(runs) == len(DAGS) * len(days) and all(run.finished for run in runs):
            return tasks
        time.sleep(_LOOK_EVERY_S)


def _show(airflow: LocalAirflow, run: Run, task: Task, elapsed: float) -> None:
    line = f"   {elapsed:5.0f} s  {run.logical_date}  {task.dag_id:<14}  {task.task_id:<26}"
    if task.state == "success":
        say(f"{line} {task.seconds:6.1f} s")
    elif task.state == "deferred":
        say(f"{line} waits for the day")
    elif task.state == "up_for_retry":
        say(f"{line} failed, will be tried again:\n{_why(airflow, task)}")
    elif task.state == "failed":
        config = HOME / "onetrans.toml"
        raise DemoError(
            f"{task.dag_id} {task.task_id} of {run.logical_date} failed:\n{_why(airflow, task)}\n\n"
            f"What else ran was stopped too, and goes on under: {_make_ui(config)}\nMend the cause, then clear the "
            f"failed task there. For commands: source .venv/bin/activate; export ONETRANS_CONFIG={_short(config)}\n"
            "(make demo begins from nothing again)"
        )


def _why(airflow: LocalAirflow, task: Task) -> str:
    """Return the paragraph that the step ended with; the end of its log where a kill left none."""
    texts = airflow.api.log(task)
    named = [text[found.start() :] for text in texts if (found := _ENDED_WITH.search(text))]
    return "\n".join(f"      {line}" for text in named[-1:] or texts[-_FEW_LINES:] for line in text.splitlines())


def _print_costs(watch: Stopwatch, tasks: list[Task], memory: MemoryWatch, total: float) -> None:
    """Print the seconds of each stage and step, and the peak of memory."""
    say("\nstage                                                           seconds")
    for name, seconds in watch.seconds.items():
        say(f"{name:<62} {seconds:8.1f}")
    say(f"{'in all':<62} {total:8.1f}")
    say("\nstep, mean over the days                                        seconds")
    spent: dict[str, list[float]] = {}
    for task in sorted(tasks, key=lambda task: str(task.started)):
        spent.setdefault(f"{task.dag_id} {task.task_id}", []).append(task.seconds)
    for name, each in spent.items():
        say(f"{name:<62} {sum(each) / len(each):8.1f}")
    say(f"\npeak memory of all processes together: {memory.peak / 2**30:.2f} GiB, of which")
    for kind, held in sorted(memory.at_peak.items(), key=lambda item: -item[1]):
        say(f"  {kind:<60} {held / 2**20:6.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
