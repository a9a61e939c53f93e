"""OneTrans against its padded reference at every step of the way: outputs and gradients, in both precisions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from onetrans.models import OneTransConfig, Scores, attention, embeddings, onetrans, ragged, rowwise
from onetrans.models.compute import Compute
from tests.batches import model_schema, random_batch, select_requests, shapes, vector_schema
from tests.padded_onetrans import PaddedOneTrans
from tests.trained_like import gradients, trained_like

SCHEMA = model_schema()
BASE = OneTransConfig(
    embedding_dim=4, hidden_dim=16, num_layers=3, num_heads=2, num_ns_tokens=3, max_seq_len=10, pyramid_multiple=2
)
STEPS = [
    pytest.param({}, id="reference"),
    pytest.param({"shared_user_side": True}, id="shared"),
    pytest.param({"shared_user_side": True, "kept_queries_only": True}, id="pyramid"),
]


@st.composite
def configs(draw):
    attention = draw(st.sampled_from(["causal", "full"]))
    merge = draw(st.sampled_from(["time_ordered", "intent_ordered"]))
    return replace(
        BASE,
        num_layers=draw(st.integers(1, 3)),
        tokenizer=draw(st.sampled_from(["auto_split", "group_wise"])),
        merge=merge,
        separators=merge == "intent_ordered" and draw(st.booleans()),
        ns_parameters=draw(st.sampled_from(["own", "shared"])),
        attention=attention,
        pyramid=(pyramid := draw(st.booleans())),
        first_block=draw(st.sampled_from(["all", "pruned"])) if pyramid else "all",
        top_block=draw(st.sampled_from(["ns_only", "s_tail"])),
        position=draw(st.sampled_from(["rotary_time", "rotary", "learned", "none"])),
        qk_norm=draw(st.booleans()),
        gated_attention=draw(st.booleans()),
        num_kv_heads=draw(st.sampled_from([0, 1])),
        sliding_window=draw(st.sampled_from([0, 1, 4])) if attention == "causal" else 0,
        relative_bias=draw(st.booleans()),
    )


def assert_agrees(model, reference, batch, relative):
    """Each score and each parameter's gradient differs by no more than rounding of what it is a sum of."""
    expected, got = reference(batch), model(batch)
    for task, a, b in zip(("ctr", "cvr"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=relative, atol=relative, msg=lambda m, t=task: f"{t} scores: {m}")
    mine, theirs = gradients(model, got), gradients(model, expected)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        # A bias at the end is a sum of terms of both signs, as large as the largest gradient is.
        allowed = relative * (float(gradient.abs().max()) + 0.1 * largest)
        difference = float((mine[name] - gradient).abs().max())
        assert difference <= allowed, f"gradient of {name} differs by {difference:.2e}, allowed are {allowed:.2e}"


@pytest.fixture(autouse=True)
def many_bands(monkeypatch):
    """Batches of a few requests would go through in one band."""
    monkeypatch.setitem(onetrans.BAND_CALLS, "cpu", 100.0)
    # And few events would not be searched for equal ones.
    monkeypatch.setattr(ragged, "_WORTH_COMPARING", 1)
    monkeypatch.setattr(ragged, "_FEW", 1.0)


@pytest.mark.parametrize("flags", STEPS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), config=configs())
def test_every_step_computes_the_same(flags, shape, config):
    candidates, events, seed = shape
    if not sum(candidates):
        return
    model = trained_like(config, SCHEMA, seed).double()
    assert_agrees(model, PaddedOneTrans(model, **flags), random_batch(SCHEMA, candidates, events, seed), 1e-9)


@pytest.mark.parametrize("flags", STEPS)
@pytest.mark.parametrize("tokenizer", ["auto_split", "group_wise"])
def test_every_step_computes_the_same_with_vectors(flags, tokenizer):
    schema = vector_schema()
    model = trained_like(replace(BASE, tokenizer=tokenizer), schema).double()
    assert_agrees(model, PaddedOneTrans(model, **flags), random_batch(schema, [3, 0, 11], [9, 2, 0]), 1e-9)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), config=configs())
def test_the_form_for_other_devices_computes_the_same(shape, config):
    """What runs on a GPU, here on a CPU: no function with a gradient of its own."""
    candidates, events, seed = shape
    if not sum(candidates):
        return
    model, batch = trained_like(config, SCHEMA, seed).double(), random_batch(SCHEMA, candidates, events, seed)
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, embeddings, onetrans, rowwise):
            patch.setattr(module, "written_out", lambda *_: False)
        assert_agrees(model, PaddedOneTrans(model), batch, 1e-9)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), config=configs(), window=st.sampled_from([1, 3, 4]))
def test_a_window_is_computed_in_parts_as_under_a_mask(shape, config, window):
    candidates, events, seed = shape
    if not sum(candidates):
        return
    model = trained_like(replace(config, attention="causal", sliding_window=window), SCHEMA, seed).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WINDOW_QUERIES", 2)
        assert_agrees(model, PaddedOneTrans(model), random_batch(SCHEMA, candidates, events, seed), 1e-9)


def test_a_window_hides_and_saves_what_lies_before_it():
    """Of 1,000 queries and keys, no call is given more keys than two windows hold."""
    config = replace(LONG, max_seq_len=1000, sliding_window=100)
    model, batch = trained_like(config, SCHEMA).double(), random_batch(SCHEMA, [2, 1], [1000, 350])
    seen = []

    def told(q, k, v, mask):
        seen.append((q.shape[1], k.shape[1]))
        return attend(q, k, v, mask)

    attend = attention.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend", told)
        model(batch)
    assert seen
    assert max(keys for _, keys in seen) <= 2 * 100
    assert_agrees(model, PaddedOneTrans(model), batch, 1e-9)


