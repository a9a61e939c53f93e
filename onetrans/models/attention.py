"""Attention of OneTrans over right-aligned rectangles: masks, rotation by index and time, the two stages.

Stage I: S-tokens of a request attend to each other.  Stage II: the NS-tokens of
each candidate attend to their request's S-keys and to each other (paper
sections 3.3 and 3.4).

The kernel is ``scaled_dot_product_attention`` with an explicit mask, on every device: causal by age, so bottom-right
whatever the numbers of queries and keys.  On a CPU no other fused kernel has a gradient (``flex_attention`` and
``varlen_attn`` refuse), and this one takes a third of the time of a written-out softmax (benchmarks/results/model.md).
On CUDA the same call chooses among the kernels that take a mask; the two others were not measured there.

Shape suffixes: those of :mod:`onetrans.batch` and :mod:`onetrans.models.ragged`, and

    P  NS positions          Q  slots that issue queries
    H  heads, D  head width  A  rotation planes of a head, D / 2
    W  C * P, NS-tokens of one group
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onetrans.models.config import Attention, Position
from onetrans.models.ragged import Groups, Layout
from onetrans.models.rowwise import turn, written_out

_INDEX_BASE = 10_000.0
_SHORTEST_PERIOD_S = 60.0
_LONGEST_PERIOD_S = 365 * 86_400.0


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine by which the queries and keys of packed rows turn."""

    cos_XW: Tensor
    """Of each channel's angle; W is H * D on a CPU, where whole rows are multiplied, else D, the same for all heads."""
    sin_XW: Tensor
    """Likewise, negative in the first of two channels that turn together."""
    partner_W: Tensor
    """Channel that each channel turns with."""

    @classmethod
    def of(
        cls, position: Position, heads: int, head_dim: int, index_X: Tensor, time_X: Tensor, dtype: torch.dtype
    ) -> Rotation:
        """Return the rotation of rows with an ``index`` (tokens) and a ``time`` (microseconds since 1970)."""
        angle_XA = _angles(position, head_dim, index_X, time_X)
        cos_XA, sin_XA = angle_XA.cos().to(dtype), angle_XA.sin().to(dtype)
        wide = heads if cos_XA.device.type == "cpu" else 1
        channel_W = torch.arange(wide * head_dim, device=cos_XA.device)
        half = head_dim // 2
        partner_W = torch.where(channel_W % head_dim < half, channel_W + half, channel_W - half)
        return cls(cos_XA.repeat(1, 2 * wide), torch.cat((-sin_XA, sin_XA), dim=1).repeat(1, wide), partner_W)

    def __call__(self, x_XHD: Tensor) -> Tensor:
        """Turn each pair (d, d + D/2) of ``x`` (..., X, H, D) by its row's angles."""
        *_, heads, head_dim = x_XHD.shape
        if written_out(x_XHD, self.cos_XW):
            width = heads * head_dim
            cos_XW, sin_XW = self.cos_XW[:, :width], self.sin_XW[:, :width]
            return turn(x_XHD.flatten(-2), cos_XW, sin_XW, self.partner_W[:width]).view_as(x_XHD)
        half = head_dim // 2
        cos_X1A, sin_X1A = self.cos_XW[:, None, :half], self.sin_XW[:, None, half:head_dim]
        a, b = x_XHD.chunk(2, dim=-1)
        turned = torch.cat((a * cos_X1A - b * sin_X1A, b * cos_X1A + a * sin_X1A), dim=-1)
        return turned.to(x_XHD.dtype)

    def select(self, kept: Tensor) -> Rotation:
        """Return the rotation of some of the rows."""
        return Rotation(self.cos_XW.index_select(0, kept), self.sin_XW.index_select(0, kept), self.partner_W)


def _angles(position: Position, head_dim: int, index_X: Tensor, time_X: Tensor) -> Tensor:
    """Return angles in float64: a time in seconds needs 31 bits before the point."""
    planes = head_dim // 2
    by_time = planes // 2 if position == "rotary_time" else 0
    by_index = planes - by_time
    steps = torch.arange(by_index, device=index_X.device, dtype=torch.float64) / by_index
    angle_XA = index_X.double()[:, None] * _INDEX_BASE**-steps
    if by_time:
        steps = torch.arange(by_time, device=index_X.device, dtype=torch.float64) / max(by_time - 1, 1)
        period = _SHORTEST_PERIOD_S * (_LONGEST_PERIOD_S / _SHORTEST_PERIOD_S) ** steps
        turns_XA = (time_X.double()[:, None] * 1e-6) / period
        angle_XA = torch.cat((angle_XA, (turns_XA - turns_XA.floor()) * 2 * math.pi), dim=1)
    return angle_XA


