"""The time of a step is told apart into its parts, each counted once."""

import time

import pytest
import torch

from onetrans.models import build_model, preset
from onetrans.step_profile import BACKWARD, EMBEDDING, LOADING, REST, StepProfile
from tests.batches import model_schema, random_batch

SCHEMA = model_schema()


def slow(items, seconds):
    for item in items:
        time.sleep(seconds)
        yield item


def test_what_lies_within_another_part_is_counted_there_alone():
    model = build_model(preset("onetrans", "tiny"), SCHEMA)
    profile = StepProfile(model, torch.device("cpu"))
    began = time.perf_counter()
    for _ in profile.steps_of(slow(range(3), 0.02)):
        time.sleep(0.01)
        with profile.part("outer"):
            time.sleep(0.01)
            with profile.part("inner"):
                time.sleep(0.03)
    taken = time.perf_counter() - began
    assert profile.steps == 3
    for name, seconds in ((LOADING, 0.06), (REST, 0.03), ("outer", 0.03), ("inner", 0.09)):
        assert profile.seconds[name] >= seconds
    assert sum(profile.seconds.values()) == pytest.approx(taken, rel=0.05)
    assert sum(profile.shares().values()) == pytest.approx(1.0)
    shares = list(profile.shares().values())
    assert shares == sorted(shares, reverse=True)  # a busy machine decides which is the largest
    assert profile.to_dict()["steps_measured"] == 3


@pytest.mark.parametrize(("name", "parts"), [("onetrans", {"S side", "NS side"}), ("dcnv2_din", {"interest pooling"})])
def test_the_parts_of_a_model_are_seen_and_its_scores_stay_the_same(name, parts):
    torch.manual_seed(0)
    model, batch = build_model(preset(name, "tiny"), SCHEMA).eval(), random_batch(SCHEMA, [4, 2], [9, 8])
    before = model(batch)
    profile = StepProfile(model, torch.device("cpu"))
    for each in profile.steps_of(iter([batch])):
        scores = model(each)
        with profile.part(BACKWARD):
            scores.ctr_logit_N.sum().backward()
    assert profile.seconds.keys() == {LOADING, REST, EMBEDDING, BACKWARD, *parts}
    assert all(seconds > 0 for seconds in profile.seconds.values())
    assert torch.equal(scores.ctr_logit_N, before.ctr_logit_N)
    outside = dict(profile.seconds)
    model(batch)  # scoring outside of a step is not measured
    assert profile.seconds == outside
