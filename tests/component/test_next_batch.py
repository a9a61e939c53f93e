"""Next-batch evaluation against a plain loop; its resume, what it must not see, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from onetrans import storage
from onetrans.checkpoint import Checkpoint
from onetrans.cli import main as cli
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_NOT_READY, BadDataError, PipelineError
from onetrans.lake import Lake
from onetrans.loader import LoaderConfig, batch_of
from onetrans.models import build_model
from onetrans.next_batch import NextBatchTraining, plan_next_batch, train_next_batch
from onetrans.optim import build_optimizers
from onetrans.plan import Plan
from onetrans.settings import as_environment
from onetrans.time_order import DayStream, TimeOrderedData
from onetrans.tracking import connect, experiment_id
from onetrans.train import SilentTracker
from tests.worlds import World, publish_days, settings_in, small_schema, write_requests, write_schema

SCHEMA = small_schema()


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    """Settings of a lake with three published days of two files each, which no test changes, and the days."""
    settings = settings_in(tmp_path_factory.mktemp("next_batch"))
    return settings, publish_days(Lake(settings.lake), 3, SCHEMA, World(requests=60))


@pytest.fixture(scope="module")
def unbroken(lake):
    """A run over the three days and its record; read only."""
    settings, days = lake
    plan = plan_next_batch(settings, SCHEMA, days[0], days[2])
    return plan, train_next_batch(plan, "onetrans", settings)


def copied(plan, folder):
    """The same plan in a folder of its own, without anything trained."""
    folder.mkdir(parents=True)
    shutil.copy(storage.local_path(plan.path) / "plan.json", folder / "plan.json")
    return Plan.load(str(folder))


def predictions(plan, day, model_name="onetrans"):
    folder = storage.local_path(plan.model_path(model_name)) / "predictions" / f"ds={day}"
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])


def steps_of(plan, model_name="onetrans"):
    lines = storage.read_bytes(storage.join(plan.model_path(model_name), "losses.csv")).decode().splitlines()
    return [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]


def weights(plan, model_name="onetrans"):
    (file,) = (storage.local_path(plan.model_path(model_name)) / "model").glob("weights-*")
    return file.name  # holds the digest


def without_times(record):
    return {name: record[name] for name in ("days", "mean", "steps", "samples", "final_loss")}


def test_it_equals_a_loop_that_scores_each_batch_and_then_trains_on_it(lake, unbroken):
    settings, days = lake
    plan, record = unbroken
    torch.manual_seed(settings.training.seed)
    model = build_model(plan.models["onetrans"].config, SCHEMA)
    optimizers = build_optimizers(model, plan.models["onetrans"].optimizer)
    ends = iter(int(step["samples"]) for step in steps_of(plan))
    done, figures = 0, []
    for day in days:
        rows = pa.concat_tables([pq.read_table(file) for file in Lake(settings.lake).files("training_requests", [day])])
        rows = rows.take(pa.array(np.argsort(np.array(rows["ts"].cast(pa.int64())), kind="stable")))
        rows = rows.combine_chunks()
        sizes = [len(candidates) for candidates in rows["candidates"].to_pylist()]
        labels, users, ctr, cvr, first = [], [], [], [], 0
        while first < rows.num_rows:
            end, last = next(ends), first
            while done < end:
                done, last = done + sizes[last], last + 1
            batch = batch_of(rows.slice(first, last - first).to_batches()[0], SCHEMA, 64)
            model.eval()
            with torch.no_grad():
                scores = model(batch)
            model.train()
            ctr += torch.sigmoid(scores.ctr_logit_N.double()).tolist()
            cvr += torch.sigmoid(scores.cvr_logit_N.double()).tolist()
            labels += list(zip(batch.click_N.tolist(), batch.conversion_N.tolist(), strict=True))
            users += [u for u, n in zip(rows["user_id"].to_pylist()[first:last], sizes[first:last], strict=True)
                      for _ in range(n)]  # fmt: skip
            optimizers.zero_grad()
            scores = model(batch)
            clicked = batch.click_N == 1
            loss = F.binary_cross_entropy_with_logits(scores.ctr_logit_N, batch.click_N)
            if clicked.any():
                cvr_N, converted_N = scores.cvr_logit_N[clicked], batch.conversion_N[clicked]
                loss = loss + F.binary_cross_entropy_with_logits(cvr_N, converted_N)
            loss.backward()
            optimizers.step()
            first = last
        table = predictions(plan, day)
        assert table["user_id"].to_pylist() == users
        assert list(zip(table["click"].to_pylist(), table["conversion"].to_pylist(), strict=True)) == labels
        np.testing.assert_allclose(table["onetrans_ctr"].to_numpy(), ctr, rtol=1e-4)
        np.testing.assert_allclose(table["onetrans_cvr"].to_numpy(), cvr, rtol=1e-4)
        scored = (table[f"onetrans_{task}"].to_numpy() for task in ("ctr", "cvr"))
        figures.append(expected_figures(np.array(labels), np.array(users), *scored))
    assert [day["ds"] for day in record["days"]] == [str(day) for day in days]
    for got, wanted in zip(record["days"], figures, strict=True):
        assert {name: got["onetrans"][name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    for name in figures[0]:
        assert record["mean"][name] == pytest.approx(np.mean([day[name] for day in figures]), abs=1e-12)
    assert record["days"][2]["truth"]["ctr_auc"] > record["days"][2]["onetrans"]["ctr_auc"]


def expected_figures(labels, users, ctr, cvr):
    click, conversion = labels[:, 0], labels[:, 1]
    every, clicked = np.ones(len(click), bool), click == 1
    figures = {}
    for task, rows, label, score in (("ctr", every, click, ctr), ("cvr", clicked, conversion, cvr)):
        figures[f"{task}_auc"] = roc_auc_score(label[rows], score[rows])
        won = count = 0
        for user in np.unique(users[rows]):
            own = rows & (users == user)
            if len(set(label[own])) == 2:
                won, count = won + own.sum() * roc_auc_score(label[own], score[own]), count + own.sum()
        figures[f"{task}_uauc"] = won / count
    return figures


def assert_same(mine, my_record, plan, record, days):
    assert without_times(my_record) == without_times(record)
    assert weights(mine) == weights(plan)
    for day in days:
        assert predictions(mine, day).equals(predictions(plan, day))


def test_killed_before_each_checkpoint_is_written_it_ends_the_same(lake, unbroken, tmp_path, monkeypatch):
    """The predictions are on disk by then; the resumed run makes them again and must not count them twice."""
    settings, days = lake
    plan, record = unbroken
    often = replace(settings, training=replace(settings.training, checkpoint_seconds=0.0))
    again = copied(plan, tmp_path / "again")
    save, survived = Checkpoint.save, 0

    def crash(self, folder):
        nonlocal survived
        if survived == 2:
            raise KeyboardInterrupt
        survived += 1
        save(self, folder)

    monkeypatch.setattr(Checkpoint, "save", crash)
    left_over = 0
    for attempt in range(2 * record["steps"]):
        survived = 0
        try:  # in turn with many checkpoints, and with one at the end of each day, which spans what was left over
            mine = train_next_batch(again, "onetrans", settings if attempt % 2 else often)
            break
        except KeyboardInterrupt:
            folder = again.model_path("onetrans")
            step = storage.read_json(f"{folder}/checkpoint/checkpoint.json")["step"]
            files = storage.list_files(f"{folder}/predictions", ".parquet")
            left_over += any(int(file[-17:-8]) > step for file in files)
    assert left_over > 1
    assert_same(again, mine, plan, record, days)


def test_a_killed_process_goes_on_to_the_same_predictions(lake, unbroken, tmp_path):
    settings, days = lake
    plan, record = unbroken
    busy = replace(settings, training=replace(settings.training, checkpoint_seconds=0.0, runs=str(tmp_path / "runs")))
    environment = {**os.environ, **as_environment(busy)}
    environment["ONETRANS_SOURCE_SCHEMA"] = str(write_schema(tmp_path / "schema.toml", SCHEMA))
    command = ["--next-batch", "--from", str(days[0]), "--to", str(days[2]), "--model", "onetrans", "--no-mlflow"]
    process = subprocess.Popen(
        [sys.executable, "-m", "onetrans.train", *command], env=environment, stderr=subprocess.PIPE
    )
    again = replace(plan, path=f"file://{tmp_path}/runs/next-batch/{plan.plan_id}")
    checkpoint = storage.local_path(again.model_path("onetrans")) / "checkpoint" / "checkpoint.json"
    deadline = time.monotonic() + 120
    while not (checkpoint.exists() and storage.read_json(str(checkpoint))["step"] >= 7):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 7 <= storage.read_json(str(checkpoint))["step"] < record["steps"]
    assert_same(again, train_next_batch(again, "onetrans", settings), plan, record, days)


def test_scores_of_a_batch_do_not_depend_on_its_labels(lake, unbroken, tmp_path):
    """With the labels of one batch turned round, scores up to its last row are the same bits; all later ones move."""
    settings, days = lake
    plan, _ = unbroken
    ends = [int(step["samples"]) for step in steps_of(plan)]
    files = [turned_round(plan.train_files[0], ends[1], ends[2], tmp_path / "part-0.parquet", plan.train_files[1])]
    changed = replace(plan, path=str(tmp_path / "run"), train_files=tuple(files), train_days=(days[0],))
    train_next_batch(changed, "onetrans", settings)
    before, after = predictions(plan, days[0]), predictions(changed, days[0])
    was, now = before["click"].to_pylist(), after["click"].to_pylist()
    assert was[: ends[1]] == now[: ends[1]]
    assert was[ends[1] : ends[2]] == [1 - click for click in now[ends[1] : ends[2]]]
    for column in ("onetrans_ctr", "onetrans_cvr"):
        same = before[column].to_numpy() == after[column].to_numpy()
        assert same[: ends[2]].all()
        assert not same[ends[2] :].any()


def turned_round(first, start, end, path, *others):
    """Write the rows of some files in order of time to one, with the clicks of impressions start to end negated."""
    rows = pa.concat_tables([pq.read_table(file) for file in (first, *others)])
    rows = rows.take(pa.array(np.argsort(np.array(rows["ts"].cast(pa.int64())), kind="stable")))
    candidates, done = rows["candidates"].to_pylist(), 0
    for request in candidates:
        for candidate in request:
            if start <= done < end:
                candidate["click"] = 1 - candidate["click"]
                candidate["conversion"] = 0
            done += 1
    column = pa.array(candidates, rows.schema.field("candidates").type)
    pq.write_table(rows.set_column(rows.column_names.index("candidates"), "candidates", column), path)
    return str(path)


def test_files_of_a_day_are_merged_by_time_whatever_the_windows(lake, tmp_path):
    day = lake[1][0]
    paths = [tmp_path / f"part-{n}.parquet" for n in range(3)]
    tables = [write_requests(p, day, SCHEMA, World(requests=40 + 30 * n), part=n) for n, p in enumerate(paths)]
    rows = pa.concat_tables(tables)
    order = np.argsort(np.array(rows["ts"].cast(pa.int64())), kind="stable")
    wanted = np.array(rows["request_id"].to_pylist())[order].tolist()
    for window_batches in (1, 2, 50):
        config = LoaderConfig(8, 64, window_batches=window_batches)
        data = TimeOrderedData([str(p) for p in paths], SCHEMA, config, with_keys=True)
        loaded = list(data.batches(shuffle_seed=None))
        assert data.num_windows > 1 or window_batches == 50
        assert list(dict.fromkeys(r for part in loaded for r in part.keys["request_id"].to_pylist())) == wanted
        for place in {part.cursor.place for part in loaded}:
            stored = pq.ParquetFile(place.file).read_row_group(place.row_group)["request_id"][place.row].as_py()
            first = next(part for part in loaded if part.cursor.place == place)
            assert first.keys["request_id"][0].as_py() == stored
        for number in (1, len(loaded) // 2, len(loaded) - 1):
            rest = list(data.batches(shuffle_seed=None, start=loaded[number].cursor))
            assert all(part.keys.equals(was.keys) for part, was in zip(rest, loaded[number:], strict=True))


def test_a_file_that_is_not_in_order_of_time_is_refused(lake, tmp_path):
    table = write_requests(tmp_path / "a.parquet", lake[1][0], SCHEMA, World(requests=30))
    pq.write_table(table.take(pa.array([*range(20, 30), *range(20)])), tmp_path / "b.parquet")
    with pytest.raises(BadDataError, match=r"b.parquet: row 10 is earlier than the row before it"):
        DayStream({lake[1][0]: [str(tmp_path / "b.parquet")]}, SCHEMA, LoaderConfig(8, 64))


def test_a_finished_run_exits_at_once_and_keeps_no_checkpoint(lake, unbroken, monkeypatch):
    plan, record = unbroken
    assert not storage.exists(storage.join(plan.model_path("onetrans"), "checkpoint"))
    monkeypatch.setattr("onetrans.next_batch.NextBatchTraining", None)  # anything that trained would fail
    assert train_next_batch(plan, "onetrans", lake[0]) == record


def test_the_command_prints_a_table_and_records_each_day_in_mlflow(lake, tmp_path, monkeypatch, capsys):
    settings, days = lake
    settings = replace(settings, training=replace(settings.training, runs=str(tmp_path / "runs")))
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ONETRANS_SOURCE_SCHEMA", str(write_schema(tmp_path / "schema.toml", SCHEMA)))
    command = ["train", "--model", "dcnv2_din", "--next-batch", "--from", str(days[0])]
    assert cli([*command, "--to", str(days[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["day", "rows", "ctr_auc"]
    assert [line.split()[0] for line in lines[1:4]] == [str(days[0]), str(days[1]), "mean"]
    figures = storage.read_json(storage.join(lines[4], "next_batch.json"))
    assert float(lines[3].split()[1]) == pytest.approx(figures["mean"]["ctr_auc"], abs=1e-4)
    assert cli([*command, "--to", str(days[1]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["mean"]) == (lines[4], figures["mean"])
    client = connect(settings.mlflow)
    (run,) = client.search_runs([experiment_id(settings.mlflow)])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "day.ctr_auc")
    assert {point.step: point.value for point in history} == {
        int(day["ds"].replace("-", "")): day["dcnv2_din"]["ctr_auc"] for day in figures["days"]
    }
    assert run.data.metrics["mean.cvr_uauc"] == figures["mean"]["cvr_uauc"]

    assert cli([*command, "--to", str(days[2].replace(day=days[2].day + 1))]) == EXIT_NOT_READY
    assert "has no published 2024-02-29" in capsys.readouterr().err
    sound = ["--next-batch", "--from", str(days[0]), "--to", str(days[1])]
    for options, told in (
        (["--next-batch", "--from", "2024-02-28", "--to", "2024-02-26"], "ends on 2024-02-26, before it begins"),
        (["--next-batch", "--from", "2024-02-30", "--to", "2024-03-01"], "is not a day of the calendar"),
        (["--from", str(days[1])], "--next-batch is needed beside --from"),
        (["--from", str(days[1]), "--next-batch"], "--to is needed beside --next-batch"),
        ([*sound, "--ds", str(days[1])], "--ds does not go with --next-batch"),
        ([*sound, "--data-dir", "log"], "--next-batch needs published days; it does not work with --data-dir"),
        ([*sound, "--from-scratch"], "--from-scratch does not go with --next-batch"),
        ([*sound, "--batch-size", "8"], "the size of a batch is training.batch_size"),
    ):
        assert cli(["train", "--model", "onetrans", *options]) == EXIT_BAD_CONFIG
        assert told in capsys.readouterr().err


def test_a_score_that_is_not_finite_stops_the_run(lake, unbroken, tmp_path):
    settings, _ = lake
    training = NextBatchTraining(copied(unbroken[0], tmp_path / "again"), "onetrans", settings)
    with torch.no_grad():
        next(training.model.parameters()).fill_(float("nan"))
    told = r"onetrans, step 1: a CTR score is not finite; row \d+ of table .* is not finite; the batch is pass 0"
    with pytest.raises(PipelineError, match=told):
        training.run(SilentTracker())
