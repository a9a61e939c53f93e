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
import logging
import random
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    ResolveError,
    TableAlreadyExistsError,
    ValidationError,
)
from pyiceberg.table import DataScan, Table
from pyiceberg.transforms import IdentityTransform
from sqlalchemy import URL
from sqlalchemy.exc import IntegrityError, OperationalError

from onetrans import storage
from onetrans.days import describe_days, parse_day
from onetrans.errors import BadConfigError, BadDataError, CatalogAwayError, NotReadyError, without_login
from onetrans.settings import LakeSettings

logger = logging.getLogger(__name__)

TABLES = (
    "impressions",
    "behaviors",
    "user_features",
    "item_features",
    "behavior_sequences",
    "training_requests",
)
"""Tables built every day, in the order one day is built."""

SCORES = "candidate_scores"
"""Scores of each user's candidates by the champion; built by the day of the model, where it is asked for."""

QUARANTINE = "quarantine"
"""Rows refused by a job, with the reason; partitioned by day and table, committed without an audit."""

CATALOG_FILE = "catalog.db"
"""SQLite catalog in the warehouse, where the settings name no other."""
LOCAL_CATALOG = "var"
"""Folder of that file where the warehouse is in an object store, which holds no database: for one machine alone."""
AUDIT_FILE = "_audit.json"
"""The audit's verdict, beside the staged files it is about."""

_BUILT = "_staged.json"
_COMMIT_TRIES = 20
_COMMIT_WAIT_SECONDS = 0.2
_READERS = 16
_FILES_IN_A_STORE = "onetrans.iceberg_files.StoreFiles"

CATALOG = "lake"
"""The catalog's name; a SQL catalog keeps it beside every table, and shows none to who asks by another."""

LAYOUT = 1
"""Version of what a table looks like beyond its columns: partitions and properties; ``onetrans upgrade`` raises it."""
LAYOUT_PROPERTY = "onetrans.layout"

TABLE_PROPERTIES = {
    LAYOUT_PROPERTY: str(LAYOUT),
    # A retry of PyIceberg's own repeats the append on top of what another writer committed meanwhile, without the
    # delete: both writers' rows of one day would stay.  Here the whole replacement is decided anew.
    "commit.retry.num-retries": "0",
}


