"""A day too large for memory is judged by Spark: the same suite, the same verdict, on whole days and broken ones."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from expectations.audit import audit_staged
from expectations.suites import SUITES
from onetrans.lake import Lake
from onetrans.settings import AuditSettings, LakeSettings
from tests.audit_tables import (
    DS,
    FACTORIES,
    INPUTS,
    NOON,
    ROWS,
    Row,
    audit_schema,
    publish,
    publish_inputs,
    repeated,
    stage,
    usual_distributions,
)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(LakeSettings(warehouse=str(tmp_path / "lake")))


def break_impressions(rows: list[Row]) -> None:
    rows[3]["click"] = 2
    rows[4]["ts"] = NOON.replace(day=28)
    rows[5]["user_id"] = None
    rows[6]["true_ctr"] = np.inf
    for row in rows:
        row["surface"] = "search"
    rows.append(dict(rows[0]))


def break_behaviors(rows: list[Row]) -> None:
    rows[2]["available_at"] = rows[2]["ts"] - timedelta(seconds=1)
    rows[3]["event_id"] = None
    rows[4]["type"] = None
    rows.append(dict(rows[0]))
    for row in rows:
        row["price"] = 100.0


def break_users(rows: list[Row]) -> None:
    rows[1]["user_clicks_7d"] = 51.0
    rows[2]["user_impressions_1d"] = 60.0
    rows[3]["user_ctr_7d"] = 1.5
    rows[4]["user_id"] = rows[5]["user_id"]


def break_items(rows: list[Row]) -> None:
    rows[1]["image"] = [1.0, np.nan]
    rows[2]["author_id_conversions_1d"] = 5.0
    rows[3]["item_id"] = ""
    for row in rows:
        row["price"] = 100.0


def break_sequences(rows: list[Row]) -> None:
    rows[2]["seq_click"].reverse()
    rows[2]["seq_click"].append(rows[2]["seq_click"][0])
    rows[4]["seq_purchase"][0]["event_id"] = None


def break_requests(rows: list[Row]) -> None:
    rows[2]["seq_click"][-1]["ts"] = rows[2]["ts"]
    rows[3]["candidates"] = []
    rows[4]["candidates"][0]["item_id"] = "i1"
    for row in rows[6:]:
        row["user_id"] = None if row is rows[6] else "nobody"
        for candidate in row["candidates"]:
            candidate["item_id"] = f"{candidate['item_id']} of nobody"


def break_scores(rows: list[Row]) -> None:
    rows[1]["rank"] = 1
    rows[2]["ctcvr"] = 0.3
    rows[3]["model_version"] = "8"


BREAKS: dict[str, Callable[[list[Row]], None]] = {
    "impressions": break_impressions,
    "behaviors": break_behaviors,
    "user_features": break_users,
    "item_features": break_items,
    "behavior_sequences": break_sequences,
    "training_requests": break_requests,
    "candidate_scores": break_scores,
}
HERE = AuditSettings(max_quiet_hours=12.0)
THERE = AuditSettings(max_quiet_hours=12.0, max_rows_in_memory=ROWS - 1)


EVERY_CHANGE = ("impressions", "training_requests")
"""Tables whose valid days are judged twice at every change, too; a broken day asks all that a valid one does."""


@pytest.mark.parametrize(
    ("table", "state"),
    [
        pytest.param(
            table, state, marks=[pytest.mark.nightly] if state == "valid" and table not in EVERY_CHANGE else []
        )
        for table in SUITES
        for state in ("valid", "broken")
    ],
)
def test_spark_says_what_memory_says(table: str, state: str, lake: Lake, spark: SparkSession) -> None:
    """Both know days before and what the day was built from; ids with features are held here, and joined by Spark."""
    for back in (4, 3, 2, 1):
        ds = DS - timedelta(days=back)
        publish(lake, table, repeated(table, ROWS, ds), ds, distributions=usual_distributions(table))
    kinds, rows = FACTORIES[table]()
    if state == "broken":
        BREAKS[table](rows)
    inputs = publish_inputs(lake, INPUTS.get(table, {}))
    stage(lake, table, pa.Table.from_pylist(rows, schema=kinds), inputs=inputs)
    here = audit_staged(lake, audit_schema(), table, DS, settings=HERE)
    there = audit_staged(lake, audit_schema(), table, DS, spark, THERE)
    assert (here["engine"], there["engine"]) == ("pandas", "spark")
    assert here["passed"] == (state == "valid")
    assert len(here["findings"]) >= 3 if state == "broken" else here["findings"] == []
    assert here["rows_judged"]
    if table == "training_requests":
        unknown = {finding["column"] for finding in there["findings"]} & {"user_unknown", "candidates_unknown"}
        assert len(unknown) == (2 if state == "broken" else 0)
    told, expected = _comparable(there), _comparable(here)
    assert told.pop("findings") == expected.pop("findings")
    assert told == expected


def _comparable(verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict without what may differ: the engine, the time, and the order in which examples were met."""
    findings = [
        {**finding, "examples": sorted(str(sorted(row.items())) for row in finding["examples"])}
        for finding in verdict["findings"]
    ]
    return {**verdict, "findings": findings, "engine": "", "seconds": 0, "failure": ""}
