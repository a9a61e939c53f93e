"""Random packed batches for tests of the models, with every shape that is legal and rare."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from onetrans.batch import RequestBatch
from onetrans.schema import Feature, FeatureSchema, Sequence, Side

REQUEST_TIME_S = 1_650_000_000


def model_schema() -> FeatureSchema:
    """Three sequences, shared tables, an event feature without a counterpart, and one table with sparse gradients."""
    return FeatureSchema(
        name="models",
        features=(
            Feature("user", "user", "hashed", "user_id", hash_size=30),
            Feature("user_ctr", "user", "bucketized", "user_ctr_7d", boundaries=(0.1, 0.2, 0.4)),
            Feature("hour", "context", "hashed", "hour_of_day", hash_size=24),
            Feature("item", "item", "hashed", "item_id", hash_size=5000),
            Feature("author", "item", "hashed", "author_id", hash_size=13),
            Feature("item_ctr", "item", "bucketized", "item_ctr_7d", boundaries=(0.1, 0.2)),
            Feature("event_item", "event", "hashed", "item_id", hash_size=5000, embedding="item"),
            Feature("event_watch", "event", "bucketized", "watch_s", boundaries=(3.0, 10.0)),
        ),
        sequences=(Sequence("click", "click", 50), Sequence("cart", "cart", 20), Sequence("purchase", "purchase", 10)),
    )


def vector_schema() -> FeatureSchema:
    """The same with vectors on every side that may have them, two of them on one, between the other features."""
    plain = model_schema()
    first, *others = plain.features
    return replace(
        plain,
        features=(
            first,
            Feature("image", "item", "vector", "image", dim=5),
            Feature("taste", "user", "vector", "taste", dim=3),
            *others,
            Feature("scene", "context", "vector", "scene", dim=1),
            Feature("title", "item", "vector", "title", dim=2),
        ),
    )


def random_batch(schema: FeatureSchema, candidates: list[int], events: list[int], seed: int = 0) -> RequestBatch:
    """Return a batch with these numbers of candidates and events per request; event times tie now and then."""
    rng = np.random.default_rng(seed)
    requests = len(candidates)

    def rows(side: Side, count: int) -> torch.Tensor:
        columns = [rng.integers(0, f.rows, count) for f in schema.of_side(side)]
        return torch.from_numpy(np.stack(columns, axis=1)) if columns else torch.zeros(count, 0, dtype=torch.int64)

    def vectors(side: Side, rows_MF: torch.Tensor) -> torch.Tensor | None:
        features = schema.of_side(side)
        parts = [
            torch.from_numpy(f.normalize(rng.normal(0, 2, (rows_MF.shape[0], f.dim)).astype(np.float32)))
            * rows_MF[:, [features.index(f)]]
            for f in schema.vectors(side)
        ]
        return torch.cat(parts, dim=1) if parts else None

    def offsets(counts: list[int]) -> torch.Tensor:
        return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64)

    request_s = REQUEST_TIME_S + rng.integers(0, 86_400, requests)
    times, sequences = [], []
    for request, count in enumerate(events):
        age_s = rng.choice([1, 60, 60, 3_600, 86_400, 30 * 86_400], count) * rng.integers(1, 4, count)
        time_s, sequence = request_s[request] - age_s, rng.integers(0, len(schema.sequences), count)
        order = np.lexsort((sequence, time_s))
        times.append(time_s[order])
        sequences.append(sequence[order])
    total = sum(candidates)
    user_RU, context_RK, item_NI = rows("user", requests), rows("context", requests), rows("item", total)
    batch = RequestBatch(
        user_RU=user_RU,
        context_RK=context_RK,
        item_NI=item_NI,
        candidate_offsets_O=offsets(candidates),
        event_EV=rows("event", sum(events)),
        event_sequence_E=torch.from_numpy(np.concatenate([*sequences, np.zeros(0, np.int64)])),
        event_time_E=torch.from_numpy(np.concatenate([*times, np.zeros(0, np.int64)]) * 1_000_000),
        event_offsets_O=offsets(events),
        request_time_R=torch.from_numpy(request_s * 1_000_000),
        click_N=torch.from_numpy(rng.integers(0, 2, total)).float(),
        conversion_N=torch.from_numpy(rng.integers(0, 2, total)).float(),
        user_vector_RX=vectors("user", user_RU),
        context_vector_RX=vectors("context", context_RK),
        item_vector_NX=vectors("item", item_NI),
    )
    batch.check()
    return batch


def select_requests(batch: RequestBatch, requests: list[int]) -> RequestBatch:
    """Return a batch of some requests, in the given order, each whole."""

    def ragged(offsets_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        starts, ends = offsets_O[:-1].tolist(), offsets_O[1:].tolist()
        chosen = [torch.arange(starts[r], ends[r]) for r in requests]
        lengths = torch.tensor([0, *(len(c) for c in chosen)])
        return torch.cat([*chosen, torch.zeros(0, dtype=torch.int64)]), lengths.cumsum(0)

    kept_N, candidate_offsets_O = ragged(batch.candidate_offsets_O)
    kept_E, event_offsets_O = ragged(batch.event_offsets_O)
    return RequestBatch(
        user_RU=batch.user_RU[requests],
        context_RK=batch.context_RK[requests],
        item_NI=batch.item_NI[kept_N],
        candidate_offsets_O=candidate_offsets_O,
        event_EV=batch.event_EV[kept_E],
        event_sequence_E=batch.event_sequence_E[kept_E],
        event_time_E=batch.event_time_E[kept_E],
        event_offsets_O=event_offsets_O,
        request_time_R=batch.request_time_R[requests],
        click_N=batch.click_N[kept_N],
        conversion_N=batch.conversion_N[kept_N],
        user_vector_RX=None if batch.user_vector_RX is None else batch.user_vector_RX[requests],
        context_vector_RX=None if batch.context_vector_RX is None else batch.context_vector_RX[requests],
        item_vector_NX=None if batch.item_vector_NX is None else batch.item_vector_NX[kept_N],
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Candidates and events per request, and a seed: none, one, few, or one request far larger than the rest."""
    requests = draw(st.integers(1, 5))
    candidates = draw(st.lists(st.sampled_from([0, 1, 2, 3, 11]), min_size=requests, max_size=requests))
    events = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 9, 14]), min_size=requests, max_size=requests))
    return candidates, events, draw(st.integers(0, 10_000))
