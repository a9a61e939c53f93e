"""Requests as plain data: the same embedding rows as the stored ones, and refusals a caller understands."""

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
from worlds import FIRST_DAY, World, small_schema, write_requests

from onetrans.errors import BadDataError
from onetrans.loader import batch_of
from onetrans.requests import from_rows, to_batch
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
        (("sequences", "click", 0, "ts"), REQUEST["ts"], "events are not before their request"),
        (("ts",), KeyError, "ts is None"),
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
