"""Refused rows whole: every column of their file; listed, shown, repaired by hand and replayed, as often as built."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from jobs import behaviors, impressions, item_features
from jobs.quarantine import read_repairs
from jobs.rebuild import LATE, outdated
from jobs.sources.files import Files
from jobs.workspace import REPAIRED, Workspace
from onetrans.cli import main as cli
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_OK, BadConfigError
from onetrans.lake import Lake, Repair
from onetrans.schema import Feature, FeatureSchema, Sequence
from onetrans.settings import AuditSettings, SourceSettings, SparkSettings, as_environment
from tests.raw_log import Row, open_workspace, publish, write_rows

DS = date(2024, 2, 29)
NOON = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)
SCHEMA = FeatureSchema(
    name="quarantine",
    features=(
        Feature("user", "user", "hashed", "user_id", hash_size=50),
        Feature("item", "item", "hashed", "item_id", hash_size=50),
        Feature("image", "item", "vector", "image", dim=2),
        Feature("event_item", "event", "hashed", "item_id", hash_size=50, embedding="item"),
    ),
    sequences=(Sequence("click", "click", max_length=3),),
    columns={"impressions": {"item_id": "sku"}},
)
KINDS = {"campaign": pa.int64(), "seen_at": pa.timestamp("ms")}


def shown(count: int = 100) -> list[Row]:
    """Impressions whose files know more than the jobs read, under a name of their own."""
    return [
        {"request_id": f"r{n}", "user_id": f"u{n % 9}", "sku": f"i{n % 7}", "ts": NOON, "position": None,
         "click": int(n % 3 > 0), "conversion": int(n % 6 == 1), "campaign": 1000 + n,
         "seen_at": NOON.replace(tzinfo=None), "note": None}
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def work(spark: SparkSession, tmp_path: Path) -> Workspace:
    return open_workspace(spark, tmp_path, SCHEMA)


def kept(work: Workspace, table: str = "impressions") -> list[Row]:
    return [row for row in work.lake.read("quarantine", [DS]).to_pylist() if row["table_name"] == table]


def test_a_refused_row_is_kept_whole_with_its_file(work: Workspace, tmp_path: Path) -> None:
    rows = shown()
    rows[3] |= {"click": 0, "conversion": 1}
    path = write_rows(tmp_path / "raw" / "impressions" / f"ds={DS}", rows, KINDS)
    impressions.build(work, DS)
    (row,) = kept(work)
    assert (row["reason"], row["file"]) == ("conversion: 1 without a click", f"file://{path}")
    assert json.loads(row["raw"]) == {
        "request_id": "r3", "user_id": "u3", "sku": "i3", "ts": "2024-02-29T12:00:00.123456Z", "position": None,
        "click": 0, "conversion": 1, "campaign": 1003, "seen_at": "2024-02-29T12:00:00.123000", "note": None,
    }  # fmt: skip


def test_as_many_copies_are_kept_as_were_refused(work: Workspace, tmp_path: Path) -> None:
    """Two rows that the jobs cannot tell apart differ in what they do not read."""
    rows = shown()
    bad = {**rows[0], "user_id": None}
    rows += [{**bad, "campaign": 1}, {**bad, "campaign": 2}]
    write_rows(tmp_path / "raw" / "impressions" / f"ds={DS}", rows, KINDS)
    assert impressions.build(work, DS).quarantined == 2
    assert sorted(json.loads(row["raw"])["campaign"] for row in kept(work)) == [1, 2]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rows_of_text_files_are_kept_whole(work: Workspace, tmp_path: Path, ending: str) -> None:
    rows: list[Row] = [{**row, "ts": row["ts"].isoformat(), "seen_at": "then"} for row in shown()]
    rows[5]["click"] = "perhaps"
    folder = tmp_path / "raw" / "impressions" / f"ds={DS}"
    folder.mkdir(parents=True)
    if ending == "csv":
        with (folder / "part.csv").open("w") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / "part.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    impressions.build(work, DS)
    (row,) = kept(work)
    found = json.loads(row["raw"])
    assert (found["click"], found["campaign"], found["sku"], found["seen_at"]) == ("perhaps", "1005", "i5", "then")


def test_what_stops_no_day_stops_no_look_at_its_rows(work: Workspace, tmp_path: Path) -> None:
    """Columns nobody reads may be of a type that Spark has not, or of another in each file."""
    folder = tmp_path / "raw" / "impressions" / f"ds={DS}"
    rows = shown()
    rows[0]["click"] = 7
    first = write_rows(folder, rows[:50], {**KINDS, "note": pa.int64(), "seen_at": pa.timestamp("ns")})
    first.rename(first.with_name("part-1.parquet"))
    write_rows(folder, rows[50:], {**KINDS, "note": pa.string(), "seen_at": pa.timestamp("ns")})
    impressions.build(work, DS)
    (row,) = kept(work)
    assert json.loads(row["raw"])["campaign"] == 1000


# Repairs


@pytest.fixture
def deployed(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The workspace as the settings of this process name it; the session is that of all tests."""
    settings = replace(
        work.settings,
        source=SourceSettings(path=str(tmp_path / "raw")),
        spark=SparkSettings(shuffle_partitions=2),
        audit=AuditSettings(max_quiet_hours=24),
    )
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(SparkSession, "stop", lambda session: None)
    features = "".join(
        f'[[features]]\nname = "{f.name}"\nside = "{f.side}"\nkind = "{f.kind}"\ncolumn = "{f.column}"\n'
        + (f"dim = {f.dim}\n" if f.dim else f'hash_size = {f.hash_size}\nembedding = "{f.embedding}"\n')
        for f in SCHEMA.features
    )
    text = f'name = "q"\n[columns.impressions]\nitem_id = "sku"\n{features}'
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw" / "schema.toml").write_text(
        text + '[[sequences]]\nname = "click"\nevent = "click"\nmax_length = 3\n'
    )
    return work


