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
from collections.abc import Collection, Iterator, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.exceptions import NoSuchTableError

from onetrans import storage
from onetrans.days import parse_day
from onetrans.errors import EXIT_OK, BadConfigError, BadDataError, NotReadyError
from onetrans.lake import QUARANTINE, Lake, Repair
from onetrans.process import add_json, print_json
from onetrans.settings import load_settings

TABLES = ("impressions", "behaviors", "user_features", "item_features")
"""Tables whose job refuses rows."""

_ROWS_AT_ONCE = 10_000

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
    add_json(replay)


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
        told = _replay(lake, arguments.table, parse_day(arguments.ds), arguments.rows)
        print_json(told) if arguments.json else print(_replayed(told))
    return EXIT_OK


def refused_rows(
    lake: Lake, columns: Sequence[str], table: str | None = None, ds: date | None = None, reason: str = ""
) -> Iterator[pa.RecordBatch]:
    """Yield some columns of the refused rows, a part at a time; of all tables, days and reasons or of one.

    Only the files of the table, one of ``TABLES``, and day are opened.  One that was written before files were kept
    has no ``file``.
    """
    try:
        kept = lake.table(QUARANTINE)
    except NoSuchTableError:
        return
    among = [f"ds = '{ds}'"] * (ds is not None) + [f"table_name = '{table}'"] * (table is not None)
    scan = kept.scan(row_filter=" and ".join(among) or "true")
    for path in sorted(task.file.file_path for task in scan.plan_files()):
        filesystem, inner = storage.open_filesystem(path)
        with filesystem.open_input_file(inner) as opened:
            file = pq.ParquetFile(opened)
            there = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=there):
                yield batch.filter(pc.match_substring(batch["reason"], reason)) if reason else batch


def _list(lake: Lake, arguments: argparse.Namespace) -> None:
    ds = parse_day(arguments.ds) if arguments.ds else None
    keys = ("ds", "table_name", "reason")
    counts: Counter[tuple[str, ...]] = Counter()
    for batch in refused_rows(lake, keys, arguments.table, ds):
        for found in pa.table(batch).group_by(list(keys)).aggregate([([], "count_all")]).to_pylist():
            counts[tuple(str(found[key]) for key in keys)] += found["count_all"]
    listed = [{"ds": day, "table": t, "rows": n, "reason": reason} for (day, t, reason), n in sorted(counts.items())]
    if arguments.json:
        print_json(listed)
    elif not listed:
        print("no row is refused")
    for entry in listed if not arguments.json else ():
        print(f"{entry['ds']}  {entry['table']:<14} {entry['rows']:>9,}  {entry['reason']}")


def _show(lake: Lake, arguments: argparse.Namespace) -> None:
    ds = parse_day(arguments.ds)
    chosen = (arguments.table, ds, arguments.reason)
    count = _count(lake, *chosen)
    if not count:
        print(f"{arguments.table} {ds}: no such row is refused")
        return
    rows = (row for batch in refused_rows(lake, ["reason", "raw", "file"], *chosen) for row in batch.to_pylist())
    if arguments.out:
        with arguments.out.open("w", encoding="utf-8") as out:
            for row in rows:
                raw = row["raw"]
                line = {"reason": row["reason"], "file": row.get("file"), "refused": raw, "row": _parsed(raw)}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f'{arguments.table} {ds}: {count:,} rows written to {arguments.out}; correct what stands under "row"')
        return
    for row in islice(rows, arguments.limit):
        print(f"{row['reason']}\n  file {row.get('file') or 'not known'}\n  {row['raw']}")
    if count > arguments.limit:
        print(f"... and {count - arguments.limit:,} more (--limit, or --out FILE for all)")


def _count(lake: Lake, table: str, ds: date, reason: str = "") -> int:
    return sum(batch.num_rows for batch in refused_rows(lake, ["reason"], table, ds, reason))


def _refused_of(lake: Lake, table: str, ds: date, path: Path) -> set[str]:
    """Return the refused rows, as text, that a file of repairs names and that are refused now."""
    named = {line["refused"] for _, line in _lines(path) if isinstance(line, dict) and "refused" in line}
    texts = pa.array(sorted(text for text in named if isinstance(text, str)), pa.string())
    found: set[str] = set()
    for batch in refused_rows(lake, ["raw"], table, ds):
        found.update(batch["raw"].filter(pc.is_in(batch["raw"], value_set=texts)).to_pylist())
    return found


def read_repairs(path: Path, refused: Collection[str], where: str) -> list[Repair]:
    """Return the repairs a file holds: its lines whose row is not the refused one any more.

    ``refused`` are the rows, as text, that are refused now.

    Raises:
        BadConfigError: if the file or a line is none, names a row that is not refused, or nothing was changed.
    """
    repairs = []
    for number, line in _lines(path):
        if not isinstance(line, dict) or not {"refused", "row"} <= set(line):
            raise BadConfigError(f"{path}, line {number}: not a line that `onetrans quarantine show --out` wrote")
        if line["refused"] not in refused:
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


def _replay(lake: Lake, table: str, ds: date, path: Path) -> dict[str, Any]:
    """Build a day again with the repairs of a file and publish it; return how many rows that concerned."""
    where = f"{table} {ds}"
    repairs = read_repairs(path, _refused_of(lake, table, ds, path), where)
    before = _count(lake, table, ds)
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
    dropped = sum(repair.repaired is None for repair in repairs)
    return {
        "table": table,
        "ds": ds,
        "repaired": len(repairs) - dropped,
        "left_out": dropped,
        "refused_before": before,
        "refused": _count(lake, table, ds),
    }


def _replayed(told: dict[str, Any]) -> str:
    return (
        f"{told['table']} {told['ds']}: published with {told['repaired']:,} repaired rows, "
        f"{told['left_out']:,} left out; {told['refused']:,} of {told['refused_before']:,} are still refused\n"
        f"a run of {told['ds']} in Airflow that stopped at {told['table']}.build stays failed until that is cleared"
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
