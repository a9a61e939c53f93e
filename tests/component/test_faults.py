"""Faults in single steps, each a process of its own as in a task: killed, doubled, without MLflow, without disk.

After each, what is published and promoted is what an undisturbed run gives, and the same command, run again, is all
that is needed.  A publisher that is killed is in ``test_lake.py``, a scheduler in ``tests/day/test_airflow_faults.py``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import psutil
import pytest
import torch

from infra.local.processes import Server, stop
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import write_days
from onetrans import storage
from onetrans.artifact import load_model
from onetrans.errors import EXIT_FAILED, EXIT_NOT_READY
from onetrans.lake import Lake
from onetrans.plan import Plan
from onetrans.registry import CHAMPION, Registry
from onetrans.settings import LakeSettings, Settings, SourceSettings, as_environment
from onetrans.tracking import TAG_DECISION, TAG_MODEL_ID, find_model_run
from onetrans.train import train
from tests import mlflow_server
from tests.tracked_days import Shop

MODEL = "onetrans"


def _begin(settings: Settings, *command: str, environment: Mapping[str, str] = os.environ) -> subprocess.Popen[str]:
    """Start a step as a task does: ``python -m``, its settings in the environment, a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**environment, **as_environment(settings)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _end(step: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a step, which must end with ``code``; return what it wrote to stderr."""
    _, errors = step.communicate(timeout=240)
    assert step.returncode == code, errors[-4000:]
    return errors


def _kill(step: subprocess.Popen[str]) -> None:
    """Kill a step with everything it started, as a machine does that runs out of memory."""
    os.killpg(step.pid, signal.SIGKILL)
    step.communicate(timeout=60)
    assert step.returncode == -signal.SIGKILL


def _unchecked(settings: Settings) -> Settings:
    """The same settings with a checkpoint after every step."""
    return replace(settings, training=replace(settings.training, checkpoint_seconds=0.0))


def _wait_for_step(plan: Plan, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the training of a plan has saved a checkpoint of at least ``step``."""
    file = storage.local_path(plan.model_path(MODEL)) / "checkpoint" / "checkpoint.json"
    deadline = time.monotonic() + 120
    while not (file.exists() and json.loads(file.read_bytes())["step"] >= step):
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Days with a registry on a SQLite store."""
    return Shop.open(tmp_path_factory.mktemp("faults"), days=6)


@pytest.fixture(scope="module")
def undisturbed(shop: Shop) -> dict[str, torch.Tensor]:
    """Weights of a training of the fifth day that nothing disturbed."""
    plan = shop.plan(shop.days[4], track=False)
    runs = storage.local_path(plan.path).parent / "undisturbed"
    shutil.copytree(storage.local_path(plan.path), runs)
    copy = Plan.load(str(runs))
    train(replace(copy, mlflow_run_id=""), MODEL, shop.settings)
    return _weights(copy)


def _weights(plan: Plan) -> dict[str, torch.Tensor]:
    return load_model(storage.join(plan.model_path(MODEL), "model"))[0].state_dict()


def _same_bits(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _recorded_once(shop: Shop, plan: Plan) -> None:
    """Check that MLflow holds one run of the model, finished, with one model."""
    registry = Registry(shop.settings.mlflow)
    run = find_model_run(shop.settings, plan, MODEL)
    assert run is not None
    assert run.info.status == "FINISHED"
    same = registry.client.search_runs(
        [run.info.experiment_id], f"tags.plan_id = '{plan.plan_id}' and tags.model = '{MODEL}'"
    )
    assert len(same) == 1
    models = registry.client.search_logged_models([run.info.experiment_id])
    ready = [model for model in models if model.source_run_id == run.info.run_id and str(model.status) == "READY"]
    assert [model.model_id for model in ready] == [run.data.tags[TAG_MODEL_ID]]


@pytest.mark.nightly
def test_two_trainings_of_one_day_at_once_train_once(shop: Shop, undisturbed: dict[str, torch.Tensor]) -> None:
    """A task that Airflow took for dead may still run beside its next try."""
    plan = shop.plan(shop.days[4])
    settings = _unchecked(shop.settings)
    both = [_begin(settings, "onetrans.train", "--plan", plan.path, "--model", MODEL) for _ in range(2)]
    told = [_end(step) for step in both]
    assert sum("is finished since" in text for text in told) == 1, "both trained"
    assert sum("is being trained by another process; waiting for its end" in text for text in told) == 1
    assert _same_bits(_weights(plan), undisturbed)
    _recorded_once(shop, plan)


@pytest.mark.nightly
def test_a_trainer_killed_in_mid_epoch_is_recorded_once(
    shop: Shop, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plan = shop.plan(shop.days[4], seed=18)
    begun = _begin(_unchecked(shop.settings), "onetrans.train", "--plan", plan.path, "--model", MODEL)
    _wait_for_step(plan, 2, begun)
    _kill(begun)
    assert not storage.exists(storage.join(plan.model_path(MODEL), "finished.json"))
    told = _end(_begin(shop.settings, "onetrans.train", "--plan", plan.path, "--model", MODEL))
    assert "goes on from its own checkpoint, after step" in told
    _recorded_once(shop, plan)

    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    shutil.copy(storage.local_path(storage.join(plan.path, "plan.json")), unbroken)
    reference = replace(Plan.load(str(unbroken)), mlflow_run_id="")
    train(reference, MODEL, shop.settings)
    assert _same_bits(_weights(plan), _weights(reference))
    assert not _same_bits(_weights(plan), undisturbed), (
        "another seed gives other weights, or this test compares nothing"
    )


@pytest.mark.nightly
def test_an_old_day_and_tonights_are_promoted_at_once(shop: Shop) -> None:
    """Whoever comes first, tonight's model is the champion, and each day has one version; so if an old one is last."""
    old, late, tonight = (shop.candidate(shop.days[number]) for number in (2, 3, 5))
    plans = [old, tonight, tonight]
    for step in [_begin(shop.settings, "onetrans.cli", "promote", "--plan", plan.path) for plan in plans]:
        _end(step)
    registry = Registry(shop.settings.mlflow)
    assert sorted(version.tags["ds"] for version in registry.versions()) == [str(old.ds), str(tonight.ds)]
    champion = registry.by_alias(CHAMPION)
    assert champion is not None
    assert champion.tags["plan_id"] == tonight.plan_id
    for plan in (old, late):  # once more; and for the first time
        _end(_begin(shop.settings, "onetrans.cli", "promote", "--plan", plan.path))
        assert registry.by_alias(CHAMPION).version == champion.version
    assert [version.tags[TAG_DECISION] for version in registry.versions() if version.tags["ds"] == str(late.ds)] == [
        "held"
    ]


# MLflow's server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real server on loopback, started; a test stops it and starts it again on the same port and data."""
    with mlflow_server.running(tmp_path) as started:
        yield started


IMPATIENT = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""MLflow's client asks again for four minutes by itself; without that a step meets the outage at once."""


@pytest.mark.nightly
def test_mlflow_that_is_away_for_long_costs_tries_and_nothing_else(
    shop: Shop, server: Server, undisturbed: dict[str, torch.Tensor]
) -> None:
    settings = replace(shop.settings, mlflow=replace(shop.settings.mlflow, tracking_uri=server.name))
    here = Shop(settings, shop.days)
    plan = here.plan(shop.days[4], seed=19)
    training = ("onetrans.train", "--plan", plan.path, "--model", MODEL)
    begun = _begin(_unchecked(settings), *training, environment=IMPATIENT)
    _wait_for_step(plan, 2, begun)
    stop([server], grace=0)  # in mid-epoch
    told = _end(begun, EXIT_NOT_READY)
    assert f"MLflow at {server.name} does not answer" in told
    _end(_begin(settings, *training, environment=IMPATIENT), EXIT_NOT_READY)
    mlflow_server.start(server)
    assert "goes on from its own checkpoint, after step" in _end(_begin(settings, *training))
    _recorded_once(here, plan)

    judged = here.candidate(shop.days[3])
    stop([server], grace=0)
    told = _end(
        _begin(settings, "onetrans.cli", "promote", "--plan", judged.path, environment=IMPATIENT), EXIT_NOT_READY
    )
    assert "nothing was promoted" in told
    waiting = _begin(settings, "onetrans.cli", "promote", "--plan", judged.path)  # with the patience of every day
    time.sleep(2.0)
    assert waiting.poll() is None
    mlflow_server.start(server)
    _end(waiting)
    registry = Registry(settings.mlflow)
    assert [version.tags["plan_id"] for version in registry.versions()] == [judged.plan_id]
    assert registry.by_alias(CHAMPION).version == "1"


# Spark's jobs


@dataclass(frozen=True)
class Logged:
    """A day's log, and the lake in which one table of it is published, undisturbed."""

    settings: Settings
    ds: date
    rows: list[str]

    @property
    def lake(self) -> Lake:
        """The lake, read anew."""
        return Lake(self.settings.lake)

    @property
    def job(self) -> tuple[str, ...]:
        """The command that builds, audits and publishes the day."""
        return (f"jobs.{TABLE}", "--ds", str(self.ds), "--publish")

    def published(self) -> list[str]:
        """Return the rows that readers see, as sorted text."""
        read = self.lake.read(TABLE).to_pylist()
        return sorted(json.dumps(row, default=str, sort_keys=True) for row in read)


TABLE = "impressions"


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """A published day that the faults below build again."""
    folder, ds = tmp_path_factory.mktemp("jobs"), date(2026, 1, 1)
    write_days(WorldConfig(users=2000, items=120, history_days=1, epoch=ds), str(folder / "raw"), ds, 1)
    settings = Settings(
        source=SourceSettings(path=str(folder / "raw")), lake=LakeSettings(warehouse=str(folder / "lake"))
    )
    found = Logged(settings, ds, [])
    _end(_begin(settings, *found.job))
    return replace(found, rows=found.published())


def _begin_staging(logged: Logged) -> tuple[subprocess.Popen[str], Path, set[Path]]:
    """Start the job and wait until it writes; return it, the folder of all attempts, and those made before."""
    attempts = storage.local_path(logged.lake.staged(TABLE, logged.ds).path).parent
    before = set(attempts.iterdir())
    step = _begin(logged.settings, *logged.job)
    deadline = time.monotonic() + 120
    while not any(list(path.rglob("*.parquet")) for path in set(attempts.iterdir()) - before):
        assert step.poll() is None, step.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return step, attempts, before


@pytest.mark.nightly
def test_a_spark_driver_killed_while_it_stages(logged: Logged) -> None:
    snapshot, staged = logged.lake.snapshot_id(TABLE), logged.lake.staged(TABLE, logged.ds)
    step, attempts, before = _begin_staging(logged)
    _kill(step)
    (left,) = set(attempts.iterdir()) - before
    assert logged.lake.built(str(left)) is None, "it was killed too late"
    assert logged.lake.staged(TABLE, logged.ds) == staged
    # What follows in a day takes the last whole attempt, not what the killed one left.
    logged.lake.publish(TABLE, logged.ds)
    assert (logged.lake.snapshot_id(TABLE), logged.published()) == (snapshot, logged.rows)

    _end(_begin(logged.settings, *logged.job))
    assert logged.lake.snapshot_id(TABLE) != snapshot
    assert logged.published() == logged.rows


@pytest.mark.nightly
def test_sparks_jvm_killed_while_it_stages(logged: Logged) -> None:
    """The system takes the largest process of a step for want of memory, and the step is left to say so."""
    snapshot = logged.lake.snapshot_id(TABLE)
    step, _, _ = _begin_staging(logged)
    java = next(child for child in psutil.Process(step.pid).children(recursive=True) if child.name() == "java")
    java.kill()
    told = _end(step, EXIT_FAILED)
    assert f"SparkFailedError: {TABLE} {logged.ds}: Spark's JVM was killed, most likely by the system for" in told
    assert "lower spark.driver_memory" in told
    assert told.rstrip().endswith("Published data is as it was.")
    assert (logged.lake.snapshot_id(TABLE), logged.published()) == (snapshot, logged.rows)


@pytest.mark.nightly
def test_the_disk_is_full_while_a_day_is_staged(logged: Logged) -> None:
    snapshot, staged = logged.lake.snapshot_id(TABLE), logged.lake.staged(TABLE, logged.ds)
    data = storage.local_path(staged.path).parent
    full = f"mount -t tmpfs -o size=16k tmpfs {shlex.quote(str(data))}"
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    if subprocess.run([*alone, full], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (it needs root, or user namespaces)")
    # A mount of its own for the job alone: 16 KiB where its files go, and this process's own view stays as it is.
    job = shlex.join([sys.executable, "-m", *logged.job])
    step = subprocess.Popen(
        [*alone, f"{full} && exec {job}"],
        env={**os.environ, **as_environment(logged.settings)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    told = _end(step, EXIT_FAILED)  # the code of what is tried again
    assert "No space left on device" in told
    assert "Published data is as it was" in told
    assert (logged.lake.snapshot_id(TABLE), logged.published()) == (snapshot, logged.rows)
    assert logged.lake.staged(TABLE, logged.ds) == staged

    _end(_begin(logged.settings, *logged.job))
    assert logged.published() == logged.rows


@pytest.mark.nightly
def test_two_runs_of_one_day_at_once_publish_it_once(logged: Logged) -> None:
    for step in [_begin(logged.settings, *logged.job) for _ in range(2)]:
        _end(step)
    assert logged.published() == logged.rows
    assert logged.lake.days(TABLE) == [logged.ds]
