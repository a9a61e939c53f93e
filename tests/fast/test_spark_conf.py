"""The settings for YARN and Kubernetes in infra/spark: well-formed, and nothing that undoes what the jobs rely on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SPARK = Path(__file__).parents[2] / "infra" / "spark"
FILES = sorted(SPARK.glob("*.conf"))
KINDS = {
    "spark.executor.instances": r"\d+",
    "spark.executor.cores": r"\d+",
    "spark.executor.memory": r"\d+g",
    "spark.executor.memoryOverhead": r"\d+g",
    "spark.sql.shuffle.partitions": r"\d+",
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.adaptive.skewJoin.enabled": "true",
    "spark.speculation": "false",
    "spark.submit.deployMode": "client",
}
"""Property -> what its value must look like; every file has all of them."""


def properties(file: Path) -> dict[str, str]:
    """Read a file as Spark does: a name and a value, apart by blanks; none twice."""
    found: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"(spark\.[\w.]+)\s+(\S.*\S|\S)", line)
        assert match, f"{file.name}:{number}: {line!r} is no property and value"
        assert match[1] not in found, f"{file.name}:{number}: {match[1]} stands there twice"
        found[match[1]] = match[2]
    return found


def test_there_are_settings_for_both() -> None:
    assert [file.name for file in FILES] == ["kubernetes.conf", "yarn.conf"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_value_is_of_its_kind(file: Path) -> None:
    found = properties(file)
    for name, pattern in KINDS.items():
        assert re.fullmatch(pattern, found[name]), f"{name} = {found[name]}"
    for name, value in found.items():
        if name.endswith((".enabled", "Enabled", "First")):
            assert value in ("true", "false"), f"{name} = {value}"
    cores = int(found["spark.executor.instances"]) * int(found["spark.executor.cores"])
    assert int(found["spark.sql.shuffle.partitions"]) >= 2 * cores


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_undoes_what_the_jobs_rely_on(file: Path) -> None:
    """The session's time zone, Parquet's times and the committer are set in jobs/spark.py, before [spark.conf]."""
    source = (Path(__file__).parents[2] / "jobs" / "spark.py").read_text(encoding="utf-8")
    fixed = {"spark.sql.session.timeZone", "spark.sql.parquet.outputTimestampType"}
    assert all(f'"{name}"' in source for name in fixed)
    assert not fixed & set(properties(file))
    assert not [name for name in properties(file) if "fileoutputcommitter" in name or "password" in name.lower()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_group_of_settings_says_why(file: Path) -> None:
    groups = [group for group in file.read_text(encoding="utf-8").split("\n\n") if re.search(r"^spark\.", group, re.M)]
    assert len(groups) >= 6
    for group in groups:
        assert group.startswith("# "), group
