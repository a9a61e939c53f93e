"""`onetrans status` where a server does not answer: the screen comes all the same, in seconds."""

from __future__ import annotations

import json
import socket
import time
from datetime import date
from pathlib import Path

import pytest

from infra import doctor
from onetrans import cli
from onetrans.report import report
from onetrans.settings import Settings, TrainingSettings


@pytest.mark.parametrize("listens", [False, True], ids=["refused", "silent"])
def test_a_server_of_mlflow_that_does_not_answer_keeps_nobody_waiting(
    listens: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    monkeypatch.setattr(doctor, "_ANSWERS_WITHIN_S", 2.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        monkeypatch.setenv("ONETRANS_MLFLOW_TRACKING_URI", f"http://u:secret@127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        assert cli.main(["status"]) == 0
        took = time.monotonic() - began
    printed = capsys.readouterr().out
    assert "no day yet; build one" in printed
    champion = printed.split("Champion\n")[1].split("Running\n")[0]
    assert "NotReadyError: MLflow at http://127.0.0.1:" in champion
    assert ("timed out" if listens else "refused") in champion
    assert "nothing was promoted" not in champion
    assert "secret" not in printed
    assert took < 30  # MLflow's own client asks again for five minutes


def test_a_day_says_how_far_its_trainings_came(tmp_path: Path) -> None:
    settings = Settings(training=TrainingSettings(runs=str(tmp_path)))
    plan = {
        "plan_id": "p",
        "created_at": "2022-05-05T00:00:00",
        "preset": "tiny",
        "train_days": [],
        "warm_start_ds": None,
    }
    folder = tmp_path / "ds=2022-05-04" / "p"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({**plan, "models": {"onetrans": {}, "dcnv2_din": {}}}))
    states = []
    for file in ("", "onetrans/.lock", "onetrans/finished.json", "dcnv2_din/.lock", "dcnv2_din/finished.json"):
        if file:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("{}")
        states.append(report(settings, date(2022, 5, 4), date(2022, 5, 4))[0]["state"])
    trained = "training begun, onetrans trained"
    assert states == ["planned", "training begun", trained, trained, "trained"]
