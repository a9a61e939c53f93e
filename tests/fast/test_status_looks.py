"""`onetrans status` where a server does not answer: the screen comes all the same, in seconds."""

from __future__ import annotations

import socket
import time

import pytest

from infra import doctor
from onetrans import cli


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
