"""The forge's workflows: actions pinned by commit, nothing may be written, and every make target exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_there_are_workflows() -> None:
    assert {file.name for file in WORKFLOWS} == {"tests.yml", "nightly.yml"}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_actions_are_pinned_and_may_only_read(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    workflow: dict[Any, Any] = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 300
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    used = re.findall(r"uses: (.*)", text)
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    # Nothing that a stranger writes, such as a title, is put into a command.
    assert "github.event" not in text


def test_one_action_has_one_version() -> None:
    used = {tuple(a.split("@")) for file in WORKFLOWS for a in re.findall(r"uses: (\S+)", file.read_text())}
    assert len({name for name, _ in used}) == len(used)


def test_their_targets_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    called = {name for file in WORKFLOWS for name in re.findall(r"run: make ([a-z-]+)", file.read_text())}
    assert {"lint", "test", "docs", "wheel"} <= called <= targets


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_torchrec_is_there_before_the_tests(file: Path) -> None:
    """Without it the tests of sharded tables skip, which nobody would notice."""
    jobs = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values()
    commands = [[step.get("run", "") for step in job["steps"]] for job in jobs]
    testing = [runs for runs in commands if any(map(_tests, runs))]
    assert testing
    for runs in testing:
        first = next(place for place, run in enumerate(runs) if _tests(run))
        assert "make torchrec" in runs[:first]


def test_the_nightly_tests_have_the_schema_of_the_chart_that_is_installed() -> None:
    """Without it the test of the chart's values skips."""
    (file,) = (file for file in WORKFLOWS if file.name == "nightly.yml")
    steps = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]["everything"]["steps"]
    (tests,) = (n for n, step in enumerate(steps) if _tests(step.get("run", "")))
    (fetched,) = (n for n, step in enumerate(steps) if "/chart/values.schema.json" in step.get("run", ""))
    assert fetched < tests
    assert steps[tests]["env"] == {"AIRFLOW_CHART_SCHEMA": "${{ runner.temp }}/values.schema.json"}
    assert '"$RUNNER_TEMP/values.schema.json"' in steps[fetched]["run"]
    page = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    (version,) = set(re.findall(r"helm upgrade .* --version (\S+) ", page))
    assert f"/helm-chart/{version}/" in steps[fetched]["run"]


def _tests(run: str) -> bool:
    return run == "make test" or "pytest" in run
