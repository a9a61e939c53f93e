"""`onetrans registry` where nothing was registered: a look makes no store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onetrans import cli
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_OK


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONETRANS_MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    return tmp_path


def test_a_list_of_no_store_is_empty(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["registry", "list", "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == []
    assert cli.main(["registry", "list"]) == EXIT_OK
    assert capsys.readouterr().out.split()[:2] == ["version", "day"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("action", [["show"], ["verify"], ["diff"], ["promote", "--version", "1", "--reason", "x"]])
def test_all_else_says_that_there_is_none(folder: Path, capsys: pytest.CaptureFixture[str], action: list[str]) -> None:
    assert cli.main(["registry", *action]) == EXIT_BAD_CONFIG
    assert "there is no registry yet: MLflow's store sqlite:///" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
