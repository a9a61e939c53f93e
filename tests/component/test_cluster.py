"""The same jobs on a real Spark cluster: two days built there equal those built by a local session, row for row.

The audit too runs on its workers: they reach this package by the setting that docs/scale.md names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs.backfill import publish_all
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE, write_days
from onetrans.lake import TABLES, Lake
from onetrans.schema import FeatureSchema
from onetrans.settings import AuditSettings, LakeSettings, SparkSettings, as_environment
from tests.raw_log import open_workspace
from tests.spark_cluster import spark_cluster, talking

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]

WORLD = WorldConfig(users=300, items=120, history_days=2)
FEW_ROWS = 100
REPOSITORY = Path(__file__).resolve().parents[2]
DAYS = [WORLD.epoch, WORLD.epoch + timedelta(days=1)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("cluster")
    with spark_cluster(folder) as address:
        yield address, folder


def rows(lake: Lake, table: str) -> list[str]:
    return sorted(repr(sorted(row.items())) for row in lake.read(table, DAYS).to_pylist())


def test_a_day_on_a_cluster_is_that_of_local_mode(
    spark: SparkSession, cluster: tuple[str, Path], tmp_path: Path
) -> None:
    address, folder = cluster
    write_days(WORLD, str(tmp_path / "raw"), DAYS[0], len(DAYS))
    work = open_workspace(spark, tmp_path, FeatureSchema.load(SCHEMA_FILE))
    publish_all(work, DAYS)
    there = replace(
        work.settings,
        lake=LakeSettings(warehouse=str(tmp_path / "there")),
        spark=SparkSettings(master=address),
        audit=AuditSettings(data_docs=str(tmp_path / "docs"), max_rows_in_memory=FEW_ROWS),
    )
    config = tmp_path / "onetrans.toml"
    properties = "".join(f'"{name}" = "{value}"\n' for name, value in small_executors(folder).items())
    config.write_text(f"[spark.conf]\n{properties}", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "jobs.backfill", "--from", str(DAYS[0]), "--to", str(DAYS[-1])],
        env={**os.environ, **as_environment(there), "ONETRANS_CONFIG": str(config), "SPARK_LOCAL_IP": "127.0.0.1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for table in TABLES:
        found = rows(Lake(there.lake), table)
        assert found == rows(work.lake, table), table
        assert found
        verdicts = [Lake(there.lake).verdict_in(path) for path in Lake(there.lake).folders(table, DAYS).values()]
        assert [verdict and verdict["engine"] for verdict in verdicts] == ["spark", "spark"], f"the audit of {table}"
    for worker in ("worker-0", "worker-1"):
        executors = list((folder / worker).glob("app-*/*/stderr"))
        assert len(executors) == 1, f"{worker} had {len(executors)} executors"
        assert "Finished task" in executors[0].read_text(encoding="utf-8"), f"{worker} did nothing"


def small_executors(folder: Path) -> dict[str, str]:
    """Return the properties of executors of one core, that tell in their logs what they did."""
    return {
        "spark.executor.memory": "600m",
        "spark.executor.cores": "1",
        "spark.cores.max": "2",
        "spark.scheduler.minRegisteredResourcesRatio": "1.0",
        "spark.scheduler.maxRegisteredResourcesWaitingTime": "120s",
        "spark.speculation": "false",
        "spark.executorEnv.PYTHONPATH": str(REPOSITORY),
        "spark.executor.extraJavaOptions": f"-XX:TieredStopAtLevel=1 -XX:+UseSerialGC {talking(folder)}",
    }
