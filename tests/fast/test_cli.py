"""The command line: help without heavy imports, exit codes, and the generated configuration page."""

import argparse
import ast
import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expectations import audit
from infra import cli_page
from jobs import backfill, impressions, raw, runner
from onetrans import cli
from onetrans.commands.config import reference_page
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_NOT_READY
from onetrans.lake import SCORES, TABLES


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


COMMANDS = dict(cli_page.commands())
WITHOUT_JSON = {
    "simulate": "writes files",
    "quarantine show": "prints rows, or writes them as JSON lines with --out",
    "serve": "answers over HTTP",
}
"""Commands whose stdout no script would read."""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_like_the_others(command: str) -> None:
    parser = COMMANDS[command]
    options = {option for action in parser._actions for option in action.option_strings}
    assert "--debug" in options
    groups = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
    assert groups or ("--json" in options) == (command not in WITHOUT_JSON)
    assert all(action.help for action in parser._actions if action.dest != "action")
    text = parser.format_help()
    assert f"  onetrans {command}" in text or f" onetrans {command}" in text.split("example")[1]
    assert "exit codes: 0" in text


def test_days_and_plans_are_named_alike_by_every_command() -> None:
    """One thing has one option: --ds a day, --from and --to a range, --plan a plan."""
    known = {"--day", "--date", "--start", "--end", "--since", "--until", "--run", "--plan-id"}
    for command, parser in COMMANDS.items():
        options = {option for action in parser._actions for option in action.option_strings}
        assert not known & options, command
        assert ("--from" in options) == ("--to" in options) or command == "simulate", command


def test_the_page_of_the_command_line_is_current() -> None:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("argparse words its help otherwise in other versions of Python")
    written = Path(__file__).parents[2] / "docs" / "cli.md"
    assert written.read_text(encoding="utf-8") == cli_page.page(), "run: python -m infra.cli_page > docs/cli.md"


def failing(tmp_path: Path, error: str, *arguments: str, terminal: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command that raises ``error``, with stderr a terminal or not."""
    code = (
        "import sys; from onetrans.process import exit_code_of, Parser; from onetrans.errors import BadDataError\n"
        f"sys.stderr.isatty = lambda: {terminal}\n"
        "def run():\n"
        f"    Parser().parse_args({list(arguments)!r})\n"
        f"    raise {error}\n"
        "sys.exit(exit_code_of(run))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("error", "terminal", "code", "traceback"),
    [
        ("BadDataError('torn')", False, 65, False),
        ("BadDataError('torn')", True, 65, False),
        ("ZeroDivisionError('torn')", True, 1, False),
        ("ZeroDivisionError('torn')", False, 1, True),
        ("KeyboardInterrupt()", False, 130, False),
    ],
)
def test_a_stack_trace_is_shown_when_asked_for(
    tmp_path: Path, error: str, terminal: bool, code: int, traceback: bool
) -> None:
    """But an error that nobody foresaw keeps it in a log, which cannot be asked again."""
    done = failing(tmp_path, error, terminal=terminal)
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == traceback
    assert "Traceback" in failing(tmp_path, error, "--debug", terminal=terminal).stderr


def test_a_mistyped_command_has_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pubish"]) == EXIT_BAD_CONFIG
    assert "there is no command 'pubish'; did you mean 'publish'?" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--ds", "tomorrow"],
        ["train", "--model", "onetrans", "--ds", "2022-02-30"],
        ["evaluate", "--ds", "20220504"],
        ["report", "--from", "x", "--to", "y"],
        ["published", "impressions", "--ds", "yesterday"],
    ],
)
def test_a_day_that_is_none_is_bad_configuration(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.splitlines()[-1].startswith("BadConfigError: ")


@pytest.mark.parametrize("arguments", [["plan", "--day", "2022-05-04"], ["train", "--model", "dcn"], ["publish"]])
def test_a_wrong_argument_is_bad_configuration(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Airflow would try the 2 of argparse again and again."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"BadConfigError: onetrans {arguments[0]}: ")


JOBS: dict[str, Callable[[list[str]], int]] = {
    "jobs.raw": raw.main,
    "jobs.impressions": functools.partial(runner.main, impressions.TABLE, impressions.build),
    "jobs.backfill": backfill.main,
    "expectations.audit": audit.main,
}


@pytest.mark.parametrize("job", JOBS)
def test_a_wrong_argument_of_a_job_is_bad_configuration(job: str) -> None:
    with pytest.raises(SystemExit) as stop:
        JOBS[job](["--no-such-option"])
    assert stop.value.code == EXIT_BAD_CONFIG


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (
            "jobs.impressions",
            [
                "one row per item shown in a request",
                "python -m jobs.impressions --from 2026-01-01 --to 2026-01-14 --publish",
                "next, where days are not published here:\n  python -m expectations.audit impressions --ds 2026-01-10",
                "exit codes: 0 done, 65 bad data",
            ],
        ),
        ("expectations.audit", [", ".join(TABLES), SCORES, "next:    onetrans publish impressions --ds 2026-01-10"]),
    ],
)
def test_help_says_what_a_job_does_and_what_comes_next(
    job: str, told: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # so that argparse breaks no line
    with pytest.raises(SystemExit) as stop:
        JOBS[job](["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert [text for text in told if text not in printed] == []


PROGRAMS = ("examples.demo", "infra.airflow.pools", "infra.cli_page", "infra.local.result_pictures",
            "infra.local.screenshots", "infra.notices", "infra.production.prepare", "jobs.spark")  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_does_nothing_for_its_help(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONETRANS_CONFIG", str(tmp_path / "none.toml"))  # whoever reads its settings fails
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m {program} [-h]")
    assert f"examples:\n  python -m {program}" in printed
    assert "exit codes: 0" in printed


def test_the_configuration_in_force_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["config"])
    assert "# file: none" in capsys.readouterr().out
    Path("onetrans.toml").write_text("[training]\nepochs = 2\n")
    monkeypatch.setenv("ONETRANS_GATE_SEED", "4")
    cli.main(["config"])
    printed = capsys.readouterr().out
    assert f"# file: {tmp_path}/onetrans.toml\n# environment: ONETRANS_GATE_SEED\n" in printed
    assert "epochs = 2" in printed


def test_a_mistyped_section_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ONETRANS_TRAIN_PRESET", "base")
    assert cli.main(["config"]) == EXIT_BAD_CONFIG
    assert "ONETRANS_TRAIN_PRESET names no setting; did you mean ONETRANS_TRAINING_PRESET?" in capsys.readouterr().err


def test_a_lake_that_is_not_there_is_named_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lake"]) == EXIT_NOT_READY
    assert f"there is no lake in file://{tmp_path}/var/lake" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_library_knows_nothing_of_what_is_built_on_it() -> None:
    """But for the simulator, which `onetrans simulate` starts by name (docs/architecture.md)."""
    above = {"dags", "jobs", "expectations"}
    for file in (Path(__file__).parents[2] / "onetrans").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not above & {name.split(".")[0] for name in names}, file
    implemented = {module for module, _ in cli.COMMANDS.values() if module.split(".")[0] in above}
    assert implemented == {"jobs.sources.simulated.write", "jobs.quarantine", "jobs.schema_check"}
