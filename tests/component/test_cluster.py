"""The same jobs on a real Spark cluster: two days built there equal those built by a local session, row for row.

The audit too runs on its workers: they reach this package by the setting that docs/scale.md names.  A step whose
executors are lost again and again ends as one that is tried again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from pyspark.sql import SparkSession

from dags.steps import ended_by, raise_for
from jobs.backfill import publish_all
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE, write_days
from onetrans.errors import EXIT_FAILED, NotReadyError
from onetrans.lake import TABLES, Lake
from onetrans.schema import FeatureSchema
from onetrans.settings import AuditSettings, LakeSettings, Settings, SourceSettings, SparkSettings, as_environment
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
    days = ["--from", str(DAYS[0]), "--to", str(DAYS[-1])]
    code, told = _end(*_begin("jobs.backfill", *days, settings=there, folder=folder))
    assert code == 0, told[-4000:]
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


def test_a_step_whose_executors_are_lost_is_tried_again(cluster: tuple[str, Path], tmp_path: Path) -> None:
    """Spark tries a task four times whose executor is lost; then it gives up, and Airflow tries the step again."""
    address, folder = cluster
    write_days(WORLD, str(tmp_path / "raw"), DAYS[0], 1)
    settings = Settings(
        source=SourceSettings(path=str(tmp_path / "raw")),
        lake=LakeSettings(warehouse=str(tmp_path / "lake")),
        spark=SparkSettings(master=address),
    )
    lake = Lake(settings.lake)
    step = ("jobs.impressions", "--ds", str(DAYS[0]))

    job, log = _begin(*step, settings=settings, folder=folder)
    lost = 0
    try:
        while job.poll() is None:
            lost += _lose_executors(folder)
            time.sleep(0.02)
    finally:
        job.kill()
    code, told = _end(job, log)
    assert (code, lost >= 4) == (EXIT_FAILED, True), f"{lost} executors were killed; {told[-4000:]}"
    error = told.strip().splitlines()[-1]
    assert error.startswith(f"SparkFailedError: impressions {DAYS[0]}: Spark failed: ")
    assert "ExecutorLostFailure" in error
    with pytest.raises(AirflowException, match=r"Airflow tries it again: this was try 1 of 4\.") as raised:
        raise_for("impressions.build", ended_by(code, told), this_try=1, tries=4)
    assert not isinstance(raised.value, AirflowFailException)
    with pytest.raises(NotReadyError):
        lake.staged("impressions", DAYS[0])

    code, told = _end(*_begin(*step, settings=settings, folder=folder))
    assert code == 0, told[-4000:]
    assert lake.staged("impressions", DAYS[0]).rows > 0


def _lose_executors(folder: Path) -> int:
    """Kill the executors of a cluster that work on a task; return how many.

    A task counts as failed only once the driver was told that it runs, which an executor does before it fetches it.
    """
    killed = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error, FileNotFoundError):
            log = Path(process.cwd()) / "stderr"  # each executor works in a folder of its own
            if log.is_relative_to(folder) and "reading broadcast variable" in log.read_text(encoding="utf-8"):
                process.kill()
                process.wait(30)
                killed += 1
    return killed


def _begin(module: str, *arguments: str, settings: Settings, folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a step on the cluster; return it, and the file of what it says."""
    properties = "".join(f'"{name}" = "{value}"\n' for name, value in small_executors(folder).items())
    config = folder / "onetrans.toml"
    config.write_text(f"[spark.conf]\n{properties}", encoding="utf-8")
    log = folder / "step.log"
    with log.open("wb") as said:
        step = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={
                **os.environ,
                **as_environment(settings),
                "ONETRANS_CONFIG": str(config),
                "SPARK_LOCAL_IP": "127.0.0.1",
            },
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
    return step, log


def _end(step: subprocess.Popen[bytes], log: Path) -> tuple[int, str]:
    """Wait for a step; return its exit code and what it said."""
    return step.wait(), log.read_text(encoding="utf-8")


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
