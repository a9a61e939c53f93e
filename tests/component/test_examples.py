"""The examples run as they stand, and the example model learns what its shop is made of."""

import os
import subprocess
import sys
from pathlib import Path

from examples import train_example

ROOT = Path(__file__).parents[2]


def _run(module, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_examples_run_as_they_stand(tmp_path):
    trained = _run("examples.train_example", "--steps", "5", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    asked = _run("examples.inference_example", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert "10 candidates, best first" in asked.stdout
    assert "encoded 1 time(s) and taken from what is kept 1 time(s)" in asked.stdout
    missing = _run("examples.inference_example", "--model", "nothing", cwd=tmp_path)
    assert missing.returncode == 78
    assert "nothing names no model" in missing.stderr
    assert _run("examples.train_example", "--steps", "few", cwd=tmp_path).returncode == 78


def test_the_example_learns():
    _, figures = train_example.train(steps=120)
    assert figures["ctr_auc"] > 0.6