def edit(path: Path, **changes: Any) -> None:
    """Change the rows of a file of refused rows: per request id its new values, or None to leave it out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change = changes.get(line["row"]["request_id"], {})
        line["row"] = None if change is None else {**line["row"], **change}
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_the_whole_way_of_a_refused_row(
    deployed: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shown(100)
    for row in rows[:4]:
        row["click"] = 7
    write_rows(tmp_path / "raw" / "impressions" / f"ds={DS}", rows, KINDS)
    assert impressions.main("impressions", impressions.build, ["--ds", str(DS), "--publish"]) == EXIT_BAD_DATA
    assert "4 of 100 rows (4.0 %) were refused" in capsys.readouterr().err
    assert cli(["quarantine", "list"]) == EXIT_OK
    assert capsys.readouterr().out == f"{DS}  impressions            4  click: not 0 or 1\n"
    file = tmp_path / "refused.jsonl"
    assert cli(["quarantine", "show", "impressions", "--ds", str(DS), "--limit", "1"]) == EXIT_OK
    assert "... and 3 more" in capsys.readouterr().out
    assert cli(["quarantine", "show", "impressions", "--ds", str(DS), "--out", str(file)]) == EXIT_OK

    replay = ["quarantine", "replay", "impressions", "--ds", str(DS), "--rows", str(file)]
    assert cli(replay) == EXIT_BAD_CONFIG, "nothing was changed yet"
    edit(file, r0={"click": 1}, r1={"click": 0, "conversion": 0, "sku": "other"}, r2=None, r3={"click": 5})
    capsys.readouterr()
    assert cli(replay) == EXIT_OK
    told = capsys.readouterr().out
    assert f"impressions {DS}: published with 3 repaired rows, 1 left out; 1 of 4 are still refused" in told
    published = {row["request_id"]: row for row in deployed.lake.read("impressions", [DS]).to_pylist()}
    assert published.keys() == {row["request_id"] for row in rows} - {"r2", "r3"}
    assert (published["r0"]["click"], published["r0"]["ts"]) == (1, NOON), "to the microsecond"
    assert (published["r1"]["click"], published["r1"]["item_id"]) == (0, "other")

    (again,) = kept(deployed)
    assert (again["file"], json.loads(again["raw"])["campaign"]) == (REPAIRED, 1003)
    assert cli(["quarantine", "show", "impressions", "--ds", str(DS), "--out", str(file)]) == EXIT_OK
    edit(file, r3={"click": 1})
    capsys.readouterr()
    assert cli([*replay, "--json"]) == EXIT_OK, "a repaired row that was refused can be repaired again"
    assert json.loads(capsys.readouterr().out) == {
        "table": "impressions", "ds": str(DS), "repaired": 1, "left_out": 0, "refused_before": 1, "refused": 0,
    }  # fmt: skip
    assert deployed.lake.repairs("impressions", DS)[3].repaired.count('"click":1') == 1
    assert {row["request_id"] for row in deployed.lake.read("impressions", [DS]).to_pylist()} == published.keys() | {
        "r3"
    }
    publish(deployed, impressions, DS)
    assert deployed.lake.read("impressions", [DS]).num_rows == 99, "building the day again gives the same rows"
    assert kept(deployed) == []


def test_repairs_that_were_not_built_yet_are_noticed(work: Workspace, tmp_path: Path) -> None:
    rows = shown()
    rows[0]["click"] = 7
    write_rows(tmp_path / "raw" / "impressions" / f"ds={DS}", rows, KINDS)
    publish(work, impressions, DS)
    now = datetime(2024, 4, 1, tzinfo=UTC)
    assert outdated(work.lake, SCHEMA, work.source, now) == []
    work.lake.add_repairs("impressions", DS, [Repair(kept(work)[0]["raw"], None)])
    (due,) = outdated(work.lake, SCHEMA, work.source, now)
    assert due.reason == LATE
    publish(work, impressions, DS)
    assert outdated(work.lake, SCHEMA, work.source, now) == []
    assert kept(work) == []


def test_events_of_the_history_and_items_of_the_snapshot(work: Workspace, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    events = [{"user_id": "u", "item_id": f"i{n}", "type": "click", "ts": NOON, "from": "app"} for n in range(99)]
    early = [{**event, "ts": NOON - timedelta(days=2), "from": "archive"} for event in events]
    early[0]["item_id"] = ""
    write_rows(raw / "behaviors" / f"ds={DS}", events)
    write_rows(raw / "behaviors" / "history", early)
    items = [{"item_id": f"i{n}", "image": [0.5, 1.0], "title": "a coat"} for n in range(99)]
    items[7]["image"] = [0.5]
    write_rows(raw / "items", items)
    behaviors.build(work, DS)
    (event,) = kept(work, "behaviors")
    assert (event["reason"], json.loads(event["raw"])["from"]) == ("item_id: missing", "archive")
    row = {**json.loads(event["raw"]), "item_id": "late"}
    work.lake.add_repairs("behaviors", DS, [Repair(event["raw"], json.dumps(row))])
    publish(work, behaviors, DS)
    found = work.lake.read("behaviors", [DS]).to_pylist()
    assert len(found) == 198, "the repaired row stands in the history, and there alone"
    assert [event["ts"] for event in found if event["item_id"] == "late"] == [NOON - timedelta(days=2)]
    assert kept(work, "behaviors") == []
    item_features.build(work, DS)
    (item,) = kept(work, "item_features")
    assert json.loads(item["raw"]) == {"item_id": "i7", "image": [0.5], "title": "a coat"}
    work.lake.add_repairs("items", DS, [Repair(item["raw"], json.dumps({"item_id": "i7", "image": [0.5, 2.0]}))])
    publish(work, item_features, DS)
    repaired = next(row for row in work.lake.read("item_features", [DS]).to_pylist() if row["item_id"] == "i7")
    assert repaired["image"] == [0.5, 2.0]
    assert kept(work, "item_features") == []


# What a file of repairs may say


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"line 1 is not JSON"),
        ("[]", r"line 1: not a line that `onetrans quarantine show --out` wrote"),
        ('{"refused": "{\\"a\\": 2}", "row": {}}', r"line 1: impressions has not refused this row, or no longer"),
        ('\n{"refused": "{\\"a\\": 1}", "row": 5}', r"line 2: row is int; expected an object, or null"),
        ('{"refused": "{\\"a\\": 1}", "row": {"a": 1}}', r"no row differs from the refused one"),
    ],
)
def test_a_wrong_file_of_repairs_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(BadConfigError, match=message):
        read_repairs(path, {'{"a": 1}'}, "impressions")


def test_rows_that_a_source_makes_cannot_be_replaced(
    deployed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shown()
    rows[0]["click"] = 7
    write_rows(tmp_path / "raw" / "impressions" / f"ds={DS}", rows, KINDS)
    impressions.build(deployed, DS)
    file = tmp_path / "refused.jsonl"
    assert cli(["quarantine", "show", "impressions", "--ds", str(DS), "--out", str(file)]) == EXIT_OK
    edit(file, r0={"click": 1})
    monkeypatch.setattr(Files, "whole", lambda *_: None)
    assert cli(["quarantine", "replay", "impressions", "--ds", str(DS), "--rows", str(file)]) == EXIT_BAD_CONFIG
    assert "rows of this source are made, not read" in capsys.readouterr().err
    assert Lake(deployed.settings.lake).repairs("impressions", DS) == []
