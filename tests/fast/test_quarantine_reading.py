"""``onetrans quarantine list`` and ``show`` read of the refused rows what they tell, and no more."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onetrans import storage
from onetrans.cli import main as cli
from onetrans.errors import EXIT_OK
from onetrans.lake import QUARANTINE, Lake
from onetrans.settings import LakeSettings, Settings, as_environment

D1, D2 = date(2024, 2, 28), date(2024, 2, 29)
CLICK, TIME = "click: not 0 or 1", "ts: missing"


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    settings = Settings(lake=LakeSettings(warehouse=str(tmp_path / "lake")))
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    return Lake(settings.lake)


def refuse(lake: Lake, table: str, ds: date, *parts: list[str], raw: bool = True) -> None:
    """Make rows of these reasons the quarantine of a table and day, a file for each part, the first alone with raw."""
    folder = storage.local_path(lake.new_stage_path(QUARANTINE, ds))
    folder.mkdir(parents=True)
    for number, reasons in enumerate(parts):
        count = len(reasons)
        columns = {"ds": pa.array([ds] * count), "table_name": [table] * count, "reason": reasons}
        if raw and number == 0:
            columns |= {"raw": [json.dumps({"n": n}) for n in range(count)], "file": [f"{ds}.parquet"] * count}
        pq.write_table(pa.table(columns), folder / f"part-{number}.parquet")
    files = storage.list_files(f"file://{folder}", ".parquet")
    lake.replace_partition(QUARANTINE, {"ds": ds, "table_name": table}, files)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    assert cli(["quarantine", *arguments]) == EXIT_OK
    return capsys.readouterr().out.splitlines()


def test_a_list_reads_no_rows(lake: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows themselves are not there, so that a list which reads them fails."""
    refuse(lake, "impressions", D1, [CLICK, TIME, CLICK], [CLICK], raw=False)
    refuse(lake, "behaviors", D1, [TIME], raw=False)
    refuse(lake, "impressions", D2, [TIME] * 2, raw=False)
    every = [
        f"{D1}  behaviors              1  {TIME}",
        f"{D1}  impressions            3  {CLICK}",
        f"{D1}  impressions            1  {TIME}",
        f"{D2}  impressions            2  {TIME}",
    ]
    assert told(capsys, "list") == every
    assert told(capsys, "list", "--table", "impressions") == every[1:]
    assert told(capsys, "list", "--ds", str(D1)) == every[:3]
    assert told(capsys, "list", "--ds", str(D2), "--table", "behaviors") == ["no row is refused"]


def test_what_is_shown_is_read_up_to_the_limit(lake: Lake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Rows of another day, another table, or past the limit are not there, so that reading them fails."""
    refuse(lake, "impressions", D1, [CLICK, TIME, CLICK], [CLICK] * 4)
    refuse(lake, "impressions", D2, [CLICK], raw=False)
    refuse(lake, "behaviors", D1, [CLICK], raw=False)
    show = ("show", "impressions", "--ds", str(D1))
    first = [CLICK, f"  file {D1}.parquet", '  {"n": 0}']
    assert told(capsys, *show, "--limit", "1") == [*first, "... and 6 more (--limit, or --out FILE for all)"]
    assert told(capsys, *show, "--limit", "2", "--reason", "click")[3:] == [
        *(CLICK, f"  file {D1}.parquet", '  {"n": 2}', "... and 4 more (--limit, or --out FILE for all)")
    ]
    out = tmp_path / "rows.jsonl"
    assert told(capsys, *show, "--reason", TIME, "--out", str(out))[0].startswith(f"impressions {D1}: 1 rows written")
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == [{"n": 1}]
    assert told(capsys, *show, "--reason", "no such") == [f"impressions {D1}: no such row is refused"]