def sequence_mask(queries: Layout, keys: Layout, attention: Attention, dtype: torch.dtype, window: int = 0) -> Tensor:
    """Return the additive mask (R, 1, Q, L) of stage I: 0 where a query sees a key, -inf elsewhere.

    Both rectangles end with the most recent token, so ages are compared, not slots: that is the bottom-right
    alignment a causal mask needs when fewer queries than keys are given.  An empty query slot sees the key slot
    of its own age, because a softmax over nothing is not a number; what it computes is dropped.
    A query sees the ``window`` tokens that end with itself; 0 stands for all.
    """
    device = keys.lengths_R.device
    age_Q1 = torch.arange(queries.width - 1, -1, -1, device=device)[:, None]
    age_L = torch.arange(keys.width - 1, -1, -1, device=device)
    seen_RQL = keys.real_RL[:, None, :]
    if attention == "causal":
        seen_RQL = seen_RQL & (age_L >= age_Q1)
    if window:
        seen_RQL = seen_RQL & (age_L < age_Q1 + window)
    return _additive(seen_RQL | (age_L == age_Q1), dtype)[:, None]


def candidate_mask(keys: Layout, groups: Groups, positions: int, attention: Attention, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (G, 1, W, L + W) of stage II over [S ; NS-tokens of the group's candidates].

    An NS-token sees all S-tokens of its request and, of its own candidate alone, the NS-tokens up to itself
    (all of them under full attention).
    """
    device = keys.lengths_R.device
    tokens = groups.size * positions
    token_W = torch.arange(tokens, device=device)
    candidate_W = token_W // positions
    seen_WW = candidate_W[:, None] == candidate_W
    if attention == "causal":
        seen_WW = seen_WW & (token_W <= token_W[:, None])
    real_GL = groups.of_request(keys.real_RL)
    return _additive(
        torch.cat(
            (
                real_GL[:, None, :].expand(-1, tokens, -1),
                seen_WW[None].expand(groups.count, -1, -1),
            ),
            dim=2,
        ),
        dtype,
    )[:, None]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def attend(q_BQHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask_BHQL: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(D) + mask) v as (B, Q, H * D).

    Keys and values may have fewer heads, each for a run of neighbouring query heads; the mask may have one head.
    """
    out_BHQD = F.scaled_dot_product_attention(
        q_BQHD.transpose(1, 2),
        k_BLHD.transpose(1, 2),
        v_BLHD.transpose(1, 2),
        attn_mask=mask_BHQL,
        enable_gqa=k_BLHD.shape[2] != q_BQHD.shape[2],
    )
    return out_BHQD.transpose(1, 2).flatten(2)


WINDOW_QUERIES = 64
"""Queries that look through their windows together, at least: fewer would be many calls of a kernel."""


def attend_within(q_RQHD: Tensor, k_RLHD: Tensor, v_RLHD: Tensor, mask_RHQL: Tensor, window: int) -> Tensor:
    """Return :func:`attend` of queries whose mask shows them no more than the ``window`` keys that end with their own.

    Queries and keys end with the most recent token.  Neighbouring queries are taken together, with the keys that any of
    them may see: time goes with Q * (window + :data:`WINDOW_QUERIES`) instead of Q * L.  A window of 0 is all.
    """
    queries, keys = q_RQHD.shape[1], k_RLHD.shape[1]
    together = max(window, WINDOW_QUERIES)
    if not window or queries <= together:
        return attend(q_RQHD, k_RLHD, v_RLHD, mask_RHQL)
    before = keys - queries
    parts = []
    for start in range(0, queries, together):
        end = min(start + together, queries)
        first, last = max(start + before - window + 1, 0), end + before
        parts.append(
            attend(
                q_RQHD[:, start:end],
                k_RLHD[:, first:last],
                v_RLHD[:, first:last],
                mask_RHQL[:, :, start:end, first:last],
            )
        )
    return torch.cat(parts, dim=1)
