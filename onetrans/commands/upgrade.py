"""``onetrans upgrade``: bring databases and tables to what this code expects, after copies of them."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from onetrans.errors import EXIT_OK, BadConfigError
from onetrans.process import add_json, print_json
from onetrans.schema import load_schema
from onetrans.schema_change import REFUSED, Change, planned_schema, schema_changes
from onetrans.settings import Settings, load_settings
from onetrans.upgrade import parts, upgrade

EXAMPLES = """examples:
  onetrans upgrade --dry-run                         what is older, and what a changed feature schema needs
  onetrans upgrade --backup /backups/2026-01-10      copies first, then the migrations

Stop what writes (Airflow, MLflow's server) before, and start it again after. There is no way back but the copies."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--backup", default="", metavar="DIR", help="new folder for copies of what will change")
    parser.add_argument("--dry-run", action="store_true", help="change nothing, only tell")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Upgrade, and say what was done and what is left to do.

    Raises:
        BadConfigError: if something is newer than this code, the feature schema cannot be changed like that, or a
            folder for copies is needed.
    """
    settings = load_settings()
    changes = _schema_changes(settings)
    refused = [change for change in changes if change.kind == REFUSED]
    if refused and not arguments.dry_run:
        raise BadConfigError(f"the feature schema cannot be changed like that: {'; '.join(map(str, refused))}")
    found = parts(settings) if arguments.dry_run else upgrade(settings, arguments.backup)
    if arguments.json:
        print_json({"parts": [asdict(p) for p in found], "schema": [asdict(c) for c in changes]})
        return EXIT_OK
    for part in found:
        what = {"older": "older", "absent": "not there", "newer": "NEWER", "current": "current"}[part.state]
        state = what if arguments.dry_run else "upgraded"
        print(f"{part.name:<28} {state:<10} {part.found or '-'} -> {part.wanted}  {part.database}")
    for change in changes:
        print(f"feature schema: {change}")
    if not found:
        print("nothing to upgrade")
    return EXIT_OK


def _schema_changes(settings: Settings) -> list[Change]:
    before = planned_schema(settings.training.runs)
    return schema_changes(before, load_schema(settings.source)) if before is not None else []
