"""What ``make ui`` runs, as a process: every address that it prints answers, and nothing of it is left when it ends."""

from __future__ import annotations

import os
import re
import signal
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from tracked_days import Shop

from infra.local.airflow import REPOSITORY
from infra.local.processes import Server, stop, wait_until
from onetrans.settings import as_environment

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


def test_every_address_answers_and_nothing_is_left(tmp_path: Path) -> None:
    assert "\n\t@$(PY) -m infra.local\n" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    shop = Shop.open(tmp_path / "shop")
    plan = shop.candidate(shop.days[-1])
    config = tmp_path / "onetrans.toml"
    config.touch()  # what it would say stands in the environment; Airflow's home lies beside it
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "ONETRANS"))},
        **as_environment(shop.settings),
        "ONETRANS_CONFIG": str(config),
        "PYTHONPATH": str(REPOSITORY),
    }
    ui = Server("make ui", [sys.executable, "-m", "infra.local"], environment, tmp_path / "ui.log", tmp_path)
    try:
        ui.start()
        wait_until(lambda: "Ctrl-C stops them." in ui.log.read_text(encoding="utf-8"), [ui], "make ui", 600)
        printed = ui.log.read_text(encoding="utf-8")
        shown = dict(re.findall(r"^  (\w[\w ]*?) +((?:http|file)://\S+)$", printed, re.MULTILINE))
        assert list(shown) == ["Airflow", "MLflow", "Data Docs", "Verdict", "Models"], printed
        assert f"{plan.ds}, the newest day with a verdict:" in printed
        assert (tmp_path / "var" / "airflow" / "airflow.cfg").is_file()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for title, text in (("Airflow", "Airflow"), ("MLflow", "MLflow"), ("Data Docs", "Data Docs"),
                            ("Verdict", str(plan.ds)), ("Models", "MLflow")):  # fmt: skip
            with opener.open(shown[title], timeout=60) as answer:
                assert text in answer.read().decode(), f"{title}: {shown[title]}"
        assert {urlsplit(address).hostname for address in shown.values()} == {"127.0.0.1", None}
        assert ui.process is not None
        started = psutil.Process(ui.process.pid).children(recursive=True)
        assert len(started) >= 6, "Airflow's four servers, MLflow and Data Docs"
        ui.process.send_signal(signal.SIGTERM)
        assert ui.process.wait(timeout=180) == 0, ui.log.read_text(encoding="utf-8")
        assert ui.log.read_text(encoding="utf-8").rstrip().endswith("stopped")
        assert psutil.wait_procs(started, timeout=5)[1] == []
    finally:
        stop([ui])
