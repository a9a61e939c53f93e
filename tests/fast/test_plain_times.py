"""A time means the same moment in every format of plain files, with and without offset and fraction, in any zone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onetrans.errors import BadDataError
from onetrans.plain_files import prepare, read_schema
from tests.plain_logs import SCHEMA, rows, write

FORMATS = [".csv", ".jsonl", ".jsonl.gz", ".parquet", "+text.parquet"]
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def prepared(folder: Path, zone: str = "Europe/Berlin", schema: str = SCHEMA) -> list[dict[str, Any]]:
    (folder / "schema.toml").write_text(schema.replace("Europe/Berlin", zone))
    files = prepare(str(folder), "train", read_schema(str(folder)), str(folder.parent / "out"))
    return pa.concat_tables([pq.read_table(file.removeprefix("file://")) for file in files]).to_pylist()


def log(moments: list[datetime]) -> list[dict[str, Any]]:
    """Return a row per moment, with an event an hour and one 90 minutes before it."""
    return [
        {
            **rows(1)[0],
            "request_id": f"r{number}",
            "ts": moment,
            "seq_click": [{"ts": moment - timedelta(minutes=back), "item_id": "i1"} for back in (90, 60)],
            "seq_buy": [],
        }
        for number, moment in enumerate(moments)
    ]


@pytest.mark.parametrize("microseconds", [0, 250_000], ids=["whole", "fraction"])
@pytest.mark.parametrize("offset", [None, "Z", 60, -480], ids=["local", "Z", "+01:00", "-08:00"])
@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("ending", FORMATS)
def test_a_time_is_the_same_moment_in_every_format(
    folder: Path, ending: str, zone: str, offset: int | str | None, microseconds: int
) -> None:
    moments = [datetime(2026, 3, 1, 0, 0, 30 + number, microseconds, tzinfo=UTC) for number in range(3)]

    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [{key: told(part) for key, part in event.items()} for event in value]
        if not isinstance(value, datetime):
            return value
        if offset is None:
            value = value.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
        elif isinstance(offset, int):
            value = value.astimezone(timezone(timedelta(minutes=offset)))
        if ending == ".parquet":
            return value
        return value.isoformat().replace("+00:00", "Z")

    given = [{name: told(value) for name, value in row.items()} for row in log(moments)]
    write(folder / f"train{ending.replace('+text', '')}", given)
    found = prepared(folder, zone)
    assert [row["ts"] for row in found] == moments
    assert [[event["ts"] for event in row["seq_click"]] for row in found] == [
        [moment - timedelta(minutes=90), moment - timedelta(minutes=60)] for moment in moments
    ]


@pytest.mark.parametrize("ending", FORMATS)
def test_local_times_that_come_twice_or_never_are_the_same_in_every_format(folder: Path, ending: str) -> None:
    """Berlin's clocks skip 2:30 on 29 March and show it twice on 25 October."""
    for given, wanted in (
        (datetime(2026, 3, 29, 2, 30), datetime(2026, 3, 29, 1, 30, tzinfo=UTC)),
        (datetime(2026, 10, 25, 2, 30), datetime(2026, 10, 25, 0, 30, tzinfo=UTC)),
    ):
        told = given if ending == ".parquet" else given.isoformat()
        row = {**rows(1)[0], "ts": told, "seq_click": [{"ts": "2026-01-01T00:00:00Z", "item_id": "i"}], "seq_buy": []}
        write(folder / f"train{ending.replace('+text', '')}", [row])
        assert prepared(folder)[0]["ts"] == wanted


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_text_that_looks_like_a_time_stays_text(folder: Path, ending: str) -> None:
    """Ids and categories are hashed as they stand, in every format alike."""
    row = {**log([datetime(2026, 3, 1, tzinfo=UTC)])[0], "page": "2026-03-01T00:00:30+01:00", "user_id": "2026-03-01"}
    write(folder / f"train{ending}", [row])
    found = prepared(folder)[0]
    assert found["user_id"] == "2026-03-01"
    (folder / f"train{ending}").unlink()
    write(folder / "train.csv", [row])
    assert prepared(folder)[0]["page"] == found["page"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("zone", ZONES)
def test_hour_and_weekday_are_those_of_the_logs_zone(folder: Path, ending: str, zone: str) -> None:
    schema = SCHEMA.replace(
        "features = [",
        """features = [
  {name = "hour", side = "context", kind = "hashed", column = "hour_of_day", hash_size = 32},
  {name = "weekday", side = "context", kind = "bucketized", column = "day_of_week", boundaries = [5.5]},""",
    )
    moments = [datetime(2026, 3, 1, 22, 30, tzinfo=UTC), datetime(2026, 3, 2, 3, 30, tzinfo=UTC)]
    write(folder / f"train{ending}", log(moments))
    from onetrans.schema import hash64

    for row, moment in zip(prepared(folder, zone, schema), moments, strict=True):
        local = moment.astimezone(ZoneInfo(zone))
        assert (row["hour"], row["weekday"]) == (hash64(str(local.hour)), local.isoweekday())


@pytest.mark.parametrize(
    ("ending", "place"), [(".csv", "row 2 (line 4)"), (".jsonl", "row 2 (line 3)"), (".parquet", "row 2:")]
)
def test_an_event_that_is_not_before_its_request_is_named(folder: Path, ending: str, place: str) -> None:
    given = log([datetime(2026, 3, 1, 12, tzinfo=UTC), datetime(2026, 3, 2, 12, tzinfo=UTC)])
    given[0]["page"] = "two\nlines"
    given[1]["seq_click"][1]["ts"] = given[1]["ts"]
    write(folder / f"train{ending}", given)
    if ending == ".jsonl":  # an empty line is no row
        (folder / "train.jsonl").write_text(
            "\n".join(json.dumps(row, default=datetime.isoformat) + "\n" for row in given)
        )
    with pytest.raises(BadDataError) as refusal:
        prepared(folder)
    said = str(refusal.value)
    for words in (f"train{ending}", "column seq_click", "1 of 4 events", place, "event at 2026-03-02T13:00:00+01:00"):
        assert words in said
    assert "request of 2026-03-02T13:00:00+01:00" in said
    assert "training_requests" not in said
