"""OneTrans as it is first written down: padded, replicated per candidate, and plain softmax attention.

The reference that the model is compared with, outputs and gradients, and that
``benchmarks.model`` measures speed and memory against.  It reads the parameters
of the model under test; everything computed from them is written anew, with
whole-tensor operations and without fused kernels:

* every candidate has its own copy of its request's events, padded on the left to the longest of the batch;
* one attention over [S ; NS] with an explicit mask, its scores and weights held in memory;
* every S-token issues a query in every block that has S-queries, and the pruned ones are dropped afterwards.

Two flags take the first steps away from that, one by one: ``shared_user_side``
runs the S-tokens once per request (candidates padded to the most of the batch),
``kept_queries_only`` projects queries only for tokens that are kept.  Either way
the values are those of the model.  A block without S-queries lacks their
weights, so here too its S-tokens ask nothing: the reference is not made slower
than the configuration requires.

Shape suffixes: those of :mod:`onetrans.batch`, and

    B  sequences: one per candidate, or one per request when the user side is shared
    C  candidates of a sequence (1 unless shared)     L  slots of the longest sequence, right-aligned
    P  NS positions        T  L + P                   Q  tokens that issue queries
    M  token width         H  heads, D head width     A  rotation planes, D / 2
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetrans.batch import RequestBatch
from onetrans.models import OneTrans, Scores
from onetrans.models.onetrans import Block, MixedLinear
from onetrans.models.relative_bias import RelativeBias
from onetrans.schema import Side

SHORTEST_S, LONGEST_S = 60.0, 365 * 86_400.0


@dataclass
class Tokens:
    """The S-tokens of all sequences, right-aligned."""

    x_BLM: Tensor
    exists_BL: Tensor
    index_BL: Tensor
    time_BL: Tensor

    def last(self, count: int) -> Tokens:
        """Return the ``count`` most recent slots."""
        first = self.exists_BL.shape[1] - count
        return Tokens(
            self.x_BLM[:, first:], self.exists_BL[:, first:], self.index_BL[:, first:], self.time_BL[:, first:]
        )


class PaddedOneTrans(nn.Module):
    """The plain reference of a model; it has that model's parameters and no others."""

    def __init__(self, model: OneTrans, *, shared_user_side: bool = False, kept_queries_only: bool = False) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.shared_user_side = shared_user_side
        self.kept_queries_only = kept_queries_only

    def forward(self, batch: RequestBatch) -> Scores:
        """Score every candidate."""
        requests = torch.arange(batch.num_requests, device=batch.user_RU.device)
        request_B = requests if self.shared_user_side else batch.candidate_request_N
        s = self._s_tokens(batch, request_B)
        ns_NPM = self._ns_tokens(batch)
        lengths_B, time_B = s.exists_BL.sum(1), batch.request_time_R[request_B]
        if not self.shared_user_side:
            states_NPM, s = self._joint(s, ns_NPM, lengths_B, time_B)
            top_NM = self._mean(s)
        else:
            counts_R = batch.candidate_offsets_O[1:] - batch.candidate_offsets_O[:-1]
            most = int(counts_R.max()) if counts_R.numel() else 0
            real_RC = torch.arange(most, device=counts_R.device) < counts_R[:, None]
            ns_RCPM = ns_NPM.new_zeros(*real_RC.shape, *ns_NPM.shape[1:])
            ns_RCPM[real_RC] = ns_NPM
            states_RCPM, s = self._two_stages(s, ns_RCPM, lengths_B, time_B)
            states_NPM = states_RCPM[real_RC]
            top_NM = self._mean(s)[batch.candidate_request_N]
        states_NF = self.model.norm(states_NPM).flatten(1)
        if self.model.schedule[-1]:
            states_NF = torch.cat((states_NF, top_NM), dim=1)
        return self.model.heads(states_NF)

    # Tokens

    def _embed(self, side: Side, rows: Tensor, numbers_MX: Tensor | None = None) -> Tensor:
        features, embeddings = self.model.schema.of_side(side), self.model.embeddings
        slots = [F.embedding(rows[..., i], embeddings.table(f.embedding)) for i, f in enumerate(features)]
        start = 0
        for i, f in enumerate(features):
            if f.kind == "vector" and numbers_MX is not None:
                matrix = embeddings.map(f.embedding)
                slots[i] = slots[i] + numbers_MX[:, start : start + f.dim].to(matrix.dtype) @ matrix.T
                start += f.dim
        return torch.cat(slots, dim=-1)

    def _s_tokens(self, batch: RequestBatch, request_B: Tensor) -> Tokens:
        config, tokenizer = self.config, self.model.s_tokenizer
        sequences = len(self.model.schema.sequences)
        ends_B = batch.event_offsets_O[1:][request_B]
        starts_B = torch.maximum(batch.event_offsets_O[:-1][request_B], ends_B - config.max_seq_len)
        longest = int((ends_B - starts_B).max()) if request_B.numel() else 0
        event_BL = ends_B[:, None] - longest + torch.arange(longest, device=request_B.device)
        exists_BL = event_BL >= starts_B[:, None]
        event_BL = event_BL.clamp(min=0)
        sequence_BL, time_BL = batch.event_sequence_E[event_BL], batch.event_time_E[event_BL]
        embedded_BLQ = self._embed("event", batch.event_EV[event_BL])
        x_BLM = embedded_BLQ.new_zeros(*event_BL.shape, config.hidden_dim)
        for sequence, mlp in enumerate(tokenizer.mlps):
            mine_BL = exists_BL & (sequence_BL == sequence)
            x_BLM[mine_BL] = mlp(embedded_BLQ[mine_BL]).to(x_BLM.dtype)
        x_BLM = rms_norm(x_BLM, tokenizer.norm) + tokenizer.type_SD[sequence_BL]
        if config.merge == "intent_ordered":
            # Padding first, then the strongest intent (the schema's last), a [SEP] between two sequences.
            place_BL = (2 * (sequences - 1 - sequence_BL)).masked_fill(~exists_BL, -1)
            if config.separators and sequences > 1:
                borders = torch.arange(1, 2 * sequences - 1, 2, device=place_BL.device)
                between = (request_B.shape[0], sequences - 1)
                x_BLM = torch.cat((x_BLM, tokenizer.separator_D.expand(*between, -1)), dim=1)
                place_BL = torch.cat((place_BL, borders.expand(between)), dim=1)
                exists_BL = torch.cat((exists_BL, exists_BL.new_ones(between)), dim=1)
                time_BL = torch.cat((time_BL, batch.request_time_R[request_B][:, None].expand(between)), dim=1)
            order_BL = place_BL.argsort(dim=1, stable=True)
            x_BLM = x_BLM.gather(1, order_BL[:, :, None].expand_as(x_BLM))
            exists_BL, time_BL = exists_BL.gather(1, order_BL), time_BL.gather(1, order_BL)
        index_BL = (exists_BL.cumsum(1) - 1).clamp(min=0)
        if config.position == "learned":
            x_BLM = x_BLM + tokenizer.position_LD[index_BL]
        return Tokens(x_BLM, exists_BL, index_BL, time_BL)

    def _ns_tokens(self, batch: RequestBatch) -> Tensor:
        request_N = batch.candidate_request_N

        def of_candidate(vectors_RX: Tensor | None) -> Tensor | None:
            return None if vectors_RX is None else vectors_RX[request_N]

        sides = {
            "user": self._embed("user", batch.user_RU[request_N], of_candidate(batch.user_vector_RX)),
            "context": self._embed("context", batch.context_RK[request_N], of_candidate(batch.context_vector_RX)),
            "item": self._embed("item", batch.item_NI, batch.item_vector_NX),
        }
        tokenizer = cast(Any, self.model.ns_tokenizer)
        if self.config.tokenizer == "auto_split":
            hidden = F.gelu(tokenizer.hidden.linear(torch.cat(list(sides.values()), dim=1)))
            tokens_NPM = tokenizer.out(hidden).unflatten(1, (self.config.num_ns_tokens, -1))
        else:
            width = self.config.embedding_dim
            parts = [sides[side][:, start * width : stop * width] for side, start, stop in tokenizer.groups]
            tokens_NPM = torch.stack([mlp(part) for mlp, part in zip(tokenizer.mlps, parts, strict=True)], dim=1)
        return rms_norm(tokens_NPM, tokenizer.norm)

    # Blocks

    def _joint(self, s: Tokens, ns_NPM: Tensor, lengths_N: Tensor, time_N: Tensor) -> tuple[Tensor, Tokens]:
        """Run [S ; NS] as one sequence per candidate."""
        positions = ns_NPM.shape[1]
        ns = self._ns_place(positions, lengths_N, time_N)
        for block, queries in zip(self.model.blocks, self.model.schedule, strict=True):
            assert isinstance(block, Block)
            slots = s.exists_BL.shape[1]
            x_NTM = torch.cat((s.x_BLM, ns_NPM), dim=1)
            index_NT, time_NT = torch.cat((s.index_BL, ns[0]), dim=1), torch.cat((s.time_BL, ns[1]), dim=1)
            kept = min(self._kept(queries), slots)
            asking = 0 if not queries else kept if self.kept_queries_only else slots
            rotation = self._rotation(index_NT, time_NT)
            normed_NTM = rms_norm(x_NTM, block.norm_attention)
            k_NTHD, v_NTHD = self._keys_values(block, mixed(block.key_value, normed_NTM, slots), rotation)
            first = slots - asking
            q_NQHD = self._queries(block, mixed(block.query, normed_NTM[:, first:], asking), rotation, first)
            seen_NQT = self._seen(s.exists_BL, positions, asking)
            scores_NHQT = torch.einsum("nqhd,nthd->nhqt", q_NQHD, k_NTHD) / math.sqrt(self.config.head_dim)
            if block.bias is not None:
                asked = index_NT[:, first:, None], time_NT[:, first:, None]
                scores_NHQT = scores_NHQT + bias(block.bias, asked[0] - index_NT[:, None], asked[1] - time_NT[:, None])
            weights_NHQT = scores_NHQT.masked_fill(~seen_NQT[:, None], -math.inf).softmax(-1)
            attended_NQM = torch.einsum("nhqt,nthd->nqhd", weights_NHQT.to(v_NTHD.dtype), v_NTHD).flatten(2)
            out_NQM = self._close(block, x_NTM[:, first:], normed_NTM[:, first:], attended_NQM, asking)
            # Everything was computed; now all S-tokens but the most recent are dropped.
            s = s.last(kept if queries else 0)
            s.x_BLM, ns_NPM = out_NQM[:, asking - s.x_BLM.shape[1] : asking], out_NQM[:, asking:]
        return ns_NPM, s

    def _two_stages(self, s: Tokens, ns_RCPM: Tensor, lengths_R: Tensor, time_R: Tensor) -> tuple[Tensor, Tokens]:
        """Run S once per request, and the NS-tokens of all its candidates against its keys and values."""
        positions = ns_RCPM.shape[2]
        ns_index, ns_time = self._ns_place(positions, lengths_R, time_R)
        ns_rotation = self._rotation(ns_index[:, None], ns_time[:, None])
        scale = 1 / math.sqrt(self.config.head_dim)
        seen_PP = torch.ones(positions, positions, dtype=torch.bool, device=ns_RCPM.device)
        if self.config.attention == "causal":
            seen_PP = seen_PP.tril()
        for block, queries in zip(self.model.blocks, self.model.schedule, strict=True):
            assert isinstance(block, Block)
            slots = s.exists_BL.shape[1]
            kept = min(self._kept(queries), slots)
            asking = 0 if not queries else kept if self.kept_queries_only else slots
            rotation = self._rotation(s.index_BL, s.time_BL)
            normed_RLM = rms_norm(s.x_BLM, block.norm_attention)
            k_RLHD, v_RLHD = self._keys_values(block, mixed(block.key_value, normed_RLM, slots), rotation)

            normed_RCPM = rms_norm(ns_RCPM, block.norm_attention)
            own = self._keys_values(block, mixed(block.key_value, normed_RCPM, 0), ns_rotation)
            k_RCPHD, v_RCPHD = own
            q_RCPHD = self._queries(block, mixed(block.query, normed_RCPM, 0), ns_rotation, 0)
            to_s = torch.einsum("rcphd,rlhd->rhcpl", q_RCPHD, k_RLHD) * scale
            to_ns = torch.einsum("rcphd,rckhd->rhcpk", q_RCPHD, k_RCPHD) * scale
            if block.bias is not None:
                # All NS-tokens stand at one place and time, after the last S-token.
                from_s = lengths_R[:, None, None] - s.index_BL[:, None], time_R[:, None, None] - s.time_BL[:, None]
                to_s = to_s + bias(block.bias, *from_s)[:, :, None]
                to_ns = to_ns + (block.bias.rank_KH[0] + block.bias.time_KH[0])[:, None, None, None]
            to_s = to_s.masked_fill(~s.exists_BL[:, None, None, None], -math.inf)
            to_ns = to_ns.masked_fill(~seen_PP, -math.inf)
            weights = torch.cat((to_s, to_ns), dim=-1).softmax(-1).to(v_RLHD.dtype)
            attended = torch.einsum("rhcpl,rlhd->rcphd", weights[..., :slots], v_RLHD)
            attended = attended + torch.einsum("rhcpk,rckhd->rcphd", weights[..., slots:], v_RCPHD)
            ns_RCPM = self._close(block, ns_RCPM, normed_RCPM, attended.flatten(3), 0)
            if not queries:
                s = s.last(0)
                continue
            first = slots - asking
            q_RQHD = self._queries(block, mixed(block.query, normed_RLM[:, first:], asking), rotation, first)
            scores_RHQL = torch.einsum("rqhd,rlhd->rhql", q_RQHD, k_RLHD) * scale
            if block.bias is not None:
                between = (
                    s.index_BL[:, first:, None] - s.index_BL[:, None],
                    s.time_BL[:, first:, None] - s.time_BL[:, None],
                )
                scores_RHQL = scores_RHQL + bias(block.bias, *between)
            seen_RQL = self._seen(s.exists_BL, 0, asking)
            weights_RHQL = scores_RHQL.masked_fill(~seen_RQL[:, None], -math.inf).softmax(-1).to(v_RLHD.dtype)
            attended_RQM = torch.einsum("rhql,rlhd->rqhd", weights_RHQL, v_RLHD).flatten(2)
            out_RQM = self._close(block, s.x_BLM[:, first:], normed_RLM[:, first:], attended_RQM, asking)
            s = s.last(kept)
            s.x_BLM = out_RQM[:, asking - kept :]
        return ns_RCPM, s

    def _seen(self, exists_BL: Tensor, positions: int, asking: int) -> Tensor:
        """Return which of [S ; NS] each of the last ``asking`` S-tokens and each NS-token sees: (B, Q, T)."""
        slots = exists_BL.shape[1]
        exists_BT = F.pad(exists_BL, (0, positions), value=True)
        token_T = torch.arange(slots + positions, device=exists_BL.device)
        token_Q1 = token_T[slots - asking :, None]
        seen_QT = (token_T < slots) | (token_Q1 >= slots)
        if self.config.attention == "causal":
            seen_QT = seen_QT & (token_T <= token_Q1)
        if self.config.sliding_window:
            seen_QT = seen_QT & ((token_Q1 >= slots) | (token_T > token_Q1 - self.config.sliding_window))
        # A padded query sees itself: a softmax over nothing is not a number.
        return (seen_QT & exists_BT[:, None]) | (token_T == token_Q1)

    def _queries(self, block: Block, q_XM: Tensor, rotation: tuple[Tensor, Tensor] | None, first: int) -> Tensor:
        q_XHD = q_XM.unflatten(-1, (self.config.num_heads, -1))
        if block.norm_query is not None:
            q_XHD = rms_norm(q_XHD, block.norm_query)
        return (
            q_XHD if rotation is None else turn(q_XHD, rotation[0][..., first:, :, :], rotation[1][..., first:, :, :])
        )

    def _keys_values(self, block: Block, kv: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        k_XHD, v_XHD = (half.unflatten(-1, (self.config.kv_heads, -1)) for half in kv.chunk(2, dim=-1))
        if block.norm_key is not None:
            k_XHD = rms_norm(k_XHD, block.norm_key)
        k_XHD = k_XHD if rotation is None else turn(k_XHD, *rotation)
        sharing = self.config.num_heads // self.config.kv_heads
        if sharing > 1:
            k_XHD, v_XHD = (x.repeat_interleave(sharing, dim=-2) for x in (k_XHD, v_XHD))
        return k_XHD, v_XHD

    def _close(self, block: Block, x: Tensor, normed: Tensor, attended: Tensor, asking: int) -> Tensor:
        if block.gate is not None:
            attended = attended * mixed(block.gate, normed, asking).sigmoid()
        z = x + block.dropout(mixed(block.out, attended, asking))
        hidden = F.gelu(mixed(block.ffn_in, rms_norm(z, block.norm_ffn), asking))
        return z + block.dropout(mixed(block.ffn_out, hidden, asking))

    def _kept(self, queries: int) -> int:
        whole = self.config.separators and queries == self.config.max_seq_len
        return queries + (len(self.model.schema.sequences) - 1 if whole else 0)

    def _mean(self, s: Tokens) -> Tensor:
        real_BL1 = s.exists_BL[:, :, None]
        total_BM = (self.model.norm(s.x_BLM) * real_BL1).sum(1)
        return total_BM / real_BL1.sum(1).clamp(min=1)

    # Places

    @staticmethod
    def _ns_place(positions: int, lengths_B: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        return lengths_B[:, None].expand(-1, positions), time_B[:, None].expand(-1, positions)

    def _rotation(self, index: Tensor, time_us: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cosine and sine (..., 1, A) of tokens at an index and a time."""
        position, planes = self.config.position, self.config.head_dim // 2
        if position not in ("rotary", "rotary_time"):
            return None
        by_time = planes // 2 if position == "rotary_time" else 0
        by_index = planes - by_time
        frequency = 10_000.0 ** -(torch.arange(by_index, dtype=torch.float64, device=index.device) / by_index)
        angles = index.double()[..., None] * frequency
        if by_time:
            share = torch.arange(by_time, dtype=torch.float64, device=index.device) / max(by_time - 1, 1)
            turns = (time_us.double()[..., None] * 1e-6) / (SHORTEST_S * (LONGEST_S / SHORTEST_S) ** share)
            angles = torch.cat((angles, turns.fmod(1.0) * (2 * math.pi)), dim=-1)
        dtype = self.model.norm.weight.dtype
        return angles.cos().to(dtype)[..., None, :], angles.sin().to(dtype)[..., None, :]


def turn(x_XHD: Tensor, cos_X1A: Tensor, sin_X1A: Tensor) -> Tensor:
    """Rotate the pairs (a, a + D/2) of each head."""
    real, imaginary = x_XHD.chunk(2, dim=-1)
    turned = (real * cos_X1A - imaginary * sin_X1A, imaginary * cos_X1A + real * sin_X1A)
    return torch.cat(turned, dim=-1).to(x_XHD.dtype)


def bias(tables: RelativeBias, tokens_BQT: Tensor, us_BQT: Tensor) -> Tensor:
    """Return a learned bias (B, H, Q, T) by tokens and microseconds between query and key, in half doublings."""
    found = []
    for table_KH, between in ((tables.rank_KH, tokens_BQT.abs()), (tables.time_KH, us_BQT.abs() // 1_000_000)):
        bucket = (2 * between.clamp(min=1).double().log2()).floor().long() + 1
        found.append(table_KH[bucket.clamp(max=table_KH.shape[0] - 1).where(between > 0, 0)])
    return (found[0] + found[1]).movedim(-1, 1)


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Scale each row to unit mean square, then by the learned gains."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight


def mixed(linear: MixedLinear, x: Tensor, s_tokens: int) -> Tensor:
    """Map (..., S-tokens then NS-tokens, in): the first ``s_tokens`` by one weight, the others each by its own."""
    s, ns = x[..., :s_tokens, :], x[..., s_tokens:, :]
    parts = []
    if s_tokens:
        assert linear.weight_s is not None
        parts.append(s @ linear.weight_s.T)
    if ns.shape[-2]:
        if linear.weight_ns is None:
            assert linear.weight_s is not None
            parts.append(ns @ linear.weight_s.T)
        else:
            parts.append(torch.einsum("...pi,pio->...po", ns, linear.weight_ns))
    return torch.cat(parts, dim=-2) if parts else x.new_zeros(*x.shape[:-1], linear_width(linear))


def linear_width(linear: MixedLinear) -> int:
    """Return a mixed map's output width."""
    return linear.weight_s.shape[0] if linear.weight_s is not None else cast(Tensor, linear.weight_ns).shape[2]
