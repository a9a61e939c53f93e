"""Uneven lengths without loops: how packed events and candidates are laid out for attention.

Linear layers run on packed rows, where nothing is wasted.  Only attention needs
a rectangle.  There events stand *right-aligned*: the last slot of a request is
its most recent event, so "the last n slots" is the tail that the pyramid keeps.
Requests of similar length share a rectangle (:func:`bands`), and candidates stand
in groups of a few, each group of one request (:class:`Groups`): both are chosen by
what padding costs and what a further kernel call costs.

Shape suffixes: those of :mod:`onetrans.batch`, and

    T  packed tokens (events) of all requests     L  slots of one request
    G  groups of candidates                       C  slots of one group
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onetrans.batch import RequestBatch
from onetrans.models.rowwise import from_slots, to_slots


@dataclass(frozen=True)
class Layout:
    """Where the packed tokens of each request stand in an (R, L) rectangle, right-aligned."""

    lengths_R: Tensor
    """Tokens of each request; may be 0."""
    request_T: Tensor
    """Request of each token."""
    age_T: Tensor
    """Tokens of the same request that come after this one; 0 for the most recent."""
    slot_T: Tensor
    """Slot of each token in the flattened rectangle."""
    token_K: Tensor
    """Token that stands in each of the K = R * L slots; some token where the slot is empty."""
    width: int
    """L, the longest request of the batch."""

    @classmethod
    def of(cls, lengths_R: Tensor) -> Layout:
        """Return the layout of packed tokens, request after request, oldest first."""
        total = int(lengths_R.sum())
        width = int(lengths_R.max()) if lengths_R.numel() else 0
        request_T = torch.repeat_interleave(
            torch.arange(lengths_R.shape[0], device=lengths_R.device), lengths_R, output_size=total
        )
        end_R = lengths_R.cumsum(0)
        age_T = end_R[request_T] - 1 - torch.arange(total, device=lengths_R.device)
        age_L = torch.arange(width - 1, -1, -1, device=lengths_R.device)
        # An empty slot repeats its request's oldest token, or that of a neighbour where the request has none.
        oldest_R = (end_R - lengths_R).clamp(max=max(total - 1, 0))
        token_RL = torch.maximum(end_R[:, None] - 1 - age_L, oldest_R[:, None])
        return cls(lengths_R, request_T, age_T, request_T * width + (width - 1 - age_T), token_RL.flatten(), width)

    @property
    def index_T(self) -> Tensor:
        """Tokens of the same request that come before this one; 0 for the oldest."""
        return self.lengths_R[self.request_T] - 1 - self.age_T

    @property
    def real_RL(self) -> Tensor:
        """Which slots hold a token."""
        age_L = torch.arange(self.width - 1, -1, -1, device=self.lengths_R.device)
        return age_L < self.lengths_R[:, None]

    def pad(self, x_TF: Tensor) -> Tensor:
        """Return (R, L, F); an empty slot repeats some token, and must be given no weight by who reads it."""
        x_KF = to_slots(x_TF, self.token_K, self.slot_T)
        return x_KF.view(self.lengths_R.shape[0], self.width, x_TF.shape[1])

    def unpad(self, x_RLF: Tensor) -> Tensor:
        """Return the packed rows (T, F): the inverse of :meth:`pad`."""
        return from_slots(x_RLF.reshape(-1, x_RLF.shape[-1]), self.slot_T)

    def tail(self, limit: int) -> tuple[Layout, Tensor | None]:
        """Return the layout of each request's last ``limit`` tokens, and which tokens those are.

        None stands for all of them: then the layout is this very object.
        """
        if limit >= self.width:
            return self, None
        kept = (self.age_T < limit).nonzero().squeeze(1)
        return Layout.of(self.lengths_R.clamp(max=limit)), kept


@dataclass(frozen=True)
class Groups:
    """Candidates in groups of at most C, each group of one request, as a (G, C) rectangle."""

    request_G: Tensor | None
    """Request of each group; None when group r is all of request r."""
    slot_N: Tensor | None
    """Slot of each candidate in the flattened rectangle; None when candidates fill it in order."""
    candidate_K: Tensor | None
    """Candidate that stands in each of the K = G * C slots, some candidate where it is empty; None likewise."""
    count: int
    """G."""
    size: int
    """C."""

    @classmethod
    def of(cls, offsets_O: Tensor, price: Callable[[Tensor], Tensor]) -> Groups:
        """Group the candidates of a batch by the size at which all groups together cost least.

        ``price`` returns what one group of a size costs, for several sizes at once.  One large request must
        not widen the rectangle for all others, and each group of a request copies its keys.
        """
        counts_R = offsets_O[1:] - offsets_O[:-1]
        largest = int(counts_R.max()) if counts_R.numel() else 0
        if largest == 0:
            return cls(None, offsets_O.new_zeros(0), offsets_O.new_zeros(0), counts_R.shape[0], 1)
        mean = -(-int(offsets_O[-1]) // counts_R.shape[0])
        likely = (mean // 4, mean // 2, mean, mean * 3 // 2, mean * 2, largest, *(2**k for k in range(8)))
        sizes = torch.tensor(sorted({min(max(size, 1), largest) for size in likely}), device=counts_R.device)
        needed = ((counts_R[:, None] + sizes - 1) // sizes).sum(0)
        size = int(sizes[(needed * price(sizes)).argmin()])
        groups_R = (counts_R + size - 1) // size
        total = int(offsets_O[-1])
        one_each = size == largest
        if one_each and total == counts_R.shape[0] * size:
            return cls(None, None, None, counts_R.shape[0], size)
        if one_each:
            groups_R = torch.ones_like(groups_R)
        count = int(groups_R.sum())
        requests_R = torch.arange(counts_R.shape[0], device=offsets_O.device)
        first_R = groups_R.cumsum(0) - groups_R
        request_N = torch.repeat_interleave(requests_R, counts_R, output_size=total)
        place_N = torch.arange(total, device=offsets_O.device) - offsets_O[request_N]
        request_G = torch.repeat_interleave(requests_R, groups_R, output_size=count)
        start_G = (torch.arange(count, device=offsets_O.device) - first_R[request_G]) * size + offsets_O[request_G]
        # An empty slot repeats its request's last candidate, or that of a neighbour where the request has none.
        last_G = (offsets_O[1:][request_G] - 1).clamp(min=0)
        candidate_GC = torch.minimum(start_G[:, None] + torch.arange(size, device=offsets_O.device), last_G[:, None])
        return cls(
            None if one_each else request_G,
            first_R[request_N] * size + place_N,
            candidate_GC.flatten(),
            count,
            size,
        )

    def pad(self, x_NF: Tensor) -> Tensor:
        """Return (G, C, F); an empty slot repeats some candidate, and nothing that counts may read it."""
        if not x_NF.shape[0]:
            return x_NF.new_zeros(self.count, self.size, x_NF.shape[1])
        if self.slot_N is not None and self.candidate_K is not None:
            x_NF = to_slots(x_NF, self.candidate_K, self.slot_N)
        return x_NF.reshape(self.count, self.size, x_NF.shape[1])

    def unpad(self, x_GCF: Tensor) -> Tensor:
        """Return (N, F): the inverse of :meth:`pad`."""
        flat = x_GCF.reshape(self.count * self.size, x_GCF.shape[-1])
        return flat if self.slot_N is None else from_slots(flat, self.slot_N)

    def places_of_keys(self, layout: Layout, positions: int, candidates: int) -> tuple[Tensor, Tensor | None]:
        """Return where the keys of each group stand: first its request's S-tokens, then its candidates' NS-tokens.

        Tokens are counted S-tokens first, packed, then NS-tokens position after position, each for all candidates.
        The first tensor is the token in each of the G * (L + C * P) slots, the second the slot of each token; None if
        there are groups that share a request.
        """
        device, tokens = layout.slot_T.device, layout.slot_T.shape[0]
        if not candidates:
            return torch.zeros(0, dtype=torch.int64, device=device), None
        position_P = torch.arange(positions, device=device)
        in_order = torch.arange(self.count * self.size, device=device)
        candidate_K = in_order if self.candidate_K is None else self.candidate_K
        ns_KP = tokens + position_P * candidates + candidate_K.clamp(max=max(candidates - 1, 0))[:, None]
        token_RL = layout.token_K.view(layout.lengths_R.shape[0], layout.width)
        token_GL = token_RL if self.request_G is None else token_RL.index_select(0, self.request_G)
        row_K = torch.cat((token_GL, ns_KP.view(self.count, self.size * positions)), dim=1).flatten()
        if self.request_G is not None:
            return row_K, None
        own = self.size * positions
        s_T = layout.slot_T + layout.request_T * own
        slot_N = in_order if self.slot_N is None else self.slot_N
        group_N = slot_N // self.size
        ns_N = group_N * (layout.width + own) + layout.width + (slot_N - group_N * self.size) * positions
        return row_K, torch.cat((s_T, (ns_N + position_P[:, None]).flatten()))

    def of_request(self, x_R: Tensor) -> Tensor:
        """Return a request's rows for each group, (G, ...)."""
        return x_R if self.request_G is None else x_R.index_select(0, self.request_G)


