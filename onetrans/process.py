"""How a process of the pipeline ends: its arguments, the exit code of what went wrong, where a person sees more."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from onetrans.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_OK, BadConfigError, PipelineError

EXIT_INTERRUPTED = 130
"""As shells count it: 128 and the number of SIGINT."""

EXIT_CODES = (
    "exit codes: 0 done, 65 bad data, 75 not ready yet, 78 bad configuration, "
    f"{EXIT_INTERRUPTED} Ctrl-C, 1 anything else"
)
"""What the exit code of every process tells (``onetrans/errors.py``)."""

TRACEBACK = "ONETRANS_TRACEBACK"
"""Set to anything: errors show where they were raised."""


class _Debug(argparse.Action):
    """Sets :data:`TRACEBACK` for this process and those it starts."""

    def __call__(self, *_: Any) -> None:
        os.environ[TRACEBACK] = "1"


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with the exit code of bad configuration; argparse's own, 2, would be retried.

    Every command takes ``--debug``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_argument(
            "--debug",
            action=_Debug,
            nargs=0,
            default=argparse.SUPPRESS,
            help=f"show where an error was raised, as {TRACEBACK}=1 does",
        )

    def error(self, message: str) -> NoReturn:
        """Print the usage and the reason to stderr, and end."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_BAD_CONFIG, f"{BadConfigError.__name__}: {self.prog}: {message}\n")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare ``--json``: one JSON document on stdout in place of the text."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def quiet_libraries() -> None:
    """Keep what libraries tell of their own doings out of a process's log; their warnings stay."""
    for library in ("py4j", "great_expectations", "pyiceberg"):
        logging.getLogger(library).setLevel(logging.WARNING)


def print_json(value: Any) -> None:
    """Print a value as one JSON document."""
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def see(where: str) -> None:
    """Tell where a person sees what a step wrote; ``dags/steps.py`` ends a failure's text with it."""
    print(f"see: {where}", file=sys.stderr, flush=True)


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command and return its exit code; an error of the pipeline becomes one paragraph on stderr.

    Any other error is a line too on a terminal, where a person can ask for more with ``--debug``; in a log, which
    cannot be asked again, it keeps its traceback.
    """
    try:
        return run()
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except PipelineError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK):
            raise
        print("stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK) or not sys.stderr.isatty():
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        print("Nobody foresaw this error; --debug shows where it was raised", file=sys.stderr)
        return EXIT_FAILED
