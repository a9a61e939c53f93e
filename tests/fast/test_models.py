"""What both models promise whatever their weights: independence, masks, parameters per position, and learning."""

import bisect
import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from onetrans.models import DCNv2DINConfig, OneTransConfig, build_model, preset, ragged
from onetrans.models import onetrans as onetrans_module
from onetrans.models.attention import Rotation
from onetrans.models.onetrans import MixedLinear
from onetrans.models.ragged import Distinct, Groups, Layout, bands, latest_events
from onetrans.models.relative_bias import (
    RANK_BUCKETS,
    TIME_BUCKETS,
    Distances,
    RelativeBias,
    bucket_starts,
)
from onetrans.optim import build_optimizers
from onetrans.optim_config import optimizer_preset
from tests.batches import model_schema, random_batch, select_requests, vector_schema
from tests.trained_like import trained_like

SCHEMA = model_schema()
ONETRANS = replace(preset("onetrans", "tiny"), max_seq_len=12, pyramid_multiple=4, num_layers=3)
BEYOND = replace(
    ONETRANS, position="none", relative_bias=True, gated_attention=True, num_kv_heads=1, sliding_window=3
)  # fmt: skip
BASELINE = preset("dcnv2_din", "tiny")
CONFIGS = [
    pytest.param(ONETRANS, id="onetrans"),
    pytest.param(replace(ONETRANS, merge="intent_ordered", separators=True, top_block="s_tail"), id="onetrans-intent"),
    pytest.param(replace(ONETRANS, tokenizer="group_wise", attention="full", position="learned"), id="onetrans-full"),
    pytest.param(BEYOND, id="onetrans-beyond"),
    pytest.param(BASELINE, id="dcnv2_din"),
]


def scoring(config):
    return trained_like(config, SCHEMA).eval()


