"""What is out of date, and why: late files, labels that matured, days built on an earlier version; what it says."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs import behavior_sequences, behaviors, impressions, item_features, training_requests, user_features
from jobs.figures import counts
from jobs.rebuild import LATE, MATURED, STALE, describe, outdated, rebuild
from jobs.rebuild import main as rebuild_main
from jobs.sources.files import Files
from jobs.workspace import Workspace
from onetrans import progress, storage
from onetrans.cli import main as cli
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_OK
from onetrans.lake import Lake, Staged
from onetrans.outdated import label_states, matured_days
from onetrans.schema import Feature, FeatureSchema, Sequence
from onetrans.settings import LakeSettings, Settings, SourceSettings, as_environment
from tests.raw_log import Row, open_workspace, publish, write_rows
from tests.worlds import write_schema

DS = date(2024, 2, 29)
NEXT = date(2024, 3, 1)
NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
SCHEMA = FeatureSchema(
    name="labels",
    timezone="Europe/Berlin",
    attribution_hours=48,
    features=(
        Feature("user", "user", "hashed", "user_id", hash_size=50),
        Feature("item", "item", "hashed", "item_id", hash_size=50),
        Feature("item_cvr", "item", "bucketized", "item_cvr_1d", boundaries=(0.1, 0.2)),
        Feature("event_item", "event", "hashed", "item_id", hash_size=50, embedding="item"),
    ),
    sequences=(Sequence("conversion", "conversion", max_length=3),),
    derived_behaviors=("conversion",),
)
CLOSES = datetime(2024, 3, 2, 23, tzinfo=UTC)  # the end of 29 February in Berlin, and 48 hours
NOW = datetime(2024, 3, 10, tzinfo=UTC)
JOBS = (impressions, behaviors, user_features, item_features, behavior_sequences, training_requests)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(LakeSettings(warehouse=str(tmp_path / "lake")))


def put(lake: Lake, table: str, ds: date, built_at: datetime | None, raw: str = "") -> None:
    """Publish a day whose manifest says when it was built, and from which files."""
    path = lake.new_stage_path(table, ds)
    storage.local_path(path).mkdir(parents=True)
    pq.write_table(pa.table({"ds": pa.array([ds])}), storage.local_path(path) / "part-0.parquet")
    staged = lake.mark_staged(Staged(table, ds, path, 1, raw=raw))
    lake.write_verdict(staged, {"passed": True})
    lake.publish(table, ds)
    manifest = storage.join(path, "_staged.json")
    if built_at is None:
        storage.delete_file(manifest)
    else:
        storage.write_json(manifest, {**staged.to_dict(), "created_at": built_at.isoformat()})


# Labels


@pytest.mark.parametrize(
    ("built_at", "now", "state"),
    [
        (CLOSES - timedelta(days=2), CLOSES - timedelta(seconds=1), "open"),
        (CLOSES - timedelta(seconds=1), CLOSES, "rebuild"),
        (CLOSES, CLOSES, "final"),
        (None, CLOSES, "unknown"),
    ],
)
def test_a_day_is_final_once_built_after_its_window_closed(
    lake: Lake, built_at: datetime | None, now: datetime, state: str
) -> None:
    put(lake, "impressions", DS, built_at)
    assert label_states(lake, SCHEMA, "impressions", now) == {DS: state}
    assert matured_days(lake, SCHEMA, now) == ([DS] if state == "rebuild" else [])


def test_a_request_is_as_final_as_the_impressions_it_shows(lake: Lake) -> None:
    put(lake, "impressions", DS, CLOSES - timedelta(days=1))
    put(lake, "training_requests", DS, CLOSES + timedelta(days=1))
    assert label_states(lake, SCHEMA, "training_requests", NOW) == {DS: "rebuild"}
    put(lake, "impressions", DS, CLOSES)
    assert label_states(lake, SCHEMA, "training_requests", NOW) == {DS: "final"}
    put(lake, "training_requests", DS, CLOSES - timedelta(days=1))
    assert label_states(lake, SCHEMA, "training_requests", NOW) == {DS: "rebuild"}


def test_without_a_window_labels_are_complete_when_the_day_is(lake: Lake) -> None:
    put(lake, "impressions", DS, datetime(2024, 2, 29, 23, tzinfo=UTC))
    schema = FeatureSchema(**{**vars(SCHEMA), "attribution_hours": 0.0})
    assert label_states(lake, schema, "impressions", NOW) == {DS: "final"}


Deploy = Callable[[FeatureSchema], None]


@pytest.fixture
def deploy(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deploy:
    """Makes the lake that of this process's settings."""

    def put_in_force(schema: FeatureSchema) -> None:
        write_schema(tmp_path / "raw" / "schema.toml", schema)
        settings = Settings(lake=lake.settings, source=SourceSettings(path=str(tmp_path / "raw")))
        for name, value in as_environment(settings).items():
            monkeypatch.setenv(name, value)

    return put_in_force


