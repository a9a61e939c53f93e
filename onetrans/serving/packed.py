"""OneTrans for scoring on a CPU: the same function as :mod:`onetrans.models.onetrans`, in fewer passes over memory.

Training and scoring want different programs of one model.  A service sees a few requests at a time, needs no
gradient, and keeps its weights for hours, so here

* what can be multiplied into a weight once is: the gains of norms, and both heads side by side;
* queries, keys and values are one product, and so are all tables one lookup;
* attention runs request by request, so there are no masks and nothing is padded.  The NS-tokens of a request read its
  S-tokens, all candidates at once, and apart from that each candidate's own NS-tokens; the two are then weighed by
  their sums of exponentials, which is the softmax over both together;
* in place of all NS-tokens, which have the time of the request, the S-keys are turned: by the opposite angle, once.

The model's own forward pass is what tests hold this against.  What :func:`packable` does not tell true of is scored by
that pass.

Shape suffixes: those of :mod:`onetrans.models.onetrans` and :mod:`onetrans.serving.prefix`, and

    I  width in     O  width out     L  S-tokens of one request     K  S-keys of all blocks and requests, packed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onetrans.batch import RequestBatch
from onetrans.models.attention import Rotation
from onetrans.models.compute import Precision
from onetrans.models.embeddings import Embeddings
from onetrans.models.onetrans import Block, OneTrans
from onetrans.models.ranking import Scores
from onetrans.models.tokenizer import NORM_EPS, AutoSplit
from onetrans.schema import Side
from onetrans.serving.prefix import UserState

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Attention that also returns the logarithm of its sum of exponentials."""


def packable(model: OneTrans) -> bool:
    """Tell whether :class:`PackedOneTrans` computes what the model does."""
    config = model.config
    return (
        next(model.parameters()).device.type == "cpu"
        and config.tokenizer == "auto_split"
        and config.merge == "time_ordered"
        and config.position != "learned"
        and config.ns_parameters == "own"
        and config.top_block == "ns_only"
        and config.kv_heads == config.num_heads
        and not config.relative_bias
        and not config.sliding_window
    )


class Weights(NamedTuple):
    """One block's weights for the S-tokens (I, O) or for the NS-tokens (P, I, O), gains multiplied in."""

    query: Tensor | None
    """None where no S-token issues queries."""
    key_value: Tensor
    gate: Tensor | None
    out: Tensor | None
    ffn_in: Tensor | None
    ffn_out: Tensor | None


class PackedBlock(NamedTuple):
    """One block."""

    s: Weights
    ns: Weights
    gain_query_D: Tensor | None
    """Of the norm of queries; None without one."""
    gain_key_D: Tensor | None
    """Likewise of keys."""


class Tables:
    """All embedding tables end to end; the model's own are views of it from now on, so there is one copy."""

    def __init__(self, embeddings: Embeddings) -> None:
        self.embeddings = embeddings
        tables = embeddings.schema.embedding_tables()
        self.rows_YD = torch.empty(sum(tables.values()), embeddings.width)
        start: dict[str, int] = {}
        total = 0
        for name, rows in tables.items():
            table = embeddings.table(name)
            start[name] = total
            place = self.rows_YD[total : total + rows]
            table.data = place.copy_(table.detach())
            total += rows
        sides: tuple[Side, ...] = ("user", "context", "item", "event")
        self.start_F = {
            side: torch.tensor([start[f.embedding] for f in embeddings.schema.of_side(side)], dtype=torch.int64)
            for side in sides
        }

    def __call__(self, side: Side, rows_MF: Tensor, vectors_MX: Tensor | None = None) -> Tensor:
        """Return what the model's embeddings do: (M, Q)."""
        row_X = (rows_MF + self.start_F[side]).flatten()
        slots_MFD = self.rows_YD.index_select(0, row_X).view(*rows_MF.shape, self.rows_YD.shape[1])
        if vectors_MX is not None:
            first = 0
            for place, feature in enumerate(self.embeddings.schema.of_side(side)):
                if feature.kind == "vector":
                    part = vectors_MX[:, first : first + feature.dim]
                    slots_MFD[:, place] += F.linear(part, self.embeddings.map(feature.embedding))
                    first += feature.dim
        return slots_MFD.flatten(1)


