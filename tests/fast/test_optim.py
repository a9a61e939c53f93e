"""Optimizers: RMSPropV2 by hand, sparse tables, separate clips, warm-up, save and restore."""

import math
from dataclasses import replace

import pytest
import torch

from onetrans.errors import BadConfigError
from onetrans.models import build_model, embeddings, preset
from onetrans.optim import RMSPropV2, build_optimizers
from onetrans.optim_config import optimizer_preset
from tests.batches import model_schema, random_batch, vector_schema

SCHEMA = model_schema()
PAPER = optimizer_preset("base")
SMALL = optimizer_preset("small")


@pytest.fixture(autouse=True)
def sparse_and_dense_tables(monkeypatch):
    """The table of items, the largest, gets sparse gradients, the others dense ones."""
    monkeypatch.setattr(embeddings, "SPARSE_FROM_NUMBERS", 5000 * 8)


def test_rmsprop_v2_by_hand():
    """v <- alpha v + g^2, w <- w - lr g / (sqrt(v) + eps), written out for two steps of two weights."""
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = RMSPropV2([w], lr=0.1, alpha=0.9, eps=1e-3)
    w.grad = torch.tensor([3.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert w.tolist() == pytest.approx([1.0 - 0.1 * 3.0 / (3.0 + 1e-3), -2.0], rel=1e-12)
    first = w.tolist()
    w.grad = torch.tensor([-1.0, 4.0], dtype=torch.float64)
    optimizer.step()
    v = [0.9 * 9.0 + 1.0, 16.0]
    expected = [
        first[0] + 0.1 * 1.0 / (math.sqrt(v[0]) + 1e-3),
        first[1] - 0.1 * 4.0 / (math.sqrt(v[1]) + 1e-3),
    ]
    assert w.tolist() == pytest.approx(expected, rel=1e-12)


def test_rmsprop_v2_updates_every_piece_of_a_large_tensor():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(3, 100_000))
    before, w.grad = w.detach().clone(), torch.randn(100_000, 3).T
    RMSPropV2([w], lr=0.1, alpha=0.9, eps=1e-3).step()
    torch.testing.assert_close(w.detach(), before - 0.1 * w.grad / (w.grad.abs() + 1e-3))


def test_rmsprop_v2_is_not_torchs_rmsprop():
    """Torch scales the new square by 1 - alpha, so its first step is 316 times larger at alpha = 0.99999."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    for parameter, optimizer in (
        (ours, RMSPropV2([ours], lr=0.005, alpha=0.99999, eps=1e-12)),
        (theirs, torch.optim.RMSprop([theirs], lr=0.005, alpha=0.99999, eps=1e-12)),
    ):
        parameter.grad = torch.tensor([2.0], dtype=torch.float64)
        optimizer.step()
    assert ours.item() == pytest.approx(-0.005)
    assert (theirs / ours).item() == pytest.approx(316.2, rel=1e-3)


def test_rmsprop_v2_skips_parameters_without_gradient():
    w = torch.nn.Parameter(torch.ones(2))
    RMSPropV2([w]).step()
    assert w.tolist() == [1.0, 1.0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(preset("onetrans", "tiny"), SCHEMA)


def backward(model, batch):
    ctr, cvr = model(batch)
    (ctr.sum() + cvr.square().sum()).backward()


def test_tables_and_dense_parameters_are_all_trained_once(model):
    tables, dense = model.embedding_parameters(), model.dense_parameters()
    assert set(tables) | set(dense) == {name for name, _ in model.named_parameters()}
    assert not set(tables) & set(dense)
    assert set(tables) == {f"embeddings.table_{name}" for name in SCHEMA.embedding_tables()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, replace(SMALL, warmup_steps=0))
    backward(model, random_batch(SCHEMA, [4, 2], [9, 8]))
    assert model.embeddings.table("item").grad.is_sparse
    assert not model.embeddings.table("author").grad.is_sparse
    optimizers.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_maps_of_vectors_are_dense_parameters():
    schema = vector_schema()
    model = build_model(preset("onetrans", "tiny"), schema)
    assert set(model.embedding_parameters()) == {f"embeddings.table_{name}" for name in schema.embedding_tables()}
    maps = {f"embeddings.map_{f.name}" for f in schema.features if f.kind == "vector"}
    assert maps < set(model.dense_parameters())


def test_adagrad_on_a_sparse_table_by_hand(model):
    """Rows that occur often are added up before squaring; rows that do not occur stay."""
    optimizers = build_optimizers(model, replace(SMALL, embedding_lr=0.1, embedding_accumulator=1.0))
    table = model.embeddings.table("item")
    before = table.detach().clone()
    batch = random_batch(SCHEMA, [4, 2], [9, 8])
    backward(model, batch)
    gradient = table.grad.to_dense()
    optimizers.step()
    expected = before - 0.1 * gradient / (1.0 + gradient.square()).sqrt()
    torch.testing.assert_close(table.detach(), expected)
    seen = torch.cat((batch.item_NI[:, 0], batch.event_EV[:, 0])).unique()
    moved = (table.detach() != before).any(1).nonzero().squeeze(1)
    assert set(moved.tolist()) <= set(seen.tolist())


def test_each_set_is_clipped_by_its_own_global_norm(model):
    config = replace(PAPER, dense_clip=0.5, embedding_clip=0.25)
    optimizers = build_optimizers(model, config)
    backward(model, random_batch(SCHEMA, [4, 2], [9, 8]))

    def norm(parameters):
        return math.sqrt(sum(float(p.grad.to_dense().double().square().sum()) for p in parameters.values()))

    dense, embedding = norm(model.dense_parameters()), norm(model.embedding_parameters())
    assert dense > 0.5
    assert embedding > 0.25
    norms = optimizers.step()
    assert norms.dense == pytest.approx(dense, rel=1e-4)
    assert norms.embedding == pytest.approx(embedding, rel=1e-4)
    assert norm(model.dense_parameters()) == pytest.approx(0.5, rel=1e-4)
    assert norm(model.embedding_parameters()) == pytest.approx(0.25, rel=1e-4)


def test_small_gradients_are_not_scaled(model):
    optimizers = build_optimizers(model, PAPER)
    backward(model, random_batch(SCHEMA, [1], [2]))
    before = {name: p.grad.clone() for name, p in model.dense_parameters().items()}
    assert optimizers.step().dense < 90
    for name, p in model.dense_parameters().items():
        assert torch.equal(p.grad, before[name])


def test_warm_up_is_linear(model):
    optimizers = build_optimizers(model, replace(SMALL, dense_lr=0.01, warmup_steps=4))
    rates = []
    for _ in range(6):
        optimizers.zero_grad()
        backward(model, random_batch(SCHEMA, [1], [2]))
        optimizers.step()
        rates.append(optimizers.dense.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("config", [PAPER, SMALL], ids=["rmsprop_v2", "adamw"])
def test_restored_state_continues_exactly(config, tmp_path):
    batches = [random_batch(SCHEMA, [4, 2], [9, 8], seed) for seed in range(4)]

    def train(model, optimizers, some):
        for batch in some:
            optimizers.zero_grad()
            backward(model, batch)
            optimizers.step()

    torch.manual_seed(1)
    straight = build_model(preset("onetrans", "tiny"), SCHEMA)
    initial = {name: value.clone() for name, value in straight.state_dict().items()}
    train(straight, build_optimizers(straight, config), batches)

    first = build_model(preset("onetrans", "tiny"), SCHEMA)
    first.load_state_dict(initial)
    optimizers = build_optimizers(first, config)
    train(first, optimizers, batches[:2])
    torch.save({"model": first.state_dict(), "optimizers": optimizers.state_dict()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build_model(preset("onetrans", "tiny"), SCHEMA)
    second.load_state_dict(saved["model"])
    resumed = build_optimizers(second, config)
    resumed.load_state_dict(saved["optimizers"])
    assert resumed.steps == 2
    train(second, resumed, batches[2:])
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_state_of_another_optimizer_is_refused(model):
    state = build_optimizers(model, PAPER).state_dict()
    with pytest.raises(BadConfigError, match=r"optimizer\.dense = 'adamw', but the saved state is of 'rmsprop_v2'"):
        build_optimizers(model, SMALL).load_state_dict(state)


def test_adamw_is_torchs_own(model):
    """The fused form against the plain one, three steps."""
    optimizers = build_optimizers(model, replace(SMALL, warmup_steps=0, weight_decay=0.01))
    dense = model.dense_parameters()
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in dense.items()}
    groups = [
        {"params": [p for p in copies.values() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in copies.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=SMALL.dense_lr, foreach=False, fused=False)
    for seed in range(3):
        optimizers.zero_grad()
        backward(model, random_batch(SCHEMA, [4, 2], [9, 8], seed))
        optimizers.step()
        for name, p in dense.items():
            copies[name].grad = p.grad.clone()
        plain.step()
    for name, p in dense.items():
        torch.testing.assert_close(p.detach(), copies[name].detach(), rtol=1e-6, atol=1e-7)


def test_only_matrices_decay(model):
    optimizers = build_optimizers(model, replace(SMALL, weight_decay=0.01))
    decayed = {id(p) for g in optimizers.dense.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in model.dense_parameters().values() if p.ndim > 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dense": "sgd"}, "optimizer.dense = 'sgd' is none of adamw, rmsprop_v2"),
        ({"dense_lr": 0.0}, "optimizer.dense_lr = 0.0 must be above 0"),
        ({"embedding_clip": math.nan}, "optimizer.embedding_clip = nan must be above 0"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps = -1 must not be negative"),
        ({"rms_alpha": 1.5}, "optimizer.rms_alpha = 1.5 must be above 0 and at most 1"),
        ({"weight_decay": 0.1}, "optimizer.weight_decay = 0.1 needs dense = 'adamw'"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(BadConfigError) as refusal:
        replace(PAPER, **change)
    assert words in str(refusal.value)


def test_the_papers_values():
    assert (PAPER.dense, PAPER.dense_lr, PAPER.rms_alpha, PAPER.dense_clip) == ("rmsprop_v2", 0.005, 0.99999, 90.0)
    assert (PAPER.embedding_lr, PAPER.embedding_accumulator, PAPER.embedding_clip) == (0.1, 1.0, 120.0)
    with pytest.raises(BadConfigError, match="presets are tiny, small, base, large"):
        optimizer_preset("huge")
