"""Training and evaluation of both models from a published lake: exact resume (G3), the daily chain, same new rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.cli import main as cli
from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.evaluate import check_rows_are_new, evaluate
from onetrans.gate import Scores
from onetrans.lake import Lake
from onetrans.loader import LoaderConfig, RequestData
from onetrans.plan import Plan, make_plan, preset_models
from onetrans.settings import SourceSettings, as_environment
from onetrans.train import DivergedError, InterruptedTrainingError, SilentTracker, Training, train
from tests.worlds import FIRST_DAY, World, publish_day, publish_days, settings_in, small_schema, write_schema

SCHEMA = small_schema()
MODELS = ("onetrans", "dcnv2_din")


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """Settings of a lake with five published days that no test changes, and the days."""
    settings = settings_in(tmp_path_factory.mktemp("training"), lookback_days=3)
    return settings, publish_days(Lake(settings.lake), 5, SCHEMA, World(requests=150))


@pytest.fixture(scope="module")
def first_day(lake):
    """The plan of the fourth day with both models trained and evaluated; read only."""
    settings, days = lake
    plan = make_plan(settings, days[3], SCHEMA, track=False)
    records = {name: train(plan, name, settings) for name in MODELS}
    return plan, records, evaluate(plan, settings)


def weights(folder):
    return load_model(storage.join(folder, "model"))[0].state_dict()


def assert_same_bits(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def copied(plan, folder):
    """The same plan in a folder of its own, without anything trained."""
    folder.mkdir(parents=True)
    shutil.copy(storage.local_path(plan.path) / "plan.json", folder / "plan.json")
    return Plan.load(str(folder))


def losses_of(plan, model_name):
    lines = storage.read_bytes(storage.join(plan.model_path(model_name), "losses.csv")).decode().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]


@pytest.mark.parametrize("model_name", MODELS)
def test_a_training_leaves_model_losses_and_record(lake, first_day, model_name):
    plan, records, _ = first_day
    record, losses = records[model_name], losses_of(plan, model_name)
    rows = sum(
        len(row["candidates"])
        for row in Lake(lake[0].lake).read("training_requests", plan.train_days, ("candidates",)).to_pylist()
    )
    assert record["rows"] == record["samples"] == int(losses[-1]["samples"]) == rows
    assert record["steps"] == len(losses) > 10
    assert record["config"]["model"] == model_name
    assert record["train_days"] == [str(day) for day in lake[1][:3]]
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 50 << 20
    profile = storage.read_json(storage.join(plan.model_path(model_name), "profile.json"))
    assert profile["steps_measured"] == record["steps"]
    assert profile["shares"].keys() >= {"loading", "embedding", "backward", "optimizer"}
    early, late = (np.mean([float(row["loss"]) for row in part]) for part in (losses[:8], losses[-8:]))
    assert late < early
    model, schema, config = load_model(storage.join(plan.model_path(model_name), "model"))
    assert schema == plan.schema
    assert config == plan.models[model_name].config
    assert not model.training


def test_both_models_read_the_same_batches(first_day):
    plan, _, _ = first_day
    onetrans, baseline = ([(row["step"], row["samples"]) for row in losses_of(plan, name)] for name in MODELS)
    assert onetrans == baseline


def test_a_finished_training_exits_at_once(lake, first_day, monkeypatch):
    plan, records, _ = first_day
    monkeypatch.setattr("onetrans.train.Training", None)  # anything that trained would fail
    assert train(plan, "onetrans", lake[0]) == records["onetrans"]


@pytest.mark.parametrize("model_name", MODELS)
def test_a_killed_process_goes_on_to_the_same_weights(lake, first_day, model_name, tmp_path):
    settings, _ = lake
    plan, _, _ = first_day
    again = copied(plan, tmp_path / "again")
    busy = replace(settings, training=replace(settings.training, checkpoint_seconds=0.0))
    process = subprocess.Popen(
        [sys.executable, "-m", "onetrans.train", "--plan", again.path, "--model", model_name],
        env={**os.environ, **as_environment(busy)},
        stderr=subprocess.PIPE,
    )
    checkpoint = storage.local_path(again.model_path(model_name)) / "checkpoint" / "checkpoint.json"
    deadline = time.monotonic() + 120
    while not (checkpoint.exists() and json.loads(checkpoint.read_bytes())["step"] >= 4):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = json.loads(checkpoint.read_bytes())["step"]
    assert 4 <= step < len(losses_of(plan, model_name))

    record = train(again, model_name, settings)
    assert_same_bits(weights(again.model_path(model_name)), weights(plan.model_path(model_name)))
    assert losses_of(again, model_name) == losses_of(plan, model_name)
    assert record["steps"] == len(losses_of(plan, model_name))


def test_interrupted_again_and_again_with_dropout_and_two_passes_ends_the_same(lake, tmp_path):
    settings, days = lake
    settings = replace(settings, training=replace(settings.training, epochs=2, runs=str(tmp_path / "runs")))
    models = preset_models("tiny")
    models["onetrans"] = replace(models["onetrans"], config=replace(models["onetrans"].config, dropout=0.2))
    plan = make_plan(settings, days[1], SCHEMA, models=models, track=False)
    train(plan, "onetrans", settings)

    again = copied(plan, tmp_path / "again")
    stop = threading.Event()
    stop.set()
    steps = len(losses_of(plan, "onetrans"))
    assert steps > 10
    for step in range(1, steps + 1):
        with pytest.raises(InterruptedTrainingError, match=f"after step {step};"):
            train(again, "onetrans", settings, stop)
    assert train(again, "onetrans", settings, stop)["steps"] == steps
    assert_same_bits(weights(again.model_path("onetrans")), weights(plan.model_path("onetrans")))
    assert losses_of(again, "onetrans") == losses_of(plan, "onetrans")


def test_sigterm_saves_a_checkpoint_and_asks_to_run_again(lake, first_day, tmp_path):
    settings, _ = lake
    again = copied(first_day[0], tmp_path / "again")
    process = subprocess.Popen(
        [sys.executable, "-m", "onetrans.train", "--plan", again.path, "--model", "dcnv2_din"],
        env={**os.environ, **as_environment(settings)},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not _handles_sigterm(process.pid):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    errors = process.stderr.read().decode()
    assert process.wait() == 1, errors
    assert "InterruptedTrainingError: dcnv2_din: asked to stop after step" in errors
    assert storage.exists(storage.join(again.model_path("dcnv2_din"), "checkpoint", "checkpoint.json"))


def _handles_sigterm(pid):
    """Read from /proc whether the process catches SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_damaged_checkpoint_begins_the_training_again_and_a_foreign_one_is_refused(lake, first_day, tmp_path):
    settings, _ = lake
    again = copied(first_day[0], tmp_path / "again")
    source = storage.local_path(first_day[0].model_path("onetrans")) / "checkpoint"
    target = storage.local_path(again.model_path("onetrans")) / "checkpoint"
    shutil.copytree(source, target)
    (tensors,) = target.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-10])
    record = train(again, "onetrans", settings)
    assert "is damaged: it is cut short" in record["restarted"]
    assert_same_bits(weights(again.model_path("onetrans")), weights(first_day[0].model_path("onetrans")))
    shutil.copytree(source, storage.local_path(again.model_path("dcnv2_din")) / "checkpoint")
    with pytest.raises(BadConfigError, match="belongs to another model"):
        train(again, "dcnv2_din", settings)


