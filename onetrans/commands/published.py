"""``onetrans published TABLE --ds D``: exit 0 if the day is published, 75 (not ready) if it is not."""

from __future__ import annotations

import argparse

from onetrans.days import describe_days, parse_day
from onetrans.errors import EXIT_OK, NotReadyError
from onetrans.lake import TABLES, Lake
from onetrans.settings import load_settings

EXAMPLES = """example:
  onetrans published training_requests --ds 2022-05-04 && echo ready"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("table", choices=TABLES, help="table that is asked about")
    parser.add_argument("--ds", required=True, metavar="DAY", help="day, YYYY-MM-DD")


def run(arguments: argparse.Namespace) -> int:
    """Tell by the exit code, and in words, whether the day is published.

    Raises:
        NotReadyError: if it is not; the text names the days that are.
    """
    ds = parse_day(arguments.ds)
    published = Lake(load_settings().lake).published(arguments.table)
    day = next((day for day in published if day.ds == ds), None)
    if day is None:
        raise NotReadyError(
            f"{arguments.table} {ds} is not published; published are {describe_days([day.ds for day in published])}"
        )
    print(f"{arguments.table} {ds}: published, {day.rows:,} rows in {day.files} files")
    return EXIT_OK
