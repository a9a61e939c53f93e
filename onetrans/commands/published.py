"""``onetrans published TABLE ... --ds D``: exit 0 if the day is published in each table, 75 (not ready) if not.

With ``--wait`` one process looks again and again, which costs far less than to
start one per look; whatever publishes the day, it is noticed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import date, timedelta

from onetrans.days import describe_days, parse_day
from onetrans.errors import EXIT_OK, BadConfigError, NotReadyError
from onetrans.lake import SCORES, TABLES, Lake, PublishedDay
from onetrans.process import add_json, print_json
from onetrans.progress import long_steps
from onetrans.settings import Settings, load_settings

EXAMPLES = """examples:
  onetrans published training_requests --ds 2022-05-04 && echo ready
  onetrans published training_requests --ds 2022-05-04 --wait 3600
  onetrans published user_features item_features --ds 2022-05-04
  onetrans published impressions --ds 2022-05-04 --or-absent --or-first    is there nothing to wait for?"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "tables", nargs="+", choices=(*TABLES, SCORES), metavar="TABLE", help=f"one of {', '.join((*TABLES, SCORES))}"
    )
    parser.add_argument("--ds", required=True, metavar="DAY", help="day, YYYY-MM-DD")
    parser.add_argument(
        "--or-absent", action="store_true", help="of a day that source.absent_days names, the one before"
    )
    parser.add_argument(
        "--unless-absent",
        action="store_true",
        help="exit 0 with the words 'nothing to do' for a day in source.absent_days that is not published",
    )
    parser.add_argument("--or-first", action="store_true", help="exit 0 also where no day up to it is published")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="longest wait (default: 0)")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: 5)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tell by the exit code, and in words, whether the day is published in each table that is asked about.

    Raises:
        NotReadyError: if it is not; the text names the first table without it, and the days that are there.
        BadConfigError: if it is not, and is not to be waited for.
    """
    if arguments.every <= 0:
        raise BadConfigError(f"--every = {arguments.every} must be more than 0")
    ds = parse_day(arguments.ds)
    settings = load_settings()
    lake = Lake(settings.lake)
    deadline = time.monotonic() + arguments.wait
    found: dict[str, PublishedDay] = {}
    if arguments.or_absent:
        ds = _before_absent(lake, settings, ds, arguments.tables)
    nothing_lost = _nothing_lost(lake, ds, arguments)
    with long_steps(None, f"waiting for {', '.join(arguments.tables)} of {ds}"):
        for table in arguments.tables:
            while table not in found:
                published = lake.published(table) if lake.exists() else []  # a look makes no catalog
                day = next((day for day in published if day.ds == ds), None)
                left = deadline - time.monotonic()
                if day is not None:
                    found[table] = day
                elif nothing_lost:
                    break
                elif arguments.unless_absent and ds in settings.source.absent_days:
                    print(f"nothing to do: source.absent_days says that the log lost {ds}")
                    return EXIT_OK
                elif ds in settings.source.absent_days:
                    raise BadConfigError(
                        f"{table} {ds} is not published, and source.absent_days says that the log lost this day"
                    )
                elif left <= 0:
                    days = describe_days([day.ds for day in published])
                    raise NotReadyError(f"{table} {ds} is not published; published are {days}")
                else:
                    time.sleep(min(arguments.every, left))
    if arguments.json:
        shown = [{"table": table, **vars(day)} for table, day in found.items()]
        print_json(shown if len(arguments.tables) > 1 else next((vars(day) for day in found.values()), None))
    else:
        if len(found) < len(arguments.tables):
            print(f"{ds}: {nothing_lost}")
        for table, day in found.items():
            print(f"{table} {ds}: published, {day.rows:,} rows in {day.files} files")
    return EXIT_OK


def _before_absent(lake: Lake, settings: Settings, ds: date, tables: Sequence[str]) -> date:
    """Return the day that builds go on from: this, or the latest before it that is published or that the log has."""
    days = _published_days(lake, tables)
    while ds in settings.source.absent_days and ds not in days:
        ds -= timedelta(days=1)
    return ds


def _nothing_lost(lake: Lake, ds: date, arguments: argparse.Namespace) -> str:
    """Return why a day that is not published is as good as one that is, where that was asked; else nothing."""
    if arguments.or_first and all(day > ds for day in _published_days(lake, arguments.tables)):
        return "no day up to this one is published, so the tables begin after it"
    return ""


def _published_days(lake: Lake, tables: Sequence[str]) -> set[date]:
    return {day.ds for table in tables for day in (lake.published(table) if lake.exists() else [])}