def test_the_next_day_goes_on_from_this_one(lake, first_day):
    settings, days = lake
    first, records, _ = first_day
    second = make_plan(settings, days[4], SCHEMA, track=False)
    assert second.warm_start_ds == days[3]
    assert list(second.train_days) == [days[3]]
    for name in MODELS:
        training = Training(second, name, settings)
        assert_same_bits(training.model.state_dict(), weights(first.model_path(name)))
        assert training.optimizers.steps == records[name]["steps"]
        assert training.step == 0
        record = train(second, name, settings)
        assert record["warm_start"] == first.model_path(name)
        with pytest.raises(AssertionError):
            assert_same_bits(weights(second.model_path(name)), weights(first.model_path(name)))
    metrics = evaluate(second, settings)
    assert metrics["onetrans"]["rows"] == RequestData(second.evaluation_files, SCHEMA, LoaderConfig(64, 64)).impressions


def test_the_next_day_goes_on_with_larger_hash_tables(lake, first_day):
    settings, days = lake
    grown = small_schema(hash_size=2 * 97)
    second = make_plan(settings, days[4], grown, track=False)
    assert second.warm_start_ds == days[3]
    training = Training(second, "dcnv2_din", settings)
    table = training.model.embeddings.table("item")
    before = weights(first_day[0].model_path("dcnv2_din"))["embeddings.table_item"]
    assert torch.equal(table, torch.cat((before, before[1:])))
    assert training.optimizers.embedding.state[table]["sum"].shape == table.shape
    training.run(SilentTracker())
    assert not torch.equal(table[1:98], table[98:])


