"""The command line: help without heavy imports, exit codes, and the generated configuration page."""

import subprocess
import sys
from pathlib import Path

import pytest

from onetrans import cli
from onetrans.commands.config import reference_page
from onetrans.errors import EXIT_BAD_CONFIG


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from onetrans import cli; cli.main([]); "
        "heavy = {'torch', 'pyspark', 'mlflow', 'pyiceberg', 'pandas'} & set(sys.modules); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"onetrans {command}" in capsys.readouterr().out


def test_an_error_is_a_sentence_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONETRANS_SPARK_SHUFFLE_PARTITIONS", "0")
    assert cli.main(["config"]) == EXIT_BAD_CONFIG
    assert "spark.shuffle_partitions = 0 must be at least 1" in capsys.readouterr().err
    assert cli.main(["no-such-command"]) == EXIT_BAD_CONFIG


def test_the_configuration_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference_page(), (
        "run: onetrans config --markdown > docs/configuration.md"
    )
