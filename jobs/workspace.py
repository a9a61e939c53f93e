"""What every job works with, and how a day leaves it: staged files, refused rows, a manifest last."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta

import pyarrow.parquet as pq
from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.checks import REPEAT
from jobs.sources import Source, open_source
from jobs.spark import session
from onetrans import storage
from onetrans.days import describe_days
from onetrans.errors import BadDataError, NotReadyError
from onetrans.lake import QUARANTINE, Lake, Staged
from onetrans.schema import FeatureSchema, load_schema
from onetrans.settings import Settings

Reads = Mapping[str, tuple[date, date]]
"""Table -> first and last day that decide what is built."""

logger = logging.getLogger(__name__)

_ROWS_PER_FILE = 2_000_000
_ROW_GROUP_BYTES = 16 << 20
_EXAMPLE_CHARACTERS = 2_000


@dataclass(frozen=True)
class Workspace:
    """The parts a job needs."""

    settings: Settings
    """What the deployment chose."""
    spark: SparkSession
    """The session."""
    lake: Lake
    """All tables."""
    schema: FeatureSchema
    """The log's feature schema."""
    source: Source
    """The raw log."""

    @classmethod
    def open(cls, settings: Settings) -> Workspace:
        """Open everything a process needs; configuration is read before Spark is started."""
        schema = load_schema(settings.source)
        source = open_source(settings.source, schema)
        return cls(settings, session(settings.spark), Lake(settings.lake), schema, source)

    # Reading published tables

    def read(self, table: str, days: list[date]) -> DataFrame:
        """Return published days of a table, with the table's current columns.

        Raises:
            NotReadyError: if one of the days is not published.
        """
        files = self.lake.files(table, days)
        columns = from_arrow_schema(self.lake.table(table).schema().as_arrow())
        return self.spark.read.schema(columns).parquet(*files)

    def window(self, table: str, ds: date, days: int) -> list[date]:
        """Return those of the ``days`` days before ``ds`` that are published.

        Days before the first published one are left out: the log was not there yet.  So are those that
        ``source.absent_days`` names; the window does not reach further back for them.

        Raises:
            NotReadyError: if there is another hole after the first published day.
        """
        published = self.lake.days(table)
        wanted = [ds - timedelta(days=back) for back in range(days, 0, -1)]
        wanted = [day for day in wanted if published and day >= published[0]]
        missing = sorted(set(wanted) - set(published) - set(self.settings.source.absent_days))
        if missing:
            raise NotReadyError(
                f"{table} {describe_days(missing)} is needed for {ds} and not published; "
                f"published are {describe_days(published)}. Days that the log lost for good go into source.absent_days"
            )
        return [day for day in wanted if day in published]

    def day_before(self, table: str, ds: date) -> date:
        """Return the day before ``ds``, or the latest one before it that is published or not known to be absent."""
        published = self.lake.days(table)
        before = ds - timedelta(days=1)
        while before in self.settings.source.absent_days and before not in published:
            before -= timedelta(days=1)
        return before

    def _snapshots(self, tables: Iterable[str]) -> dict[str, int]:
        """Return the current snapshot of those tables that have one."""
        found = {table: self.lake.snapshot_id(table) for table in tables}
        return {table: snapshot for table, snapshot in found.items() if snapshot is not None}

    # Staging

    def stage(self, table: str, ds: date, frame: DataFrame, reads: Reads, quarantined: int = 0) -> Staged:
        """Write one day of a table and its manifest; ``reads`` says which published days the rows rest on.

        Raises:
            BadDataError: if the day has no rows.
        """
        started = time.monotonic()
        inputs = self._snapshots(reads)
        path = self.lake.new_stage_path(table, ds)
        write(frame.withColumn("ds", F.lit(ds)).select("ds", *(c for c in frame.columns if c != "ds")), path)
        return self._mark(Staged(table, ds, path, 0, quarantined, inputs, reads), started)

    def stage_checked(self, table: str, ds: date, checked: DataFrame, reads: Reads, key: Sequence[str]) -> Staged:
        """Write the good rows of a checked frame as one day of a table, the refused ones to the quarantine.

        ``key`` are the columns by which a person finds a row that was dropped as an exact repeat.

        Raises:
            BadDataError: if more rows are refused than the settings allow, or none is left.
        """
        started = time.monotonic()
        inputs = self._snapshots(reads)
        path = self.lake.new_stage_path(table, ds)
        seen = Observation()
        reason = F.col("reason")
        watched = checked.observe(
            seen,
            F.count("*").alias("rows"),
            F.count_if(reason == REPEAT).alias("repeats"),
            _example(key).alias("example"),
            F.count_if(reason.isNotNull() & (reason != REPEAT)).alias("refused"),
        )
        good = watched.where(reason.isNull()).drop("raw", "reason")
        write(good.withColumn("ds", F.lit(ds)).select("ds", *(c for c in good.columns if c != "ds")), path)
        repeats, refused = seen.get["repeats"], seen.get["refused"]
        _tell_repeats(table, ds, repeats, key, seen.get["example"])
        self.quarantine(table, ds, checked, refused, seen.get["rows"] - repeats)
        return self._mark(Staged(table, ds, path, 0, refused, inputs, reads), started)

    def quarantine_attributes(self, table: str, ds: date, checked: DataFrame, key: str) -> int:
        """Put the refused rows of a checked snapshot into the quarantine of a feature table; return how many.

        ``key`` is the column that names a row.

        Raises:
            BadDataError: if they are more than the settings allow.
        """
        reason = F.col("reason")
        refused = reason.isNotNull() & (reason != REPEAT)
        counted = checked.agg(
            F.count_if(refused),
            F.count_if(reason.isNull() | refused),
            F.count_if(reason == REPEAT),
            _example([key]),
        ).first()
        assert counted is not None  # an aggregate without keys has one row
        _tell_repeats(table, ds, counted[2], [key], counted[3])
        self.quarantine(table, ds, checked, counted[0], counted[1])
        return int(counted[0])

    def quarantine(self, table: str, ds: date, checked: DataFrame, refused: int, rows: int) -> None:
        """Make the refused rows of a checked frame the quarantine of one table and day.

        They are committed before anything is decided, so a person finds them whether or not the day stops.

        Raises:
            BadDataError: if they are more than ``lake.max_quarantine_share`` of the rows.
        """
        if not refused:
            self.lake.clear_partition(QUARANTINE, {"ds": ds, "table_name": table})
            return
        path = self.lake.new_stage_path(QUARANTINE, ds)
        attempt = path.rsplit("/", 1)[1]
        kept = checked.where(F.col("reason").isNotNull() & (F.col("reason") != REPEAT)).select(
            F.lit(ds).alias("ds"),
            F.lit(table).alias("table_name"),
            "reason",
            "raw",
            F.lit(attempt).alias("attempt"),
        )
        write(kept.coalesce(1), path)
        files = storage.list_files(path, ".parquet")
        self.lake.replace_partition(QUARANTINE, {"ds": ds, "table_name": table}, files)
        text = f"{refused:,} of {rows:,} rows ({100 * refused / rows:.1f} %) were refused: {_reasons(files)}"
        limit = self.lake.settings.max_quarantine_share
        if refused > limit * rows:
            raise BadDataError(
                f"{table} {ds}: {text}. lake.max_quarantine_share allows {100 * limit:g} %, so the day stops; "
                f"the rows are in table {QUARANTINE} (ds = {ds}, table_name = {table})"
            )
        logger.warning("%s %s: %s; they are in table %s", table, ds, text, QUARANTINE)

    def _mark(self, staged: Staged, started: float) -> Staged:
        rows = sum(_rows(file) for file in storage.list_files(staged.path, ".parquet"))
        if not rows:
            raise BadDataError(f"{staged.table} {staged.ds}: no row is left, so there is nothing to publish")
        staged = self.lake.mark_staged(replace(staged, rows=rows))
        logger.info("%s %s: staged %s rows in %.1f s", staged.table, staged.ds, f"{rows:,}", time.monotonic() - started)
        return staged


