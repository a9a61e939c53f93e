"""Both models against a plain reference, outputs and gradients, on random shapes and configurations."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onetrans.models import DCNv2DINConfig, OneTransConfig
from tests.batches import model_schema, random_batch, shapes, vector_schema
from tests.plain_models import plain_dcnv2_din, plain_onetrans
from tests.trained_like import gradients, trained_like

SCHEMA = model_schema()
ONETRANS = OneTransConfig(
    embedding_dim=4, hidden_dim=16, num_layers=3, num_heads=2, num_ns_tokens=3, max_seq_len=10, pyramid_multiple=2
)
BASELINE = DCNv2DINConfig(
    embedding_dim=4, max_seq_len=10, attention_hidden=(6, 5), cross_layers=2, cross_rank=0, mlp_hidden=(8, 7),
    head_hidden=6,
)  # fmt: skip


@st.composite
def onetrans_configs(draw):
    merge = draw(st.sampled_from(["time_ordered", "intent_ordered"]))
    pyramid = draw(st.booleans())
    attention = draw(st.sampled_from(["causal", "full"]))
    return replace(
        ONETRANS,
        num_layers=draw(st.integers(1, 3)),
        num_heads=4,
        tokenizer=draw(st.sampled_from(["auto_split", "group_wise"])),
        merge=merge,
        separators=merge == "intent_ordered" and draw(st.booleans()),
        ns_parameters=draw(st.sampled_from(["own", "shared"])),
        attention=attention,
        pyramid=pyramid,
        first_block=draw(st.sampled_from(["all", "pruned"])) if pyramid else "all",
        top_block=draw(st.sampled_from(["ns_only", "s_tail"])),
        position=draw(st.sampled_from(["rotary_time", "rotary", "learned", "none"])),
        qk_norm=draw(st.booleans()),
        gated_attention=draw(st.booleans()),
        num_kv_heads=draw(st.sampled_from([0, 1, 2])),
        sliding_window=draw(st.sampled_from([0, 1, 3])) if attention == "causal" else 0,
        relative_bias=draw(st.booleans()),
    )


@st.composite
def baseline_configs(draw):
    return replace(
        BASELINE,
        cross_rank=draw(st.sampled_from([0, 3])),
        event_rank=draw(st.sampled_from(["own", "merged"])),
        normalization=draw(st.sampled_from(["batch", "layer", "none"])),
    )


def assert_equal(model, batch, plain, relative):
    expected = plain(model, batch)
    got = model(batch)
    for task, a, b in zip(("ctr", "cvr"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=relative, atol=relative, msg=lambda m, t=task: f"{t} scores: {m}")
    got_gradients, expected_gradients = gradients(model, got), gradients(model, expected)
    for name, gradient in expected_gradients.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(
            got_gradients[name], gradient, rtol=relative, atol=relative * scale,
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), config=onetrans_configs())
def test_onetrans_equals_the_plain_reference(shape, config):
    candidates, events, seed = shape
    if not sum(candidates):
        return
    model = trained_like(config, SCHEMA, seed).double()
    assert_equal(model, random_batch(SCHEMA, candidates, events, seed), plain_onetrans, 1e-9)


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), config=baseline_configs())
def test_baseline_equals_the_plain_reference(shape, config):
    candidates, events, seed = shape
    if sum(candidates) < 2 and config.normalization == "batch":
        return
    if not sum(candidates):
        return
    model = trained_like(config, SCHEMA, seed).double()
    if config.normalization == "batch":
        model.eval()
    assert_equal(model, random_batch(SCHEMA, candidates, events, seed), plain_dcnv2_din, 1e-9)


@pytest.mark.parametrize(("position", "window"), [("rotary_time", 0), ("none", 100)])
def test_long_sequences_equal_the_plain_reference(position, window):
    """One event and 2,048: no length is built in."""
    config = replace(
        ONETRANS, num_layers=2, num_heads=2, max_seq_len=2048, pyramid_multiple=32, position=position,
        sliding_window=window,
    )  # fmt: skip
    model, batch = trained_like(config, SCHEMA).double(), random_batch(SCHEMA, [1, 1], [2048, 1])
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(model(batch)), torch.stack(plain_onetrans(model, batch)))


@settings(max_examples=10, deadline=None)
@given(shape=shapes(), tokenizer=st.sampled_from(["auto_split", "group_wise"]))
def test_vectors_take_an_embeddings_place_in_both_models(shape, tokenizer):
    candidates, events, seed = shape
    if not sum(candidates):
        return
    schema = vector_schema()
    batch = random_batch(schema, candidates, events, seed)
    for config, plain in ((replace(ONETRANS, tokenizer=tokenizer), plain_onetrans), (BASELINE, plain_dcnv2_din)):
        model = trained_like(config, schema, seed).double().eval()
        assert_equal(model, batch, plain, 1e-9)


@pytest.mark.parametrize(("config", "plain"), [(ONETRANS, plain_onetrans), (BASELINE, plain_dcnv2_din)])
def test_float32_agrees_to_1e_5(config, plain):
    model = trained_like(config, SCHEMA, 3).eval()
    assert_equal(model, random_batch(SCHEMA, [3, 1, 0, 11], [9, 0, 4, 14], seed=3), plain, 1e-5)
