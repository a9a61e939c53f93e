"""Nights as they are run: on PostgreSQL, by the clock, and days backfilled from the web page, with both real DAGs.

A log of four days that ends yesterday.  The first is history.  The two after it are backfilled from the page; the
log of the second is bad, is corrected, and the day is backfilled again.  Yesterday's run is started by the clock,
waits for its late log, and trains while both old days are run once more.  What is published in the end equals what one
Spark session builds of the same log.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onetrans.lake import TABLES, Lake
from onetrans.registry import CHAMPION, Registry
from onetrans.settings import LakeSettings
from onetrans.tracking import TAG_DAY, TAG_DECISION, TAG_PLAN
from tests import postgres
from tests.day.conftest import Deployment
from tests.day.deployment import PROMOTE_ALL, build, describe, rows

pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed")
pytest.importorskip("playwright", reason="Playwright is not installed")

from infra.local.airflow_page import AirflowPage, Reprocess, chromium

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(bool(postgres.why_missing()), reason=postgres.why_missing()),
    pytest.mark.skipif(not chromium(), reason="there is no Chromium (Debian: apt-get install chromium)"),
]

DAGS = ("feature_tables", "ranking_model")
PATIENCE_S = 3000.0

Run = tuple[str, str]


@dataclass(frozen=True)
class Nights:
    """A deployment whose last day is yesterday's, and what its tables have to be in the end."""

    deployment: Deployment
    undisturbed: Lake
    history: date
    old: tuple[date, date]
    tonight: date

    def backfill(self, reprocess: Reprocess, expected: int, dag_ids: Sequence[str] = DAGS) -> None:
        """Backfill the old days from the page, days side by side; it announces ``expected`` runs of each DAG."""
        self.deployment.backfills_end(*dag_ids)
        with AirflowPage(self.deployment.airflow.address) as page:
            for dag_id in dag_ids:
                assert page.backfill(dag_id, *self.old, reprocess, at_once=2) == expected

    def ended(self) -> dict[tuple[str, date], str]:
        """Wait until every run of the old days has ended; return their states."""
        found = {}
        for dag_id in DAGS:
            for ended in self.deployment.wait(*(self.run(dag_id, ds) for ds in self.old), seconds=PATIENCE_S):
                assert ended.logical_date is not None
                found[dag_id, ended.logical_date] = ended.state
        return found

    def run(self, dag_id: str, ds: date) -> Run:
        """Return the run of a day; it is there, or about to be made."""
        deadline = time.monotonic() + 240
        while True:
            found = [run.run_id for run in self.deployment.airflow.api.runs(dag_id) if run.logical_date == ds]
            if found:
                return dag_id, found[0]
            assert time.monotonic() < deadline, f"{dag_id} has no run of {ds}"
            time.sleep(0.5)

    def says(self, dag_id: str, ds: date) -> str:
        """Return the ends of the logs of a run that were not successful, for a failed test to show."""
        api = self.deployment.airflow.api
        failed = [task for task in self.deployment.tasks(*self.run(dag_id, ds)) if task.state == "failed"]
        return "\n".join("\n".join(api.log(task)[-15:]) for task in failed)

    def is_whole(self, ds: date) -> None:
        """Check that a day's rows are those of the undisturbed lake, in every table."""
        for table in TABLES:
            assert rows(self.deployment.lake, table, ds) == rows(self.undisturbed, table, ds), f"{table} {ds}"

    def raw(self, ds: date) -> Path:
        """The file of the day's impressions."""
        return self.deployment.raw("impressions", ds)

    def decisions(self) -> list[tuple[str, str]]:
        """Return day and decision of all versions, in the order of their registration."""
        versions = Registry(self.deployment.settings.mlflow).versions()
        return [(version.tags[TAG_DAY], version.tags[TAG_DECISION]) for version in reversed(versions)]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    """The deployment, started: the history is built, yesterday's log is late, that of the day before is bad."""
    tonight = datetime.now(UTC).date() - timedelta(days=1)
    history, *old = (tonight - timedelta(days=back) for back in (3, 2, 1))
    with postgres.running() as server:
        folder = tmp_path_factory.mktemp("nights")
        deployed = describe(folder, history, 4, PROMOTE_ALL, server.create("airflow"), schedule=True)
        warehouse = str(folder / "undisturbed")
        build(deployed, history, tonight, {"ONETRANS_LAKE_WAREHOUSE": warehouse})
        build(deployed, history, history)
        found = Nights(deployed, Lake(LakeSettings(warehouse=warehouse)), history, (old[0], old[1]), tonight)
        for ds in (tonight, old[1]):
            found.raw(ds).rename(folder / f"good-{ds}.parquet")
        _spoil(folder / f"good-{old[1]}.parquet", found.raw(old[1]))
        with deployed.airflow:
            yield found


