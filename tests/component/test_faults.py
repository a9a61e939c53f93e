"""Faults in single steps, each a process of its own as in a task: a trainer killed or doubled, promotions at once.

After each, what is promoted is what an undisturbed run gives, and the same command, run again, is all that is needed.
A publisher that is killed is in ``test_lake.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.plan import Plan
from onetrans.registry import CHAMPION, Registry
from onetrans.settings import Settings, as_environment
from onetrans.tracking import TAG_MODEL_ID, find_model_run
from onetrans.train import train
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
    assert "goes on after step" in told
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
    """Whoever comes first, tonight's model is the champion, and each day has one version."""
    old, tonight = shop.candidate(shop.days[2]), shop.candidate(shop.days[5])
    plans = [old, tonight, tonight]
    for step in [_begin(shop.settings, "onetrans.cli", "promote", "--plan", plan.path) for plan in plans]:
        _end(step)
    registry = Registry(shop.settings.mlflow)
    assert sorted(version.tags["ds"] for version in registry.versions()) == [str(old.ds), str(tonight.ds)]
    champion = registry.by_alias(CHAMPION)
    assert champion is not None
    assert champion.tags["plan_id"] == tonight.plan_id
    _end(_begin(shop.settings, "onetrans.cli", "promote", "--plan", old.path))
    assert registry.by_alias(CHAMPION).version == champion.version
