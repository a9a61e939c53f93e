"""A training that is killed again and again, wherever it is, ends as one that ran through, on the disk and on S3 (G3).

The command is the one a person types; it has dropout, two passes, held-out rows after each, and a learning rate that
still warms up, so its state is weights, optimizers, generators, schedule, place in the data and figures of passes.
"""

from __future__ import annotations

import os
import random
import re
import signal
from dataclasses import replace

import pytest
import torch

from onetrans import storage
from onetrans.checkpoint import Checkpoint
from onetrans.loader import Cursor
from onetrans.plain_runs import plan_files
from onetrans.settings import Settings, TrainingSettings, as_environment
from tests import killed
from tests.plain_logs import SCHEMA, rows, write

SEED = 20_261_129
EPOCHS, BATCH = 2, 16
IN_A_STEP = (
    "forward", "step", "stepped", "delete", "block losses.csv", "open step.safetensors", "block step.safetensors",
    "close step.safetensors", "shown step.safetensors", "close checkpoint.json", "shown checkpoint.json",
)  # fmt: skip
AFTER_A_PASS = (
    "scored", "block weights.safetensors", "shown weights.safetensors", "shown model.json", "close passes.json",
    "shown passes.json",
)  # fmt: skip
AT_THE_END = ("close profile.json", "close finished.json", "shown finished.json")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    (folder / "schema.toml").write_text(SCHEMA)
    write(folder / "train.csv", rows(90, 1, "train"))
    write(folder / "val.parquet", rows(30, 2, "val", after=90))
    return folder


class Run:
    """One training of one model, with runs in a folder of its own."""

    def __init__(self, log, model_name, runs):
        training = TrainingSettings(
            preset="tiny", epochs=EPOCHS, batch_size=BATCH, threads=1, device="cpu", checkpoint_seconds=0.0, runs=runs
        )
        self.settings = Settings(training=training)
        self.command = ["train", "--model", model_name, "--data-dir", str(log)]
        plan = plan_files(str(log), self.settings)
        models = {n: replace(m, config=replace(m.config, dropout=0.2)) for n, m in plan.models.items()}
        plan = replace(plan, models=models).save()
        assert plan.models[model_name].optimizer.warmup_steps > 20
        self.folder = plan.model_path(model_name)

    def start(self, kill_at=None, **training):
        settings = replace(self.settings, training=replace(self.settings.training, **training))
        return killed.run(self.command, as_environment(settings), kill_at)

    @property
    def checkpoint(self):
        return Checkpoint.load(storage.join(self.folder, "checkpoint"))

    def text(self, name):
        return storage.read_bytes(storage.join(self.folder, name)).decode()

    def record(self):
        record = storage.read_json(storage.join(self.folder, "finished.json"))
        for measured in ("seconds", "samples_per_second", "peak_memory_bytes", "finished_at"):
            del record[measured]
        return record

    def files(self):
        """Return the names of all files but the profile, which tells of the last try alone."""
        names = (re.sub(r"(step-\d+)-\w+", r"\1", name) for name in storage.list_files(self.folder))
        return [name.removeprefix(self.folder) for name in names if not name.endswith("/profile.json")]


@pytest.fixture(scope="module")
def unbroken(log, tmp_path_factory):
    """Per model a training that ran through, and how often it came to each point."""
    found = {}
    for model_name in ("onetrans", "dcnv2_din"):
        run = Run(log, model_name, str(tmp_path_factory.mktemp("unbroken")))
        code, counts = run.start()
        assert code == 0
        assert {*IN_A_STEP, *AFTER_A_PASS, *AT_THE_END} <= counts.keys()
        found[model_name] = run, counts
    return found


@pytest.mark.parametrize(
    ("place", "model_name", "kills"),
    [("disk", "onetrans", len(IN_A_STEP)), ("s3", "onetrans", 4), ("disk", "dcnv2_din", 4)],
)
def test_killed_at_random_moments_it_ends_the_same(log, unbroken, request, tmp_path, place, model_name, kills):
    theirs, counts = unbroken[model_name]
    folder = str(tmp_path) if place == "disk" else request.getfixturevalue("object_store").create_bucket("killed")
    mine = Run(log, model_name, f"{folder}/runs")
    chance = random.Random(f"{SEED} {model_name} {place}")
    points = [*chance.sample(IN_A_STEP, kills), *chance.sample(AFTER_A_PASS, min(kills, len(AFTER_A_PASS)))]
    step = 0
    for kind in points:
        # Within the first steps of a try, so that there is work left for all of them; some lose what they did.
        lost = kind in ("forward", "step", "stepped") and chance.random() < 0.5
        few = 2 * counts[kind] // counts["step"] if kind in IN_A_STEP else 1
        kill_at = kind, chance.randint(1, max(1, few))
        code, _ = mine.start(kill_at, checkpoint_seconds=3600.0 if lost else 0.0)
        assert code == -signal.SIGKILL, kill_at
        checkpoint = mine.checkpoint
        reached = checkpoint.step if checkpoint else 0
        assert reached == step if lost else reached >= step, kill_at
        step = reached
    assert 0 < step < counts["step"]
    for kind in AT_THE_END:
        code, _ = mine.start((kind, 1))
        assert code == -signal.SIGKILL, kind

    code, counts = mine.start()
    assert code == 0
    assert "step" not in counts, "it was finished before the last kill"
    assert_same_training(mine, theirs)
    assert mine.files() == theirs.files(), "nothing that a killed process began is left"


def assert_same_training(mine, theirs):
    found, expected = mine.checkpoint, theirs.checkpoint
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert found.trees == expected.trees, "schedule, and what the optimizers keep besides tensors"
    assert (found.step, found.cursor.epoch) == (expected.step, expected.cursor.epoch)
    assert found.progress["samples"] == expected.progress["samples"]
    for name in ("losses.csv", "passes.json"):
        assert mine.text(name) == theirs.text(name), name
    assert mine.record() == theirs.record()


def test_a_kill_in_the_midst_of_a_large_checkpoint_leaves_the_one_before(object_store):
    """One of several parts, of which a store has received some by then."""
    folder = f"{object_store.create_bucket('large')}/checkpoint"
    before = Checkpoint(1, Cursor(), {}, {"model.table": torch.arange(10.0)}, {})
    before.save(folder)
    process = killed.PROCESSES.Process(target=_save_half, args=(folder, dict(object_store.environment)))
    process.start()
    process.join(killed.BOUND_S)
    assert process.exitcode == -signal.SIGKILL
    uploads = object_store.client().list_multipart_uploads(Bucket="large").get("Uploads", [])
    assert len(uploads) == 1, "it was killed between parts"
    assert torch.equal(Checkpoint.load(folder).tensors["model.table"], torch.arange(10.0))
    replace(before, step=2).save(folder)
    assert Checkpoint.load(folder).step == 2
    assert len(storage.list_files(folder)) == 2


def _save_half(folder, environment):
    os.environ.update(environment)
    killed.watch({}, ("block step.safetensors", 5))
    Checkpoint(2, Cursor(), {}, {"model.table": torch.zeros(12_000_000)}, {}).save(folder)
