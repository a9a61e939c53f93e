"""What a training watches: moved weights, by rows for large tables, and who is to blame when numbers are not finite."""

from dataclasses import replace

import pytest
import torch

from onetrans import guards
from onetrans.guards import UnmovedWeights, blame, largest_embedding
from onetrans.models import Scores, build_model, embeddings, preset
from onetrans.optim import build_optimizers
from onetrans.optim_config import optimizer_preset
from tests.batches import model_schema, random_batch, vector_schema

SCHEMA = model_schema()
ITEM = "embeddings.table_item"


@pytest.fixture(autouse=True)
def item_table_is_large(monkeypatch):
    """The table of items, the largest, gets sparse gradients and is watched by rows."""
    monkeypatch.setattr(embeddings, "SPARSE_FROM_NUMBERS", 5000 * 8)
    monkeypatch.setattr(guards, "SPARSE_FROM_NUMBERS", 5000 * 8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(preset("onetrans", "tiny"), SCHEMA)


def step(model, optimizers, watched, batch):
    optimizers.zero_grad()
    ctr, cvr = model(batch)
    (ctr.sum() + cvr.square().sum()).backward()
    watched.before_step()
    norms = optimizers.step()
    watched.after_step()
    return norms


def test_a_tensor_counts_as_unmoved_until_a_step_changes_it(model):
    optimizers = build_optimizers(model, replace(optimizer_preset("small"), warmup_steps=0))
    watched = UnmovedWeights(model)
    assert len(watched.names) == watched.total
    batch = random_batch(SCHEMA, [4, 2], [9, 8])
    with torch.no_grad():
        frozen = [model.embeddings.table("item"), model.embeddings.table("author")]
    for group in optimizers.embedding.param_groups:
        group["params"] = [p for p in group["params"] if not any(p is f for f in frozen)]
    step(model, optimizers, watched, batch)
    assert watched.names == ["embeddings.table_author", ITEM]
    optimizers = build_optimizers(model, optimizer_preset("small"))
    step(model, optimizers, watched, batch)
    assert watched.names == []


def test_a_large_table_is_not_copied(model):
    watched = UnmovedWeights(model)
    assert ITEM not in watched._copies
    assert len(watched._copies) == watched.total - 1


def test_nothing_is_updated_where_a_gradient_is_not_finite(model):
    optimizers = build_optimizers(model, optimizer_preset("small"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ctr, _ = model(random_batch(SCHEMA, [4, 2], [9, 8]))
    (ctr.sum() * float("inf")).backward()
    norms = optimizers.step()
    assert not (torch.isfinite(torch.tensor(norms)).all())
    assert optimizers.steps == 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_the_feature_whose_row_is_not_finite_is_named(model):
    batch = random_batch(SCHEMA, [4, 2], [9, 8])
    row = int(batch.event_EV[3, 1])
    with torch.no_grad():
        model.embeddings.table("event_watch")[row, 2] = float("nan")
    count = int((batch.event_EV[:, 1] == row).sum())
    assert blame(model, batch) == (
        f"row {row} of table event_watch, which feature event_watch looks up {count} times in the batch, is not finite"
    )
    with torch.no_grad():
        model.embeddings.table("event_watch")[row, 2] = 0.0
        untouched = next(r for r in range(5000) if r not in batch.item_NI[:, 0] and r not in batch.event_EV[:, 0])
        model.embeddings.table("item")[untouched] = float("inf")
        model.embeddings.table("user")[batch.user_RU[1, 0]] = 9.0
    assert blame(model, batch) == ""
    assert largest_embedding(model, batch) == "the largest embedding, 9, is of feature user"


def test_a_weight_or_a_gradient_that_is_not_finite_is_named(model):
    batch = random_batch(SCHEMA, [4, 2], [9, 8])
    name, weight = list(model.dense_parameters().items())[3]
    with torch.no_grad():
        kept = weight.clone()
        weight.view(-1)[0] = float("inf")
    total = len(model.dense_parameters())
    assert blame(model, batch) == f"1 of {total} weight tensors are not finite, the first is {name}"
    with torch.no_grad():
        weight.copy_(kept)
    model(batch).ctr_logit_N.sum().backward()
    assert blame(model, batch) == ""
    table = model.embeddings.table("item")
    table.grad = table.grad.coalesce()
    table.grad.values()[0, 0] = float("nan")
    told = blame(model, batch)
    total = len(list(model.parameters()))
    assert told == (
        f"1 of {total} gradients are not finite, among them that of feature item and event_item; the first is of {ITEM}"
    )


def test_a_vector_or_a_score_that_is_not_finite_is_named(model):
    batch = random_batch(SCHEMA, [4, 2], [9, 8])
    scores = torch.tensor([0.0, 0.0, 0.0, 0.0, float("nan"), 1.0])
    told = blame(model, batch, Scores(torch.zeros(6), scores))
    assert "1 CVR scores are not, the first of candidate 4 (request 1) of the batch; the largest embedding" in told
    schema = vector_schema()
    batch = random_batch(schema, [4, 2], [9, 8])
    batch.item_vector_NX[3, 6] = float("nan")
    assert blame(build_model(preset("onetrans", "tiny"), schema), batch) == "1 values of feature title are not finite"