class PackedOneTrans:
    """A OneTrans model packed for scoring; its weights must not change afterwards."""

    @torch.no_grad()
    def __init__(self, model: OneTrans, precision: Precision) -> None:
        """Pack a model for which :func:`packable` holds; ``bfloat16`` is that of matrix products with weights."""
        tokenizer = model.ns_tokenizer
        assert isinstance(tokenizer, AutoSplit)
        config = model.config
        self.config = config
        self.schedule = model.schedule
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.tables = Tables(model.embeddings)
        self.blocks = [self._block(block) for block in model.blocks if isinstance(block, Block)]
        hidden = tokenizer.hidden.linear
        self.request_IO = self._half(hidden.weight[:, : tokenizer.hidden.request_dim].t())
        self.item_IO = self._half(hidden.weight[:, tokenizer.hidden.request_dim :].t())
        self.hidden_O = hidden.bias.detach()
        self.tokens_IO, self.tokens_O = self._half(tokenizer.out.weight.t()), tokenizer.out.bias.detach()
        self.token_gain_M = tokenizer.norm.weight.detach()
        events = model.s_tokenizer
        self.event_layers = [
            (self._half(mlp[0].weight.t()), mlp[0].bias, self._half(mlp[2].weight.t()), mlp[2].bias)  # type: ignore[index]
            for mlp in events.mlps
        ]
        self.event_gain_M, self.type_SM = events.norm.weight.detach(), events.type_SD.detach()
        first_ctr, _, last_ctr = model.heads.ctr
        first_cvr, _, last_cvr = model.heads.cvr
        gain_F = model.norm.weight.repeat(config.num_ns_tokens)
        self.head_in_IO = self._half((torch.cat((first_ctr.weight, first_cvr.weight)) * gain_F).t())  # type: ignore[arg-type]
        self.head_in_O = torch.cat((first_ctr.bias, first_cvr.bias))  # type: ignore[arg-type]
        self.head_out_IO = torch.block_diag(last_ctr.weight.t(), last_cvr.weight.t())  # type: ignore[operator]
        self.head_out_O = torch.cat((last_ctr.bias, last_cvr.bias))  # type: ignore[arg-type]
        self._masks: dict[tuple[int, int], Tensor] = {}

    def _half(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype).contiguous()

    def _block(self, block: Block) -> PackedBlock:
        def of_s(weight: Tensor | None, gain: Tensor | None = None) -> Tensor | None:
            return None if weight is None else self._half((weight if gain is None else weight * gain).t())

        def of_ns(weight: Tensor | None, gain: Tensor | None = None) -> Tensor:
            assert weight is not None
            return self._half(weight if gain is None else weight * gain[:, None])

        attention, ffn = block.norm_attention.weight, block.norm_ffn.weight
        keys_of_s = of_s(block.key_value.weight_s, attention)
        assert keys_of_s is not None
        return PackedBlock(
            Weights(
                of_s(block.query.weight_s, attention),
                keys_of_s,
                None if block.gate is None else of_s(block.gate.weight_s, attention),
                of_s(block.out.weight_s),
                of_s(block.ffn_in.weight_s, ffn),
                of_s(block.ffn_out.weight_s),
            ),
            Weights(
                None,
                torch.cat(
                    (of_ns(block.query.weight_ns, attention), of_ns(block.key_value.weight_ns, attention)), dim=2
                ),
                None if block.gate is None else of_ns(block.gate.weight_ns, attention),
                of_ns(block.out.weight_ns),
                of_ns(block.ffn_in.weight_ns, ffn),
                of_ns(block.ffn_out.weight_ns),
            ),
            None if block.norm_query is None else block.norm_query.weight.detach(),
            None if block.norm_key is None else block.norm_key.weight.detach(),
        )

    # Stage I

    def encode(self, batch: RequestBatch, events_EW: Tensor) -> list[UserState]:
        """Return what stage I gives for each request of a batch of truncated events; its tensors are views.

        ``events_EW`` is the batch's :func:`onetrans.serving.prefix.event_table`.
        """
        lengths: list[int] = batch.event_offsets_O.diff().tolist()
        event_R = events_EW.split(lengths)
        x_TM, time_T = self._event_tokens(batch), batch.event_time_E
        index_T = torch.cat([torch.arange(length) for length in lengths])
        cos_T1D, sin_T1D = self._turns(index_T, time_T)
        heads, width = (self.config.num_heads, self.config.head_dim), self.config.hidden_dim
        keys: list[list[Tensor]] = [[] for _ in lengths]
        values: list[list[Tensor]] = [[] for _ in lengths]
        times: list[list[Tensor]] = [[] for _ in lengths]
        time_R = time_T.split(lengths)
        for block, queries in zip(self.blocks, self.schedule, strict=True):
            normed_TM = _unit(x_TM)
            kv_TM = self._mm(normed_TM, block.s.key_value)
            k_THD = _normed(kv_TM[:, :width].unflatten(1, heads), block.gain_key_D)
            k_THD = _turned(k_THD, cos_T1D, sin_T1D)
            k_R, v_R = k_THD.split(lengths), kv_TM[:, width:].unflatten(1, heads).split(lengths)
            for request, (k_LHD, v_LHD, time_L) in enumerate(zip(k_R, v_R, time_R, strict=True)):
                keys[request].append(k_LHD)
                values[request].append(v_LHD)
                times[request].append(time_L)
            if not queries:
                break
            left = [min(length, queries) for length in lengths]
            if left != lengths:
                row_T = torch.cat([part[len(part) - count :] for part, count in zip(_rows(lengths), left, strict=True)])
                x_TM, normed_TM = x_TM.index_select(0, row_T), normed_TM.index_select(0, row_T)
                if cos_T1D is not None and sin_T1D is not None:
                    cos_T1D, sin_T1D = cos_T1D.index_select(0, row_T), sin_T1D.index_select(0, row_T)
                time_R = tuple(time_L[time_L.shape[0] - count :] for time_L, count in zip(time_R, left, strict=True))
                lengths = left
            assert block.s.query is not None
            q_THD = _normed(self._mm(normed_TM, block.s.query).unflatten(1, heads), block.gain_query_D)
            q_THD = _turned(q_THD, cos_T1D, sin_T1D)
            attended = [self._attend_s(*of_request) for of_request in zip(q_THD.split(lengths), k_R, v_R, strict=True)]
            x_TM = self._finish(x_TM, normed_TM, torch.cat(attended) if len(attended) > 1 else attended[0], block.s)
        return [
            UserState(event_EW, tuple(k), tuple(v), tuple(t), None)
            for event_EW, k, v, t in zip(event_R, keys, values, times, strict=True)
        ]

    def _event_tokens(self, batch: RequestBatch) -> Tensor:
        """Return each event's token, by the MLP of its sequence."""
        order_E = torch.argsort(batch.event_sequence_E, stable=True)
        counts = torch.bincount(batch.event_sequence_E, minlength=len(self.event_layers)).tolist()
        event_EQ = self.tables("event", batch.event_EV.index_select(0, order_E))
        tokens = [
            self._addmm(out_O, F.gelu(self._addmm(in_O, part_EQ, in_IO)), out_IO)
            for part_EQ, (in_IO, in_O, out_IO, out_O) in zip(event_EQ.split(counts), self.event_layers, strict=True)
        ]
        token_EM = F.rms_norm(torch.cat(tokens), self.event_gain_M.shape, self.event_gain_M, NORM_EPS)
        token_EM += self.type_SM.repeat_interleave(torch.tensor(counts), dim=0, output_size=token_EM.shape[0])
        return torch.empty_like(token_EM).index_copy_(0, order_E, token_EM)

    def _attend_s(self, q_QHD: Tensor, k_LHD: Tensor, v_LHD: Tensor) -> Tensor:
        """Return what the last Q of a request's S-tokens read (Q, M)."""
        queries, keys = q_QHD.shape[0], k_LHD.shape[0]
        if not queries:
            return q_QHD.flatten(1)
        causal = self.config.attention == "causal"
        mask = self._mask(queries, keys) if causal and queries < keys else None
        out_1HQD, _ = _flash(
            *(x.transpose(0, 1)[None] for x in (q_QHD, k_LHD, v_LHD)), 0.0, causal and mask is None, attn_mask=mask
        )
        return out_1HQD[0].transpose(0, 1).flatten(1)

    def _mask(self, queries: int, keys: int) -> Tensor:
        """Return the additive mask (1, 1, Q, L) of a causal tail."""
        mask = self._masks.get((queries, keys))
        if mask is None:
            late_QL = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
            mask = torch.zeros(1, 1, queries, keys).masked_fill_(late_QL, float("-inf"))
            if len(self._masks) < _MASKS:
                self._masks[queries, keys] = mask
        return mask

    # Stage II

    def score(self, batch: RequestBatch, users: Sequence[UserState]) -> Scores:
        """Return the scores of a batch's candidates, given what stage I gave for each request; events are not read."""
        return self.score_counted(batch, users, batch.candidate_offsets_O.diff().tolist())

    def score_counted(self, batch: RequestBatch, users: Sequence[UserState], counts: list[int]) -> Scores:
        """Score as :meth:`score` does, given the candidates of each request: for tracing, which cannot read numbers."""
        x_PNM = self._candidate_tokens(batch, counts)
        keys = self._turned_keys(batch, users)
        heads, head_dim = self.config.num_heads, self.config.head_dim
        for number, block in enumerate(self.blocks):
            normed_PNM = _unit(x_PNM)
            qkv_PNHD = self._mm(normed_PNM, block.ns.key_value).unflatten(2, (3 * heads, head_dim))
            v_PNHD = qkv_PNHD[:, :, 2 * heads :]
            qk_PNHD = qkv_PNHD[:, :, : 2 * heads]
            if block.gain_query_D is not None and block.gain_key_D is not None:
                qk_PNHD = F.rms_norm(qk_PNHD, (head_dim,), None, NORM_EPS)
            q_PNHD, k_PNHD = qk_PNHD[:, :, :heads], qk_PNHD[:, :, heads:]
            if block.gain_query_D is not None and block.gain_key_D is not None:
                k_PNHD = k_PNHD * (block.gain_query_D * block.gain_key_D)
            values = [user.values_LHD[number] for user in users]
            attended_PNM = self._attend(q_PNHD, k_PNHD, v_PNHD, keys[number], values, counts)
            x_PNM = self._finish(x_PNM, normed_PNM, attended_PNM, block.ns)
        states_NF = _unit(x_PNM).transpose(0, 1).flatten(1)
        logits_NC = torch.addmm(
            self.head_out_O, F.gelu(self._addmm(self.head_in_O, states_NF, self.head_in_IO)), self.head_out_IO
        )
        return Scores(logits_NC[:, 0], logits_NC[:, 1])

    def _candidate_tokens(self, batch: RequestBatch, counts: list[int]) -> Tensor:
        """Return the NS-tokens (P, N, M)."""
        user_RQ = self.tables("user", batch.user_RU, batch.user_vector_RX)
        context_RQ = self.tables("context", batch.context_RK, batch.context_vector_RX)
        item_NQ = self.tables("item", batch.item_NI, batch.item_vector_NX)
        of_request_RO = self._addmm(self.hidden_O, torch.cat((user_RQ, context_RQ), dim=1), self.request_IO)
        hidden_NO = self._mm(item_NQ, self.item_IO)
        if len(counts) > 1:
            of_request_RO = of_request_RO.repeat_interleave(torch.tensor(counts), dim=0, output_size=hidden_NO.shape[0])
        hidden_NO += of_request_RO
        tokens_NPM = self._addmm(self.tokens_O, F.gelu(hidden_NO), self.tokens_IO).unflatten(
            1, (self.config.num_ns_tokens, -1)
        )
        return F.rms_norm(tokens_NPM, self.token_gain_M.shape, self.token_gain_M, NORM_EPS).transpose(0, 1)

    def _turned_keys(self, batch: RequestBatch, users: Sequence[UserState]) -> list[list[Tensor]]:
        """Return the S-keys as the unturned NS-queries of each request see them: by block and request, (L, H, D)."""
        sizes = [k_LHD.shape[0] for user in users for k_LHD in user.keys_LHD]
        k_KHD = torch.cat([k_LHD for user in users for k_LHD in user.keys_LHD])
        lengths_R = torch.tensor([user.keys_LHD[0].shape[0] for user in users])
        cos_R1D, sin_R1D = self._turns(lengths_R, batch.request_time_R)
        if cos_R1D is not None and sin_R1D is not None:
            if len(users) > 1:
                of_user_R = torch.tensor([sum(k_LHD.shape[0] for k_LHD in user.keys_LHD) for user in users])
                cos_R1D, sin_R1D = (x.repeat_interleave(of_user_R, dim=0) for x in (cos_R1D, sin_R1D))
            k_KHD = _turned(k_KHD, cos_R1D, -sin_R1D)
        parts = k_KHD.split(sizes)
        blocks = len(self.blocks)
        of_blocks = [list(parts[number::blocks]) for number in range(blocks)]
        return [
            keys if block.gain_query_D is None else [k_LHD * block.gain_query_D for k_LHD in keys]
            for keys, block in zip(of_blocks, self.blocks, strict=True)
        ]

    def _attend(
        self,
        q_PNHD: Tensor,
        k_PNHD: Tensor,
        v_PNHD: Tensor,
        s_keys: Sequence[Tensor],
        s_values: Sequence[Tensor],
        counts: Sequence[int],
    ) -> Tensor:
        """Return what each NS-token reads (P, N, M): its request's S-tokens, and its candidate's NS-tokens."""
        own_NHPD, own_NHP = _flash(
            *(x.permute(1, 2, 0, 3) for x in (q_PNHD, k_PNHD, v_PNHD)), 0.0, self.config.attention == "causal"
        )
        own_PNHD, own_PNH1 = own_NHPD.permute(2, 0, 1, 3), own_NHP.permute(2, 0, 1).unsqueeze(3)
        read = [
            self._attend_to_s(*of_request)
            for of_request in zip(q_PNHD.split(list(counts), dim=1), s_keys, s_values, strict=True)
        ]
        s_PNHD, s_PNH1 = read[0] if len(read) == 1 else (torch.cat(parts, dim=1) for parts in zip(*read, strict=True))
        share_PNH1 = torch.sigmoid_(own_PNH1 - s_PNH1)
        return s_PNHD.lerp_(own_PNHD, share_PNH1).flatten(2)

    @staticmethod
    def _attend_to_s(q_PNHD: Tensor, k_LHD: Tensor, v_LHD: Tensor) -> tuple[Tensor, Tensor]:
        """Return what one request's NS-tokens read of its S-tokens, and the logarithm of the sum of exponentials."""
        if not k_LHD.shape[0]:
            return torch.zeros_like(q_PNHD), q_PNHD.new_full((*q_PNHD.shape[:3], 1), float("-inf"))
        positions = q_PNHD.shape[0]
        k_PHLD, v_PHLD = (x.transpose(0, 1).expand(positions, -1, -1, -1) for x in (k_LHD, v_LHD))
        out_PHND, sum_PHN = _flash(q_PNHD.transpose(1, 2), k_PHLD, v_PHLD)
        return out_PHND.transpose(1, 2), sum_PHN.transpose(1, 2).unsqueeze(3)

    # Both

    def _finish(self, x: Tensor, normed: Tensor, attended: Tensor, weights: Weights) -> Tensor:
        """Return a block's output for S-tokens (T, M) or NS-tokens (P, N, M) that have read what they attend to."""
        assert weights.out is not None
        assert weights.ffn_in is not None
        assert weights.ffn_out is not None
        if weights.gate is not None:
            attended = attended * self._mm(normed, weights.gate).sigmoid_()
        z = self._addmm(x, attended, weights.out)
        return self._addmm(z, F.gelu(self._mm(_unit(z), weights.ffn_in)), weights.ffn_out)

    def _mm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(x.to(self.dtype), weight).float()

    def _addmm(self, to: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if self.dtype is not torch.float32:
            return self._mm(x, weight) + to
        return torch.addmm(to, x, weight) if weight.ndim == 2 else torch.baddbmm(to, x, weight)

    def _turns(self, index_X: Tensor, time_X: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return cosine and signed sine (X, 1, D) of each channel's angle; None without rotation."""
        config = self.config
        if config.position not in ("rotary", "rotary_time"):
            return None, None
        turn = Rotation.of(config.position, 1, config.head_dim, index_X, time_X, torch.float32)
        return turn.cos_XW[:, None], turn.sin_XW[:, None]


def _unit(x: Tensor) -> Tensor:
    """Return rows of unit mean square."""
    return F.rms_norm(x, x.shape[-1:], None, NORM_EPS)


def _normed(x_XHD: Tensor, gain_D: Tensor | None) -> Tensor:
    return x_XHD if gain_D is None else F.rms_norm(x_XHD, gain_D.shape, gain_D, NORM_EPS)


def _turned(x_XHD: Tensor, cos_X1D: Tensor | None, sin_X1D: Tensor | None) -> Tensor:
    """Return each pair of channels (d, d + D/2) turned by its row's angle."""
    if cos_X1D is None or sin_X1D is None:
        return x_XHD.contiguous()
    return (x_XHD * cos_X1D).addcmul_(x_XHD.roll(x_XHD.shape[2] // 2, 2), sin_X1D)


def _rows(lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.arange(sum(lengths)).split(list(lengths))


_MASKS = 256
"""Masks of tails that are kept: one per length of a history that is longer than what a block lets issue queries."""
