"""Requests as plain data: the same embedding rows as the stored ones, and refusals a caller understands."""

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import FIRST_DAY, World, small_schema, write_requests

from onetrans.batch import RequestBatch
from onetrans.errors import BadDataError
from onetrans.loader import batch_of
from onetrans.plain_batch import PlainBatches, UnusualError
from onetrans.requests import from_rows, to_batch, to_rows
from onetrans.schema import Feature, hash64

SCHEMA = small_schema()
REQUEST = {
    "request_id": "r1",
    "ts": 1_651_622_400_000_000,
    "user": {"user": "u1", "user_ctr": 0.3},
    "context": {"hour": "7"},
    "sequences": {
        "click": [{"ts": 1_651_622_300_000_000, "event_item": "i9", "event_author": None}],
        "purchase": [],
    },
    "candidates": [
        {"item_id": "i1", "item": "i1", "author": "a1", "item_ctr": 0.1},
        {"item_id": "i2", "item": "i2", "author": None, "item_ctr": None},
    ],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_requests(tmp_path_factory.mktemp("rows") / "part.parquet", FIRST_DAY, SCHEMA, World(requests=40))


@pytest.mark.parametrize(("max_seq_len", "vectors"), [(3, False), (64, False), (64, True)])
def test_stored_rows_survive_the_way_through_json_to_the_same_batch(rows, tmp_path, max_seq_len, vectors):
    schema = small_schema(vectors=vectors)
    if vectors:
        rows = write_requests(tmp_path / "part.parquet", FIRST_DAY, schema, World(requests=40))
    requests = json.loads(json.dumps(from_rows(rows, schema)))
    ours = to_batch(requests, schema, max_seq_len)
    theirs = batch_of(rows.combine_chunks().to_batches()[0], schema, max_seq_len)
    ours.check()
    for name in (f.name for f in fields(theirs)):
        if name.endswith("X") and not vectors:
            assert getattr(ours, name) is None
        elif name not in ("click_N", "conversion_N"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.click_N.sum() == 0, "a request has no outcome yet"
    assert "click" not in requests[0]["candidates"][0]


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**64), 2**64),
    st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=3),
    st.lists(st.one_of(st.integers(-3, 3), st.floats(width=32)), min_size=3, max_size=4),
    st.sampled_from([hash64("i1"), REQUEST["ts"] - 1, "2022-05-03T23:00:00Z", [], {}]),
)


@st.composite
def _requests(draw):
    """Return requests in which some values are replaced by others, fitting or not, taken away or added."""
    requests = [copy.deepcopy(REQUEST) for _ in range(draw(st.integers(1, 3)))]
    for request in requests:
        for candidate in request["candidates"]:
            candidate["image"] = draw(st.none() | st.lists(st.floats(-9, 9), min_size=4, max_size=4))
        seconds = draw(st.lists(st.integers(1, 5), max_size=20))  # equal times, in any order
        names = draw(st.lists(st.sampled_from(["click", "purchase"]), min_size=len(seconds), max_size=len(seconds)))
        for name, ago in zip(names, seconds, strict=True):
            event = {"ts": request["ts"] - ago, "event_item": f"i{ago}", "event_author": None}
            request["sequences"][name].append(event)
    for _ in range(draw(st.integers(0, 2))):
        part = draw(st.sampled_from(requests))
        while isinstance(part, dict | list) and part:
            key = draw(st.sampled_from(sorted(part))) if isinstance(part, dict) else draw(st.integers(0, len(part) - 1))
            if not isinstance(part[key], dict | list) or draw(st.integers(0, 9)) == 0:
                if draw(st.integers(0, 9)) == 0 and isinstance(part, dict):
                    del part[key]
                else:
                    part[key] = draw(_VALUES)
                break
            part = part[key]
    return requests


@settings(max_examples=400, deadline=None, derandomize=True)
@given(_requests())
def test_the_short_way_gives_the_batch_of_the_way_through_rows_or_leaves_it_to_that(requests):
    schema = replace(SCHEMA, features=(*SCHEMA.features, Feature("image", "item", "vector", "image", dim=4)))
    try:
        ours = PlainBatches(schema, 64)(requests)
    except UnusualError:
        return
    theirs = batch_of(to_rows(requests, schema), schema, 64)
    ours.check()
    for name in (f.name for f in fields(theirs)):
        ours_X, theirs_X = getattr(ours, name), getattr(theirs, name)
        assert (ours_X is None and theirs_X is None) or torch.equal(ours_X, theirs_X), name


def test_what_is_usual_takes_the_short_way(rows):
    requests = json.loads(json.dumps(from_rows(rows, SCHEMA)))
    assert PlainBatches(SCHEMA, 64)(requests).num_requests == 40
    with pytest.raises(UnusualError):
        PlainBatches(SCHEMA, 64)([_changed(("ts",), "2026-01-31T12:00:00Z")])


