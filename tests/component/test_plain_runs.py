"""A model is trained and evaluated on plain files by the commands a person types."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.cli import main as cli
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_OK
from onetrans.plain_runs import plan_files
from onetrans.settings import TrainingSettings, load_settings
from tests.plain_logs import SCHEMA, rows, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONETRANS_TRAINING_THREADS", "1")
    log = tmp_path / "log"
    log.mkdir()
    (log / "schema.toml").write_text(SCHEMA)
    write(log / "train.csv", rows(400, 1, "train"))
    write(log / "val.jsonl", rows(120, 2, "val", after=401))
    write(log / "test.parquet", rows(120, 3, "test", after=521))
    return log


def command(folder: Path, *more: str) -> list[str]:
    return ["train", "--config", "tiny", "--data-dir", str(folder), "--batch-size", "64", *more]


def test_the_best_pass_on_held_out_rows_is_kept_and_evaluated(folder, capsys):
    assert cli(command(folder, "--epochs", "4")) == EXIT_OK
    *passes, path = capsys.readouterr().out.strip().splitlines()
    assert [line.split(":")[0] for line in passes] == ["pass 1", "pass 2", "pass 3", "pass 4"]
    kept = [number for number, line in enumerate(passes, 1) if line.endswith("<- kept")]
    figures = storage.read_json(storage.join(path.rsplit("/", 1)[0], "passes.json"))
    means = [figure["ctr_auc"] + figure["cvr_auc"] for figure in figures]
    assert kept == [means.index(max(means)) + 1]

    assert cli(["evaluate", "--model-path", path, "--data-dir", str(folder), "--split", "val", "--out", "o"]) == EXIT_OK
    measured = storage.read_json("o/metrics.json")["onetrans"]
    assert measured == pytest.approx(figures[kept[0] - 1], rel=1e-6)
    assert cli(["evaluate", "--model-path", path.rsplit("/", 1)[0], "--data-dir", str(folder)]) == EXIT_OK
    assert "onetrans" in capsys.readouterr().out

    # The same command finds its work; other files are another run.
    assert cli(command(folder, "--epochs", "4")) == EXIT_OK
    assert capsys.readouterr().out.strip().splitlines() == [*passes, path]
    assert cli(command(folder, "--epochs", "4", "--json")) == EXIT_OK
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["best_pass"], told["passes"]) == (path, kept[0], figures)
    write(folder / "train.csv", rows(401, 1, "train"))
    assert cli(command(folder, "--epochs", "1")) == EXIT_OK
    assert capsys.readouterr().out.strip().splitlines()[-1] != path


def test_without_held_out_rows_the_last_pass_is_kept(folder, capsys):
    (folder / "val.jsonl").unlink()
    assert cli(command(folder, "--epochs", "1")) == EXIT_OK
    (path,) = capsys.readouterr().out.strip().splitlines()
    assert load_model(path)[1].name == "plain"

    # The command that shows the days shows it too, and another one before it is finished.
    time.sleep(1.1)  # plans are dated to the second
    plan_files(str(folder), replace(load_settings(), training=TrainingSettings(preset="base")))
    assert cli(["status", "--json"]) == EXIT_OK
    finished, begun = json.loads(capsys.readouterr().out)["others"]
    assert path.startswith(finished["path"])
    assert list(finished["finished"]) == ["onetrans"]
    assert (begun["preset"], begun["finished"]) == ("base", {})
    assert cli(["status", "--days", "1"]) == EXIT_OK
    shown = capsys.readouterr().out
    assert f"base    {begun['plan_id']}  none yet" in shown
    assert f"reads the files of {folder}, without a lake" in shown
    assert finished["plan_id"] not in shown


def test_options_that_contradict_each_other_and_rows_in_two_splits_are_refused(folder, capsys):
    assert cli(["train", "--model", "onetrans", "--epochs", "3", "--ds", "2026-01-01"]) == EXIT_BAD_CONFIG
    assert "--epochs needs --data-dir" in capsys.readouterr().err
    assert cli(command(folder, "--ds", "2026-01-01")) == EXIT_BAD_CONFIG
    assert "--ds belongs to a day of the lake" in capsys.readouterr().err
    assert cli(command(folder, "--from-scratch")) == EXIT_BAD_CONFIG
    assert "--from-scratch belongs to a day of the lake" in capsys.readouterr().err
    evaluation = ["evaluate", "--data-dir", str(folder), "--model-path", "m", "--config", "base"]
    assert cli(evaluation) == EXIT_BAD_CONFIG
    assert "--config belongs to a day of the lake" in capsys.readouterr().err
    assert cli(["evaluate", "--data-dir", str(folder)]) == EXIT_BAD_CONFIG
    assert "--model-path is needed beside --data-dir" in capsys.readouterr().err
    write(folder / "val.jsonl", rows(50, 2, "train", after=401))
    assert cli(command(folder)) == EXIT_BAD_DATA
    assert "50 requests stand both in train and in val, for example 'train0000'" in capsys.readouterr().err


def test_rows_that_are_not_later_than_those_trained_on_are_refused_unless_it_is_meant(folder, capsys):
    (folder / "val.jsonl").unlink()
    assert cli(command(folder, "--epochs", "1")) == EXIT_OK
    (path,) = capsys.readouterr().out.strip().splitlines()
    write(folder / "val.jsonl", rows(120, 2, "val", after=390))
    told = r"10 of 120 requests of val are not later than the last of train \(2026-04-02 .*, the first is of 2026-04-02"
    evaluation = ["evaluate", "--model-path", path, "--data-dir", str(folder), "--split", "val"]
    for refused in (command(folder, "--epochs", "1"), evaluation):
        assert cli(refused) == EXIT_BAD_DATA
        assert re.search(told, capsys.readouterr().err)
        assert cli([*refused, "--overlapping-times"]) == EXIT_OK
    write(folder / "test.parquet", rows(120, 3, "val", after=600))
    assert cli([*evaluation[:-1], "test"]) == EXIT_BAD_DATA
    assert "120 requests stand both in val and in test" in capsys.readouterr().err
    # What the model was trained on may be scored, if that is asked for.
    assert cli([*evaluation[:-1], "train"]) == EXIT_OK


def test_rows_that_the_model_was_trained_on_are_refused_wherever_they_lie(folder, tmp_path, capsys):
    """The folder's own ``train`` may be another one by now, or the model of another folder."""
    assert cli(command(folder, "--epochs", "1")) == EXIT_OK
    path = capsys.readouterr().out.strip().splitlines()[-1]
    other = tmp_path / "other"
    write(other / "test.parquet", rows(120, 3, "test", after=521))
    (other / "schema.toml").write_text(SCHEMA)
    evaluation = ["evaluate", "--model-path", path, "--data-dir", str(other)]
    assert cli(evaluation) == EXIT_OK
    write(other / "test.parquet", rows(30, 1, "train", after=521))
    assert cli(evaluation) == EXIT_BAD_DATA
    told = "30 requests stand both in the model's training and in test, for example 'train0000'"
    assert told in capsys.readouterr().err
    write(other / "test.parquet", rows(120, 3, "test", after=390))
    assert cli(evaluation) == EXIT_BAD_DATA
    assert "9 of 120 requests of test are not later than the last of the model's training" in capsys.readouterr().err
    assert cli([*evaluation, "--overlapping-times"]) == EXIT_OK


def test_files_of_one_name_in_two_splits_are_no_common_rows(folder, capsys):
    """As Spark names them; without ``request_id`` a row is known by its place."""
    for split, seed, after in (("train", 1, 0), ("val", 2, 401)):
        for file in folder.glob(f"{split}.*"):
            file.unlink()
        given = [{n: v for n, v in row.items() if n != "request_id"} for row in rows(60, seed, after=after)]
        write(folder / split / "part-0.csv", given)
    assert cli(command(folder, "--epochs", "1")) == EXIT_OK
    assert capsys.readouterr().out.startswith("pass 1: val ")
