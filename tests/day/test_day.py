"""A whole day through Airflow: what it publishes and records, what a re-run gives, what bad data gets."""

from __future__ import annotations

import json
import os
import time
import urllib.parse
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expectations.site import site_path
from infra.airflow import reach
from infra.airflow.api import AirflowApiError
from infra.local import pages
from infra.local.airflow import REPOSITORY
from jobs.sources.simulated.write import write_days
from onetrans.lake import TABLES
from tests.day.conftest import BAD, FIRST, HISTORY, LOG, SECRET, TODAY, Deployment

pytestmark = pytest.mark.timeout(1500)


def test_every_table_of_the_day_is_published(deployment: Deployment, day: Any) -> None:
    rows = {table: {d.ds: d.rows for d in deployment.lake.published(table)} for table in TABLES}
    assert all(set(rows[table]) == {HISTORY, TODAY} for table in TABLES)
    raw = pq.read_table(deployment.raw("impressions", TODAY), columns=["request_id"])
    assert rows["impressions"][TODAY] == raw.num_rows
    assert rows["behaviors"][TODAY] == deployment.raw_rows("behaviors", TODAY)
    assert rows["training_requests"][TODAY] == len(set(raw["request_id"].to_pylist()))
    assert rows["behavior_sequences"][TODAY] >= rows["behavior_sequences"][HISTORY] > 0


def test_publishing_tells_the_assets_which_day(deployment: Deployment, day: Any) -> None:
    events = deployment.airflow.api.call("GET", "/assets/events?limit=100")["asset_events"]
    told = {(event["name"], event["extra"]["ds"]) for event in events if event["extra"].get("ds") == str(TODAY)}
    assert told >= {(f"ranking.{table}", str(TODAY)) for table in TABLES}


def test_the_model_dag_waited_without_a_worker(deployment: Deployment, day: Any) -> None:
    waited = deployment.task(*day["ranking_model"], "wait_for_day")
    published = deployment.task(*day["feature_tables"], "training_requests.publish")
    log = "\n".join(deployment.airflow.api.log(waited))
    assert "the triggerer waits for it" in log
    assert waited.ended is not None
    assert published.ended is not None
    latency = (waited.ended - published.ended).total_seconds()
    assert -5 < latency < 40


