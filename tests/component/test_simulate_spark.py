"""The simulator on Spark: the same log however the work is divided, and every fault met by the job that refuses it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs import behaviors, impressions, item_features, user_features
from jobs.sources.simulated.defects import DEFECTS, Faults, parse_rates
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE, Log, write_block, write_days
from onetrans import cli
from onetrans.lake import QUARANTINE
from onetrans.schema import FeatureSchema
from tests.raw_log import open_workspace, publish

WORLD = WorldConfig(users=400, items=120, history_days=2, block_requests=40)
FIRST = WORLD.epoch
RATES = parse_rates(["0.02"])


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def log(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "raw"
    write_days(WORLD, str(out), FIRST, 2, RATES, tasks=1)
    return out


def test_one_task_and_seven_write_the_same_log(spark: SparkSession, log: Path, tmp_path: Path) -> None:
    assert WORLD.blocks == 9
    write_days(WORLD, str(tmp_path), FIRST, 2, RATES, tasks=7)
    assert written(tmp_path) == written(log)


def test_a_block_is_the_same_without_spark(log: Path, tmp_path: Path) -> None:
    write_block(Log(WORLD, str(tmp_path), FIRST, FIRST + timedelta(days=1), Faults(WORLD.seed, RATES), False), 4)
    alone = written(tmp_path)
    assert len(alone) == 6
    assert alone == {name: content for name, content in written(log).items() if "part-4" in name}


def test_another_seed_is_another_log(spark: SparkSession, log: Path, tmp_path: Path) -> None:
    write_days(replace(WORLD, seed=8), str(tmp_path), FIRST, 1, RATES)
    other, one = written(tmp_path), written(log)
    assert all(other[name] != one[name] for name in other if name.startswith(("impressions", "behaviors", "users")))


def test_every_fault_is_met_by_the_table_that_refuses_it(spark: SparkSession, log: Path) -> None:
    """Each of the faults stands in the log, and all rows are accounted for: published, refused or dropped."""
    work = open_workspace(spark, log.parent, FeatureSchema.load(SCHEMA_FILE), max_quarantine_share=1.0)
    raw = {"user_features": "users", "item_features": "items"}
    for job in (impressions, behaviors, user_features, item_features):
        staged = job.build(work, FIRST)
        name = raw.get(job.TABLE, job.TABLE)
        expected = {d.reason for full, d in DEFECTS.items() if full.split(".")[0] == name and d.reason}
        refused = work.lake.read(QUARANTINE, [FIRST]).to_pylist()
        found = Counter(row["reason"] for row in refused if row["table_name"] == job.TABLE)
        assert set(found) == expected, job.TABLE
        assert sum(found.values()) == staged.quarantined
    rows = pq.read_table(log / "impressions" / f"ds={FIRST}").to_pandas()
    publish(work, impressions, FIRST)
    staged = work.lake.staged("impressions", FIRST)
    distinct = rows.drop_duplicates()
    assert len(rows) > len(distinct), "some stand there twice"
    assert staged.rows + staged.quarantined == len(distinct)


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--users", "60", "--items", "60", "--history-days", "0", "--seed", "3", "--days", "2"]
    assert cli.main(["simulate", "--out", str(tmp_path), *arguments, "--defects", "late=0.1"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}: 2 days from 2026-01-01, ")
    assert cli.main(["simulate", "--defects", "list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(DEFECTS)
