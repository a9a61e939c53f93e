"""What the suites are made of, without Great Expectations: declared columns, profiles, row views, the site's index."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from expectations import columns, site
from expectations.profile import Profile, merge_profiles, profile_batch
from expectations.views import needed_columns, training_requests, view_of
from onetrans.schema import Aggregates, Feature
from onetrans.settings import AuditSettings, LakeSettings
from tests.audit_tables import FACTORIES, NOON, SECOND, audit_schema, valid_table

MIDNIGHT = datetime(2024, 3, 1, tzinfo=UTC)


def batch(table: str) -> pa.RecordBatch:
    return valid_table(table).combine_chunks().to_batches()[0]


# Declared columns


def test_a_counts_bounds_differ_from_a_rates() -> None:
    declared = {c.name: (c.smallest, c.largest) for c in columns.aggregates(Aggregates((1,)), "author_id")}
    assert declared == {
        "author_id_impressions_1d": (0, None),
        "author_id_clicks_1d": (0, None),
        "author_id_conversions_1d": (0, None),
        "author_id_ctr_1d": (0, 1),
        "author_id_cvr_1d": (0, 1),
    }


def test_hashed_features_are_text_where_stored_and_hashes_where_encoded() -> None:
    schema = audit_schema()
    assert {c.name: c.type for c in columns.stored(schema, "item")} == {
        "item_id": "text",
        "author_id": "text",
        "price": "double",
        "image": "list of float",
        "image.element": "float",
        "image.length": "int",
    }
    assert {c.name: c.type for c in columns.encoded(schema.of_side("item"), "candidates.")} == {
        "candidates.item": "bigint",
        "candidates.author": "bigint",
        "candidates.price": "double",
        "candidates.image": "list of float",
        "candidates.image.element": "float",
        "candidates.image.length": "int",
    }


def test_the_first_declaration_of_a_column_counts() -> None:
    declared = columns.distinct([columns.key("item_id"), *columns.stored(audit_schema(), "item")])
    assert [c.name for c in declared] == ["item_id", "author_id", "price", "image", "image.element", "image.length"]
    assert declared[0].required


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (pa.string(), "text"),
        (pa.large_string(), "text"),
        (pa.int32(), "int"),
        (pa.int64(), "bigint"),
        (pa.float64(), "double"),
        (pa.float32(), "float"),
        (pa.date32(), "date"),
        (pa.timestamp("us", tz="UTC"), "timestamp"),
        (pa.timestamp("us"), "timestamp[us]"),
        (pa.timestamp("ns", tz="UTC"), "timestamp[ns, tz=UTC]"),
        (pa.list_(pa.int64()), "list<item: int64>"),
        (pa.list_(pa.float64()), "list<item: double>"),
        (pa.list_(pa.float32()), "list of float"),
        (pa.list_(pa.struct([("a", pa.int64())])), "list of struct"),
    ],
)
def test_types_are_named_as_in_the_documentation(kind: pa.DataType, name: str) -> None:
    assert columns.type_name(kind) == name


def test_nested_fields_are_found_by_path() -> None:
    found = columns.found_types(FACTORIES["behavior_sequences"]()[0])
    assert found["seq_click"] == "list of struct"
    assert found["seq_click.available_at"] == "timestamp"
    assert found["seq_purchase.event_price"] == "double"
    found = columns.found_types(FACTORIES["training_requests"]()[0])
    assert found["candidates.image"] == "list of float"
    assert found["candidates.image.element"] == "float"
    assert found["candidates.image.length"] == "int"


# Profiles


def test_a_profile_counts_missing_empty_and_not_finite_values() -> None:
    profile = profile_batch(
        pa.RecordBatch.from_pydict(
            {
                "text": ["a", "", None, "b"],
                "number": pa.array([1.5, None, np.nan, -np.inf]),
                "whole": pa.array([3, None, -7, 0], pa.int32()),
                "nothing": pa.array([None] * 4, pa.float64()),
            }
        )
    )
    assert profile["text"] == Profile(values=4, missing=2)
    assert profile["number"] == Profile(4, 1, 2, 1.5, 1.5)
    assert profile["whole"] == Profile(4, 1, 0, -7.0, 3.0)
    assert profile["nothing"] == Profile(4, 4)


def test_a_nested_profile_counts_the_elements_of_all_lists() -> None:
    kind = pa.list_(pa.struct([("price", pa.float64())]))
    lists = pa.array([[{"price": 1.0}, {"price": None}], None, [], [None, {"price": 4.0}]], kind)
    profile = profile_batch(pa.RecordBatch.from_pydict({"events": lists}))
    assert profile["events"] == Profile(values=4, missing=1)
    assert profile["events.price"] == Profile(4, 2, 0, 1.0, 4.0)


def test_a_vectors_profile_counts_its_numbers_and_its_lengths() -> None:
    kind = pa.list_(pa.float32())
    vectors = pa.array([[1.0, 2.0], None, [np.nan, None, 4.0]], kind)
    candidates = pa.array(
        [[{"image": [5.0]}], [], [{"image": None}, {"image": []}]], pa.list_(pa.struct([("image", kind)]))
    )
    profile = profile_batch(pa.RecordBatch.from_pydict({"image": vectors, "candidates": candidates}))
    assert profile["image"] == Profile(3, 1)
    assert profile["image.element"] == Profile(5, 1, 1, 1.0, 4.0)
    assert profile["image.length"] == Profile(2, 0, 0, 2.0, 3.0)
    assert profile["candidates.image"] == Profile(3, 1)
    assert profile["candidates.image.element"] == Profile(1, 0, 0, 5.0, 5.0)
    assert profile["candidates.image.length"] == Profile(2, 0, 0, 0.0, 1.0)


@pytest.mark.parametrize("table", FACTORIES)
@pytest.mark.parametrize("rows", [1, 5])
def test_profiles_of_the_parts_merge_to_the_profile_of_the_whole(table: str, rows: int) -> None:
    whole = batch(table)
    parts = [whole.slice(start, rows) for start in range(0, whole.num_rows, rows)]
    assert merge_profiles(map(profile_batch, parts)) == profile_batch(whole)


# Row views


@pytest.mark.parametrize("table", FACTORIES)
def test_a_view_reads_only_the_columns_it_names(table: str) -> None:
    schema = audit_schema()
    view = view_of(table, schema, MIDNIGHT)
    needed = needed_columns(table, schema)
    assert view(batch(table).select(needed)).equals(view(batch(table)))
    for left_out in needed:
        with pytest.raises(KeyError):
            view(batch(table).select([name for name in needed if name != left_out]))


@pytest.mark.parametrize("table", FACTORIES)
def test_views_of_the_parts_are_parts_of_the_view(table: str) -> None:
    view = view_of(table, audit_schema(), MIDNIGHT)
    whole = batch(table)
    parts = [view(whole.slice(start, 5)) for start in range(0, whole.num_rows, 5)]
    assert pa.Table.from_batches(parts).combine_chunks().equals(pa.Table.from_batches([view(whole)]))


@pytest.mark.parametrize("table", FACTORIES)
def test_an_empty_batch_has_an_empty_view_of_the_same_columns(table: str) -> None:
    view = view_of(table, audit_schema(), MIDNIGHT)
    empty = view(batch(table).slice(0, 0))
    assert empty.num_rows == 0
    assert empty.schema.equals(view(batch(table)).schema)


def test_sequences_are_counted_within_their_row_alone() -> None:
    kinds, rows = FACTORIES["training_requests"]()
    rows = rows[:4]
    early, late = NOON - 100 * SECOND, NOON - SECOND
    event = {"event_item": 1, "event_price": None}
    rows[0]["seq_click"] = [{"ts": late, **event}]
    rows[1]["seq_click"] = [{"ts": early, **event}, {"ts": late, **event}]  # earlier than row 0's last, yet in order
    rows[2]["seq_click"] = None
    rows[3]["seq_click"] = [{"ts": late, **event}, {"ts": early, **event}, {"ts": rows[3]["ts"], **event}]
    view = training_requests(pa.RecordBatch.from_pylist(rows, schema=kinds), ("seq_click",)).to_pydict()
    assert view["seq_click_length"] == [1, 2, 0, 3]
    assert view["seq_click_unordered"] == [0, 0, 0, 1]
    assert view["seq_click_not_before_request"] == [0, 0, 0, 1]


def test_an_item_in_two_requests_is_not_repeated() -> None:
    kinds, rows = FACTORIES["training_requests"]()
    rows = rows[:3]
    for candidate in rows[1]["candidates"]:
        candidate["item_id"] = "same"
    view = training_requests(pa.RecordBatch.from_pylist(rows, schema=kinds), ()).to_pydict()
    assert view["candidates_repeated"] == [0, 2, 0]


def test_an_event_known_at_the_settling_instant_is_not_settled() -> None:
    schema = audit_schema(features=(*audit_schema().features, Feature("kind", "event", "hashed", "type", hash_size=3)))
    kinds, rows = FACTORIES["behavior_sequences"]()
    rows = rows[2:3]  # three clicks, one second apart, the last one second before noon
    view = view_of("behavior_sequences", schema, NOON - SECOND)
    assert view(pa.RecordBatch.from_pylist(rows, schema=kinds))["seq_click_settled"].to_pylist() == [2]


# The site


def test_the_site_lies_beside_the_warehouse_unless_told() -> None:
    assert site.site_path(LakeSettings(warehouse="/data/lake"), AuditSettings()) == "file:///data/data_docs"
    assert site.site_path(LakeSettings(warehouse="s3://bucket/a/lake"), AuditSettings()) == "s3://bucket/a/data_docs"
    assert site.site_path(LakeSettings(warehouse="s3://bucket"), AuditSettings()) == "s3://bucket/data_docs"
    assert site.site_path(LakeSettings(), AuditSettings(data_docs="s3://docs/audit")) == "s3://docs/audit"


def test_a_page_is_linked_where_people_open_it():
    ds = date(2024, 2, 29)
    assert (
        site.page_address("file:///docs", "", "behaviors", ds) == "file:///docs/validations/behaviors/2024-02-29.html"
    )
    linked = site.page_address("s3://docs", "https://docs.example.com/", "behaviors", ds)
    assert linked == "https://docs.example.com/validations/behaviors/2024-02-29.html"


def test_the_index_shows_the_latest_days_newest_first(tmp_path: Path) -> None:
    for day in range(1, 32):
        for month in (1, 3):
            record = site.Record("behaviors", f"2024-{month:02d}-{day:02d}", "passed", 1000 * day, 0, 0)
            site.add_page(f"file://{tmp_path}", record, "<p>page</p>")
    record = site.Record("impressions", "2024-03-31", "failed", 5, 2, 1)
    site.add_page(f"file://{tmp_path}", record, "<p>page</p>")
    text = (tmp_path / "index.html").read_text()
    assert "2024-01-31" not in text
    assert text.index("2024-03-31") < text.index("2024-03-30") < text.index("2024-03-01")
    assert 'href="validations/impressions/2024-03-31.html"' in text
    assert "5 rows</span>, 2 critical, 1 warning" in " ".join(text.split())
    assert (tmp_path / "validations" / "behaviors" / "2024-01-31.html").is_file()
