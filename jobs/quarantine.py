"""``onetrans quarantine``: list and show refused rows, and replay those that a person has repaired.

A refused row is kept with table, day, reason, file and all its columns.  Where the
log itself is corrected, the day is just built again.  Where it cannot be, the
repaired rows are handed in here: they are kept in the lake, beside the refused
text they stand for, and every later build of the day takes them in its place.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyiceberg.exceptions import NoSuchTableError

from onetrans.days import parse_day
from onetrans.errors import EXIT_OK, BadConfigError, BadDataError, NotReadyError
from onetrans.lake import QUARANTINE, Lake, Repair
from onetrans.process import add_json, print_json
from onetrans.settings import load_settings

TABLES = ("impressions", "behaviors", "user_features", "item_features")
"""Tables whose job refuses rows."""

EXAMPLES = """examples:
  onetrans quarantine list
  onetrans quarantine show impressions --ds 2026-01-05
  onetrans quarantine show impressions --ds 2026-01-05 --out refused.jsonl
  (edit "row" in refused.jsonl: correct it, or make it null to leave the row out; lines may be deleted)
  onetrans quarantine replay impressions --ds 2026-01-05 --rows refused.jsonl"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="refused rows per day, table and reason")
    listing.add_argument("--table", choices=TABLES, help="of this table alone")
    listing.add_argument("--ds", metavar="DAY", help="of this day alone, YYYY-MM-DD")
    add_json(listing)
    show = actions.add_parser("show", help="the refused rows of one table and day")
    replay = actions.add_parser("replay", help="build the day again with repaired rows, audit and publish it")
    for action in (show, replay):
        action.add_argument("table", choices=TABLES, help="table that refused the rows")
        action.add_argument("--ds", required=True, metavar="DAY", help="day, YYYY-MM-DD")
    show.add_argument("--reason", default="", metavar="TEXT", help="rows whose reason contains this")
    show.add_argument("--limit", type=int, default=20, metavar="N", help="print at most N rows (default: %(default)s)")
    show.add_argument("--out", type=Path, metavar="FILE", help="write all of them to FILE, to be repaired there")
    replay.add_argument("--rows", type=Path, required=True, metavar="FILE", help="what `show --out` wrote, repaired")


def run(arguments: argparse.Namespace) -> int:
    """Do one action."""
    lake = Lake(load_settings().lake)
    if not lake.exists():
        raise NotReadyError(f"there is no lake in {lake.warehouse}")
    if arguments.action == "list":
        _list(lake, arguments)
    elif arguments.action == "show":
        _show(lake, arguments)
    else:
        _replay(lake, arguments.table, parse_day(arguments.ds), arguments.rows)
    return EXIT_OK


def refused_rows(lake: Lake, table: str | None = None, ds: date | None = None) -> list[dict[str, Any]]:
    """Return the rows of the quarantine, of all tables and days or of one."""
    days = None if ds is None else [ds]
    try:
        rows: pa.Table = lake.read(QUARANTINE, days)
    except NoSuchTableError:
        return []
    found = [row for row in rows.to_pylist() if table in (None, row["table_name"])]
    # A quarantine that was written before files were kept has no such column.
    return sorted(({"file": None, **row} for row in found), key=lambda row: (row["ds"], row["table_name"], row["raw"]))


def _list(lake: Lake, arguments: argparse.Namespace) -> None:
    ds = parse_day(arguments.ds) if arguments.ds else None
    rows = refused_rows(lake, arguments.table, ds)
    counts = Counter((str(row["ds"]), row["table_name"], row["reason"]) for row in rows)
    listed = [{"ds": ds, "table": t, "rows": n, "reason": reason} for (ds, t, reason), n in sorted(counts.items())]
    if arguments.json:
        print_json(listed)
    elif not listed:
        print("no row is refused")
    for entry in listed if not arguments.json else ():
        print(f"{entry['ds']}  {entry['table']:<14} {entry['rows']:>9,}  {entry['reason']}")


