"""The KuaiRand adapter on a small log in both layouts; on the real files where they are."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from jobs import behavior_sequences, behaviors, impressions, item_features, training_requests, user_features
from jobs.contract import user_columns
from jobs.sources.kuairand import KuaiRand
from jobs.sources.reading import UNREADABLE
from jobs.workspace import Workspace
from onetrans.errors import BadConfigError, BadDataError
from onetrans.lake import Lake
from onetrans.schema import hash64, load_schema
from onetrans.settings import LakeSettings, Settings, SourceSettings
from tests.raw_log import publish

DS = date(2022, 5, 4)
BEFORE = date(2022, 5, 3)
SCHEMA = load_schema(SourceSettings(kind="kuairand", path="nowhere"))
NOON = int(datetime(2022, 5, 4, 4, tzinfo=UTC).timestamp() * 1000)  # in Shanghai
REAL = Path(os.environ.get("DATA") or Path(__file__).parents[3] / "shared" / "data" / "kuairand_pure")

Row = dict[str, Any]


def row(user: int, video: int, time_ms: int, day: date = DS, **values: Any) -> Row:
    usual = {"hourmin": 1200, "is_click": 0, "is_like": 0, "long_view": 0, "play_time_ms": 0, "duration_ms": 10_000}
    key = {"user_id": user, "video_id": video, "date": int(f"{day:%Y%m%d}"), "time_ms": time_ms}
    return {**key, "tab": 1, **usual, **values}


LOG = [
    row(1, 10, NOON, is_click=1, long_view=1, play_time_ms=5_000),
    row(1, 11, NOON + 30_000, is_like=1, long_view=1),  # within the gap: the same request; a view without a click
    row(1, 11, NOON + 30_000, hourmin=1300, is_click=1),  # a copy with other feedback
    row(1, 10, NOON + 80_000, tab=1),  # shown again in the same request
    row(1, 12, NOON + 200_000),  # after the gap
    row(1, 13, NOON + 200_000, tab=4, is_click=1, is_like=1),  # another tab
    row(2, 10, NOON),
    row(3, 10, NOON - 12 * 3_600_000 - 60_000),  # a minute before midnight: also in the day before
    row(3, 10, NOON - 12 * 3_600_000 - 60_000, day=BEFORE),
    row(3, 11, NOON - 20 * 3_600_000, day=BEFORE),
]
USERS = [{**dict.fromkeys(user_columns(SCHEMA), 1), "user_id": u} for u in (1, 2)]
VIDEOS = [
    {"video_id": v, "author_id": 7, "video_type": "NORMAL", "upload_type": "Web", "music_type": 9.0, "tag": "39,68",
     "video_duration": 10_000.0, "server_width": 720.0, "server_height": 1280.0}
    for v in (10, 11, 12)
]  # fmt: skip


def write(folder: Path, official: bool) -> KuaiRand:
    if official:
        folder = folder / "data"
    folder.mkdir(parents=True)
    for name, rows in (("user_features_pure.csv", USERS), ("video_features_basic_pure.csv", VIDEOS)):
        pa.csv.write_csv(pa.Table.from_pylist(rows), folder / name)
    if official:
        pa.csv.write_csv(pa.Table.from_pylist(LOG[:5]), folder / "log_standard_4_08_to_4_21_pure.csv")
        pa.csv.write_csv(pa.Table.from_pylist(LOG[5:]), folder / "log_standard_4_22_to_5_08_pure.csv")
        return KuaiRand(str(folder.parent), SCHEMA)
    for day in (BEFORE, DS):
        rows = [r for r in LOG if r["date"] == int(f"{day:%Y%m%d}")]
        (folder / "daily" / f"date={day:%Y%m%d}").mkdir(parents=True)
        table = pa.Table.from_pylist(rows).drop_columns("date")
        pq.write_table(table, folder / "daily" / f"date={day:%Y%m%d}" / "part-0.parquet")
    history = {"user_id": [1, 4], "last_time_ms": [NOON - 48 * 3_600_000] * 2, "watch_seq": [[10, 11, 10], [12]],
               "long_watch_seq": [[11, 13], []], "like_seq": [[], [12]]}  # fmt: skip
    pq.write_table(pa.table(history), folder / "user_history_to_20220502.parquet")
    return KuaiRand(str(folder), SCHEMA)


def by(frame: DataFrame, *key: str) -> dict[Any, Row]:
    return {tuple(r[k] for k in key): r.asDict() for r in frame.collect()}


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> KuaiRand:
    return write(tmp_path_factory.mktemp("kuairand") / "cut", official=False)


def test_requests_are_runs_of_one_user_in_one_tab(
    spark: SparkSession, cut: KuaiRand, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = by(cut.impressions(spark, DS), "request_id", "item_id")
    assert caplog.messages == [
        f"impressions {DS}: dropped 2 copies of (user_id, video_id, time_ms), 1 of them of rows of {BEFORE}, for "
        f'example {{"user_id":3,"video_id":10,"time_ms":{NOON - 12 * 3_600_000 - 60_000}}}'
    ]
    assert set(found) == {
        (f"1-1-{NOON}-0", 10),
        (f"1-1-{NOON}-0", 11),
        (f"1-1-{NOON}-1", 10),
        (f"1-1-{NOON + 200_000}-0", 12),
        (f"1-4-{NOON + 200_000}-0", 13),
        (f"2-1-{NOON}-0", 10),
    }, "the copy of the day before is not here a second time"
    first, second = found[f"1-1-{NOON}-0", 10], found[f"1-1-{NOON}-0", 11]
    assert (first["click"], first["conversion"], first["position"]) == (1, 1, 0)
    assert (second["click"], second["conversion"], second["position"]) == (1, 0, 1), "the copy with the click is kept"


def test_the_schema_says_which_feedback_is_a_conversion(spark: SparkSession, cut: KuaiRand) -> None:
    likes = KuaiRand(cut.path, replace(SCHEMA, columns={"impressions": {"conversion": "is_like"}}))
    found = by(likes.impressions(spark, DS), "request_id", "item_id")
    assert [key for key, values in found.items() if values["conversion"]] == [(f"1-4-{NOON + 200_000}-0", 13)]
    other = KuaiRand(cut.path, replace(SCHEMA, columns={"impressions": {"conversion": "is_hate"}}))
    with pytest.raises(BadConfigError, match="conversion = 'is_hate' of "):
        other.impressions(spark, DS)


def test_outcomes_are_known_when_a_play_has_ended(spark: SparkSession, cut: KuaiRand) -> None:
    events = cut.behaviors(spark, DS)
    found = by(events, "user_id", "item_id", "type", "ts")
    noon = datetime.fromtimestamp(NOON / 1000)
    watched, viewed = found[1, 10, "watch", noon], found[1, 10, "long_view", noon]
    assert (watched["clicked"], watched["viewed_long"], watched["liked"], watched["play_ratio"]) == (1, 1, 0, 0.5)
    assert (watched["available_at"] - noon).total_seconds() == 5
    assert viewed["available_at"] == watched["available_at"]
    assert {kind for _, _, kind, _ in found} == {"watch", "long_view", "like"}


def test_the_official_release_gives_the_same_rows(spark: SparkSession, cut: KuaiRand, tmp_path: Path) -> None:
    official = write(tmp_path / "release", official=True)
    for ds in (BEFORE, DS):
        for mine, theirs in (
            (cut.impressions(spark, ds), official.impressions(spark, ds)),
            (cut.behaviors(spark, ds), official.behaviors(spark, ds)),
        ):
            assert sorted(map(str, mine.collect())) == sorted(map(str, theirs.drop(UNREADABLE).collect()))
            assert theirs.where(f"{UNREADABLE} is not null").isEmpty()
    assert official.history(spark) is None


def test_history_keeps_its_order_and_lies_before_the_log(spark: SparkSession, cut: KuaiRand) -> None:
    history = cut.history(spark)
    assert history is not None
    rows = sorted((r.asDict() for r in history.where("user_id = 1").collect()), key=lambda r: (r["type"], r["ts"]))
    assert [(r["type"], r["item_id"]) for r in rows] == [
        ("long_view", 11), ("long_view", 13), ("watch", 10), ("watch", 11), ("watch", 10)
    ]  # fmt: skip
    assert len({r["ts"] for r in rows if r["type"] == "watch"}) == 3
    assert max(r["ts"] for r in rows).timestamp() * 1000 == NOON - 48 * 3_600_000
    assert [r["viewed_long"] for r in rows if r["type"] == "watch"] == [0, 1, 0]
    assert all(r["clicked"] is None and r["available_at"] == r["ts"] for r in rows)


def test_all_tables_are_built_by_the_bundled_schema(spark: SparkSession, cut: KuaiRand, tmp_path: Path) -> None:
    settings = Settings(lake=LakeSettings(warehouse=str(tmp_path / "lake"), max_quarantine_share=0.0))
    work = Workspace(settings, spark, Lake(settings.lake), SCHEMA, cut)
    for job in (impressions, behaviors, user_features, item_features, behavior_sequences):
        publish(work, job, BEFORE)
    for job in (impressions, behaviors, user_features, item_features, behavior_sequences, training_requests):
        publish(work, job, DS)
    requests = {r["request_id"]: r for r in work.lake.read("training_requests", [DS]).to_pylist()}
    first, later = requests[f"1-1-{NOON}-0"], requests[f"1-4-{NOON + 200_000}-0"]
    assert [e["event_item"] for e in first["seq_watch"]] == [hash64("10"), hash64("11"), hash64("10")], "its history"
    seen = [e["event_item"] for e in later["seq_watch"][3:]]
    assert sorted(seen) == sorted([hash64("10"), hash64("11"), hash64("10")]), "what was shown before, not beside it"
    (candidate,) = later["candidates"]
    assert candidate["item"] == hash64("13")
    assert candidate["author"] is None, "video 13 is in no video file"
    assert first["candidates"][0]["tag"] == hash64("39")


def put_day(folder: Path, table: pa.Table, day: date = DS) -> KuaiRand:
    place = folder / "daily" / f"date={day:%Y%m%d}"
    place.mkdir(parents=True)
    pq.write_table(table, place / "part-0.parquet")
    return KuaiRand(str(folder), SCHEMA)


def as_times(numbers: pa.ChunkedArray) -> pa.ChunkedArray:
    return numbers.cast(pa.timestamp("ms"))


@pytest.mark.parametrize(
    ("column", "change", "told"),
    [
        ("is_click", None, "column is_click is missing; there are user_id, video_id, time_ms, tab, "),
        ("time_ms", as_times, "column time_ms is timestamp_ntz; expected a number; for example in "),
        ("user_id", lambda ids: ids.cast(pa.float64()), "column user_id is double; expected text or whole numbers"),
    ],
)
def test_a_column_that_is_gone_or_of_another_type_stops_the_day(
    spark: SparkSession, tmp_path: Path, column: str, change: Any, told: str
) -> None:
    table = pa.Table.from_pylist(LOG[:1]).drop_columns(["date", "hourmin"])
    place = table.schema.get_field_index(column)
    table = table.set_column(place, column, change(table[column])) if change else table.drop_columns(column)
    log = put_day(tmp_path, table)
    for read in (log.impressions, log.behaviors):
        with pytest.raises(BadDataError, match=rf"^impressions {DS}: {told}.*part-0.parquet") as error:
            read(spark, DS)
        assert f"{tmp_path}/daily/date=20220504/part-0.parquet" in str(error.value)


def test_what_is_no_whole_number_is_refused_with_what_it_says(spark: SparkSession, tmp_path: Path) -> None:
    rows = [
        *LOG[:5],
        row(1, 10, NOON, is_click="yes"),  # beside the good row of the same user, video and time
        row(1, 10, NOON, is_click="yes"),  # word for word again: a copy
        {**row(2, 10, NOON), "time_ms": "noon"},
        row(2, 11, NOON, is_click=""),
        row(2, 12, NOON, long_view="0.5", is_click=1),
    ]
    lines = [",".join(map(str, r.values())) for r in rows]
    folder = tmp_path / "raw" / "data"
    folder.mkdir(parents=True)
    text = "\n".join([",".join(LOG[0]), *lines, f"9,9,{DS:%Y%m%d},{NOON}", ""])
    (folder / "log_standard_4_22_to_5_08_pure.csv").write_text(text)
    log = KuaiRand(str(tmp_path / "raw"), SCHEMA)
    settings = Settings(lake=LakeSettings(warehouse=str(tmp_path / "lake"), max_quarantine_share=0.9))
    work = Workspace(settings, spark, Lake(settings.lake), SCHEMA, log)
    staged = impressions.build(work, DS)
    assert (staged.rows, staged.quarantined) == (4, 5)
    refused = [(r["reason"], json.loads(r["raw"])) for r in work.lake.read("quarantine").to_pylist()]
    said = {(reason, raw["item_id"], raw[UNREADABLE]) for reason, raw in refused}
    broken = f"9,9,{DS:%Y%m%d},{NOON}"
    assert said == {
        ("row: cannot be parsed", 10, '{"is_click":"yes"}'),
        ("row: cannot be parsed", 10, '{"time_ms":"noon"}'),
        ("row: cannot be parsed", 12, '{"long_view":"0.5"}'),
        ("row: cannot be parsed", 9, broken),
        ("click: missing", 11, None),
    }
    good = pq.read_table(staged.path.removeprefix("file://"), columns=["request_id", "item_id"]).to_pylist()
    requests = {(r["request_id"], r["item_id"]) for r in good}
    assert requests == {
        (f"1-1-{NOON}-0", "10"), (f"1-1-{NOON}-0", "11"), (f"1-1-{NOON}-1", "10"), (f"1-1-{NOON + 200_000}-0", "12")
    }, "those of the good rows alone"  # fmt: skip


def test_text_and_fractions_in_parquet_are_refused_row_by_row(spark: SparkSession, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([LOG[0], LOG[4], LOG[6]]).drop_columns("date")
    table = table.set_column(table.schema.get_field_index("is_click"), "is_click", pa.array(["1", "yes", " "]))
    plays = pa.array([5_000.0, float("nan"), 0.5])
    log = put_day(tmp_path, table.set_column(table.schema.get_field_index("play_time_ms"), "play_time_ms", plays))
    checked = impressions.impressions(log.impressions(spark, DS), SCHEMA, DS).collect()
    said = {
        r["item_id"]: (r["reason"], r["click"], json.loads(r["raw"])[UNREADABLE])
        for r in checked
        if r["user_id"] == "1"
    }
    assert said == {"10": (None, 1, None), "12": ("row: cannot be parsed", None, '{"is_click":"yes"}')}
    (other,) = [r for r in checked if r["user_id"] == "2"]
    assert json.loads(other["raw"])[UNREADABLE] == '{"play_time_ms":0.5}'


def test_a_damaged_file_of_the_day_before_says_why_it_is_read(spark: SparkSession, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(LOG[:1]).drop_columns("date")
    put_day(tmp_path, table, BEFORE)
    log = put_day(tmp_path, table)
    damaged = tmp_path / "daily" / f"date={BEFORE:%Y%m%d}" / "part-0.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    told = rf"^impressions {BEFORE} \(read for the copies around midnight\): file .*{damaged} \(.* is not whole Parquet"
    with pytest.raises(BadDataError, match=told):
        log.impressions(spark, DS)


@pytest.mark.realdata
def test_the_real_log_loses_nothing_but_copies(spark: SparkSession, tmp_path: Path) -> None:
    if not (REAL / "daily").is_dir():
        pytest.skip(f"there is no {REAL}/daily")
    raw = pq.read_table(REAL / "daily" / "date=20220506" / "part-0.parquet").to_pandas()
    settings = Settings(lake=LakeSettings(warehouse=str(tmp_path / "lake")))
    work = Workspace(settings, spark, Lake(settings.lake), SCHEMA, KuaiRand(str(REAL), SCHEMA))
    staged = impressions.build(work, date(2022, 5, 6))
    once = raw.drop_duplicates(["user_id", "video_id", "time_ms"])
    assert 0 <= len(once) - (staged.rows + staged.quarantined) <= 10, "a few more are in the day before"
    assert staged.quarantined <= 2
