"""The lake: staged Parquet, one atomic Apache Iceberg commit per table and day, reads by snapshot.

A day of a table lives through three states.  *Staged*: Spark wrote Parquet to a
folder of its own, and a manifest names it.  *Audited*: the audit left its
verdict beside those very files.  *Published*: one Iceberg transaction replaced
the day, ``delete(ds = D)`` and ``add_files(staged)`` together, so a reader sees
the old day or the new one and a failed step leaves what was published as it was.

Nothing here needs a JVM: PyIceberg commits, and Spark reads the plain Parquet
files that :meth:`Lake.files` names.
"""

from __future__ import annotations

import contextlib
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import CommitFailedException, NamespaceAlreadyExistsError, NoSuchTableError
from pyiceberg.table import Table
from pyiceberg.transforms import IdentityTransform

from onetrans import storage
from onetrans.days import describe_days, parse_day
from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.settings import LakeSettings

TABLES = (
    "impressions",
    "behaviors",
    "user_features",
    "item_features",
    "behavior_sequences",
    "training_requests",
)
"""Tables built every day, in the order one day is built."""

QUARANTINE = "quarantine"
"""Rows refused by a job, with the reason; partitioned by day and table, committed without an audit."""

_COMMIT_TRIES = 5


@dataclass(frozen=True)
class Staged:
    """The manifest of one staged day."""

    table: str
    """Table the files are meant for."""
    ds: date
    """Logical date of every row in them."""
    path: str
    """Folder of the Parquet files."""
    rows: int
    """Rows staged."""
    quarantined: int = 0
    """Rows refused while building them."""
    inputs: Mapping[str, int] = field(default_factory=dict)
    """Snapshot id of every published table that was read."""
    created_at: str = ""
    """When the manifest was written, UTC."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest file."""
        return {**asdict(self), "ds": self.ds.isoformat(), "inputs": dict(self.inputs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Staged:
        """Read what :meth:`to_dict` wrote."""
        return cls(**{**data, "ds": parse_day(data["ds"])})


@dataclass(frozen=True)
class PublishedDay:
    """One day of a table as readers see it."""

    table: str
    """Table name."""
    ds: date
    """Logical date."""
    rows: int
    """Rows of that day."""
    files: int
    """Parquet files of that day."""
    bytes: int
    """Size of those files."""


class Lake:
    """All access to tables: staging, publishing, listing, reading."""

    def __init__(self, settings: LakeSettings) -> None:
        self.settings = settings
        self.warehouse = storage.resolve(settings.warehouse)

    @cached_property
    def catalog(self) -> Catalog:
        """The Iceberg catalog; made, with its namespace, on first use."""
        uri = self.settings.catalog_uri
        if not uri:
            folder = storage.local_path(self.warehouse)
            folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{folder}/catalog.db"
        catalog = load_catalog("lake", type=self.settings.catalog_type, uri=uri, warehouse=self.warehouse)
        with contextlib.suppress(NamespaceAlreadyExistsError):
            catalog.create_namespace(self.settings.namespace)
        return catalog

    # Staging

    def new_stage_path(self, table: str, ds: date) -> str:
        """Return a folder that no earlier attempt has used, for Spark to write one day into."""
        return storage.join(self.warehouse, "data", _known(table), f"ds={ds}", uuid.uuid4().hex[:16])

    def mark_staged(self, staged: Staged) -> Staged:
        """Write the manifest that makes staged files visible to the audit; the last act of a build."""
        stamped = Staged(**{**staged.__dict__, "created_at": datetime.now(UTC).isoformat(timespec="seconds")})
        storage.write_json(self._manifest(staged.table, staged.ds), stamped.to_dict())
        return stamped

    def staged(self, table: str, ds: date) -> Staged:
        """Return the latest staged attempt of a day.

        Raises:
            NotReadyError: if the day was never staged.
        """
        path = self._manifest(table, ds)
        if not storage.exists(path):
            raise NotReadyError(f"{table} {ds} is not staged; run: python -m jobs.{table} --ds {ds}")
        return Staged.from_dict(storage.read_json(path))

    def _manifest(self, table: str, ds: date) -> str:
        return storage.join(self.warehouse, "staged", _known(table), f"{ds}.json")

    # The audit's verdict lies beside the files it speaks of, so that it can never be read for others.

    def write_verdict(self, staged: Staged, verdict: Mapping[str, Any]) -> None:
        """Keep the audit's verdict beside the audited files: ``passed``, and ``failure`` in words if it did not."""
        storage.write_json(storage.join(staged.path, "_audit.json"), verdict)

    def verdict(self, staged: Staged) -> dict[str, Any] | None:
        """Return the audit's verdict on exactly these files, or None if they were not audited."""
        path = storage.join(staged.path, "_audit.json")
        return storage.read_json(path) if storage.exists(path) else None

    # Publishing

    def publish(self, table: str, ds: date) -> int:
        """Replace one day of a table by its staged, audited files in one commit; return the snapshot id.

        Publishing the same files again changes nothing and returns the current snapshot.

        Raises:
            NotReadyError: if nothing is staged, or what is staged was not audited.
            BadDataError: if the audit failed.
        """
        staged = self.staged(table, ds)
        verdict = self.verdict(staged)
        if verdict is None:
            raise NotReadyError(
                f"{table} {ds}: the staged files were not audited; run: python -m expectations.audit {table} --ds {ds}"
            )
        if not verdict["passed"]:
            told = verdict.get("failure") or f"{table} {ds}: the audit failed"
            raise BadDataError(f"not published, readers keep what they had: {told}")
        files = storage.list_files(staged.path, ".parquet")
        return self.replace_partition(table, {"ds": ds}, files)

    def replace_partition(self, table: str, partition: Mapping[str, Any], files: list[str]) -> int:
        """Make ``files`` the whole content of one partition, in one commit; return the snapshot id.

        The commit is optimistic: when another writer was faster, the table is read again and the
        replacement repeated, so of two writers of one day the later one wins whole.

        Raises:
            BadDataError: if there are no files.
        """
        if not files:
            raise BadDataError(f"{table} {_text(partition)}: there are no files to publish")
        schema = _without_metadata(_read_schema(files[0]))
        where = " and ".join(_among(column, [value]) for column, value in partition.items())
        for attempt in range(1, _COMMIT_TRIES + 1):
            target = self._load_or_create(table, schema, tuple(partition))
            present = {task.file.file_path for task in target.scan(row_filter=where).plan_files()}
            if present == set(files):
                return _current_snapshot(target)
            try:
                with target.transaction() as transaction:
                    with transaction.update_schema() as update:
                        update.union_by_name(schema)
                    if present:
                        transaction.delete(where)
                    transaction.add_files(files)
                return _current_snapshot(self.table(table))
            except CommitFailedException:
                if attempt == _COMMIT_TRIES:
                    raise
        raise AssertionError("unreachable")

    def clear_partition(self, table: str, partition: Mapping[str, Any]) -> None:
        """Remove one partition in one commit; nothing happens if it holds nothing."""
        where = " and ".join(_among(column, [value]) for column, value in partition.items())
        for attempt in range(1, _COMMIT_TRIES + 1):
            try:
                target = self.table(table)
            except NoSuchTableError:
                return
            if not list(target.scan(row_filter=where).plan_files()):
                return
            try:
                target.delete(where)
                return
            except CommitFailedException:
                if attempt == _COMMIT_TRIES:
                    raise

    def _load_or_create(self, table: str, schema: pa.Schema, partition: tuple[str, ...]) -> Table:
        try:
            return self.table(table)
        except NoSuchTableError:
            pass
        with self.catalog.create_table_transaction(self._name(table), schema=schema) as transaction:
            with transaction.update_spec() as update:
                for column in partition:
                    update.add_field(column, IdentityTransform(), column)
        return self.table(table)

    # Reading

    def _name(self, table: str) -> tuple[str, str]:
        return (self.settings.namespace, _known(table))

    def table(self, table: str) -> Table:
        """Return the Iceberg table.

        Raises:
            NoSuchTableError: if nothing was ever published to it.
        """
        return self.catalog.load_table(self._name(table))

    def snapshot_id(self, table: str) -> int | None:
        """Return the id of the table's current snapshot, or None if nothing was ever published."""
        try:
            snapshot = self.table(table).current_snapshot()
        except NoSuchTableError:
            return None
        return snapshot.snapshot_id if snapshot else None

    def published(self, table: str, snapshot_id: int | None = None) -> list[PublishedDay]:
        """Return the published days of a table in order, as of a snapshot (default: now)."""
        try:
            scan = self.table(table).scan(snapshot_id=snapshot_id)
        except NoSuchTableError:
            return []
        days: dict[date, list[int]] = {}
        for file in (task.file for task in scan.plan_files()):
            ds = _partition_day(file.partition[0])
            totals = days.setdefault(ds, [0, 0, 0])
            totals[0] += file.record_count
            totals[1] += 1
            totals[2] += file.file_size_in_bytes
        return [PublishedDay(table, ds, *totals) for ds, totals in sorted(days.items())]

    def days(self, table: str, snapshot_id: int | None = None) -> list[date]:
        """Return the published days of a table, oldest first."""
        return [day.ds for day in self.published(table, snapshot_id)]

    def files(self, table: str, days: Iterable[date], snapshot_id: int | None = None) -> list[str]:
        """Return the Parquet files of some published days, in day order then path order.

        Raises:
            NotReadyError: if one of the days is not published; the text names every missing day.
        """
        wanted = sorted(set(days))
        if not wanted:
            return []
        try:
            target = self.table(table)
        except NoSuchTableError as error:
            raise NotReadyError(f"table {table} has no published day; needed: {describe_days(wanted)}") from error
        where = _among("ds", wanted)
        found = sorted(
            (_partition_day(task.file.partition[0]), task.file.file_path)
            for task in target.scan(row_filter=where, snapshot_id=snapshot_id).plan_files()
        )
        missing = sorted(set(wanted) - {day for day, _ in found})
        if missing:
            raise NotReadyError(
                f"table {table} has no published {describe_days(missing)}; "
                f"published are {describe_days(self.days(table, snapshot_id))}"
            )
        return [path for _, path in found]

    def read(
        self,
        table: str,
        days: Iterable[date] | None = None,
        columns: tuple[str, ...] = ("*",),
        snapshot_id: int | None = None,
    ) -> pa.Table:
        """Read some days (default: all) of a table into memory; for small reads, tests and reports."""
        where = "true" if days is None else _among("ds", list(days))
        return self.table(table).scan(row_filter=where, selected_fields=columns, snapshot_id=snapshot_id).to_arrow()


def _known(table: str) -> str:
    if table not in (*TABLES, QUARANTINE):
        raise BadConfigError(f"there is no table {table!r}; tables are {', '.join((*TABLES, QUARANTINE))}")
    return table


def _read_schema(file: str) -> pa.Schema:
    filesystem, inner = storage.open_filesystem(file)
    return pq.read_schema(inner, filesystem=filesystem)


def _without_metadata(schema: pa.Schema) -> pa.Schema:
    """Drop Spark's own notes and every NOT NULL: Spark infers it per query, and a table's schema must not flicker."""
    return pa.schema([_optional(column) for column in schema])


def _optional(column: pa.Field) -> pa.Field:
    kind = column.type
    if pa.types.is_list(kind):
        kind = pa.list_(_optional(kind.value_field))
    elif pa.types.is_struct(kind):
        kind = pa.struct([_optional(kind.field(i)) for i in range(kind.num_fields)])
    return pa.field(column.name, kind)


def _partition_day(value: Any) -> date:
    if isinstance(value, date):
        return value
    return date.fromordinal(date(1970, 1, 1).toordinal() + int(value))


def _among(column: str, values: Sequence[date | str]) -> str:
    """Return the row filter ``column IN (values)``; values are days or names of the project's own tables."""
    texts = [value.isoformat() if isinstance(value, date) else value for value in values]
    if any("'" in text for text in texts):
        raise BadConfigError(f"{column}: a quote is not allowed in {texts}")
    return f"{column} in ({', '.join(repr(text) for text in texts)})"


def _text(partition: Mapping[str, Any]) -> str:
    return ", ".join(f"{column} = {value}" for column, value in partition.items())


def _current_snapshot(table: Table) -> int:
    snapshot = table.current_snapshot()
    if snapshot is None:
        raise BadDataError(f"table {table.name()} has no snapshot after a commit")
    return snapshot.snapshot_id


warnings.filterwarnings("ignore", message="Delete operation did not match any records")
