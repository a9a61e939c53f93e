"""Two processes train as one does: the same losses, weights and metrics; one that dies ends the job, the next goes on.

The processes are real ones, started by ``torchrun`` or through the settings, and talk over Gloo.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from onetrans import plain_files, storage
from onetrans.artifact import load_model
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_FAILED, EXIT_OK
from onetrans.evaluate import compute_metrics, evaluate, score_files
from onetrans.lake import Lake
from onetrans.models.embeddings import SPARSE_FROM_NUMBERS
from onetrans.plan import make_plan
from onetrans.train import InterruptedTrainingError, train
from tests.plain_logs import SCHEMA as PLAIN_SCHEMA
from tests.plain_logs import rows, write
from tests.ranks import (
    BOUND_S,
    assert_trained_alike,
    copied,
    ended,
    losses_of,
    ranks_under,
    started,
    stopping,
    torchrun,
    wait_for_step,
)  # fmt: skip
from tests.worlds import World, publish_days, settings_in, small_schema

# Two tables large enough for sparse gradients, and small ones.
SCHEMA = small_schema(hash_size=SPARSE_FROM_NUMBERS // 8 + 1)
MODELS = ("onetrans", "dcnv2_din")


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """Settings of a lake with three days, and the days; rows of rare ids are withheld."""
    settings = settings_in(tmp_path_factory.mktemp("ranks"), lookback_days=2, batch_size=64, admit_after=3)
    return settings, publish_days(Lake(settings.lake), 3, SCHEMA, World(requests=100))


@pytest.fixture(scope="module")
def alone(lake):
    """The plan of the last day with both models trained by one process, and their figures; read only."""
    settings, days = lake
    plan = make_plan(settings, days[-1], SCHEMA, track=False)
    for name in MODELS:
        train(plan, name, settings)
    return plan, evaluate(plan, settings)


def plain_log(folder):
    log = folder / "log"
    log.mkdir()
    (log / "schema.toml").write_text(PLAIN_SCHEMA)
    write(log / "train.csv", rows(12, 1, "train"))
    write(log / "val.jsonl", rows(41, 2, "val", after=12))
    return log


@pytest.mark.parametrize(("model_name", "steps_alone"), [("onetrans", 0), ("dcnv2_din", 3)])
def test_two_processes_take_the_steps_of_one_and_measure_the_same(lake, alone, model_name, steps_alone, tmp_path):
    """From the beginning, or from where one process was asked to stop."""
    settings, _ = lake
    plan, figures = alone
    together = copied(plan, tmp_path / "together")
    for _ in range(steps_alone):
        with pytest.raises(InterruptedTrainingError):
            train(together, model_name, settings, stopping())
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
    assert scores.num_rows == figures["rows"] == len(rows(41, 2, "val", after=12))
    assert compute_metrics(scores, ["dcnv2_din"])["dcnv2_din"].to_dict() == pytest.approx(figures, rel=1e-6)


@pytest.fixture(scope="module")
def long(lake):
    """A plan of so many passes that a training can be killed on the way, with one model trained by one process."""
    settings, days = lake
    settings = replace(settings, training=replace(settings.training, epochs=4))
    plan = make_plan(settings, days[-1], SCHEMA, track=False)
    train(plan, "onetrans", settings)
    return settings, plan


@pytest.mark.nightly
def test_whoever_is_killed_all_end_and_the_next_try_goes_on_with_another_number_of_processes(long, tmp_path):
    settings, plan = long
    again = copied(plan, tmp_path / "again")
    busy = replace(settings, training=replace(settings.training, checkpoint_seconds=0.0, processes=2))
    command = ["onetrans.train", "--plan", again.path, "--model", "onetrans"]

    # The process that started them, as Airflow kills it: they have a session of their own, and end by themselves.
    launcher = started(command, busy)
    wait_for_step(again, "onetrans", 1, launcher)
    ranks = ranks_under(launcher)
    assert sorted(ranks) == [0, 1]
    launcher.kill()
    _, left = psutil.wait_procs(ranks.values(), timeout=BOUND_S)
    assert not left
    ended(launcher)
    step = storage.read_json(storage.join(again.model_path("onetrans"), "checkpoint", "checkpoint.json"))["step"]

    # One of them, as the system kills it when memory runs out.
    launcher = started(command, busy)
    step = wait_for_step(again, "onetrans", step + 2, launcher)
    ranks = ranks_under(launcher)
    ranks[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    code, out, err = ended(launcher)
    assert time.monotonic() - killed_at < BOUND_S
    assert code == EXIT_FAILED
    assert out == ""
    assert "RankFailedError: process 1 of 2 was ended by SIGKILL (the system does this when memory runs out)" in err
    assert not any(rank.is_running() for rank in ranks.values())
    assert step < len(losses_of(plan, "onetrans")), "it was killed before its end"

    train(again, "onetrans", settings)
    assert_trained_alike(again, plan, "onetrans")


@pytest.mark.nightly
def test_one_that_hangs_ends_the_training_after_the_timeout(long, tmp_path):
    settings, plan = long
    again = copied(plan, tmp_path / "again")
    training = replace(settings.training, checkpoint_seconds=0.0, processes=2, rank_timeout_seconds=5.0)
    launcher = started(
        ["onetrans.train", "--plan", again.path, "--model", "onetrans"], replace(settings, training=training)
    )
    wait_for_step(again, "onetrans", 1, launcher)
    ranks_under(launcher)[1].suspend()
    code, _, err = ended(launcher)
    assert code == EXIT_FAILED
    assert "RankLostError: a process of this training lost the others" in err
    assert "goes on from the last checkpoint" in err


@pytest.mark.nightly
def test_what_one_process_finds_wrong_is_told_in_its_own_words_and_by_its_exit_code(tmp_path):
    log = plain_log(tmp_path)
    write(log / "train.csv", rows(12, 1, "val"))
    settings = settings_in(tmp_path, processes=2)
    code, _, err = ended(started(["onetrans.train", "--model", "dcnv2_din", "--data-dir", str(log)], settings))
    assert code == EXIT_BAD_DATA, err
    assert "RankFailedError: process 0 of 2: BadDataError: 12 requests stand both in train and in val" in err


@pytest.mark.nightly
def test_the_feature_that_one_process_met_is_named_by_all(tmp_path):
    log = plain_log(tmp_path)
    settings = settings_in(tmp_path, processes=2, embedding_lr=3e38)
    arguments = ["--model", "dcnv2_din", "--batch-size", "8", "--data-dir", str(log)]
    code, _, err = ended(started(["onetrans.train", *arguments], settings))
    assert code == EXIT_BAD_CONFIG, err
    assert re.search(r"process [01] of 2: DivergedError: dcnv2_din, step \d+: .* feature \w+.*; the batch is pass", err)
