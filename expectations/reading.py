"""Reads the staged files of a day once: the table of columns, and the view of the rows.

Up to ``audit.max_rows_in_memory`` rows the files are read in this process,
batch after batch, so that only the view, a few columns wide, is ever held.  A
larger day is read by Spark with the same functions, batch by batch, and the same
suite is judged by Great Expectations' Spark engine.

The reason is cost: a million impressions took 1.4 s of CPU here and 29 s in a
running Spark session on one machine, so Spark pays only where it has many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from expectations.columns import LIST_OF_STRUCT, Column, found_types
from expectations.distribution import Bins, shift
from expectations.profile import Profile, merge_profiles, profile_batch
from expectations.views import View
from onetrans import storage
from onetrans.errors import UNHARMED, BadDataError
from onetrans.lake import Staged

if TYPE_CHECKING:
    from pyspark.sql import DataFrame as SparkDataFrame
    from pyspark.sql import SparkSession

_BATCH_ROWS = 65_536
_BATCH_VALUES = 2_000_000
_ABSENT = "missing"


@dataclass(frozen=True)
class StagedFiles:
    """The Parquet files of one staged day, and what their footers say."""

    staged: Staged
    """Manifest of the day."""
    paths: tuple[str, ...]
    """Files, in path order."""
    schemas: tuple[pa.Schema, ...]
    """Schema of each file."""
    rows: int
    """Rows of all files."""
    values: int
    """Values of all columns and nested fields of all files; a list's elements count one by one."""

    @property
    def batch_rows(self) -> int:
        """Rows that are read at a time: few where a row holds long lists, so that a batch stays small."""
        fitting = _BATCH_VALUES * self.rows // max(self.values, 1)
        return max(1, min(_BATCH_ROWS, fitting))

    def has(self, names: list[str], declared: list[Column]) -> bool:
        """Tell whether every file holds the columns ``names``, and their fields, with the declared types."""
        needed = [column for column in declared if column.name.split(".")[0] in names and not column.optional]
        types = [found_types(schema) for schema in self.schemas]
        return all(found.get(column.name) == column.type for found in types for column in needed)


def open_staged(staged: Staged) -> StagedFiles:
    """Read the footers of the staged files.

    Raises:
        BadDataError: if there are no files, or one of them is not a whole Parquet file.
    """
    paths = storage.list_files(staged.path, ".parquet")
    if not paths:
        raise BadDataError(
            f"{staged.table} {staged.ds}: {staged.path} holds no Parquet files, though the manifest says that "
            f"{staged.rows:,} rows were staged there; run the job again: python -m jobs.{staged.table} --ds {staged.ds}"
        )
    schemas, rows, values = [], 0, 0
    for path in paths:
        with _parquet(staged, path) as file:
            schemas.append(file.schema_arrow)
            rows += file.metadata.num_rows
            for group in range(file.metadata.num_row_groups):
                columns = file.metadata.row_group(group)
                values += sum(columns.column(index).num_values for index in range(columns.num_columns))
    return StagedFiles(staged, tuple(paths), tuple(schemas), rows, values)


def read_here(
    files: StagedFiles, view: View | None, watched: Mapping[str, Bins]
) -> tuple[dict[str, Profile], pd.DataFrame | None]:
    """Return the profile of every column and the view of all rows (None if no view is asked for).

    Raises:
        BadDataError: if a file cannot be decoded.
    """
    profiles: list[dict[str, Profile]] = []
    views: list[pa.RecordBatch] = []
    for batch in _batches(files):
        profiles.append(profile_batch(batch, watched))
        if view is not None:
            views.append(view(batch))
    if view is None:
        return merge_profiles(profiles), None
    if not views:
        views.append(view(pa.RecordBatch.from_pylist([], schema=files.schemas[0])))
    table = pa.Table.from_batches(views)
    # Text becomes a category: Great Expectations copies the frame for every rule, and codes are cheap to copy.
    text = [field.name for field in table.schema if pa.types.is_string(field.type)]
    # Pandas would make floats of integers among which one is missing, and an id of 64 bits would be another's.
    exact = {
        field.name: table[field.name].to_pandas(integer_object_nulls=True)
        for field in table.schema
        if pa.types.is_int64(field.type) and table[field.name].null_count
    }
    return merge_profiles(profiles), table.to_pandas(categories=text, self_destruct=True).assign(**exact)


