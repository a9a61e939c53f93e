"""What the audit of a day costs, against the job that built it.

    python -m benchmarks.audit [--quick] [--json FILE] [--rows N]

A simulated log with about N impressions a day (default: a million) is written.
Its first day warms Spark and Great Expectations; on the second, every table is
built, audited and published in one process, as a backfill does it, so that
neither side pays for its start.  The time of the audit is promised as a share of
the time of all jobs; processor time, which other work on the machine disturbs
less, stands beside it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

from benchmarks.common import Report, parser
from expectations.audit import audit_staged
from infra.local.watch import ProcessorWatch
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import write_days
from jobs.workspace import Workspace
from onetrans.lake import TABLES
from onetrans.settings import LakeSettings, Settings, SourceSettings, SparkSettings

ROWS = 1_000_000
QUICK_ROWS = 50_000
FIRST_DAY = date(2026, 1, 1)
_REQUESTS_PER_USER = 2.0
_ROWS_PER_REQUEST = 10
_PROMISED = 0.20


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help=f"impressions of a day, about (default: {ROWS:,})")
    options.add_argument("--driver-memory", default="3g", help="heap of Spark (default: %(default)s)")
    arguments = options.parse_args(argv)
    report = Report("audit", arguments)
    with tempfile.TemporaryDirectory(prefix="onetrans-audit-") as folder:
        measure(report, Path(folder), arguments)
    return report.finish()


def measure(report: Report, folder: Path, arguments: argparse.Namespace) -> None:
    """Write the log, build two days, and report the second."""
    rows = arguments.rows or (QUICK_ROWS if arguments.quick else ROWS)
    users = max(rows // int(_REQUESTS_PER_USER * _ROWS_PER_REQUEST), 50)
    world = WorldConfig(
        users=users,
        items=max(users // 10, 300),
        requests_per_user=_REQUESTS_PER_USER,
        epoch=FIRST_DAY,
        history_days=2,
    )
    write_days(world, str(folder / "raw"), FIRST_DAY, 2)
    settings = Settings(
        source=SourceSettings(path=str(folder / "raw")),
        lake=LakeSettings(warehouse=str(folder / "lake")),
        spark=SparkSettings(driver_memory=arguments.driver_memory),
    )
    work = Workspace.open(settings)
    try:
        for ds in (FIRST_DAY, FIRST_DAY + timedelta(days=1)):
            costs = {table: one_table(work, table, ds) for table in TABLES}
            print(f"{ds}: {sum(job[0] + audit[0] for _, job, audit in costs.values()):.0f} s", flush=True)
    finally:
        work.spark.stop()
    for table, (count, job, audit) in costs.items():
        report.add(table, "rows", count)
        report.add(table, "job", job[0], "s")
        report.add(table, "audit", audit[0], "s")
        report.add(table, "audit / job", audit[0] / job[0])
    for place, figure, expected in (
        (0, "audit / jobs, time", f"<= {_PROMISED}"),
        (1, "audit / jobs, processor time", ""),
    ):
        jobs = sum(job[place] for _, job, _ in costs.values())
        audits = sum(audit[place] for _, _, audit in costs.values())
        # The promise is for a day of a million rows: what an audit costs at least weighs more on a small one.
        report.add("all tables", figure, audits / jobs, "", "" if rows < ROWS else expected)


def one_table(work: Workspace, table: str, ds: date) -> tuple[int, tuple[float, float], tuple[float, float]]:
    """Build, audit and publish one day of a table; return its rows, and wall and processor time of job and audit."""
    build = importlib.import_module(f"jobs.{table}").build
    job = timed(lambda: build(work, ds))
    audit = timed(lambda: audit_staged(work.lake, work.schema, table, ds, work.spark, work.settings.audit))
    work.lake.publish(table, ds)
    return work.lake.staged(table, ds).rows, job, audit


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that something takes, on the clock and of all processors."""
    began = time.monotonic()
    with ProcessorWatch() as processor:
        work()
    return time.monotonic() - began, processor.seconds


if __name__ == "__main__":
    sys.exit(main())
