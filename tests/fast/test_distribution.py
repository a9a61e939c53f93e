"""Counts per bin and the population stability index: missing values, hashes, samples of any size, what chance makes."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from expectations.distribution import CLASSES, Bins, bins_of, count, rate, shift
from expectations.profile import Profile, profile_batch
from onetrans.schema import hash64
from tests.audit_tables import audit_schema


def test_numbers_fall_into_the_buckets_the_model_sees() -> None:
    bins = Bins((1.0, 5.0))
    values = pa.array([None, math.nan, 0.5, 1.0, 4.9, 5.0, math.inf, -math.inf])
    assert count(values, bins).tolist() == [2, 2, 2, 2], "missing; below 1; from 1 to 5; from 5"
    prices = np.array([0.5, 1.0, 5.0])
    assert audit_schema().feature("price").encode(prices).tolist() == [1, 2, 3], "the same buckets"


def test_texts_and_their_hashes_fall_into_the_same_classes() -> None:
    texts = ["home", "search", "", None, "home"]
    hashes = [hash64(text) if text else None for text in texts]
    of_texts = count(pa.array(texts), Bins())
    assert of_texts.tolist() == count(pa.array(hashes), Bins()).tolist()
    assert of_texts.shape == (CLASSES + 1,)
    assert of_texts[0] == 2
    assert of_texts[hash64("home") % CLASSES + 1] >= 2
    assert count(pa.array([], pa.string()), Bins()).sum() == 0


def test_the_index_is_that_of_the_textbook_up_to_its_smoothing() -> None:
    today, before = np.array([1000, 3000, 6000]), np.array([2000, 3000, 5000])
    index, _ = shift(today, before)
    textbook = sum((p - q) * math.log(p / q) for p, q in ((0.1, 0.2), (0.3, 0.3), (0.6, 0.5)))
    assert index == pytest.approx(textbook, rel=1e-3)
    assert shift(before, today)[0] == pytest.approx(index, rel=1e-9)
    assert shift(before, before) == (0.0, shift(before, before)[1])
    assert shift(np.array([0, 5]), np.array([0, 9])) == (0.0, 0.0), "one bin tells nothing"
    assert shift(np.array([0, 0]), np.array([3, 9])) == (0.0, 0.0), "nor does an empty day"


@pytest.mark.parametrize("values", [30, 1000])
def test_chance_alone_stays_within_what_is_allowed_for_it(values: int) -> None:
    draw = np.random.default_rng(3)
    shares = draw.dirichlet(np.ones(20))
    beyond = 0
    for _ in range(300):
        today, before = draw.multinomial(values, shares), draw.multinomial(7 * values, shares)
        index, chance = shift(today, before)
        beyond += index > chance
    assert beyond <= 6, "two in a hundred"


def test_what_is_watched() -> None:
    schema = audit_schema()
    assert set(bins_of("impressions", schema)) == {"surface", "click", "conversion"}
    assert set(bins_of("behaviors", schema)) == {"price", "type"}
    assert set(bins_of("user_features", schema)) == {"segment", "user_ctr_7d"}
    assert set(bins_of("item_features", schema)) == {"author_id", "price"}, "no id, and no vector"
    assert bins_of("behavior_sequences", schema) == {}, "its events are those of behaviors"
    requests = bins_of("training_requests", schema)
    items = {f"candidates.{name}" for name in ("author", "price", "click", "conversion")}
    assert set(requests) == {"segment", "user_ctr", "surface", *items}
    assert requests["user_ctr"].computed
    assert requests["candidates.click"].label
    assert not requests["candidates.price"].computed


def test_counts_of_parts_add_up_and_travel_as_numbers() -> None:
    batch = pa.RecordBatch.from_pydict({"price": pa.array([0.5, 2.0, None, 9.0, 9.0])})
    watched = {"price": Bins((1.0, 5.0))}
    whole = profile_batch(batch, watched)["price"]
    assert whole.bins == (1, 1, 1, 2)
    parts = [profile_batch(batch.slice(start, 2), watched)["price"] for start in (0, 2, 4)]
    merged = Profile().merge(parts[0]).merge(parts[1]).merge(parts[2])
    assert merged == whole == Profile.from_list([float(number) for number in whole.to_list()])


def test_a_rate_leaves_missing_labels_out() -> None:
    assert rate({"click": (5, 30, 10)}, "click") == 0.25
    assert rate({"click": (5, 0, 0)}, "click") is None
    assert rate({}, "click") is None