_Result = TypeVar("_Result")


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
    reads: Mapping[str, tuple[date, date]] = field(default_factory=dict)
    """First and last day of every published table that the rows rest on, whether or not each day was there."""
    sequence: Mapping[str, int] = field(default_factory=dict)
    """Sequence number of every snapshot in ``inputs``: it counts a table's commits, and outlives the snapshot."""
    raw: str = ""
    """Stamp of the raw files of the day (``jobs.sources.Source.stamp``); empty: the table reads none of its own."""
    raw_also: Mapping[str, str] = field(default_factory=dict)
    """Stamp of every other raw input that was read (items, history); empty where it has no files of the day."""
    created_at: str = ""
    """When the manifest was written, UTC."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest file."""
        reads = {table: [str(first), str(last)] for table, (first, last) in self.reads.items()}
        return {
            **asdict(self),
            "ds": self.ds.isoformat(),
            "inputs": dict(self.inputs),
            "reads": reads,
            "sequence": dict(self.sequence),
            "raw_also": dict(self.raw_also),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Staged:
        """Read what :meth:`to_dict` wrote."""
        reads = {table: (parse_day(first), parse_day(last)) for table, (first, last) in data.get("reads", {}).items()}
        return cls(**{**data, "ds": parse_day(data["ds"]), "reads": reads})


@dataclass(frozen=True)
class Repair:
    """What a person did about one refused row."""

    refused: str
    """The row as it came, as JSON of all its columns."""
    repaired: str | None
    """The row in its place, likewise; None: it is left out."""

    def to_dict(self) -> dict[str, str | None]:
        """Return plain data for the file of repairs."""
        return {"refused": self.refused, "repaired": self.repaired}


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
        self.warehouse = storage.resolve(storage.refuse_special("lake.warehouse", settings.warehouse))

    def exists(self) -> bool:
        """Tell whether there is a lake; only a SQLite catalog of its own can be missing.  Nothing is made."""
        if self.settings.catalog_uri:
            return True
        return self.catalog_file.is_file()

    @property
    def catalog_file(self) -> Path:
        """The SQLite catalog that is used where the settings name no other."""
        folder = storage.local_path(self.warehouse if storage.is_local(self.warehouse) else LOCAL_CATALOG)
        return folder.absolute() / CATALOG_FILE

    @property
    def catalog_address(self) -> str:
        """Address of the catalog: that of the settings, else of a SQLite file, whose writers wait for one another."""
        if self.settings.catalog_uri:
            return self.settings.catalog_uri
        return URL.create("sqlite", database=str(self.catalog_file), query={"timeout": "60"}).render_as_string()

    @property
    def catalog_shown(self) -> str:
        """Where the catalog is, for a person: without a login."""
        return without_login(self.settings.catalog_uri) or str(self.catalog_file)

    @property
    def catalog_properties(self) -> dict[str, str]:
        """What PyIceberg is told of the catalog."""
        told = {"type": self.settings.catalog_type, "uri": self.catalog_address, "warehouse": self.warehouse}
        return told if storage.is_local(self.warehouse) else told | {"py-io-impl": _FILES_IN_A_STORE}

    @cached_property
    def catalog(self) -> Catalog:
        """The Iceberg catalog; made, with its namespace, on first use.

        Raises:
            CatalogAwayError: if it cannot be used.
        """
        if not self.settings.catalog_uri:
            self.catalog_file.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, _COMMIT_TRIES + 1):
            try:
                catalog = load_catalog(CATALOG, **self.catalog_properties)
                with contextlib.suppress(NamespaceAlreadyExistsError):
                    catalog.create_namespace(self.settings.namespace)
                return catalog
            except IntegrityError:
                # Two first writers make the catalog's own tables at once, and one of them finds them there.
                if attempt == _COMMIT_TRIES:
                    raise
            except OperationalError as error:
                if attempt == _COMMIT_TRIES:
                    raise self._away(error) from error
                if attempt == 1:
                    logger.warning("%s; trying again for some seconds", self._away(error))
            _wait(attempt)
        raise AssertionError("unreachable")

    def _away(self, error: OperationalError) -> CatalogAwayError:
        return CatalogAwayError(f"the catalog {self.catalog_shown} cannot be used: {str(error.orig).splitlines()[0]}")

    def migrate_catalog(self) -> None:
        """Bring the tables of a SQL catalog that an older PyIceberg made to today's; nothing happens if they are."""
        load_catalog(CATALOG, **self.catalog_properties, schema_version="v1")

    # Staging

    def new_stage_path(self, table: str, ds: date) -> str:
        """Return a folder that no earlier attempt has used, for Spark to write one day into."""
        return storage.join(self.warehouse, "data", _known(table), f"ds={ds}", uuid.uuid4().hex[:16])

    def mark_staged(self, staged: Staged) -> Staged:
        """Write the manifest that makes staged files visible to the audit; the last act of a build.

        A copy beside the files says what they were built from, for as long as they are read.
        """
        stamped = Staged(**{**staged.__dict__, "created_at": datetime.now(UTC).isoformat(timespec="seconds")})
        storage.write_json(storage.join(staged.path, _BUILT), stamped.to_dict())
        storage.write_json(self.staged_manifest(staged.table, staged.ds), stamped.to_dict())
        return stamped

    def staged(self, table: str, ds: date) -> Staged:
        """Return the latest staged attempt of a day.

        Raises:
            NotReadyError: if the day was never staged.
        """
        path = self.staged_manifest(table, ds)
        if not storage.exists(path):
            raise NotReadyError(f"{table} {ds} is not staged; run: python -m jobs.{table} --ds {ds}")
        return Staged.from_dict(storage.read_json(path))

    def staged_days(self) -> set[date]:
        """Return every day of which some table was ever staged."""
        files = storage.list_files(storage.join(self.warehouse, "staged"), ".json")
        return {parse_day(file.rsplit("/", 1)[1].removesuffix(".json")) for file in files}

    def staged_paths(self, table: str) -> list[str]:
        """Return the folders of the latest staged attempt of every day of a table."""
        manifests = storage.list_files(storage.join(self.warehouse, "staged", _known(table)), ".json")
        return [storage.read_json(path)["path"] for path in manifests]

    def built(self, folder: str) -> Staged | None:
        """Return the manifest of the files in a folder, staged or published; None if they have none."""
        path = storage.join(folder, _BUILT)
        return Staged.from_dict(storage.read_json(path)) if storage.exists(path) else None

    def staged_manifest(self, table: str, ds: date) -> str:
        """Return the file that says what was last staged of a day, whether or not it is there."""
        return storage.join(self.warehouse, "staged", _known(table), f"{ds}.json")

    # Repairs are part of what a day is built from, so that building it again gives the same rows.

    def repairs(self, raw_table: str, ds: date) -> list[Repair]:
        """Return what was done about refused rows of a raw table's day, in the order of the refused."""
        path = self._repairs(raw_table, ds)
        return [Repair(**entry) for entry in storage.read_json(path)] if storage.exists(path) else []

    def add_repairs(self, raw_table: str, ds: date, repairs: Iterable[Repair]) -> None:
        """Add repairs of a day; one of a row that was repaired before takes the earlier one's place."""
        known = {repair.refused: repair for repair in self.repairs(raw_table, ds)}
        original = {repair.repaired: repair.refused for repair in known.values() if repair.repaired is not None}
        for repair in repairs:
            refused = original.get(repair.refused, repair.refused)
            known[refused] = Repair(refused, repair.repaired)
        storage.write_json(self._repairs(raw_table, ds), [known[refused].to_dict() for refused in sorted(known)])

    def _repairs(self, raw_table: str, ds: date) -> str:
        return storage.join(self.warehouse, "repairs", raw_table, f"{ds}.json")

    # The audit's verdict lies beside the files it speaks of, so that it can never be read for others.

    def write_verdict(self, staged: Staged, verdict: Mapping[str, Any]) -> None:
        """Keep the audit's verdict beside the audited files: ``passed``, and ``failure`` in words if it did not."""
        storage.write_json(storage.join(staged.path, AUDIT_FILE), verdict)

    def verdict(self, staged: Staged) -> dict[str, Any] | None:
        """Return the audit's verdict on exactly these files, or None if they were not audited."""
        return self.verdict_in(staged.path)

    def verdict_in(self, folder: str) -> dict[str, Any] | None:
        """Return the audit's verdict on the files in a folder, staged or published; None if they were not audited."""
        path = storage.join(folder, AUDIT_FILE)
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
            BadDataError: if there are no files, one is not whole, one holds rows of another partition, or a column
                has a type that the table's column cannot take.
        """
        where = " and ".join(_among(column, [value]) for column, value in partition.items())
        place = f"{table} {_text(partition)}"
        schema = _check_files(place, files, partition)

        def replace() -> int:
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
            except (ResolveError, ValidationError) as error:
                raise BadDataError(
                    f"{place}: a column of the new files does not fit the table, which stays as it is: {error}"
                ) from error
            return _current_snapshot(self.table(table))

        return _until_committed(replace)

    def clear_partition(self, table: str, partition: Mapping[str, Any]) -> None:
        """Remove one partition in one commit; nothing happens if it holds nothing."""
        where = " and ".join(_among(column, [value]) for column, value in partition.items())

        def clear() -> None:
            try:
                target = self.table(table)
            except NoSuchTableError:
                return
            if list(target.scan(row_filter=where).plan_files()):
                target.delete(where)

        _until_committed(clear)

    def expire(self, table: str, snapshots: Sequence[int]) -> None:
        """Forget snapshots of a table, in one commit; the current one stays, and files are left where they are."""

        def expire() -> None:
            target = self.table(table)
            present = {snapshot.snapshot_id for snapshot in target.snapshots()} & set(snapshots)
            if present:
                target.maintenance.expire_snapshots().by_ids(sorted(present)).commit()

        _until_committed(expire)

    def _load_or_create(self, table: str, schema: pa.Schema, partition: tuple[str, ...]) -> Table:
        try:
            return self.table(table)
        except NoSuchTableError:
            pass
        name = self._name(table)
        # Another writer may make the table first; if it does so during this commit, the whole replacement is repeated.
        with (
            contextlib.suppress(TableAlreadyExistsError),
            self.catalog.create_table_transaction(name, schema=schema, properties=TABLE_PROPERTIES) as transaction,
            transaction.update_spec() as update,
        ):
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
            CatalogAwayError: if the catalog cannot be used.
        """
        catalog = self.catalog
        try:
            return catalog.load_table(self._name(table))
        except OperationalError as error:
            raise self._away(error) from error

    def snapshot_id(self, table: str) -> int | None:
        """Return the id of the table's current snapshot, or None if nothing was ever published."""
        version = self.version(table)
        return version[0] if version else None

    def version(self, table: str) -> tuple[int, int] | None:
        """Return id and sequence number of the table's current snapshot, or None if nothing was ever published."""
        try:
            snapshot = self.table(table).current_snapshot()
        except NoSuchTableError:
            return None
        return (snapshot.snapshot_id, snapshot.sequence_number or 0) if snapshot else None

    def _scan(
        self, table: str, snapshot_id: int | None, where: str = "true", columns: tuple[str, ...] = ("*",)
    ) -> DataScan:
        target = self.table(table)
        if snapshot_id is not None and target.snapshot_by_id(snapshot_id) is None:
            # PyIceberg would find no rows in it, which reads like a table without days.
            raise BadDataError(f"table {table} has no snapshot {snapshot_id}; it is of another lake, or has expired")
        return target.scan(row_filter=where, selected_fields=columns, snapshot_id=snapshot_id)

    def published(self, table: str, snapshot_id: int | None = None) -> list[PublishedDay]:
        """Return the published days of a table in order, as of a snapshot (default: now)."""
        try:
            scan = self._scan(table, snapshot_id)
        except NoSuchTableError:
            return []
        days: dict[date, list[int]] = {}
        for file in (task.file for task in scan.plan_files()):
            ds = partition_day(file.partition[0])
            totals = days.setdefault(ds, [0, 0, 0])
            totals[0] += file.record_count
            totals[1] += 1
            totals[2] += file.file_size_in_bytes
        return [PublishedDay(table, ds, *totals) for ds, totals in sorted(days.items())]

    def days(self, table: str, snapshot_id: int | None = None) -> list[date]:
        """Return the published days of a table, oldest first."""
        return [day.ds for day in self.published(table, snapshot_id)]

    def built_days(self, table: str) -> dict[date, Staged]:
        """Return the manifests of the published days of a table, oldest first; days without one are left out."""
        folders = self.folders(table)
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            found = list(pool.map(self.built, folders.values()))
        return {ds: staged for ds, staged in zip(folders, found, strict=True) if staged is not None}

    def folders(
        self, table: str, days: Iterable[date] | None = None, snapshot_id: int | None = None
    ) -> dict[date, str]:
        """Return the folder of the files of published days (default: all), oldest first; absent days are left out."""
        wanted = None if days is None else sorted(set(days))
        if wanted == []:
            return {}
        try:
            tasks = self._scan(table, snapshot_id, "true" if wanted is None else _among("ds", wanted)).plan_files()
        except NoSuchTableError:
            return {}
        found = {partition_day(task.file.partition[0]): task.file.file_path.rsplit("/", 1)[0] for task in tasks}
        return dict(sorted(found.items()))

    def files(self, table: str, days: Iterable[date], snapshot_id: int | None = None) -> list[str]:
        """Return the Parquet files of some published days, in day order then path order.

        Raises:
            NotReadyError: if one of the days is not published; the text names every missing day.
        """
        wanted = sorted(set(days))
        if not wanted:
            return []
        try:
            scan = self._scan(table, snapshot_id, _among("ds", wanted))
        except NoSuchTableError as error:
            raise NotReadyError(f"table {table} has no published day; needed: {describe_days(wanted)}") from error
        found = sorted((partition_day(task.file.partition[0]), task.file.file_path) for task in scan.plan_files())
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
        return self._scan(table, snapshot_id, where, columns).to_arrow()


