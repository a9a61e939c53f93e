"""When a day's raw log counts as there: ended in its time zone, files of every table, or overdue."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import raw
from jobs.sources.files import Files
from jobs.sources.kuairand import KuaiRand
from onetrans.errors import EXIT_BAD_DATA, EXIT_NOT_READY, EXIT_OK, BadConfigError, BadDataError, NotReadyError
from onetrans.schema import Feature, FeatureSchema, Sequence
from onetrans.settings import Settings, SourceSettings

DS = date(2026, 1, 10)
SCHEMA = FeatureSchema(
    name="shop",
    features=(
        Feature("user", "user", "hashed", "user_id", hash_size=9),
        Feature("item", "item", "hashed", "item_id", hash_size=9),
        Feature("event_item", "event", "hashed", "item_id", hash_size=9, embedding="item"),
    ),
    sequences=(Sequence("click", "click", 3),),
)


def put(folder: Path, name: str = "part-0.parquet") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()


def check(path: Path, now: datetime, **changes: Any) -> None:
    schema = replace(SCHEMA, **changes)
    settings = Settings(source=SourceSettings(path=str(path), wait_hours=6))
    raw.check(settings, schema, Files(str(path), schema), DS, now)


def test_a_day_has_to_end_in_the_logs_time_zone(tmp_path: Path) -> None:
    for table in ("impressions", "behaviors"):
        put(tmp_path / table / f"ds={DS}")
    midnight = datetime(2026, 1, 11, tzinfo=UTC)
    check(tmp_path, midnight)
    with pytest.raises(NotReadyError, match="ends at 2026-01-11 08:00 UTC, as the log's time zone is America/Los_Ange"):
        check(tmp_path, midnight, timezone="America/Los_Angeles")
    check(tmp_path, midnight + timedelta(hours=8), timezone="America/Los_Angeles")


def test_every_table_that_comes_by_day_is_waited_for(tmp_path: Path) -> None:
    now = datetime(2026, 1, 11, 1, tzinfo=UTC)
    with pytest.raises(NotReadyError, match=r"impressions 2026-01-10: there is no file in .*; days .*: none"):
        check(tmp_path, now)
    put(tmp_path / "impressions" / f"ds={DS}", "_SUCCESS")
    with pytest.raises(NotReadyError, match=r"impressions 2026-01-10: there is no file in .*; days .*: none$"):
        check(tmp_path, now)
    put(tmp_path / "impressions" / f"ds={DS}")
    check(tmp_path, now, derived_behaviors=("click",))
    with pytest.raises(NotReadyError, match="behaviors 2026-01-10"):
        check(tmp_path, now)
    put(tmp_path / "behaviors" / f"ds={DS}")
    put(tmp_path / "users")
    check(tmp_path, now)
    put(tmp_path / "items" / "ds=2026-01-09")
    with pytest.raises(NotReadyError, match=r"items 2026-01-10: .* days that are there: 2026-01-09"):
        check(tmp_path, now)


def test_a_day_that_is_overdue_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError):
        check(tmp_path, datetime(2026, 1, 11, 5, 59, tzinfo=UTC))
    with pytest.raises(BadDataError, match=r"ended at 2026-01-11 00:00 UTC, and source.wait_hours = 6 have gone by"):
        check(tmp_path, datetime(2026, 1, 11, 6, tzinfo=UTC))


def test_a_real_log_cut_into_days_is_waited_for_too(tmp_path: Path) -> None:
    put(tmp_path / "daily" / "date=20260109")
    log = KuaiRand(str(tmp_path), SCHEMA)
    for file in ("user_features_pure.csv", "video_features_basic_pure.csv"):
        with pytest.raises(BadConfigError, match=r"there is no \w+_\*.csv in .*; source.kind = 'kuairand' needs it"):
            log.missing(date(2026, 1, 9))
        put(tmp_path, file)
    assert log.missing(date(2026, 1, 9)) == ""
    assert "days that are there: 2026-01-09" in log.missing(DS)
    put(tmp_path / "daily" / "date=2026-01-10")
    told = f"impressions: folder {tmp_path}/daily/date=2026-01-10 is not named after a day, as date=20220504 is"
    with pytest.raises(BadDataError, match=told):
        log.missing(DS)


def test_a_release_tells_its_days_by_the_names_of_its_files(tmp_path: Path) -> None:
    """All days lie in two files, so a day that no file holds was found out only by the build."""
    for file in (
        "user_features_pure.csv",
        "video_features_basic_pure.csv",
        "log_standard_4_08_to_4_21_pure.csv",
        "log_standard_4_22_to_5_08_pure.csv",
    ):
        put(tmp_path / "data", file)
    log = KuaiRand(str(tmp_path), SCHEMA)
    assert [log.missing(date(2022, *day)) for day in ((4, 8), (4, 21), (4, 22), (5, 8))] == [""] * 4
    for ds in (date(2022, 4, 7), date(2022, 5, 9), DS):
        told = f"impressions {ds}: the log in {tmp_path} has the days 2022-04-08..2022-04-21, 2022-04-22.."
        assert log.missing(ds).startswith(told)
    with pytest.raises(BadDataError, match=r"has the days .*The day ended at 2026-01-11"):
        raw.check(Settings(), SCHEMA, log, DS, datetime(2026, 1, 12, tzinfo=UTC))
    put(tmp_path / "data", "log_standard_of_others.csv")
    assert log.missing(DS) == "", "only reading tells what such a file holds"


def test_a_folder_without_a_kuairand_log_is_bad_configuration(tmp_path: Path) -> None:
    put(tmp_path, "notes.csv")
    with pytest.raises(BadConfigError, match=f"{tmp_path} holds neither daily/date=YYYYMMDD folders nor log_standard_"):
        KuaiRand(str(tmp_path), SCHEMA).missing(DS)


def test_the_command_looks_until_the_day_is_there_and_starts_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    today = datetime.now(UTC).date()
    yesterday = today - timedelta(days=1)
    example = Path(__file__).parents[2] / "jobs" / "sources" / "simulated" / "schema.toml"
    (tmp_path / "schema.toml").write_text(example.read_text())
    put(tmp_path / "behaviors" / f"ds={yesterday}")
    monkeypatch.setenv("ONETRANS_SOURCE_PATH", str(tmp_path))
    monkeypatch.setenv("ONETRANS_SOURCE_WAIT_HOURS", "36")
    monkeypatch.setattr("jobs.spark._start", None)
    monkeypatch.setattr("onetrans.progress.LOOK_EVERY_S", 0.1)
    assert raw.main(["--ds", str(today)]) == EXIT_NOT_READY
    assert raw.main(["--ds", "2020-01-01"]) == EXIT_BAD_DATA
    assert raw.main(["--ds", "2020-01-01", "--unless-absent"]) == EXIT_BAD_DATA
    monkeypatch.setenv("ONETRANS_SOURCE_ABSENT_DAYS", "2020-01-01")
    assert raw.main(["--ds", "2020-01-01"]) == EXIT_BAD_DATA
    capsys.readouterr()
    assert raw.main(["--ds", "2020-01-01", "--unless-absent"]) == EXIT_OK
    assert capsys.readouterr().out == "nothing to do: source.absent_days says that the log lost 2020-01-01\n"
    capsys.readouterr()
    timer = threading.Timer(0.5, put, [tmp_path / "impressions" / f"ds={yesterday}"])
    timer.start()
    assert raw.main(["--ds", str(yesterday), "--wait", "20"]) == EXIT_OK
    assert f"the raw log of {yesterday} is there" in capsys.readouterr().out


def test_a_lost_day_is_not_waited_for(tmp_path: Path) -> None:
    settings = Settings(source=SourceSettings(path=str(tmp_path), wait_hours=6, absent_days=(DS,)))
    source = Files(str(tmp_path), SCHEMA)
    now = datetime(2026, 1, 11, 1, tzinfo=UTC)
    with pytest.raises(BadDataError, match=r"source.absent_days says that the log lost this day"):
        raw.check(settings, SCHEMA, source, DS, now)
    for table in ("impressions", "behaviors"):
        put(tmp_path / table / f"ds={DS}")
    raw.check(settings, SCHEMA, source, DS, now)


def test_a_mistyped_path_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(BadConfigError, match=r"source.path = .*/nowhere' is no folder"):
        check(tmp_path / "nowhere", datetime(2026, 1, 11, 1, tzinfo=UTC))
