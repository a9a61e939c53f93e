"""Files that Spark's Python workers write: one a partition, complete or not there, replaced when a task runs again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.errors import PythonException
from pyspark.sql import SparkSession

from jobs import arrow_files
from jobs.arrow_files import write_partitions


def whole() -> Callable[[Iterable[pa.RecordBatch]], pa.Table | None]:
    """Made in a function: workers cannot import a module of tests, so what they run must travel whole."""

    def made(batches: Iterable[pa.RecordBatch]) -> pa.Table | None:
        parts = list(batches)
        return pa.Table.from_batches(parts) if parts else None

    return made


def rows(folder: Path) -> list[int]:
    return sorted(row["id"] for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist())


def test_each_partition_is_a_file_and_none_is_there_twice_after_another_try(
    spark: SparkSession, tmp_path: Path
) -> None:
    frame = spark.range(0, 1000, numPartitions=3)
    for _ in range(2):
        assert write_partitions(frame, whole(), f"file://{tmp_path}") == 1000
        assert rows(tmp_path) == list(range(1000))
        assert sorted(file.name for file in tmp_path.iterdir()) == [f"part-0000{n}.parquet" for n in range(3)]


def test_a_partition_without_rows_leaves_no_file(spark: SparkSession, tmp_path: Path) -> None:
    def nothing(batches: Iterable[pa.RecordBatch]) -> pa.Table | None:
        return None

    assert write_partitions(spark.range(0, 10, numPartitions=2), nothing, str(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_worker_is_told_and_leaves_no_file_of_its_partition(spark: SparkSession, tmp_path: Path) -> None:
    made = whole()

    def breaks(batches: Iterable[pa.RecordBatch]) -> pa.Table | None:
        table = made(batches)
        if table is not None and 0 in table["id"].to_pylist():
            raise ValueError("no such event")
        return table

    with pytest.raises(PythonException, match="no such event"):
        write_partitions(spark.range(0, 100, numPartitions=2), breaks, str(tmp_path))
    assert 0 not in rows(tmp_path)


def test_a_reader_need_not_hold_more_than_a_row_group_of_bounded_size(spark: SparkSession, tmp_path: Path) -> None:
    def wide(batches: Iterable[pa.RecordBatch]) -> pa.Table | None:
        count = sum(batch.num_rows for batch in batches)
        values = pa.array(range(1000 * count), pa.int64())
        return pa.table(
            {"list": pa.ListArray.from_arrays(pa.array(range(0, 1000 * count + 1, 1000), pa.int32()), values)}
        )

    write_partitions(spark.range(0, 20_000, numPartitions=1), wide, str(tmp_path))
    (file,) = tmp_path.iterdir()
    read = pq.ParquetFile(file)
    sizes = [read.read_row_group(group).nbytes for group in range(read.num_row_groups)]
    assert sum(sizes) > 2 * arrow_files._ROW_GROUP_BYTES
    assert max(sizes) <= 1.1 * arrow_files._ROW_GROUP_BYTES