def test_a_day_after_an_outage_is_trained_on(tmp_path):
    settings = settings_in(tmp_path)
    days = [FIRST_DAY + timedelta(days=n) for n in range(5)]
    for ds in (days[0], days[1], days[3], days[4]):
        publish_day(Lake(settings.lake), ds, SCHEMA, World(requests=20))
    with pytest.raises(NotReadyError, match=f"has no published {days[2]}"):
        make_plan(settings, days[4], SCHEMA, track=False)
    settings = replace(settings, source=SourceSettings(absent_days=(days[2],)))
    plan = make_plan(settings, days[4], SCHEMA, track=False)
    record = train(plan, "dcnv2_din", settings)
    assert record["train_days"] == [str(days[n]) for n in (0, 1, 3)]


def test_another_configuration_goes_back_to_the_look_back_window(lake, first_day):
    settings, days = lake
    changed = preset_models("tiny")
    changed["dcnv2_din"] = replace(changed["dcnv2_din"], config=replace(changed["dcnv2_din"].config, cross_layers=3))
    plan = make_plan(settings, days[4], SCHEMA, models=changed, track=False)
    assert [model.warm_start for model in plan.models.values()] == [None, None]
    assert list(plan.train_days) == days[1:4]
    assert "dcnv2_din config: cross_layers = 2, now 3" in plan.decision


def test_a_learning_rate_that_explodes_stops_with_step_cause_and_place(lake, tmp_path):
    settings, days = lake
    settings = replace(settings, training=replace(settings.training, runs=str(tmp_path / "runs")))
    models = preset_models("tiny")
    exploding = replace(models["onetrans"].optimizer, dense_lr=1e36, warmup_steps=0)
    models["onetrans"] = replace(models["onetrans"], optimizer=exploding)
    plan = make_plan(settings, days[1], SCHEMA, models=models, track=False)
    where = r"the batch is pass 0, batch \d of window 0, which starts at .*part-0\.parquet, row group 0, row 0; "
    cause = r"weights and input are finite, \d+ CTR scores are not, .* is of feature \w+"
    with pytest.raises(DivergedError, match=f"onetrans, step 2: the loss is nan; {cause}; {where}"):
        train(plan, "onetrans", settings)
    assert not storage.exists(storage.join(plan.model_path("onetrans"), "finished.json"))


def test_a_row_that_is_not_finite_stops_with_its_feature_and_changes_nothing(lake, tmp_path):
    settings, days = lake
    settings = replace(settings, training=replace(settings.training, runs=str(tmp_path / "runs")))
    training = Training(make_plan(settings, days[1], SCHEMA, track=False), "onetrans", settings)
    with torch.no_grad():
        training.model.embeddings.table("user").fill_(float("nan"))
    before = {name: weight.clone() for name, weight in training.model.state_dict().items() if "table" not in name}
    told = r"step 1: the loss is nan; row \d+ of table user, which feature user looks up \d+ times in the batch, is not"
    with pytest.raises(DivergedError, match=told):
        training.run(SilentTracker())
    assert all(torch.equal(training.model.state_dict()[name], weight) for name, weight in before.items())


def test_a_training_that_changes_nothing_is_refused(lake, tmp_path):
    settings, days = lake
    settings = replace(settings, training=replace(settings.training, runs=str(tmp_path / "runs")))
    models = preset_models("tiny")
    frozen = replace(models["onetrans"].optimizer, dense_lr=1e-30, embedding_lr=1e-30)
    models["onetrans"] = replace(models["onetrans"], optimizer=frozen)
    plan = make_plan(settings, days[1], SCHEMA, models=models, track=False)
    told = (
        r"onetrans, steps 1 to \d+, which began with pass 0, batch 0 of window 0, which starts at "
        r".*part-0\.parquet, row group 0, row 0: \d+ of \d+ weight tensors never changed, for example blocks.*; "
        r"the features that are looked up there: user, "
    )
    with pytest.raises(DivergedError, match=told):
        train(plan, "onetrans", settings)


