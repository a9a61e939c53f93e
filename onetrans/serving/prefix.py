"""A user's side of a request, kept between requests: keys and values of the past events, reused where that is exact.

Stage I reads the events of a request and nothing else of it, so two requests with the same latest
``max_seq_len`` events have the same keys and values.  Under a causal mask those of an event depend on the events
before it alone, so they also stay when events are appended, if each block still sees the same first token:

* *Truncation.*  Once a history is longer than ``max_seq_len``, an appended event pushes the oldest one out, which
  every later token had read: nothing but the first block's own input stays the same.
* *Pyramid.*  Block b sees the last ``q(b-1)`` tokens.  If an appended event pushes a token out of what block b sees,
  the outputs of block b change for all tokens.  Only the top block may lose its oldest keys: its outputs for
  S-tokens are not read (``top_block = "ns_only"``).
* *Position.*  ``rotary``, ``rotary_time``, ``none`` and the relative bias look at differences or at nothing, so a key
  stays as it is.  ``learned`` adds a vector per index, which stays too, but is left to whole encoding.
* *Order.*  With ``merge = "intent_ordered"`` an appended event lands between others; with ``separators`` the [SEP]
  tokens carry the time of the request, so not even an equal history has equal keys.
* *Mask.*  With ``attention = "full"`` older tokens see the new ones.

So a history that is equal is always reused (but with separators), and a history of which the kept one is a prefix is
extended if :func:`appendable` says so.  Everything else is encoded whole.  What was kept is compared event by event
before it is used, or by a cryptographic digest of the text all events came in, so a wrong user id costs time, never a
wrong score.

Shape suffixes: those of :mod:`onetrans.batch` and :mod:`onetrans.models.ragged`, and

    H  heads of keys and values     D  head width     M  token width     A  slots of appended events
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onetrans.batch import RequestBatch
from onetrans.models.attention import sequence_mask
from onetrans.models.config import OneTransConfig
from onetrans.models.onetrans import Block, BlockCache, OneTrans, RequestState
from onetrans.models.ragged import Layout
from onetrans.models.relative_bias import Distances


@dataclass(frozen=True)
class UserState:
    """What stage I computed for one user's events."""

    events_EW: Tensor
    """The events it was computed from: embedding rows, sequence and time (int64)."""
    keys_LHD: tuple[Tensor, ...]
    """Keys of each block's S-tokens, rotated."""
    values_LHD: tuple[Tensor, ...]
    """Values likewise."""
    times_L: tuple[Tensor, ...]
    """Times of each block's S-tokens."""
    top_M: Tensor | None
    """Mean of the S-states that leave the top block; None where none leave it."""
    digest: bytes | None = None
    """Digest of the text the events were read from; the same text need not be read again."""

    @property
    def latest_us(self) -> int:
        """Time of the latest event, 0 without one; microseconds since 1970-01-01 UTC."""
        return int(self.events_EW[-1, -1]) if self.events_EW.shape[0] else 0

    def kept(self, digest: bytes | None) -> UserState:
        """Return a state to keep: its tensors are views of nothing larger."""
        copies = {id(t): t.clone() for t in (self.events_EW, *self.keys_LHD, *self.values_LHD, *self.times_L)}

        def all_of(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(copies[id(tensor)] for tensor in tensors)

        top_M = None if self.top_M is None else self.top_M.clone()
        lists = all_of(self.keys_LHD), all_of(self.values_LHD), all_of(self.times_L)
        return UserState(copies[id(self.events_EW)], *lists, top_M, digest)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; one that is shared by blocks counts once."""
        tensors = {id(t): t for t in (self.events_EW, *self.keys_LHD, *self.values_LHD, *self.times_L)}
        top = 0 if self.top_M is None else self.top_M.nbytes
        return top + sum(tensor.nbytes for tensor in tensors.values())


def event_table(batch: RequestBatch) -> Tensor:
    """Return what decides stage I, a row per event (E, V + 2): embedding rows, sequence and time."""
    return torch.cat((batch.event_EV, batch.event_sequence_E[:, None], batch.event_time_E[:, None]), dim=1)


def reusable(config: OneTransConfig) -> bool:
    """Tell whether the keys of equal events are equal, whenever they are asked for."""
    return not config.separators


def longest_appendable(config: OneTransConfig) -> int:
    """Return the longest history, appended events included, whose older keys stay valid; 0 if appending never is."""
    if (
        config.merge != "time_ordered"
        or config.attention != "causal"
        or config.position == "learned"
        or config.top_block != "ns_only"
    ):
        return 0
    # The blocks whose outputs are kept are all but the top one; block b sees the last q(b-1) tokens.
    seen = (config.max_seq_len, *config.query_schedule())[: max(config.num_layers - 1, 1)]
    return min(seen)


def appendable(config: OneTransConfig, kept_EW: Tensor, events_EW: Tensor) -> int:
    """Return how many events of ``kept`` can be reused for ``events``: all of them, or 0 for encoding whole."""
    kept, wanted = kept_EW.shape[0], events_EW.shape[0]
    if not 0 < kept < wanted <= longest_appendable(config):
        return 0
    if wanted - kept > min((queries for queries in config.query_schedule() if queries), default=wanted):
        return 0
    return kept if torch.equal(kept_EW, events_EW[:kept]) else 0


def split(state: RequestState, events_EW: Tensor, event_offsets_O: Tensor) -> list[UserState]:
    """Return the state of each request by itself; its tensors are views."""
    offsets = event_offsets_O.tolist()
    lengths = [layout.lengths_R.tolist() for layout in state.layouts]
    starts = [_starts(of_block) for of_block in lengths]
    users = []
    for request in range(len(offsets) - 1):
        keys, values = [], []
        times: list[Tensor] = []
        for number, (block, layout) in enumerate(zip(state.blocks, state.layouts, strict=True)):
            own = slice(starts[number][request], starts[number][request] + lengths[number][request])
            keys.append(block.k_THD[own])
            values.append(block.v_THD[own])
            same = number and layout is state.layouts[number - 1]
            times.append(times[-1] if same else state.times[number][own])
        users.append(
            UserState(
                events_EW[offsets[request] : offsets[request + 1]],
                tuple(keys),
                tuple(values),
                tuple(times),
                None if state.top_RM is None else state.top_RM[request],
            )
        )
    return users


def join(users: Sequence[UserState]) -> RequestState:
    """Return the state of several requests as the model takes it: the inverse of :func:`split`."""
    blocks: list[BlockCache] = []
    layouts: list[Layout] = []
    times: list[Tensor] = []
    for number in range(len(users[0].keys_LHD)):
        lengths = [user.keys_LHD[number].shape[0] for user in users]
        keys = [user.keys_LHD[number] for user in users]
        values = [user.values_LHD[number] for user in users]
        device = keys[0].device
        same = bool(layouts) and layouts[-1].lengths_R.tolist() == lengths
        layouts.append(layouts[-1] if same else Layout.of(torch.tensor(lengths, device=device)))
        blocks.append(BlockCache(torch.cat(keys), torch.cat(values)))
        times.append(times[-1] if same else torch.cat([user.times_L[number] for user in users]))
    tops = [user.top_M for user in users if user.top_M is not None]
    return RequestState(tuple(blocks), tuple(layouts), tuple(times), torch.stack(tops) if tops else None)


def extend(model: OneTrans, kept: Sequence[UserState], batch: RequestBatch, events_EW: Tensor) -> list[UserState]:
    """Return the state of requests whose first events are those of ``kept``, computing the appended ones alone.

    ``batch`` holds the requests, truncated as the model does, in the order of ``kept``; ``events_EW`` is its
    :func:`event_table`.  The caller has asked :func:`appendable`.
    """
    device = batch.event_time_E.device
    begins, ends = batch.event_offsets_O[:-1], batch.event_offsets_O[1:]
    old_R = torch.tensor([user.events_EW.shape[0] for user in kept], device=device)
    appended = Layout.of(ends - begins - old_R)
    row_T = appended.index_T + (begins + old_R)[appended.request_T]
    new = _events_of(batch, row_T, appended.lengths_R)
    x_TM, time_T, _ = model.s_tokenizer(model.embeddings, new)
    rotation = model._rotation(appended.index_T + old_R[appended.request_T], time_T)
    time_R = time_T.split(appended.lengths_R.tolist())
    keys: list[list[Tensor]] = [[] for _ in kept]
    values: list[list[Tensor]] = [[] for _ in kept]
    times: list[list[Tensor]] = [[] for _ in kept]
    visible = model.config.max_seq_len
    layout: Layout | None = None
    for number, (module, queries) in enumerate(zip(model.blocks, model.schedule, strict=True)):
        assert isinstance(module, Block)
        normed_TM, of_new = module.encode_keys(x_TM, rotation)
        fresh = zip(*(of_all.split(appended.lengths_R.tolist()) for of_all in of_new), strict=True)
        for request, (user, (k_AHD, v_AHD)) in enumerate(zip(kept, fresh, strict=True)):
            past = max(min(user.keys_LHD[number].shape[0], visible - k_AHD.shape[0]), 0)
            old = slice(user.keys_LHD[number].shape[0] - past, None)
            keys[request].append(torch.cat((user.keys_LHD[number][old], k_AHD)))
            values[request].append(torch.cat((user.values_LHD[number][old], v_AHD)))
            unchanged = number and keys[request][-2].shape[0] == keys[request][-1].shape[0]
            times[request].append(
                times[request][-1] if unchanged else torch.cat((user.times_L[number][old], time_R[request]))
            )
        if not queries:
            break
        lengths = [of_request[-1].shape[0] for of_request in keys]
        if layout is None or layout.lengths_R.tolist() != lengths:
            layout = Layout.of(torch.tensor(lengths, device=device))
            mask = sequence_mask(appended, layout, "causal", x_TM.dtype, model.config.sliding_window)
        biased = mask
        if module.bias is not None:
            seen = torch.cat([of_request[-1] for of_request in times])
            biased = mask + module.bias(Distances.of_sequences(appended, layout, time_T, seen))
        seen_keys = BlockCache(torch.cat([k[-1] for k in keys]), torch.cat([v[-1] for v in values]))
        x_TM = module.encode_s(x_TM, normed_TM, seen_keys, appended, layout, biased, rotation)
        visible = queries
    offsets = batch.event_offsets_O.tolist()
    return [
        UserState(events_EW[start:stop], tuple(k), tuple(v), tuple(t), None)
        for start, stop, k, v, t in zip(offsets, offsets[1:], keys, values, times, strict=False)
    ]


def _events_of(batch: RequestBatch, row_T: Tensor, lengths_R: Tensor) -> RequestBatch:
    """Return a batch with some of the events alone; it has everything the tokenizer of events reads."""
    offsets_O = torch.zeros_like(batch.event_offsets_O)
    offsets_O[1:] = lengths_R.cumsum(0)
    return replace(
        batch,
        event_EV=batch.event_EV[row_T],
        event_sequence_E=batch.event_sequence_E[row_T],
        event_time_E=batch.event_time_E[row_T],
        event_offsets_O=offsets_O,
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts
