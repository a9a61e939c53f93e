"""A process that keeps what it frees does not ask the system for it again."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import numpy as np
from onetrans.freed_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    # 80 MiB in blocks of 20, as activations are: all held, then all freed.
    return [np.ones(20 << 17) for _ in range(4)]

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_taken(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_later_steps_take_no_pages_again():
    assert pages_taken("keep") < 1_000
    assert pages_taken("leave") > 10_000, "the C library keeps memory by itself: then nothing needs to be done"