def bands(lengths: Sequence[int], asking: float, call: float) -> list[list[int]]:
    """Divide requests into bands of similar length, each to be padded to its own longest; longest band first.

    The division with the least cost is taken among those whose borders are half doublings apart.  A band of n
    requests up to L long costs ``n * L * (L + asking) + call`` pairs of query and key: ``asking`` is the mean
    number of NS-tokens of a request, ``call`` what the further kernel calls of a band cost.
    """
    classes: dict[int, list[int]] = {}
    for request in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        half_doublings = math.ceil(2 * math.log2(max(lengths[request], 1)))
        classes.setdefault(half_doublings, []).append(request)
    parts = list(classes.values())
    # best[i]: least cost of the classes from the i-th on, and where their first band ends.
    best: list[tuple[float, int]] = [(0.0, 0)] * (len(parts) + 1)
    for start in reversed(range(len(parts))):
        longest, requests, found = lengths[parts[start][0]], 0, []
        for stop in range(start + 1, len(parts) + 1):
            requests += len(parts[stop - 1])
            found.append((requests * longest * (longest + asking) + call + best[stop][0], stop))
        best[start] = min(found)
    divided, start = [], 0
    while start < len(parts):
        stop = best[start][1]
        divided.append([request for part in parts[start:stop] for request in part])
        start = stop
    return divided


