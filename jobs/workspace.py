"""What every job works with, and how a day leaves it: staged files, refused rows, a manifest last."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import reduce
from typing import cast

import pyarrow.parquet as pq
from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import from_arrow_schema

from jobs import objects
from jobs.arrow_files import write_partitions
from jobs.checks import REPEAT
from jobs.past_events import RequestsOfPartition
from jobs.sources import Source, open_source
from jobs.sources.reading import AS_JSON, FILE, ROW
from jobs.spark import session
from onetrans import storage
from onetrans.days import describe_days, present_day
from onetrans.errors import UNHARMED, BadConfigError, BadDataError, NotReadyError
from onetrans.lake import QUARANTINE, Lake, Staged
from onetrans.schema import FeatureSchema, InputTable, load_schema
from onetrans.settings import Settings

Reads = Mapping[str, tuple[date, date]]
"""Table -> first and last day that decide what is built."""

INPUTS: Mapping[str, InputTable] = {
    "impressions": "impressions",
    "behaviors": "behaviors",
    "user_features": "users",
    "item_features": "items",
}
"""Table -> the raw table its rows come from."""

HISTORY = "history"
"""Raw input that is no table of a day: the behaviours from before the log's first day."""

logger = logging.getLogger(__name__)

REPAIRED = "repaired by hand"
"""What stands in place of a file for a row that a person repaired."""

READ_JSON = {
    "timestampFormat": "yyyy-MM-dd'T'HH:mm:ss[.SSSSSS][XXX]",
    "timestampNTZFormat": "yyyy-MM-dd'T'HH:mm:ss[.SSSSSS]",
}
"""How times of a repaired row are written: as ``AS_JSON`` writes them, or shorter."""

