"""The search's draws: what is in force comes first, every other draw is a legal model unlike those before it."""

import pytest

from benchmarks.search import draws
from onetrans.models import build_model
from onetrans.plan import preset_models
from tests.batches import model_schema


@pytest.mark.parametrize("name", ["onetrans", "dcnv2_din"])
def test_every_draw_is_a_model_of_its_own_and_comes_again(name: str) -> None:
    start = preset_models("tiny")[name]
    found = list(draws(start.config, start.optimizer, 12, seed=3))
    assert found == list(draws(start.config, start.optimizer, 12, seed=3))
    assert found != list(draws(start.config, start.optimizer, 12, seed=4))
    assert found[0] == ({}, start.config, start.optimizer)
    for number, (changed, config, optimizer) in enumerate(found[1:], 1):
        assert (config, optimizer) not in [(c, o) for _, c, o in found[:number]]
        build_model(config, model_schema())
        for field, value in changed.items():
            now, before = (config, start.config) if hasattr(config, field) else (optimizer, start.optimizer)
            assert getattr(now, field) == value != getattr(before, field)
