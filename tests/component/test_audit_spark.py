"""A day too large for memory is judged by Spark: the same suite, the same verdict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from expectations.audit import audit_staged
from jobs.spark import session
from onetrans.lake import Lake
from onetrans.settings import AuditSettings, LakeSettings, SparkSettings
from tests.audit_tables import DS, FACTORIES, NOON, ROWS, Row, audit_schema, publish, stage, valid_table


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    started = session(SparkSettings(master="local[2]", driver_memory="1g", shuffle_partitions=2))
    yield started
    started.stop()


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(LakeSettings(warehouse=str(tmp_path / "lake")))


def break_impressions(rows: list[Row]) -> None:
    rows[3]["click"] = 2
    rows[4]["ts"] = NOON.replace(day=28)
    rows[5]["user_id"] = None
    rows[6]["true_ctr"] = np.inf
    rows.append(dict(rows[0]))


def break_sequences(rows: list[Row]) -> None:
    rows[2]["seq_click"].reverse()
    rows[2]["seq_click"].append(rows[2]["seq_click"][0])
    rows[4]["seq_purchase"][0]["event_id"] = None


def break_requests(rows: list[Row]) -> None:
    rows[2]["seq_click"][-1]["ts"] = rows[2]["ts"]
    rows[3]["candidates"] = []
    rows[4]["candidates"][0]["item_id"] = "i1"


BREAKS = {
    "impressions": break_impressions,
    "behavior_sequences": break_sequences,
    "training_requests": break_requests,
}


@pytest.mark.parametrize("table", BREAKS)
def test_spark_says_what_memory_says(table: str, lake: Lake, spark: SparkSession) -> None:
    manifest: dict[str, Any] = {}
    if table == "training_requests":
        manifest["inputs"] = {"impressions": publish(lake, "impressions", valid_table("impressions"))}
    kinds, rows = FACTORIES[table]()
    BREAKS[table](rows)
    stage(lake, table, pa.Table.from_pylist(rows, schema=kinds), **manifest)
    here = audit_staged(lake, audit_schema(), table, DS, settings=AuditSettings())
    there = audit_staged(lake, audit_schema(), table, DS, spark, AuditSettings(max_rows_in_memory=ROWS - 1))
    assert (here["engine"], there["engine"]) == ("pandas", "spark")
    assert len(here["findings"]) >= 3
    assert _comparable(there) == _comparable(here)


def _comparable(verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict without what may differ: the engine, the time, and the order in which examples were met."""
    findings = [
        {**finding, "examples": sorted(str(sorted(row.items())) for row in finding["examples"])}
        for finding in verdict["findings"]
    ]
    return {**verdict, "findings": findings, "engine": "", "seconds": 0, "failure": ""}
