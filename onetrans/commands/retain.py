"""``onetrans retain``: remove replaced versions, orphaned files and old checkpoints; keep what may still be read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from onetrans.errors import EXIT_OK
from onetrans.process import add_json, print_json
from onetrans.progress import long_steps
from onetrans.retention import Removal, retain
from onetrans.settings import load_settings

EXAMPLES = """examples:
  onetrans retain --dry-run      what would be removed, and nothing else
  onetrans retain

What is published, what the champion, the one before it and the challenger were trained on, and what a run is reading
stays, however old it is; section [retention] of the settings says how old the rest may get."""

_NOUNS = {
    "snapshot": "expired snapshots",
    "data": "folders of data files",
    "metadata": "files of metadata",
    "checkpoint": "checkpoints",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--dry-run", action="store_true", help="remove nothing, only list it")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Remove what may go, and say what it was.

    Raises:
        BadConfigError: if it cannot be told what must stay; then nothing is removed.
    """
    with long_steps(None, "looking for what may go" if arguments.dry_run else "removing what may go"):
        removed = retain(load_settings(), datetime.now(UTC), dry_run=arguments.dry_run)
    if arguments.json:
        print_json([asdict(removal) for removal in removed])
        return EXIT_OK
    if arguments.dry_run:
        for removal in removed:
            print(f"{removal.kind:<10}  {removal.table:<19}  {removal.what}  ({removal.why})")
    print(told(removed, dry_run=arguments.dry_run))
    return EXIT_OK


def told(removed: Sequence[Removal], *, dry_run: bool) -> str:
    """Say in one line what was, or would be, removed."""
    counts = {noun: sum(removal.kind == kind for removal in removed) for kind, noun in _NOUNS.items()}
    parts = [f"{count:,} {noun}" for noun, count in counts.items() if count]
    freed = sum(removal.bytes for removal in removed) / 1e6
    if not parts:
        return "nothing to remove"
    return f"{'would remove' if dry_run else 'removed'} {', '.join(parts)}: {freed:,.1f} MB"