# Evaluation


def test_scores_hold_every_row_of_the_day_once_with_both_models(lake, first_day):
    settings, days = lake
    plan, _, _ = first_day
    scores = pq.read_table(storage.local_path(plan.path) / "scores.parquet")
    assert scores.column_names == [
        "request_id", "user_id", "item_id", "ts", "click", "conversion", "true_ctr", "true_cvr",
        "onetrans_ctr", "onetrans_cvr", "dcnv2_din_ctr", "dcnv2_din_cvr", "popularity_ctr", "popularity_cvr",
        "item_impressions", "user_impressions", *(f"context.{f.name}" for f in SCHEMA.of_side("context")
                                                  if f.kind != "vector"),
    ]  # fmt: skip
    published = Lake(settings.lake).read("training_requests", [days[3]]).to_pylist()
    expected = {
        (row["request_id"], row["user_id"], candidate["item_id"], candidate["click"], candidate["conversion"])
        for row in published
        for candidate in row["candidates"]
    }
    keys = scores.select(["request_id", "user_id", "item_id", "click", "conversion"])
    assert {tuple(row.values()) for row in keys.to_pylist()} == expected
    assert scores.num_rows == sum(len(row["candidates"]) for row in published)


def test_figures_are_those_of_the_scores(first_day):
    plan, _, metrics = first_day
    scores = pq.read_table(storage.local_path(plan.path) / "scores.parquet").to_pandas()
    clicked = scores[scores.click == 1]
    for name, ctr, cvr in [(n, f"{n}_ctr", f"{n}_cvr") for n in MODELS] + [("truth", "true_ctr", "true_cvr")]:
        assert metrics[name]["ctr_auc"] == pytest.approx(roc_auc_score(scores.click, scores[ctr]), abs=1e-12)
        assert metrics[name]["cvr_auc"] == pytest.approx(roc_auc_score(clicked.conversion, clicked[cvr]), abs=1e-12)
        assert metrics[name]["ctr_log_loss"] == pytest.approx(log_loss(scores.click, scores[ctr]), abs=1e-12)
    assert metrics["truth"]["ctr_auc"] > max(metrics[name]["ctr_auc"] for name in MODELS)
    assert storage.read_json(storage.join(plan.path, "metrics.json")) == metrics


def test_scores_are_those_of_the_saved_models_one_request_at_a_time(first_day):
    plan, _, _ = first_day
    scores = pq.read_table(storage.local_path(plan.path) / "scores.parquet")
    data = RequestData(plan.evaluation_files, SCHEMA, LoaderConfig(1, 64))
    for name in MODELS:
        model = load_model(storage.join(plan.model_path(name), "model"))[0].eval()
        with torch.inference_mode():
            logit_N = torch.cat([model(loaded.batch).ctr_logit_N for loaded in data.batches(shuffle_seed=None)])
        np.testing.assert_allclose(torch.sigmoid(logit_N.double()).numpy(), scores[f"{name}_ctr"].to_numpy(), atol=1e-5)


def test_the_gate_takes_the_scores(first_day):
    plan, _, metrics = first_day
    taken = Scores.from_table(_scores_of(plan))
    assert taken.metrics("onetrans").to_dict() == metrics["onetrans"]


def _scores_of(plan):
    """The scores with one row per (request, item): this world shows an item twice now and then, a real log never."""
    table = pq.read_table(storage.local_path(plan.path) / "scores.parquet")
    row = pa.array([str(n) for n in range(table.num_rows)])
    return table.set_column(table.column_names.index("item_id"), "item_id", row)


def test_evaluation_waits_for_both_models(lake, first_day, tmp_path):
    settings, _ = lake
    again = copied(first_day[0], tmp_path / "again")
    with pytest.raises(NotReadyError, match=r"run: onetrans train --plan .* --model onetrans"):
        evaluate(again, settings)


