"""``onetrans published TABLE ... --ds D``: exit 0 if the day is published in each table, 75 (not ready) if not.

With ``--wait`` one process looks again and again, which costs far less than to
start one per look; whatever publishes the day, it is noticed.
"""

from __future__ import annotations

import argparse

from onetrans.days import describe_days, parse_day, present_day
from onetrans.errors import EXIT_OK, BadConfigError, NotReadyError
from onetrans.lake import SCORES, TABLES, Lake, PublishedDay
from onetrans.process import add_json, print_json
from onetrans.progress import wait_for
from onetrans.settings import load_settings

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
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tell by the exit code, and in words, whether the day is published in each table that is asked about.

    Raises:
        NotReadyError: if it is not; the text names the first table without it, and the days that are there.
        BadConfigError: if it is not, and is not to be waited for.
    """
    ds = parse_day(arguments.ds)
    settings = load_settings()
    lake = Lake(settings.lake)
    absent = settings.source.absent_days
    wanted = dict.fromkeys(arguments.tables, ds)
    if arguments.or_absent:
        # Per table, as its builds go on: a lost day that came after all may be published in some alone.
        wanted = {table: present_day(ds, absent, [day.ds for day in _published(lake, table)]) for table in wanted}
    nothing_lost = arguments.or_first and all(
        day.ds > before for table, before in wanted.items() for day in _published(lake, table)
    )
    found: dict[str, PublishedDay] = {}

    def all_found() -> bool:
        """Look for what is not found yet; False: the log lost it, which is asked for as a good answer."""
        for table, before in wanted.items():
            if table in found:
                continue
            published = _published(lake, table)
            day = next((day for day in published if day.ds == before), None)
            if day is not None:
                found[table] = day
            elif nothing_lost:
                continue
            elif arguments.unless_absent and before in absent:
                return False
            elif before in absent:
                raise BadConfigError(
                    f"{table} {before} is not published, and source.absent_days says that the log lost this day"
                )
            else:
                days = describe_days([day.ds for day in published])
                raise NotReadyError(f"{table} {before} is not published; published are {days}")
        return True

    days = describe_days(list(wanted.values()))
    if not wait_for(all_found, arguments.wait, f"{', '.join(wanted)} of {days}"):
        print(f"nothing to do: source.absent_days says that the log lost {ds}")
    elif arguments.json:
        shown = [{"table": table, **vars(day)} for table, day in found.items()]
        print_json(shown if len(arguments.tables) > 1 else next((vars(day) for day in found.values()), None))
    else:
        if len(found) < len(wanted):
            print(f"{days}: no day up to this one is published, so the tables begin after it")
        for table, day in found.items():
            print(f"{table} {day.ds}: published, {day.rows:,} rows in {day.files} files")
    return EXIT_OK


def _published(lake: Lake, table: str) -> list[PublishedDay]:
    return lake.published(table) if lake.exists() else []  # a look makes no catalog
