"""The time and peak memory of each step of a day, run as the processes Airflow runs.

    python -m benchmarks.day [--quick] [--json FILE] [--data DIR] [--days N]

A small simulated log (or the KuaiRand release in DIR) is written and its first
days are built in one session.  Then the steps of the following days run one
after another, by the very commands of the DAGs; a figure is the median over
these days.  *Start-up* is the share of processor time that goes before the step
looks at its data: interpreter, imports, and the Spark session where there is
one.  At last a local Airflow is started, and steps that do nothing show what it
adds to each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from statistics import median

from benchmarks.common import Report, parser
from infra.local.airflow import REPOSITORY, LocalAirflow
from infra.local.watch import MemoryWatch, ProcessorWatch, tree_memory

_SAMPLE_S = 0.2
_IDLE_TASKS = 10
_MIB = 2**20
_DAY, _PLAN = "DAY", "PLAN"


@dataclass(frozen=True)
class Measured:
    """What one process cost."""

    seconds: float
    """Wall-clock time."""
    cpu_s: float
    """Processor time of it and all under it, to within a sample."""
    peak: int
    """Largest memory of it and all under it, in bytes."""
    result: str
    """Last line it printed."""


def measure(command: Sequence[str], environment: Mapping[str, str]) -> Measured:
    """Run a process and measure it; leave the benchmark if it fails."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=dict(environment), cwd=REPOSITORY, stdout=output, stderr=errors) as process:
            with ProcessorWatch(process.pid) as processor, MemoryWatch(process.pid, every=_SAMPLE_S) as memory:
                process.wait()
        seconds = time.monotonic() - begun
        output.seek(0)
        errors.seek(0)
        printed = output.read().strip().splitlines()
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{errors.read()[-3000:]}")
    return Measured(seconds, processor.seconds, memory.peak, printed[-1] if printed else "")


@dataclass(frozen=True)
class StepCommand:
    """One step of a day."""

    name: str
    """DAG and task."""
    module: str
    """What ``python -m`` runs."""
    arguments: tuple[str, ...]
    """Its arguments, with :data:`_DAY` and :data:`_PLAN` for what differs from day to day."""

    def command(self, ds: date, plan: str) -> list[str]:
        """Return the command line of one day."""
        known = {_DAY: str(ds), _PLAN: plan}
        return [sys.executable, "-m", self.module, *(known.get(argument, argument) for argument in self.arguments)]

    @property
    def startup(self) -> list[str]:
        """A command line that does what this one does before it looks at data."""
        if self.module.startswith("jobs."):
            program = f"import {self.module}; from jobs.spark import session; session().stop()"
        elif self.module == "onetrans.cli":
            from onetrans.cli import COMMANDS

            program = f"import {COMMANDS[self.arguments[0]][0]}"
        else:
            program = f"import {self.module}"
        return [sys.executable, "-c", program]


def steps() -> list[StepCommand]:
    """Return the steps of both DAGs, in an order in which they can run."""
    # Airflow writes a configuration file into its home as soon as it is imported.
    os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))
    from dags import feature_tables, ranking_model
    from dags.steps import DAY

    templates = {DAY: _DAY, ranking_model.PLAN: _PLAN}
    return [
        StepCommand(
            f"{dag.dag_id} {task.task_id}",
            task.module,
            tuple(templates.get(text, text) for text in task.arguments if text in templates or "{{" not in text),
        )
        for dag in (feature_tables.dag, ranking_model.dag)
        for task in dag.topological_sort()
        if task.module  # else it waits for other runs alone
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="folder of the KuaiRand release (default: generate)")
    options.add_argument("--days", type=int, metavar="N", help="days measured (default: 3, quick: 1)")
    options.add_argument("--preset", default="", help="size of both models (default: tiny, with --data: small)")
    arguments = options.parse_args(argv)
    report = Report("day", arguments)
    with tempfile.TemporaryDirectory(prefix="onetrans-day-") as folder:
        environment, first = prepare(Path(folder), arguments)
        count = arguments.days or (1 if arguments.quick else 3)
        # What is promised of a day is promised for the real log.
        expected = "<= 360" if arguments.data else ""
        measure_days(report, environment, [first + timedelta(days=offset) for offset in range(count)], expected)
        measure_airflow(report, Path(folder), environment)
    return report.finish()