def _known(table: str) -> str:
    if table not in (*TABLES, SCORES, QUARANTINE):
        raise BadConfigError(f"there is no table {table!r}; tables are {', '.join((*TABLES, SCORES, QUARANTINE))}")
    return table


def _check_files(place: str, files: list[str], partition: Mapping[str, Any]) -> pa.Schema:
    """Return the schema of ``files``, whose footers must say that every row belongs to ``partition``."""
    if not files:
        raise BadDataError(f"{place}: there are no files to publish")
    schemas = []
    for path in files:
        filesystem, inner = storage.open_filesystem(path)
        try:
            metadata = pq.read_metadata(inner, filesystem=filesystem)
        except pa.ArrowInvalid as error:
            raise BadDataError(f"{place}: {path} is not a whole Parquet file: {error}") from error
        schemas.append(metadata.schema.to_arrow_schema())
        for column, value in partition.items():
            low, high = _bounds(metadata, column)
            if metadata.num_rows and not low == high == value:
                raise BadDataError(f"{place}: {path} holds {column} = {low if low == high else f'{low}..{high}'}")
    return _without_metadata(schemas[0])


def _bounds(metadata: pq.FileMetaData, column: str) -> tuple[Any, Any]:
    """Return the smallest and the largest value of a column, from the footer; None where it does not say."""
    index = metadata.schema.to_arrow_schema().get_field_index(column)
    if index < 0:
        return None, None
    leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column)
    groups = [metadata.row_group(group).column(leaf).statistics for group in range(metadata.num_row_groups)]
    if any(group is None or not group.has_min_max or group.null_count for group in groups):
        return None, None
    return min(group.min for group in groups), max(group.max for group in groups)


def _until_committed(work: Callable[[], _Result]) -> _Result:
    """Do ``work`` again until no other writer commits between its reading and its commit.

    Raises:
        CommitFailedException: after many tries.
    """
    for attempt in range(1, _COMMIT_TRIES + 1):
        try:
            return work()
        except CommitFailedException:
            if attempt == _COMMIT_TRIES:
                raise
            _wait(attempt)
    raise AssertionError("unreachable")


def _wait(attempt: int) -> None:
    time.sleep(random.uniform(0, _COMMIT_WAIT_SECONDS * min(attempt, 5)))


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


def partition_day(value: Any) -> date:
    """Return the day of a file's partition value, which PyIceberg gives as a date or as days since 1970."""
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
