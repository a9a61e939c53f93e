"""Parquet files written by Spark's Python workers themselves, one a partition, from the Arrow table a task made.

Spark's own writer takes rows apart value by value; for rows that hold lists of hundreds of events that is most of a
job's time.  A task that is tried again replaces its file, so a folder never holds a partition twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import TaskContext
from pyspark.sql import DataFrame

from onetrans import storage

WRITTEN = "file string, rows long"

_ROW_GROUP_BYTES = 64 << 20
"""Of a row group, as Arrow holds it; on disk it is a quarter or less."""

_LEVEL = 3
"""Zstandard's, as in Spark's writer; Arrow's own is 1."""

Made = Callable[[Iterable[pa.RecordBatch]], "pa.Table | None"]


def write_partitions(frame: DataFrame, make: Made, path: str) -> int:
    """Write what ``make`` returns of each partition of a frame as a file in a local folder; return the rows written.

    Raises:
        BadConfigError: if the folder is not on a disk.
    """
    folder = str(storage.local_path(path))
    rows = frame.mapInArrow(_writing(make, folder), WRITTEN).agg({"rows": "sum"}).first()
    return int(rows[0] or 0) if rows is not None else 0


def _writing(make: Made, folder: str) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        table = make(batches)
        if table is None or not table.num_rows:
            return
        context = TaskContext.get()
        assert context is not None  # it runs in a task
        name = f"part-{context.partitionId():05d}.parquet"
        os.makedirs(folder, exist_ok=True)
        partial = Path(folder) / f".{name}.{context.taskAttemptId()}"
        rows = max(1, table.num_rows * _ROW_GROUP_BYTES // max(table.nbytes, 1))
        groups = min(rows, table.num_rows)
        pq.write_table(table, partial, row_group_size=groups, compression="zstd", compression_level=_LEVEL)
        partial.replace(Path(folder) / name)
        yield pa.RecordBatch.from_pydict({"file": [name], "rows": [table.num_rows]})

    return write
