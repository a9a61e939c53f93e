"""Plain files become the same requests that the request encoder makes of the same values; bad rows are named."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onetrans.errors import BadConfigError, BadDataError
from onetrans.plain_files import prepare, read_schema, split_files
from onetrans.requests import request_columns, to_rows
from onetrans.schema import FeatureSchema
from tests.plain_logs import SCHEMA, rows, write

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "schema.toml").write_text(SCHEMA)
    return tmp_path / "log"


def prepared(folder: Path, split: Any = "train") -> pa.Table:
    files = prepare(str(folder), split, read_schema(str(folder)), str(folder.parent / "out"))
    return pa.concat_tables([pq.read_table(file.removeprefix("file://")) for file in files])


def expected(given: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the requests as :func:`onetrans.requests.to_rows` makes them, with their labels, by id."""
    schema = FeatureSchema.from_dict(tomllib.loads(SCHEMA))

    def us(time: datetime) -> int:
        return (time - _EPOCH) // timedelta(microseconds=1)

    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in given:
        by_id.setdefault(row["request_id"], []).append(row)
    requests = [
        {
            "request_id": name,
            "ts": us(shown[0]["ts"]),
            "user": {"user": shown[0]["user_id"], "age": shown[0]["age_years"]},
            "context": {"page": shown[0]["page"]},
            "sequences": {
                s.name: [{"ts": us(e["ts"]), "event_item": e["item_id"]} for e in shown[0][s.column]]
                for s in schema.sequences
            },
            "candidates": [{"item_id": r["item_id"], "item": r["item_id"], "price": r["price"]} for r in shown],
        }
        for name, shown in by_id.items()
    ]
    found = {row["request_id"]: row for row in to_rows(requests, schema).to_pylist()}
    for name, shown in by_id.items():
        for candidate, row in zip(found[name]["candidates"], shown, strict=True):
            candidate.update(click=row["click"], conversion=row["conversion"])
    return found


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".jsonl", ".parquet"])
def test_every_format_gives_the_requests_of_the_request_encoder(folder: Path, ending: str) -> None:
    given = rows(40)
    write(folder / f"train{ending}", given)
    table = prepared(folder)
    wanted = expected(given)
    assert table.num_rows == len(wanted)
    assert table["ts"].to_pylist() == sorted(table["ts"].to_pylist())
    names = request_columns(read_schema(str(folder))).names
    for row in table.select(names).to_pylist():
        assert row == wanted[row["request_id"]]


def test_a_folder_of_files_is_read_in_the_order_of_names(folder: Path) -> None:
    write(folder / "train" / "b.csv", rows(5, 1, "b"))
    write(folder / "train" / "a.csv", rows(5, 2, "a"))
    (folder / "train" / "_SUCCESS").touch()
    assert [Path(file).name for file in split_files(str(folder), "train")] == ["a.csv", "b.csv"]
    assert prepared(folder)["request_id"][0].as_py().startswith("a")


def test_times_without_a_zone_are_the_logs(folder: Path) -> None:
    given = rows(1)[:1]
    write(folder / "train.csv", [{**given[0], "ts": "2026-03-29T03:30:00", "seq_click": "", "seq_buy": "[]"}])
    assert prepared(folder)["ts"].to_pylist() == [datetime(2026, 3, 29, 1, 30, tzinfo=UTC)]


def test_whole_numbers_are_times_of_the_schemas_epoch(folder: Path) -> None:
    (folder / "schema.toml").write_text('epoch = "s"\n' + SCHEMA)
    write(folder / "train.csv", [{**rows(1)[0], "ts": 1_774_746_000, "seq_click": "", "seq_buy": ""}])
    assert prepared(folder)["ts"].to_pylist() == [datetime.fromtimestamp(1_774_746_000, UTC)]


def test_without_request_ids_every_row_is_a_request(folder: Path) -> None:
    given = [{name: value for name, value in row.items() if name != "request_id"} for row in rows(10)]
    write(folder / "train.csv", given)
    assert prepared(folder).num_rows == len(given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"click": 2}, "column click: 1 of"),
        ({"click": ""}, "neither 0 nor 1, first row 3"),
        ({"click": 0, "conversion": 1}, "a conversion without a click, first row 3 (line 4): '1'"),
        ({"user_id": ""}, "column user_id: 1 of"),
        ({"item_id": None}, "have no value"),
        ({"ts": "soon"}, "have no time, first row 3 (line 4): 'soon'"),
        ({"price": "cheap"}, "column price: 1 of"),
        ({"seq_click": "{"}, "column seq_click, row 3 (line 4): "),
        ({"seq_click": '[{"when": 1}]'}, "its events have no 'ts', but when"),
        (
            {"seq_click": '[{"ts": "later", "item_id": "i1"}]'},
            "1 events have no time that can be read, first in row 3 (line 4): 'later'",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named(folder: Path, change: dict[str, Any], words: str) -> None:
    given = [row for number, row in enumerate(rows(20)) if row["request_id"] != rows(20)[number - 1]["request_id"]]
    for row in given:
        row["seq_click"] = row["seq_buy"] = "[]"
    given[2].update(change)
    write(folder / "train.csv", given)
    with pytest.raises(BadDataError) as refusal:
        prepared(folder)
    assert words in str(refusal.value)
    assert "train.csv" in str(refusal.value)


def test_rows_of_a_request_must_agree_and_differ_in_their_item(folder: Path) -> None:
    first = {**rows(1)[0], "item_id": "a", "click": 0, "conversion": 0}
    for change, words in (
        ({"item_id": "b", "user_id": "other"}, "another user_id than the first row of the same request, first row 2"),
        ({"item_id": "b", "ts": first["ts"] + timedelta(seconds=1)}, "another ts than the first row"),
        ({}, "an item that the request has shown before, first row 2 \\(line 3\\): 'a'"),
    ):
        write(folder / "train.csv", [first, {**first, **change}])
        with pytest.raises(BadDataError, match=words):
            prepared(folder)


def test_what_is_not_there_or_there_twice_is_named(folder: Path) -> None:
    with pytest.raises(BadConfigError, match="has no train: needed is"):
        prepared(folder)
    given = rows(3)
    write(folder / "train.csv", [{name: value for name, value in row.items() if name != "price"} for row in given])
    with pytest.raises(
        BadDataError, match="has no column 'price' \\(read by feature 'price'\\); it has request_id, user_id"
    ):
        prepared(folder)
    write(folder / "train" / "part.parquet", given)
    with pytest.raises(BadDataError, match=r"stands there more than once: train.csv, part.parquet"):
        prepared(folder)
    (folder / "train.csv").unlink()
    (folder / "train" / "part.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(BadDataError, match=r"part.parquet cannot be read"):
        prepared(folder)
