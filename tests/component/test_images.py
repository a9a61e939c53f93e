"""The lists of packages of the small images are enough: with everything else out of reach, their commands begin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

IMAGES = Path(__file__).parents[2] / "infra" / "images"
SERVING = [f"onetrans.serving.{file.stem}" for file in (IMAGES.parents[1] / "onetrans" / "serving").glob("[a-z]*.py")]

BLOCKED = """
import json, sys
blocked = set(json.loads(sys.argv[1]))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} in this image", name=name)
sys.meta_path.insert(0, Absent())
import importlib
for module in sys.argv[2:]:
    importlib.import_module(module)
from onetrans import cli
print(cli.main([]))
"""


def _closure(requirements: Iterable[Requirement]) -> set[str]:
    """Return the names of all installed packages that requirements bring, their own extras included."""
    found: set[str] = set()
    waiting = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        for text in needed:
            further = Requirement(text)
            if further.marker is None or further.marker.evaluate({"extra": extra}):
                waiting += [(further, each) for each in ("", *further.extras)]
    return found


def _unreachable(file: str) -> list[str]:
    """Return the modules of this environment that an image does not have."""
    lines = (IMAGES / file).read_text(encoding="utf-8").splitlines()
    there = _closure(Requirement(line) for line in lines if line and not line.startswith("#"))
    own = {"onetrans", "jobs", "expectations", "dags", "infra", "pip", "setuptools", "tests"}
    return [
        module
        for module, packages in metadata.packages_distributions().items()
        if module not in own and not {re.sub(r"[-_.]+", "-", name).lower() for name in packages} & there
    ]


@pytest.mark.parametrize(
    ("file", "modules"),
    [
        (
            "serving.txt",
            ["onetrans.commands.serve", *SERVING, "mlflow.pyfunc", "mlflow.store.artifact.s3_artifact_repo"],
        ),
        (
            "training.txt",
            ["onetrans.train", "onetrans.evaluate", "onetrans.gate", "onetrans.registry", "onetrans.next_batch",
             "mlflow.pyfunc", "mlflow.system_metrics.system_metrics_monitor"],
        ),
    ],
)  # fmt: skip
def test_an_image_has_all_that_its_commands_import(file: str, modules: list[str]) -> None:
    absent = _unreachable(file)
    assert {"airflow", "pyspark", "great_expectations", "pytest"} <= set(absent)
    done = subprocess.run([sys.executable, "-c", BLOCKED, json.dumps(absent), *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("0")
