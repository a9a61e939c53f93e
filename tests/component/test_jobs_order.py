"""The order of the DAG's tables against what the jobs read: a table waits for every other whose same day it reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

# Airflow writes a configuration file into its home as soon as it is imported.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))

from dags.feature_tables import dag
from jobs import behavior_sequences, behaviors, impressions, item_features, training_requests, user_features
from onetrans.lake import Lake
from onetrans.schema import Feature, FeatureSchema
from onetrans.schema import Sequence as EventSequence
from tests.raw_log import Row, open_workspace, publish, with_schema, write_rows

JOBS = (impressions, behaviors, user_features, item_features, behavior_sequences, training_requests)
DS = date(2024, 2, 29)
OWN = FeatureSchema(
    name="order",
    features=(
        Feature("user", "user", "hashed", "user_id", hash_size=50),
        Feature("item", "item", "hashed", "item_id", hash_size=50),
        Feature("event_item", "event", "hashed", "item_id", hash_size=50, embedding="item"),
    ),
    sequences=(EventSequence("click", "click", max_length=3),),
)
DERIVED = replace(OWN, derived_behaviors=("click",))


def waits_for(task_id: str) -> set[str]:
    """Return the tables whose publication lies before a task, at any distance."""
    above: set[str] = set()
    waiting = [task_id]
    while waiting:
        for other in dag.get_task(waiting.pop()).upstream_task_ids - above:
            above.add(other)
            waiting.append(other)
    return {task_id.removesuffix(".publish") for task_id in above if task_id.endswith(".publish")}


def write_log(raw: Path) -> None:
    noon = datetime(DS.year, DS.month, DS.day, 12, tzinfo=UTC)
    shown: list[Row] = [
        {"request_id": f"r{n}", "user_id": f"u{n}", "item_id": f"i{n}", "ts": noon, "click": 1, "conversion": 0}
        for n in range(4)
    ]
    happened = [
        {"user_id": f"u{n}", "item_id": f"i{n}", "type": "click", "ts": noon - timedelta(hours=1)} for n in range(4)
    ]
    write_rows(raw / "impressions" / f"ds={DS}", shown)
    write_rows(raw / "behaviors" / f"ds={DS}", happened)
    write_rows(raw / "users", [{"user_id": f"u{n}"} for n in range(4)])
    write_rows(raw / "items", [{"item_id": f"i{n}"} for n in range(4)])


@pytest.mark.parametrize("schema", [OWN, DERIVED], ids=["own behaviours", "derived behaviours"])
def test_a_table_waits_for_every_table_whose_same_day_it_reads(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: FeatureSchema
) -> None:
    """Without the wait a re-run of a day takes the old rows of what it reads, and nobody sees it."""
    write_log(tmp_path / "raw")
    work = with_schema(open_workspace(spark, tmp_path, OWN), schema)
    read: list[tuple[str, date]] = []
    files = Lake.files

    def watched(lake: Lake, table: str, days: Sequence[date], *rest: Any) -> list[str]:
        read.extend((table, day) for day in days)
        return files(lake, table, days, *rest)

    monkeypatch.setattr(Lake, "files", watched)
    same_day: dict[str, set[str]] = {}
    for job in JOBS:
        read.clear()
        publish(work, job, DS)
        same_day[job.TABLE] = {table for table, day in read if day == DS}
    assert same_day["training_requests"] == {"impressions", "behaviors", "user_features", "item_features"}
    for table, needed in same_day.items():
        assert needed <= waits_for(f"{table}.build"), table
