"""The page ``docs/cli.md``, every command with its help: ``python -m infra.cli_page > docs/cli.md``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
from collections.abc import Callable, Iterator

from jobs import runner
from onetrans import cli
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_FAILED, EXIT_NOT_READY, EXIT_OK
from onetrans.lake import TABLES
from onetrans.process import EXIT_CODES, EXIT_INTERRUPTED, TRACEBACK, Parser, exit_code_of

_WIDTH = "100"

_HEAD = f"""# Command line

Written by `python -m infra.cli_page` from the commands themselves; do not edit.

One process, one verb. Every command has `--help` with examples, and `--debug`. What a script would read is one JSON
document on stdout with `--json`; logs, progress and errors go to stderr. Settings come from `onetrans.toml` and
`ONETRANS_...` variables ([configuration.md](configuration.md)); options are what a person varies from call to call.

| exit code | meaning | again? |
|---|---|---|
| {EXIT_OK} | done | |
| {EXIT_BAD_DATA} | the log or a staged table is wrong | not before the data are corrected |
| {EXIT_NOT_READY} | something is not there yet, or MLflow (in `onetrans doctor`, anything) does not answer | yes |
| {EXIT_BAD_CONFIG} | a setting, a schema file or an argument is wrong | not before it is corrected |
| {EXIT_FAILED} | anything else, as a catalog or a store that cannot be used | yes: taken for transient |
| {EXIT_INTERRUPTED} | Ctrl-C | |

An error is one paragraph: what is wrong, with an example, and what to do. `--debug`, or `{TRACEBACK}=1`, shows where
it was raised. An error that nobody foresaw keeps its traceback in a log, and is a line on a terminal. Spark's
jobs, audits, conversions of plain files, migrations and copies, waits, what `onetrans retain` removes, the gate's
bootstrap, a plan, a promotion, a rollback, the look for what `jobs.rebuild` would build and the loading of models to
serve or verify show progress when they take more than two seconds, training and evaluation from the start: a bar on a
terminal, a line every 15 seconds in a log.
"""

JOBS = {
    "jobs.raw": "main",
    "jobs.impressions": "",
    "jobs.backfill": "main",
    "jobs.rebuild": "main",
    "jobs.score_candidates": "main",
    "expectations.audit": "main",
    "infra.local": "infra.local.__main__",
    "infra.airflow.pools": "main",
    "infra.production.prepare": "main",
}
"""Programs besides ``onetrans``; of the jobs of tables, which have the same options, one."""


def page() -> str:
    """Return the text of ``docs/cli.md``."""
    lines = [_HEAD]
    for command, parser in commands():
        lines += [f"## onetrans {command}" if " " not in command else f"### onetrans {command}", ""]
        lines += ["```", _help(parser.print_help), "```", ""]
    lines += [
        f"## Jobs\n\nThe jobs of the tables {', '.join(f'`{table}`' for table in TABLES)} have the same options.\n"
    ]
    for program in JOBS:
        lines += [f"### python -m {program}", "", "```", _help(_main(program)), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command of ``onetrans``, and below it its actions, each with its parser."""
    for command in cli.COMMANDS:
        parser = cli.parser_of(command)
        yield command, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from ((f"{command} {name}", below) for name, below in action.choices.items())


def _main(program: str) -> Callable[[], object]:
    if JOBS[program] == "":
        module = importlib.import_module(program)
        return lambda: runner.main(module.TABLE, module.build, ["--help"])
    module = importlib.import_module(program if JOBS[program] == "main" else JOBS[program])
    return lambda: module.main(["--help"])


def _help(show: Callable[[], object]) -> str:
    """Return what a program prints for ``--help``, as on a terminal of fixed width."""
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), _WIDTH
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            show()
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def main(argv: list[str] | None = None) -> int:
    """Print the page."""
    parser = Parser(
        prog="python -m infra.cli_page",
        description="Print the page docs/cli.md: every command with its help.",
        epilog=f"examples:\n  python -m infra.cli_page > docs/cli.md\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def run() -> int:
        parser.parse_args(argv)
        print(page(), end="")
        return EXIT_OK

    return exit_code_of(run)


if __name__ == "__main__":
    raise SystemExit(main())
