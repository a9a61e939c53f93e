"""What sources say before Spark reads a row: which schema, which columns, which files, and what is wrong with them."""

from __future__ import annotations

import gzip
import inspect
from datetime import date
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs.contract import Column, contract
from jobs.sources import open_source
from jobs.sources.files import Files
from jobs.sources.kuairand import KuaiRand
from jobs.sources.reading import Where, data_files, read_files
from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.schema import Aggregates, Feature, FeatureSchema, Sequence, load_schema
from onetrans.settings import SourceSettings

DS = date(2024, 2, 29)
HERE = Where("impressions", str(DS))
NO_SPARK = cast(SparkSession, None)  # every refusal below comes before a session is used


def schema(**changes: Any) -> FeatureSchema:
    values: dict[str, Any] = {
        "name": "shop",
        "features": (
            Feature("user", "user", "hashed", "user_id", hash_size=9),
            Feature("age", "user", "bucketized", "age", boundaries=(1.0,)),
            Feature("user_ctr", "user", "bucketized", "user_ctr_7d", boundaries=(0.1,)),
            Feature("hour", "context", "hashed", "hour_of_day", hash_size=24),
            Feature("device", "context", "hashed", "device", hash_size=9),
            Feature("item", "item", "hashed", "item_id", hash_size=9),
            Feature("brand_ctr", "item", "bucketized", "brand_ctr_1d", boundaries=(0.1,)),
            Feature("event_item", "event", "hashed", "item_id", hash_size=9, embedding="item"),
            Feature("event_price", "event", "bucketized", "price", boundaries=(1.0,)),
        ),
        "sequences": (Sequence("click", "click", 3),),
        "aggregates": Aggregates(item_keys=("brand",)),
    }
    return FeatureSchema(**{**values, **changes})


def names(columns: tuple[Column, ...], required: bool = True) -> list[str]:
    return [column.name for column in columns if column.required == required]


def test_the_contract_asks_for_declared_columns_and_not_for_computed_ones() -> None:
    shop = schema()
    needed = ["request_id", "user_id", "item_id", "ts", "click", "conversion", "device"]
    assert names(contract(shop, "impressions")) == needed
    assert names(contract(shop, "impressions"), required=False) == ["position", "conversion_at", "true_ctr", "true_cvr"]
    assert names(contract(shop, "behaviors")) == ["user_id", "item_id", "type", "ts"]
    assert names(contract(shop, "behaviors"), required=False) == ["available_at", "event_id", "price"]
    assert names(contract(shop, "users")) == ["user_id", "age"]
    assert names(contract(shop, "items")) == ["item_id", "brand"]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (Feature("x", "user", "hashed", "user_ctr_1d", hash_size=9), "'user_ctr_1d' is a computed number"),
        (Feature("x", "item", "hashed", "brand_clicks_7d", hash_size=9), "'brand_clicks_7d' is a computed number"),
        (Feature("x", "item", "bucketized", "brand", boundaries=(1.0,)), "'brand' is an id; its kind must be 'hashed'"),
    ],
)
def test_a_feature_that_cannot_be_built_is_refused(feature: Feature, message: str) -> None:
    with pytest.raises(BadConfigError, match=message):
        contract(schema(features=(*schema().features, feature)), "items")


def test_only_columns_of_the_contract_are_renamed() -> None:
    renamed = schema(columns={"impressions": {"conversion": "bought", "device": "phone"}})
    assert contract(renamed, "impressions") == contract(schema(), "impressions")
    mistyped = schema(columns={"impressions": {"itme_id": "sku"}})
    told = r"\[columns.impressions\] itme_id is no column of the contract, which has request_id, user_id, item_id, ts, "
    with pytest.raises(BadConfigError, match=told):
        contract(mistyped, "impressions")


@pytest.mark.parametrize(
    ("values", "message"), [({"epoch": "ns"}, "epoch"), ({"derived_behaviors": ("like",)}, "like")]
)
def test_a_schema_says_only_what_is_known(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfigError, match=message):
        schema(**values)


def test_the_schema_is_the_named_one_or_the_log_s_own_or_the_adapter_s(tmp_path: Path) -> None:
    head = '[[features]]\nname="u"\nside="user"\nkind="hashed"\ncolumn="user_id"\nhash_size=9\n'
    body = head + head.replace("user", "item").replace('"u"', '"i"')
    (tmp_path / "schema.toml").write_text('name="own"\nsequences=[]\n' + body)
    (tmp_path / "other.toml").write_text('name="named"\nsequences=[]\n' + body)
    own = SourceSettings(path=str(tmp_path))
    assert load_schema(own).name == "own"
    assert load_schema(SourceSettings(path=str(tmp_path), schema=str(tmp_path / "other.toml"))).name == "named"
    assert load_schema(SourceSettings(kind="kuairand", path=str(tmp_path / "none"))).name == "kuairand"
    with pytest.raises(BadConfigError, match=r"there is no feature schema: .*none/schema.toml"):
        load_schema(SourceSettings(path=str(tmp_path / "none")))


