"""The model packed for scoring gives the scores of the model's own forward pass; some models cannot be packed."""

from dataclasses import replace

import pytest
import torch
from batches import model_schema, random_batch

from onetrans.models import OneTransConfig, build_model
from onetrans.models.ragged import latest_events
from onetrans.serving.packed import PackedOneTrans, packable
from onetrans.serving.prefix import event_table, extend

SCHEMA = model_schema()
CONFIG = OneTransConfig(
    embedding_dim=8, hidden_dim=32, num_layers=4, num_heads=2, num_ns_tokens=3, max_seq_len=24, pyramid_multiple=2
)
PACKABLE = [
    CONFIG,
    replace(CONFIG, position="rotary", qk_norm=True),
    replace(CONFIG, position="none"),
    replace(CONFIG, gated_attention=True, qk_norm=True, first_block="pruned"),
    replace(CONFIG, pyramid=False),
    replace(CONFIG, num_layers=1),
    replace(CONFIG, attention="full"),
]
CANDIDATES, EVENTS = [3, 1, 4, 2], [9, 24, 0, 40]
ROUNDING = 2e-6


def _names(config):
    return ",".join(f"{k}={v}" for k, v in vars(config).items() if v != getattr(CONFIG, k)) or "default"


def _model(config):
    """Return a model whose gains and biases are not what they are at the start, where forgetting them is not seen."""
    torch.manual_seed(0)
    model = build_model(config, SCHEMA).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _batch(candidates, events, limit):
    return latest_events(random_batch(SCHEMA, candidates, events, seed=6), limit)


def _packed_scores(packed, batch):
    return packed.score(batch, packed.encode(batch, event_table(batch)))


@pytest.mark.parametrize("config", PACKABLE, ids=_names)
@torch.inference_mode()
def test_scores_are_those_of_the_model(config):
    model = _model(config)
    assert packable(model)
    batch = _batch(CANDIDATES, EVENTS, config.max_seq_len)
    whole = model(batch)
    packed = PackedOneTrans(model, "float32")
    for ours, theirs, again in zip(_packed_scores(packed, batch), whole, model(batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
        assert torch.equal(again, theirs), "packing leaves the model as it was"
    for request in range(len(CANDIDATES)):
        alone = batch.select(torch.tensor([request]))
        own = batch.candidate_request_N == request
        for ours, theirs in zip(_packed_scores(packed, alone), whole, strict=True):
            torch.testing.assert_close(ours, theirs[own], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("config", PACKABLE, ids=_names)
@torch.inference_mode()
def test_stage_one_gives_the_keys_of_the_model(config):
    """So events may be appended to either's."""
    model = _model(config)
    batch = _batch(CANDIDATES, EVENTS, config.max_seq_len)
    table = event_table(batch)
    of_model = model.encode_requests(batch)
    for request, state in enumerate(PackedOneTrans(model, "float32").encode(batch, table)):
        for number, (block, layout) in enumerate(zip(of_model.blocks, of_model.layouts, strict=True)):
            own = layout.request_T == request
            torch.testing.assert_close(state.keys_LHD[number], block.k_THD[own], rtol=0, atol=ROUNDING)
            torch.testing.assert_close(state.values_LHD[number], block.v_THD[own], rtol=0, atol=ROUNDING)
            assert torch.equal(state.times_L[number], of_model.times[number][own])


@torch.inference_mode()
def test_events_are_appended_to_packed_states():
    model = _model(CONFIG)
    batch = _batch([2], [8], CONFIG.max_seq_len)
    before = replace(
        batch,
        event_EV=batch.event_EV[:6],
        event_sequence_E=batch.event_sequence_E[:6],
        event_time_E=batch.event_time_E[:6],
        event_offsets_O=torch.tensor([0, 6]),
    )
    packed = PackedOneTrans(model, "float32")
    states = extend(model, packed.encode(before, event_table(before)), batch, event_table(batch))
    for ours, theirs in zip(packed.score(batch, states), model(batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@torch.inference_mode()
def test_bfloat16_scores_nearly_the_same():
    model = _model(replace(CONFIG, gated_attention=True))
    batch = _batch(CANDIDATES, EVENTS, CONFIG.max_seq_len)
    for ours, theirs in zip(_packed_scores(PackedOneTrans(model, "bfloat16"), batch), model(batch), strict=True):
        assert 0 < (ours - theirs).abs().max() < 0.02
        assert ours.dtype is torch.float32


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, position="learned"),
        replace(CONFIG, merge="intent_ordered"),
        replace(CONFIG, top_block="s_tail"),
        replace(CONFIG, num_kv_heads=1),
        replace(CONFIG, sliding_window=4),
        replace(CONFIG, relative_bias=True, position="none"),
        replace(CONFIG, ns_parameters="shared"),
        replace(CONFIG, tokenizer="group_wise", num_ns_tokens=4),
    ],
    ids=_names,
)
def test_some_models_are_scored_by_their_own_forward_pass(config):
    assert not packable(_model(config))
