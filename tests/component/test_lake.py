"""The lake: a day is replaced whole or not at all, by any number of writers, and old snapshots stay readable."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from datetime import date, timedelta
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import doctor
from onetrans import storage
from onetrans.cli import main as cli
from onetrans.errors import (
    EXIT_BAD_CONFIG,
    EXIT_BAD_DATA,
    EXIT_FAILED,
    EXIT_NOT_READY,
    EXIT_OK,
    BadConfigError,
    BadDataError,
    CatalogAwayError,
    NotReadyError,
)
from onetrans.lake import QUARANTINE, Lake, Staged
from onetrans.settings import LakeSettings, Settings

D1 = date(2024, 2, 28)
D2 = date(2024, 2, 29)
D3 = date(2024, 3, 1)
TABLE = "impressions"


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(LakeSettings(warehouse=str(tmp_path / "lake")))


def rows(ds: date, count: int, **more: list[Any]) -> pa.Table:
    return pa.table(
        {
            "ds": [ds] * count,
            "id": pa.array(range(count), pa.int64()),
            "events": pa.array([[{"ts": 1, "item": 7}]] * count),
            **more,
        }
    )


def write(lake: Lake, data: pa.Table, ds: date, table: str = TABLE, files: int = 1) -> str:
    folder = storage.local_path(lake.new_stage_path(table, ds))
    folder.mkdir(parents=True)
    share = -(-data.num_rows // files)
    for part in range(files):
        pq.write_table(data.slice(part * share, share), folder / f"part-{part}.parquet")
    return f"file://{folder}"


def stage(lake: Lake, data: pa.Table, ds: date, passed: bool | None = True, table: str = TABLE, **how: Any) -> Staged:
    staged = lake.mark_staged(Staged(table, ds, write(lake, data, ds, table, **how), data.num_rows))
    if passed is not None:
        lake.write_verdict(staged, {"passed": passed})
    return staged


def publish(lake: Lake, data: pa.Table, ds: date, table: str = TABLE, **how: Any) -> int:
    stage(lake, data, ds, table=table, **how)
    return lake.publish(table, ds)


def counts(lake: Lake, table: str = TABLE, snapshot_id: int | None = None) -> dict[date, int]:
    return {day.ds: day.rows for day in lake.published(table, snapshot_id)}


# One day, whole


def test_a_day_is_replaced_and_the_others_stay(lake: Lake) -> None:
    publish(lake, rows(D1, 5), D1)
    publish(lake, rows(D2, 3), D2, files=2)
    publish(lake, rows(D1, 7), D1)
    assert counts(lake) == {D1: 7, D2: 3}
    assert sorted(lake.read(TABLE, [D1])["id"].to_pylist()) == list(range(7))
    assert [day.files for day in lake.published(TABLE)] == [1, 2]


def test_publishing_the_same_files_again_changes_nothing(lake: Lake) -> None:
    first = publish(lake, rows(D1, 5), D1)
    publish(lake, rows(D2, 3), D2)
    second = lake.publish(TABLE, D1)
    assert second == lake.snapshot_id(TABLE) != first
    assert len(lake.table(TABLE).snapshots()) == 2
    assert counts(lake) == {D1: 5, D2: 3}


def test_building_the_same_rows_again_gives_the_same_rows(lake: Lake) -> None:
    publish(lake, rows(D1, 5), D1)
    before = lake.read(TABLE)
    publish(lake, rows(D1, 5), D1)
    assert lake.read(TABLE).equals(before)


def test_a_replacement_is_one_step_for_readers(lake: Lake) -> None:
    publish(lake, rows(D1, 5), D1)
    publish(lake, rows(D1, 7), D1)
    seen = {sum(counts(lake, snapshot_id=s.snapshot_id).values()) for s in lake.table(TABLE).metadata.snapshots}
    # PyIceberg writes the delete and the append of one transaction as two snapshots; both become current at once,
    # because the table's metadata, which names the current one, is swapped once.
    assert seen <= {0, 5, 7}
    assert [entry.snapshot_id for entry in lake.table(TABLE).metadata.snapshot_log][-1] == lake.snapshot_id(TABLE)


# Refusals


def test_what_was_not_staged_or_audited_or_failed_is_not_published(lake: Lake) -> None:
    with pytest.raises(NotReadyError, match=r"impressions 2024-02-28 is not staged; run: python -m jobs\.impressions"):
        lake.publish(TABLE, D1)
    stage(lake, rows(D1, 5), D1, passed=None)
    with pytest.raises(NotReadyError, match=r"the staged files were not audited; run: python -m expectations\.audit"):
        lake.publish(TABLE, D1)
    stage(lake, rows(D1, 5), D1, passed=False)
    with pytest.raises(BadDataError, match="not published, readers keep what they had"):
        lake.publish(TABLE, D1)
    assert lake.published(TABLE) == []
    assert lake.snapshot_id(TABLE) is None


def test_no_files_are_refused_and_the_published_day_stays(lake: Lake) -> None:
    publish(lake, rows(D1, 5), D1)
    staged = stage(lake, rows(D1, 7), D1)
    for path in storage.list_files(staged.path, ".parquet"):
        storage.local_path(path).unlink()
    with pytest.raises(BadDataError, match="impressions ds = 2024-02-28: there are no files to publish"):
        lake.publish(TABLE, D1)
    assert counts(lake) == {D1: 5}


def test_rows_of_another_day_are_refused(lake: Lake) -> None:
    publish(lake, rows(D2, 3), D2)
    stage(lake, rows(D2, 7), D1)
    with pytest.raises(BadDataError, match=r"impressions ds = 2024-02-28: .*part-0.parquet holds ds = 2024-02-29"):
        lake.publish(TABLE, D1)
    mixed = pa.concat_tables([rows(D1, 1), rows(D2, 1)])
    stage(lake, mixed, D1)
    with pytest.raises(BadDataError, match=r"holds ds = 2024-02-28\.\.2024-02-29"):
        lake.publish(TABLE, D1)
    assert counts(lake) == {D2: 3}


def test_a_truncated_file_is_refused_and_the_published_day_stays(lake: Lake) -> None:
    publish(lake, rows(D1, 5), D1)
    staged = stage(lake, rows(D1, 7), D1)
    (path,) = storage.local_path(staged.path).glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadDataError, match="is not a whole Parquet file"):
        lake.publish(TABLE, D1)
    assert counts(lake) == {D1: 5}


def test_an_unknown_table_is_refused(lake: Lake) -> None:
    with pytest.raises(BadConfigError, match="there is no table 'clicks'; tables are impressions, behaviors"):
        lake.published("clicks")


def test_doctor_counts_the_tables_that_are_there(lake: Lake) -> None:
    publish(lake, rows(D1, 3), D1)
    check = doctor.look_at_catalog(Settings(lake=lake.settings))
    assert check.found.endswith(": 1 table in 'ranking'")


def test_missing_days_are_named(lake: Lake) -> None:
    with pytest.raises(NotReadyError, match=r"table impressions has no published day; needed: 2024-02-28"):
        lake.files(TABLE, [D1])
    publish(lake, rows(D2, 3), D2)
    with pytest.raises(NotReadyError, match=r"has no published 2024-02-28, 2024-03-01; published are 2024-02-29"):
        lake.files(TABLE, [D1, D2, D3])


# The schema over time


def test_a_new_column_is_null_in_older_days(lake: Lake) -> None:
    publish(lake, rows(D1, 2), D1)
    publish(lake, rows(D2, 1, price=[2.5]), D2)
    assert lake.read(TABLE, [D1])["price"].to_pylist() == [None, None]
    assert lake.read(TABLE, [D2])["price"].to_pylist() == [2.5]


def test_a_column_that_is_gone_is_null_in_newer_days(lake: Lake) -> None:
    publish(lake, rows(D1, 1, price=[2.5]), D1)
    publish(lake, rows(D2, 1), D2)
    assert lake.read(TABLE)["price"].to_pylist() in ([2.5, None], [None, 2.5])


def test_a_new_field_of_events_is_null_in_older_days(lake: Lake) -> None:
    publish(lake, rows(D1, 1), D1)
    newer = rows(D2, 1).set_column(2, "events", pa.array([[{"ts": 1, "item": 7, "price": 2.5}]]))
    publish(lake, newer, D2)
    assert lake.read(TABLE, [D1])["events"].to_pylist() == [[{"ts": 1, "item": 7, "price": None}]]
    assert lake.read(TABLE, [D2])["events"].to_pylist() == [[{"ts": 1, "item": 7, "price": 2.5}]]


def test_columns_in_another_order_are_read_by_name(lake: Lake) -> None:
    publish(lake, rows(D1, 2), D1)
    publish(lake, rows(D2, 2).select(["events", "id", "ds"]), D2)
    assert lake.read(TABLE, [D2])["id"].to_pylist() == [0, 1]


def test_a_column_of_another_type_is_refused_and_nothing_changes(lake: Lake) -> None:
    snapshot = publish(lake, rows(D1, 2), D1)
    stage(lake, rows(D2, 2).set_column(1, "id", pa.array(["a", "b"])), D2)
    with pytest.raises(BadDataError, match=r"impressions ds = 2024-02-29: .*id.*(long|string)"):
        lake.publish(TABLE, D2)
    assert lake.snapshot_id(TABLE) == snapshot
    assert str(lake.table(TABLE).schema().find_type("id")) == "long"


# Time travel


def test_an_old_snapshot_gives_the_old_rows(lake: Lake) -> None:
    old = publish(lake, rows(D1, 5), D1)
    old_files = lake.files(TABLE, [D1])
    new = publish(lake, rows(D1, 7), D1)
    publish(lake, rows(D2, 3), D2)
    assert counts(lake, snapshot_id=old) == {D1: 5}
    assert counts(lake, snapshot_id=new) == {D1: 7}
    assert counts(lake) == {D1: 7, D2: 3}
    assert lake.files(TABLE, [D1], snapshot_id=old) == old_files != lake.files(TABLE, [D1])
    assert lake.read(TABLE, [D1], snapshot_id=old).num_rows == 5
    with pytest.raises(NotReadyError, match="has no published 2024-02-29"):
        lake.files(TABLE, [D2], snapshot_id=old)


def test_a_snapshot_that_never_was_is_told(lake: Lake) -> None:
    publish(lake, rows(D1, 5), D1)
    with pytest.raises(BadDataError, match="table impressions has no snapshot 123; it is of another lake, or has exp"):
        lake.files(TABLE, [D1], snapshot_id=123)


# Several writers


Work = tuple[str, dict[str, Any], str]


def _replace(start: Barrier, warehouse: str, work: Work) -> None:
    table, partition, folder = work
    files = storage.list_files(folder, ".parquet")
    start.wait(timeout=240)
    Lake(LakeSettings(warehouse=warehouse)).replace_partition(table, partition, files)


def _at_once(lake: Lake, work: list[Work]) -> None:
    context = get_context("spawn")
    start = context.Barrier(len(work))
    writers = [context.Process(target=_replace, args=(start, lake.settings.warehouse, one)) for one in work]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=300)
    assert [writer.exitcode for writer in writers] == [0] * len(work)


def test_two_writers_of_one_day_leave_one_of_them_whole(lake: Lake) -> None:
    publish(lake, rows(D1, 1), D1)
    _at_once(lake, [(TABLE, {"ds": D2}, write(lake, rows(D2, n), D2, files=2)) for n in (40, 60)])
    assert counts(lake) in ({D1: 1, D2: 40}, {D1: 1, D2: 60})
    assert lake.published(TABLE)[1].files == 2


def test_writers_of_several_days_of_a_new_table_all_succeed(lake: Lake) -> None:
    # The first publish also makes catalog, namespace and table: all at once, by all of them.
    days = [D1 + timedelta(days=n) for n in range(4)]
    _at_once(lake, [(TABLE, {"ds": ds}, write(lake, rows(ds, 5 + n), ds)) for n, ds in enumerate(days)])
    assert counts(lake) == {ds: 5 + n for n, ds in enumerate(days)}


def test_jobs_share_the_quarantine(lake: Lake) -> None:
    work: list[Work] = []
    for n, table in enumerate(("impressions", "behaviors", "user_features"), start=1):
        refused = pa.table({"ds": [D1] * n, "table_name": [table] * n, "reason": ["ts: missing"] * n})
        work.append((QUARANTINE, {"ds": D1, "table_name": table}, write(lake, refused, D1, QUARANTINE)))
    _at_once(lake, work)
    assert counts(lake, QUARANTINE) == {D1: 6}
    _at_once(lake, work[:1])
    lake.clear_partition(QUARANTINE, {"ds": D1, "table_name": "behaviors"})
    assert sorted(set(lake.read(QUARANTINE)["table_name"].to_pylist())) == ["impressions", "user_features"]


# Killed writers

_KILLED_PUBLISHER = """
import os, signal, sys
from datetime import date
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Transaction
from onetrans.lake import Lake
from onetrans.settings import LakeSettings, Settings

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)