def test_a_source_may_be_a_class_outside_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mylog"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "source.py").write_text("from jobs.sources.files import Files\n\n\nclass MyLog(Files):\n    pass\n")
    bundled = Path(inspect.getfile(KuaiRand)).with_name("schema.toml")
    (package / "schema.toml").write_text(bundled.read_text().replace('name = "kuairand"', 'name = "mine"'))
    monkeypatch.syspath_prepend(tmp_path)
    settings = SourceSettings(kind="mylog.source:MyLog", path=str(tmp_path / "none"))
    own = load_schema(settings)
    assert own.name == "mine"
    source = open_source(settings, own)
    assert (type(source).__module__, type(source).__name__) == ("mylog.source", "MyLog")
    assert isinstance(source, Files)
    assert source.path == settings.path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "simulated",
            "'simulated' is none of files, kuairand, nor a class of your own, written package.module:Class",
        ),
        ("mylog.source:", "source.kind = 'mylog.source:' is none of "),
        ("nowhere.source:MyLog", "source.kind = 'nowhere.source:MyLog': No module named 'nowhere'; is it installed"),
        (
            "jobs.sources.files:MyLog",
            "'jobs.sources.files:MyLog': module jobs.sources.files has no MyLog",
        ),
    ],
)
def test_a_source_that_is_not_there_is_bad_configuration(kind: str, told: str) -> None:
    with pytest.raises(BadConfigError, match=told):
        open_source(SourceSettings(kind=kind), schema())


def test_a_schema_is_not_sought_beside_a_module_that_is_not_there() -> None:
    with pytest.raises(BadConfigError, match=r"there is no module nowhere.source; is it installed, or on PYTHONPATH"):
        load_schema(SourceSettings(kind="nowhere.source:MyLog", path="nowhere"))


@pytest.mark.parametrize("source", ["kuairand", "simulated"])
def test_a_bundled_schema_can_be_built(source: str) -> None:
    bundled = FeatureSchema.load(Path(__file__).parents[2] / "jobs" / "sources" / source / "schema.toml")
    for table in ("impressions", "behaviors", "users", "items"):
        assert contract(bundled, table)


def test_no_outcome_of_kuairand_describes_a_candidate() -> None:
    bundled = load_schema(SourceSettings(kind="kuairand", path="nowhere"))
    outcomes = {"clicked", "viewed_long", "liked", "play_ratio"}
    assert {f.side for f in bundled.features if f.column in outcomes} == {"event"}


def test_a_missing_day_names_the_place_and_the_days_there_are(tmp_path: Path) -> None:
    (tmp_path / "behaviors" / "history").mkdir(parents=True)
    for day in ("2024-02-25", "2024-02-26", "2024-02-28"):
        (tmp_path / "behaviors" / f"ds={day}").mkdir()
    source = Files(str(tmp_path), schema())
    with pytest.raises(
        NotReadyError, match=f"behaviors 2024-02-29: there is no {tmp_path}/behaviors/ds=2024-02-29"
    ) as e:
        source.behaviors(NO_SPARK, DS)
    assert str(e.value).endswith("days that are there: 2024-02-25..2024-02-26, 2024-02-28")
    with pytest.raises(NotReadyError, match=r"holds no .parquet, .csv, .json or .jsonl file"):
        source.behaviors(NO_SPARK, date(2024, 2, 28))
    with pytest.raises(BadConfigError, match="items: there is no folder"):
        source.items(NO_SPARK, DS)
    assert Files(str(tmp_path / "impressions"), schema()).history(NO_SPARK) is None


def test_a_folder_that_is_no_day_is_named(tmp_path: Path) -> None:
    for name in ("ds=2024-02-28", "ds=20240229"):
        (tmp_path / "impressions" / name).mkdir(parents=True)
    told = f"impressions: folder {tmp_path}/impressions/ds=20240229 is not named after a day, as ds=2024-02-29 is"
    with pytest.raises(BadDataError, match=told):
        Files(str(tmp_path), schema()).impressions(NO_SPARK, DS)


def test_a_mistyped_path_is_bad_configuration_and_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "logs" / "impressions" / "ds=2024-02-28").mkdir(parents=True)
    with pytest.raises(BadConfigError, match=f"source.path = '{tmp_path}/lgos' is no folder"):
        Files(str(tmp_path / "lgos"), schema()).impressions(NO_SPARK, DS)
    with pytest.raises(BadConfigError, match="holds none of the folders impressions, behaviors, users, items"):
        Files(str(tmp_path), schema()).impressions(NO_SPARK, DS)
    with pytest.raises(NotReadyError, match=r"there is no .*logs/impressions/ds=2024-02-29"):
        Files(str(tmp_path / "logs"), schema()).impressions(NO_SPARK, DS)
    with pytest.raises(NotReadyError, match="derived_behaviors"):
        Files(str(tmp_path / "logs"), schema()).behaviors(NO_SPARK, DS)