@dataclass(frozen=True)
class Distinct:
    """Rows that occur several times, once each."""

    row_U: Tensor
    """One place of each of the U distinct rows."""
    place_X: Tensor
    """Distinct row that each row is."""

    @classmethod
    def of(cls, rows_XF: Tensor) -> Distinct | None:
        """Return the distinct rows of whole numbers; None where there are not few enough to be worth it.

        Rows are told apart by a number computed from them, and compared number by number afterwards.
        """
        if rows_XF.shape[0] < _WORTH_COMPARING:
            return None
        factors = torch.tensor([_MIX**power % 2**63 for power in range(1, rows_XF.shape[1] + 1)], device=rows_XF.device)
        mixed_X = (rows_XF * factors).sum(1)
        _, place_X = torch.unique(mixed_X, return_inverse=True)
        number_X = torch.arange(place_X.shape[0], device=place_X.device)
        distinct = int(place_X.max()) + 1
        if distinct > _FEW * place_X.shape[0]:
            return None
        # Whichever of the equal rows is written last stands for all of them.
        row_U = number_X.new_empty(distinct).index_copy_(0, place_X, number_X)
        if not torch.equal(rows_XF.index_select(0, row_U).index_select(0, place_X), rows_XF):
            return None
        return cls(row_U, place_X)


_MIX = 0x9E3779B97F4A7C15
"""An odd number near 2**64 over the golden ratio: its powers spread rows over all 64-bit numbers."""

_WORTH_COMPARING = 1024
"""Rows below which finding out costs more than it can save."""

_FEW = 0.7
"""Share of distinct rows up to which computing each once pays (measured on a CPU)."""


def latest_events(batch: RequestBatch, limit: int) -> RequestBatch:
    """Return the batch with each request's most recent ``limit`` events, all sequences together."""
    lengths_R = batch.event_offsets_O[1:] - batch.event_offsets_O[:-1]
    layout, kept = Layout.of(lengths_R).tail(limit)
    if kept is None:
        return batch
    offsets_O = torch.zeros_like(batch.event_offsets_O)
    offsets_O[1:] = layout.lengths_R.cumsum(0)
    return replace(
        batch,
        event_EV=batch.event_EV[kept],
        event_sequence_E=batch.event_sequence_E[kept],
        event_time_E=batch.event_time_E[kept],
        event_offsets_O=offsets_O,
    )
