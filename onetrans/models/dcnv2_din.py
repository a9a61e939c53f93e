"""The baseline: DIN pooling per behaviour sequence, then DCNv2 cross layers beside an MLP.

DCNv2 is arXiv 2008.13535, DIN arXiv 1706.06978; what they leave open is decided
in :mod:`onetrans.models.config`.

Shape suffixes: those of :mod:`onetrans.batch` and :mod:`onetrans.models.ragged`, and

    Q  width of one event's (or target's) description     A  hidden width of the score MLP
    M  events of one sequence
    F  width of the features given to the cross layers
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetrans.batch import RequestBatch
from onetrans.errors import BadConfigError
from onetrans.models.batch_norm import BatchNorm
from onetrans.models.config import DCNv2DINConfig
from onetrans.models.embeddings import Embeddings
from onetrans.models.ragged import Groups, Layout, latest_events
from onetrans.models.ranking import Heads, RankingModel, Scores
from onetrans.schema import FeatureSchema

_AGE_BUCKETS = 64
_BUCKETS_PER_DOUBLING = 2


class Target(nn.Module):
    """The candidate described feature by feature as an event is, recency included."""

    def __init__(self, embeddings: Embeddings) -> None:
        super().__init__()
        self.width = embeddings.width
        tables = [feature.embedding for feature in embeddings.schema.of_side("item")]
        events = [feature.embedding for feature in embeddings.schema.of_side("event")]
        self.matched = [tables.index(table) if table in tables else None for table in events]
        self.matched.append(None)  # An event's recency has no counterpart in a candidate.
        unmatched = sum(place is None for place in self.matched)
        self.mapped = nn.Linear(embeddings.output_dim("item"), unmatched * embeddings.width)

    def forward(self, item_NQ: Tensor) -> Tensor:
        """Return the target (N, Q) of embeddings (N, item features * width)."""
        mapped = iter(self.mapped(item_NQ).split(self.width, dim=1))
        return torch.cat(
            [next(mapped) if i is None else item_NQ[:, i * self.width : (i + 1) * self.width] for i in self.matched],
            dim=1,
        )


class Recency(nn.Module):
    """A learned embedding of an event's age at its request plus one of its rank from the latest, log-scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.age = nn.Embedding(_AGE_BUCKETS, width)
        self.rank = nn.Embedding(_AGE_BUCKETS, width)
        for table in (self.age, self.rank):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, age_E: Tensor, rank_E: Tensor) -> Tensor:
        """Return (E, width) of ages in microseconds and ranks, 0 for the latest."""
        seconds_E = age_E.clamp(min=0).double() * 1e-6
        return self.age(_log_bucket(seconds_E)) + self.rank(_log_bucket(rank_E.double()))


def _log_bucket(x: Tensor) -> Tensor:
    return ((x + 1).log2() * _BUCKETS_PER_DOUBLING).long().clamp(max=_AGE_BUCKETS - 1)


class InterestPooling(nn.Module):
    """DIN on one behaviour sequence: score = MLP([t, e, t - e, t * e]), then the weighted sum of events.

    The first layer is linear in t, e and t * e, so its terms in t and in e are computed once per candidate and
    once per event; only the product is computed per pair.
    """

    def __init__(self, event_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(4 * event_dim, hidden[0])
        widths = (*hidden, 1)
        self.rest = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, target_GCQ: Tensor, event_GLQ: Tensor, real_GL: Tensor) -> Tensor:
        """Return the pooled events (G, C, Q) of each candidate; zero where a request has none."""
        of_t, of_e, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        t_GC1A = F.linear(target_GCQ, of_t + of_difference, self.first.bias)[:, :, None]
        e_G1LA = F.linear(event_GLQ, of_e - of_difference)[:, None]
        pair_GCLQ = target_GCQ[:, :, None] * event_GLQ[:, None]
        x = F.linear(pair_GCLQ, of_product) + t_GC1A + e_G1LA
        for layer in self.rest:
            x = layer(F.relu(x))
        score_GCL = x.squeeze(-1) * real_GL[:, None]
        return score_GCL @ event_GLQ


