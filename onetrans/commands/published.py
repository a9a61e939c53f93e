"""``onetrans published TABLE ... --ds D``: exit 0 if the day is published in each table, 75 (not ready) if not.

With ``--wait`` one process looks again and again, which costs far less than to
start one per look; whatever publishes the day, it is noticed.
"""

from __future__ import annotations

import argparse
import time

from onetrans.days import describe_days, parse_day
from onetrans.errors import EXIT_OK, BadConfigError, NotReadyError
from onetrans.lake import SCORES, TABLES, Lake, PublishedDay
from onetrans.process import add_json, print_json
from onetrans.progress import long_steps
from onetrans.settings import load_settings

EXAMPLES = """examples:
  onetrans published training_requests --ds 2022-05-04 && echo ready
  onetrans published training_requests --ds 2022-05-04 --wait 3600
  onetrans published user_features item_features --ds 2022-05-04"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "tables", nargs="+", choices=(*TABLES, SCORES), metavar="TABLE", help=f"one of {', '.join((*TABLES, SCORES))}"
    )
    parser.add_argument("--ds", required=True, metavar="DAY", help="day, YYYY-MM-DD")
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
    with long_steps(None, f"waiting for {', '.join(arguments.tables)} of {ds}"):
        for table in arguments.tables:
            while table not in found:
                published = lake.published(table) if lake.exists() else []  # a look makes no catalog
                day = next((day for day in published if day.ds == ds), None)
                left = deadline - time.monotonic()
                if day is not None:
                    found[table] = day
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
        print_json(shown if len(arguments.tables) > 1 else vars(found[arguments.tables[0]]))
    else:
        for table, day in found.items():
            print(f"{table} {ds}: published, {day.rows:,} rows in {day.files} files")
    return EXIT_OK
