"""`onetrans status` where a part cannot be read: the screen comes all the same, in seconds."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from infra import doctor
from infra.status import status
from onetrans import cli
from onetrans.settings import Settings, TrainingSettings


@pytest.mark.parametrize("listens", [False, True], ids=["refused", "silent"])
def test_a_catalog_that_does_not_answer_is_one_line_and_the_rest_is_shown(
    listens: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("psycopg")
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    monkeypatch.setattr(doctor, "_ANSWERS_WITHIN_S", 2.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}/lake"
        monkeypatch.setenv("ONETRANS_LAKE_CATALOG_URI", f"postgresql+psycopg://u:secret@{address}")
        began = time.monotonic()
        assert cli.main(["status"]) == 0
        took = time.monotonic() - began
    printed, logged = capsys.readouterr()
    tables = printed.split("Tables\n")[1].split("Models\n")[0].strip().splitlines()
    assert len(tables) == 1
    assert tables[0].startswith(f"  NotReadyError: the catalog postgresql+psycopg://{address}: ".strip())
    assert ("no answer in 2 s" if listens else "refused") in tables[0]
    assert "no training of a day yet" in printed
    assert "Running\n" in printed
    assert "secret" not in printed + logged
    assert took < 30


def test_a_part_that_nobody_foresaw_is_one_line_and_debug_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds=2022-05-04" / "p").mkdir(parents=True)
    (tmp_path / "ds=2022-05-04" / "p" / "plan.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    settings = Settings(training=TrainingSettings(runs=str(tmp_path)))
    found = status(settings, 7)
    assert found["models"] == {"error": "KeyError: 'created_at'"}
    assert found["tables"] == {"days": {}, "earlier": 0}
    monkeypatch.setenv("ONETRANS_TRACEBACK", "1")
    with pytest.raises(KeyError, match="created_at"):
        status(settings, 7)
