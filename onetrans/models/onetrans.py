"""OneTrans: one causal transformer over [S-tokens ; NS-tokens] (arXiv 2510.26104, section 3).

The forward pass has two stages (section 3.4).  Stage I runs the S-tokens once
per request and keeps every block's keys and values.  Stage II runs the
NS-tokens of each candidate against them.  S-tokens never see NS-tokens, so this
equals running [S ; NS] once per candidate.

Requests of similar length go through stage I together (a *band*), padded to their
own longest.  In stage II all candidates go through the linear layers at once, and
only attention runs band by band.

Shape suffixes: those of :mod:`onetrans.batch` and :mod:`onetrans.models.ragged`, and

    P  NS positions      H  heads (of keys and values: kv_heads)      D  head width
    M  token width (hidden_dim)
    W  C * P, NS-tokens of one group of candidates        X  any rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from onetrans.batch import RequestBatch, packed_rows
from onetrans.models.attention import Rotation, attend, attend_within, candidate_mask, sequence_mask
from onetrans.models.config import OneTransConfig
from onetrans.models.ragged import Groups, Layout, bands, latest_events
from onetrans.models.ranking import Heads, RankingModel, Scores
from onetrans.models.relative_bias import Distances, RelativeBias
from onetrans.models.rowwise import feed_forward, join_to_slots, own_products, written_out
from onetrans.models.rowwise import rms_norm as scaled_rows
from onetrans.models.tokenizer import NORM_EPS, AutoSplit, GroupWise, SequenceTokenizer
from onetrans.schema import FeatureSchema


def rms_norm(x_XM: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Scale rows to unit mean square, then by the norm's gain."""
    return scaled_rows(x_XM, norm.weight, NORM_EPS)


