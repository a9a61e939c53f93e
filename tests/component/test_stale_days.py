"""A day that is replaced leaves later days built on what it was before; they are named, with what rebuilds them."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onetrans import storage
from onetrans.cli import main as cli
from onetrans.errors import EXIT_BAD_CONFIG
from onetrans.lake import Lake, Staged
from onetrans.lineage import describe_stale, in_order, stale_days
from onetrans.settings import LakeSettings, Settings, SourceSettings, as_environment

DAYS = [date(2024, 2, 26) + timedelta(days=n) for n in range(6)]
ORDER = ("impressions", "item_features", "behavior_sequences", "training_requests")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(LakeSettings(warehouse=str(tmp_path / "lake")))


def publish(lake: Lake, table: str, ds: date, tail_of: date | None = None) -> None:
    """Publish one day that reads what the job of the table reads, counts over two days."""
    before = ds - timedelta(days=1)
    tails = {"behavior_sequences": (tail_of or before, before)}
    reads = {
        "impressions": {},
        "item_features": {"impressions": (ds - timedelta(days=2), before)},
        "behavior_sequences": tails,
        "training_requests": {"impressions": (ds, ds), "item_features": (ds, ds), **tails},
    }[table]
    path = lake.new_stage_path(table, ds)
    storage.local_path(path).mkdir(parents=True)
    pq.write_table(pa.table({"ds": pa.array([ds])}), storage.local_path(path) / "part-0.parquet")
    versions = {name: version for name in reads if (version := lake.version(name)) is not None}
    inputs = {name: snapshot for name, (snapshot, _) in versions.items()}
    sequence = {name: number for name, (_, number) in versions.items()}
    lake.write_verdict(lake.mark_staged(Staged(table, ds, path, 1, 0, inputs, reads, sequence)), {"passed": True})
    lake.publish(table, ds)


def publish_days(lake: Lake, days: list[date]) -> None:
    for ds in days:
        for table in ORDER:
            publish(lake, table, ds)


def test_days_built_in_order_are_not_stale(lake: Lake) -> None:
    publish_days(lake, DAYS)
    assert stale_days(lake, after=date.min) == {}
    assert describe_stale({}) == ""


def test_corrected_impressions_reach_as_far_as_their_counts(lake: Lake) -> None:
    publish_days(lake, DAYS)
    publish(lake, "impressions", DAYS[1])
    stale = stale_days(lake, after=DAYS[1])
    assert stale == {"item_features": DAYS[2:4], "training_requests": DAYS[2:4]}
    assert describe_stale(stale) == (
        "days that were built on an earlier version of what they read: item_features 2024-02-28..2024-02-29, "
        "training_requests 2024-02-28..2024-02-29. To build them again: python -m jobs.rebuild (with --dry-run it only "
        "names them)"
    )
    assert in_order(stale) == [(ds, table) for ds in DAYS[2:4] for table in ("item_features", "training_requests")]
    for table in ("item_features", "training_requests"):
        for ds in DAYS[2:4]:
            publish(lake, table, ds)
    assert stale_days(lake, after=DAYS[1]) == {}


def test_a_replaced_day_is_noticed_after_what_was_read_has_expired(lake: Lake) -> None:
    publish_days(lake, DAYS[:3])
    publish(lake, "impressions", DAYS[0])
    before = stale_days(lake, after=DAYS[0])
    assert before == {"item_features": DAYS[1:3], "training_requests": DAYS[1:3]}
    for table in ORDER:
        current = lake.snapshot_id(table)
        lake.expire(table, [s.snapshot_id for s in lake.table(table).snapshots() if s.snapshot_id != current])
        assert len(lake.table(table).snapshots()) == 1
    assert stale_days(lake, after=DAYS[0]) == before


def test_every_later_tail_rests_on_an_earlier_one(lake: Lake) -> None:
    publish_days(lake, DAYS)
    publish(lake, "behavior_sequences", DAYS[2])
    assert stale_days(lake, after=DAYS[2]) == {"behavior_sequences": DAYS[3:], "training_requests": DAYS[3:]}


def test_a_day_before_the_log_s_first_one_and_a_lost_day_come_late(lake: Lake) -> None:
    publish_days(lake, DAYS[1:3])
    publish(lake, "behavior_sequences", DAYS[4], tail_of=DAYS[2])
    assert stale_days(lake, after=DAYS[2]) == {}
    publish(lake, "behavior_sequences", DAYS[3])
    assert stale_days(lake, after=DAYS[3]) == {"behavior_sequences": [DAYS[4]]}
    publish(lake, "impressions", DAYS[0])
    assert stale_days(lake, after=DAYS[0])["item_features"] == DAYS[1:3]


def test_what_is_staged_but_not_published_changes_nothing(lake: Lake) -> None:
    publish_days(lake, DAYS[:3])
    publish(lake, "impressions", DAYS[0])
    staged = lake.staged("item_features", DAYS[1])
    current = {"impressions": lake.snapshot_id("impressions")}
    path = lake.new_stage_path("item_features", DAYS[1])
    lake.mark_staged(replace(staged, path=path, inputs=current))
    assert stale_days(lake, after=DAYS[0])["item_features"] == DAYS[1:3]


def test_the_last_table_of_a_day_warns_and_the_lake_goes_on_telling(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in as_environment(Settings(lake=lake.settings)).items():
        monkeypatch.setenv(name, value)
    publish_days(lake, DAYS[:2])
    assert cli(["publish", "impressions", "--ds", str(DAYS[1])]) == 0
    assert not caplog.records
    for table in ORDER:
        assert not caplog.records, "as long as tables of the day are to follow, nothing can be built again"
        publish(lake, table, DAYS[0])
        assert cli(["publish", table, "--ds", str(DAYS[0])]) == 0
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("2024-02-26 is published; there are days that were built on an earlier version")
    assert "training_requests 2024-02-27. To build them again: python -m jobs.rebuild" in warning
    capsys.readouterr()
    assert cli(["lake"]) == 0
    assert "There are days that were built on an earlier version of what they read" in capsys.readouterr().out
    for table in ORDER[1:]:
        publish(lake, table, DAYS[1])
    assert cli(["lake"]) == 0
    assert "There are days" not in capsys.readouterr().out


def test_a_lost_day_is_not_waited_for(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(lake=lake.settings, source=SourceSettings(absent_days=(DAYS[0], DAYS[1])))
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    publish(lake, "impressions", DAYS[0])
    assert cli(["published", "impressions", "--ds", str(DAYS[0])]) == 0, "it came after all"
    assert cli(["published", "impressions", "--ds", str(DAYS[1]), "--wait", "60"]) == EXIT_BAD_CONFIG
    assert "source.absent_days says that the log lost this day" in capsys.readouterr().err