def _spoil(good: Path, bad: Path) -> None:
    """Write a day's impressions with a label that cannot be, in half of the rows."""
    table = pq.read_table(good)
    click = table["click"].to_numpy().copy()
    click[: len(click) // 2] = 7
    pq.write_table(table.set_column(table.schema.get_field_index("click"), "click", pa.array(click)), bad)


@pytest.fixture(scope="module")
def begun(nights: Nights) -> dict[tuple[str, date], str]:
    """Backfill both old days, which were never run; return the states of their runs."""
    nights.backfill("Missing Runs", 2)
    return nights.ended()


def test_missing_days_are_backfilled_and_a_bad_one_stops_by_itself(
    nights: Nights, begun: dict[tuple[str, date], str]
) -> None:
    first, second = nights.old
    assert begun == {
        **{(dag_id, first): "success" for dag_id in DAGS},
        **{(dag_id, second): "failed" for dag_id in DAGS},
    }, nights.says("feature_tables", first) + nights.says("ranking_model", first)
    nights.is_whole(first)
    lake = nights.deployment.lake
    for table in set(TABLES) - {"user_features", "item_features"}:  # These read other files, and the days before.
        assert set(lake.days(table)) == {nights.history, first}, table
    assert nights.decisions() == [(str(first), "promoted")]


def test_days_that_are_backfilled_side_by_side_read_their_logs_together(
    nights: Nights, begun: dict[tuple[str, date], str]
) -> None:
    """The second day's first job runs beside the first day; what reads published tables begins when that has ended."""
    first, second = (nights.deployment.tasks(*nights.run("feature_tables", ds)) for ds in nights.old)
    end = max(task.ended for task in first if task.ended)
    began = {task.task_id: task.started for task in second if task.started and task.state in ("success", "failed")}
    alone = {"wait_for_log", "wait_for_day_before", "impressions.build"}
    assert began.keys() > alone
    assert began["impressions.build"] < end
    assert all(began[task_id] > end for task_id in began.keys() - alone), (began, end)
    staged = nights.deployment.lake.staged("impressions", nights.old[0])
    assert dict(staged.reads) == {}, "what goes ahead reads published tables"


@pytest.fixture(scope="module")
def mended(nights: Nights, begun: Any) -> dict[tuple[str, date], str]:
    """Correct the log of the second day and backfill what failed; return the states."""
    second = nights.old[1]
    (nights.deployment.folder / f"good-{second}.parquet").replace(nights.raw(second))
    before = {dag_id: nights.deployment.tasks(*nights.run(dag_id, nights.old[0])) for dag_id in DAGS}
    nights.backfill("Missing and Errored Runs", 1)
    ended = nights.ended()
    after = {dag_id: nights.deployment.tasks(*nights.run(dag_id, nights.old[0])) for dag_id in DAGS}
    assert after == before, "a day that had succeeded was run again"
    return ended


def test_failed_days_alone_are_backfilled(nights: Nights, mended: dict[tuple[str, date], str]) -> None:
    second = nights.old[1]
    assert set(mended.values()) == {"success"}, nights.says("feature_tables", second) + nights.says(
        "ranking_model", second
    )
    nights.is_whole(second)
    assert nights.decisions() == [(str(ds), "promoted") for ds in nights.old]


@pytest.fixture(scope="module")
def night(nights: Nights, mended: Any) -> dict[str, Run]:
    """Deliver yesterday's log; while its model trains, run all old days again.  Returns the runs by the clock."""
    deployment, tonight = nights.deployment, nights.tonight
    scheduled = {dag_id: nights.run(dag_id, tonight) for dag_id in DAGS}
    assert deployment.task(*scheduled["feature_tables"], "wait_for_log").state == "deferred"
    nights.deployment.backfills_end(*DAGS)
    (deployment.folder / f"good-{tonight}.parquet").replace(nights.raw(tonight))
    deadline = time.monotonic() + PATIENCE_S
    while deployment.task(*scheduled["ranking_model"], "train_onetrans").started is None:
        assert time.monotonic() < deadline, deployment.tasks(*scheduled["feature_tables"])
        time.sleep(0.5)
    nights.backfill("All Runs", 2)
    assert not deployment.airflow.api.run(*scheduled["ranking_model"]).finished, "tonight's model came too early"
    deployment.wait(*scheduled.values(), seconds=PATIENCE_S)
    nights.ended()
    return scheduled


def test_the_clock_starts_the_day_and_its_late_log_is_waited_for(nights: Nights, night: dict[str, Run]) -> None:
    api = nights.deployment.airflow.api
    for dag_id, run in night.items():
        described = api.call("GET", f"/dags/{dag_id}/dagRuns/{run[1]}")
        assert (described["run_type"], described["state"]) == ("scheduled", "success"), nights.says(
            dag_id, nights.tonight
        )
    nights.is_whole(nights.tonight)


def test_old_days_that_are_run_again_beside_it_change_nothing(nights: Nights, night: dict[str, Run]) -> None:
    for ds in nights.old:
        for dag_id in DAGS:
            run = nights.run(dag_id, ds)
            assert nights.deployment.airflow.api.run(*run).state == "success", nights.says(dag_id, ds)
            began = [task.started for task in nights.deployment.tasks(*run) if task.state == "success"]
            tonight = nights.deployment.task(*night["ranking_model"], "train_onetrans").started
            assert all(start > tonight for start in began if start and tonight), f"{run} was not run again"
        nights.is_whole(ds)
    lake = nights.deployment.lake
    days = {nights.history, *nights.old, nights.tonight}
    assert all(set(lake.days(table)) == days for table in TABLES)


def test_each_day_was_promoted_once_and_tonights_model_serves(nights: Nights, night: dict[str, Run]) -> None:
    """The old days' models of the second run are registered, and held: tonight's is of a later day."""
    decided = Counter(nights.decisions())
    promoted = {ds: number for (ds, decision), number in decided.items() if decision == "promoted"}
    assert promoted == {str(ds): 1 for ds in (*nights.old, nights.tonight)}, decided
    assert {decision for _, decision in decided} <= {"promoted", "held"}
    registry = Registry(nights.deployment.settings.mlflow)
    champion = registry.by_alias(CHAMPION)
    assert champion is not None
    assert champion.tags[TAG_DAY] == str(nights.tonight)
    plans = [version.tags[TAG_PLAN] for version in registry.versions()]
    assert len(plans) == len(set(plans)), "a model was registered twice"


def test_every_days_run_in_mlflow_is_whole(nights: Nights, night: dict[str, Run]) -> None:
    settings = nights.deployment.settings.mlflow
    client = mlflow.MlflowClient(settings.tracking_uri)
    experiment = client.get_experiment_by_name(settings.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.info.run_id: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    children = Counter(run.data.tags["mlflow.parentRunId"] for run in runs if run.info.run_id not in parents)
    assert children == dict.fromkeys(parents, 2)
    assert {run.data.tags[TAG_DAY] for run in parents.values()} == {str(ds) for ds in (*nights.old, nights.tonight)}
    for run in parents.values():
        scored = {name.split(".")[0] for name in run.data.metrics if "." in name}
        assert scored >= {"onetrans", "dcnv2_din", "popularity"}


def test_models_of_a_backfill_are_made_in_the_order_of_days(nights: Nights, night: dict[str, Run]) -> None:
    """Each goes on from the weights of the day before; all tables are there, so nothing else keeps them in order."""
    deployment = nights.deployment
    nights.backfill("All Runs", 2, ["ranking_model"])
    assert set(nights.ended().values()) == {"success"}
    first, second = (nights.run("ranking_model", ds) for ds in nights.old)
    ended = max(task.ended for task in deployment.tasks(*first) if task.ended)
    described = deployment.airflow.api.call("GET", f"/dags/ranking_model/dagRuns/{second[1]}")
    assert datetime.fromisoformat(described["start_date"]) < ended, "it was not under way beside the first"
    planned = deployment.task(*second, "plan").started
    assert planned is not None
    assert planned > ended
