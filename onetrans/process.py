"""How a process of the pipeline ends: its arguments, the exit code of what went wrong, where a person sees more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from onetrans.errors import EXIT_BAD_CONFIG, EXIT_OK, BadConfigError, PipelineError


class Parser(argparse.ArgumentParser):
    """An argument parser that ends with the exit code of bad configuration; argparse's own, 2, would be retried."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the reason to stderr, and end."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_BAD_CONFIG, f"{BadConfigError.__name__}: {self.prog}: {message}\n")


def see(where: str) -> None:
    """Tell where a person sees what a step wrote; ``dags/steps.py`` ends a failure's text with it."""
    print(f"see: {where}", file=sys.stderr, flush=True)


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command and return its exit code; an error of the pipeline becomes one paragraph on stderr.

    ``ONETRANS_TRACEBACK=1`` shows where it was raised.
    """
    try:
        return run()
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except PipelineError as error:
        if os.environ.get("ONETRANS_TRACEBACK"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
