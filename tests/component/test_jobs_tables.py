"""The six tables against the oracle (G4), incremental against rebuilt (G5), built once and again (G6)."""

from __future__ import annotations

import statistics
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs import (
    backfill,
    behavior_sequences,
    behaviors,
    impressions,
    item_features,
    training_requests,
    user_features,
)
from jobs.runner import audit_and_publish, tell_stale
from jobs.workspace import Workspace
from onetrans.errors import EXIT_BAD_DATA, EXIT_OK, NotReadyError
from onetrans.lake import Lake
from onetrans.lineage import stale_days
from onetrans.schema import Feature, Sequence, hash64
from onetrans.settings import AuditSettings, SourceSettings, SparkSettings, as_environment
from tests import oracle
from tests.oracle import FIRST_DAY, SCHEMA, World, random_world
from tests.raw_log import open_workspace, publish, with_schema, write_rows
from tests.worlds import write_schema

JOBS = (impressions, behaviors, user_features, item_features, behavior_sequences, training_requests)
DAYS = [FIRST_DAY + timedelta(days=d) for d in range(3)]


@pytest.fixture(scope="module")
def world() -> World:
    return random_world(seed=7)


@pytest.fixture(scope="module")
def work(spark: SparkSession, world: World, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """All days of all tables, built and published in order."""
    folder = tmp_path_factory.mktemp("tables")
    write_world(world, folder / "raw")
    work = open_workspace(spark, folder, SCHEMA, max_quarantine_share=0.0)
    for ds in DAYS:
        for job in JOBS:
            publish(work, job, ds)
    return work


def write_world(world: World, raw: Path, days: list[date] | None = None) -> None:
    """Write a log, or some days of it: then what belongs to no day stays as it is."""
    for ds in world.days if days is None else days:
        write_rows(raw / "impressions" / f"ds={ds}", world.impressions[ds])
        if not world.schema.derived_behaviors:
            write_rows(raw / "behaviors" / f"ds={ds}", world.behaviors[ds])
        if world.items_by_day:
            write_rows(raw / "users" / f"ds={ds}", world.users_by_day[ds])
            write_rows(raw / "items" / f"ds={ds}", world.items_by_day[ds])
    if days is not None:
        return
    if world.history:
        write_rows(raw / "behaviors" / "history", world.history)
    if not world.items_by_day:
        write_rows(raw / "users", world.users)
        write_rows(raw / "items", world.items)


def rows_of(work: Workspace, table: str, ds: date) -> list[dict[str, Any]]:
    return work.lake.read(table, [ds]).to_pylist()


@pytest.mark.parametrize("ds", DAYS)
def test_impressions_are_those_of_the_oracle(work: Workspace, world: World, ds: date) -> None:
    def key(row: dict[str, Any]) -> tuple[str, str]:
        return row["request_id"], row["item_id"]

    assert sorted(rows_of(work, "impressions", ds), key=key) == sorted(oracle.impressions(world, ds), key=key)


@pytest.mark.parametrize("ds", DAYS)
def test_behaviors_are_those_of_the_oracle(work: Workspace, world: World, ds: date) -> None:
    def key(row: dict[str, Any]) -> int:
        return row["event_id"]

    assert sorted(rows_of(work, "behaviors", ds), key=key) == sorted(oracle.behaviors(world, ds), key=key)


@pytest.mark.parametrize("ds", DAYS)
def test_features_are_those_of_the_oracle(work: Workspace, world: World, ds: date) -> None:
    for table, key, expected in (
        ("user_features", "user_id", oracle.user_features(world, ds)),
        ("item_features", "item_id", oracle.item_features(world, ds)),
    ):
        found = {row.pop(key): row for row in rows_of(work, table, ds)}
        assert rounded(found) == rounded({name: {"ds": ds, **row} for name, row in expected.items()})


@pytest.mark.parametrize("ds", DAYS)
def test_tails_built_day_by_day_equal_a_rebuild_from_all_events(work: Workspace, world: World, ds: date) -> None:
    found = {row.pop("user_id"): row for row in rows_of(work, "behavior_sequences", ds)}
    assert {user: {**lists, "ds": ds} for user, lists in oracle.tails(world, ds).items()} == found


@pytest.mark.parametrize("ds", DAYS)
def test_requests_see_what_the_oracle_sees(work: Workspace, world: World, ds: date) -> None:
    expected = oracle.training_requests(world, ds)
    rows = rows_of(work, "training_requests", ds)
    assert len(rows) == len(expected)
    found = {row.pop("request_id"): row for row in rows}
    assert found.keys() == expected.keys()
    for name, row in found.items():
        shown = [candidate["item_id"] for candidate in row["candidates"]]
        assert shown == sorted(set(shown))
        row["candidates"] = {candidate.pop("item_id"): candidate for candidate in row["candidates"]}
        assert rounded(row) == rounded({"ds": ds, **expected[name]}), name


@pytest.mark.parametrize("ds", DAYS)
def test_requests_are_the_same_where_spark_writes_them_and_no_list_of_users_is_broadcast(
    work: Workspace, world: World, ds: date
) -> None:
    """So it is in an object store, and above ``FEW_IMPRESSIONS``."""
    frame = training_requests.training_requests(
        work.read("impressions", [ds]),
        work.read("user_features", [ds]),
        work.read("item_features", [ds]),
        behavior_sequences.yesterdays_tails(work, ds),
        work.read("behaviors", [ds]),
        work.schema,
        few=False,
    )
    found = {row["request_id"]: {"ds": ds, **row} for row in frame.toArrow().to_pylist()}
    assert found == {row["request_id"]: row for row in rows_of(work, "training_requests", ds)}


def test_the_world_holds_what_can_go_wrong(world: World) -> None:
    """Without these the tests above would prove little."""
    full, at_the_instant, unknown_yet, redelivered, without = 0, 0, 0, 0, 0
    for ds in DAYS:
        events = oracle.known_events(world, ds)
        redelivered += sum(len(oracle.behaviors(world, day)) for day in DAYS if day <= ds) - len(events)
        for row in oracle.training_requests(world, ds).values():
            own = [event for event in events if event["user_id"] == row["user_id"]]
            at_the_instant += any(event["available_at"] == row["ts"] for event in own)
            unknown_yet += any(event["ts"] < row["ts"] < event["available_at"] for event in own)
            full += len(row["seq_click"]) == SCHEMA.sequences[0].max_length
            without += not own
    assert min(full, at_the_instant, unknown_yet, redelivered, without) > 10


def test_a_schema_that_changes_its_events_goes_on_from_the_tails_there_are(
    spark: SparkSession, work: Workspace, world: World, tmp_path: Path
) -> None:
    """A feature is gone, one is new and stands first, a sequence is new; the days before know nothing of them."""
    before, after, next_day = DAYS
    kept = [f for f in SCHEMA.features if f.name not in ("event_price", "event_place")]
    new = Feature("event_kind", "event", "hashed", "type", hash_size=10)
    events = [f for f in SCHEMA.features if f.name == "event_place"]
    others = {row["type"] for rows in world.behaviors.values() for row in rows} - {s.event for s in SCHEMA.sequences}
    third = Sequence("third", min(others), max_length=2)
    schema = replace(SCHEMA, features=(new, *events, *kept), sequences=(third, *SCHEMA.sequences))
    write_world(world, tmp_path / "raw")
    own = open_workspace(spark, tmp_path, SCHEMA, max_quarantine_share=0.0)
    for job in JOBS:
        publish(own, job, before)
    own = with_schema(own, schema)
    for ds in (after, next_day):
        for job in JOBS:
            publish(own, job, ds)
    earlier = {event["event_id"] for event in oracle.behaviors(world, before)}
    delivered = {event["event_id"] for ds in (after, next_day) for event in oracle.behaviors(world, ds)}
    changed = replace(world, schema=schema)
    for ds in (after, next_day):
        rows = {row["user_id"]: row for row in rows_of(own, "behavior_sequences", ds)}
        seen_before, seen_since = 0, 0
        for user, lists in oracle.tails(changed, ds).items():
            for sequence in schema.sequences:
                found = rows[user][sequence.column] if user in rows else []
                old = [event for event in lists[sequence.column] if event["event_id"] in earlier]
                if sequence is third:
                    assert {event["event_id"] for event in found} <= delivered
                    continue
                assert [event["event_id"] for event in found] == [e["event_id"] for e in lists[sequence.column]]
                for event in found:
                    is_old = event["event_id"] in {e["event_id"] for e in old}
                    assert event["event_kind"] == (None if is_old else hash64(sequence.event))
                    seen_before, seen_since = seen_before + is_old, seen_since + (not is_old)
        assert seen_before
        assert seen_since
        requests = {row["request_id"]: row for row in rows_of(own, "training_requests", ds)}
        for name, row in oracle.training_requests(world, ds).items():
            for sequence in SCHEMA.sequences:
                told = [(e["ts"], e["event_item"], e["event_place"]) for e in requests[name][sequence.column]]
                assert told == [(e["ts"], e["event_item"], e["event_place"]) for e in row[sequence.column]]
        assert any(row["seq_third"] for row in requests.values())


def test_requests_lie_in_the_order_of_time(work: Workspace) -> None:
    for file in work.lake.files("training_requests", DAYS):
        times = pq.read_table(file.removeprefix("file://"), columns=["ts"])["ts"].to_pylist()
        assert times == sorted(times)


def test_a_day_built_again_is_the_same_day(work: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    """The day after it is then built on what the day was before, and is named."""
    ds = DAYS[1]
    assert stale_days(work.lake, after=date.min) == {}
    before = {job.TABLE: _as_text(rows_of(work, job.TABLE, ds)) for job in JOBS}
    files = {job.TABLE: work.lake.files(job.TABLE, [ds]) for job in JOBS}
    for job in JOBS:
        publish(work, job, ds)
    assert {job.TABLE: _as_text(rows_of(work, job.TABLE, ds)) for job in JOBS} == before
    assert all(set(work.lake.files(job.TABLE, [ds])).isdisjoint(files[job.TABLE]) for job in JOBS)
    tables = ("user_features", "item_features", "behavior_sequences", "training_requests")
    assert stale_days(work.lake, after=ds) == {table: [DAYS[2]] for table in tables}
    tell_stale(work, ds)
    assert caplog.messages[-1].endswith(
        "To build them again: python -m jobs.rebuild (with --dry-run it only names them)"
    )


def test_a_day_after_an_outage_is_built_on_the_day_before_it(
    spark: SparkSession, work: Workspace, world: World, tmp_path: Path
) -> None:
    before, lost, after = DAYS
    log = replace(
        world,
        impressions={ds: rows for ds, rows in world.impressions.items() if ds != lost},
        behaviors={ds: rows for ds, rows in world.behaviors.items() if ds != lost},
    )
    write_world(log, tmp_path / "raw")
    own = open_workspace(spark, tmp_path, SCHEMA, max_quarantine_share=0.0)
    for job in JOBS:
        own.lake.replace_partition(job.TABLE, {"ds": before}, work.lake.files(job.TABLE, [before]))
    with pytest.raises(NotReadyError, match=f"behavior_sequences {lost} is needed for {after}"):
        behavior_sequences.yesterdays_tails(own, after)
    own = replace(own, settings=replace(own.settings, source=replace(own.settings.source, absent_days=(lost,))))
    for job in JOBS:
        publish(own, job, after)
    tails = {row.pop("user_id"): row for row in rows_of(own, "behavior_sequences", after)}
    assert tails == {user: {**lists, "ds": after} for user, lists in oracle.tails(log, after).items()}
    assert tails != {row.pop("user_id"): row for row in rows_of(work, "behavior_sequences", after)}
    users = {row.pop("user_id"): row for row in rows_of(own, "user_features", after)}
    expected = oracle.user_features(log, after)
    assert rounded(users) == rounded({name: {"ds": after, **row} for name, row in expected.items()})
    found = {row["request_id"]: row["seq_click"] for row in rows_of(own, "training_requests", after)}
    assert found == {name: row["seq_click"] for name, row in oracle.training_requests(log, after).items()}


def test_a_job_that_publishes_tells_what_the_audit_warns_of(
    work: Workspace, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    ds = DAYS[2]
    strict = replace(work.settings, audit=AuditSettings(data_docs=str(tmp_path), min_row_share=1.0, max_row_share=1.0))
    user_features.build(work, ds)
    lake = work.lake
    usual = statistics.median(day.rows for day in lake.published("user_features") if day.ds < ds)
    assert lake.staged("user_features", ds).rows != usual, "or there is nothing to warn of"
    audit_and_publish(replace(work, settings=strict), "user_features", ds)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "expectations.audit"]
    assert warning.startswith(f"user_features {ds}: the table: expected that ")


def test_a_hole_before_a_day_is_named(work: Workspace) -> None:
    after_a_hole = DAYS[-1] + timedelta(days=2)
    with pytest.raises(NotReadyError, match=f"behavior_sequences {DAYS[-1] + timedelta(days=1)} is needed for"):
        behavior_sequences.yesterdays_tails(work, after_a_hole)
    with pytest.raises(NotReadyError, match=f"impressions {DAYS[-1] + timedelta(days=1)} is needed for"):
        work.window("impressions", after_a_hole, 7)


def test_a_window_that_begins_before_the_log_is_short(work: Workspace) -> None:
    assert work.window("impressions", DAYS[2], 7) == DAYS[:2]
    assert work.window("impressions", DAYS[0], 7) == []


@pytest.mark.nightly
def test_a_range_in_one_session_equals_day_by_day(
    work: Workspace, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A day that fails stops the range and leaves the days before it published; run again, only the rest is built."""
    write_world(world, tmp_path / "raw")
    write_schema(tmp_path / "raw" / "schema.toml", SCHEMA)
    settings = replace(
        work.settings,
        source=SourceSettings(path=str(tmp_path / "raw")),
        lake=replace(work.settings.lake, warehouse=str(tmp_path / "lake")),
        audit=AuditSettings(data_docs=str(tmp_path / "docs")),
        spark=SparkSettings(shuffle_partitions=2),
    )
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    stopped: list[SparkSession] = []
    monkeypatch.setattr(SparkSession, "stop", lambda session: stopped.append(session))  # it is the session of all tests
    lake = Lake(settings.lake)
    days: dict[str, list[date]] = {}

    def backfill_all(*more: str) -> int:
        stopped.clear()
        code = backfill.main(["--from", str(DAYS[0]), "--to", str(DAYS[2]), *more])
        assert stopped == [work.spark], "one session for the whole range"
        days.update({job.TABLE: lake.days(job.TABLE) for job in JOBS})
        return code

    (bad,) = (tmp_path / "raw" / "behaviors" / f"ds={DAYS[1]}").glob("*.parquet")
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-100])
    assert backfill_all() == EXIT_BAD_DATA
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"BadDataError: behaviors {DAYS[1]}: file ")
    assert days == {job.TABLE: DAYS[:1] for job in JOBS} | {"impressions": DAYS[:2]}, "the table before it of that day"

    bad.write_bytes(whole)
    first = {job.TABLE: lake.files(job.TABLE, DAYS[:1]) for job in JOBS}
    assert backfill_all("--skip-published") == EXIT_OK
    assert days == {job.TABLE: DAYS for job in JOBS}
    assert {job.TABLE: lake.files(job.TABLE, DAYS[:1]) for job in JOBS} == first, "a whole day is left alone"
    for table in days:
        for ds in DAYS:
            assert _as_text(rounded(lake.read(table, [ds]).to_pylist())) == _as_text(rounded(rows_of(work, table, ds)))

    snapshots = {table: lake.snapshot_id(table) for table in days}
    assert backfill_all("--skip-published") == EXIT_OK
    assert {table: lake.snapshot_id(table) for table in days} == snapshots


def rounded(value: Any) -> Any:
    """Return rows with their numbers rounded, since a rate's last bit depends on the order of a division."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 10) if isinstance(value, float) else value


def _as_text(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(map(repr, rows))
