"""The user's side kept between requests: cached = uncached, whatever happened to the history in between."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import model_schema, random_batch

from onetrans.batch import RequestBatch
from onetrans.models import OneTransConfig, build_model
from onetrans.serving.cache import ENTRY_BYTES, UserCache
from onetrans.serving.prefix import appendable, event_table, extend, join, longest_appendable, split

SCHEMA = model_schema()
CONFIG = OneTransConfig(
    embedding_dim=8, hidden_dim=32, num_layers=4, num_heads=2, num_ns_tokens=3, max_seq_len=24, pyramid_multiple=2
)
EXACT = [
    CONFIG,
    replace(CONFIG, position="rotary", qk_norm=True),
    replace(CONFIG, position="none", num_kv_heads=1),
    replace(CONFIG, relative_bias=True, position="none"),
    replace(CONFIG, sliding_window=4),
    replace(CONFIG, gated_attention=True, first_block="pruned"),
    replace(CONFIG, pyramid=False),
    replace(CONFIG, num_layers=1),
]


def _names(config):
    return ",".join(f"{k}={v}" for k, v in vars(config).items() if v != getattr(CONFIG, k)) or "default"


def _model(config):
    torch.manual_seed(0)
    model = build_model(config, SCHEMA).double().eval()
    for name, parameter in model.named_parameters():
        if "time_KH" in name:
            torch.nn.init.normal_(parameter)
    return model


def _first_events(batch: RequestBatch, lengths: list[int]) -> RequestBatch:
    """Return the batch as it was when each request had only its first events."""
    starts = batch.event_offsets_O[:-1]
    rows = torch.cat([torch.arange(start, start + n) for start, n in zip(starts.tolist(), lengths, strict=True)])
    return replace(
        batch,
        event_EV=batch.event_EV[rows],
        event_sequence_E=batch.event_sequence_E[rows],
        event_time_E=batch.event_time_E[rows],
        event_offsets_O=torch.tensor([0, *np.cumsum(lengths)]),
    )


@pytest.mark.parametrize("config", EXACT, ids=_names)
def test_appended_events_give_the_scores_of_encoding_all(config):
    model = _model(config)
    limit = longest_appendable(config)
    assert limit > 4
    now = [limit, limit - 1, 3, 2]
    before = [limit - 2, limit - 2, 1, 1]
    batch = random_batch(SCHEMA, [3, 1, 4, 2], now, seed=5)
    old = _first_events(batch, before)
    table = event_table(batch)
    with torch.inference_mode():
        kept = split(model.encode_requests(old), event_table(old), old.event_offsets_O)
        for number, user in enumerate(kept):
            own = table[batch.event_offsets_O[number] : batch.event_offsets_O[number + 1]]
            assert appendable(config, user.events_EW, own) == before[number]
        state = join(extend(model, kept, batch, table))
        cached = model.score_candidates(batch, state)
        whole = model(batch)
    for ours, theirs in zip(cached, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "config",
    [
        *EXACT,
        replace(CONFIG, position="learned"),
        replace(CONFIG, attention="full"),
        replace(CONFIG, merge="intent_ordered"),
        replace(CONFIG, top_block="s_tail"),
    ],
    ids=_names,
)
def test_what_is_kept_of_equal_events_gives_the_same_scores(config):
    model = _model(config)
    batch = random_batch(SCHEMA, [3, 1, 4, 2], [9, 24, 0, 3], seed=6)
    with torch.inference_mode():
        kept = split(model.encode_requests(batch), event_table(batch), batch.event_offsets_O)
        order = [3, 0, 2, 1, 0]
        again = batch.select(torch.tensor(order))
        cached = model.score_candidates(again, join([kept[request] for request in order]))
        whole = model(again)
    for ours, theirs in zip(cached, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_an_append_that_would_not_be_exact_is_refused():
    """The rule is needed: where it refuses, the older keys do change."""
    model = _model(CONFIG)
    limit = longest_appendable(CONFIG)
    assert limit < CONFIG.max_seq_len, "the pyramid is what binds here"
    batch = random_batch(SCHEMA, [2], [limit + 1], seed=7)
    old = _first_events(batch, [limit])
    with torch.inference_mode():
        before = split(model.encode_requests(old), event_table(old), old.event_offsets_O)[0]
        after = split(model.encode_requests(batch), event_table(batch), batch.event_offsets_O)[0]
    assert not appendable(CONFIG, before.events_EW, after.events_EW)
    top = len(before.keys_LHD) - 1
    common = min(before.keys_LHD[top].shape[0], after.keys_LHD[top].shape[0]) - 1
    assert (before.keys_LHD[top][-common:] - after.keys_LHD[top][-common - 1 : -1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, position="learned"),
        replace(CONFIG, attention="full"),
        replace(CONFIG, merge="intent_ordered"),
        replace(CONFIG, top_block="s_tail"),
    ],
    ids=_names,
)
def test_some_models_are_never_appended_to(config):
    assert longest_appendable(config) == 0


def test_only_a_prefix_is_appended_to():
    events = torch.arange(40).reshape(10, 4)
    assert appendable(CONFIG, events[:6], events[:8]) == 6
    assert not appendable(CONFIG, events[1:6], events[:8]), "the oldest was pushed out, or another came in before"
    changed = events[:6].clone()
    changed[2, 3] += 1
    assert not appendable(CONFIG, changed, events[:8])
    assert not appendable(CONFIG, events[:6], events[:6])
    assert not appendable(CONFIG, events[:0], events[:6])
    small = replace(CONFIG, num_layers=2, max_seq_len=9)
    assert not appendable(small, events[:9], events[:10]), "truncated"


def _state(events: int):
    model = _model(CONFIG)
    batch = random_batch(SCHEMA, [1], [events], seed=events)
    with torch.inference_mode():
        return split(model.encode_requests(batch), event_table(batch), batch.event_offsets_O)[0]


def test_the_cache_is_bounded_and_drops_the_least_recently_used():
    state = _state(8)
    size = state.nbytes + ENTRY_BYTES
    cache = UserCache(3 * size)
    for user in "abc":
        cache.put(user, state)
    assert cache.get("a") is state
    cache.put("d", state)
    assert cache.get("b") is None
    assert all(cache.get(user) is state for user in "acd")
    assert cache.bytes == 3 * size == cache.max_bytes
    assert cache.counts.evicted == 1
    cache.put("a", _state(2))
    assert len(cache) == 3
    assert cache.bytes < 3 * size, "a user is counted once"
    cache.put("e", _state(24))
    assert cache.bytes <= cache.max_bytes
    UserCache(10).put("x", state)
    assert UserCache(0).get("x") is None


def test_a_kept_state_holds_no_memory_of_its_batch():
    model = _model(CONFIG)
    batch = random_batch(SCHEMA, [1] * 4, [20] * 4)
    with torch.inference_mode():
        for state in split(model.encode_requests(batch), event_table(batch), batch.event_offsets_O):
            user = state.kept(None)
            for tensor in (user.events_EW, *user.keys_LHD, *user.values_LHD, *user.times_L):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
