"""A promotion that a person forces: the argument that asks for it, and when it is refused.

``plan``, ``gate`` and ``promote`` take the same argument.  ``plan`` only refuses
early what ``promote`` would refuse after hours of training, ``gate`` keeps the
reason beside its verdict, and ``promote`` acts on it.  The reason belongs to one
run of one day: there is no setting for it, which would force every day.
"""

from __future__ import annotations

import argparse

from onetrans.errors import BadConfigError
from onetrans.settings import GateSettings


def add_force_argument(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Declare ``--force REASON``."""
    parser.add_argument("--force", metavar="REASON", help=meaning)


def forced_reason(reason: str | None, settings: GateSettings) -> str:
    """Return why a person forces the promotion; empty if nobody does.

    Args:
        reason: value of the argument; None: it was not given.
        settings: the gate's.

    Raises:
        BadConfigError: if a blank reason was given, or the gate's mode leaves the champion as it is.
    """
    if reason is None:
        return ""
    if not reason.strip():
        raise BadConfigError(
            "a forced promotion needs a reason, and the one given is blank; it is kept with the model, so that the "
            "next person knows why"
        )
    if settings.mode != "enabled":
        raise BadConfigError(
            f"gate.mode = {settings.mode} leaves the champion as it is, so this day cannot be promoted, forced or not "
            f"(the reason given is {reason.strip()!r}); take gate.mode = enabled, or leave the reason out"
        )
    return reason.strip()
