"""The demo's own parts: what it writes as configuration, and that an interrupted stage leaves nothing running."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from examples import demo
from onetrans.errors import EXIT_BAD_CONFIG
from onetrans.process import EXIT_INTERRUPTED
from onetrans.settings import load_settings

LONG = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder that looks like KuaiRand's release."""
    folder = tmp_path / "release"
    (folder / "data").mkdir(parents=True)
    for name in ("user_features", "video_features_basic", "log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08"):
        (folder / "data" / f"{name}_pure.csv").touch()
    return folder


@pytest.mark.parametrize("kind", ["simulated", "kuairand"])
def test_the_configuration_is_accepted_and_stays_in_the_demo_folder(kind: str, release: Path, tmp_path: Path) -> None:
    log = demo.simulated() if kind == "simulated" else demo.kuairand(release)
    file = tmp_path / "onetrans.toml"
    file.write_text(demo.configuration(log, cores=2), encoding="utf-8")
    settings = load_settings({"ONETRANS_CONFIG": str(file)})
    for written in (settings.lake.warehouse, settings.training.runs, settings.mlflow.artifacts):
        assert Path(written).is_relative_to(demo.HOME)
    assert settings.training.threads == 1
    assert settings.airflow.deadline_hours == 0
    assert tomllib.loads(file.read_text())["source"]["kind"] == log.kind


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (lambda data: shutil.rmtree(data.parent), r"--data .*release is not a folder"),
        (lambda data: shutil.rmtree(data), r"release holds neither daily/date=YYYYMMDD folders nor log_standard_\*"),
        (lambda data: (data / "user_features_pure.csv").unlink(), r"there is no user_features_\*.csv in .*release"),
        (lambda data: (data / "log_standard_4_22_to_5_08_pure.csv").unlink(), "impressions 2022-04-25: the log in "),
    ],
)
def test_a_folder_without_the_log_is_refused_before_an_earlier_demo_is_removed(
    release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: Callable[[Path], None],
    told: str,
) -> None:
    kept = tmp_path / "home" / "onetrans.toml"
    kept.parent.mkdir()
    kept.touch()
    monkeypatch.setattr(demo, "HOME", kept.parent)
    changes(release / "data")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert demo.main(["--data", str(release)]) == EXIT_BAD_CONFIG
    finally:
        signal.signal(signal.SIGTERM, before)
    assert re.search(told, capsys.readouterr().err)
    assert kept.exists()


def test_an_interrupted_stage_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HOME", tmp_path)
    (tmp_path / "long.py").write_text(LONG, encoding="utf-8")
    seen: list[int] = []

    def interrupt(text: str) -> None:
        seen.append(int(text))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo, "say", interrupt)
    # A process started in the background of a script inherits that SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    begun = time.monotonic()
    # Every line holds a line end, so the first one, the child's number, is shown.
    try:
        with pytest.raises(KeyboardInterrupt):
            demo._process(environment, "long", shown="\n")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 30
    assert seen
    assert not psutil.pid_exists(seen[0]) or psutil.Process(seen[0]).status() == psutil.STATUS_ZOMBIE


def test_a_failed_stage_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HOME", tmp_path)
    (tmp_path / "failing.py").write_text("raise SystemExit('the disk is full')", encoding="utf-8")
    with pytest.raises(demo.DemoError, match=r"(?s)exit code 1.*the disk is full"):
        demo._process({**os.environ, "PYTHONPATH": str(tmp_path)}, "failing")


def test_it_says_how_long_it_takes_and_what_a_stop_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "HOME", tmp_path)
    monkeypatch.setattr(demo, "_process", stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert demo.main([]) == EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"== empty {tmp_path}: tables, runs and models of an earlier demo go"
    assert f"about {demo.simulated().minutes} minutes on two free cores" in second
    assert last.startswith(f"what is built so far stays in {tmp_path}: ")
    assert last.endswith(" make ui shows it; make demo begins from nothing")