def test_batches_are_joined(rows):
    requests = from_rows(rows, SCHEMA)
    whole = to_batch(requests, SCHEMA, 64)
    joined = RequestBatch.join([to_batch(part, SCHEMA, 64) for part in (requests[:7], requests[7:8], requests[8:])])
    for name in (f.name for f in fields(whole)):
        ours_X, theirs_X = getattr(joined, name), getattr(whole, name)
        assert (ours_X is None and theirs_X is None) or torch.equal(ours_X, theirs_X), name


def test_text_and_its_stored_hash_are_the_same_value():
    stored = copy.deepcopy(REQUEST)
    stored["user"]["user"] = hash64("u1")
    stored["candidates"][0]["author"] = hash64("a1")
    ours, theirs = to_batch([REQUEST], SCHEMA, 64), to_batch([stored], SCHEMA, 64)
    assert torch.equal(ours.user_RU, theirs.user_RU)
    assert torch.equal(ours.item_NI, theirs.item_NI)
    assert ours.item_NI[1, 1:].tolist() == [0, 0], "null is row 0"


def test_a_sequence_keeps_its_latest_events_in_any_order_given():
    request = copy.deepcopy(REQUEST)
    times = [request["ts"] - 1_000_000 * back for back in (5, 1, *range(6, 20), 2)]
    request["sequences"]["click"] = [{"ts": ts, "event_item": str(ts), "event_author": "a"} for ts in times]
    batch = to_batch([request], SCHEMA, 64)
    assert batch.event_time_E.tolist() == sorted(times)[-12:]


def _changed(path, value):
    request = copy.deepcopy(REQUEST)
    *parents, last = path
    part = request
    for key in parents:
        part = part[key]
    if value is KeyError:
        del part[last]
    else:
        part[last] = value
    return request


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("user", "user_ctr"), KeyError, "request r1, user: feature 'user_ctr' is absent; write null"),
        (("user", "age"), 3, "request r1, user: 'age' is not known"),
        (("user", "user"), 1.5, "feature 'user' is 1.5, needed is text or a 64-bit hash"),
        (("user", "user"), 2**63, "needed is text or a 64-bit hash"),
        (("candidates", 0, "item_ctr"), "0.1", "candidate 0: feature 'item_ctr' is '0.1', needed is a number"),
        (("candidates", 1, "item_id"), 7, "item_id is 7, needed is text"),
        (("candidates",), [], "request r1 has no candidates"),
        (("sequences", "purchase"), KeyError, "sequence purchase is absent"),
        (("sequences", "cart"), [], "sequences: 'cart' is not known"),
        (("sequences", "click", 0, "ts"), "noon", "sequence click, event 0: ts is 'noon', needed are microseconds"),
        (("sequences", "click", 0, "ts"), REQUEST["ts"], "sequence click: an event has ts .*, which is not before"),
        (("ts",), KeyError, "ts is None"),
        (("ts",), REQUEST["ts"] // 10**6, "ts is 1651622400, needed are microseconds"),
        (("ts",), REQUEST["ts"] // 10**3, "seconds and milliseconds are refused"),
        (
            ("sequences", "click", 0, "ts"),
            REQUEST["ts"] // 10**6 - 9,
            "click, event 0: ts is 1651622391, needed are mic",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused(path, value, message):
    with pytest.raises(BadDataError, match=message):
        to_batch([_changed(path, value)], SCHEMA, 64)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2.5, 3], "request r1, candidate 1: feature 'image' has 3 numbers, needed is a list of 4 finite numbers"),
        ([1, None, 3, 4], "feature 'image' holds None, needed is a list of 4"),
        ([1, True, 3, 4], "feature 'image' holds True, needed"),
        ([1, "2", 3, 4], "feature 'image' holds '2', needed"),
        ([1, float("nan"), 3, 4], "feature 'image' holds nan, needed"),
        ([1, 1e39, 3, 4], r"feature 'image' holds 1e\+39, needed"),
        ("[1, 2, 3, 4]", r"feature 'image' is '\[1, 2, 3, 4\]', needed is a list"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(value, message):
    schema = replace(SCHEMA, features=(*SCHEMA.features, Feature("image", "item", "vector", "image", dim=4)))
    request = copy.deepcopy(REQUEST)
    for candidate in request["candidates"]:
        candidate["image"] = [3, 0.0, -4.0, 0]
    batch = to_batch([request], schema, 64)
    assert batch.item_vector_NX[0].tolist() == pytest.approx([1.2, 0.0, -1.6, 0.0])
    request["candidates"][1]["image"] = value
    with pytest.raises(BadDataError, match=message):
        to_batch([request], schema, 64)


def test_no_requests_are_refused():
    with pytest.raises(BadDataError, match="no requests"):
        to_batch([], SCHEMA, 64)
