"""Faults of the simulator that no row shows by itself: the audit of the day notices each, and none on clean days."""

from __future__ import annotations

from datetime import date, timedelta
from types import ModuleType
from typing import Any

import pytest
from pyspark.sql import SparkSession

from expectations.audit import audit_staged
from jobs import behaviors, impressions, item_features, user_features
from jobs.sources.simulated.defects import DEFECTS, parse_rates
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE, write_days
from jobs.workspace import Workspace
from onetrans.errors import BadDataError
from onetrans.schema import FeatureSchema
from tests.raw_log import open_workspace

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

WORLD = WorldConfig(users=600, items=400, history_days=3)
CLEAN = [WORLD.epoch + timedelta(days=n) for n in range(4)]
BAD = CLEAN[-1] + timedelta(days=1)
JOBS = (impressions, behaviors, user_features, item_features)
SPREAD = "no feature's values are spread otherwise"
MISSING = "no feature is missing from more rows than allowed"
NOTICED: list[tuple[ModuleType, list[str], set[tuple[str, str]]]] = [
    (impressions, ["impressions.lost=0.6"], {("the table", "rows; the 4 published days before")}),
    (
        impressions,
        ["lost_label=0.8"],
        {(label, f"the rate of {label} is {how}") for label in ("click", "conversion") for how in ("near", "not far")},
    ),
    (impressions, ["wrong_context=0.9"], {("surface", SPREAD)}),
    (impressions, ["cut_off=0.4"], {("hours_to_end", "the latest ts lies in the last 6 hours")}),
    (behaviors, ["behaviors.lost=0.7"], {("the table", "published days before")}),
    (behaviors, ["behaviors.missing_value=0.98"], {("price", MISSING), ("price", SPREAD)}),
    (user_features, ["users.missing_value=0.98"], {("segment", MISSING), ("segment", SPREAD)}),
    (item_features, ["items.missing_value=0.98"], {("price", MISSING), ("price", SPREAD)}),
    (item_features, ["other_unit=0.9"], {("price", SPREAD)}),
]
"""Job, faults of the day, and of each finding that they cause the column and a part of its sentence."""
STOPS = [("missing_column=1", "click"), ("wrong_type=1", "ts")]


@pytest.fixture(scope="module")
def work(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Days without faults, built, audited and published; on the log's first day nothing is counted yet, which warns."""
    folder = tmp_path_factory.mktemp("noticed")
    write_days(WORLD, str(folder / "raw"), CLEAN[0], len(CLEAN))
    work = open_workspace(spark, folder, FeatureSchema.load(SCHEMA_FILE))
    for ds in CLEAN:
        for job in JOBS:
            found = findings(work, job, ds)
            assert ds == CLEAN[0] or found == {}, f"{job.TABLE} {ds}"
            work.lake.publish(job.TABLE, ds)
    return work


def findings(work: Workspace, job: Any, ds: date) -> dict[str, str]:
    """Build and audit a day; return the column of what was not met, by what was expected."""
    job.build(work, ds)
    verdict = audit_staged(work.lake, work.schema, job.TABLE, ds, spark=work.spark)
    return {finding["expected"]: finding["column"] for finding in verdict["findings"]}


@pytest.mark.parametrize(("job", "faults", "expected"), NOTICED, ids=[" ".join(f) for _, f, _ in NOTICED])
def test_a_fault_of_many_rows_is_noticed(
    work: Workspace, job: Any, faults: list[str], expected: set[tuple[str, str]]
) -> None:
    write_days(WORLD, work.settings.source.path, BAD, 1, parse_rates(faults))
    found = findings(work, job, BAD)
    assert len(found) == len(expected), found
    for column, sentence in expected:
        assert any(column == where and sentence in text for text, where in found.items()), (column, sentence, found)


@pytest.mark.parametrize(("fault", "told"), STOPS)
def test_a_file_that_is_not_as_declared_stops_the_day(work: Workspace, fault: str, told: str) -> None:
    write_days(WORLD, work.settings.source.path, BAD, 1, parse_rates([fault]))
    with pytest.raises(BadDataError, match=f"impressions {BAD}.*{told}.*part-0.parquet"):
        impressions.build(work, BAD)


def test_every_such_fault_is_told_here() -> None:
    """The others are met by a job that refuses or drops the row, or change nothing that is wrong."""
    silent = {name for name, defect in DEFECTS.items() if not defect.reason and not defect.twice}
    borne = {"behaviors.late", "behaviors.tie", "behaviors.at_request", "users.unknown", "items.unknown"}
    borne |= {"impressions.tie", "impressions.one_item", "behaviors.one_user"}
    used = {name for _, faults, _ in NOTICED for name in parse_rates(faults)}
    assert used | {name for fault, _ in STOPS for name in parse_rates([fault])} == silent - borne
