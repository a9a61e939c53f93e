"""A learned attention bias by how many events and how many seconds lie between a query and a key.

Not in the paper; HSTU (arXiv 2402.17152) adds such a bias to its scores.  Each
head of each block has one table over log-scaled buckets of events and one over
buckets of seconds.  A bias reads differences alone and is added to the scores, so
the keys that were computed for a user stay valid when events are appended.

How the tables start is decided in :mod:`onetrans.models.config`.

Shape suffixes: those of :mod:`onetrans.batch` and :mod:`onetrans.models.ragged`, and

    B  requests, or groups of candidates     Q  slots that issue queries     H  heads
    K  buckets                               Y  keys: S-tokens, then NS-tokens of the group
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetrans.models.ragged import Groups, Layout

RANK_BUCKETS = 32
"""The last one begins at 2**15 tokens."""
TIME_BUCKETS = 52
"""The last one begins at 2**25 seconds, 388 days."""

_MICROSECONDS = 1_000_000


def bucket_starts(buckets: int) -> list[int]:
    """Return where buckets 1, 2, ... begin: bucket b holds 2**((b - 1) / 2) <= x < 2**(b / 2), bucket 0 holds x = 0.

    Whole numbers, so that a difference falls into the same bucket on every device.  Bucket 2 is empty.
    """
    squares = [2**b for b in range(buckets - 1)]
    return [isqrt(square) + (isqrt(square) ** 2 < square) for square in squares]


@dataclass(frozen=True)
class Distances:
    """Buckets of what lies between queries and keys; shared by all blocks that see the same tokens."""

    rank_QY: Tensor
    """Bucket of the difference of indices."""
    time_BQY: Tensor
    """Bucket of the difference of times."""

    @classmethod
    def of_sequences(cls, queries: Layout, keys: Layout, query_time_T: Tensor, key_time_T: Tensor) -> Distances:
        """Return those of stage I, between S-tokens.

        Where a key comes after its query (full attention, or [SEP] in time), the size of the difference counts.
        """
        age_Q = torch.arange(queries.width - 1, -1, -1, device=key_time_T.device)
        age_L = torch.arange(keys.width - 1, -1, -1, device=key_time_T.device)
        time_RQ, time_RL = _pad(queries, query_time_T), _pad(keys, key_time_T)
        return cls(
            _bucket((age_L - age_Q[:, None]).abs(), RANK_BUCKETS),
            _bucket((time_RQ[:, :, None] - time_RL[:, None, :]).abs(), TIME_BUCKETS, _MICROSECONDS),
        )

    @classmethod
    def of_candidates(
        cls, keys: Layout, groups: Groups, key_time_T: Tensor, request_time_R: Tensor, positions: int
    ) -> Distances:
        """Return those of stage II; all NS-tokens stand at one place, so one query slot stands for all of them."""
        age_L = torch.arange(keys.width - 1, -1, -1, device=key_time_T.device)
        time_RL = (request_time_R[:, None] - _pad(keys, key_time_T)).abs()
        own = groups.size * positions
        return cls(
            F.pad(_bucket(age_L + 1, RANK_BUCKETS), (0, own))[None],
            F.pad(groups.of_request(_bucket(time_RL, TIME_BUCKETS, _MICROSECONDS)), (0, own))[:, None],
        )


def _pad(layout: Layout, time_T: Tensor) -> Tensor:
    return layout.pad(time_T[:, None]).squeeze(-1)


def _bucket(x: Tensor, buckets: int, unit: int = 1) -> Tensor:
    starts = torch.tensor(bucket_starts(buckets), device=x.device) * unit
    return torch.bucketize(x, starts, right=True)


class RelativeBias(nn.Module):
    """The tables of one block."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        slope_H = 0.5 ** torch.arange(heads)
        steps_K = (torch.arange(RANK_BUCKETS) - 1).clamp(min=0)
        self.rank_KH = nn.Parameter(-steps_K[:, None] * slope_H)
        self.time_KH = nn.Parameter(torch.zeros(TIME_BUCKETS, heads))

    def forward(self, distances: Distances) -> Tensor:
        """Return what is added to the scores, (B, H, Q, Y)."""
        rank_QYH = F.embedding(distances.rank_QY, self.rank_KH)
        time_BQYH = F.embedding(distances.time_BQY, self.time_KH)
        return (rank_QYH + time_BQYH).permute(0, 3, 1, 2)
