"""Admission of rows by count and eviction of idle ones: by hand, in a training's state, and without effect when off."""

from dataclasses import replace

import pytest
import torch

from onetrans.errors import BadConfigError
from onetrans.models import build_model, embeddings, preset
from onetrans.optim import build_optimizers
from onetrans.optim_config import optimizer_preset
from onetrans.plan import configured_models
from onetrans.settings import TrainingSettings
from tests.batches import REQUEST_TIME_S, model_schema, random_batch

SCHEMA = model_schema()
DAY = REQUEST_TIME_S // 86_400
MODELS = ("onetrans", "dcnv2_din")


@pytest.fixture(autouse=True)
def sparse_and_dense_tables(monkeypatch):
    """The table of items, the largest, gets sparse gradients, the others dense ones."""
    monkeypatch.setattr(embeddings, "SPARSE_FROM_NUMBERS", 5000 * 8)


def model_with(name="onetrans", **usage):
    torch.manual_seed(0)
    return build_model(replace(preset(name, "tiny"), **usage), SCHEMA)


def lookups(batch):
    """How often each row of each table is looked up, by hand."""
    found = {}
    for side, rows_MF in (("user", batch.user_RU), ("context", batch.context_RK), ("item", batch.item_NI),
                          ("event", batch.event_EV)):  # fmt: skip
        for feature, column in zip(SCHEMA.of_side(side), rows_MF.t().tolist(), strict=True):
            for row in column:
                if feature.kind == "hashed":
                    found[feature.embedding, row] = found.get((feature.embedding, row), 0) + 1
    return found


def test_without_the_options_nothing_is_kept_or_counted():
    model = model_with()
    assert model.embeddings.usage is None
    assert not [name for name, _ in model.named_buffers() if "usage" in name]
    model.embeddings.observe(random_batch(SCHEMA, [3], [4]))
    assert model.embeddings.evict(DAY) == {}


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_read_and_trained_only_after_so_many_lookups(name):
    model = model_with(name, admit_after=3)
    batches = [random_batch(SCHEMA, [6, 5], [20, 9], seed) for seed in range(3)]
    optimizers = build_optimizers(model, optimizer_preset("small"))
    seen = {}
    for batch in batches:
        before = {table: model.embeddings.table(table).detach().clone() for table in SCHEMA.embedding_tables()}
        model.embeddings.observe(batch)
        for key, count in lookups(batch).items():
            seen[key] = seen.get(key, 0) + count
        optimizers.zero_grad()
        ctr, cvr = model(batch)
        (ctr.sum() + cvr.square().sum()).backward()
        optimizers.step()
        for (table, row), count in lookups(batch).items():
            moved = not torch.equal(before[table][row], model.embeddings.table(table)[row])
            assert moved == (seen[table, row] >= 3 or row == 0), (table, row, count)
    for (table, row), count in seen.items():
        assert int(model.embeddings.usage.count(table)[row]) == min(count, 3)
    assert sum(count < 3 for count in seen.values()) > 20
    assert sum(count >= 3 for count in seen.values()) > 5


@pytest.mark.parametrize("name", MODELS)
def test_scores_read_row_0_for_rare_ids_and_count_nothing(name):
    model = model_with(name, admit_after=2).eval()
    batch = random_batch(SCHEMA, [4, 2], [9, 8])
    model.embeddings.usage.count("author").fill_(2)
    counts = {key: value.clone() for key, value in model.state_dict().items() if "count_" in key}
    scores = model(batch).ctr_logit_N
    assert all(torch.equal(model.state_dict()[key], value) for key, value in counts.items())
    zeroed = replace(
        batch,
        user_RU=batch.user_RU * torch.tensor([0, 1]),
        context_RK=batch.context_RK * 0,
        item_NI=batch.item_NI * torch.tensor([0, 1, 1]),
        event_EV=batch.event_EV * torch.tensor([0, 1]),
    )
    torch.testing.assert_close(scores, model_with(name).eval()(zeroed).ctr_logit_N)


def test_an_idle_row_starts_afresh_with_its_optimizer_state_and_its_count():
    model = model_with(admit_after=2, evict_after_days=5)
    optimizers = build_optimizers(model, replace(optimizer_preset("small"), embedding_accumulator=0.5))
    table = model.embeddings.table("item")
    old, recent = random_batch(SCHEMA, [8], [30], 0), random_batch(SCHEMA, [8], [30], 1)
    recent = replace(recent, request_time_R=recent.request_time_R + 4 * 86_400_000_000)
    for batch in (old, recent):
        for _ in range(2):
            model.embeddings.observe(batch)
        optimizers.zero_grad()
        model(batch).ctr_logit_N.sum().backward()
        optimizers.step()
    used = model.embeddings.usage.used("item")
    assert set(used.unique().tolist()) <= {0, DAY, DAY + 1, DAY + 4, DAY + 5}
    days = (
        {row for name, row in lookups(old) if name == "item"},
        {row for name, row in lookups(recent) if name == "item"},
    )
    idle = sorted(days[0] - days[1] - {0})
    today = int(used[idle[0]]) + 6
    before, state = table.detach().clone(), optimizers.embedding.state[table]["sum"].clone()
    for name, rows in model.embeddings.evict(today - 1).items():
        assert rows.tolist() == [], name
    evicted = model.embeddings.evict(today)
    assert evicted["item"].tolist() == idle
    optimizers.forget_rows(table, evicted["item"])
    others = [row for row in range(table.shape[0]) if row not in set(idle)]
    assert torch.equal(table[others], before[others])
    assert not (table[idle] == before[idle]).any()
    assert float(table[idle].detach().std()) == pytest.approx(embeddings.INITIAL_STD, rel=0.2)
    assert optimizers.embedding.state[table]["sum"][idle].unique().tolist() == [0.5]
    assert torch.equal(optimizers.embedding.state[table]["sum"][others], state[others])
    assert model.embeddings.usage.count("item")[idle].unique().tolist() == [0]
    assert used[idle].unique().tolist() == [0]
    assert model.embeddings.evict(today)["item"].tolist() == []


def test_fresh_values_depend_on_table_and_day_alone():
    fresh = []
    for seed, today in ((0, 100), (1, 100), (0, 101)):
        model = model_with(evict_after_days=5)
        model.embeddings.usage.used("item")[[3, 7]] = 10
        torch.manual_seed(seed)
        model.embeddings.evict(today)
        fresh.append(model.embeddings.table("item")[[3, 7]].detach())
    assert torch.equal(fresh[0], fresh[1])
    assert not (fresh[0] == fresh[2]).any()


def test_the_settings_decide_both_models_and_refuse_what_is_none():
    models = configured_models(TrainingSettings(preset="tiny", admit_after=4, evict_after_days=30))
    assert {(m.config.admit_after, m.config.evict_after_days) for m in models.values()} == {(4, 30)}
    assert all(m.decides()["config"]["admit_after"] == 4 for m in models.values())
    with pytest.raises(BadConfigError, match=r"training.admit_after = -1 must be at least 0"):
        TrainingSettings(admit_after=-1)
    with pytest.raises(BadConfigError, match=r"dcnv2_din.evict_after_days = -1 must be at least 0"):
        replace(preset("dcnv2_din", "tiny"), evict_after_days=-1)
