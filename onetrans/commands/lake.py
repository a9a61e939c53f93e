"""``onetrans lake``: what is published, table by table and day by day, and whether its labels can still change."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

from onetrans.days import describe_days
from onetrans.errors import EXIT_OK, BadConfigError, NotReadyError
from onetrans.lake import QUARANTINE, SCORES, TABLES, Lake
from onetrans.lineage import describe_stale, stale_days
from onetrans.outdated import LABELLED, described, label_states, not_final
from onetrans.process import add_json, print_json
from onetrans.schema import FeatureSchema, load_schema
from onetrans.settings import Settings, config_file, load_settings

logger = logging.getLogger(__name__)

EXAMPLES = """examples:
  onetrans lake                          every table, its days, rows and newest snapshot
  onetrans lake impressions              the days of one table
  onetrans lake impressions --snapshots  its commits, newest first
  onetrans lake --json

A day is final once it was built after the attribution window of its conversions had closed (attribution_hours of the
schema file).  `python -m jobs.rebuild` builds again the days that were built before."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("table", nargs="?", choices=(*TABLES, SCORES, QUARANTINE), help="show the days of this table")
    parser.add_argument("--snapshots", action="store_true", help="show the table's commits instead of its days")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the lake, or one table of it.

    Raises:
        BadConfigError: if ``--snapshots`` is asked for without a table.
        NotReadyError: if there is no lake; none is made.
    """
    settings = load_settings()
    lake = Lake(settings.lake)
    if not lake.exists():
        file = config_file()
        raise NotReadyError(
            f"there is no lake in {lake.warehouse}. Its place is the setting lake.warehouse; "
            f"{f'the configuration file is {file.resolve()}' if file else 'no configuration file was found here'}, and "
            "`onetrans config` shows what is in force"
        )
    if arguments.snapshots:
        if arguments.table is None:
            raise BadConfigError("--snapshots needs a table, for example: onetrans lake impressions --snapshots")
        listed = _snapshots(lake, arguments.table)
    elif arguments.table is not None:
        listed = _days(lake, arguments.table, settings)
    else:
        schema = _schema_if_any(settings)
        listed = [_overview(lake, table, schema) for table in (*TABLES, SCORES, QUARANTINE)]
    if arguments.json:
        print_json(listed)
    elif listed:
        print(_aligned(listed))
        stale = describe_stale(stale_days(lake, after=date.min)) if arguments.table is None else ""
        if stale:
            print(f"\nThere are {stale}")
    else:
        print(f"{arguments.table}: nothing is published in {lake.warehouse}")
    return EXIT_OK


def _days(lake: Lake, table: str, settings: Settings) -> list[dict[str, Any]]:
    days = [vars(day) for day in lake.published(table)]
    schema = _schema_if_any(settings) if table in LABELLED else None
    if schema is not None:
        told = described(label_states(lake, schema, table, datetime.now(UTC)), schema)
        days = [{**day, "labels": told.get(day["ds"])} for day in days]
    return days


def _schema_if_any(settings: Settings) -> FeatureSchema | None:
    """Return the schema of the log, which says when labels are complete; None, and a word on it, if there is none."""
    try:
        return load_schema(settings.source)
    except BadConfigError as error:
        logger.info("which days are final is not shown: %s", error)
        return None


def _overview(lake: Lake, table: str, schema: FeatureSchema | None) -> dict[str, Any]:
    days = lake.published(table)
    waiting = None
    if schema is not None and table in LABELLED:
        waiting = describe_days(list(not_final(label_states(lake, schema, table, datetime.now(UTC)))))
    return {
        "table": table,
        "days": describe_days([day.ds for day in days]),
        "count": len(days),
        "rows": sum(day.rows for day in days),
        "files": sum(day.files for day in days),
        "bytes": sum(day.bytes for day in days),
        "not final": waiting,
        "snapshot": lake.snapshot_id(table),
    }


def _snapshots(lake: Lake, table: str) -> list[dict[str, Any]]:
    if lake.snapshot_id(table) is None:
        return []
    listed = []
    for snapshot in reversed(lake.table(table).snapshots()):
        summary = snapshot.summary
        listed.append(
            {
                "snapshot": snapshot.snapshot_id,
                "committed": datetime.fromtimestamp(snapshot.timestamp_ms / 1000)
                .astimezone()
                .isoformat("T", "seconds"),
                "operation": summary.operation.value if summary else "",
                "rows": int(summary["total-records"] or 0) if summary else 0,
                "added": int(summary["added-records"] or 0) if summary else 0,
                "deleted": int(summary["deleted-records"] or 0) if summary else 0,
            }
        )
    return listed


def _aligned(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as columns of text; numbers to the right, sizes in megabytes, ids as they are."""
    header = ["MB" if name == "bytes" else name for name in rows[0]]
    cells = [[_cell(name, value) for name, value in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [isinstance(value, int) and name != "snapshot" for name, value in rows[0].items()]
    lines = (
        "  ".join(
            text.rjust(w) if to_right else text.ljust(w) for text, w, to_right in zip(line, widths, right, strict=True)
        )
        for line in (header, *cells)
    )
    return "\n".join(line.rstrip() for line in lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "bytes":
        return f"{value / 1e6:,.1f}"
    return f"{value:,}" if isinstance(value, int) and name != "snapshot" else str(value)
