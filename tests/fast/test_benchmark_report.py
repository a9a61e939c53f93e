"""The convention of benchmarks: expectations, the table and the JSON."""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import Report, meets, parser
from infra.local.watch import ProcessorWatch


@pytest.mark.parametrize(
    ("value", "expected", "ok"),
    [
        (8, ">= 8", True),
        (7.99, ">= 8", False),
        (0.01, "<= 1e-2", True),
        (3, "< 3", False),
        (-1, "> -2", True),
        (5, "", True),
    ],
)
def test_expectations(value: float, expected: str, ok: bool) -> None:
    assert meets(value, expected) is ok


def test_an_expectation_that_is_no_comparison_is_refused() -> None:
    with pytest.raises(ValueError, match="not a comparison"):
        meets(1, "about 8")


def test_a_missed_expectation_fails_the_benchmark(tmp_path, capsys) -> None:
    arguments = parser("x").parse_args(["--quick", "--json", str(tmp_path / "out" / "r.json")])
    report = Report("example", arguments)
    report.add("case a", "time", 12.5, "s", expected="<= 10")
    report.add("case b", "peak memory", 812, "MB")
    assert report.finish() == 1
    written = json.loads((tmp_path / "out" / "r.json").read_text())
    assert set(written) >= {"commit", "hardware", "rows"}
    assert written["rows"][0] == {
        "case": "case a",
        "figure": "time",
        "value": 12.5,
        "unit": "s",
        "expected": "<= 10",
        "ok": False,
    }
    assert written["rows"][1]["ok"] is True
    printed = capsys.readouterr().out
    assert "MISSED case a time" in printed
    assert "case b" in printed


def test_nothing_missed_is_success() -> None:
    report = Report("example", argparse.Namespace(quick=False, json=None))
    report.add("case", "speed-up", 9.0, expected=">= 8")
    assert report.finish() == 0


def test_a_line_per_case_has_a_column_per_figure(capsys) -> None:
    report = Report("example", argparse.Namespace(quick=False, json=None), line_per_case=True)
    report.add("slow", "step", 20.0, "ms")
    report.add("fast", "step", 2.0, "ms")
    report.add("fast", "times as fast", 10.0, expected=">= 8")
    assert report.finish() == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "case",
        "----",
        "slow",
        "fast",
    ]
    report.add("slow", "times as fast", 1.0, expected=">= 8")
    assert report.finish() == 1
    assert "1 (>= 8 MISSED)" in capsys.readouterr().out


def test_make_bench_runs_every_module_that_measures_by_the_convention() -> None:
    """A module without a ``main`` would run, print nothing and pass."""
    root = Path(__file__).parents[2]
    planned = subprocess.run(["make", "-n", "bench"], cwd=root, capture_output=True, text=True, check=True, timeout=60)
    names = re.findall(r"-m benchmarks\.(\w+) --quick$", planned.stdout, re.MULTILINE)
    assert {"day", "gate", "model", "serving"} <= set(names)
    for name in names:
        tree = ast.parse((root / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        shared = {
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module == "benchmarks.common"
            for alias in node.names
        }
        called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "id")}
        assert "main" in functions & called, f"benchmarks.{name} does nothing when it is run"
        # parser() declares --quick and --json, Report.finish() answers them.
        assert {"parser", "Report"} <= shared & called, f"benchmarks.{name} does not follow benchmarks/common.py"
    measuring = {path.stem for path in (root / "benchmarks").glob("*.py") if "finish()" in path.read_text("utf-8")}
    assert measuring - {"common", "demo", "accuracy"} == set(names), "all but those the Makefile gives a reason for"


@pytest.mark.parametrize("forgotten", [False, True])
def test_processor_time_counts_processes_that_have_ended(forgotten: bool) -> None:
    worker = "import time\nwhile time.process_time() < 0.6: pass\ntime.sleep(1)"
    ignored = "signal.signal(signal.SIGCHLD, signal.SIG_IGN);" if forgotten else ""
    parent = f"import signal, subprocess, sys; {ignored} subprocess.run([sys.executable, '-c', {worker!r}])"
    with ProcessorWatch(every=0.1) as processor:
        subprocess.run([sys.executable, "-c", parent], check=True)
    assert 0.6 <= processor.seconds < 2
