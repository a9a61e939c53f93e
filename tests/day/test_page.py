"""Backfills from Airflow's web page, as a person clicks them, on the laptop's default database (SQLite).

The day of both real DAGs, which ``test_day.py`` looks at, is backfilled from the page too; several days, and all
choices, in ``test_nights.py``, on PostgreSQL.

Creating a backfill on SQLite was reported to fail while other processes write (apache/airflow #66726, #68699);
``infra/local/on_sqlite`` is what makes it work, and these tests are for.
"""

from __future__ import annotations

import urllib.parse

import pytest

from onetrans.lake import TABLES
from tests.day.conftest import BAD, HISTORY, TODAY, Deployment, why_no_page

pytest.importorskip("playwright", reason="Playwright is not installed")

from infra.local.airflow_page import AirflowPage

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_no_page()), reason=why_no_page()),
]


def test_both_real_dags_are_backfilled_from_the_page(deployment: Deployment, day: dict[str, tuple[str, str]]) -> None:
    """The fixture clicks; here is what came of it on this database."""
    for dag_id, run_id in day.values():
        described = deployment.airflow.api.call("GET", f"/dags/{dag_id}/dagRuns/{run_id}")
        assert (described["run_type"], described["state"]) == ("backfill", "success")
    assert all(TODAY in deployment.lake.days(table) for table in TABLES)


def test_the_form_of_a_run_is_filled_in_from_the_page(deployment: Deployment) -> None:
    """All of its fields; the run's first task gets them, and refuses what does not go together."""
    typed = {"ds": str(TODAY), "force_reason": "the baseline's log was broken"}
    chosen = {"preset": "tiny", "gate_mode": "off"}
    with AirflowPage(deployment.airflow.address) as page:
        run_id = page.trigger("ranking_model", typed, chosen, switched_on=["from_scratch"])
    (ended,) = deployment.wait(("ranking_model", run_id), seconds=120)
    described = deployment.airflow.api.call("GET", f"/dags/ranking_model/dagRuns/{urllib.parse.quote(run_id)}")
    assert described["conf"] == {**typed, **chosen, "from_scratch": True}
    refused = deployment.task("ranking_model", run_id, "wait_for_day")
    assert (ended.state, refused.state, refused.tries) == ("failed", "failed", 1)
    text = "\n".join(deployment.airflow.api.log(refused))
    assert f"wait_for_day of {TODAY}: REFUSED. Gate mode off leaves the champion as it is" in text


def _latest(deployment: Deployment, dag_id: str) -> dict[str, str]:
    """Wait until every run of a DAG has ended; return their states by day."""
    runs = deployment.airflow.api.runs(dag_id)
    ended = deployment.wait(*((run.dag_id, run.run_id) for run in runs), seconds=120)
    return {str(run.logical_date): run.state for run in ended}


@pytest.fixture(scope="module")
def begun(deployment: Deployment) -> list[str]:
    """Backfill two days that were never run, from the page; the second fails.  Returns the days in which steps ran."""
    (deployment.folder / "broken").write_text(str(TODAY))
    with AirflowPage(deployment.airflow.address) as page:
        assert page.backfill("quick", HISTORY, TODAY, "Missing Runs") == 2
    assert _latest(deployment, "quick") == {str(HISTORY): "success", str(TODAY): "failed"}
    return [str(HISTORY), str(TODAY)]


def test_missing_days_are_backfilled_from_the_page(deployment: Deployment, begun: list[str]) -> None:
    assert (deployment.folder / "quick").read_text().split() == begun


@pytest.mark.nightly
def test_failed_days_and_all_days_are_backfilled_from_the_page(deployment: Deployment, begun: list[str]) -> None:
    told = deployment.folder / "quick"
    (deployment.folder / "broken").unlink()
    with AirflowPage(deployment.airflow.address) as page:
        deployment.backfills_end("quick")
        assert page.backfill("quick", HISTORY, BAD, "Missing and Errored Runs") == 2
        assert set(_latest(deployment, "quick").values()) == {"success"}
        assert told.read_text().split() == [*begun, str(TODAY), str(BAD)]

        deployment.backfills_end("quick")
        assert page.backfill("quick", HISTORY, BAD, "All Runs") == 3
        assert set(_latest(deployment, "quick").values()) == {"success"}
        assert told.read_text().split()[4:] == [str(HISTORY), str(TODAY), str(BAD)]