def prepare(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, str], date]:
    """Write a log and build its history; return the environment of the steps and the first day to measure."""
    data: Path | None = arguments.data
    preset = arguments.preset or ("small" if data else "tiny")
    raw = data.resolve() if data else folder / "raw"
    config = folder / "onetrans.toml"
    config.write_text(
        f"""
[source]
kind = "{"kuairand" if data else "files"}"
path = "{raw}"
[lake]
warehouse = "{folder / "lake"}"
[training]
preset = "{preset}"
runs = "{folder / "runs"}"
[mlflow]
tracking_uri = "sqlite:///{folder / "mlflow" / "mlflow.db"}"
artifacts = "{folder / "mlflow" / "artifacts"}"
""",
        encoding="utf-8",
    )
    environment = {**os.environ, "ONETRANS_CONFIG": str(config)}
    start = date(2022, 4, 25) if data else date(2026, 1, 1)
    history = 9 if data else 1 if arguments.quick else 7
    if not data:
        size = ["--users", "1000", "--items", "300"] if arguments.quick else []
        command = [sys.executable, "-m", "onetrans.cli", "simulate", "--out", str(raw), "--from", str(start)]
        measure([*command, "--days", str(history + (arguments.days or 3)), *size], environment)
    last = start + timedelta(days=history - 1)
    print(f"building the history, {start} to {last}", flush=True)
    measure([sys.executable, "-m", "jobs.backfill", "--from", str(start), "--to", str(last)], environment)
    return environment, last + timedelta(days=1)


def measure_days(report: Report, environment: Mapping[str, str], days: Sequence[date], expected: str) -> None:
    """Run all steps of some days one after another and report their medians, and the sum against ``expected``."""
    every: dict[StepCommand, list[Measured]] = {step: [] for step in steps()}
    for ds in days:
        plan = ""
        for step, costs in every.items():
            cost = measure(step.command(ds, plan), environment)
            costs.append(cost)
            print(f"{ds} {step.name:<42} {cost.seconds:6.1f} s", flush=True)
            if step.name.endswith(" plan"):
                plan = cost.result
    startups: dict[tuple[str, ...], float] = {}
    for step, costs in every.items():
        # One start of Spark is like another; what a command imports differs.
        key = ("jobs",) if step.module.startswith("jobs.") else tuple(step.startup)
        if key not in startups:
            startups[key] = measure(step.startup, environment).cpu_s
        processor = median(cost.cpu_s for cost in costs)
        report.add(step.name, "time", median(cost.seconds for cost in costs), "s")
        report.add(step.name, "processor time", processor, "s")
        report.add(step.name, "peak memory", median(cost.peak for cost in costs) / _MIB, "MiB")
        report.add(step.name, "start-up share", min(startups[key] / processor, 1.0))
    total = sum(median(cost.seconds for cost in costs) for costs in every.values())
    report.add("whole day", "steps one after another", total, "s", expected)


def measure_airflow(report: Report, folder: Path, environment: Mapping[str, str]) -> None:
    """Start a local Airflow and report its start, its memory, and what it adds to a step that does nothing."""
    dags = folder / "idle"
    dags.mkdir()
    (dags / "idle.py").write_text(
        f"""
from airflow.sdk import DAG
from dags.days import DAILY, START
from dags.steps import DEFAULTS, Step

with DAG("idle", schedule=DAILY, start_date=START, catchup=False, default_args=DEFAULTS):
    before = None
    for number in range({_IDLE_TASKS}):
        step = Step(task_id=f"step_{{number}}", module="this", arguments=[])
        if before is not None:
            before >> step
        before = step
""",
        encoding="utf-8",
    )
    airflow = LocalAirflow(folder / "airflow", environment, dags=dags)
    try:
        report.add("local Airflow", "start", airflow.start(), "s")
        held = sum(size for kind, size in tree_memory().items() if kind.startswith("airflow"))
        report.add("local Airflow", "memory", held / _MIB, "MiB")
        nothing = measure([sys.executable, "-m", "this"], environment).seconds
        airflow.api.backfill("idle", date(2026, 1, 1), date(2026, 1, 1))
        while not (runs := airflow.api.runs("idle")) or not all(run.finished for run in runs):
            airflow.check()
            time.sleep(0.5)
        ends = sorted(task.ended for task in airflow.api.tasks("idle", runs[0].run_id) if task.ended)
    finally:
        airflow.stop()
    # From end to end, so that the first task's wait for the scheduler is not in it.
    each = (ends[-1] - ends[0]).total_seconds() / (len(ends) - 1)
    report.add("local Airflow", "added to each step", each - nothing, "s")


if __name__ == "__main__":
    sys.exit(main())
