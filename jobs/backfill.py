"""Build, audit and publish a range of days of all tables in one Spark session: how a lake is started.

    python -m jobs.backfill --from 2022-04-25 --to 2022-05-03

The days are built in order, because a day's figures and tails rest on the days before it.  A day that fails stops
the run; what was published before it stays.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from datetime import date

from jobs.runner import Opened, add_days, audit_and_publish, build_day, chosen_days, guarded, present, tell_stale
from jobs.workspace import Workspace
from onetrans.lake import TABLES
from onetrans.process import EXIT_CODES, Parser

logger = logging.getLogger(__name__)


def publish_all(work: Workspace, days: list[date]) -> None:
    """Build, audit and publish all tables of some days, in order."""
    began = time.monotonic()
    for done, ds in enumerate(days, start=1):
        started = time.monotonic()
        for table in TABLES:
            build_day(work, table, importlib.import_module(f"jobs.{table}").build, ds)
            audit_and_publish(work, table, ds)
        now = time.monotonic()
        left = (now - began) / done * (len(days) - done)
        logger.info(
            "%s: all tables published in %.1f s; day %d of %d, about %.0f s left",
            ds, now - started, done, len(days), left,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser(
        prog="python -m jobs.backfill",
        description=__doc__,
        epilog="examples:\n  python -m jobs.backfill --from 2026-01-01 --to 2026-01-14\n"
        f"  python -m jobs.backfill --from 2026-01-01 --to 2026-01-14 --skip-published\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_days(parser)
    parser.add_argument(
        "--skip-published", action="store_true", help="leave days alone that are published in every table"
    )

    def run() -> None:
        arguments = parser.parse_args(argv)
        days = chosen_days(arguments)
        with Opened() as work:
            days = present(work, days)
            if arguments.skip_published:
                whole = set.intersection(*(set(work.lake.days(table)) for table in TABLES))
                days = [ds for ds in days if ds not in whole]
            try:
                publish_all(work, days)
            finally:
                if days:
                    tell_stale(work, days[0])

    return guarded(run)


if __name__ == "__main__":
    raise SystemExit(main())
