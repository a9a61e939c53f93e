"""`onetrans status`: days as they are in the lake, the champion with its reason, and what runs just now."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path

import pytest
from tracked_days import Shop

from infra.local.__main__ import _newest_day
from infra.local.newest_day import newest_judged
from infra.local.pages import Page
from infra.status import screen, status, step_of
from onetrans import cli, storage
from onetrans.lake import Lake
from onetrans.registry import promote
from onetrans.settings import as_environment, setting_variables
from onetrans.tracking import find_model_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Five days, a candidate promoted on the last but one, declined on the last."""
    shop = Shop.open(tmp_path_factory.mktemp("shop"))
    for ds, better in ((shop.days[-2], True), (shop.days[-1], False)):
        promote(shop.settings, shop.candidate(ds, better=better))
    return shop


def test_it_says_which_settings_it_goes_by(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shell may have others in force."""
    monkeypatch.chdir(tmp_path)
    for name in setting_variables():
        monkeypatch.delenv(name)
    monkeypatch.delenv("ONETRANS_CONFIG", raising=False)
    assert screen(status(shop.settings, days=1)).startswith("by default settings: there is no onetrans.toml here")
    monkeypatch.setenv("ONETRANS_TRAINING_PRESET", "tiny")
    assert screen(status(shop.settings, days=1)).startswith("by default settings and variables ONETRANS_...: there is")
    (tmp_path / "onetrans.toml").touch()
    first = screen(status(shop.settings, days=1)).splitlines()[0]
    assert first == f"by {tmp_path / 'onetrans.toml'} and variables ONETRANS_..."


def test_days_models_and_the_champion(shop: Shop) -> None:
    found = status(shop.settings, days=3)
    assert list(found["tables"]["days"]) == [str(ds) for ds in shop.days[-3:]]
    assert found["tables"]["earlier"] == 2
    rows = {str(day.ds): day.rows for day in Lake(shop.settings.lake).published("training_requests")}
    for ds, entries in found["tables"]["days"].items():
        assert entries["training_requests"]["state"] == "published"
        assert entries["training_requests"]["rows"] == rows[ds]
        assert entries["training_requests"]["audit"] == "passed"
    assert [(day["ds"], day["decision"]) for day in found["models"]] == [
        (str(shop.days[-2]), "promoted"),
        (str(shop.days[-1]), "declined"),
    ]
    champion = found["champion"]
    assert (champion["version"], champion["day"]) == ("1", str(shop.days[-2]))
    assert champion["why"].startswith("Gate: promoted.")
    text = screen(found)
    assert f"{rows[str(shop.days[-1])]:,}" in text
    assert f"version 1, of {shop.days[-2]}, since " in text
    assert "2 earlier days" in text
    assert max(map(len, text.splitlines()[2:12])) <= 120


def test_make_ui_leads_to_the_newest_verdict(shop: Shop) -> None:
    plan = newest_judged(shop.settings)
    assert plan.ds == shop.days[-1]
    shown = [Page("MLflow", "http://127.0.0.1:5000", None)]
    title, verdict, models = _newest_day(shop.settings, shown)
    assert title == f"{plan.ds}, the newest day with a verdict:"
    assert verdict.split()[1] == (storage.local_path(plan.path) / "gate.html").as_uri()
    run = find_model_run(shop.settings, plan, "onetrans")
    assert run is not None
    asked = urllib.parse.parse_qs(models.split()[1].partition("/#/compare-runs?")[2])
    assert run.info.run_id in json.loads(asked["runs"][0])
    began = time.monotonic()
    gone = replace(shop.settings.mlflow, tracking_uri="http://127.0.0.1:1")
    (told,) = _newest_day(replace(shop.settings, mlflow=gone), shown)  # no page is worth the servers
    assert told.startswith("no verdict to show yet: MLflow at http://127.0.0.1:1 does not answer")
    assert time.monotonic() - began < 30


def test_an_attempt_that_failed_its_audit_stands_beside_what_is_published(shop: Shop) -> None:
    lake, ds = Lake(shop.settings.lake), shop.days[-1]
    before = lake.staged("training_requests", ds)
    attempt = lake.mark_staged(replace(before, path=lake.new_stage_path("training_requests", ds), rows=7))
    broken = {
        "severity": "critical",
        "column": "click",
        "expected": "click is 0 or 1",
        "observed": "not so in 3 of 7 rows",
    }
    warns = {**broken, "severity": "warning"}
    page = {"data_docs": "http://127.0.0.1:8088/training_requests.html", "findings": [warns, broken, broken]}
    lake.write_verdict(attempt, {"passed": False, "failure": "spoilt", "warnings": 0, **page})
    try:
        found = status(shop.settings, days=1)
        entry = found["tables"]["days"][str(ds)]["training_requests"]
        assert entry["state"] == "published"
        assert (entry["attempt"]["rows"], entry["attempt"]["audit"]) == (7, "failed")
        text = screen(found)
        assert "+" in text
        why = "click: expected that click is 0 or 1; not so in 3 of 7 rows, and 1 more"
        assert f"training_requests {ds}: its audit failed, so it is not published: {why}\n" in text
        assert "    http://127.0.0.1:8088/training_requests.html\n" in text
    finally:
        lake.mark_staged(before)


def test_a_held_lock_and_a_running_step_are_told(shop: Shop) -> None:
    plan = shop.plan(shop.days[-1], track=False)
    lock = storage.local_path(plan.model_path("onetrans")) / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = status(shop.settings, days=1)
        assert [e["what"] for e in found["running"]] == [f"training in {lock.parent}"]
    assert status(shop.settings, days=1)["running"] == []

    waiting = ["published", "impressions", "--ds", "2031-01-01", "--wait", "60"]
    environment = {**_environment(), **as_environment(shop.settings)}
    with subprocess.Popen(
        [sys.executable, "-m", "onetrans.cli", *waiting], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL
    ) as step:
        try:
            deadline = time.monotonic() + 20
            while not (running := status(shop.settings, days=1)["running"]) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert [(e["what"], e["pid"]) for e in running] == [(" ".join(["onetrans", *waiting]), step.pid)]
        finally:
            step.kill()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("ONETRANS_")}


def test_an_empty_folder_stays_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status"]) == 0
    printed = capsys.readouterr().out
    assert "no day yet; build one: python -m jobs.backfill" in printed
    assert "no training of a day yet" in printed
    assert cli.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["champion"] is None
    assert list(tmp_path.iterdir()) == []


def test_what_counts_as_a_step() -> None:
    assert step_of(["/venv/bin/python", "-m", "jobs.impressions", "--ds", "D"]) == "jobs.impressions --ds D"
    assert step_of(["python", "-m", "onetrans.cli", "plan"]) == "onetrans plan"
    assert step_of(["python", "/venv/bin/onetrans", "gate", "--plan", "P"]) == "onetrans gate --plan P"
    assert step_of(["python", "-m", "pytest", "onetrans"]) is None
    assert step_of(["vi", "onetrans.toml"]) is None
    assert step_of([]) is None
