"""The packed batch: requests with their candidates and past events, values and offsets, no padding.

Shape suffixes used here and in every module that takes a batch:

    R  requests            N  candidates of all requests     E  events of all requests
    U  user features       K  context features               I  item features
    V  event features      O  R + 1 offsets
    X  numbers of all vector features of that side, end to end in schema order

A request's rows are ``offsets[r] : offsets[r + 1]``.  Feature values are rows of
embedding tables (row 0 is "missing"), in the order of the schema's features of
that side.  A vector feature's row says whether it is there; its numbers lie in a
tensor of their own, scaled to a mean square of 1, zeros where it is missing.
Events of all behaviour sequences are merged, oldest first, ordered by (time,
position of the sequence in the schema); the last event of a request is its most
recent one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RequestBatch:
    """One batch of whole requests; all tensors on one device."""

    user_RU: Tensor
    """int64, embedding rows of user features."""
    context_RK: Tensor
    """int64, embedding rows of context features."""
    item_NI: Tensor
    """int64, embedding rows of candidate features."""
    candidate_offsets_O: Tensor
    """int64, first candidate of each request, and N."""
    event_EV: Tensor
    """int64, embedding rows of event features."""
    event_sequence_E: Tensor
    """int64, which of the schema's sequences an event belongs to."""
    event_time_E: Tensor
    """int64, microseconds since 1970-01-01 UTC."""
    event_offsets_O: Tensor
    """int64, first event of each request, and E."""
    request_time_R: Tensor
    """int64, microseconds since 1970-01-01 UTC."""
    click_N: Tensor
    """float32, 0 or 1."""
    conversion_N: Tensor
    """float32, 0 or 1; counted only where clicked."""
    user_vector_RX: Tensor | None = None
    """float32, vector features of the user; None if the schema has none."""
    context_vector_RX: Tensor | None = None
    """float32, vector features of the context; None if the schema has none."""
    item_vector_NX: Tensor | None = None
    """float32, vector features of the candidate; None if the schema has none."""

    @property
    def num_requests(self) -> int:
        """R."""
        return self.user_RU.shape[0]

    @property
    def num_candidates(self) -> int:
        """N, the impressions in this batch."""
        return self.item_NI.shape[0]

    @property
    def num_events(self) -> int:
        """E."""
        return self.event_EV.shape[0]

    @property
    def candidate_request_N(self) -> Tensor:
        """int64, the request of each candidate."""
        return _owners(self.candidate_offsets_O, self.num_candidates)

    @property
    def event_request_E(self) -> Tensor:
        """int64, the request of each event."""
        return _owners(self.event_offsets_O, self.num_events)

    def to(self, device: torch.device | str) -> RequestBatch:
        """Return the batch on another device."""
        moved: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            tensor = getattr(self, name)
            moved[name] = None if tensor is None else tensor.to(device, non_blocking=True)
        return RequestBatch(**moved)

    def select(self, requests: Tensor) -> RequestBatch:
        """Return a batch of some requests, each whole, in the order given (int64 numbers of requests)."""
        candidate, candidate_offsets_O = packed_rows(self.candidate_offsets_O, requests)
        event, event_offsets_O = packed_rows(self.event_offsets_O, requests)

        def rows(vectors: Tensor | None, chosen: Tensor) -> Tensor | None:
            return None if vectors is None else vectors[chosen]

        return RequestBatch(
            user_RU=self.user_RU[requests],
            context_RK=self.context_RK[requests],
            item_NI=self.item_NI[candidate],
            candidate_offsets_O=candidate_offsets_O,
            event_EV=self.event_EV[event],
            event_sequence_E=self.event_sequence_E[event],
            event_time_E=self.event_time_E[event],
            event_offsets_O=event_offsets_O,
            request_time_R=self.request_time_R[requests],
            click_N=self.click_N[candidate],
            conversion_N=self.conversion_N[candidate],
            user_vector_RX=rows(self.user_vector_RX, requests),
            context_vector_RX=rows(self.context_vector_RX, requests),
            item_vector_NX=rows(self.item_vector_NX, candidate),
        )

    @classmethod
    def join(cls, batches: Sequence[RequestBatch]) -> RequestBatch:
        """Return the requests of batches of one schema as one batch, in their order."""
        if len(batches) == 1:
            return batches[0]
        joined: dict[str, Any] = {}
        for name in (f.name for f in fields(cls)):
            tensors = [getattr(batch, name) for batch in batches]
            if tensors[0] is None:
                continue
            if name in ("candidate_offsets_O", "event_offsets_O"):
                lengths_R = torch.cat([offsets_O.diff() for offsets_O in tensors])
                joined[name] = torch.cat((lengths_R.new_zeros(1), lengths_R.cumsum(0)))
            else:
                joined[name] = torch.cat(tensors)
        return cls(**joined)

    def check(self) -> None:
        """Refuse a batch whose parts do not fit together.

        Raises:
            ValueError: naming the part and the sizes.
        """
        sizes = {
            "context_RK": (self.context_RK.shape[0], self.num_requests),
            "request_time_R": (self.request_time_R.shape[0], self.num_requests),
            "candidate_offsets_O": (self.candidate_offsets_O.shape[0], self.num_requests + 1),
            "event_offsets_O": (self.event_offsets_O.shape[0], self.num_requests + 1),
            "click_N": (self.click_N.shape[0], self.num_candidates),
            "conversion_N": (self.conversion_N.shape[0], self.num_candidates),
            "event_sequence_E": (self.event_sequence_E.shape[0], self.num_events),
            "event_time_E": (self.event_time_E.shape[0], self.num_events),
            "last candidate offset": (int(self.candidate_offsets_O[-1]), self.num_candidates),
            "last event offset": (int(self.event_offsets_O[-1]), self.num_events),
        }
        for name, rows in (
            ("user_vector_RX", self.num_requests),
            ("context_vector_RX", self.num_requests),
            ("item_vector_NX", self.num_candidates),
        ):
            vectors = getattr(self, name)
            if vectors is not None:
                sizes[name] = (vectors.shape[0], rows)
        for name, (got, expected) in sizes.items():
            if got != expected:
                raise ValueError(f"batch: {name} is {got}, expected {expected}")


def _owners(offsets_O: Tensor, total: int) -> Tensor:
    lengths = offsets_O[1:] - offsets_O[:-1]
    return torch.repeat_interleave(torch.arange(lengths.shape[0], device=offsets_O.device), lengths, output_size=total)


def packed_rows(offsets_O: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
    """Return the packed rows of some requests, in their order, and the offsets among these rows."""
    lengths = (offsets_O[1:] - offsets_O[:-1])[requests]
    ends = lengths.cumsum(0)
    chosen = torch.cat((ends.new_zeros(1), ends))
    total = int(chosen[-1])
    shift = torch.repeat_interleave(offsets_O[:-1][requests] - chosen[:-1], lengths, output_size=total)
    return torch.arange(total, device=offsets_O.device) + shift, chosen
