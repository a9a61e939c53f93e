"""Is a day's raw log there?  ``python -m jobs.raw --ds D``: exit 0: yes; 75: it may come; 65: it is overdue.

A day is there when it has ended in the log's time zone and every table has files
of it; no file is opened.  It is overdue ``source.wait_hours`` after its end: a
day of last year that is missing is an error at once.  With ``--wait`` one
process looks again and again.  No Spark session is started.
"""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import UTC, date, datetime, timedelta

from jobs.sources import Source, open_source
from onetrans.days import day_bounds, parse_day
from onetrans.errors import EXIT_OK, BadDataError, NotReadyError
from onetrans.process import EXIT_CODES, Parser, exit_code_of
from onetrans.progress import wait_for
from onetrans.schema import FeatureSchema, load_schema
from onetrans.settings import Settings, load_settings


def check(settings: Settings, schema: FeatureSchema, source: Source, ds: date, now: datetime) -> None:
    """Return if the raw log of a day is there.

    Raises:
        NotReadyError: if the day has not ended at ``now``, or its files may still come.
        BadDataError: if files are missing and overdue, or known to be lost.
    """
    end = day_bounds(ds, schema.timezone)[1]
    missing = source.missing(ds)
    if missing and ds in settings.source.absent_days:
        raise BadDataError(f"{missing}. source.absent_days says that the log lost this day, so it is not waited for")
    if missing and now >= end + timedelta(hours=settings.source.wait_hours):
        raise BadDataError(
            f"{missing}. The day ended at {end:%Y-%m-%d %H:%M} UTC, and source.wait_hours = "
            f"{settings.source.wait_hours:g} have gone by. Days lost for good go into source.absent_days"
        )
    if now < end:
        raise NotReadyError(f"{ds} ends at {end:%Y-%m-%d %H:%M} UTC, as the log's time zone is {schema.timezone}")
    if missing:
        raise NotReadyError(missing)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser(
        prog="python -m jobs.raw",
        description=__doc__,
        epilog="examples:\n  python -m jobs.raw --ds 2026-01-10 && echo there\n"
        f"  python -m jobs.raw --ds 2026-01-10 --wait 3600\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ds", required=True, metavar="DAY", help="the day, YYYY-MM-DD")
    parser.add_argument(
        "--unless-absent",
        action="store_true",
        help="exit 0 with the words 'nothing to do' where the log lost the day (source.absent_days)",
    )
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="longest wait (default: 0)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    return exit_code_of(lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    ds = parse_day(arguments.ds)
    settings = load_settings()
    schema = load_schema(settings.source)
    source = open_source(settings.source, schema)
    if arguments.unless_absent and ds in settings.source.absent_days and source.missing(ds):
        print(f"nothing to do: source.absent_days says that the log lost {ds}")
        return EXIT_OK
    wait_for(lambda: check(settings, schema, source, ds, datetime.now(UTC)), arguments.wait, f"the raw log of {ds}")
    print(f"the raw log of {ds} is there")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
