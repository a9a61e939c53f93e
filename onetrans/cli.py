"""The command line: ``onetrans <command>``.

Each command lives in a module with ``add_arguments(parser)`` and ``run(args)``.
Only the module of the command that was asked for is imported, so that a step
that commits to the lake does not pay for loading torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import sys

from onetrans import __version__
from onetrans.errors import EXIT_BAD_CONFIG
from onetrans.process import EXIT_CODES, Parser, exit_code_of, quiet_libraries

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("infra.doctor", "check whether everything is here that a day needs, and say how to mend what is not"),
    "status": ("infra.status", "show the last days, models, the champion and what runs now, on one screen"),
    "simulate": (
        "jobs.sources.simulated.write",
        "write the raw log of a simulated shop, of any size, with faults if wanted",
    ),
    "lake": ("onetrans.commands.lake", "list tables, days, snapshots and row counts"),
    "publish": ("onetrans.commands.publish", "publish the staged, audited day of a table"),
    "quarantine": ("jobs.quarantine", "list and show refused rows; replay those that were repaired"),
    "published": ("onetrans.commands.published", "tell by the exit code whether a day is published"),
    "retain": ("onetrans.commands.retain", "remove replaced versions, orphaned files and old checkpoints"),
    "plan": ("onetrans.plan", "decide and pin what one day's training reads and starts from"),
    "train": ("onetrans.train", "train one model on the days before a day"),
    "evaluate": ("onetrans.evaluate", "score a day's rows with both models and measure them"),
    "gate": ("onetrans.gate", "judge whether the candidate beats the baseline"),
    "promote": ("onetrans.registry", "register the candidate and move the aliases the gate allows"),
    "upgrade": ("onetrans.commands.upgrade", "bring databases and tables to this code's version, after copies"),
    "registry": ("onetrans.commands.registry", "list, show, compare, promote or roll back registered models"),
    "serve": ("onetrans.commands.serve", "answer ranking requests over HTTP with the champion"),
    "schema": ("jobs.schema_check", "explain every mistake of a feature schema file, line by line"),
    "config": ("onetrans.commands.config", "print every setting in force"),
    "report": ("onetrans.report", "print figures and verdicts of a range of days"),
}
"""Command -> module that implements it, and one line of help."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the process's exit code (``onetrans/errors.py``)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        return _overview(argv)
    parser = parser_of(argv[0])
    run = importlib.import_module(COMMANDS[argv[0]][0]).run
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    quiet_libraries()
    # With the arguments as they were given, for a command that starts itself again in several processes.
    parser.set_defaults(given=argv[1:])
    # Reading the arguments is part of it: a day that is none is refused there.
    return exit_code_of(lambda: int(run(parser.parse_args(argv[1:]))))


def parser_of(command: str) -> Parser:
    """Return the parser of a command; its help ends with examples and exit codes."""
    module_name, summary = COMMANDS[command]
    module = importlib.import_module(module_name)
    parser = Parser(
        prog=f"onetrans {command}",
        description=summary[0].upper() + summary[1:] + ".",
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    if "exit codes:" not in (parser.epilog or ""):
        parser.epilog = f"{(parser.epilog or '').rstrip()}\n\n{EXIT_CODES}"
    _tell_actions(parser)
    return parser


def _tell_actions(parser: Parser) -> None:
    """Give the help of each action of a command its examples, out of the command's, and the exit codes."""
    told = parser.epilog or ""
    for actions in (action for action in parser._actions if isinstance(action, argparse._SubParsersAction)):
        summaries = {listed.dest: listed.help or "" for listed in actions._choices_actions}
        for name, below in actions.choices.items():
            examples = [line.rstrip() for line in told.splitlines() if line.startswith(f"  {parser.prog} {name}")]
            below.description = f"{summaries[name][0].upper()}{summaries[name][1:]}."
            below.epilog = "\n".join(["examples:", *examples, "", told[told.index("exit codes:") :]])
            below.formatter_class = argparse.RawDescriptionHelpFormatter


def _overview(argv: list[str]) -> int:
    parser = Parser(
        prog="onetrans",
        description="The daily ranking pipeline. Run `onetrans COMMAND --help` for a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
        + f"\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"onetrans {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    near = difflib.get_close_matches(arguments.command, COMMANDS, 1)
    meant = f"did you mean {near[0]!r}?" if near else "try `onetrans --help`"
    print(f"onetrans: there is no command {arguments.command!r}; {meant}", file=sys.stderr)
    return EXIT_BAD_CONFIG


if __name__ == "__main__":
    sys.exit(main())
