"""Writes small raw logs in the input contract, and opens a workspace on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from jobs.sources.files import Files
from jobs.workspace import Workspace
from onetrans.lake import Lake
from onetrans.schema import FeatureSchema
from onetrans.settings import LakeSettings, Settings, SourceSettings

Row = dict[str, Any]

TIME = pa.timestamp("us", tz="UTC")
TYPES = {
    "ts": TIME,
    "available_at": TIME,
    "conversion_at": TIME,
    "position": pa.int32(),
    "click": pa.int32(),
    "conversion": pa.int32(),
    "age": pa.float64(),
    "price": pa.float64(),
    "image": pa.list_(pa.float32()),
    "taste": pa.list_(pa.float64()),
    "scene": pa.list_(pa.float64()),
}
"""Types of the contract's columns where they are not text."""


def write_rows(folder: Path, rows: Iterable[Row], types: dict[str, pa.DataType] | None = None) -> Path:
    """Write rows as one Parquet file and return it; ``types`` replaces types of the contract."""
    rows = list(rows)
    known = {**TYPES, **(types or {})}
    columns = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: pa.array([r.get(name) for r in rows], known.get(name, pa.string())) for name in columns})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "part-0.parquet"
    pq.write_table(table, path)
    return path


def open_workspace(spark: SparkSession, folder: Path, schema: FeatureSchema, **lake: Any) -> Workspace:
    """Open a workspace on ``folder/raw`` and ``folder/lake``."""
    settings = Settings(
        source=SourceSettings(path=str(folder / "raw")), lake=LakeSettings(warehouse=str(folder / "lake"), **lake)
    )
    return Workspace(settings, spark, Lake(settings.lake), schema, Files(settings.source.path, schema))


def with_schema(work: Workspace, schema: FeatureSchema) -> Workspace:
    """Return the workspace with another schema."""
    return replace(work, schema=schema, source=Files(work.settings.source.path, schema))


def publish(work: Workspace, job: ModuleType, ds: date) -> None:
    """Build a day of a table and publish it as after a passed audit."""
    staged = job.build(work, ds)
    work.lake.write_verdict(staged, {"passed": True})
    work.lake.publish(job.TABLE, ds)