def test_rows_that_training_has_seen_are_refused(first_day, tmp_path):
    plan, _, _ = first_day
    check_rows_are_new(plan)
    with pytest.raises(BadDataError, match=r"trains and evaluates on .*part-0"):
        check_rows_are_new(replace(plan, train_files=(*plan.train_files, plan.evaluation_files[0])))
    with pytest.raises(BadDataError, match="trains on 2024-02-29, not before 2024-02-29"):
        check_rows_are_new(replace(plan, train_days=(*plan.train_days, plan.ds)))
    shutil.copy(storage.local_path(plan.evaluation_files[0]), tmp_path / "copy.parquet")
    with pytest.raises(BadDataError, match="75 training requests are from 2024-02-29 or later"):
        check_rows_are_new(replace(plan, train_files=(str(tmp_path / "copy.parquet"),)))
    with pytest.raises(BadDataError, match="requests to evaluate on are from before 2024-02-29"):
        check_rows_are_new(replace(plan, evaluation_files=plan.train_files[:1], train_files=()))
    known = pq.read_table(storage.local_path(plan.train_files[0]))
    repeated = pq.read_table(storage.local_path(plan.evaluation_files[0]))
    repeated = repeated.set_column(1, "request_id", known["request_id"])
    pq.write_table(repeated, tmp_path / "repeated.parquet")
    with pytest.raises(BadDataError, match=r"75 requests stand both in .* for example '2024-02-26-0-0'"):
        check_rows_are_new(replace(plan, evaluation_files=(str(tmp_path / "repeated.parquet"),)))


def test_the_commands_run_a_day_without_mlflow(lake, tmp_path, monkeypatch, capsys):
    settings, days = lake
    settings = replace(settings, training=replace(settings.training, runs=str(tmp_path / "runs"), lookback_days=1))
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ONETRANS_SOURCE_SCHEMA", str(write_schema(tmp_path / "schema.toml", SCHEMA)))
    day = ["--ds", str(days[1]), "--config", "tiny", "--no-mlflow"]
    monkeypatch.setattr("onetrans.tracking.start_model", None)  # a training that tracked would fail
    for name in MODELS:
        assert cli(["train", "--model", name, *day]) == 0
        plan = make_plan(settings, days[1], SCHEMA, track=False)
        replace(plan, mlflow_run_id="opened by another command").save()
    capsys.readouterr()
    assert cli(["evaluate", *day]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:3] == ["model", "ctr_auc", "ctr_uauc"]
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["onetrans", "dcnv2_din", "popularity"]


def test_training_is_computed_as_the_settings_say(lake, first_day, tmp_path):
    """Recomputation changes no bit of any weight; bfloat16 changes the losses by its rounding."""
    settings, _ = lake
    plan, records, _ = first_day
    assert records["onetrans"]["compute"] == {"precision": "float32", "recompute": False}
    lean = replace(settings, training=replace(settings.training, recompute=True))
    again = copied(plan, tmp_path / "recomputed")
    assert train(again, "onetrans", lean)["compute"]["recompute"] is True
    assert_same_bits(weights(again.model_path("onetrans")), weights(plan.model_path("onetrans")))
    half = replace(settings, training=replace(settings.training, precision="bfloat16"))
    rounded = copied(plan, tmp_path / "rounded")
    assert train(rounded, "onetrans", half)["compute"]["precision"] == "bfloat16"
    exact, coarse = ([float(row["loss"]) for row in losses_of(p, "onetrans")] for p in (plan, rounded))
    assert exact != coarse
    np.testing.assert_allclose(coarse, exact, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_day_is_trained_in_bfloat16_and_scored_as_on_the_cpu(lake, first_day, tmp_path):
    settings, _ = lake
    gpu = replace(settings, training=replace(settings.training, device="cuda"))
    again = copied(first_day[0], tmp_path / "again")
    for name in MODELS:
        assert train(again, name, gpu)["device"] == "cuda"
    evaluate(again, gpu)
    on_gpu = pq.read_table(storage.local_path(again.path) / "scores.parquet")
    evaluate(again, settings)
    on_cpu = pq.read_table(storage.local_path(again.path) / "scores.parquet")
    for name in MODELS:
        np.testing.assert_allclose(on_gpu[f"{name}_ctr"].to_numpy(), on_cpu[f"{name}_ctr"].to_numpy(), atol=0.02)
