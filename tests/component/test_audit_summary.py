"""The table of the day's audits: what the plan reads and what that was built from, in the versions that were read."""

from __future__ import annotations

import csv
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from onetrans import storage
from onetrans.audit_summary import audit_summary
from onetrans.lake import Lake, Staged
from onetrans.plan import Plan, make_plan
from onetrans.retention import retain
from onetrans.settings import Settings
from onetrans.tracking import audit_verdicts
from tests.worlds import World, publish_days, settings_in, small_schema, write_requests

SCHEMA = small_schema()
WORLD = World(requests=6)
WARNED = {
    "passed": True,
    "critical": 0,
    "warnings": 1,
    "rows": 7,
    "quarantined": 2,
    "findings": [{"severity": "warning", "expected": "some impression converted", "observed": "seen: 0"}],
    "data_docs": "http://docs/validations/impressions/2024-02-28.html",
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


def publish(lake: Lake, table: str, ds: date, verdict: dict[str, Any], **manifest: Any) -> int:
    """Publish a day with an audit's verdict; the rows are those of requests, which no one reads here."""
    path = lake.new_stage_path(table, ds)
    write_requests(storage.local_path(path) / "part-0.parquet", ds, SCHEMA, WORLD)
    lake.write_verdict(lake.mark_staged(Staged(table, ds, path, WORLD.requests, **manifest)), verdict)
    return lake.publish(table, ds)


def plan_of(settings: Settings) -> Plan:
    """Plan a day that was built from impressions, whose later version is another one."""
    lake = Lake(settings.lake)
    *before, ds = publish_days(lake, 3, SCHEMA, WORLD)
    read = publish(lake, "impressions", ds, WARNED)
    tails = publish(lake, "behavior_sequences", before[-1], {"passed": True})
    publish(lake, "impressions", ds, {"passed": True, "rows": 8})
    reads = {"impressions": (ds, ds), "behavior_sequences": (before[-1], before[-1])}
    inputs = {"impressions": read, "behavior_sequences": tails}
    publish(lake, "training_requests", ds, {"passed": True}, inputs=inputs, reads=reads)
    return make_plan(settings, ds, SCHEMA, from_scratch=True, track=False)


def lines(settings: Settings, plan: Plan) -> list[dict[str, str]]:
    return list(csv.DictReader(audit_summary(Lake(settings.lake), plan, audit_verdicts(plan)).splitlines()))


def test_every_table_of_the_day_has_a_line(settings: Settings) -> None:
    plan = plan_of(settings)
    first, second, ds = plan.train_days[0], plan.train_days[1], plan.ds
    found = lines(settings, plan)
    assert [(line["table"], line["day"], line["outcome"]) for line in found] == [
        ("training_requests", str(first), "passed"),
        ("training_requests", str(second), "passed"),
        ("training_requests", str(ds), "passed"),
        ("impressions", str(ds), "warning"),
        ("behavior_sequences", str(second), "passed"),
    ], "the version of the impressions that was read, not the one that is published"
    assert found[3]["rows"] == "7"
    assert found[3]["quarantined"] == "2"
    assert found[3]["not met"] == "warning: some impression converted (seen: 0)"
    assert found[3]["data docs"].endswith("2024-02-28.html")


def test_what_is_gone_is_left_out_and_what_nobody_audited_is_told(settings: Settings) -> None:
    from tests.component.test_retention import LATER

    plan = plan_of(settings)
    storage.delete_file(storage.join(plan.train_files[0].rsplit("/", 1)[0], "_audit.json"))
    retain(settings, LATER)
    found = {(line["table"], line["day"]): line["outcome"] for line in lines(settings, replace(plan))}
    assert found["training_requests", str(plan.train_days[0])] == "not audited"
    assert ("impressions", str(plan.ds)) not in found
