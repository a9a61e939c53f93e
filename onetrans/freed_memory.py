"""Keeps what a training frees for its next step, where the C library would give it back to the system at once.

A step on a CPU takes and frees the same tensors again and again.  glibc returns a freed block of more than some
MiB, and the free end of its heap, to the system; the next step takes them anew, and the system clears each page
first: at ``base`` a fourteenth of the step (benchmarks/results/model.md).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``, from glibc's ``malloc.h``."""
_NEVER = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""Bytes; glibc takes no more.  A larger block still comes from the system, and goes back to it."""


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its own later use; return False where the C library has no such choice.

    The process then holds its peak until it ends, so it is for one that trains and ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))
