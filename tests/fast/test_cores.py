"""How many cores a process may use is asked in one place, and answered by what it is bound to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_a_process_that_is_bound_to_one_core_uses_one() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\nfrom onetrans.cores import usable_cores\nprint(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_nobody_counts_cores_otherwise() -> None:
    folders = ("onetrans", "jobs", "expectations", "dags", "infra", "benchmarks", "examples")
    counting = {
        str(file.relative_to(ROOT))
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"cpu_count|cpu_affinity|sched_getaffinity", file.read_text(encoding="utf-8"))
    }
    assert counting == {"onetrans/cores.py"}