def _show(lake: Lake, arguments: argparse.Namespace) -> None:
    ds = parse_day(arguments.ds)
    rows = [row for row in refused_rows(lake, arguments.table, ds) if arguments.reason in row["reason"]]
    if not rows:
        print(f"{arguments.table} {ds}: no such row is refused")
        return
    if arguments.out:
        with arguments.out.open("w", encoding="utf-8") as file:
            for row in rows:
                line = {"reason": row["reason"], "file": row["file"], "refused": row["raw"], "row": _parsed(row["raw"])}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f'{arguments.table} {ds}: {len(rows):,} rows written to {arguments.out}; correct what stands under "row"')
        return
    for row in rows[: arguments.limit]:
        print(f"{row['reason']}\n  file {row['file'] or 'not known'}\n  {row['raw']}")
    if len(rows) > arguments.limit:
        print(f"... and {len(rows) - arguments.limit:,} more (--limit, or --out FILE for all)")


def read_repairs(path: Path, refused: list[dict[str, Any]], where: str) -> list[Repair]:
    """Return the repairs a file holds: its lines whose row is not the refused one any more.

    Raises:
        BadConfigError: if the file or a line is none, names a row that is not refused, or nothing was changed.
    """
    known = {row["raw"] for row in refused}
    repairs = []
    for number, line in _lines(path):
        if not isinstance(line, dict) or not {"refused", "row"} <= set(line):
            raise BadConfigError(f"{path}, line {number}: not a line that `onetrans quarantine show --out` wrote")
        if line["refused"] not in known:
            raise BadConfigError(
                f"{path}, line {number}: {where} has not refused this row, or no longer: {line['refused'][:300]}"
            )
        row = line["row"]
        if row is not None and not isinstance(row, dict):
            raise BadConfigError(f"{path}, line {number}: row is {type(row).__name__}; expected an object, or null")
        if row != _parsed(line["refused"]):
            text = None if row is None else json.dumps(row, ensure_ascii=False, separators=(",", ":"))
            repairs.append(Repair(line["refused"], text))
    if not repairs:
        raise BadConfigError(f"{path}: no row differs from the refused one, so there is nothing to replay")
    return repairs


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfigError(f"--rows {path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise BadConfigError(f"{path}, line {number} is not JSON: {error}") from error


def _replay(lake: Lake, table: str, ds: date, path: Path) -> None:
    where = f"{table} {ds}"
    refused = refused_rows(lake, table, ds)
    repairs = read_repairs(path, refused, where)
    # Spark takes seconds to import and start: a wrong file should not cost them.
    import importlib

    from jobs.runner import Opened, audit_and_publish, build_day, tell_stale, telling
    from jobs.workspace import INPUTS

    with Opened() as work:
        with telling(where):
            if work.whole(INPUTS[table], ds) is None or (table == "behaviors" and work.schema.derived_behaviors):
                raise BadConfigError(
                    f"{where}: rows of this source are made, not read, so one alone cannot be replaced; correct the "
                    f"log and build the day again: python -m jobs.{table} --ds {ds} --publish"
                )
        lake.add_repairs(INPUTS[table], ds, repairs)
        build_day(work, table, importlib.import_module(f"jobs.{table}").build, ds)
        audit_and_publish(work, table, ds)
        tell_stale(work, date.min)
    left = len(refused_rows(lake, table, ds))
    dropped = sum(repair.repaired is None for repair in repairs)
    print(
        f"{where}: published with {len(repairs) - dropped:,} repaired rows, {dropped:,} left out; {left:,} of "
        f"{len(refused):,} are still refused"
    )


def _parsed(raw: str) -> Any:
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise BadDataError(f"a row of the quarantine is not JSON ({error}): {raw[:300]}") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command as ``python -m jobs.quarantine``."""
    from onetrans.cli import main as cli

    return cli(["quarantine", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
