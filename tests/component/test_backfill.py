"""Days backfilled in a row are trained as they would have been night by night, also with rows admitted and evicted."""

import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.checkpoint import Checkpoint
from onetrans.lake import Lake
from onetrans.plan import make_plan
from onetrans.train import InterruptedTrainingError, train
from tests.worlds import FIRST_DAY, World, publish_day, settings_in, small_schema

SCHEMA = small_schema()
WORLD = World(requests=40, users=300, items=300)
MODELS = ("onetrans", "dcnv2_din")
DAYS = [FIRST_DAY + timedelta(days=n) for n in range(4)]
USAGE = {"admit_after": 2, "evict_after_days": 1}


def trained(settings, ds, stop=None):
    """Plan and train a day; with ``stop`` set, interrupted after every step."""
    plan = make_plan(settings, ds, SCHEMA, track=False)
    for name in MODELS:
        while True:
            try:
                train(plan, name, settings, stop)
                break
            except InterruptedTrainingError:
                continue
    return plan


@pytest.fixture(scope="module")
def nights(tmp_path_factory):
    """Settings and the plans of three days, each published and trained before the next arrived."""
    settings = settings_in(tmp_path_factory.mktemp("nights"), **USAGE)
    lake, plans = Lake(settings.lake), []
    publish_day(lake, DAYS[0], SCHEMA, WORLD)
    for ds in DAYS[1:]:
        publish_day(lake, ds, SCHEMA, WORLD)
        plans.append(trained(settings, ds))
    return settings, plans


def state(plan, name):
    return Checkpoint.load(storage.join(plan.model_path(name), "checkpoint"))


def test_three_days_backfilled_in_a_row_equal_three_nights(nights, tmp_path):
    settings = settings_in(tmp_path, **USAGE)
    for ds in DAYS:
        publish_day(Lake(settings.lake), ds, SCHEMA, WORLD)
    stop = threading.Event()
    stop.set()
    for ds, night in zip(DAYS[1:], nights[1], strict=True):
        plan = trained(settings, ds, stop)
        assert (plan.train_days, plan.warm_start_ds, plan.decision) == (
            night.train_days,
            night.warm_start_ds,
            night.decision,
        )
        for name in MODELS:
            mine, theirs = state(plan, name), state(night, name)
            assert mine.step == theirs.step > 1
            assert mine.tensors.keys() == theirs.tensors.keys()
            assert all(torch.equal(mine.tensors[key], tensor) for key, tensor in theirs.tensors.items())
    assert plan.warm_start_ds == DAYS[2]


def test_rare_and_idle_rows_are_told_from_the_others_along_the_chain(nights):
    """By the counts in the saved model: a row not met since two days before begins again."""
    settings, plans = nights
    usage = load_model(storage.join(plans[-1].model_path("onetrans"), "model"))[0].embeddings.usage
    counts, used = usage.count("user"), usage.used("user")
    last = (DAYS[2] - FIRST_DAY.replace(year=1970, month=1, day=1)).days
    assert set(counts.unique().tolist()) == {0, 1, 2}
    # The last training read the day before the last; what it did not meet it evicted when idle for more than a day.
    assert int(used.max()) == last
    before = load_model(storage.join(plans[0].model_path("onetrans"), "model"))[0].embeddings.usage
    forgotten = (before.used("user") > 0) & (used == 0)
    assert int(forgotten.sum()) > 0
    assert not counts[forgotten].any()
    without = replace(settings, training=replace(settings.training, admit_after=0, evict_after_days=0))
    other = make_plan(without, DAYS[3], SCHEMA, track=False)
    assert "config: admit_after = 2, now 0" in other.decision
