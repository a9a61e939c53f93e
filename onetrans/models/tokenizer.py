"""From features to tokens: NS-tokens of each candidate, S-tokens of each request (paper section 3.2).

Shape suffixes: those of :mod:`onetrans.batch` and :mod:`onetrans.models.ragged`, and

    P  NS positions     D  token width (hidden_dim)     Q  width of all embeddings of one side
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetrans.batch import RequestBatch
from onetrans.errors import BadConfigError
from onetrans.models.config import OneTransConfig
from onetrans.models.embeddings import Embeddings
from onetrans.models.ragged import Distinct, Layout
from onetrans.models.ranking import RequestCandidateLinear
from onetrans.models.rowwise import reorder, rms_norm, wide_linear
from onetrans.schema import FeatureSchema, Side

NORM_EPS = 1e-6
"""Added to a token's mean square before the root, in every norm."""


def token_norm(config: OneTransConfig) -> nn.RMSNorm:
    """Return the norm that gives fresh tokens unit size."""
    return nn.RMSNorm(config.hidden_dim, eps=NORM_EPS)


def without_bias(module: nn.Module) -> None:
    """Let all biases start at zero: beside small embeddings they would make all tokens start alike."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)


class AutoSplit(nn.Module):
    """One MLP over all NS embeddings, split into tokens; its request part is computed once per request."""

    def __init__(self, config: OneTransConfig, embeddings: Embeddings) -> None:
        super().__init__()
        self.positions = config.num_ns_tokens
        out_dim = config.num_ns_tokens * config.hidden_dim
        request_dim = embeddings.output_dim("user") + embeddings.output_dim("context")
        self.hidden = RequestCandidateLinear(request_dim, embeddings.output_dim("item"), out_dim)
        self.out = nn.Linear(out_dim, out_dim)
        self.norm = token_norm(config)
        without_bias(self)

    def forward(self, user_RQ: Tensor, context_RQ: Tensor, item_NQ: Tensor, request_N: Tensor) -> Tensor:
        """Return NS-tokens (P, N, D)."""
        hidden = self.hidden(torch.cat((user_RQ, context_RQ), dim=1), item_NQ, request_N)
        (out_NF,) = wide_linear((F.gelu(hidden),), self.out.weight, self.out.bias)
        tokens_NPD = out_NF.unflatten(1, (self.positions, -1))
        return rms_norm(tokens_NPD.transpose(0, 1), self.norm.weight, NORM_EPS)


class GroupWise(nn.Module):
    """One MLP per group of NS features, each giving one token; groups of user and context once per request."""

    def __init__(self, config: OneTransConfig, embeddings: Embeddings) -> None:
        super().__init__()
        self.groups = feature_groups(embeddings.schema, config.num_ns_tokens)
        self.width = embeddings.width
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear((stop - start) * embeddings.width, config.hidden_dim),
                nn.GELU(),
                nn.Linear(config.hidden_dim, config.hidden_dim),
            )
            for _, start, stop in self.groups
        )
        self.norm = token_norm(config)
        without_bias(self)

    def forward(self, user_RQ: Tensor, context_RQ: Tensor, item_NQ: Tensor, request_N: Tensor) -> Tensor:
        """Return NS-tokens (P, N, D)."""
        sides: dict[Side, Tensor] = {"user": user_RQ, "context": context_RQ, "item": item_NQ}
        tokens = []
        for (side, start, stop), mlp in zip(self.groups, self.mlps, strict=True):
            token = mlp(sides[side][:, start * self.width : stop * self.width])
            tokens.append(token if side == "item" else token.index_select(0, request_N))
        return rms_norm(torch.stack(tokens), self.norm.weight, NORM_EPS)


def feature_groups(schema: FeatureSchema, count: int) -> list[tuple[Side, int, int]]:
    """Share the schema's NS features out to ``count`` groups: (side, first feature, end) each.

    Groups are runs of one side's features in schema order, sides in the order user, context, item.  Each
    side has one group at least; further groups go one by one to the side with the most features per group.

    Raises:
        BadConfigError: if there are more groups than features, or fewer than sides.
    """
    sizes: dict[Side, int] = {}
    ordered: tuple[Side, ...] = ("user", "context", "item")
    for side in ordered:
        if features := len(schema.of_side(side)):
            sizes[side] = features
    if not len(sizes) <= count <= sum(sizes.values()):
        raise BadConfigError(
            f"onetrans.num_ns_tokens = {count} with tokenizer = 'group_wise' must be in "
            f"{len(sizes)}..{sum(sizes.values())}: schema {schema.name!r} has {sum(sizes.values())} "
            f"non-sequential features on {len(sizes)} sides"
        )
    shares = dict.fromkeys(sizes, 1)
    for _ in range(count - len(sizes)):
        fullest = max(sizes, key=lambda side: sizes[side] / shares[side])
        shares[fullest] += 1
    return [
        (side, sizes[side] * part // shares[side], sizes[side] * (part + 1) // shares[side])
        for side in sizes
        for part in range(shares[side])
    ]


class SequenceTokens(NamedTuple):
    """Packed S-tokens of a batch, each request's in the order its blocks see them."""

    x_TD: Tensor
    """Token states."""
    time_T: Tensor
    """int64, microseconds since 1970-01-01 UTC."""
    layout: Layout
    """Which request each token belongs to, and where it stands."""