def read_with_spark(
    files: StagedFiles, view: View | None, watched: Mapping[str, Bins], spark: SparkSession
) -> tuple[dict[str, Profile], SparkDataFrame | None]:
    """Do as :func:`read_here`, on Spark's executors; the view stays distributed."""
    from jobs.objects import readable

    staged = spark.read.parquet(*readable(spark, files.paths))
    parts = staged.mapInArrow(_profiler(watched), "path string, profile array<double>").collect()
    profiles = merge_profiles({row["path"]: Profile.from_list(row["profile"])} for row in parts)
    if view is None:
        return profiles, None
    empty = view(pa.RecordBatch.from_pylist([], schema=files.schemas[0]))

    def apply(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return (view(batch) for batch in batches)

    from pyspark.sql.pandas.types import from_arrow_schema

    return profiles, staged.mapInArrow(apply, from_arrow_schema(empty.schema))


def with_unknown(
    files: StagedFiles, rows: SparkDataFrame, ids: Mapping[str, tuple[str, ...]], spark: SparkSession
) -> SparkDataFrame:
    """Add to the view of requests what it holds where the ids with features fit in memory: the shares without any.

    Here they are counted by a join with the files of ``ids``, over all requests at once, and stand in every row.
    """
    from pyspark.sql import functions as F

    from jobs.objects import readable

    requests = spark.read.parquet(*readable(spark, files.paths))
    asked = {
        "user_id": ("user_unknown", requests.select("user_id", F.lit(1.0).alias("weight"))),
        "item_id": (
            "candidates_unknown",
            requests.select(
                F.explode("candidates.item_id").alias("item_id"), (F.lit(1.0) / F.size("candidates")).alias("weight")
            ),
        ),
    }
    for key, paths in ids.items():
        column, weighted = asked[key]
        there = spark.read.parquet(*readable(spark, paths)).select(key)
        # One row per id goes into the join, however often an item was shown.
        absent = weighted.groupBy(key).agg(F.sum("weight").alias("weight")).join(there, key, "left_anti")
        total = absent.agg(F.sum("weight")).first()
        assert total is not None  # an aggregate without keys has one row
        rows = rows.withColumn(column, F.lit((total[0] or 0.0) / max(files.rows, 1)))
    return rows


def column_table(
    files: StagedFiles,
    declared: list[Column],
    profiles: dict[str, Profile],
    limit: float,
    before: Mapping[str, Sequence[int]],
    max_shift: float,
) -> pd.DataFrame:
    """Return one row per declared or found column: what it must be beside what it is.

    ``use`` is ``required`` (never missing), ``feature`` or ``extra`` (not declared).  Where files
    disagree on a column's type, the row names the first one that is not as declared.  ``limit`` is the
    share of values a feature may lack before the audit warns, ``before`` holds the counts per bin of the days before
    of the columns that are compared with them, and ``max_shift`` how far they may lie apart beyond chance.
    """
    types = [found_types(schema) for schema in files.schemas]
    rows: list[dict[str, Any]] = []
    for column in declared:
        places = [i for i, found in enumerate(types) if found.get(column.name, _ABSENT) != column.type]
        found = types[places[0]].get(column.name, _ABSENT) if places else column.type
        if found == _ABSENT and column.optional:
            continue
        allowed = 1.0 if column.type == LIST_OF_STRUCT else limit
        rows.append(
            {
                "column": column.name,
                "use": "required" if column.required else "feature",
                "declared": column.type,
                "found": found,
                "file": files.paths[places[0] if places else 0].rsplit("/", 1)[-1],
                **_figures(profiles.get(column.name, Profile())),
                **_shift(profiles.get(column.name, Profile()), before.get(column.name, ()), max_shift),
                "missing_share_allowed": column.may_be_missing if column.may_be_missing is not None else allowed,
                "smallest_allowed": column.smallest,
                "largest_allowed": column.largest,
            }
        )
    names = {column.name for column in declared}
    for index, found_by_name in enumerate(types):
        for name in sorted(set(found_by_name) - names):
            names.add(name)
            rows.append(
                {
                    "column": name,
                    "use": "extra",
                    "declared": "not declared",
                    "found": found_by_name[name],
                    "file": files.paths[index].rsplit("/", 1)[-1],
                    **_figures(Profile()),
                    **_shift(Profile(), (), max_shift),
                    "missing_share_allowed": 1.0,
                    "smallest_allowed": None,
                    "largest_allowed": None,
                }
            )
    frame = pd.DataFrame(rows)
    numbers = ["smallest", "largest", "smallest_allowed", "largest_allowed"]
    return frame.astype(dict.fromkeys(numbers, "float64"))


def _figures(profile: Profile) -> dict[str, Any]:
    return {
        "values": profile.values,
        "missing": profile.missing,
        "missing_share": profile.missing / profile.values if profile.values else 0.0,
        "not_finite": profile.not_finite,
        "smallest": profile.smallest if math.isfinite(profile.smallest) else None,
        "largest": profile.largest if math.isfinite(profile.largest) else None,
    }


def _shift(profile: Profile, before: Sequence[int], allowed: float) -> dict[str, float]:
    # A schema may have changed its boundaries since: counts of other bins say nothing.
    if not profile.bins or len(profile.bins) != len(before):
        return {"shift": 0.0, "shift_allowed": allowed}
    index, chance = shift(np.array(profile.bins), np.array(before))
    return {"shift": index, "shift_allowed": allowed + chance}


def _parquet(staged: Staged, path: str) -> pq.ParquetFile:
    filesystem, inner = storage.open_filesystem(path)
    try:
        return pq.ParquetFile(filesystem.open_input_file(inner))
    except pa.ArrowInvalid as error:
        raise _unreadable(staged, path, error) from error


def _batches(files: StagedFiles) -> Iterator[pa.RecordBatch]:
    for path in files.paths:
        with _parquet(files.staged, path) as file:
            try:
                yield from file.iter_batches(files.batch_rows)
            except (pa.ArrowInvalid, OSError) as error:
                if storage.is_lost(error):
                    raise
                raise _unreadable(files.staged, path, error) from error


def _unreadable(staged: Staged, path: str, error: Exception) -> BadDataError:
    return BadDataError(
        f"{staged.table} {staged.ds}: {path} is not a whole Parquet file ({str(error).strip().rstrip('.')}). "
        f"{UNHARMED} Run the job again: python -m jobs.{staged.table} --ds {staged.ds}"
    )


def _profiler(watched: Mapping[str, Bins]) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def profile(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for path, part in merge_profiles(profile_batch(batch, watched) for batch in batches).items():
            yield pa.RecordBatch.from_pydict({"path": [path], "profile": [[float(n) for n in part.to_list()]]})

    return profile
