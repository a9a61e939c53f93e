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
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from expectations.audit import audit_staged
from jobs import behavior_sequences, behaviors, impressions
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import write_days
from jobs.workspace import Workspace
from onetrans.errors import BadDataError
from onetrans.schema import Feature, FeatureSchema, Sequence, hash64, load_schema
from onetrans.settings import AuditSettings, SourceSettings
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
        (as_json, {"epoch": "ms"}),
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


def test_a_column_of_json_lines_that_begins_late_is_read(spark: SparkSession, tmp_path: Path) -> None:
    """Dropped, every event would count as known at once."""
    own = {"user_id": "u", "item_id": "i", "type": "click"}
    rows = [{**own, "event_id": n, "ts": (NOON + timedelta(seconds=n)).isoformat()} for n in range(1200)]
    known = NOON + timedelta(hours=2)
    late = [{**row, "available_at": known.isoformat()} if n >= 1000 else row for n, row in enumerate(rows)]
    folder = tmp_path / "raw" / "behaviors" / f"ds={DS}"
    folder.mkdir(parents=True)
    (folder / "part.jsonl").write_text("\n".join(map(json.dumps, late)) + "\n")
    schema = replace(SCHEMA, derived_behaviors=(), features=SCHEMA.features[:-1])
    work = open_workspace(spark, tmp_path, schema, max_quarantine_share=0.0)
    publish(work, behaviors, DS)
    times = work.lake.read("behaviors", [DS], ("ts", "available_at")).to_pylist()
    assert sum(row["available_at"] == known for row in times) == 200
    assert sum(row["available_at"] == row["ts"] for row in times) == 1000


def test_a_column_that_no_line_has_is_missing(spark: SparkSession, tmp_path: Path) -> None:
    own = [{name: value for name, value in row.items() if name != "load"} for row in ROWS]
    as_json(tmp_path / "raw" / "impressions" / f"ds={DS}", own)
    with pytest.raises(BadDataError, match=f"impressions {DS}: column load is missing; there are request_id, "):
        impressions.build(open_workspace(spark, tmp_path, SCHEMA), DS)


def test_columns_nobody_reads_stop_no_day(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "impressions" / f"ds={DS}"
    as_parquet(folder, ROWS)
    table = pq.read_table(folder / "part-0.parquet")
    categories = table.set_column(4, "slot", table["slot"].cast(pa.string()).dictionary_encode())
    assert categories.schema.names == table.schema.names
    loaded = pa.array([1] * len(ROWS), pa.timestamp("ns"))
    half = len(ROWS) // 2
    pq.write_table(categories.append_column("loaded_at", loaded).slice(0, half), folder / "part-0.parquet")
    other = categories.append_column("loaded_at", pa.array(["then"] * len(ROWS)))
    pq.write_table(other.slice(half), folder / "part-1.parquet")
    work = open_workspace(spark, tmp_path, SCHEMA, max_quarantine_share=0.0)
    assert impressions.build(work, DS).rows == len(ROWS)


def test_a_column_of_csv_that_nobody_reads_may_stand_twice(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "impressions" / f"ds={DS}"
    as_csv(folder, ROWS)
    with gzip.open(folder / "part.csv.gz", "rt") as file:
        lines = file.read().splitlines()
    lines = [f"note,{line},note" if n == 0 else f"a,{line},b" for n, line in enumerate(lines)]
    lines[1] += ",too many"
    with gzip.open(folder / "part.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    staged = impressions.build(open_workspace(spark, tmp_path, SCHEMA, max_quarantine_share=0.5), DS)
    assert (staged.rows, staged.quarantined) == (len(ROWS) - 1, 1)


def test_one_column_may_be_read_under_two_names(spark: SparkSession, tmp_path: Path) -> None:
    as_parquet(tmp_path / "raw" / "impressions" / f"ds={DS}", ROWS)
    schema = replace(SCHEMA, columns={"impressions": {"position": "slot"}})
    publish(work := open_workspace(spark, tmp_path, schema), impressions, DS)
    rows = work.lake.read("impressions", [DS]).to_pylist()
    assert {(row["position"], row["slot"]) for row in rows} == {(1, "1"), (None, None)}


def test_a_folder_may_have_any_name(spark: SparkSession, tmp_path: Path) -> None:
    folder = tmp_path / "My Projects é 5%20"
    write_days(WorldConfig(users=50, items=50), str(folder / "raw"), WorldConfig().epoch, 1)
    work = open_workspace(spark, folder, load_schema(SourceSettings(path=str(folder / "raw"))))
    ds = WorldConfig().epoch
    staged = impressions.build(work, ds)
    assert audit_staged(work.lake, work.schema, "impressions", ds, spark=spark, settings=AuditSettings())["passed"]
    work.lake.publish("impressions", ds)
    assert work.read("impressions", [ds]).count() == work.lake.read("impressions").num_rows == staged.rows
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}
    assert {path.name for path in folder.iterdir()} == {"raw", "lake", "data_docs"}