def scores(model, batch):
    with torch.no_grad():
        return torch.stack(model(batch))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_request_scores_the_same_alone_and_in_any_company(config):
    model, batch = scoring(config), random_batch(SCHEMA, [3, 1, 0, 11, 2], [9, 0, 4, 30, 1], seed=1)
    together = scores(model, batch)
    order = [3, 0, 4, 1]
    reordered = scores(model, select_requests(batch, order))
    starts = batch.candidate_offsets_O.tolist()
    expected = torch.cat([together[:, starts[r] : starts[r + 1]] for r in order], dim=1)
    torch.testing.assert_close(reordered, expected, rtol=1e-5, atol=1e-5)
    alone = scores(model, select_requests(batch, [3]))
    torch.testing.assert_close(alone, together[:, starts[3] : starts[4]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_candidate_does_not_see_the_others(config):
    model, batch = scoring(config), random_batch(SCHEMA, [6, 2], [9, 3], seed=2)
    before = scores(model, batch)
    item_NI = batch.item_NI.clone()
    item_NI[2] = torch.tensor([17, 3, 1])
    after = scores(model, replace(batch, item_NI=item_NI))
    others = [n for n in range(8) if n != 2]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=1e-6)
    assert (after[:, 2] - before[:, 2]).abs().min() > 1e-3


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("what", ["user_RU", "context_RK", "event_EV", "event_time_E", "event_sequence_E"])
def test_every_input_matters_to_its_own_request_alone(config, what):
    if what == "event_time_E" and getattr(config, "position", "rotary_time") == "learned":
        pytest.skip("this position encoding does not read times")
    model, batch = scoring(config), random_batch(SCHEMA, [2, 3], [4, 6], seed=4)
    before = scores(model, batch)
    values = getattr(batch, what).clone()
    of_second = slice(4, None) if what.startswith("event") else slice(1, None)
    if what == "event_time_E":
        values[of_second] -= 86_400_000_000
    elif what == "event_sequence_E":
        values[of_second] = (values[of_second] + 1) % len(SCHEMA.sequences)
    else:
        values[of_second] = (values[of_second] + 1) % 3
    after = scores(model, replace(batch, **{what: values}))
    torch.testing.assert_close(after[:, :2], before[:, :2], rtol=0, atol=1e-6)
    assert (after[:, 2:] - before[:, 2:]).abs().max() > 1e-4


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("candidates", "events"), [([], []), ([0], [5]), ([2, 1], [0, 0]), ([1], [1]), ([1, 1, 1], [0, 200, 0])]
)
def test_rare_shapes_give_finite_scores_and_gradients(config, candidates, events):
    model = trained_like(config, SCHEMA)
    ctr, cvr = model(random_batch(SCHEMA, candidates, events))
    assert ctr.shape == cvr.shape == (sum(candidates),)
    assert ctr.dtype == cvr.dtype == torch.float32
    (ctr.sum() + cvr.sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad.to_dense()).all(), name


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_s_never_sees_ns(config):
    """Stage I is bitwise the same whatever user, context and candidates are, and stage II reads no events."""
    model, batch = scoring(config), random_batch(SCHEMA, [3, 2], [9, 4], seed=5)
    other = random_batch(SCHEMA, [1, 4], [9, 4], seed=6)
    swapped = replace(
        batch, user_RU=other.user_RU, context_RK=other.context_RK, item_NI=other.item_NI,
        candidate_offsets_O=other.candidate_offsets_O,
    )  # fmt: skip
    state, same = model.encode_requests(batch), model.encode_requests(swapped)
    for a, b in zip(state.blocks, same.blocks, strict=True):
        assert torch.equal(a.k_THD, b.k_THD)
        assert torch.equal(a.v_THD, b.v_THD)
    no_events = replace(
        batch, event_EV=batch.event_EV[:0], event_sequence_E=batch.event_sequence_E[:0],
        event_time_E=batch.event_time_E[:0], event_offsets_O=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
    assert torch.equal(torch.stack(model.score_candidates(no_events, state)), torch.stack(model(batch)))


@pytest.mark.parametrize("config", [ONETRANS, BEYOND, replace(ONETRANS, relative_bias=True)])
def test_later_events_do_not_change_earlier_keys(config):
    """Append-stable: all blocks' keys of a request's first events stay when more events follow, unless pruned."""
    config = replace(config, pyramid=False)
    model, batch = scoring(config), random_batch(SCHEMA, [1], [9], seed=7)
    shorter = replace(
        batch, event_EV=batch.event_EV[:6], event_sequence_E=batch.event_sequence_E[:6],
        event_time_E=batch.event_time_E[:6], event_offsets_O=torch.tensor([0, 6]),
        request_time_R=batch.request_time_R - 3_600_000_000,
    )  # fmt: skip
    for long, short in zip(model.encode_requests(batch).blocks, model.encode_requests(shorter).blocks, strict=True):
        torch.testing.assert_close(long.k_THD[:6], short.k_THD, rtol=0, atol=1e-5)
        torch.testing.assert_close(long.v_THD[:6], short.v_THD, rtol=0, atol=1e-5)


def test_causal_s_tokens_do_not_see_later_ones():
    config = replace(ONETRANS, pyramid=False)
    model, batch = scoring(config), random_batch(SCHEMA, [1], [9], seed=8)
    event_EV = batch.event_EV.clone()
    event_EV[6:] = 1
    before, after = (
        model.encode_requests(batch).blocks[-1],
        model.encode_requests(replace(batch, event_EV=event_EV)).blocks[-1],
    )
    torch.testing.assert_close(before.k_THD[:6], after.k_THD[:6], rtol=0, atol=1e-6)
    assert (before.k_THD[6:] - after.k_THD[6:]).abs().max() > 1e-3


def test_pyramid_keeps_the_most_recent_tail():
    model = scoring(replace(ONETRANS, max_seq_len=16, num_layers=3))
    assert model.schedule == (16, 12, 0)  # 16, (16 + 4) / 2 rounded up to a multiple of 4, none
    state = model.encode_requests(random_batch(SCHEMA, [1, 1, 1], [16, 3, 14], seed=9))
    assert [layout.lengths_R.tolist() for layout in state.layouts] == [[16, 3, 14], [16, 3, 14], [12, 3, 12]]
    assert [block.k_THD.shape[0] for block in state.blocks] == [33, 33, 27]


def test_each_ns_position_has_its_own_parameters():
    linear = MixedLinear(ONETRANS, 32, 5, for_s=True)
    x_PNI = torch.randn(ONETRANS.num_ns_tokens, 7, 32)
    before = linear.ns(x_PNI)
    with torch.no_grad():
        linear.weight_ns[2].zero_()
    after = linear.ns(x_PNI)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, False, True, False]
    own = build_model(ONETRANS, SCHEMA)
    for block in own.blocks:
        for name in ("query", "key_value", "out", "ffn_in", "ffn_out"):
            assert getattr(block, name).weight_ns.shape[0] == ONETRANS.num_ns_tokens
    shared = build_model(replace(ONETRANS, ns_parameters="shared"), SCHEMA)
    assert not [name for name, _ in shared.named_parameters() if name.endswith("weight_ns")]