class SequenceTokenizer(nn.Module):
    """One MLP per behaviour sequence, a learned vector per sequence, and the merge into one sequence."""

    def __init__(self, config: OneTransConfig, embeddings: Embeddings) -> None:
        super().__init__()
        self.config = config
        sequences = len(embeddings.schema.sequences)
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(embeddings.output_dim("event"), config.hidden_dim),
                nn.GELU(),
                nn.Linear(config.hidden_dim, config.hidden_dim),
            )
            for _ in range(sequences)
        )
        self.norm = token_norm(config)
        without_bias(self)
        self.type_SD = nn.Parameter(torch.randn(sequences, config.hidden_dim) * 0.02)
        if config.separators:
            if sequences < 2:
                raise BadConfigError(
                    "onetrans.separators = True needs two behaviour sequences at least: "
                    f"schema {embeddings.schema.name!r} has {sequences}"
                )
            self.separator_D = nn.Parameter(torch.randn(config.hidden_dim) * 0.02)
        if config.position == "learned":
            longest = config.max_seq_len + (max(sequences - 1, 0) if config.separators else 0)
            self.position_LD = nn.Parameter(torch.randn(longest, config.hidden_dim) * 0.02)

    def forward(self, embeddings: Embeddings, batch: RequestBatch) -> SequenceTokens:
        """Return the S-tokens of a batch of already truncated events."""
        x_ED = self._by_sequence(embeddings, batch)
        lengths_R = batch.event_offsets_O[1:] - batch.event_offsets_O[:-1]
        tokens = SequenceTokens(x_ED, batch.event_time_E, Layout.of(lengths_R))
        if self.config.merge == "intent_ordered":
            tokens = self._by_intent(tokens, batch)
        if self.config.position == "learned":
            tokens = tokens._replace(x_TD=tokens.x_TD + self.position_LD[tokens.layout.index_T])
        return tokens

    def _by_sequence(self, embeddings: Embeddings, batch: RequestBatch) -> Tensor:
        """Return each event's token.

        It depends on the event's features and sequence alone, so events that are equal in these are computed once.
        They are taken sequence by sequence, so that each MLP has its own in a row.
        """
        event_EV, sequence_E = batch.event_EV, batch.event_sequence_E
        distinct = Distinct.of(torch.cat((event_EV, sequence_E[:, None]), dim=1)) if event_EV.is_cpu else None
        if distinct is not None:
            event_EV, sequence_E = event_EV.index_select(0, distinct.row_U), sequence_E.index_select(0, distinct.row_U)
        of_sequence = [(sequence_E == s).nonzero().squeeze(1) for s in range(len(self.mlps))]
        order_E = torch.cat(of_sequence)
        count_E = torch.arange(order_E.shape[0], device=order_E.device)
        inverse_E = torch.empty_like(order_E).index_copy_(0, order_E, count_E)
        event_EQ = embeddings("event", event_EV.index_select(0, order_E))
        parts = event_EQ.split([mine.shape[0] for mine in of_sequence])
        tokens = [
            rms_norm(mlp(part_EQ).to(event_EQ.dtype), self.norm.weight, NORM_EPS) + type_D
            for mlp, part_EQ, type_D in zip(self.mlps, parts, self.type_SD, strict=True)
        ]
        if distinct is not None:
            return torch.cat(tokens).index_select(0, inverse_E.index_select(0, distinct.place_X))
        return reorder(torch.cat(tokens), order_X=inverse_E, inverse_X=order_E)

    def _by_intent(self, tokens: SequenceTokens, batch: RequestBatch) -> SequenceTokens:
        """Put whole sequences one after another, strongest intent (the schema's last) first."""
        sequences, requests = len(self.mlps), batch.num_requests
        x_TD, time_T, layout = tokens
        place_T = 2 * (sequences - 1 - batch.event_sequence_E)
        request_T, lengths_R = layout.request_T, layout.lengths_R
        if self.config.separators and sequences > 1:
            # A [SEP] takes the odd place between two sequences, of every request.
            borders = torch.arange(1, 2 * sequences - 1, 2, device=time_T.device)
            owners = torch.arange(requests, device=time_T.device).repeat_interleave(sequences - 1)
            x_TD = torch.cat((x_TD, self.separator_D.to(x_TD.dtype).expand(owners.shape[0], -1)))
            time_T = torch.cat((time_T, batch.request_time_R[owners]))
            place_T = torch.cat((place_T, borders.repeat(requests)))
            request_T = torch.cat((request_T, owners))
            lengths_R = lengths_R + (sequences - 1)
        order = (request_T * (2 * sequences) + place_T).argsort(stable=True)
        return SequenceTokens(x_TD.index_select(0, order), time_T[order], Layout.of(lengths_R))
