"""Long work says that it goes on, also while one call takes all the time; work of a moment says nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from onetrans import cli, progress
from onetrans.plain_files import prepare, read_schema
from tests.plain_logs import SCHEMA, rows, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "schema.toml").write_text(SCHEMA)
    write(tmp_path / "log" / "train.csv", rows(2000))
    return tmp_path / "log"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "onetrans.progress"]


def convert(folder: Path) -> None:
    prepare(str(folder), "train", read_schema(str(folder)), str(folder.parent / "out"))


def test_the_conversion_of_plain_files_says_how_far_it_is(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SAID_AFTER_S", 0.01)
    monkeypatch.setattr(progress, "_BEAT_S", 0.005)
    with caplog.at_level(logging.INFO):
        convert(folder)
    first, *_, last = said(caplog)
    assert first.startswith("train: files to requests: ")
    assert "3 of 3" not in first
    assert last.startswith("train: files to requests: 3 of 3 (100 %) steps")


def test_what_was_done_before_counts_as_done_and_not_as_speed(caplog: pytest.LogCaptureFixture) -> None:
    """A training that goes on from its checkpoint is not at 0 % again."""
    with caplog.at_level(logging.INFO), progress.Progress(1000, "samples", "model", before=900) as shown:
        shown._start -= 10.0
        shown.advance(50)
    assert said(caplog)[-1] == "model: 950 of 1,000 (95 %) samples, 5 samples/s, 10 s left"


def test_what_is_done_in_a_moment_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train.csv").unlink()
    write(folder / "train.csv", rows(5))
    with caplog.at_level(logging.INFO):
        convert(folder)
    assert said(caplog) == []


def test_one_call_that_takes_long_is_told_of_while_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SAID_AFTER_S", 0.02)
    monkeypatch.setattr(progress, "_BEAT_S", 0.005)
    told = threading.Event()
    monkeypatch.setattr(progress.Progress, "_log", _then(progress.Progress._log, told))
    with caplog.at_level(logging.INFO), progress.long_steps(None, "audit of impressions"):
        assert told.wait(10), "nothing was said during the call"
        assert said(caplog) == ["audit of impressions: 0 s so far"]
    assert said(caplog)[-1] == "audit of impressions: done in 0 s"


def _then(log: Callable[..., None], event: threading.Event) -> Callable[..., None]:
    def logged(shown: progress.Progress, **how: bool) -> None:
        log(shown, **how)
        event.set()

    return logged


def test_retention_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "SAID_AFTER_S", 0.0)
    with caplog.at_level(logging.INFO):
        assert cli.main(["retain", "--dry-run"]) == 0
    assert said(caplog)[-1].startswith("looking for what may go: ")