def test_top_block_without_s_queries_has_no_parameters_for_them():
    top = build_model(ONETRANS, SCHEMA).blocks[-1]
    with_weights = {name for name, p in top.named_parameters() if name.endswith("weight_s") and p is not None}
    assert with_weights == {"key_value.weight_s"}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_gets_a_gradient(config):
    model = trained_like(config, SCHEMA)
    ctr, cvr = model(random_batch(SCHEMA, [4, 3], [12, 9]))
    (ctr.sum() + cvr.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_rotation_depends_on_distance_alone_also_at_epoch_seconds():
    """A score between two tokens is the same when both move by the same number of events and seconds."""
    q, k = torch.randn(1, 2, 16), torch.randn(1, 2, 16)

    def score(index, time_us):
        moved = [
            Rotation.of("rotary_time", 2, 16, torch.tensor([i]), torch.tensor([t]), torch.float32)
            for i, t in ((index + 7, time_us + 90_000_000), (index, time_us))
        ]
        return (moved[0](q) * moved[1](k)).sum(-1)

    base = score(0, 0)
    torch.testing.assert_close(score(500, 1_650_000_000_000_000), base, rtol=0, atol=1e-5)
    assert (score(0, 0) - (q * k).sum(-1)).abs().min() > 1e-2


def test_relative_bias_buckets_are_half_doublings():
    for buckets in (RANK_BUCKETS, TIME_BUCKETS):
        starts = bucket_starts(buckets)
        assert len(starts) == buckets - 1
        for x in (1, 2, 3, 4, 5, 6, 7, 8, 100, 8192, 86_400, 10**9):
            expected = min(1 + math.floor(2 * math.log2(x)), buckets - 1)
            assert bisect.bisect_right(starts, x) == expected


def test_relative_bias_starts_as_a_power_of_the_distance():
    """The latest event weighs what the NS-tokens do; each doubling of the distance costs head h 2 * 2^-h."""
    bias = RelativeBias(heads=3)
    layout, groups = Layout.of(torch.tensor([8])), Groups.of(torch.tensor([0, 1]), lambda size: size)
    time_T = torch.arange(8) * 60_000_000
    start_HY = bias(Distances.of_candidates(layout, groups, time_T, torch.tensor([10**12]), positions=2))[0, :, 0]
    for head, slope in enumerate((1.0, 0.5, 0.25)):
        at = {steps: start_HY[head, 8 - steps].item() / slope for steps in (1, 2, 4, 8)}
        assert at == {1: 0.0, 2: -2.0, 4: -4.0, 8: -6.0}
        assert start_HY[head, 8:].tolist() == [0.0, 0.0]


def test_sliding_window_hides_what_is_further_back_from_s_tokens():
    config = replace(ONETRANS, pyramid=False, num_layers=2, sliding_window=3)
    model, batch = scoring(config), random_batch(SCHEMA, [1], [9], seed=8)
    event_EV = batch.event_EV.clone()
    event_EV[2] = (event_EV[2] + 1) % 3
    before, after = (model.encode_requests(b).blocks[-1] for b in (batch, replace(batch, event_EV=event_EV)))
    changed = (before.k_THD - after.k_THD).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [False, False, True, True, True, False, False, False, False]


def test_grouped_queries_compute_and_keep_fewer_keys():
    model = scoring(replace(ONETRANS, num_kv_heads=1))
    state = model.encode_requests(random_batch(SCHEMA, [1], [9]))
    assert {cache.k_THD.shape[1] for cache in state.blocks} == {cache.v_THD.shape[1] for cache in state.blocks} == {1}
    assert model.blocks[0].key_value.weight_s.shape == (2 * 16, 32)
    assert model.blocks[0].key_value.weight_ns.shape == (4, 32, 2 * 16)


def test_each_ns_position_has_its_own_gate():
    gate = build_model(replace(ONETRANS, gated_attention=True), SCHEMA).blocks[0].gate
    assert gate.weight_s.shape == (32, 32)
    assert gate.weight_ns.shape == (4, 32, 32)


SWITCHES = {
    "tokenizer": {"tokenizer": "group_wise"},
    "merge": {"merge": "intent_ordered"},
    "[SEP]": {"merge": "intent_ordered", "separators": True},
    "parameters": {"ns_parameters": "shared"},
    "attention": {"attention": "full"},
    "no pyramid": {"pyramid": False},
    "first block": {"first_block": "pruned"},
    "top block": {"top_block": "s_tail"},
    "rotary": {"position": "rotary"},
    "learned": {"position": "learned"},
    "none": {"position": "none"},
    "qk_norm": {"qk_norm": False},
    "gate": {"gated_attention": True},
    "grouped queries": {"num_kv_heads": 1},
    "window": {"sliding_window": 3},
    "bias": {"relative_bias": True},
}


def test_every_switch_gives_another_model():
    """No field is read and ignored: from one seed, scores differ for every switch, and between any two."""
    batch = random_batch(SCHEMA, [3, 2], [12, 9], seed=12)
    found = {name: scores(scoring(replace(ONETRANS, **change)), batch) for name, change in SWITCHES.items()}
    found["default"] = scores(scoring(ONETRANS), batch)
    for one, other in itertools.combinations(found, 2):
        assert (found[one] - found[other]).abs().max() > 1e-4, (one, other)


def test_truncation_keeps_the_latest_events_of_all_sequences_together():
    batch = random_batch(SCHEMA, [1, 1], [9, 2], seed=3)
    cut = latest_events(batch, 4)
    assert cut.event_offsets_O.tolist() == [0, 4, 6]
    assert torch.equal(cut.event_EV, torch.cat((batch.event_EV[5:9], batch.event_EV[9:])))
    assert latest_events(batch, 9) is batch


def test_distinct_rows_stand_for_all():
    torch.manual_seed(0)
    rows_XF = torch.randint(0, 3, (2000, 4))
    distinct = Distinct.of(rows_XF)
    assert distinct.row_U.shape[0] == rows_XF.unique(dim=0).shape[0] == 81
    assert torch.equal(rows_XF[distinct.row_U][distinct.place_X], rows_XF)


def test_rows_that_are_not_few_or_only_look_equal_are_left_alone(monkeypatch):
    different = torch.arange(8000).view(2000, 4)
    assert Distinct.of(different) is None
    assert Distinct.of(torch.zeros(10, 4, dtype=torch.int64)) is None
    monkeypatch.setattr(ragged, "_MIX", 0)  # all rows give the same number
    assert Distinct.of(different % 3) is None


def test_equal_events_are_computed_once_and_learn_from_all(monkeypatch):
    """With two kinds of events in 1,500, scores and gradients are those of computing each by itself."""
    model, batch = scoring(ONETRANS).double(), random_batch(SCHEMA, [3, 2], [800, 700], seed=1)
    model.config = replace(ONETRANS, max_seq_len=800)
    model.schedule = model.config.query_schedule()
    batch = replace(batch, event_EV=batch.event_EV % 2, event_sequence_E=batch.event_sequence_E % 2)
    found = []
    for least in (1024, 10**9):
        monkeypatch.setattr(ragged, "_WORTH_COMPARING", least)
        assert (Distinct.of(batch.event_EV) is None) == (least > 1500)
        model.zero_grad()
        out = torch.stack(model(batch))
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)])
    for once, each in zip(*found, strict=True):
        torch.testing.assert_close(once, each, rtol=1e-9, atol=1e-12)


