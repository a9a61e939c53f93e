"""Where nothing was registered, published or planned yet: a look makes nothing, and may be repeated."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import date, timedelta
from pathlib import Path

import pytest

from jobs import raw
from jobs.sources.simulated import write
from onetrans import cli, progress, tracking
from onetrans.errors import EXIT_NOT_READY, EXIT_OK, NotReadyError
from onetrans.serving.source import opened
from onetrans.settings import load_settings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONETRANS_MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    return tmp_path


def test_a_list_of_no_store_is_empty(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["registry", "list", "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == []
    assert cli.main(["registry", "list"]) == EXIT_OK
    assert capsys.readouterr().out.startswith("no version yet: ")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("action", [["show"], ["verify"], ["diff"], ["promote", "--version", "1", "--reason", "x"]])
def test_all_else_says_that_there_is_none(folder: Path, capsys: pytest.CaptureFixture[str], action: list[str]) -> None:
    assert cli.main(["registry", *action]) == EXIT_NOT_READY
    assert "there is no registry yet: MLflow's store sqlite:///" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("listens", [False, True], ids=["refused", "silent"])
@pytest.mark.parametrize("command", ["registry list", "registry verify --version 1", "serve --port 0", "status"])
def test_a_server_that_does_not_answer_keeps_nobody_waiting(
    listens: bool, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tracking._ONCE, "MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        monkeypatch.setenv("ONETRANS_MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        ended = cli.main(command.split())
        took = time.monotonic() - began
    printed = capsys.readouterr()
    if command == "status":  # the screen comes all the same, and says of the champion alone that it is not known
        assert ended == EXIT_OK
        assert "no day yet; build one" in printed.out
        told = printed.out.split("Champion\n")[1].split("Running\n")[0]
        assert "secret" not in printed.out
    else:
        assert ended == EXIT_NOT_READY
        told = printed.err
    assert "NotReadyError: MLflow at http://127.0.0.1:" in told
    assert ("timed out" if listens else "refused") in told
    assert "nothing was promoted" not in told
    assert "secret" not in told
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ  # a step of the night has its patience back
    assert took < 30  # MLflow's own client asks again for five minutes


def test_a_database_of_mlflow_that_is_down_keeps_nobody_waiting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        place = f"ann:secret@127.0.0.1:{nobody.getsockname()[1]}/mlflow"
        monkeypatch.setenv("ONETRANS_MLFLOW_TRACKING_URI", f"postgresql+psycopg://{place}")
        began = time.monotonic()
        assert cli.main(["registry", "show"]) == EXIT_NOT_READY
        took = time.monotonic() - began
    told = capsys.readouterr().err
    assert "MLflow's database postgresql+psycopg://127.0.0.1:" in told
    assert "secret" not in told
    assert took < 30  # MLflow itself tries for a hundred seconds


@pytest.mark.parametrize(
    "command", [["published", "impressions", "--ds", "2026-01-10"], ["report"],
                ["report", "--from", "2026-01-10", "--to", "2026-01-11"], ["quarantine", "list"]],
)  # fmt: skip
def test_what_is_not_there_yet_may_be_asked_for_again(folder: Path, command: list[str]) -> None:
    assert cli.main(command) == EXIT_NOT_READY
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("address", ["models:/onetrans-ranker@champion", "models:/m-1", "models:/x/1", "runs:/abc"])
def test_serving_makes_no_store_of_its_own(folder: Path, address: str) -> None:
    with pytest.raises(NotReadyError), opened(address, load_settings().mlflow):
        pass
    assert list(folder.iterdir()) == []


def test_who_waits_sees_that_it_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SAID_AFTER_S", 0.1)
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.1)
    caplog.set_level("INFO")
    assert cli.main(["published", "impressions", "--ds", "2026-01-10", "--wait", "1.5"]) == EXIT_NOT_READY
    assert "waiting for impressions of 2026-01-10: " in caplog.text
    monkeypatch.setenv("ONETRANS_SOURCE_SCHEMA", str(Path(write.__file__).with_name("schema.toml")))
    Path("var", "raw").mkdir(parents=True)
    later = str(date.today() + timedelta(days=2))
    assert raw.main(["--ds", later, "--wait", "1.5"]) == EXIT_NOT_READY
    assert f"waiting for the raw log of {later}: " in caplog.text
