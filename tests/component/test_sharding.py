"""Tables divided over two processes by TorchRec train as whole ones in one process, and leave the same files."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace

import pytest
import torch

from onetrans import storage
from onetrans.checkpoint import Checkpoint
from onetrans.errors import EXIT_FAILED, EXIT_OK
from onetrans.evaluate import evaluate
from onetrans.lake import Lake
from onetrans.plan import make_plan
from onetrans.train import InterruptedTrainingError, train
from tests.ranks import assert_trained_alike, copied, ended, losses_of, stopping, torchrun, wait_for_step
from tests.worlds import World, publish_days, settings_in, small_schema

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchrec") is None, reason="needs TorchRec: run `make torchrec`"
)

SCHEMA = small_schema(hash_size=5001)
SHARDED = ["user", "item"]
NORMS = (1.0, 2.0)
"""The sum of the processes' norms against the norm of the sum: never below 1, and 1.15 to 1.23 when it was measured."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Settings, and the plan of a day with both models trained by one process and evaluated."""
    settings = settings_in(tmp_path_factory.mktemp("sharding"), lookback_days=2)
    days = publish_days(Lake(settings.lake), 3, SCHEMA, World(requests=100))
    plan = make_plan(settings, days[-1], SCHEMA, track=False)
    for name in plan.models:
        train(plan, name, settings)
    return settings, plan, evaluate(plan, settings)


def test_divided_tables_are_trained_saved_and_scored_as_whole_ones(alone, tmp_path):
    """From the checkpoint of one process with whole tables to the end."""
    settings, plan, figures = alone
    divided = copied(plan, tmp_path / "divided")
    for _ in range(3):
        with pytest.raises(InterruptedTrainingError):
            train(divided, "onetrans", settings, stopping())
    code, _, err = ended(torchrun(2, ["--plan", divided.path, "--model", "onetrans"], dividing(settings)))
    assert code == EXIT_OK, err
    record = storage.read_json(storage.join(divided.model_path("onetrans"), "finished.json"))
    assert record["sharded_tables"] == SHARDED
    assert record["steps"] == len(losses_of(plan, "onetrans")) > 8
    assert_trained_alike(divided, plan, "onetrans", NORMS)

    # The checkpoint is that of whole tables, sums of squares included.
    mine, theirs = (Checkpoint.load(storage.join(p.model_path("onetrans"), "checkpoint")) for p in (divided, plan))
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name in theirs.tensors:
        if name.startswith("optimizers.embedding.state"):
            torch.testing.assert_close(mine.tensors[name], theirs.tensors[name], rtol=1e-3, atol=1e-7)

    shutil.copytree(storage.local_path(plan.model_path("dcnv2_din")), storage.local_path(divided.path) / "dcnv2_din")
    assert evaluate(divided, settings)["onetrans"] == pytest.approx(figures["onetrans"], abs=3e-3)


def test_one_process_goes_on_from_divided_tables(alone, tmp_path):
    settings, plan, _ = alone
    divided = copied(plan, tmp_path / "divided")
    launcher = torchrun(2, ["--plan", divided.path, "--model", "dcnv2_din"], dividing(settings, checkpoint_seconds=0.0))
    wait_for_step(divided, "dcnv2_din", 3, launcher)
    launcher.terminate()
    code, _, err = ended(launcher)
    assert code == EXIT_FAILED, err
    assert not storage.exists(storage.join(divided.model_path("dcnv2_din"), "finished.json"))
    train(divided, "dcnv2_din", settings)
    assert_trained_alike(divided, plan, "dcnv2_din", NORMS)


def dividing(settings, **training):
    return replace(settings, training=replace(settings.training, shard_rows=5000, **training))
