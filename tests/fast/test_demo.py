"""The demo's own parts: what it writes as configuration, and that an interrupted stage leaves nothing running."""

from __future__ import annotations

import os
import signal
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from examples import demo
from onetrans.settings import load_settings

LONG = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)"


@pytest.mark.parametrize("log", [demo.simulated(), demo.kuairand(Path())], ids=["simulated", "kuairand"])
def test_the_configuration_is_accepted_and_stays_in_the_demo_folder(log: demo.Log, tmp_path: Path) -> None:
    file = tmp_path / "onetrans.toml"
    file.write_text(demo.configuration(log, cores=2), encoding="utf-8")
    settings = load_settings({"ONETRANS_CONFIG": str(file)})
    for written in (settings.lake.warehouse, settings.training.runs, settings.mlflow.artifacts):
        assert Path(written).is_relative_to(demo.HOME)
    assert settings.training.threads == 1
    assert tomllib.loads(file.read_text())["source"]["kind"] == log.kind


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