class MixedLinear(nn.Module):
    """A linear map shared by all S-tokens, and one of its own per NS position (section 3.3).

    NS weights are stacked, so all positions are one batched product.  With ``ns_parameters = "shared"``
    NS-tokens use the map of the S-tokens.
    """

    def __init__(self, config: OneTransConfig, in_dim: int, out_dim: int, *, for_s: bool, gain: float = 1.0) -> None:
        super().__init__()
        own = config.ns_parameters == "own"
        std = gain * in_dim**-0.5
        self.width = out_dim
        self.weight_s = nn.Parameter(torch.randn(out_dim, in_dim) * std) if for_s or not own else None
        self.weight_ns = nn.Parameter(torch.randn(config.num_ns_tokens, in_dim, out_dim) * std) if own else None

    def s(self, x_TI: Tensor) -> Tensor:
        """Map S-tokens (T, in) to (T, out)."""
        assert self.weight_s is not None, "this block has no S-queries"
        return F.linear(x_TI, self.weight_s)

    def s_halves(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """Map S-tokens (T, in) to the two halves of (T, out), each in a piece of its own."""
        assert self.weight_s is not None, "S-tokens have keys and values in every block"
        first, second = self.weight_s.chunk(2)
        return F.linear(x_TI, first), F.linear(x_TI, second)

    def ns(self, x_PNI: Tensor) -> Tensor:
        """Map NS-tokens (P, N, in) to (P, N, out)."""
        if self.weight_ns is None:
            assert self.weight_s is not None
            return F.linear(x_PNI, self.weight_s)
        return own_products(x_PNI, self.weight_ns)


class BlockCache(NamedTuple):
    """What stage II needs of one block's S-tokens: keys (rotated) and values, packed."""

    k_THD: Tensor
    v_THD: Tensor


@dataclass(frozen=True)
class RequestState:
    """Everything stage I computed for a batch of requests: it depends on no candidate."""

    blocks: tuple[BlockCache, ...]
    """Keys and values of each block's input."""
    layouts: tuple[Layout, ...]
    """Where they stand."""
    times: tuple[Tensor, ...]
    """Time of each of them: int64, microseconds since 1970-01-01 UTC."""
    top_RM: Tensor | None
    """Mean of the S-states that leave the top block, zero without any; None where none leave it."""


class Band(NamedTuple):
    """What stage II needs of requests that went through stage I together."""

    state: RequestState
    """Their keys and values."""
    groups: Groups
    """Their candidates in groups."""
    candidates: int
    """How many these are; they stand after those of the bands before."""
    time_R: Tensor
    """Time of each request: int64, microseconds since 1970-01-01 UTC."""


class BandKeys(NamedTuple):
    """What one block of stage II attends to in one band."""

    cache: BlockCache
    """Keys and values of the S-tokens."""
    mask: Tensor
    """Which of them, and of the NS-tokens, each NS-token sees, with a learned bias if there is one."""
    row_K: Tensor
    """Which token stands in each slot of the groups' keys: S-tokens (T) are counted first, then NS-tokens (P, N)."""
    slot_X: Tensor | None
    """Slot of each of these; None where the S-tokens of a request stand in several groups."""


class Block(nn.Module):
    """Pre-norm attention and FFN with mixed parameters: Z = MHA(norm X) + X, X' = FFN(norm Z) + Z."""

    def __init__(self, config: OneTransConfig, *, s_queries: bool) -> None:
        super().__init__()
        width = config.hidden_dim
        inner = width * config.ffn_multiplier
        # Two residual branches per block: scaled so that the sum over all of them keeps its variance.
        residual = (2 * config.num_layers) ** -0.5
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.window = config.sliding_window
        self.norm_attention = nn.RMSNorm(width, eps=NORM_EPS)
        self.norm_ffn = nn.RMSNorm(width, eps=NORM_EPS)
        self.query = MixedLinear(config, width, width, for_s=s_queries)
        self.key_value = MixedLinear(config, width, 2 * config.kv_heads * config.head_dim, for_s=True)
        self.gate = MixedLinear(config, width, width, for_s=s_queries) if config.gated_attention else None
        self.bias = RelativeBias(config.num_heads) if config.relative_bias else None
        self.out = MixedLinear(config, width, width, for_s=s_queries, gain=residual)
        self.ffn_in = MixedLinear(config, width, inner, for_s=s_queries)
        self.ffn_out = MixedLinear(config, inner, width, for_s=s_queries, gain=residual)
        self.norm_query = nn.RMSNorm(config.head_dim, eps=NORM_EPS) if config.qk_norm else None
        self.norm_key = nn.RMSNorm(config.head_dim, eps=NORM_EPS) if config.qk_norm else None
        self.dropout = nn.Dropout(config.dropout)

    def _queries(self, q_XM: Tensor, rotation: Rotation | None) -> Tensor:
        q_XHD = q_XM.unflatten(-1, (self.heads, self.head_dim))
        if self.norm_query is not None:
            q_XHD = rms_norm(q_XHD, self.norm_query)
        return rotation(q_XHD) if rotation is not None else q_XHD

    def _keys(self, k_XM: Tensor, rotation: Rotation | None) -> Tensor:
        k_XHD = k_XM.unflatten(-1, (self.kv_heads, self.head_dim))
        if self.norm_key is not None:
            k_XHD = rms_norm(k_XHD, self.norm_key)
        return rotation(k_XHD) if rotation is not None else k_XHD

    def encode_keys(self, x_TM: Tensor, rotation: Rotation | None) -> tuple[Tensor, BlockCache]:
        """Return the normalised S-tokens (T, M), and keys and values of all of them."""
        normed_TM = rms_norm(x_TM, self.norm_attention)
        k_TM, v_TM = self.key_value.s_halves(normed_TM)
        return normed_TM, BlockCache(self._keys(k_TM, rotation), v_TM.unflatten(-1, (self.kv_heads, self.head_dim)))

    def encode_s(
        self,
        x_QM: Tensor,
        normed_QM: Tensor,
        cache: BlockCache,
        layout: Layout,
        keys: Layout,
        mask: Tensor,
        rotation: Rotation | None,
    ) -> Tensor:
        """Return the outputs of the packed S-tokens that issue queries; ``layout`` is theirs, ``keys`` that of all."""
        q_QHD = self._queries(self.query.s(normed_QM), rotation)
        q_RQHD, k_RLHD, v_RLHD = (
            laid.pad(x_XHD.flatten(1)).unflatten(-1, x_XHD.shape[1:])
            for laid, x_XHD in ((layout, q_QHD), (keys, cache.k_THD), (keys, cache.v_THD))
        )
        attended_QM = layout.unpad(attend_within(q_RQHD, k_RLHD, v_RLHD, mask, self.window))
        return self._finish_s(x_QM, normed_QM, attended_QM)

    def _finish_s(self, x_QM: Tensor, normed_QM: Tensor, attended_QM: Tensor) -> Tensor:
        """Return the block's output for S-tokens that have read what they attend to."""
        if self.gate is not None:
            attended_QM = attended_QM * self.gate.s(normed_QM).sigmoid()
        z_QM = x_QM + self.dropout(self.out.s(attended_QM))
        return self._feed_forward(z_QM, for_ns=False)

    def encode_ns(
        self, x_PNM: Tensor, bands: Sequence[Band], keys: Sequence[BandKeys], rotation: Rotation | None
    ) -> Tensor:
        """Return the outputs (P, N, M) of every candidate's NS-tokens."""
        normed_PNM = rms_norm(x_PNM, self.norm_attention)
        q_PNM = self._queries(self.query.ns(normed_PNM), rotation).flatten(2)
        k_PNM, v_PNM = self.key_value.ns(normed_PNM).chunk(2, dim=-1)
        k_PNM = self._keys(k_PNM, rotation).flatten(2)
        counts = [band.candidates for band in bands]
        q_of, k_of, v_of = (x_PNF.split(counts, dim=1) for x_PNF in (q_PNM, k_PNM, v_PNM))
        attended = [self._attend_ns(*part) for part in zip(q_of, k_of, v_of, bands, keys, strict=True)]
        attended_PNM = torch.cat(attended).unflatten(1, (x_PNM.shape[0], -1)).transpose(0, 1)
        return self._finish_ns(x_PNM, normed_PNM, attended_PNM)

    def _finish_ns(self, x_PNM: Tensor, normed_PNM: Tensor, attended_PNM: Tensor) -> Tensor:
        """Return the block's output for NS-tokens that have read what they attend to."""
        if self.gate is not None:
            attended_PNM = attended_PNM * self.gate.ns(normed_PNM).sigmoid()
        z_PNM = x_PNM + self.dropout(self.out.ns(attended_PNM))
        return self._feed_forward(z_PNM, for_ns=True)

    def _feed_forward(self, z: Tensor, *, for_ns: bool) -> Tensor:
        """Return S-tokens (Q, M) or NS-tokens (P, N, M) plus the FFN of their normalised rows."""
        own = for_ns and self.ffn_in.weight_ns is not None
        into, out = (linear.weight_ns if own else linear.weight_s for linear in (self.ffn_in, self.ffn_out))
        assert into is not None
        assert out is not None
        dropping = self.training and self.dropout.p > 0
        if dropping or self.ffn_in.width > WIDE or not written_out(z, into):
            inner = self.ffn_in.ns if for_ns else self.ffn_in.s
            outer = self.ffn_out.ns if for_ns else self.ffn_out.s
            return z + self.dropout(outer(F.gelu(inner(rms_norm(z, self.norm_ffn)))))
        gain_M = self.norm_ffn.weight
        if own:
            return feed_forward(z, gain_M, NORM_EPS, into, out)
        return feed_forward(z.flatten(0, -2)[None], gain_M, NORM_EPS, into.t()[None], out.t()[None]).view_as(z)

    def _attend_ns(self, q_PNM: Tensor, k_PNM: Tensor, v_PNM: Tensor, band: Band, of_s: BandKeys) -> Tensor:
        """Return what the NS-tokens of one band's candidates read: (N, P * M)."""
        groups, (positions, candidates, width) = band.groups, q_PNM.shape
        if not candidates:
            return q_PNM.new_zeros(0, positions * width)
        # The NS-tokens of a group's candidates stand side by side.
        q_GCF = groups.pad(q_PNM.transpose(0, 1).flatten(1))
        q_GWHD = q_GCF.reshape(groups.count, groups.size * positions, self.heads, self.head_dim)
        k_GLHD, v_GLHD = (
            join_to_slots(of_s_THD.flatten(1), of_ns_PNM.flatten(0, 1), of_s.row_K, of_s.slot_X).view(
                groups.count, -1, self.kv_heads, self.head_dim
            )
            for of_s_THD, of_ns_PNM in zip(of_s.cache, (k_PNM, v_PNM), strict=True)
        )
        attended_GWM = attend(q_GWHD, k_GLHD, v_GLHD, of_s.mask)
        return groups.unpad(attended_GWM.reshape(groups.count, groups.size, positions * width))


class OneTrans(RankingModel):
    """The unified ranking transformer, with request-level two-stage forward and pyramid."""

    config: OneTransConfig
    parts: ClassVar[Mapping[str, str]] = {"S side": "encode_requests", "NS side": "_score"}

    def __init__(self, config: OneTransConfig, schema: FeatureSchema) -> None:
        super().__init__(config, schema)
        tokenizer = AutoSplit if config.tokenizer == "auto_split" else GroupWise
        self.ns_tokenizer = tokenizer(config, self.embeddings)
        self.s_tokenizer = SequenceTokenizer(config, self.embeddings)
        self.schedule = config.query_schedule()
        self.blocks = nn.ModuleList(Block(config, s_queries=queries > 0) for queries in self.schedule)
        self.norm = nn.RMSNorm(config.hidden_dim, eps=NORM_EPS)
        states = config.num_ns_tokens + (1 if self.schedule[-1] else 0)
        self.heads = Heads(states * config.hidden_dim, config.hidden_dim)

    def forward(self, batch: RequestBatch) -> Scores:
        """Score every candidate of ``batch``."""
        divided = self._bands(batch)
        if len(divided) <= 1:
            return self.score_candidates(batch, self.encode_requests(batch))
        parts = [batch.select(requests) for requests in divided]
        order = torch.cat(divided)
        ordered = batch.select(order)
        scores = self._score(ordered, parts, [self.encode_requests(part) for part in parts])
        # Back from the order of the bands to that of the batch.
        number_N, _ = packed_rows(batch.candidate_offsets_O, order)
        return Scores(*(torch.empty_like(x_N).index_copy(0, number_N, x_N) for x_N in scores))

    def _bands(self, batch: RequestBatch) -> list[Tensor]:
        """Return the requests of each band."""
        lengths_R = (batch.event_offsets_O[1:] - batch.event_offsets_O[:-1]).clamp(max=self.config.max_seq_len)
        asking = batch.num_candidates * self.config.num_ns_tokens / max(batch.num_requests, 1)
        call = BAND_CALLS[lengths_R.device.type] / self.config.hidden_dim
        return [torch.tensor(band, device=lengths_R.device) for band in bands(lengths_R.tolist(), asking, call)]

    def encode_requests(self, batch: RequestBatch) -> RequestState:
        """Run stage I: the S-tokens, once per request; candidates are not read."""
        batch = latest_events(batch, self.config.max_seq_len)
        x_TM, time_T, layout = self.s_tokenizer(self.embeddings, batch)
        rotation = self._rotation(layout.index_T, time_T)
        caches: list[BlockCache] = []
        layouts: list[Layout] = []
        times: list[Tensor] = []
        mask: Tensor | None = None  # of the current layout, as long as nothing is pruned
        distances: Distances | None = None  # likewise
        for block, queries in zip(self.blocks, self.schedule, strict=True):
            assert isinstance(block, Block)
            normed_TM, cache = self._run(block.encode_keys, x_TM, rotation)
            caches.append(cache)
            layouts.append(layout)
            times.append(time_T)
            if not queries:
                break
            tail, kept = layout.tail(self._with_separators(queries))
            if kept is not None:
                x_TM, normed_TM = x_TM.index_select(0, kept), normed_TM.index_select(0, kept)
                rotation = rotation.select(kept) if rotation is not None else None
                time_T = time_T[kept]
            if mask is None or kept is not None:
                mask = sequence_mask(tail, layout, self.config.attention, x_TM.dtype, self.config.sliding_window)
                if self.config.relative_bias:
                    distances = Distances.of_sequences(tail, layout, time_T, times[-1])
            if tail.width:
                biased = mask if block.bias is None or distances is None else mask + block.bias(distances)
                x_TM = self._run(block.encode_s, x_TM, normed_TM, cache, tail, layout, biased, rotation)
            layout, mask = tail, (mask if kept is None else None)
        top_RM = self._mean(rms_norm(x_TM, self.norm), layout) if self.schedule[-1] else None
        return RequestState(tuple(caches), tuple(layouts), tuple(times), top_RM)

    def score_candidates(self, batch: RequestBatch, state: RequestState) -> Scores:
        """Run stage II: the NS-tokens of every candidate against its request's state; events are not read."""
        return self._score(batch, [batch], [state])

    def _score(self, batch: RequestBatch, parts: Sequence[RequestBatch], states: Sequence[RequestState]) -> Scores:
        """Run stage II on a batch that is its parts one after another, given the state of each."""
        request_N = batch.candidate_request_N
        x_PNM = self.ns_tokenizer(
            self.embeddings("user", batch.user_RU, batch.user_vector_RX),
            self.embeddings("context", batch.context_RK, batch.context_vector_RX),
            self.embeddings("item", batch.item_NI, batch.item_vector_NX),
            request_N,
        )
        lengths_R = torch.cat([state.layouts[0].lengths_R for state in states])
        rotation = self._rotation(lengths_R[request_N], batch.request_time_R[request_N])
        all_bands: list[Band] = []
        for part, state in zip(parts, states, strict=True):
            groups = self._groups(part, state.layouts[0].width)
            all_bands.append(Band(state, groups, part.num_candidates, part.request_time_R))
        views = [CandidateView(self.config, band, x_PNM.dtype) for band in all_bands]
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            keys = [view.keys(number, block) for view in views]
            x_PNM = self._run(block.encode_ns, x_PNM, all_bands, keys, rotation)
        states_NF = rms_norm(x_PNM, self.norm).transpose(0, 1).flatten(1)
        top = [state.top_RM for state in states if state.top_RM is not None]
        if top:
            states_NF = torch.cat((states_NF, torch.cat(top).index_select(0, request_N)), dim=1)
        return self.heads(states_NF)

    def _groups(self, batch: RequestBatch, keys: int) -> Groups:
        """Group candidates that see ``keys`` S-slots: a group's NS-tokens are scored against each other too."""

        def price(size: Tensor) -> Tensor:
            tokens = size * self.config.num_ns_tokens
            return (tokens + KEY_COPY) * (keys + tokens)

        return Groups.of(batch.candidate_offsets_O, price)

    def _run(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """Call a part of a block, keeping only what it is given if the rest is to be computed again."""
        if self.compute.recompute and torch.is_grad_enabled():
            return checkpoint(part, *arguments, use_reentrant=False)
        return part(*arguments)

    def _with_separators(self, queries: int) -> int:
        """Return a number of S-queries with the [SEP] tokens added where all S-tokens are meant."""
        if self.config.separators and queries == self.config.max_seq_len:
            return queries + len(self.schema.sequences) - 1
        return queries

    def _rotation(self, index_X: Tensor, time_X: Tensor) -> Rotation | None:
        if self.config.position not in ("rotary", "rotary_time"):
            return None
        dtype = self.norm.weight.dtype
        config = self.config
        return Rotation.of(config.position, config.num_heads, config.head_dim, index_X, time_X, dtype)

    @staticmethod
    def _mean(x_TM: Tensor, layout: Layout) -> Tensor:
        total_RM = x_TM.new_zeros(layout.lengths_R.shape[0], x_TM.shape[1]).index_add(0, layout.request_T, x_TM)
        return total_RM / layout.lengths_R.clamp(min=1)[:, None]


class CandidateView:
    """What the candidates of one band see, block by block; kept as long as the S-tokens stay the same."""

    def __init__(self, config: OneTransConfig, band: Band, dtype: torch.dtype) -> None:
        self.config, self.band, self.dtype = config, band, dtype
        self.layout: Layout | None = None
        self.mask = torch.empty(0)
        self.places: tuple[Tensor, Tensor | None] = torch.empty(0), None
        self.distances: Distances | None = None

    def keys(self, number: int, block: Block) -> BandKeys:
        """Return what the block of this number attends to."""
        state, groups, positions = self.band.state, self.band.groups, self.config.num_ns_tokens
        layout = state.layouts[number]
        if self.layout is not layout:
            self.layout = layout
            self.mask = candidate_mask(layout, groups, positions, self.config.attention, self.dtype)
            self.places = groups.places_of_keys(layout, positions, self.band.candidates)
            if self.config.relative_bias:
                time_T = state.times[number]
                self.distances = Distances.of_candidates(layout, groups, time_T, self.band.time_R, positions)
        if block.bias is None or self.distances is None:
            return BandKeys(state.blocks[number], self.mask, *self.places)
        return BandKeys(state.blocks[number], self.mask + block.bias(self.distances), *self.places)


WIDE = 512
"""Inner width up to which an FFN in pieces is faster: a wide one's time is in its products, which want all rows."""

BAND_CALLS = {"cpu": 6e6, "cuda": 6e9}
"""What a band's own kernel calls cost, in pairs of query and key times the token width: measured on a CPU; on a GPU,
a call costs the same time, and a pair a thousandth (an estimate)."""

KEY_COPY = 80
"""Queries that a key is scored against in the time that copying it for a further group takes (measured on a CPU)."""
