"""How many processor cores a process may use: those it is bound to, not those of the machine."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the number of cores that this process may run on, 1 or more."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