class CrossLayer(nn.Module):
    """x' = x0 * (W x + b) + x, with W full or the product of two thin matrices."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.map: nn.Module = nn.Linear(width, width)
        if rank:
            self.map = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))

    def forward(self, x0_NF: Tensor, x_NF: Tensor) -> Tensor:
        """Return (N, F)."""
        return x0_NF * self.map(x_NF) + x_NF


class Normalize(nn.Module):
    """Batch, layer or no normalisation."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        if kind == "batch":
            self.norm = BatchNorm(width)
        elif kind == "layer":
            self.norm = nn.LayerNorm(width)

    def forward(self, x_NF: Tensor) -> Tensor:
        """Return (N, F)."""
        return self.norm(x_NF)


class DCNv2DIN(RankingModel):
    """DCNv2 over [user, context, item, DIN of each sequence]."""

    config: DCNv2DINConfig
    parts: ClassVar[Mapping[str, str]] = {"interest pooling": "_interests"}

    def __init__(self, config: DCNv2DINConfig, schema: FeatureSchema) -> None:
        super().__init__(config, schema)
        embeddings = self.embeddings
        event_dim = embeddings.output_dim("event") + embeddings.width
        self.target = Target(embeddings)
        self.recency = Recency(embeddings.width)
        self.pooling = nn.ModuleList(InterestPooling(event_dim, config.attention_hidden) for _ in schema.sequences)
        width = sum(embeddings.output_dim(side) for side in ("user", "context", "item"))
        width += len(schema.sequences) * event_dim
        if config.cross_rank >= width:
            raise BadConfigError(
                f"dcnv2_din.cross_rank = {config.cross_rank} must be below {width}, the width of what schema "
                f"{schema.name!r} gives to the cross layers, or 0 for a full matrix"
            )
        self.cross = nn.ModuleList(CrossLayer(width, config.cross_rank) for _ in range(config.cross_layers))
        layers: list[nn.Module] = []
        for a, b in pairwise((width, *config.mlp_hidden)):
            layers += [nn.Linear(a, b), Normalize(config.normalization, b), nn.ReLU(), nn.Dropout(config.dropout)]
        self.mlp = nn.Sequential(*layers)
        self.heads = Heads(width + config.mlp_hidden[-1], config.head_hidden)

    def forward(self, batch: RequestBatch) -> Scores:
        """Score every candidate of ``batch``."""
        request_N = batch.candidate_request_N
        item_NQ = self.embeddings("item", batch.item_NI, batch.item_vector_NX)
        request_RQ = torch.cat(
            (
                self.embeddings("user", batch.user_RU, batch.user_vector_RX),
                self.embeddings("context", batch.context_RK, batch.context_vector_RX),
            ),
            dim=1,
        )
        x0_NF = torch.cat((request_RQ.index_select(0, request_N), item_NQ, *self._interests(batch, item_NQ)), dim=1)
        x_NF = x0_NF
        for layer in self.cross:
            x_NF = layer(x0_NF, x_NF)
        return self.heads(torch.cat((x_NF, self.mlp(x0_NF)), dim=1))

    def _interests(self, batch: RequestBatch, item_NQ: Tensor) -> list[Tensor]:
        """Return one pooled sequence (N, Q) after another."""
        batch = latest_events(batch, self.config.max_seq_len)
        everything = Layout.of(batch.event_offsets_O[1:] - batch.event_offsets_O[:-1])
        # Looked up sequence by sequence, so that the gradients of the sequences need not be added up.
        of_sequence = [(batch.event_sequence_E == s).nonzero().squeeze(1) for s in range(len(self.pooling))]
        event_EQ = self.embeddings("event", batch.event_EV.index_select(0, torch.cat(of_sequence)))
        described = event_EQ.split([mine.shape[0] for mine in of_sequence])
        age_E = batch.request_time_R[everything.request_T] - batch.event_time_E
        groups = Groups.of(batch.candidate_offsets_O, lambda size: size + GROUP_COST)
        target_GCQ = groups.pad(self.target(item_NQ))
        pooled: list[Tensor] = []
        for pooling, mine, event_MQ in zip(self.pooling, of_sequence, described, strict=True):
            layout = Layout.of(torch.bincount(everything.request_T[mine], minlength=batch.num_requests))
            rank_M = everything.age_T[mine] if self.config.event_rank == "merged" else layout.age_T
            described_MQ = torch.cat((event_MQ, self.recency(age_E[mine], rank_M)), dim=1)
            event_GLQ = groups.of_request(layout.pad(described_MQ))
            pooled.append(groups.unpad(pooling(target_GCQ, event_GLQ, groups.of_request(layout.real_RL))))
        return pooled


GROUP_COST = 4
"""Slots of a group's rectangle that cost as much as copying a request's events once more (an estimate)."""