def test_layout_right_aligns():
    layout = Layout.of(torch.tensor([2, 0, 3]))
    x_TF = torch.arange(1.0, 6.0)[:, None]
    slots_RL = layout.pad(x_TF).squeeze(-1)
    assert (slots_RL * layout.real_RL).tolist() == [[0, 1, 2], [0, 0, 0], [3, 4, 5]]
    assert slots_RL[0, 0] == 1  # an empty slot repeats its own request's oldest token
    assert torch.equal(layout.unpad(layout.pad(x_TF)), x_TF)
    assert layout.real_RL.tolist() == [[False, True, True], [False] * 3, [True] * 3]
    tail, kept = layout.tail(2)
    assert kept.tolist() == [0, 1, 3, 4]
    assert tail.lengths_R.tolist() == [2, 0, 2]


@pytest.mark.parametrize("counts", [[4, 4, 4], [1], [0, 0], [], [3, 1, 0, 70, 2], [5, 6, 4, 5], [500]])
@pytest.mark.parametrize("call", [0, 3, 100, 10_000])
def test_groups_hold_every_candidate_once_with_its_request(counts, call):
    offsets_O = torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()])
    groups = Groups.of(offsets_O, lambda size: size + call)
    x_NF = torch.arange(1.0, sum(counts) + 1)[:, None]
    x_GCF = groups.pad(x_NF)
    assert torch.equal(groups.unpad(x_GCF), x_NF)
    slot_N = groups.unpad(torch.arange(groups.count * groups.size).view_as(x_GCF)).flatten()
    assert slot_N.unique().shape[0] == sum(counts)  # no two candidates in one slot
    owner_G = groups.of_request(torch.arange(len(counts)))
    request_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    assert torch.equal(owner_G[slot_N // groups.size], request_N)


def test_one_large_request_does_not_widen_all_groups():
    offsets_O = torch.tensor([0, *torch.tensor([3] * 100 + [200]).cumsum(0).tolist()])
    groups = Groups.of(offsets_O, lambda size: size + 4)
    assert groups.count * groups.size < 2 * 500


@pytest.mark.parametrize(
    ("lengths", "call", "expected"),
    [
        ([], 0.0, []),
        ([0], 0.0, [[0]]),
        ([7, 7, 7], 0.0, [[0, 1, 2]]),
        ([3, 100, 0, 90, 4], 0.0, [[1], [3], [4, 0], [2]]),
        ([3, 100, 0, 90, 4], 300.0, [[1], [3], [4, 0, 2]]),
        ([3, 100, 0, 90, 4], 3000.0, [[1, 3], [4, 0, 2]]),
        ([3, 100, 0, 90, 4], 1e6, [[1, 3, 4, 0, 2]]),
    ],
)
def test_bands_pad_little_where_calls_are_cheap(lengths, call, expected):
    assert bands(lengths, asking=4.0, call=call) == expected


def test_a_selection_of_requests_keeps_everything_of_each():
    batch = random_batch(model_schema(), [3, 1, 0, 11, 2], [9, 0, 4, 30, 1], seed=2)
    batch = replace(
        batch, user_vector_RX=torch.randn(5, 2), context_vector_RX=torch.randn(5, 3), item_vector_NX=torch.randn(17, 4)
    )  # fmt: skip
    chosen = batch.select(torch.tensor([3, 0, 2]))
    chosen.check()
    expected = select_requests(batch, [3, 0, 2])
    for field in fields(batch):
        assert torch.equal(getattr(chosen, field.name), getattr(expected, field.name)), field.name
    nobody = batch.select(torch.zeros(0, dtype=torch.int64))
    nobody.check()
    assert nobody.num_requests == nobody.num_candidates == nobody.num_events == 0


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_bands_change_no_score(config, monkeypatch):
    model, batch = scoring(config), random_batch(SCHEMA, [3, 1, 0, 11, 2, 2], [9, 0, 4, 30, 1, 5], seed=1)
    monkeypatch.setitem(onetrans_module.BAND_CALLS, "cpu", 1e12)
    together = scores(model, batch)
    monkeypatch.setitem(onetrans_module.BAND_CALLS, "cpu", 0.0)
    divided = [len(band) for band in model._bands(batch)]
    assert len(divided) > 3
    torch.testing.assert_close(scores(model, batch), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [pytest.param(preset("onetrans", "tiny"), id="onetrans"), pytest.param(BASELINE, id="dcnv2_din")],
)
def test_overfits_a_tiny_batch(config):
    """Labels are random, so only memory can fit them: every path from input to score must learn."""
    torch.manual_seed(0)
    model, batch = build_model(config, SCHEMA), random_batch(SCHEMA, [5, 3, 8], [7, 0, 12], seed=11)
    optimizers = build_optimizers(model, replace(optimizer_preset("tiny"), dense_lr=0.01, warmup_steps=5))
    for _ in range(120):
        optimizers.zero_grad()
        ctr, cvr = model(batch)
        loss = F.binary_cross_entropy_with_logits(ctr, batch.click_N)
        loss = loss + F.binary_cross_entropy_with_logits(cvr, batch.conversion_N)
        loss.backward()
        optimizers.step()
    assert loss.item() < 0.1


def test_single_candidate_trains_under_batch_normalisation():
    assert isinstance(BASELINE, DCNv2DINConfig)
    assert BASELINE.normalization == "batch"
    model = build_model(BASELINE, SCHEMA).train()
    ctr, _ = model(random_batch(SCHEMA, [1], [3]))
    ctr.sum().backward()
    assert torch.isfinite(ctr).all()


def test_dropout_is_off_in_evaluation():
    config = replace(ONETRANS, dropout=0.5)
    assert isinstance(config, OneTransConfig)
    model, batch = scoring(config), random_batch(SCHEMA, [4], [6])
    assert torch.equal(scores(model, batch), scores(model, batch))
    model.train()
    assert not torch.equal(scores(model, batch), scores(model, batch))


@pytest.mark.parametrize("config", [ONETRANS, BASELINE])
def test_a_missing_vector_is_not_a_vector_of_zeros(config):
    schema = vector_schema()
    torch.manual_seed(0)
    model, batch = build_model(config, schema).eval(), random_batch(schema, [1], [3])
    item_NI, numbers_NX = batch.item_NI.clone(), torch.zeros_like(batch.item_vector_NX)
    found = []
    for there in (0, 1):
        item_NI[:, 0] = there
        found.append(scores(model, replace(batch, item_NI=item_NI.clone(), item_vector_NX=numbers_NX)))
    assert not torch.equal(*found)


@pytest.mark.parametrize("config", [ONETRANS, BASELINE])
def test_both_models_learn_what_only_a_vector_tells(config):
    schema = vector_schema()
    torch.manual_seed(0)
    model = build_model(config, schema)
    optimizers = build_optimizers(model, replace(optimizer_preset("tiny"), warmup_steps=0))

    def right(batch):
        """The click: whether the first number is above zero."""
        return (batch.item_vector_NX[:, 0] > 0).float()

    for step in range(40):
        batch = random_batch(schema, [16] * 16, [1] * 16, seed=step)
        optimizers.zero_grad()
        F.binary_cross_entropy_with_logits(model(batch).ctr_logit_N, right(batch)).backward()
        optimizers.step()
    unseen = random_batch(schema, [16] * 64, [1] * 64, seed=1000)
    guessed_N = (scores(model.eval(), unseen)[0] > 0).float()
    assert (guessed_N == right(unseen)).double().mean() > 0.9


@pytest.mark.parametrize("config", [ONETRANS, BASELINE])
def test_selected_requests_take_their_vectors_along(config):
    schema = vector_schema()
    torch.manual_seed(0)
    model, batch = build_model(config, schema).eval(), random_batch(schema, [3, 1, 0, 11], [9, 0, 4, 30])
    chosen = batch.select(torch.tensor([3, 1]))
    chosen.check()
    together = scores(model, batch)
    expected = torch.cat((together[:, 4:], together[:, 3:4]), dim=1)
    torch.testing.assert_close(scores(model, chosen), expected, rtol=1e-5, atol=1e-5)


def test_wrong_number_of_vector_columns_is_named():
    schema = vector_schema()
    model, batch = build_model(BASELINE, schema), random_batch(schema, [2], [3])
    with pytest.raises(ValueError, match="item vectors have 0 numbers, the schema's vector features have 7"):
        model(replace(batch, item_vector_NX=None))
    with pytest.raises(ValueError, match="item_vector_NX is 1, expected 2"):
        replace(batch, item_vector_NX=batch.item_vector_NX[:1]).check()


def test_wrong_number_of_feature_columns_is_named():
    model, batch = scoring(BASELINE), random_batch(SCHEMA, [2], [3])
    with pytest.raises(ValueError, match="item rows have 2 columns, the schema has 3 features"):
        model(replace(batch, item_NI=batch.item_NI[:, :2]))
