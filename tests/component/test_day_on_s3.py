"""A whole day in an object store, each step a process of its own, while requests fail, are late and break off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from infra.local.airflow import REPOSITORY
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import write_days
from onetrans.lake import TABLES, Lake
from onetrans.registry import CHAMPION, Registry
from onetrans.settings import load_settings
from tests.day.deployment import PROMOTE_ALL, rows
from tests.faulty_s3 import Faults, before
from tests.s3 import ObjectStore

FIRST = date(2026, 1, 1)
DAYS = 2
SECRET = "kept-in-the-environment-alone"

CONFIG = f"""
[store]
root = "ROOT"
endpoint = "ENDPOINT"
[source]
path = "RAW"
[training]
preset = "tiny"
threads = 1
checkpoint_seconds = 1.0
{PROMOTE_ALL}
"""


class Machine:
    """A folder with a configuration file, in which steps run."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder = folder
        self.said: list[str] = []
        (folder / "tmp").mkdir(parents=True)
        (folder / "onetrans.toml").write_text(config, encoding="utf-8")
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "ONETRANS_CONFIG": str(folder / "onetrans.toml"),
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
        }

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Start a step."""
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self, step: subprocess.Popen[str]) -> str:
        """Wait for a step, which must succeed; return what it printed."""
        out, errors = step.communicate()
        self.said.append(out + errors)
        assert step.returncode == 0, f"{step.args!r}: {errors[-4000:]}"
        return out

    def step(self, *command: str) -> str:
        """Do a step."""
        return self.end(self.begin(*command))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_day_in_an_object_store(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = object_store.create_bucket("day")
    write_days(WorldConfig(users=250, items=100, history_days=1, epoch=FIRST), f"{bucket}/raw", FIRST, DAYS)
    last = FIRST + timedelta(days=DAYS - 1)
    here_too = CONFIG.replace("ROOT", "var").replace("RAW", f"{bucket}/raw").replace("ENDPOINT", object_store.endpoint)
    local = Machine(tmp_path / "local", here_too)
    beside = local.begin("jobs.backfill", "--from", str(FIRST), "--to", str(last))
    faults = Faults()
    with before(object_store.endpoint, faults) as endpoint:
        config = CONFIG.replace("ROOT", f"{bucket}/prod").replace("RAW", f"{bucket}/raw").replace("ENDPOINT", endpoint)
        machine = Machine(tmp_path / "in-s3", config)
        machine.step("jobs.backfill", "--from", str(FIRST), "--to", str(last))
        # One table of the last day step by step, in place of what the backfill published.
        machine.step("jobs.raw", "--ds", str(last))
        machine.step("jobs.training_requests", "--ds", str(last))
        machine.step("expectations.audit", "training_requests", "--ds", str(last))
        machine.step("onetrans.cli", "publish", "training_requests", "--ds", str(last))
        machine.step("onetrans.cli", "plan", "--ds", str(last))
        (plan,) = [key for key in object_store.keys(f"{bucket}/prod/runs") if key.endswith("plan.json")]
        place = f"{bucket}/prod/runs/{plan}"
        models = ("onetrans", "dcnv2_din")
        for training in [machine.begin("onetrans.cli", "train", "--plan", place, "--model", name) for name in models]:
            machine.end(training)
        for step in ("evaluate", "gate", "promote"):
            machine.step("onetrans.cli", step, "--plan", place)
        # A day is too short to be learned from: the gate declines, as it should, and a person has the model promoted.
        machine.step("onetrans.cli", "promote", "--plan", place, "--force", "the registry is to be reached")
    for fault in faults.every:
        assert faults.done[fault] > 3, faults.done

    monkeypatch.setenv("ONETRANS_CONFIG", str(tmp_path / "in-s3" / "onetrans.toml"))
    monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", object_store.endpoint)
    monkeypatch.chdir(tmp_path / "in-s3")
    settings = load_settings()
    lake = Lake(settings.lake)
    champion = Registry(settings.mlflow).by_alias(CHAMPION)
    assert champion is not None
    assert champion.tags["ds"] == str(last)

    # Nothing but databases stayed on this disk, and no process left a copy behind.
    stayed = {path.name for path in (tmp_path / "in-s3" / "var").rglob("*") if path.is_file()}
    assert {name for name in stayed if not name.startswith(("catalog.db", "mlflow.db"))} == set()
    left = {path.name for path in (tmp_path / "in-s3" / "tmp").iterdir()}
    # One file for all of a user's sessions of Spark, and PyTorch's own folder.
    assert {name for name in left if not name.startswith(("onetrans-log4j2-", "torchinductor_"))} == set()
    keys = object_store.keys(f"{bucket}/prod")
    for part in ("lake/data/", "lake/staged/", "runs/", "data_docs/index.html", "mlflow/artifacts/"):
        assert any(key.startswith(part) for key in keys), part

    # The key is in no output, no file and no object.
    assert not any(SECRET in text for text in machine.said)
    assert not any(SECRET.encode() in path.read_bytes() for path in (tmp_path / "in-s3").rglob("*") if path.is_file())
    client = object_store.client()
    assert not any(SECRET.encode() in client.get_object(Bucket="day", Key=f"prod/{key}")["Body"].read() for key in keys)

    # The tables are those of the local disk.
    local.end(beside)
    here = Lake(load_settings({"ONETRANS_LAKE_WAREHOUSE": str(tmp_path / "local" / "var" / "lake")}).lake)
    for table in TABLES:
        assert rows(lake, table, last) == rows(here, table, last), table
    machine.environment["ONETRANS_STORE_ENDPOINT"] = object_store.endpoint
    assert json.loads(machine.step("onetrans.cli", "lake", "--json")) is not None