LONG = replace(BASE, num_layers=2, num_heads=1, max_seq_len=8192, pyramid_multiple=32, first_block="pruned")


@pytest.mark.parametrize("events", [0, 1, 2048, 8192])
def test_no_length_is_built_in(events):
    """Outputs and gradients; the reference holds the scores of 4,096 queries and 8,192 keys."""
    model, batch = trained_like(LONG, SCHEMA).double(), random_batch(SCHEMA, [2], [events])
    assert model.schedule == (4096, 0)
    assert_agrees(model, PaddedOneTrans(model, shared_user_side=True, kept_queries_only=True), batch, 1e-9)


def test_a_batch_mixes_none_one_2048_and_8192_events():
    """Each request scores as it does alone, and the gradients are those of the requests alone, added up."""
    model, batch = trained_like(LONG, SCHEMA).double(), random_batch(SCHEMA, [2, 1, 1, 3], [8192, 0, 1, 2048])
    alone = [model(select_requests(batch, [request])) for request in range(4)]
    apart = Scores(*(torch.cat(task) for task in zip(*alone, strict=True)))
    together = model(batch)
    torch.testing.assert_close(torch.stack(together), torch.stack(apart), rtol=1e-9, atol=1e-9)
    expected = gradients(model, apart)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in gradients(model, together).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9 * largest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("change", [{}, {"relative_bias": True, "num_kv_heads": 1}, {"top_block": "s_tail"}])
def test_a_gpu_computes_what_the_reference_does(change):
    model = trained_like(replace(BASE, **change), SCHEMA).double()
    batch = random_batch(SCHEMA, [3, 1, 0, 11], [9, 0, 4, 14])
    on_cpu = everything(model, model(batch))
    model, batch = model.to("cuda"), batch.to("cuda")
    assert_agrees(model, PaddedOneTrans(model), batch, 1e-9)
    for got, expected in zip(everything(model, model(batch)), on_cpu, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device has other kernels too")
def test_a_cpu_trains_with_one_fused_attention_kernel():
    """Neither flex_attention nor varlen_attn has a gradient there: once one has, it should be measured."""
    q_TMD, ends = torch.randn(8, 2, 8, requires_grad=True), torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(q_TMD[None], q_TMD[None], q_TMD[None])
    with pytest.raises(NotImplementedError, match="CPU"):
        varlen_attn(q_TMD, q_TMD, q_TMD, ends, ends, 5, 5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), config=configs())
def test_float32_agrees_to_1e_5(shape, config):
    candidates, events, seed = shape
    if not sum(candidates):
        return
    model = trained_like(config, SCHEMA, seed)
    assert_agrees(model, PaddedOneTrans(model), random_batch(SCHEMA, candidates, events, seed), 1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), config=configs())
def test_bfloat16_agrees_within_its_rounding(shape, config):
    """Model and reference in BF16 err by rounding alone: the model no more than the reference, within a margin."""
    candidates, events, seed = shape
    if not sum(candidates):
        return
    model, batch = trained_like(config, SCHEMA, seed), random_batch(SCHEMA, candidates, events, seed)
    exact = everything(model, model(batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, plain_scores = model(batch), PaddedOneTrans(model)(batch)
    for got, plain, true in zip(everything(model, scores), everything(model, plain_scores), exact, strict=True):
        # A score is a sum of terms of both signs, of the order of 0.1 together: it may be near 0, its rounding is not.
        rounding = 2.0**-8 * max(float(true.norm()), 0.1 * true.numel() ** 0.5)
        assert (got - true).norm() <= max(2 * (plain - true).norm(), 8 * rounding)
        assert (plain - true).norm() <= 32 * rounding


def everything(model, scores):
    """All scores, and all gradients, each as one vector."""
    found = gradients(model, scores).values()
    return torch.stack(scores).detach().flatten(), torch.cat([gradient.flatten() for gradient in found])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), config=configs())
def test_recomputation_changes_nothing(shape, config):
    candidates, events, seed = shape
    if not sum(candidates):
        return
    model, batch = trained_like(config, SCHEMA, seed), random_batch(SCHEMA, candidates, events, seed)
    kept, kept_gradients = model(batch), gradients(model, model(batch))
    model.use(Compute(recompute=True))
    assert torch.equal(torch.stack(model(batch)), torch.stack(kept))
    for name, gradient in gradients(model, model(batch)).items():
        assert torch.equal(gradient, kept_gradients[name]), name


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), config=configs())
def test_a_score_depends_on_nothing_beside_it(shape, config):
    """Alone with its request, each candidate scores as it does among other candidates and requests."""
    candidates, events, seed = shape
    if not sum(candidates):
        return
    model, batch = trained_like(config, SCHEMA, seed).double(), random_batch(SCHEMA, candidates, events, seed)
    with torch.no_grad():
        together = torch.stack(model(batch))
        for n, request in enumerate(batch.candidate_request_N.tolist()):
            first = int(batch.candidate_offsets_O[request])
            alone = only_candidate(select_requests(batch, [request]), n - first)
            torch.testing.assert_close(torch.stack(model(alone))[:, 0], together[:, n], rtol=1e-9, atol=1e-9)


def only_candidate(batch, n):
    """The one request of a batch, with its n-th candidate alone."""
    return replace(
        batch,
        item_NI=batch.item_NI[n : n + 1],
        candidate_offsets_O=torch.tensor([0, 1]),
        click_N=batch.click_N[n : n + 1],
        conversion_N=batch.conversion_N[n : n + 1],
    )
