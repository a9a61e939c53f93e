"""Two processes train as one does: the same losses, weights and metrics; one that dies ends the job, the next goes on.

The processes are real ones, started by ``torchrun`` or through the settings, and talk over Gloo.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from onetrans import plain_files, storage
from onetrans.artifact import load_model
from onetrans.errors import EXIT_BAD_DATA, EXIT_OK
from onetrans.evaluate import compute_metrics, evaluate, score_files
from onetrans.lake import Lake
from onetrans.models.embeddings import SPARSE_FROM_NUMBERS
from onetrans.plan import Plan, make_plan
from onetrans.settings import as_environment
from onetrans.train import train
from tests.plain_logs import SCHEMA as PLAIN_SCHEMA
from tests.plain_logs import rows, write
from tests.worlds import World, publish_days, settings_in, small_schema

# Two tables large enough for sparse gradients, and small ones.
SCHEMA = small_schema(hash_size=SPARSE_FROM_NUMBERS // 8 + 1)
MODELS = ("onetrans", "dcnv2_din")
DEADLINE_S = 280


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """Settings of a lake with three days, and the days."""
    settings = settings_in(tmp_path_factory.mktemp("ranks"), lookback_days=2, batch_size=64)
    return settings, publish_days(Lake(settings.lake), 3, SCHEMA, World(requests=100))


@pytest.fixture(scope="module")
def alone(lake):
    """The plan of the last day with both models trained by one process, and their figures; read only."""
    settings, days = lake
    plan = make_plan(settings, days[-1], SCHEMA, track=False)
    for name in MODELS:
        train(plan, name, settings)
    return plan, evaluate(plan, settings)


def copied(plan, folder):
    folder.mkdir(parents=True)
    shutil.copy(storage.local_path(plan.path) / "plan.json", folder / "plan.json")
    return Plan.load(str(folder))


def torchrun(processes, arguments, settings):
    return started(
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "onetrans.train", *arguments],
        settings,
    )


def started(module_and_arguments, settings, **options):
    return subprocess.Popen(
        [sys.executable, "-m", *module_and_arguments],
        env={**os.environ, **as_environment(settings), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process):
    """Wait for a process; return its exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    return process.returncode, out, err


def plain_log(folder):
    log = folder / "log"
    log.mkdir()
    (log / "schema.toml").write_text(PLAIN_SCHEMA)
    write(log / "train.csv", rows(12, 1, "train"))
    write(log / "val.jsonl", rows(41, 2, "val"))
    return log


def losses_of(plan, model_name):
    text = storage.read_bytes(storage.join(plan.model_path(model_name), "losses.csv")).decode()
    return np.loadtxt(text.splitlines(), delimiter=",", skiprows=1, ndmin=2)


def assert_trained_alike(mine, theirs, model_name):
    """Compare losses, norms and weights of two trainings, up to the rounding of another order of addition."""
    np.testing.assert_allclose(losses_of(mine, model_name), losses_of(theirs, model_name), rtol=2e-4, atol=1e-6)
    weights, expected = (
        load_model(storage.join(plan.model_path(model_name), "model"))[0].state_dict() for plan in (mine, theirs)
    )
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # A batch norm takes the mean away, so the gradient of a shift before it is rounding alone, which AdamW takes
        # for a direction.
        if ".norm.running_mean" in name or (name.startswith("mlp.") and name.endswith(".bias") and "norm" not in name):
            continue
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("model_name", MODELS)
def test_two_processes_take_the_steps_of_one_and_measure_the_same(lake, alone, model_name, tmp_path):
    settings, _ = lake
    plan, figures = alone
    together = copied(plan, tmp_path / "together")
    code, out, err = ended(torchrun(2, ["--plan", together.path, "--model", model_name], settings))
    assert code == EXIT_OK, err
    assert out.strip() == together.model_path(model_name), "one process reports"
    record = storage.read_json(storage.join(together.model_path(model_name), "finished.json"))
    assert record["processes"] == 2
    assert record["steps"] == len(losses_of(plan, model_name)) > 8
    assert_trained_alike(together, plan, model_name)

    (other,) = set(MODELS) - {model_name}
    shutil.copytree(storage.local_path(plan.model_path(other)), storage.local_path(together.model_path(other)))
    measured = evaluate(together, settings)
    scores, expected = (pq.read_table(storage.local_path(p.path) / "scores.parquet") for p in (together, plan))
    for task in ("ctr", "cvr"):
        column = f"{model_name}_{task}"
        np.testing.assert_allclose(scores[column].to_numpy(), expected[column].to_numpy(), atol=1e-4)
    # Where two scores are that close, a pair may change its order.
    assert measured[model_name] == pytest.approx(figures[model_name], abs=3e-3)


def test_through_the_settings_and_measured_over_all_rows_of_both_processes(tmp_path):
    """``training.processes`` is enough; the figures of a pass are those of one process on the same weights."""
    log = plain_log(tmp_path)
    settings = settings_in(tmp_path, processes=2, batch_size=2)  # some batches are one request: a share is empty
    command = ["onetrans.train", "--model", "dcnv2_din", "--data-dir", str(log), "--epochs", "1"]
    code, out, err = ended(started(command, settings))
    assert code == EXIT_OK, err
    *passes, folder = out.splitlines()
    assert [line.split(":")[0] for line in passes] == ["pass 1"]
    kept = storage.read_json(storage.join(folder.rsplit("/", 1)[0], "finished.json"))
    figures = kept["passes"][kept["best_pass"] - 1]

    model, schema, _ = load_model(folder)
    held_out = plain_files.prepare(str(log), "val", schema, str(tmp_path / "again"))
    scores = score_files(held_out, schema, 64, {"dcnv2_din": model}, settings, "val")
    assert scores.num_rows == figures["rows"] == len(rows(41, 2, "val"))
    assert compute_metrics(scores, ["dcnv2_din"])["dcnv2_din"].to_dict() == pytest.approx(figures, rel=1e-6)


@pytest.mark.nightly
def test_what_one_process_finds_wrong_is_told_in_its_own_words_and_by_its_exit_code(tmp_path):
    log = plain_log(tmp_path)
    write(log / "train.csv", rows(12, 1, "val"))
    settings = settings_in(tmp_path, processes=2)
    code, _, err = ended(started(["onetrans.train", "--model", "dcnv2_din", "--data-dir", str(log)], settings))
    assert code == EXIT_BAD_DATA, err
    assert "RankFailedError: process 0 of 2: BadDataError: 12 requests stand both in train and in val" in err