def test_a_missing_day_of_kuairand_names_the_days_there_are(tmp_path: Path) -> None:
    (tmp_path / "daily" / "date=20220504").mkdir(parents=True)
    settings = SourceSettings(kind="kuairand", path=str(tmp_path))
    source = open_source(settings, load_schema(settings))
    assert isinstance(source, KuaiRand)
    with pytest.raises(NotReadyError, match=r"impressions 2024-02-29: there is no .*; days that are there: 2022-05-04"):
        source.impressions(NO_SPARK, DS)
    with pytest.raises(BadConfigError, match=r"there is no user_features_\*.csv in"):
        source.users(NO_SPARK, DS)


def test_a_history_of_kuairand_that_came_or_changed_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "daily" / "date=20220504").mkdir(parents=True)
    settings = SourceSettings(kind="kuairand", path=str(tmp_path))
    source = open_source(settings, load_schema(settings))
    assert source.stamp("behaviors", None) == ""
    (tmp_path / "user_history_to_20220503.parquet").write_bytes(b"one")
    first = source.stamp("behaviors", None)
    (tmp_path / "user_features_pure.csv").write_bytes(b"another table")
    assert first
    assert source.stamp("behaviors", None) == first
    (tmp_path / "user_history_to_20220503.parquet").write_bytes(b"another")
    assert source.stamp("behaviors", None) != first


def test_only_data_files_are_read(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.csv.gz", "c.jsonl", "_SUCCESS", ".a.parquet.crc", "notes.txt", "schema.toml"):
        (tmp_path / name).touch()
    assert [file.rsplit("/", 1)[1] for file in data_files(str(tmp_path))] == ["a.parquet", "b.csv.gz", "c.jsonl"]


def read(folder: Path, *columns: Column) -> None:
    read_files(NO_SPARK, data_files(str(folder)), HERE, columns or None)


def test_broken_files_are_named_before_spark_sees_them(tmp_path: Path) -> None:
    whole = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": list(range(1000))}), whole)
    broken = tmp_path / "b.parquet"
    broken.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(BadDataError, match=r"impressions 2024-02-29: file .*b.parquet \(500 bytes\) is not whole"):
        read(tmp_path)
    broken.write_bytes(b"")
    with pytest.raises(BadDataError, match=r"file .*b.parquet is empty \(0 bytes\)"):
        read(tmp_path)
    broken.unlink()
    (tmp_path / "c.csv").write_text("x\n1\n")
    with pytest.raises(BadDataError, match="files of several formats lie together: csv, parquet"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (pa.table({"x": ["text"], "y": [1.0]}), r"b.parquet differs from .*a.parquet in a column's type: .*x"),
        (pa.table({"x": [1]}), r"file .*b.parquet lacks column y"),
        (pa.table({"x": [1], "y": [1.0], "t": pa.array([1], pa.timestamp("ns"))}), "column t has nanosecond times"),
    ],
)
def test_parquet_files_of_a_day_must_agree(tmp_path: Path, second: pa.Table, message: str) -> None:
    pq.write_table(pa.table({"x": [1], "y": [1.0]}), tmp_path / "a.parquet")
    pq.write_table(second, tmp_path / "b.parquet")
    with pytest.raises(BadDataError, match=message):
        read(tmp_path)


def test_a_csv_header_names_what_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,x\n1,2,3\n")
    with pytest.raises(BadDataError, match=r"the header of .*a.csv repeats column x: x, y, x"):
        read(tmp_path, Column("x", "id"))


def test_a_file_of_something_else_is_not_told_as_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("hello world\n")
    columns = (Column("x", "id"), Column("y", "id"), Column("z", "id", required=False))
    told = rf"2024-02-29: columns x, y are missing; there are hello world; for example in .*{tmp_path}/a.csv$"
    with pytest.raises(BadDataError, match=told):
        read(tmp_path, *columns)
    (tmp_path / "a.csv").write_text("x,z\n1,2\n")
    with pytest.raises(BadDataError, match=r"column y is missing; there are x, z; for example in .*a.csv$"):
        read(tmp_path, *columns)


@pytest.mark.parametrize("content", [b"no gzip at all", gzip.compress(b'{"x": 1}\n' * 9)[:-9]])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    told = rf"impressions 2024-02-29: file .*a.jsonl.gz \({len(content)} bytes\) is not whole gzip"
    with pytest.raises(BadDataError, match=told):
        read(tmp_path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("y,x\n1,2\n", "the header of .*b.csv differs from that of .*a.csv: y, x against x, y"),
        ("x,y\n", None),
    ],
)
def test_csv_files_of_a_day_must_agree(tmp_path: Path, second: str, message: str | None) -> None:
    (tmp_path / "a.csv").write_text("x,y\n")
    (tmp_path / "b.csv").write_text(second)
    with pytest.raises(BadDataError, match=message or "impressions 2024-02-29 is empty: no rows in its 2 files"):
        read(tmp_path)
