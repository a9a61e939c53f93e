"""Errors a person reads, and the exit code each one ends a process with.

The exit code is how a step tells Airflow what to do next: bad data and bad
configuration are never retried, a dependency that is not ready is, and any
other failure is treated as transient.  ``dags/steps.py`` holds the other end of
this table.
"""

from __future__ import annotations

import re

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_DATA = 65
EXIT_NOT_READY = 75
EXIT_BAD_CONFIG = 78

UNHARMED = "Published data is as it was."
"""What errors of builds and audits say of published data; ``dags/steps.py`` says it where an error does not."""


class PipelineError(Exception):
    """Base of every error the pipeline raises on purpose; its text is meant for the on-call engineer."""

    exit_code = EXIT_FAILED


class BadDataError(PipelineError):
    """The input or a staged table is wrong; running the step again on the same data cannot help."""

    exit_code = EXIT_BAD_DATA


class NotReadyError(PipelineError):
    """Something this step reads is not published yet; running the step again later can help."""

    exit_code = EXIT_NOT_READY


class CatalogAwayError(PipelineError):
    """The catalog of tables does not answer, or refuses.  Whether a day is published is not known then, so it is no
    :class:`NotReadyError`, which a wait takes for "not published"; like any failure it is tried again."""


class BadConfigError(PipelineError):
    """A setting, a schema file or an argument is wrong; a person has to change it."""

    exit_code = EXIT_BAD_CONFIG


def without_login(text: str) -> str:
    """Return a text whose addresses have no user's name and password any more, to be shown or logged."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def holds_password(text: str) -> bool:
    """Tell whether an address in a text has a user's password in it."""
    return re.search(r"://[^/@\s]*:[^/@\s]+@", text) is not None