def write(frame: DataFrame, path: str) -> None:
    """Write Parquet with row groups a reader can hold many of."""
    frame.write.option("maxRecordsPerFile", _ROWS_PER_FILE).option("parquet.block.size", _ROW_GROUP_BYTES).parquet(path)


def _example(key: Sequence[str]) -> SparkColumn:
    """Return the key of one exact repeat; its raw text would have to travel with every row."""
    return F.max(F.when(F.col("reason") == REPEAT, F.to_json(F.struct(*key))))


def _tell_repeats(table: str, ds: date, count: int, key: Sequence[str], example: str) -> None:
    if count:
        logger.info(
            "%s %s: dropped %s exact repeats of (%s), for example %s", table, ds, f"{count:,}", ", ".join(key), example
        )


def _rows(file: str) -> int:
    filesystem, inner = storage.open_filesystem(file)
    with filesystem.open_input_file(inner) as opened:
        return pq.ParquetFile(opened).metadata.num_rows


def _reasons(files: list[str]) -> str:
    """Describe refused rows: each reason, its count, and one row as it came."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for file in files:
        filesystem, inner = storage.open_filesystem(file)
        with filesystem.open_input_file(inner) as opened:
            for batch in pq.ParquetFile(opened).iter_batches(columns=["reason", "raw"]):
                counts.update(batch["reason"].to_pylist())
                for reason, raw in zip(batch["reason"].to_pylist(), batch["raw"].to_pylist(), strict=True):
                    examples.setdefault(reason, _shortened(raw))
    return "; ".join(f"{n:,} x '{reason}', for example {examples[reason]}" for reason, n in counts.most_common())


def _shortened(raw: str) -> str:
    """Cut a row that holds long lists, so that a message stays readable."""
    cut = len(raw) - _EXAMPLE_CHARACTERS
    return raw if cut <= 0 else f"{raw[:_EXAMPLE_CHARACTERS]}... ({cut:,} more characters)"
