"""Builds again what is out of date: ``python -m jobs.rebuild [--from DAY --to DAY] [--dry-run]``.

    python -m jobs.rebuild --dry-run      what would be built again, and why
    python -m jobs.rebuild                builds, audits and publishes it, day by day

A published day of a table is out of date for one of three reasons:

late      its raw files are not those it was built from: events came late, or were corrected
matured   it was built before its attribution window closed, and by now no conversion can come any more
stale     a day it was built from was put there since, or is itself out of date

Nothing else is built, because every table that is built again makes those stale that read it.  A day that fails stops
the run; the days before it are published, and the next run goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime

from jobs.runner import Opened, audit_and_publish, build_day, guarded
from jobs.sources import Source, open_source
from jobs.workspace import INPUTS, Workspace, stamp_of
from onetrans.days import describe_days, parse_day
from onetrans.errors import BadConfigError
from onetrans.lake import Lake
from onetrans.lineage import in_order, stale_days
from onetrans.outdated import matured_days
from onetrans.process import EXIT_CODES, Parser, add_json, print_json
from onetrans.progress import long_steps
from onetrans.schema import FeatureSchema, load_schema
from onetrans.settings import load_settings

logger = logging.getLogger(__name__)

LATE = "its raw files have changed since it was built"
MATURED = "its attribution window has closed since it was built"
STALE = "a day it was built from is newer, or out of date itself"


@dataclass(frozen=True)
class Outdated:
    """One day of a table that is to be built again."""

    ds: date
    """The day."""
    table: str
    """The table."""
    reason: str
    """Why."""


def outdated(
    lake: Lake,
    schema: FeatureSchema,
    source: Source,
    now: datetime,
    first: date = date.min,
    last: date = date.max,
) -> list[Outdated]:
    """Return what is out of date, in the order in which it can be built; Spark is not needed.

    Between ``first`` and ``last`` a day may be out of date for a reason of its own; what is stale then lies on any
    later day.
    """
    own = dict.fromkeys(_late(lake, source), LATE)
    own |= {(ds, "impressions"): MATURED for ds in matured_days(lake, schema, now) if (ds, "impressions") not in own}
    own = {(ds, table): reason for (ds, table), reason in own.items() if first <= ds <= last}
    stale = stale_days(lake, after=date.min, outdated=own)
    if first != date.min:
        stale = {table: [ds for ds in days if ds >= first] for table, days in stale.items()}
    reasons = {**{(ds, table): STALE for table, days in stale.items() for ds in days}, **own}
    every: dict[str, list[date]] = {}
    for ds, table in reasons:
        every.setdefault(table, []).append(ds)
    return [Outdated(ds, table, reasons[ds, table]) for ds, table in in_order(every)]


def _late(lake: Lake, source: Source) -> Iterable[tuple[date, str]]:
    """Yield days of tables whose raw files have changed; one whose files are gone is left alone."""
    for table, raw in INPUTS.items():
        for ds, built in lake.built_days(table).items():
            now = stamp_of(lake, source, raw, ds)
            # A manifest that is older than stamps has none; then only repairs are known to be new.
            late = now and now != built.raw and (built.raw or now.startswith("+"))
            also = ((stamp_of(lake, source, name, ds), was) for name, was in built.raw_also.items())
            if late or any(stamp and stamp != was for stamp, was in also):
                yield ds, table


def rebuild(work: Workspace, due: Iterable[Outdated], publish: Callable[[Workspace, str, date], None]) -> None:
    """Build days of tables again, each published before the next, which may read it, is built."""
    every = list(due)
    began = time.monotonic()
    for done, one in enumerate(every, start=1):
        build_day(work, one.table, importlib.import_module(f"jobs.{one.table}").build, one.ds)
        publish(work, one.table, one.ds)
        left = (time.monotonic() - began) / done * (len(every) - done)
        logger.info(
            "%s %s built again (%s); %d of %d, about %.0f s left",
            one.table, one.ds, one.reason, done, len(every), left,
        )  # fmt: skip


def describe(due: Iterable[Outdated]) -> str:
    """Say what is out of date, a line per reason and table."""
    days: dict[tuple[str, str], list[date]] = {}
    for one in due:
        days.setdefault((one.reason, one.table), []).append(one.ds)
    return "\n".join(f"{table} {describe_days(found)}: {reason}" for (reason, table), found in days.items())


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser(
        prog="python -m jobs.rebuild",
        description=__doc__,
        epilog="examples:\n  python -m jobs.rebuild --dry-run\n  python -m jobs.rebuild --dry-run --json\n"
        f"  python -m jobs.rebuild --from 2026-01-01\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="first", metavar="DAY", help="leave earlier days as they are")
    parser.add_argument("--to", dest="last", metavar="DAY", help="last day that is late or matured, included")
    parser.add_argument("--dry-run", action="store_true", help="only say what is out of date")
    add_json(parser)

    def run() -> None:
        arguments = parser.parse_args(argv)
        first = parse_day(arguments.first) if arguments.first else date.min
        last = parse_day(arguments.last) if arguments.last else date.max
        if last < first:
            raise BadConfigError(f"the range ends on {last}, before it begins on {first}")
        settings = load_settings()
        schema = load_schema(settings.source)
        source = open_source(settings.source, schema)
        with long_steps(None, "looking for what is out of date"):
            due = outdated(Lake(settings.lake), schema, source, datetime.now(UTC), first, last)
        if arguments.json:
            print_json([asdict(one) for one in due])
            sys.stdout.flush()  # before hours of building
        else:
            print(describe(due) or "every published day is up to date", flush=True)
        if due and not arguments.dry_run:
            with Opened() as work:
                rebuild(work, due, audit_and_publish)

    return guarded(run)


if __name__ == "__main__":
    raise SystemExit(main())
