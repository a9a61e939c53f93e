"""A hash table that grows keeps every id's row, optimizer state and count; any other change of the schema is named."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from onetrans.checkpoint import Checkpoint
from onetrans.growth import grown_checkpoint, growth
from onetrans.loader import Cursor
from onetrans.models import build_model, preset
from onetrans.optim import build_optimizers
from onetrans.optim_config import optimizer_preset
from onetrans.schema import Feature
from tests.batches import random_batch
from tests.worlds import small_schema

BEFORE = small_schema(hash_size=97)
NOW = small_schema(hash_size=3 * 97)


def with_feature(schema, name, **changes):
    return replace(schema, features=tuple(replace(f, **changes) if f.name == name else f for f in schema.features))


@pytest.mark.parametrize("name", ["onetrans", "dcnv2_din"])
def test_every_id_keeps_its_row_its_state_and_its_count(name):
    torch.manual_seed(0)
    config = replace(preset(name, "tiny"), admit_after=2, evict_after_days=9)
    model = build_model(config, BEFORE)
    optimizers = build_optimizers(model, optimizer_preset("tiny"))
    batch = random_batch(BEFORE, [4, 2], [9, 8])
    for _ in range(2):
        model.embeddings.observe(batch)
    model(batch).ctr_logit_N.sum().backward()
    optimizers.step()
    checkpoint = Checkpoint.capture(model, optimizers, 1, Cursor(), {})

    larger = build_model(config, NOW)
    state = build_optimizers(larger, optimizer_preset("tiny"))
    grown, tables = grown_checkpoint(checkpoint, larger)
    assert tables == {"user": (98, 292), "item": (98, 292)}
    grown.restore(larger, state, generators=False)
    hashes = np.random.default_rng(0).integers(-(2**63), 2**63, 2000)
    for feature in ("user", "item"):
        old, new = (torch.from_numpy(schema.feature(feature).encode(hashes)) for schema in (BEFORE, NOW))
        assert not torch.equal(old, new)
        table, wider = model.embeddings.table(feature), larger.embeddings.table(feature)
        assert torch.equal(table[old], wider[new])
        assert torch.equal(table[0], wider[0])
        sums = (o.embedding.state[t]["sum"] for o, t in ((optimizers, table), (state, wider)))
        then, here = sums
        assert torch.equal(then[old], here[new])
        assert len(then.unique()) > 1
        for kept in ("count", "used"):
            assert torch.equal(
                *(getattr(m.embeddings.usage, kept)(feature)[r] for m, r in ((model, old), (larger, new)))
            )
    other = {n: p for n, p in larger.named_parameters() if not n.endswith(("table_user", "table_item"))}
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in other.items())


def test_a_checkpoint_of_todays_sizes_is_left_as_it_is():
    model = build_model(preset("dcnv2_din", "tiny"), BEFORE)
    checkpoint = Checkpoint.capture(model, build_optimizers(model, optimizer_preset("tiny")), 1, Cursor(), {})
    same, tables = grown_checkpoint(checkpoint, model)
    assert tables == {}
    assert same == checkpoint


def test_what_grew_is_told_from_what_changed():
    assert growth(BEFORE, NOW) == ({"user": (98, 292), "item": (98, 292)}, "")
    assert growth(NOW, BEFORE) == ({}, "feature user: hash_size = 291, now 97, which is no multiple of it")
    assert growth(BEFORE, small_schema(hash_size=100))[1].endswith("= 97, now 100, which is no multiple of it")
    brand = Feature("brand", "item", "hashed", "brand", hash_size=5)
    assert growth(BEFORE, replace(NOW, features=(*NOW.features, brand))) == ({}, "feature brand is new")
    assert growth(replace(NOW, features=(*NOW.features, brand)), BEFORE) == ({}, "feature brand is gone")
    assert growth(BEFORE, with_feature(BEFORE, "user_ctr", boundaries=(0.5,))) == ({}, "feature user_ctr changed")
    moved = replace(BEFORE, features=(BEFORE.features[1], BEFORE.features[0], *BEFORE.features[2:]))
    assert "order of features" in growth(BEFORE, moved)[1]
    assert "its sequences" in growth(BEFORE, replace(BEFORE, sequences=BEFORE.sequences[:1]))[1]