warehouse, moment = sys.argv[1:]
if moment == "between the delete and the append":
    Transaction.add_files = die
elif moment == "before the commit":
    SqlCatalog.commit_table = die
elif moment == "after the metadata, before the swap":
    original = SqlCatalog._write_metadata
    def write_then_die(*arguments, **named):
        original(*arguments, **named)
        die()
    SqlCatalog._write_metadata = staticmethod(write_then_die)
elif moment == "after the commit":
    original = SqlCatalog.commit_table
    def commit_then_die(*arguments, **named):
        original(*arguments, **named)
        die()
    SqlCatalog.commit_table = commit_then_die
Lake(LakeSettings(warehouse=warehouse)).publish("impressions", date(2024, 2, 28))
"""


@pytest.mark.parametrize(
    ("moment", "rows_after"),
    [
        ("between the delete and the append", 5),
        ("before the commit", 5),
        ("after the metadata, before the swap", 5),
        ("after the commit", 7),
    ],
)
def test_a_killed_publisher_leaves_a_whole_day_and_can_run_again(lake: Lake, moment: str, rows_after: int) -> None:
    publish(lake, rows(D1, 5), D1)
    stage(lake, rows(D1, 7), D1, files=2)
    command = [sys.executable, "-c", _KILLED_PUBLISHER, str(storage.local_path(lake.warehouse)), moment]
    done = subprocess.run(command, env=os.environ, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    again = Lake(lake.settings)
    assert counts(again) == {D1: rows_after}
    assert again.read(TABLE).num_rows == rows_after
    again.publish(TABLE, D1)
    assert counts(again) == {D1: 7}


def test_a_job_killed_while_it_writes_leaves_the_last_staged_day(lake: Lake) -> None:
    publish(lake, rows(D1, 5), D1)
    write(lake, rows(D1, 7), D1)  # files, but no manifest
    assert lake.staged(TABLE, D1).rows == 5
    lake.publish(TABLE, D1)
    assert counts(lake) == {D1: 5}


# The commands


@pytest.fixture
def deployment(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> Lake:
    monkeypatch.setenv("ONETRANS_LAKE_WAREHOUSE", lake.settings.warehouse)
    return lake


def test_the_commands_publish_and_tell(deployment: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["publish", TABLE, "--ds", str(D1)]) == EXIT_NOT_READY
    assert cli(["published", TABLE, "--ds", str(D1)]) == EXIT_NOT_READY
    assert "impressions 2024-02-28 is not published; published are none" in capsys.readouterr().err
    stage(deployment, rows(D1, 1234), D1)
    assert cli(["publish", TABLE, "--ds", str(D1)]) == EXIT_OK
    snapshot = deployment.snapshot_id(TABLE)
    assert f"impressions 2024-02-28: published; 1,234 rows, snapshot {snapshot}" in capsys.readouterr().out
    assert cli(["publish", TABLE, "--ds", str(D1)]) == EXIT_OK
    assert "was published already, nothing changed" in capsys.readouterr().out
    assert cli(["published", TABLE, "--ds", str(D1)]) == EXIT_OK
    assert "impressions 2024-02-28: published, 1,234 rows in 1 files" in capsys.readouterr().out
    assert cli(["published", TABLE, "behaviors", "--ds", str(D1)]) == EXIT_NOT_READY
    assert "behaviors 2024-02-28 is not published" in capsys.readouterr().err
    assert cli(["published", TABLE, TABLE, "--ds", str(D1), "--json"]) == EXIT_OK
    assert [(day["table"], day["rows"]) for day in json.loads(capsys.readouterr().out)] == [(TABLE, 1234)]


@pytest.mark.parametrize("command", [["lake"], ["published", TABLE, "--ds", str(D1)]], ids=["lake", "published"])
def test_a_catalog_that_does_not_answer_is_told_in_a_line_and_is_not_an_unpublished_day(
    command: list[str], deployment: Lake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait of the DAGs takes 75 for "not published", and stops the day where nothing will publish it."""
    pytest.importorskip("psycopg")
    monkeypatch.setattr("onetrans.lake._COMMIT_WAIT_SECONDS", 0.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{server.getsockname()[1]}/lake"
        monkeypatch.setenv("ONETRANS_LAKE_CATALOG_URI", f"postgresql+psycopg://u:secret@{address}")
        assert cli(command) == EXIT_FAILED
    printed, told = capsys.readouterr()
    (line,) = [line for line in told.splitlines() if line.startswith("CatalogAwayError: ")]
    assert line.startswith(f"CatalogAwayError: the catalog postgresql+psycopg://{address} cannot be used: ")
    assert "refused" in line
    assert "Traceback" not in told
    assert "secret" not in printed + told


def test_a_catalog_that_answers_and_cannot_be_used_is_told_likewise(lake: Lake) -> None:
    publish(lake, rows(D1, 3), D1)
    with sqlite3.connect(lake.catalog_file) as database:
        database.execute("drop table iceberg_tables")
    with pytest.raises(CatalogAwayError, match=r"the catalog .*catalog\.db cannot be used: no such table"):
        lake.published(TABLE)


def test_a_day_that_nothing_was_lost_of_is_as_good_as_published(
    deployment: Lake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a day's tables are built on: the first day has none before it, and one that the log lost has no tables."""
    day = ["published", TABLE, "behaviors", "--ds", str(D1)]
    assert cli([*day, "--or-absent"]) == EXIT_NOT_READY
    assert cli([*day, "--or-first", "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == []
    stage(deployment, rows(D1, 10), D1)
    assert cli(["publish", TABLE, "--ds", str(D1)]) == EXIT_OK
    assert cli([*day, "--or-first"]) == EXIT_NOT_READY, "half of the day is there"
    after = [*day[:-1], str(D1 + timedelta(days=1))]
    assert cli([*after, "--or-first"]) == EXIT_NOT_READY
    monkeypatch.setenv("ONETRANS_SOURCE_ABSENT_DAYS", str(D1 + timedelta(days=1)))
    assert cli(after) == EXIT_BAD_CONFIG
    capsys.readouterr()
    assert cli([*after, "--unless-absent"]) == EXIT_OK
    assert capsys.readouterr().out == "nothing to do: source.absent_days says that the log lost 2024-02-29\n"
    assert cli([*after, "--or-absent"]) == EXIT_NOT_READY, "the day before the one that is lost is not whole"
    capsys.readouterr()
    assert cli([*[word for word in after if word != "behaviors"], "--or-absent"]) == EXIT_OK
    assert "impressions 2024-02-28: published, 10 rows" in capsys.readouterr().out


def test_a_lost_day_that_came_after_all_in_some_tables_is_looked_for_per_table(
    deployment: Lake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each table is built on the latest day of its own: one has the lost day, the other goes on from the day before."""
    for table, days in ((TABLE, (D1, D2)), ("behaviors", (D1,))):
        for ds in days:
            publish(deployment, rows(ds, 10), ds, table)
    monkeypatch.setenv("ONETRANS_SOURCE_ABSENT_DAYS", str(D2))
    assert cli(["published", TABLE, "behaviors", "--ds", str(D2), "--or-absent", "--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert [(day["table"], day["ds"]) for day in found] == [(TABLE, str(D2)), ("behaviors", str(D1))]


def test_publish_passes_on_what_the_audit_found(deployment: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    staged = stage(deployment, rows(D1, 5), D1, passed=None)
    deployment.write_verdict(staged, {"passed": False, "failure": "impressions 2024-02-28: click is 7"})
    assert cli(["publish", TABLE, "--ds", str(D1)]) == EXIT_BAD_DATA
    assert capsys.readouterr().err == (
        "BadDataError: not published, readers keep what they had: impressions 2024-02-28: click is 7\n"
    )


def test_lake_lists_tables_days_and_snapshots(deployment: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    for ds, count in ((D1, 1000), (D2, 500), (date(2024, 3, 5), 1)):
        publish(deployment, rows(ds, count), ds)
    capsys.readouterr()
    assert cli(["lake"]) == EXIT_OK
    header, first, *others = capsys.readouterr().out.splitlines()
    assert header.split() == ["table", "days", "count", "rows", "files", "MB", "not", "final", "snapshot"]
    assert first.split()[:5] == ["impressions", "2024-02-28..2024-02-29,", "2024-03-05", "3", "1,501"]
    assert first.endswith(str(deployment.snapshot_id(TABLE)))
    assert [line.split()[:4] for line in others][-1] == ["quarantine", "none", "0", "0"]

    assert cli(["lake", TABLE]) == EXIT_OK
    assert capsys.readouterr().out.splitlines()[2].split()[:4] == ["impressions", "2024-02-29", "500", "1"]
    assert cli(["lake", "behaviors"]) == EXIT_OK
    assert "behaviors: nothing is published in file://" in capsys.readouterr().out
    assert cli(["lake", TABLE, "--snapshots"]) == EXIT_OK
    newest = capsys.readouterr().out.splitlines()[1].split()
    assert [newest[0], *newest[2:]] == [str(deployment.snapshot_id(TABLE)), "append", "1,501", "1", "0"]

    assert cli(["lake", "--json"]) == EXIT_OK
    listed = json.loads(capsys.readouterr().out)
    assert listed[0]["rows"] == 1501
    assert listed[0]["snapshot"] == deployment.snapshot_id(TABLE)


def test_publishing_loads_neither_spark_nor_torch_nor_great_expectations(deployment: Lake) -> None:
    stage(deployment, rows(D1, 5), D1)
    code = (
        "import sys; from onetrans.cli import main; main(['publish', 'impressions', '--ds', '2024-02-28']); "
        "heavy = {'pyspark', 'torch', 'great_expectations', 'mlflow', 'airflow'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
