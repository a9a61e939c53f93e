"""One log in every format says the same; times without an offset, renamed columns, derived behaviours."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from jobs import behavior_sequences, behaviors, impressions
from jobs.workspace import Workspace
from onetrans.errors import BadDataError
from onetrans.schema import Feature, FeatureSchema, Sequence, hash64
from tests.raw_log import Row, open_workspace, publish, write_rows

DS = date(2024, 2, 29)
NOON = datetime(2024, 2, 29, 4, 0, 0, 250_000, tzinfo=UTC)  # in Shanghai
SCHEMA = FeatureSchema(
    name="formats",
    timezone="Asia/Shanghai",
    features=(
        Feature("user", "user", "hashed", "user_id", hash_size=50),
        Feature("item", "item", "hashed", "item_id", hash_size=50),
        Feature("slot", "context", "hashed", "slot", hash_size=10),
        Feature("load", "context", "bucketized", "load", boundaries=(1.0,)),
        Feature("scene", "context", "vector", "scene", dim=2),
        Feature("event_item", "event", "hashed", "item_id", hash_size=50, embedding="item"),
        Feature("event_slot", "event", "hashed", "slot", hash_size=10, embedding="slot"),
    ),
    sequences=(Sequence("click", "click", max_length=3), Sequence("conversion", "conversion", max_length=3)),
    derived_behaviors=("click", "conversion"),
    outcome_delay_minutes=10,
)
ROWS: list[Row] = [
    {
        "request_id": f"r{n // 2}",
        "user_id": str(n % 3),
        "item_id": f'i "{n}", quoted',
        "ts": NOON + timedelta(minutes=n // 2),
        "slot": n % 2 or None,
        "load": 0.5 * n if n % 3 else None,
        "scene": [0.5 * n, -1e-3] if n % 4 else None,
        "click": int(n % 2 == 0),
        "conversion": int(n % 4 == 0),
    }
    for n in range(12)
]
for row in ROWS:
    row["user_id"] = row["request_id"].replace("r", "u")


RENAMED = {"ts": "shown", "item_id": "sku"}


def local_text(ts: datetime) -> str:
    return (ts.replace(tzinfo=None) + timedelta(hours=8)).isoformat(sep=" ")


def millis(ts: datetime) -> int:
    return round(ts.timestamp() * 1000)


def as_parquet(folder: Path, rows: list[Row]) -> None:
    write_rows(folder, rows, {"slot": pa.int64(), "load": pa.float64()})


def as_parquet_without_a_zone(folder: Path, rows: list[Row]) -> None:
    local = [{**row, "ts": row["ts"].replace(tzinfo=None) + timedelta(hours=8)} for row in rows]
    write_rows(folder, local, {"slot": pa.int64(), "load": pa.float64(), "ts": pa.timestamp("ms")})


def as_parquet_with_lists_of_fixed_size(folder: Path, rows: list[Row]) -> None:
    write_rows(folder, rows, {"slot": pa.int64(), "load": pa.float64(), "scene": pa.list_(pa.float32(), 2)})


def as_csv(folder: Path, rows: list[Row]) -> None:
    def cell(value: Any) -> str:
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"' if '"' in text or "," in text else text

    folder.mkdir(parents=True)
    lines = [",".join(rows[0]), *(",".join(cell(v) for v in {**r, "ts": local_text(r["ts"])}.values()) for r in rows)]
    with gzip.open(folder / "part.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")


def as_json(folder: Path, rows: list[Row]) -> None:
    folder.mkdir(parents=True)
    present = [{k: v for k, v in {**row, "ts": row["ts"].isoformat()}.items() if v is not None} for row in rows]
    (folder / "part.jsonl").write_text("\n".join(map(json.dumps, present)) + "\n")


def as_json_with_epochs(folder: Path, rows: list[Row]) -> None:
    folder.mkdir(parents=True)
    (folder / "part.json").write_text("\n".join(json.dumps({**row, "ts": millis(row["ts"])}) for row in rows) + "\n")


def as_renamed_parquet_with_epochs(folder: Path, rows: list[Row]) -> None:
    own = [{RENAMED.get(name, name): value for name, value in row.items()} for row in rows]
    for row in own:
        row["shown"] = millis(row["shown"])
    write_rows(folder, own, {"slot": pa.int64(), "load": pa.float64(), "shown": pa.int64()})


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (as_parquet, {}),
        (as_parquet_without_a_zone, {}),
        (as_parquet_with_lists_of_fixed_size, {}),
        (as_csv, {}),
        (as_json, {}),
        (as_json_with_epochs, {"epoch": "ms"}),
        (
            as_renamed_parquet_with_epochs,
            {"epoch": "ms", "columns": {"impressions": {"ts": "shown", "item_id": "sku"}}},
        ),
    ],
)
def test_every_format_says_the_same(spark: SparkSession, tmp_path: Path, write: Any, changes: dict[str, Any]) -> None:
    write(tmp_path / "raw" / "impressions" / f"ds={DS}", ROWS)
    work = open_workspace(spark, tmp_path, replace(SCHEMA, **changes), max_quarantine_share=0.0)
    publish(work, impressions, DS)
    found = sorted(work.lake.read("impressions", [DS]).to_pylist(), key=lambda row: row["item_id"])
    expected = [
        {
            "ds": DS,
            **row,
            "position": None,
            "slot": None if row["slot"] is None else str(row["slot"]),
            "scene": None if row["scene"] is None else [float(np.float32(number)) for number in row["scene"]],
        }
        for row in ROWS
    ]
    assert found == sorted(expected, key=lambda row: row["item_id"])


@pytest.fixture(scope="module")
def work(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A log without behaviours of its own."""
    folder = tmp_path_factory.mktemp("derived")
    as_parquet(folder / "raw" / "impressions" / f"ds={DS}", ROWS)
    work = open_workspace(spark, folder, SCHEMA, max_quarantine_share=0.0)
    for job in (impressions, behaviors, behavior_sequences):
        publish(work, job, DS)
    return work


def test_behaviours_are_derived_from_impressions(work: Workspace) -> None:
    found = {(r["item_id"], r["type"]): r for r in work.lake.read("behaviors", [DS]).to_pylist()}
    clicks = {(row["item_id"], "click") for row in ROWS if row["click"]}
    conversions = {(row["item_id"], "conversion") for row in ROWS if row["conversion"]}
    assert found.keys() == clicks | conversions
    for row in ROWS:
        if row["click"]:
            event = found[row["item_id"], "click"]
            assert (event["user_id"], event["ts"]) == (row["user_id"], row["ts"])
            assert event["available_at"] == row["ts"] + timedelta(minutes=10)
            assert event["slot"] == (None if row["slot"] is None else str(row["slot"]))
            assert event["event_id"] == hash64(f"{row['request_id']}|{row['item_id']}|click")


def test_a_day_without_a_declared_event_is_an_error(work: Workspace) -> None:
    other = replace(SCHEMA, sequences=(Sequence("cart", "cart", max_length=3),))
    with pytest.raises(BadDataError, match=f"behavior_sequences {DS}: no row is left"):
        behavior_sequences.build(replace(work, schema=other), DS)
