"""Any world, any clock: the six tables equal the oracle's, also after a day was corrected and what rests on it rebuilt.

Each example draws a calendar (days on which the clock changes, also at midnight,
leap days, ends of months and years), short or long sequences, a tolerance, a kind
of log (behaviours of its own or derived ones, with times of conversions or
without, users and items per day or for all days, a day that was lost) and a
world; builds its days one after the other, also as on a day of very many impressions;
corrects a day, with events that come days late, then maybe another
or the history; and builds again what ``jobs.rebuild`` names, nothing else.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from jobs import training_requests
from jobs.rebuild import LATE, outdated
from onetrans.lineage import stale_days
from onetrans.schema import Sequence
from tests import oracle
from tests.component.test_jobs_tables import JOBS, rounded, write_world
from tests.oracle import DERIVED, SCHEMA, World, corrected, random_world, with_other_history
from tests.raw_log import open_workspace, publish, write_rows

JOB = {job.TABLE: job for job in JOBS}
NOW = datetime(2030, 1, 1, tzinfo=UTC)
CALENDARS = [
    ("America/New_York", date(2024, 3, 9), "the second day has 23 hours"),
    ("America/New_York", date(2024, 11, 2), "the second day has 25 hours"),
    ("America/Sao_Paulo", date(2018, 11, 3), "the second day begins at 01:00: its midnight does not exist"),
    ("America/Sao_Paulo", date(2019, 2, 15), "the second day ends with the hour before midnight, twice"),
    ("Australia/Lord_Howe", date(2024, 4, 6), "the second day is longer by half an hour"),
    ("Europe/Berlin", date(2024, 2, 28), "the leap day, and the end of a month"),
    ("UTC", date(2023, 2, 27), "the end of a February without a leap day"),
    ("Asia/Kolkata", date(2023, 12, 30), "the end of a year, in a zone of half hours"),
]


@dataclass(frozen=True)
class Case:
    """What one example is drawn from; printed when it fails."""

    timezone: str
    first_day: date
    seed: int
    users: int
    lengths: tuple[int, int]
    tolerance: int
    corrected: tuple[int, ...]
    """Numbers of the days that are corrected, one after the other; -1 is the history."""
    conversion_times: bool = True
    derived: bool = False
    daily: bool = False
    absent: bool = False
    """Whether the log lost the second day."""
    few: bool = True

    @property
    def world(self) -> World:
        click, buy = self.lengths
        schema = replace(
            SCHEMA,
            timezone=self.timezone,
            day_tolerance_minutes=self.tolerance,
            **(DERIVED if self.derived else {}),
        )
        bought = "conversion" if self.derived else "purchase"
        schema = replace(schema, sequences=(Sequence("click", "click", click), Sequence("buy", bought, buy)))
        return random_world(
            self.seed,
            users=self.users,
            first_day=self.first_day,
            schema=schema,
            conversion_times=self.conversion_times,
            daily=self.daily,
            absent=1 if self.absent else None,
        )


def cases(calendars: list[tuple[str, date, str]], fewest_users: int) -> st.SearchStrategy[Case]:
    return st.sampled_from(calendars).flatmap(
        lambda calendar: st.builds(
            Case,
            timezone=st.just(calendar[0]),
            first_day=st.just(calendar[1]),
            seed=st.integers(0, 2**32),
            users=st.integers(fewest_users, 60),
            lengths=st.tuples(st.integers(1, 6), st.integers(1, 3)),
            tolerance=st.sampled_from([0, 30, 120]),
            corrected=st.lists(st.integers(-1, 2), min_size=1, max_size=2).map(tuple),
            conversion_times=st.booleans(),
            derived=st.booleans(),
            daily=st.booleans(),
            absent=st.booleans(),
            few=st.booleans(),
        )
    )


def check_case(spark: SparkSession, case: Case) -> None:
    folder = Path(tempfile.mkdtemp(prefix="world-"))
    with pytest.MonkeyPatch.context() as patch:
        if not case.few:
            patch.setattr(training_requests, "FEW_IMPRESSIONS", 0)
        try:
            build_and_correct(spark, case, folder)
        finally:
            shutil.rmtree(folder)


def build_and_correct(spark: SparkSession, case: Case, folder: Path) -> None:
    world = case.world
    lost = (case.first_day + timedelta(days=1),) if case.absent else ()
    write_world(world, folder / "raw")
    work = open_workspace(spark, folder, world.schema, max_quarantine_share=0.0)
    source = replace(work.settings.source, absent_days=lost)
    work = replace(work, settings=replace(work.settings, source=source))
    for day in world.days:
        for job in JOBS:
            publish(work, job, day)
    check_tables(work, world)
    for number, correction in enumerate(case.corrected, start=1):
        if correction < 0 and not case.derived:
            ds, late = world.first_day, {"behaviors"}
            world = with_other_history(world, case.seed + number)
            write_rows(folder / "raw" / "behaviors" / "history", world.history)
        else:
            ds = world.days[min(max(correction, 0), len(world.days) - 1)]
            late = {"impressions"} | (set() if case.derived else {"behaviors"})
            late |= {"behaviors", "user_features", "item_features"} if case.daily else set()
            world = corrected(world, ds, case.seed + number)
            write_world(world, folder / "raw", [ds])
        due = outdated(work.lake, world.schema, work.source, NOW)
        assert {(one.ds, one.table) for one in due if one.reason == LATE} == {(ds, table) for table in late}
        assert min(one.ds for one in due) == ds, "a late event never enters the tables of an earlier day"
        for one in due:
            publish(work, JOB[one.table], one.ds)
        assert outdated(work.lake, world.schema, work.source, NOW) == []
        assert stale_days(work.lake, after=date.min) == {}
        check_tables(work, world)


def check_tables(work: Any, world: World) -> None:
    for ds in world.days:
        expected: dict[str, dict[Any, Any]] = {
            "impressions": {(row["request_id"], row["item_id"]): row for row in oracle.impressions(world, ds)},
            "behaviors": {row["event_id"]: row for row in oracle.behaviors(world, ds)},
            "user_features": oracle.user_features(world, ds),
            "item_features": oracle.item_features(world, ds),
            "behavior_sequences": oracle.tails(world, ds),
            "training_requests": oracle.training_requests(world, ds),
        }
        for table, rows in expected.items():
            held = work.lake.read(table, [ds]).to_pylist()
            assert len(held) == len(rows), f"{table} {ds}"
            found = keyed(table, held)
            assert found.keys() == rows.keys(), f"{table} {ds}"
            for key, row in rows.items():
                assert rounded(found[key]) == rounded({"ds": ds, **row}), f"{table} {ds} {key}"


def keyed(table: str, rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    if table == "impressions":
        return {(row["request_id"], row["item_id"]): row for row in rows}
    if table == "behaviors":
        return {row["event_id"]: row for row in rows}
    names = {"item_features": "item_id", "training_requests": "request_id"}
    found = {row.pop(names.get(table, "user_id")): row for row in rows}
    for row in found.values() if table == "training_requests" else ():
        shown = [candidate["item_id"] for candidate in row["candidates"]]
        assert shown == sorted(set(shown))
        row["candidates"] = {candidate.pop("item_id"): candidate for candidate in row["candidates"]}
    return found


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def test_a_world_around_a_leap_day(spark: SparkSession) -> None:
    """One of the many of the nightly test; tests/component/test_jobs_tables.py has a clock that changes."""
    check_case(
        spark, Case("Europe/Berlin", date(2024, 2, 28), 4, 30, (2, 1), 0, (1,), conversion_times=False, daily=True)
    )


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("timezone", "first_day", "about"), CALENDARS, ids=[about for _, _, about in CALENDARS])
def test_many_worlds_of_every_calendar(spark: SparkSession, timezone: str, first_day: date, about: str) -> None:
    @settings(max_examples=8, print_blob=True, **QUIET)
    @given(case=cases([(timezone, first_day, about)], 2))
    def many(case: Case) -> None:
        check_case(spark, case)

    many()


@pytest.mark.parametrize(("timezone", "first_day", "about"), CALENDARS, ids=[about for _, _, about in CALENDARS])
def test_the_calendars_hold_what_they_say(timezone: str, first_day: date, about: str) -> None:
    world = Case(timezone, first_day, 0, 30, (3, 2), 0, (0,)).world
    hours = [(world.start(ds + timedelta(days=1)) - world.start(ds)) / timedelta(hours=1) for ds in world.days]
    lengths = {
        date(2024, 3, 9): [24, 23, 24],
        date(2024, 11, 2): [24, 25, 24],
        date(2018, 11, 3): [24, 23, 24],
        date(2019, 2, 15): [24, 25, 24],
        date(2024, 4, 6): [24, 24.5, 24],
    }
    assert hours == lengths.get(first_day, [24, 24, 24])
    assert (date(2024, 2, 29) in world.days) == ("leap day, and" in about)
