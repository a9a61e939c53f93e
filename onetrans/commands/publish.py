"""``onetrans publish TABLE --ds D``: make the staged, audited day what readers see, in one commit."""

from __future__ import annotations

import argparse
import logging
from datetime import timedelta

from onetrans.days import parse_day
from onetrans.errors import EXIT_OK
from onetrans.lake import SCORES, TABLES, Lake
from onetrans.lineage import describe_stale, stale_days
from onetrans.process import add_json, print_json
from onetrans.settings import load_settings

logger = logging.getLogger(__name__)

EXAMPLES = """example:
  onetrans publish impressions --ds 2022-05-04

The day must have been staged by its job and passed its audit; publishing it again changes nothing.
Later days that were built on what the day was before are named when the day's last table is published, and by
`onetrans lake` at any time; `python -m jobs.rebuild` builds them again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("table", choices=(*TABLES, SCORES), help="table whose staged day is published")
    parser.add_argument("--ds", required=True, metavar="DAY", help="day, YYYY-MM-DD")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Publish the day and print the snapshot; the day's last table warns of later days that rest on what was before.

    Raises:
        NotReadyError: if the day is not staged, or the staged files were not audited.
        BadDataError: if their audit failed.
    """
    ds = parse_day(arguments.ds)
    lake = Lake(load_settings().lake)
    before = lake.snapshot_id(arguments.table)
    snapshot = lake.publish(arguments.table, ds)
    rows = lake.staged(arguments.table, ds).rows
    done = "was published already, nothing changed" if snapshot == before else "published"
    stale = stale_days(lake, after=ds - timedelta(days=1))
    # While tables of this day are still to follow, what rests on them cannot be built again yet.
    if stale and not any(ds in days for days in stale.values()):
        logger.warning("%s is published; there are %s", ds, describe_stale(stale))
    if arguments.json:
        told = {"table": arguments.table, "ds": ds, "rows": rows, "snapshot": snapshot, "changed": snapshot != before}
        print_json(told)
    else:
        print(f"{arguments.table} {ds}: {done}; {rows:,} rows, snapshot {snapshot}")
    return EXIT_OK