def test_the_list_of_days_says_which_are_final(lake: Lake, deploy: Deploy, capsys: pytest.CaptureFixture[str]) -> None:
    deploy(SCHEMA)
    today = datetime.now(UTC).date()
    put(lake, "impressions", DS, CLOSES)
    put(lake, "impressions", NEXT, CLOSES)
    put(lake, "impressions", today, datetime.now(UTC))
    assert cli(["lake", "impressions"]) == EXIT_OK
    final, closed, still_open = (line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[1:])
    assert (final, closed) == ("final", "closed, built before: python -m jobs.rebuild")
    assert still_open == f"open until {SCHEMA.labels_close(today):%Y-%m-%d %H:%M} UTC"
    assert cli(["lake"]) == EXIT_OK
    assert f"2024-03-01, {today}" in capsys.readouterr().out.splitlines()[1]


# Late files


def test_files_that_changed_after_the_build_are_noticed(lake: Lake, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    path = write_rows(raw / "impressions" / f"ds={DS}", [{"request_id": "r"}])
    write_rows(raw / "users", [{"user_id": "u"}])
    source = Files(str(raw), SCHEMA)
    assert source.stamp("users", DS) == "", "a snapshot of all days tells nothing of one"
    put(lake, "impressions", DS, CLOSES, raw=source.stamp("impressions", DS))
    put(lake, "impressions", NEXT, CLOSES + timedelta(days=1), raw="its files are gone since")
    assert outdated(lake, SCHEMA, source, NOW) == []
    path.with_name("_SUCCESS").touch()
    assert outdated(lake, SCHEMA, source, NOW) == [], "it is no data"
    write_rows(raw / "impressions" / f"ds={DS}" / "late", [{"request_id": "r2"}])
    (due,) = outdated(lake, SCHEMA, source, NOW)
    assert (due.ds, due.table, due.reason) == (DS, "impressions", LATE)
    put(lake, "impressions", DS, CLOSES, raw=source.stamp("impressions", DS))
    os.utime(path, (0, 0))
    assert len(outdated(lake, SCHEMA, source, NOW)) == 1, "rewritten with the same size"
    assert outdated(lake, SCHEMA, source, NOW, first=NEXT) == []
    assert outdated(lake, SCHEMA, source, NOW, last=DS - timedelta(days=1)) == []


def test_what_events_take_from_items_and_the_history_is_noticed(spark: SparkSession, tmp_path: Path) -> None:
    """A price that is corrected, and a history that comes later or is replaced, reach the events that were built."""
    price = Feature("price", "item", "bucketized", "price", boundaries=(1.0, 2.0))
    of_event = Feature("event_price", "event", "bucketized", "price", boundaries=(1.0, 2.0), embedding="price")
    schema = replace(SCHEMA, derived_behaviors=(), features=(*SCHEMA.features, price, of_event))
    raw = tmp_path / "raw"
    days = [DS, NEXT]
    for n, ds in enumerate(days):
        event = {"user_id": "u", "item_id": "i", "type": "conversion", "ts": NOON + timedelta(days=n)}
        write_rows(raw / "behaviors" / f"ds={ds}", [event])
        write_rows(raw / "items" / f"ds={ds}", [{"item_id": "i", "price": 1.0}])
    work = open_workspace(spark, tmp_path, schema)
    for ds in days:
        publish(work, behaviors, ds)

    def due() -> list[tuple[date, str, str]]:
        return [(one.ds, one.table, one.reason) for one in outdated(work.lake, schema, work.source, NOW)]

    def prices() -> dict[datetime, float]:
        publish(work, behaviors, due()[0][0])
        assert due() == []
        return {row["ts"]: row["price"] for row in work.lake.read("behaviors", days).to_pylist()}

    assert due() == []
    write_rows(raw / "items" / f"ds={NEXT}", [{"item_id": "i", "price": 2.0}, {"item_id": "other", "price": 2.0}])
    assert due() == [(NEXT, "behaviors", LATE)]
    assert prices() == {NOON: 1.0, NOON + timedelta(days=1): 2.0}
    for count in (1, 2):
        old = [
            {"user_id": "u", "item_id": "i", "type": "conversion", "ts": NOON - timedelta(days=n + 1)}
            for n in range(count)
        ]
        write_rows(raw / "behaviors" / "history", old)
        assert due() == [(DS, "behaviors", LATE)], "the history is taken in with the first day"
        assert len(prices()) == 2 + count


# The whole way


def shown(ds: date, late_conversion: bool) -> list[Row]:
    noon = NOON + (ds - DS)
    rows = [
        {"request_id": f"{ds}-{n}", "user_id": f"u{n % 3}", "item_id": f"i{n % 5}", "ts": noon, "click": 1,
         "conversion": 0, "conversion_at": None}
        for n in range(15)
    ]  # fmt: skip
    rows[0] |= {"conversion": 1, "conversion_at": noon + timedelta(hours=1)}
    if late_conversion:
        rows[1] |= {"conversion": 1, "conversion_at": noon + timedelta(hours=47)}
        rows[2] |= {"conversion": 1, "conversion_at": noon + timedelta(hours=49)}
    return rows


@pytest.fixture
def work(spark: SparkSession, tmp_path: Path) -> Workspace:
    return open_workspace(spark, tmp_path, SCHEMA)


def conversions(work: Workspace, table: str, ds: date) -> list[str]:
    rows = work.lake.read(table, [ds]).to_pylist()
    if table == "training_requests":
        return sorted(row["request_id"] for row in rows for c in row["candidates"] if c["conversion"])
    return sorted(row["request_id"] for row in rows if row["conversion"])


def test_labels_mature_and_reach_only_days_that_could_know_them(work: Workspace, tmp_path: Path) -> None:
    """The conversion of 47 hours is no label on the day, one when the day is built again, and known two days later."""
    raw, days = tmp_path / "raw", [DS + timedelta(days=n) for n in range(4)]
    write_rows(raw / "users", [{"user_id": f"u{n}"} for n in range(3)])
    write_rows(raw / "items", [{"item_id": f"i{n}"} for n in range(5)])
    for ds in days:
        write_rows(raw / "impressions" / f"ds={ds}", shown(ds, False))
        for job in JOBS if ds == DS else (impressions, item_features):
            publish(work, job, ds)
    before = work.lake.read("item_features", days).to_pylist()
    assert conversions(work, "impressions", DS) == [f"{DS}-0"]

    write_rows(raw / "impressions" / f"ds={DS}", shown(DS, True))
    due = outdated(work.lake, SCHEMA, work.source, NOW)
    assert [(one.ds, one.table) for one in due if one.reason == LATE] == [(DS, "impressions")]
    assert {one.reason for one in due} == {LATE, STALE}
    assert describe(due).startswith(f"impressions {DS}: {LATE}\nbehaviors {DS}: {STALE}\n")
    assert f"item_features {days[1]}..{days[3]}: {STALE}" in describe(due)
    rebuild(work, due, lambda work, table, ds: publish(work, {job.TABLE: job for job in JOBS}[table], ds))
    assert outdated(work.lake, SCHEMA, work.source, NOW) == []

    noon = shown(DS, True)[0]["ts"]
    known_at = {row["item_id"]: row["available_at"] for row in work.lake.read("behaviors", [DS]).to_pylist()}
    assert known_at == {"i0": noon + timedelta(hours=1), "i1": noon + timedelta(hours=47)}, "not before they came"
    untold = behaviors.derived(work.read("impressions", [DS]).drop("conversion_at"), SCHEMA)
    times = [row["available_at"].astimezone(UTC) for row in untold.collect()]
    assert times == [noon + timedelta(hours=48)] * 2, "not before the window closes"

    for table in ("impressions", "training_requests"):
        assert conversions(work, table, DS) == [f"{DS}-0", f"{DS}-1"], "the one of 49 hours came too late"
    features = [row for row in work.lake.read("item_features", days).to_pylist() if row["item_id"] == "i1"]
    known = {row["ds"]: row["item_conversions_7d"] for row in features}
    assert known == {DS: None, days[1]: 0.0, days[2]: 0.0, days[3]: 1.0}, "it came on 2 March, after that day's start"
    assert sorted(map(repr, work.lake.read("item_features", days[:3]).to_pylist())) == sorted(
        repr(row) for row in before if row["ds"] < days[3]
    )


@pytest.mark.parametrize("without", ["the column", "a time"])
def test_a_conversion_whose_time_is_not_said_is_known_when_its_window_closes(work: Workspace, without: str) -> None:
    """The window of 48 hours of 29 February closes on 2 March: a day that is built later must not know it earlier."""
    rows = [{**row, "ds": DS, "conversion_at": None} for row in shown(DS, True)]
    kind = "request_id string, user_id string, item_id string, ts timestamp, click int, conversion int, ds date"
    frame = work.spark.createDataFrame(rows, f"{kind}, conversion_at timestamp")
    frame = frame.drop("conversion_at") if without == "the column" else frame

    def counted(ds: date, schema: FeatureSchema = SCHEMA) -> int:
        return sum(row["conversions_7d"] for row in counts(frame, "item_id", ds, schema).collect())

    assert [counted(DS + timedelta(days=n)) for n in (1, 2, 3)] == [0, 0, 3]
    complete = replace(SCHEMA, attribution_hours=0.0)
    assert counted(NEXT, complete) == 3, "without a window labels are complete when the day is delivered"


def test_the_command_says_what_it_would_build_again(
    lake: Lake,
    deploy: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    deploy(SCHEMA)
    monkeypatch.setattr(progress, "SAID_AFTER_S", 0.0)
    caplog.set_level(logging.INFO)
    path = write_rows(tmp_path / "raw" / "impressions" / f"ds={DS}", [{"request_id": "r"}])
    source = Files(str(tmp_path / "raw"), SCHEMA)
    put(lake, "impressions", DS, CLOSES, raw=source.stamp("impressions", DS))
    assert rebuild_main(["--dry-run"]) == EXIT_OK
    assert capsys.readouterr().out == "every published day is up to date\n"
    assert any(text.startswith("looking for what is out of date: done in ") for text in caplog.messages)
    put(lake, "impressions", DS, CLOSES - timedelta(hours=1), raw=source.stamp("impressions", DS))
    put(lake, "impressions", NEXT, CLOSES + timedelta(days=5), raw="other files")
    before = lake.snapshot_id("impressions")
    write_rows(path.parent.with_name(f"ds={NEXT}"), [{"request_id": "r"}])
    assert rebuild_main(["--dry-run"]) == EXIT_OK
    assert capsys.readouterr().out == f"impressions {DS}: {MATURED}\nimpressions {NEXT}: {LATE}\n"
    assert rebuild_main(["--dry-run", "--from", str(NEXT)]) == EXIT_OK
    assert capsys.readouterr().out == f"impressions {NEXT}: {LATE}\n"
    assert rebuild_main(["--dry-run", "--from", str(NEXT), "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == [{"ds": str(NEXT), "table": "impressions", "reason": LATE}]
    assert rebuild_main(["--dry-run", "--from", str(NEXT), "--to", str(DS)]) == EXIT_BAD_CONFIG
    assert lake.snapshot_id("impressions") == before
