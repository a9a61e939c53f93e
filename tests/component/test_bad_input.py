"""What bad input gets: a message that names table, day, column, count and an example; what was published stays."""

from __future__ import annotations

import gzip
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
from airflow.sdk.exceptions import AirflowException
from pyspark.sql import SparkSession

from dags.steps import ended_by, raise_for
from expectations.audit import audit_staged
from jobs import behaviors, impressions, item_features
from jobs.runner import main
from jobs.sources.files import Files
from jobs.workspace import Workspace
from onetrans.errors import EXIT_BAD_DATA, EXIT_FAILED, EXIT_NOT_READY, UNHARMED, BadDataError, NotReadyError
from onetrans.lake import Lake
from onetrans.schema import Feature, FeatureSchema, Sequence
from onetrans.settings import AuditSettings, SourceSettings, SparkSettings, as_environment
from tests.raw_log import Row, open_workspace, publish, write_rows
from tests.worlds import write_schema

DS = date(2024, 2, 29)
NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
ROWS = 100
SCHEMA = FeatureSchema(
    name="bad",
    features=(
        Feature("user", "user", "hashed", "user_id", hash_size=50),
        Feature("item", "item", "hashed", "item_id", hash_size=50),
        Feature("price", "item", "bucketized", "price", boundaries=(1.0,)),
        Feature("device", "context", "hashed", "device", hash_size=10),
        Feature("event_item", "event", "hashed", "item_id", hash_size=50, embedding="item"),
    ),
    sequences=(Sequence("click", "click", max_length=3),),
)