def test_both_models_are_recorded_under_one_run_of_the_day(deployment: Deployment, day: Any) -> None:
    import mlflow

    client = mlflow.MlflowClient(deployment.settings.mlflow.tracking_uri)
    experiment = client.get_experiment_by_name(deployment.settings.mlflow.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId")]
    (parent,) = [run for run in runs if not run.data.tags.get("mlflow.parentRunId")]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    read = {tag.removeprefix("snapshot.") for tag in parent.data.tags if tag.startswith("snapshot.")}
    assert {"training_requests", "impressions", "behaviors", "user_features", "item_features"} <= read
    assert len(children) == 2
    assert all(run.info.status == "FINISHED" for run in runs)


def test_a_model_that_is_not_better_is_no_failure(deployment: Deployment, day: Any) -> None:
    """A first day of a few hundred requests proves nothing, and the run says so and succeeds."""
    plan = Path(deployment.result(deployment.task(*day["ranking_model"], "plan")).removeprefix("file://"))
    promotion = json.loads((plan / "promotion.json").read_text())
    assert promotion["verdict"] == "declined"
    assert promotion["champion_after"] is None
    result = deployment.result(deployment.task(*day["ranking_model"], "promote"))
    assert "none" in result


@pytest.mark.nightly
def test_a_day_run_again_gives_the_same_rows(deployment: Deployment, day: Any) -> None:
    before = {table: _rows(deployment, table, TODAY) for table in TABLES}
    snapshots = {table: deployment.lake.snapshot_id(table) for table in TABLES}
    run = deployment.airflow.api.trigger("feature_tables", {"ds": str(TODAY)})  # as the form does, without a date
    (ended,) = deployment.wait((run.dag_id, run.run_id))
    assert ended.state == "success"
    for table in TABLES:
        assert deployment.lake.snapshot_id(table) != snapshots[table], f"{table} was not published again"
        assert _rows(deployment, table, TODAY) == before[table]
        assert set(deployment.lake.days(table)) == {HISTORY, TODAY}


def test_bad_data_stops_the_day_at_once_and_leaves_what_is_published(deployment: Deployment, day: Any) -> None:
    before = {table: deployment.lake.published(table) for table in TABLES}
    path = deployment.raw("impressions", BAD)
    raw = pq.read_table(path)
    click = raw["click"].to_numpy().copy()
    click[: len(click) // 2] = 7
    pq.write_table(raw.set_column(raw.schema.get_field_index("click"), "click", pa.array(click.astype(np.int32))), path)

    deployment.backfills_end("ranking_model", "feature_tables")
    model = deployment.backfill("ranking_model", BAD)
    dag_id, run_id = deployment.backfill("feature_tables", BAD)
    (ended,) = deployment.wait((dag_id, run_id))

    assert ended.state == "failed"
    failed = deployment.task(dag_id, run_id, "impressions.build")
    assert (failed.state, failed.tries) == ("failed", 1)
    for task_id in ("impressions.audit", "impressions.publish", "training_requests.build"):
        assert deployment.task(dag_id, run_id, task_id).state == "upstream_failed"
    text = "\n".join(deployment.airflow.api.log(failed))
    message = text[text.rindex("BAD DATA") :]
    for said in ("impressions", str(BAD), "click", f"{len(click) // 2:,}", "correct the data"):
        assert said in message
    assert message.lower().count("published data is as it was") == 1
    assert deployment.lake.published("impressions") == before["impressions"]
    assert deployment.lake.published("training_requests") == before["training_requests"]

    # A person who asks for the status is led to it.
    where = deployment.airflow.address
    troubled = reach.troubled(where, days=1)
    assert troubled is not None
    told = {(task["dag_id"], task["run_id"], task["task_id"]): task for task in troubled["tasks"]}
    task = told[dag_id, run_id, "impressions.build"]
    assert (task["state"], task["try"], task["tries"]) == ("failed", 1, 4)
    assert f"/runs/{urllib.parse.quote(run_id, safe='')}/tasks/impressions.build" in task["link"]

    # People were told, though the receiver named first is down.
    (message,) = _told(deployment, dag_id, run_id, "impressions.build")
    assert message["title"] == f"feature_tables {BAD}: impressions.build failed"
    assert message["text"].startswith(f"{message['title']}\nimpressions.build of {BAD}: BAD DATA.")
    assert "/tasks/impressions.build" in message["link"]
    (message,) = _told(deployment, dag_id, run_id, "")
    assert message["title"] == f"feature_tables {BAD}: the run failed"

    # The model's run has nothing to wait for any more, and says so.
    (ended,) = deployment.wait(model, seconds=120)
    waited = deployment.task(*model, "wait_for_day")
    assert (ended.state, waited.state, waited.tries) == ("failed", "failed", 1)
    text = "\n".join(deployment.airflow.api.log(waited))
    words = f"feature_tables's task training_requests.publish of {BAD} was not run: impressions.build has failed."
    assert words in text
    assert "Published data" not in text
    assert "Published tables and the champion are as they were." in text


def test_days_that_are_backfilled_at_once_run_in_order(deployment: Deployment) -> None:
    """A backfill's own limit replaces the DAG's, so the DAG's first step keeps the order."""
    runs = deployment.backfill_range("ordered", HISTORY, BAD, at_once=3)
    ended = deployment.wait(*runs, seconds=240)
    assert [run.state for run in ended] == ["success", "failed", "failed"]
    order = deployment.folder / "order"
    events = [(word, str(ds)) for ds in (HISTORY, TODAY) for word in ("begins", "ends")]
    assert [tuple(line.split()) for line in order.read_text().splitlines()] == events
    stopped = deployment.task(*runs[2], "wait")
    assert (stopped.state, stopped.tries) == ("failed", 1)
    text = "\n".join(deployment.airflow.api.log(stopped))
    assert f"ordered of {TODAY} has failed at step. Each day is built on the one before. Clear that run" in text

    # A person decides that the second day is good as it is, and clears the third.
    skipped, cleared = (run_id for _, run_id in runs[1:])
    deployment.airflow.api.call("PATCH", f"/dags/ordered/dagRuns/{skipped}", {"state": "success"})
    deployment.airflow.api.call(
        "POST", "/dags/ordered/clearTaskInstances", {"dag_run_id": cleared, "dry_run": False, "only_failed": False}
    )
    (ended_again,) = deployment.wait(runs[2], seconds=120)
    assert ended_again.state == "success"
    assert order.read_text().splitlines()[-2:] == [f"begins {BAD}", f"ends {BAD}"]


@pytest.mark.parametrize(("month", "at_once"), [(5, 1), (7, 2)])
def test_a_backfill_that_ends_yesterday_does_not_hold_tonights_run(
    deployment: Deployment, month: int, at_once: int
) -> None:
    """Yesterday's run waits its turn in it, and then fails: tonight takes yesterday's tables if they are published.

    It is queued for its turn, or is under way to wait for it where the backfill lets several days in.
    """
    first, yesterday, today = (date(2020, month, day) for day in (1, 2, 3))
    whole = deployment.folder / f"whole-{yesterday}"
    whole.touch()

    def go(ds: date, code: int = 0) -> None:
        (deployment.folder / f"go-{ds}").write_text(str(code))

    deployment.backfills_end("night")
    made = deployment.backfill_range("night", first, yesterday, at_once=at_once)
    _until(lambda: deployment.task(*made[0], "step").state == "running", "the backfill has not begun")
    if at_once > 1:
        _until(lambda: deployment.task(*made[1], "wait").state == "deferred", "the second day does not wait")
    body = {"logical_date": f"{today}T00:00:00Z", "conf": {}}
    tonight = ("night", deployment.airflow.api.call("POST", "/dags/night/dagRuns", body)["dag_run_id"])
    go(today)
    (ended,) = deployment.wait(tonight, seconds=120)
    assert ended.state == "success"
    states = [deployment.airflow.api.run(*run).state for run in made]
    assert states == ["running", "running" if at_once > 1 else "queued"]

    go(first)
    go(yesterday, 65)
    assert [run.state for run in deployment.wait(*made, seconds=180)] == ["success", "failed"]
    again = {"dag_run_id": tonight[1], "dry_run": False, "only_failed": False}
    for there in (True, False):
        if not there:
            whole.unlink()
        deployment.airflow.api.call("POST", "/dags/night/clearTaskInstances", again)
        (ended,) = deployment.wait(tonight, seconds=120)
        assert ended.state == ("success" if there else "failed")
    stopped = "\n".join(deployment.airflow.api.log(deployment.task(*tonight, "wait")))
    assert f"night of {yesterday} has failed at step. Each day is built on the one before." in stopped
    assert "mark this task" not in stopped, "that would build on what is not there"

    # Marked as success, the failed day is as little there.
    deployment.airflow.api.call("PATCH", f"/dags/night/dagRuns/{made[1][1]}", {"state": "success"})
    deployment.airflow.api.call("POST", "/dags/night/clearTaskInstances", again)
    (ended,) = deployment.wait(tonight, seconds=120)
    assert ended.state == "failed"
    stopped = "\n".join(deployment.airflow.api.log(deployment.task(*tonight, "wait")))
    assert f"night of {yesterday} has ended, and what it makes is not published: was it marked as success" in stopped


def test_a_day_before_that_is_cleared_while_this_one_holds_the_only_slot_goes_first(deployment: Deployment) -> None:
    """It cannot begin before this run ends, so this run does not wait for it."""
    api, (day, after) = deployment.airflow.api, (date(2020, 8, 1), date(2020, 8, 2))
    (deployment.folder / f"go-{day}").write_text("0")
    before = ("alone", api.trigger("alone", {}, logical_date=day).run_id)
    assert [run.state for run in deployment.wait(before, seconds=120)] == ["success"]
    holds = ("alone", api.trigger("alone", {}, logical_date=after).run_id)
    _until(lambda: deployment.task(*holds, "step").state == "running", "the run has not begun")
    again = {"dag_run_id": before[1], "dry_run": False, "only_failed": False}
    api.call("POST", "/dags/alone/clearTaskInstances", again)
    assert api.run(*before).state == "queued"
    (deployment.folder / f"go-{after}").write_text("0")
    assert [run.state for run in deployment.wait(holds, before, seconds=120)] == ["failed", "success"]
    said = "\n".join(api.log(deployment.task(*holds, "wait")))
    assert f"alone of {day} has been queued for 0 minutes. Each day is built on the one before." in said
    assert "It begins by itself now that this run has ended; wait for its end, then clear this task." in said


def test_a_run_from_the_form_is_waited_for_by_its_day(deployment: Deployment) -> None:
    """Its logical date is the moment of the click."""
    day, after = date(2020, 6, 1), date(2020, 6, 2)
    body = {"logical_date": datetime.now(UTC).isoformat(), "conf": {"ds": str(day)}}
    by_hand = ("night", deployment.airflow.api.call("POST", "/dags/night/dagRuns", body)["dag_run_id"])
    _until(lambda: deployment.task(*by_hand, "step").state == "running", "the run has not begun")
    (deployment.folder / f"go-{after}").write_text("0")
    run = deployment.airflow.api.trigger("night", {}, logical_date=after)
    waits = ("night", run.run_id)
    _until(lambda: deployment.task(*waits, "wait").state == "deferred", "the run of the day before is not seen")
    (deployment.folder / f"go-{day}").write_text("0")
    assert [run.state for run in deployment.wait(by_hand, waits, seconds=120)] == ["success", "success"]
    first, second = (deployment.task(*by_hand, "step").ended, deployment.task(*waits, "step").started)
    assert first is not None
    assert second is not None
    assert second > first


def _until(true: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_backfill_does_not_keep_tonight_s_run_waiting(deployment: Deployment) -> None:
    """All want the one slot of a pool: the run of today goes before every day of the backfill that has not begun."""
    deployment.airflow.api.set_pools({"one_slot": {"slots": 1}})
    made = deployment.backfill_range("crowded", date(2020, 2, 1), date(2020, 2, 6), at_once=6)
    deadline = time.monotonic() + 60
    while not any(deployment.task(*run, "step").started for run in made):
        assert time.monotonic() < deadline, "the backfill has not begun"
        time.sleep(0.2)
    # With a date, as a run by the clock: Airflow takes one without for the earliest of all.
    body = {"logical_date": datetime.now(UTC).isoformat(), "conf": {}}
    tonight = ("crowded", deployment.airflow.api.call("POST", "/dags/crowded/dagRuns", body)["dag_run_id"])
    begun = [run for run in made if deployment.task(*run, "step").started]
    assert all(run.state == "success" for run in deployment.wait(tonight, *made, seconds=120))
    started = [deployment.task(*run, "step").started for run in made]
    first = deployment.task(*tonight, "step").started
    overtaken = sum(moment > first for moment in started if moment)
    assert overtaken >= max(1, len(made) - len(begun) - 1), "one may begin while the run is made"
    assert started == sorted(started), "days of a backfill go in order"


def test_a_worker_that_is_killed_is_replaced_and_people_are_told_when_there_is_no_try_left(
    deployment: Deployment,
) -> None:
    dag_id, run_id = deployment.backfill("killed", TODAY)
    (ended,) = deployment.wait((dag_id, run_id), seconds=180)
    assert (ended.state, deployment.task(dag_id, run_id, "step").tries) == ("failed", 3)
    (message,) = _told(deployment, dag_id, run_id, "")
    assert message["title"] == f"killed {TODAY}: the run failed"


def test_a_day_without_a_verdict_is_told_of_at_its_deadline(deployment: Deployment) -> None:
    now = datetime.now(UTC)
    body = {"logical_date": now.isoformat(), "conf": {}}
    run_id = deployment.airflow.api.call("POST", "/dags/late/dagRuns", body)["dag_run_id"]
    past = deployment.backfill("late", TODAY)  # its deadline was over before it began
    (message,) = _told(deployment, "late", run_id, "")
    assert message["title"].startswith(f"late {now:%Y-%m-%d}: no verdict by")
    assert "neither promoted nor declined, and the run is running" in message["text"]
    assert [run.state for run in deployment.wait(("late", run_id), past, seconds=120)] == ["success", "success"]
    assert not [told for told in deployment.told if (told["dag_id"], told["run_id"]) == past]


@pytest.mark.nightly
def test_a_day_that_has_its_verdict_is_not_told_of_though_its_run_goes_on(deployment: Deployment) -> None:
    """Airflow's deadline is about the run; candidates are scored for hours after the verdict."""
    seconds = 60.0
    logical = datetime.now(UTC) - timedelta(hours=1) + timedelta(seconds=seconds)
    body = {"logical_date": logical.isoformat(), "conf": {}}
    run = ("decided", deployment.airflow.api.call("POST", "/dags/decided/dagRuns", body)["dag_run_id"])
    deadline = time.monotonic() + seconds
    while deployment.task(*run, "step").state != "success":
        assert time.monotonic() < deadline, "the verdict came too late for what is tested here"
        time.sleep(0.2)
    logs = deployment.folder / "airflow" / "logs"
    deadline = time.monotonic() + seconds + 90
    while not any("step of decided" in path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file()):
        assert [told for told in deployment.told if (told["dag_id"], told["run_id"]) == run] == []
        assert time.monotonic() < deadline, "Airflow did not notice that the deadline had passed"
        time.sleep(1)
    assert deployment.airflow.api.run(*run).state == "running"
    (deployment.folder / f"go-{logical:%Y-%m-%d}").write_text("0")
    (ended,) = deployment.wait(run, seconds=60)
    assert ended.state == "success"
    assert [told for told in deployment.told if (told["dag_id"], told["run_id"]) == run] == []


def test_a_backfill_with_one_day_for_all_its_runs_is_refused(deployment: Deployment) -> None:
    deployment.airflow.api.backfill("one_day", HISTORY, TODAY, {"ds": str(TODAY)}, at_once=2)
    runs = deployment.runs("one_day", HISTORY, TODAY)
    assert [run.state for run in deployment.wait(*runs, seconds=180)] == ["failed", "success"]
    refused = deployment.task(*runs[0], "step")
    assert refused.tries == 1
    text = "\n".join(deployment.airflow.api.log(refused))
    assert (
        f"step: REFUSED. The field Day says {TODAY} in a backfill, so every one of its runs would work on that day"
        in text
    )


def test_the_weekly_run_lists_what_it_would_remove(deployment: Deployment, day: Any) -> None:
    run = deployment.airflow.api.trigger("retention", {"dry_run": True})
    (ended,) = deployment.wait((run.dag_id, run.run_id), seconds=180)
    assert ended.state == "success"


def test_a_form_that_cannot_be_meant_is_refused(deployment: Deployment, day: Any) -> None:
    with pytest.raises(AirflowApiError, match="'huge' is not one of"):
        deployment.airflow.api.trigger("ranking_model", {"ds": str(TODAY), "preset": "huge"})
    with pytest.raises(AirflowApiError, match="a reason in words, of 3 to 500 characters"):
        deployment.airflow.api.trigger("ranking_model", {"ds": str(TODAY), "force_reason": "  "})
    asked = {"ds": str(TODAY), "force_reason": "a broken baseline", "gate_mode": "off"}
    run = deployment.airflow.api.trigger("ranking_model", asked)
    (ended,) = deployment.wait((run.dag_id, run.run_id), seconds=120)
    refused = deployment.task(run.dag_id, run.run_id, "wait_for_day")
    assert (ended.state, refused.state, refused.tries) == ("failed", "failed", 1)
    assert "Gate mode off leaves the champion as it is" in "\n".join(deployment.airflow.api.log(refused))


def test_every_server_listens_on_loopback_alone(deployment: Deployment) -> None:
    logs = deployment.folder / "airflow" / "logs"
    site = site_path(deployment.settings.lake, deployment.settings.audit)
    shown = [pages.mlflow_page(deployment.settings, logs), pages.docs_page(site, logs)]
    with pages.served(shown) as servers:
        family = {
            member.pid
            for server in (*servers, *deployment.airflow.servers)
            for root in [psutil.Process(server.pid)]
            for member in (root, *root.children(recursive=True))
        }
        listening = [
            connection.laddr
            for connection in psutil.net_connections("inet")
            if connection.pid in family and connection.status == psutil.CONN_LISTEN
        ]
    ports = {int(address.rsplit(":", 1)[1]) for address in (deployment.airflow.address, *(p.address for p in shown))}
    assert {address.port for address in listening} >= ports
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_a_lost_connection_is_tried_again(deployment: Deployment) -> None:
    dag_id, run_id = deployment.backfill("transient", TODAY)
    (ended,) = deployment.wait((dag_id, run_id), seconds=180)
    step = deployment.task(dag_id, run_id, "step")
    assert (ended.state, step.tries) == ("success", 3)
    assert deployment.result(step) == "works now"
    assert "FAILED with exit code 1. ConnectionError" in "\n".join(deployment.airflow.api.log(step, attempt=1))


def test_a_task_marked_as_failed_leaves_no_process_behind(deployment: Deployment) -> None:
    dag_id, run_id = deployment.backfill("lasting", TODAY)
    child = deployment.folder / "child"
    deadline = time.monotonic() + 120
    while not child.exists() or not child.read_text():
        assert time.monotonic() < deadline, "the step did not start"
        time.sleep(0.2)
    pid = int(child.read_text())
    assert _runs(pid)
    deployment.airflow.api.call("PATCH", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/step", {"new_state": "failed"})
    deadline = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _runs(pid)


@pytest.mark.nightly
def test_a_reason_in_the_form_promotes_what_the_gate_declined(deployment: Deployment, day: Any) -> None:
    import mlflow

    reason = "the day's conversions were lost; its ranking was checked by hand"
    run = deployment.airflow.api.trigger("ranking_model", {"ds": str(TODAY), "force_reason": reason})
    (ended,) = deployment.wait((run.dag_id, run.run_id), seconds=600)
    assert ended.state == "success"
    plan = Path(deployment.result(deployment.task(run.dag_id, run.run_id, "plan")).removeprefix("file://"))
    gate, promotion = (json.loads((plan / name).read_text()) for name in ("gate.json", "promotion.json"))
    assert (gate["verdict"], gate["force_reason"]) == ("declined", reason)
    assert (promotion["verdict"], promotion["decision"], promotion["forced"]) == ("declined", "promoted", reason)
    client = mlflow.MlflowClient(deployment.settings.mlflow.tracking_uri)
    champion = client.get_model_version_by_alias(deployment.settings.mlflow.registered_model, "champion")
    assert str(champion.version) == promotion["version"]
    assert champion.tags["forced_promotion"].endswith(reason)


def test_every_dag_was_executed(deployment: Deployment, day: Any) -> None:
    for path in (REPOSITORY / "dags").glob("*.py"):
        if "with DAG(" in path.read_text(encoding="utf-8"):
            assert any(run.state == "success" for run in deployment.airflow.api.runs(path.stem)), path


def test_the_address_of_a_webhook_is_in_no_log(deployment: Deployment, day: Any) -> None:
    logs = [path for path in (deployment.folder / "airflow" / "logs").rglob("*") if path.is_file()]
    assert any("told over connection receiver" in path.read_text(errors="replace") for path in logs)
    assert any("connection down did not take the message" in path.read_text(errors="replace") for path in logs)
    assert not [path for path in logs if SECRET in path.read_text(errors="replace")]


@pytest.mark.nightly
def test_a_day_whose_audit_failed_is_mended_as_its_paragraph_says(
    deployment: Deployment, day: Any, tmp_path: Path
) -> None:
    """Its files are staged: to audit them again gives the same, so the paragraph sends to the build."""
    api, path = deployment.airflow.api, deployment.raw("impressions", BAD)
    write_days(LOG, str(tmp_path), FIRST, 3)
    good = pq.read_table(tmp_path / path.relative_to(deployment.folder / "raw"))
    clicked = pa.array(np.ones(good.num_rows, np.int32))
    pq.write_table(good.set_column(good.schema.get_field_index("click"), "click", clicked), path)
    deployment.backfills_end("feature_tables")
    run = api.trigger("feature_tables", {"ds": str(BAD)})
    (ended,) = deployment.wait((run.dag_id, run.run_id))
    failed = deployment.task(run.dag_id, run.run_id, "impressions.audit")
    assert (ended.state, failed.state, failed.tries) == ("failed", "failed", 1)
    said = "\n".join(api.log(failed))
    assert f"impressions.audit of {BAD}: BAD DATA." in said
    assert "correct the data, then clear impressions.build, and what follows it runs too." in said

    pq.write_table(good, path)
    cleared = {"task_ids": ["impressions.build"], "include_downstream": True}
    body = {"dag_run_id": run.run_id, "dry_run": False, "only_failed": False, **cleared}
    api.call("POST", "/dags/feature_tables/clearTaskInstances", body)
    (ended,) = deployment.wait((run.dag_id, run.run_id))
    assert ended.state == "success"
    assert all(BAD in deployment.lake.days(table) for table in TABLES)

    # The log lost the day after it: nothing is built of that, but its run asks for the day before as every other does.
    lost, config = BAD + timedelta(days=1), deployment.folder / "onetrans.toml"
    config.write_text(config.read_text().replace("[source]\n", f"[source]\nabsent_days = ['{lost}']\n"))
    run = api.trigger("feature_tables", {"ds": str(lost)})
    (ended,) = deployment.wait((run.dag_id, run.run_id))
    states = {task.task_id: task.state for task in deployment.tasks(run.dag_id, run.run_id)}
    assert ended.state == "success"
    assert states.pop("wait_for_day_before") == "success"
    assert set(states.values()) == {"skipped"}, states


def _told(deployment: Deployment, dag_id: str, run_id: str, task_id: str, seconds: float = 60) -> list[dict[str, str]]:
    """Return what the receiver was sent of a task, or of a run, once it was."""
    deadline = time.monotonic() + seconds
    while True:
        found = [m for m in deployment.told if (m["dag_id"], m["run_id"], m["task_id"]) == (dag_id, run_id, task_id)]
        if found:
            return found
        assert time.monotonic() < deadline, f"nobody was told of {dag_id} {run_id} {task_id}: {deployment.told}"
        time.sleep(0.2)


def _rows(deployment: Deployment, table: str, ds: date) -> list[str]:
    """Return the rows of a day as sorted text, so that neither files nor their order matter."""
    return sorted(json.dumps(row, default=str, sort_keys=True) for row in deployment.lake.read(table, [ds]).to_pylist())


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