_ROWS_PER_FILE = 2_000_000
_REFUSED_PER_FILE = 100_000
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
    _stamps: dict[tuple[str, date], str] = field(default_factory=dict)
    """Raw input and day that is built -> stamp of its files when they were read."""

    @classmethod
    def open(cls, settings: Settings) -> Workspace:
        """Open everything a process needs; configuration is read before Spark is started."""
        schema = load_schema(settings.source)
        source = open_source(settings.source, schema)
        spark = session(settings.spark)
        if objects.uses_s3(settings):
            objects.by_itself(spark)  # a cluster that cannot reach the store is told of before it works for an hour
        return cls(settings, spark, Lake(settings.lake), schema, source)

    # Reading the raw log

    def raw(self, table: InputTable, ds: date) -> DataFrame:
        """Return the raw rows of one table and day, repaired ones in place of the refused they replace.

        Which files they came from is remembered for the manifest.
        """
        self._stamps[table, ds] = stamp_of(self.lake, self.source, table, ds)
        return self._repaired(getattr(self.source, table)(self.spark, ds), table, ds)

    def history(self, ds: date) -> DataFrame | None:
        """Return the behaviours from before the log's first day, which ``ds`` takes in; None if there are none.

        Its rows are refused with those of ``ds``, and repaired ones stand in their place likewise.
        """
        self._stamps[HISTORY, ds] = stamp_of(self.lake, self.source, HISTORY, ds)
        frame = self.source.history(self.spark)
        return None if frame is None else self._repaired(frame, "behaviors", ds, HISTORY)

    def whole(self, table: InputTable, ds: date, part: str = "") -> DataFrame | None:
        """Return the same rows with ``_row`` and ``_file`` beside them; None if the source does not know rows whole.

        With ``part`` = ``HISTORY``, those of the history.
        """
        frame = self.source.whole(self.spark, table, None if part == HISTORY else ds)
        repairs = self.lake.repairs(table, ds)
        if frame is None or not repairs:
            return frame
        listed = self.spark.createDataFrame([(r.refused, r.repaired) for r in repairs], f"{ROW} string, _by string")
        own = {name: self.schema.columns.get(table, {}).get(name, name) for name in frame.columns}
        kinds = {field.name: field.dataType for field in frame.schema if field.name not in (ROW, FILE)}
        kind = T.StructType([T.StructField(own[name], of) for name, of in kinds.items()])
        # A row is replaced where it stands, so the day and the history each get back what they refused.
        joined = frame.join(F.broadcast(listed.withColumn("_is", F.lit(True))), ROW, "left")
        joined = joined.where(F.col("_is").isNull() | F.col("_by").isNotNull())
        joined = joined.withColumn("_parsed", F.from_json("_by", kind, READ_JSON))
        replaced = F.col("_is").isNotNull()
        return joined.select(
            *(F.when(replaced, F.col("_parsed")[own[name]]).otherwise(F.col(name)).alias(name) for name in kinds),
            F.coalesce("_by", ROW).alias(ROW),
            F.when(replaced, F.lit(REPAIRED)).otherwise(F.col(FILE)).alias(FILE),
        )

    def _repaired(self, frame: DataFrame, table: InputTable, ds: date, part: str = "") -> DataFrame:
        if not self.lake.repairs(table, ds):
            return frame
        whole = self.whole(table, ds, part)
        assert whole is not None  # a row can be repaired only where it is known whole
        return whole.select(frame.columns)

    # Reading published tables

    def read(self, table: str, days: list[date]) -> DataFrame:
        """Return published days of a table, with the table's current columns.

        Raises:
            NotReadyError: if one of the days is not published.
        """
        files = self.lake.files(table, days)
        columns = from_arrow_schema(self.lake.table(table).schema().as_arrow())
        return self.spark.read.schema(columns).parquet(*objects.readable(self.spark, files))

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
        return present_day(ds - timedelta(days=1), self.settings.source.absent_days, self.lake.days(table))

    def _from(self, table: str, ds: date, reads: Reads, raw_also: Sequence[str] = ()) -> Staged:
        """Return the beginning of a manifest: what the day is about to be built from, as it is now."""
        versions = {name: version for name in reads if (version := self.lake.version(name)) is not None}
        return Staged(
            table,
            ds,
            self.lake.new_stage_path(table, ds),
            rows=0,
            inputs={name: snapshot for name, (snapshot, _) in versions.items()},
            sequence={name: number for name, (_, number) in versions.items()},
            reads=reads,
            raw=self._stamps.get((INPUTS.get(table, ""), ds), ""),
            raw_also={name: self._stamps[name, ds] for name in raw_also},
        )

    # Staging

    def stage(self, table: str, ds: date, frame: DataFrame, reads: Reads, quarantined: int = 0) -> Staged:
        """Write one day of a table and its manifest; ``reads`` says which published days the rows rest on.

        Raises:
            BadDataError: if the day has no rows.
        """
        started = time.monotonic()
        staged = self._from(table, ds, reads)
        write(frame.withColumn("ds", F.lit(ds)).select("ds", *(c for c in frame.columns if c != "ds")), staged.path)
        return self._mark(replace(staged, quarantined=quarantined), started)

    def stage_partitions(
        self, table: str, ds: date, rows: DataFrame, made: RequestsOfPartition, reads: Reads
    ) -> Staged:
        """Write one day of a table that Python workers make, and its manifest.

        On a disk the workers write their files themselves; into an object store Spark writes what they made.

        Raises:
            BadDataError: if the day has no rows.
            BadConfigError: if the workers' disk is another one.
        """
        started = time.monotonic()
        staged = self._from(table, ds, reads)
        of_day = made.of_day(ds)
        if storage.is_local(staged.path):
            written, found = write_partitions(rows, of_day.table, staged.path), count_rows(staged.path)
            if written != found:
                raise BadConfigError(
                    f"{table} {ds}: the workers wrote {written:,} rows, of which {found:,} are in {staged.path} where "
                    "this step runs. Executors on other machines need lake.warehouse in a folder that all share, or in "
                    "an object store"
                )
        else:
            write(rows.mapInArrow(of_day, of_day.spark_schema()), staged.path)
        return self._mark(staged, started)

    def stage_checked(
        self,
        table: str,
        ds: date,
        checked: DataFrame,
        reads: Reads,
        key: Sequence[str],
        raw_also: Sequence[str] = (),
    ) -> Staged:
        """Write the good rows of a checked frame as one day of a table, the refused ones to the quarantine.

        ``key`` are the columns by which a person finds a row that was dropped as an exact repeat, ``raw_also`` the raw
        inputs that were read beside the table's own.

        Raises:
            BadDataError: if more rows are refused than the settings allow, or none is left.
        """
        started = time.monotonic()
        staged = self._from(table, ds, reads, raw_also)
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
        write(good.withColumn("ds", F.lit(ds)).select("ds", *(c for c in good.columns if c != "ds")), staged.path)
        repeats, refused = seen.get["repeats"], seen.get["refused"]
        _tell_repeats(table, ds, repeats, key, seen.get["example"])
        self.quarantine(table, ds, checked, refused, seen.get["rows"] - repeats)
        return self._mark(replace(staged, quarantined=refused), started)

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
        kept = self._as_they_came(table, ds, checked.where(F.col("reason").isNotNull() & (F.col("reason") != REPEAT)))
        kept = kept.select(
            F.lit(ds).alias("ds"),
            F.lit(table).alias("table_name"),
            "reason",
            "raw",
            "file",
            F.lit(attempt).alias("attempt"),
        )
        write(kept.repartition(1 + refused // _REFUSED_PER_FILE), path)
        files = storage.list_files(path, ".parquet")
        self.lake.replace_partition(QUARANTINE, {"ds": ds, "table_name": table}, files)
        text = f"{refused:,} of {rows:,} rows ({100 * refused / rows:.1f} %) were refused: {_reasons(files)}"
        limit = self.lake.settings.max_quarantine_share
        if refused > limit * rows:
            raise BadDataError(
                f"{table} {ds}: {text}. lake.max_quarantine_share allows {100 * limit:g} %, so the day stops. "
                f"{UNHARMED} `onetrans quarantine show {table} --ds {ds}` prints the rows. "
                "Correct the day's files and build it again, or repair the rows and replay them (docs/audit.md)"
            )
        logger.warning("%s %s: %s; they are in table %s", table, ds, text, QUARANTINE)

    def _as_they_came(self, table: str, ds: date, refused: DataFrame) -> DataFrame:
        """Return refused rows with all columns of their files in ``raw``, and ``file``.

        The jobs read only the columns they need; the few rows that are refused are looked up again, by what was read
        of them.
        """
        found = [] if table not in INPUTS or self._derives(table) else [self.whole(INPUTS[table], ds)]
        if table == "behaviors" and found:
            found.append(self.whole("behaviors", ds, HISTORY))
        frames = [
            frame.select(F.to_json(F.struct(*_contract(frame)), AS_JSON).alias("raw"), ROW, FILE)
            for frame in found
            if frame is not None
        ]
        if not frames:
            return refused.withColumn("file", F.lit(None).cast("string"))
        counted = refused.groupBy("raw").agg(F.count("*").alias("_n"), F.min("reason").alias("reason"))
        # A row may stand in the log many times, and only some of them are refused: as many are kept.
        place = F.row_number().over(Window.partitionBy("raw").orderBy(FILE, ROW))
        matched = counted.join(reduce(DataFrame.unionByName, frames), "raw", "left").withColumn("_place", place)
        return matched.where(F.col("_place") <= F.col("_n")).select(
            "reason", F.coalesce(ROW, "raw").alias("raw"), F.col(FILE).alias("file")
        )

    def _derives(self, table: str) -> bool:
        return table == "behaviors" and bool(self.schema.derived_behaviors)

    def _mark(self, staged: Staged, started: float) -> Staged:
        rows = count_rows(staged.path)
        if not rows:
            raise BadDataError(
                f"{staged.table} {staged.ds}: no row is left, so there is nothing to publish. {UNHARMED} "
                "See `onetrans quarantine list` for what was refused, and whether the files of the day hold rows"
            )
        staged = self.lake.mark_staged(replace(staged, rows=rows))
        logger.info(
            "%s %s: staged %s rows in %.1f s, in %s",
            staged.table, staged.ds, f"{rows:,}", time.monotonic() - started, staged.path,
        )  # fmt: skip
        return staged


def _contract(frame: DataFrame) -> list[str]:
    """Return the columns that the jobs read, of a frame of whole rows."""
    return [column for column in frame.columns if column not in (ROW, FILE)]


def stamp_of(lake: Lake, source: Source, name: str, ds: date) -> str:
    """Return a text that changes when the files of a raw input do, of a day or the history, or repairs of its rows."""
    if name == HISTORY:  # its repairs are among those of the day's behaviours
        return source.stamp("behaviors", None)
    table = cast(InputTable, name)
    repairs = lake.repairs(table, ds)
    if not repairs:
        return source.stamp(table, ds)
    text = json.dumps([repair.to_dict() for repair in repairs], sort_keys=True)
    return f"{source.stamp(table, ds)}+{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def write(frame: DataFrame, path: str) -> None:
    """Write Parquet with row groups a reader can hold many of, beside what is in the folder."""
    options = {"maxRecordsPerFile": str(_ROWS_PER_FILE), "parquet.block.size": str(_ROW_GROUP_BYTES)}
    objects.write(frame, path, options)


def count_rows(path: str) -> int:
    """Return the rows of the Parquet files in a folder, by their footers."""
    return sum(_rows(file) for file in storage.list_files(path, ".parquet"))


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
                for found in batch["reason"].value_counts().to_pylist():
                    reason = found["values"]
                    counts[reason] += found["counts"]
                    if reason not in examples:
                        examples[reason] = _shortened(batch["raw"][batch["reason"].index(reason).as_py()].as_py())
    return "; ".join(f"{n:,} x '{reason}', for example {examples[reason]}" for reason, n in counts.most_common())


def _shortened(raw: str) -> str:
    """Cut a row that holds long lists, so that a message stays readable."""
    cut = len(raw) - _EXAMPLE_CHARACTERS
    return raw if cut <= 0 else f"{raw[:_EXAMPLE_CHARACTERS]}... ({cut:,} more characters)"
