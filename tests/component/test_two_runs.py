"""Two runs of one day at once, as Airflow has them: build, audit and publication are tasks of their own and interleave.

Each is the command's own function, in this process.  Between the two builds a late file comes to the log, so that the
rows of the two runs can be told apart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from expectations import audit
from jobs import impressions, runner
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import write_days
from onetrans.cli import main as cli
from onetrans.errors import EXIT_NOT_READY, EXIT_OK
from onetrans.lake import Lake
from onetrans.settings import AuditSettings, LakeSettings, Settings, SourceSettings, SparkSettings, as_environment

TABLE, DS = "impressions", date(2026, 1, 1)


@dataclass(frozen=True)
class Day:
    """A day whose log is still to grow, published as it is so far."""

    lake: Lake
    late: Path
    """A file of the log that is not there yet."""
    before: list[str]
    """Rows of the log without it."""
    after: list[str]
    """Rows of the log with it, of a run that nothing disturbed."""

    def arrives(self) -> None:
        """Let the late file come to the log."""
        self.late.with_suffix(".later").rename(self.late)

    def published(self) -> list[str]:
        """Return the rows that readers see, as sorted text."""
        return sorted(json.dumps(row, default=str, sort_keys=True) for row in self.lake.read(TABLE).to_pylist())

    def from_folder(self) -> str:
        """Return the folder of the files that readers see."""
        return self.lake.folders(TABLE)[DS]


def build() -> None:
    """Stage the day."""
    assert runner.main(TABLE, impressions.build, ["--ds", str(DS)]) == EXIT_OK


def judge() -> None:
    """Audit what is staged."""
    assert audit.main([TABLE, "--ds", str(DS)]) == EXIT_OK


def publish() -> int:
    """Publish what is staged; return the exit code."""
    return cli(["publish", TABLE, "--ds", str(DS)])


@pytest.fixture
def day(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Day:
    monkeypatch.setattr(SparkSession, "stop", lambda _: None)  # it is the session of all tests
    raw = tmp_path / "raw"
    write_days(WorldConfig(users=400, items=120, history_days=1, epoch=DS), str(raw), DS, 1)
    (file,) = (raw / "impressions" / f"ds={DS}").glob("*.parquet")
    table, late = pq.read_table(file), file.with_name("part-9.parquet")
    cut = table["request_id"].to_pylist().index(table["request_id"][table.num_rows - 50].as_py())
    pq.write_table(table.slice(0, cut), file)
    pq.write_table(table.slice(cut), late)

    def published_in(warehouse: Path) -> Day:
        settings = Settings(
            source=SourceSettings(path=str(raw)),
            lake=LakeSettings(warehouse=str(warehouse)),
            audit=AuditSettings(data_docs=str(tmp_path / "docs")),
            spark=SparkSettings(shuffle_partitions=2),
        )
        for name, value in as_environment(settings).items():
            monkeypatch.setenv(name, value)
        build()
        judge()
        assert publish() == EXIT_OK
        return Day(Lake(settings.lake), late, [], [])

    after = published_in(tmp_path / "undisturbed").published()
    late.rename(late.with_suffix(".later"))
    found = published_in(tmp_path / "lake")
    before = found.published()
    assert len(before) < len(after) == table.num_rows
    return Day(found.lake, late, before, after)


def test_what_was_staged_since_is_published_once_it_is_audited(day: Day, capsys: pytest.CaptureFixture[str]) -> None:
    build()
    judge()
    first = day.lake.staged(TABLE, DS).path
    day.arrives()
    build()
    second = day.lake.staged(TABLE, DS).path
    capsys.readouterr()
    assert publish() == EXIT_NOT_READY, "the first run audited other files"
    told = capsys.readouterr().err
    assert f"NotReadyError: {TABLE} {DS}: the staged files were not audited; run: python -m expectations.audit" in told
    assert day.published() == day.before, "readers keep what they had"
    judge()
    assert publish() == EXIT_OK, "the first run's next try"
    assert day.published() == day.after
    snapshot = day.lake.snapshot_id(TABLE)
    assert publish() == EXIT_OK, "the second run"
    assert day.lake.snapshot_id(TABLE) == snapshot
    assert day.published() == day.after
    assert day.from_folder() == second != first
    assert day.lake.days(TABLE) == [DS]


def test_an_audit_is_of_what_was_staged_last_whichever_run_asks(day: Day) -> None:
    build()
    day.arrives()
    build()
    second = day.lake.staged(TABLE, DS).path
    judge()  # by the first run
    assert publish() == EXIT_OK
    assert (day.published(), day.from_folder()) == (day.after, second)
    snapshot = day.lake.snapshot_id(TABLE)
    judge()  # by the second
    assert publish() == EXIT_OK
    assert day.lake.snapshot_id(TABLE) == snapshot
    assert (day.published(), day.from_folder()) == (day.after, second)
