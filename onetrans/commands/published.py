"""``onetrans published TABLE --ds D``: exit 0 if the day is published, 75 (not ready) if it is not.

With ``--wait`` one process looks again and again, which costs far less than to
start one per look; whatever publishes the day, it is noticed.
"""

from __future__ import annotations

import argparse
import time

from onetrans.days import describe_days, parse_day
from onetrans.errors import EXIT_OK, BadConfigError, NotReadyError
from onetrans.lake import SCORES, TABLES, Lake
from onetrans.process import add_json, print_json
from onetrans.settings import load_settings

EXAMPLES = """examples:
  onetrans published training_requests --ds 2022-05-04 && echo ready
  onetrans published training_requests --ds 2022-05-04 --wait 3600"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("table", choices=(*TABLES, SCORES), help="table that is asked about")
    parser.add_argument("--ds", required=True, metavar="DAY", help="day, YYYY-MM-DD")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="longest wait (default: 0)")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: 5)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tell by the exit code, and in words, whether the day is published.

    Raises:
        NotReadyError: if it is not; the text names the days that are.
        BadConfigError: if it is not, and is not to be waited for.
    """
    if arguments.every <= 0:
        raise BadConfigError(f"--every = {arguments.every} must be more than 0")
    ds = parse_day(arguments.ds)
    settings = load_settings()
    lake = Lake(settings.lake)
    deadline = time.monotonic() + arguments.wait
    while True:
        published = lake.published(arguments.table)
        day = next((day for day in published if day.ds == ds), None)
        if day is not None:
            if arguments.json:
                print_json(vars(day))
            else:
                print(f"{arguments.table} {ds}: published, {day.rows:,} rows in {day.files} files")
            return EXIT_OK
        if ds in settings.source.absent_days:
            raise BadConfigError(
                f"{arguments.table} {ds} is not published, and source.absent_days says that the log lost this day"
            )
        left = deadline - time.monotonic()
        if left <= 0:
            raise NotReadyError(
                f"{arguments.table} {ds} is not published; published are {describe_days([day.ds for day in published])}"
            )
        time.sleep(min(arguments.every, left))
