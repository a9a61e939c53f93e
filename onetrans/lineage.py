"""What rests on what: published days that were built before a day they read was replaced.

Every staged day records the days of the tables it was built from and the
snapshot in which it read them (:attr:`onetrans.lake.Staged.reads`,
``.inputs``).  The catalog knows which commit put a day's files where they are.
A published day is *stale* if a day it reads was put there by a later commit
than the snapshot it read, or is stale itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date

from pyiceberg.exceptions import NoSuchTableError

from onetrans.days import describe_days
from onetrans.lake import TABLES, Lake, Staged, partition_day


@dataclass
class _Commits:
    """The commits of one table; a sequence number counts them."""

    of_snapshot: dict[int, int] = field(default_factory=dict)
    """Snapshot id -> its sequence number."""
    of_day: dict[date, int] = field(default_factory=dict)
    """Published day -> sequence number of the commit that put its files there."""
    folder: dict[date, str] = field(default_factory=dict)
    """Published day -> folder of its files."""


def stale_days(lake: Lake, after: date, outdated: Iterable[tuple[date, str]] = ()) -> dict[str, list[date]]:
    """Return, by table, the published days after a day that are stale, oldest first; tables without any are left out.

    ``outdated`` are days of tables that are to be built again for a reason of their own: they are left out, and what
    reads them is stale.  Nothing is known of a day that was published before builds recorded what they read: such a
    day is not named.
    """
    if not any(ds > after for ds in lake.staged_days()):
        return {}
    commits = {table: _commits(lake, table) for table in TABLES}
    doubtful: dict[str, list[date]] = {}
    for ds, table in outdated:
        doubtful.setdefault(table, []).append(ds)
    stale: dict[str, list[date]] = {}
    # In the order of building, so that a day is looked at after those it may read.
    for ds in sorted({ds for table in TABLES for ds in commits[table].of_day if ds > after}):
        for table in TABLES:
            if ds in commits[table].of_day:
                built = lake.built(commits[table].folder[ds])
                if ds not in doubtful.get(table, []) and built is not None and _is_stale(built, commits, doubtful):
                    stale.setdefault(table, []).append(ds)
                    doubtful.setdefault(table, []).append(ds)
    return stale


def in_order(stale: Mapping[str, Iterable[date]]) -> list[tuple[date, str]]:
    """Return days of tables in the order in which they can be built: day by day, within a day table by table."""
    return sorted(
        ((ds, table) for table, days in stale.items() for ds in days),
        key=lambda entry: (entry[0], TABLES.index(entry[1])),
    )


def describe_stale(stale: Mapping[str, list[date]]) -> str:
    """Say which days are stale and what builds them again; empty text if none is."""
    if not stale:
        return ""
    told = ", ".join(f"{table} {describe_days(days)}" for table, days in stale.items())
    return (
        f"days that were built on an earlier version of what they read: {told}. To build them again: "
        "python -m jobs.rebuild (with --dry-run it only names them)"
    )


def _commits(lake: Lake, table: str) -> _Commits:
    found = _Commits()
    try:
        target = lake.table(table)
    except NoSuchTableError:
        return found
    found.of_snapshot = {s.snapshot_id: s.sequence_number or 0 for s in target.snapshots()}
    current = target.current_snapshot()
    for manifest in current.manifests(target.io) if current else []:
        for entry in manifest.fetch_manifest_entry(target.io, discard_deleted=True):
            ds = partition_day(entry.data_file.partition[0])
            found.of_day[ds] = max(found.of_day.get(ds, 0), entry.sequence_number or 0)
            found.folder[ds] = entry.data_file.file_path.rsplit("/", 1)[0]
    return found


def _is_stale(built: Staged, commits: Mapping[str, _Commits], doubtful: Mapping[str, list[date]]) -> bool:
    for table, (first, last) in built.reads.items():
        if any(first <= ds <= last for ds in doubtful.get(table, [])):
            return True
        # A table without a snapshot was empty then, so whatever it has now is later.
        read: int | None = 0
        if table in built.inputs:
            # The snapshot may have expired since; its number was written down.
            read = built.sequence.get(table) or commits[table].of_snapshot.get(built.inputs[table])
        if read is not None and any(first <= ds <= last and n > read for ds, n in commits[table].of_day.items()):
            return True
    return False