def shown() -> list[Row]:
    """A good day: 50 requests of two items, every fourth row clicked."""
    return [
        {
            "request_id": f"r{n // 2}",
            "user_id": f"u{n // 10}",
            "item_id": f"i{n % 20}",
            "ts": NOON + timedelta(seconds=n // 2),
            "position": n % 2,
            "device": "phone",
            "click": int(n % 4 == 0),
            "conversion": int(n % 8 == 0),
        }
        for n in range(ROWS)
    ]


def happened() -> list[Row]:
    return [
        {"user_id": f"u{n % 10}", "item_id": f"i{n % 20}", "type": "click", "ts": NOON + timedelta(seconds=n)}
        for n in range(ROWS)
    ]


def on_sale() -> list[Row]:
    return [{"item_id": f"i{n}", "price": 1.0} for n in range(ROWS)]


@pytest.fixture(scope="module")
def published(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A lake in which the good day is published."""
    folder = tmp_path_factory.mktemp("good")
    write_rows(folder / "raw" / "impressions" / f"ds={DS}", shown())
    write_rows(folder / "raw" / "behaviors" / f"ds={DS}", happened())
    write_rows(folder / "raw" / "items", [{"item_id": f"i{n}", "price": 1.0} for n in range(20)])
    work = open_workspace(spark, folder, SCHEMA)
    for job in (impressions, behaviors, item_features):
        publish(work, job, DS)
    return work


@pytest.fixture
def work(published: Workspace, tmp_path: Path) -> Iterator[Workspace]:
    """The same lake, fed from an empty folder; after the test, what was published must be as it was."""
    tables = ("impressions", "behaviors", "item_features")

    def state() -> list[Any]:
        lake = published.lake
        rows = {table: sorted(map(repr, lake.read(table).to_pylist())) for table in tables}
        return [rows, {table: lake.snapshot_id(table) for table in tables}]

    before = state()
    yield replace(published, source=Files(str(tmp_path), SCHEMA))
    assert state() == before


Says = Callable[[ModuleType], tuple[int, str]]


@pytest.fixture
def says(work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Says:
    """Runs a job's main up to the published day, and returns its exit code and what it says last."""
    settings = replace(
        work.settings, source=SourceSettings(path=str(tmp_path)), spark=SparkSettings(shuffle_partitions=2)
    )
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    write_schema(tmp_path / "schema.toml", SCHEMA)
    monkeypatch.setattr(SparkSession, "stop", lambda session: None)  # it is the session of all tests

    def run(job: ModuleType) -> tuple[int, str]:
        code = main(job.TABLE, job.build, ["--ds", str(DS), "--publish"])
        message = capsys.readouterr().err.strip().splitlines()[-1]
        with pytest.raises(AirflowException) as raised:
            raise_for("build", ended_by(code, message))
        assert str(raised.value).lower().count(UNHARMED.rstrip(".").lower()) == 1, "said once in Airflow's log too"
        return code, message

    return run


def folder_of(work: Workspace, table: str = "impressions") -> Path:
    assert isinstance(work.source, Files)
    return Path(work.source.path) / table / f"ds={DS}"


def changed(rows: list[Row], count: int, **values: Any) -> list[Row]:
    """Return the rows, the first ``count`` of them with other values."""
    return [{**row, **values} if n < count else row for n, row in enumerate(rows)]


def test_a_missing_day(work: Workspace, says: Says) -> None:
    write_rows(folder_of(work).with_name("ds=2024-02-27"), shown())
    code, message = says(impressions)
    assert code == EXIT_NOT_READY, "tried again later"
    assert message == (
        f"NotReadyError: impressions {DS}: there is no {folder_of(work)}; days that are there: 2024-02-27"
    )


def test_a_missing_column(work: Workspace, says: Says) -> None:
    write_rows(folder_of(work), [{k: v for k, v in row.items() if k != "device"} for row in shown()])
    code, message = says(impressions)
    assert code == EXIT_BAD_DATA
    assert f"impressions {DS}: column device is missing; there are request_id, user_id, item_id, ts, " in message
    assert message.endswith(f"; for example in file://{folder_of(work)}/part-0.parquet")


@pytest.mark.parametrize(
    ("column", "values", "kind", "message"),
    [
        ("click", NOON, pa.timestamp("us", tz="UTC"), r"column click is timestamp; expected 0 or 1"),
        ("item_id", 7.0, pa.float64(), r"column item_id is double; expected text or whole numbers"),
        (
            "ts",
            1_709_208_000_000,
            pa.int64(),
            r"column ts is bigint; expected a timestamp; .*must say epoch =",
        ),
        ("device", [1], pa.list_(pa.int64()), r"column device is array<bigint>; expected text"),
    ],
)
def test_a_mistyped_column(
    work: Workspace, says: Says, column: str, values: Any, kind: pa.DataType, message: str
) -> None:
    write_rows(folder_of(work), changed(shown(), ROWS, **{column: values}), {column: kind})
    code, told = says(impressions)
    assert code == EXIT_BAD_DATA
    assert re.match(f"BadDataError: impressions {DS}: {message}", told)


@pytest.mark.parametrize(
    ("change", "count", "reason", "example"),
    [
        ({"click": 2, "conversion": 0}, 5, "click: not 0 or 1", '"click":2'),
        ({"conversion": -1}, 6, "conversion: not 0 or 1", '"conversion":-1'),
        ({"click": 0, "conversion": 1}, 7, "conversion: 1 without a click", '"conversion":1'),
        ({"click": None}, 3, "click: missing", '"request_id":"r0"'),
        ({"request_id": None}, 4, "request_id: missing", '"item_id":"i0"'),
        ({"user_id": None}, 4, "user_id: missing", '"request_id":"r0"'),
        ({"item_id": " "}, 5, "item_id: missing", '"item_id":" "'),
        ({"ts": NOON + timedelta(days=1)}, 8, "ts: outside the day", '"ts":"2024-03-01T12:00:00.000000Z"'),
        ({"ts": None}, 8, "ts: missing", '"request_id":"r0"'),
        ({"request_id": "r0"}, 40, "request_id, item_id: several rows of one key disagree", '"request_id":"r0"'),
    ],
)
def test_too_many_bad_rows_stop_the_day(
    work: Workspace, says: Says, change: Row, count: int, reason: str, example: str
) -> None:
    write_rows(folder_of(work), changed(shown(), count, **change))
    code, message = says(impressions)
    assert code == EXIT_BAD_DATA
    assert message.startswith(f"BadDataError: impressions {DS}: {count} of {ROWS} rows ({count}.0 %) were refused: ")
    assert f"{count} x '{reason}', for example {{" in message
    assert example in message
    assert "lake.max_quarantine_share allows 2 %" in message
    assert f"`onetrans quarantine show impressions --ds {DS}` prints the rows. Correct the day's files" in message
    kept = quarantined(work, "impressions")
    assert [row["reason"] for row in kept] == [reason] * count


def quarantined(work: Workspace, table: str) -> list[Row]:
    rows = work.lake.read("quarantine", [DS]).to_pylist()
    return [row for row in rows if row["table_name"] == table]


def test_a_few_bad_rows_are_kept_and_the_day_goes_on(work: Workspace) -> None:
    write_rows(folder_of(work), changed(shown(), 1, click=3))
    staged = impressions.build(work, DS)
    assert (staged.rows, staged.quarantined) == (ROWS - 1, 1)
    (row,) = quarantined(work, "impressions")
    assert row["reason"] == "click: not 0 or 1"
    assert json.loads(row["raw"])["request_id"] == "r0"
    write_rows(folder_of(work), shown())
    assert impressions.build(work, DS).quarantined == 0
    assert quarantined(work, "impressions") == [], "corrected data leave nothing in the quarantine"


@pytest.mark.parametrize(
    ("job", "rows", "reason"),
    [
        (impressions, changed(shown(), 1, position=-1), "position: negative"),
        (item_features, changed(on_sale(), 1, price=float("inf")), "price: not finite"),
        (item_features, changed(on_sale(), 1, price=float("-inf")), "price: not finite"),
    ],
)
def test_one_bad_number_stops_no_day(work: Workspace, job: ModuleType, rows: list[Row], reason: str) -> None:
    write_rows(folder_of(work) if job is impressions else folder_of(work, "items").parent, rows)
    staged = job.build(work, DS)
    assert staged.quarantined == 1
    (row,) = quarantined(work, job.TABLE)
    assert row["reason"] == reason
    assert audit_staged(work.lake, SCHEMA, job.TABLE, DS, spark=work.spark, settings=AuditSettings())["passed"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_an_id_that_passed_through_floating_point(work: Workspace, ending: str) -> None:
    """In text nothing but the spelling says so; a category may be spelled that way, as a version is."""
    rows = [{**row, "ts": row["ts"].isoformat(), "device": "14.0"} for row in shown()]
    for row, spelled in zip(rows, (7.0, 1.5e18, "3.50e+10", "i1.0", "v2", 12), strict=False):
        row["user_id"], row["request_id"] = spelled, f"one of {spelled}"
    folder = folder_of(work)
    folder.mkdir(parents=True)
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (folder / f"part.{ending}").write_text("\n".join(map(json.dumps, rows) if ending == "jsonl" else lines) + "\n")
    work = replace(work, lake=Lake(replace(work.lake.settings, max_quarantine_share=1.0)))
    assert impressions.build(work, DS).quarantined == 3
    found = {json.loads(row["raw"])["request_id"]: row["reason"] for row in quarantined(work, "impressions")}
    assert set(found) == {"one of 7.0", "one of 1.5e+18", "one of 3.50e+10"}
    assert set(found.values()) == {"user_id: floating point; write a whole number or text"}


def test_rows_that_differ_in_what_is_missing_disagree(work: Workspace) -> None:
    """The values of both rows are the same, in another order of columns; a hash that skips nulls takes them for one."""
    schema = replace(SCHEMA, features=(*SCHEMA.features, Feature("os", "context", "hashed", "os", hash_size=9)))
    rows = [{**row, "os": "x"} for row in shown()]
    write_rows(
        folder_of(work), [{**rows[0], "device": None, "os": "q"}, {**rows[0], "device": "q", "os": None}, *rows[1:]]
    )
    work = replace(work, schema=schema, source=Files(str(folder_of(work).parents[1]), schema))
    staged = impressions.build(work, DS)
    assert (staged.rows, staged.quarantined) == (ROWS - 1, 2)
    assert {row["reason"] for row in quarantined(work, "impressions")} == {
        "request_id, item_id: several rows of one key disagree"
    }


def test_repeated_rows_are_dropped_and_counted(work: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(folder_of(work), shown() + shown()[:30])
    with caplog.at_level("INFO"):
        staged = impressions.build(work, DS)
    assert (staged.rows, staged.quarantined) == (ROWS, 0)
    told = f"impressions {DS}: dropped 30 exact repeats of (request_id, item_id), for example "
    (message,) = [text for text in caplog.messages if text.startswith(told)]
    example = json.loads(message.removeprefix(told))
    assert example in [{"request_id": row["request_id"], "item_id": row["item_id"]} for row in shown()[:30]]


def test_repeated_items_are_dropped_and_counted(work: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(folder_of(work, "items").parent, [*on_sale(), on_sale()[7]])
    with caplog.at_level("INFO"):
        assert item_features.build(work, DS).quarantined == 0
    assert (
        f'item_features {DS}: dropped 1 exact repeats of (item_id), for example {{"item_id":"i7"}}' in caplog.messages
    )


def test_a_request_of_two_users(work: Workspace) -> None:
    write_rows(folder_of(work), changed(shown(), 1, user_id="someone else"))
    staged = impressions.build(work, DS)
    assert (staged.rows, staged.quarantined) == (ROWS - 2, 2)
    assert {row["reason"] for row in quarantined(work, "impressions")} == {"user_id: several users in one request"}


def test_an_empty_file(work: Workspace, says: Says) -> None:
    path = write_rows(folder_of(work), shown())
    path.with_name("part-1.parquet").touch()
    told = f"BadDataError: impressions {DS}: file file://{path.with_name('part-1.parquet')} is empty (0 bytes)"
    assert says(impressions) == (EXIT_BAD_DATA, told)


@pytest.mark.parametrize("name", ["part-0.parquet", "part-0.csv"])
def test_a_day_without_rows(work: Workspace, says: Says, name: str) -> None:
    path = write_rows(folder_of(work), shown()[:0] or [dict.fromkeys(shown()[0])])
    if name.endswith(".csv"):
        path.unlink()
        path.with_name(name).write_text(",".join(shown()[0]) + "\n")
    else:
        table = pa.parquet.read_table(path)
        pa.parquet.write_table(table.slice(0, 0), path)
    code, message = says(impressions)
    assert code == EXIT_BAD_DATA
    assert f"impressions {DS} is empty: no rows in its 1 file, for example file://{path.with_name(name)}" in message


def test_a_truncated_parquet_file(work: Workspace, says: Says) -> None:
    path = write_rows(folder_of(work), shown())
    path.write_bytes(path.read_bytes()[:-300])
    code, message = says(impressions)
    assert code == EXIT_BAD_DATA
    assert message.startswith(f"BadDataError: impressions {DS}: file file://{path} (")
    assert "is not whole Parquet" in message


def test_a_parquet_file_with_a_damaged_page(work: Workspace, says: Says) -> None:
    """The footer is whole, so this shows only when Spark reads the rows."""
    path = write_rows(folder_of(work), shown())
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    code, message = says(impressions)
    assert code == EXIT_BAD_DATA
    assert message.startswith(f"BadDataError: impressions {DS}: a file is damaged: ")
    assert str(path) in message


@pytest.mark.parametrize("rows", [1, 400])
def test_a_truncated_gzip_file(work: Workspace, says: Says, rows: int) -> None:
    """A small one shows at the first look, a larger one only when Spark comes to its end."""
    row = ",".join(map(str, {**shown()[0], "ts": NOON.isoformat()}.values()))
    lines = [",".join(shown()[0]) + ",pad", *(f"{row},{secrets.token_hex(5000)}" for _ in range(rows))]
    folder_of(work).mkdir(parents=True)
    path = folder_of(work) / "part.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:-20])
    code, message = says(impressions)
    assert code == EXIT_BAD_DATA
    assert message.startswith(f"BadDataError: impressions {DS}: ")
    assert str(path) in message


def test_text_that_is_no_value(work: Workspace) -> None:
    header = list(shown()[0])
    lines = [",".join(str(row[name]) for name in header) for row in shown()]
    lines[0] = lines[0].replace("phone,1", "phone,yes")
    lines[1] += ",one,field,too,many"
    folder_of(work).mkdir(parents=True)
    (folder_of(work) / "a.csv").write_text("\n".join([",".join(header), *lines]) + "\n")
    assert impressions.build(work, DS).rows == ROWS - 2
    reasons = {row["reason"]: json.loads(row["raw"]) for row in quarantined(work, "impressions")}
    assert reasons["click: not 0 or 1"]["click"] == "yes"
    assert reasons["row: cannot be parsed"]["_unreadable"].endswith("one,field,too,many")


def test_files_that_differ(work: Workspace, says: Says) -> None:
    path = write_rows(folder_of(work), shown())
    path.rename(path.with_name("part-1.parquet"))
    write_rows(folder_of(work), shown(), {"position": pa.float64()})
    code, message = says(impressions)
    assert code == EXIT_BAD_DATA
    assert re.search(rf"impressions {DS}: .*part-1.parquet differs from .*part-0.parquet", message)


def test_a_behaviour_from_the_future(work: Workspace, says: Says) -> None:
    write_rows(folder_of(work, "behaviors"), changed(happened(), 3, ts=NOON + timedelta(days=1)))
    code, message = says(behaviors)
    assert code == EXIT_BAD_DATA
    assert re.search(rf"behaviors {DS}: 3 of 100 rows .* 3 x 'ts: after the day', for example", message)


def test_an_item_that_is_two_things(work: Workspace, says: Says) -> None:
    items = [{"item_id": f"i{n}", "price": float(n)} for n in range(10)] + [{"item_id": "i0", "price": 5.0}]
    write_rows(folder_of(work, "items").parent, items)
    code, message = says(item_features)
    assert code == EXIT_BAD_DATA
    assert re.search(rf"item_features {DS}: 2 of 11 rows .*item_id: several rows", message)


EXPECTED = "expected 2 finite numbers"
VECTORS = [
    ("nonsense", f"not a list of numbers, {EXPECTED}"),
    ("5", f"not a list of numbers, {EXPECTED}"),
    ('{"a": 1}', f"not a list of numbers, {EXPECTED}"),
    ('["a", 1]', f"not a list of numbers, {EXPECTED}"),
    ("[1, 2, 3]", f"3 numbers, {EXPECTED}"),
    ("[]", f"0 numbers, {EXPECTED}"),
    ("[1, null]", f"2 numbers with an empty one, {EXPECTED}"),
    ("[1, NaN]", f"2 numbers with NaN or an infinite one, {EXPECTED}"),
    ("[-Infinity, 1]", f"2 numbers with NaN or an infinite one, {EXPECTED}"),
    ("[1, 1e39]", f"2 numbers with NaN or an infinite one, {EXPECTED}"),
    ("[0.5, -2]", None),
    ("", None),
]
"""What a file says, as CSV and JSON spell it, and what is wrong with it."""


def vectors_as_csv(folder: Path, vectors: list[str]) -> None:
    cells = [vector.replace('"', '""') for vector in vectors]
    lines = ["item_id,price,image", *(f'i{n},1,"{cell}"' for n, cell in enumerate(cells))]
    folder.mkdir(parents=True)
    (folder / "items.csv").write_text("\n".join(lines) + "\n")


def vectors_as_json(folder: Path, vectors: list[str]) -> None:
    values = [json.dumps(vector) if vector in ("nonsense", "") else vector for vector in vectors]
    folder.mkdir(parents=True)
    (folder / "items.jsonl").write_text(
        "".join(f'{{"item_id": "i{n}", "price": 1, "image": {value}}}\n' for n, value in enumerate(values))
    )


def vectors_as_parquet(folder: Path, vectors: list[str]) -> None:
    values = [json.loads(vector) if vector else None for vector in vectors]
    rows = [{"item_id": f"i{n}", "price": 1.0, "image": value} for n, value in enumerate(values)]
    write_rows(folder, rows, {"image": pa.list_(pa.float64())})


def with_image() -> FeatureSchema:
    return replace(SCHEMA, features=(*SCHEMA.features, Feature("image", "item", "vector", "image", dim=2)))


@pytest.mark.parametrize(
    ("write", "cases"),
    [
        pytest.param(vectors_as_csv, VECTORS, id="csv"),
        pytest.param(vectors_as_json, VECTORS, id="json"),
        pytest.param(vectors_as_parquet, VECTORS[4:], id="parquet"),  # the others are no lists of numbers
    ],
)
def test_vectors_that_are_none_are_refused_one_by_one(work: Workspace, tmp_path: Path, write: Any, cases: Any) -> None:
    schema = with_image()
    lake = Lake(replace(work.lake.settings, max_quarantine_share=1.0))
    work = replace(work, schema=schema, source=Files(str(tmp_path), schema), lake=lake)
    write(tmp_path / "items", [text for text, _ in cases])
    item_features.build(work, DS)
    found = {json.loads(row["raw"])["item_id"]: row["reason"] for row in quarantined(work, "item_features")}
    assert found == {f"i{n}": f"image: {reason}" for n, (_, reason) in enumerate(cases) if reason}


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [(["a"], pa.list_(pa.string()), "array<string>"), (1.0, pa.float64(), "double"), (b"ab", pa.binary(), "binary")],
)
def test_a_column_that_cannot_hold_vectors(
    work: Workspace, tmp_path: Path, value: Any, kind: pa.DataType, found: str
) -> None:
    write_rows(tmp_path / "items", [{"item_id": "i1", "price": 1.0, "image": value}], {"image": kind})
    with pytest.raises(BadDataError, match=f"items snapshot: column image is {found}; expected a list of numbers"):
        Files(str(tmp_path), with_image()).items(work.spark, DS)


def test_a_lake_that_cannot_be_written(
    work: Workspace, says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Java says it in dozens of lines; the person who is on call gets one."""
    write_rows(folder_of(work), shown())
    (tmp_path / "file").touch()
    monkeypatch.setenv("ONETRANS_LAKE_WAREHOUSE", str(tmp_path / "file" / "lake"))
    monkeypatch.setenv("ONETRANS_LAKE_CATALOG_URI", f"sqlite:///{tmp_path / 'catalog.db'}")
    code, message = says(impressions)
    assert code == EXIT_FAILED
    assert message.startswith(f"SparkFailedError: impressions {DS}: Spark failed: org.apache.")
    assert str(tmp_path / "file") in message
    assert "Published data is as it was. Run the step again" in message


def test_every_message_can_be_traced(work: Workspace, says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(folder_of(work).with_name("ds=2024-02-27"), shown())
    monkeypatch.setenv("ONETRANS_TRACEBACK", "1")
    with pytest.raises(NotReadyError):
        says(impressions)
