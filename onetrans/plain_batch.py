"""Requests in plain data straight to a packed batch, without Arrow in between: what a service does with every call.

This is the short way for requests in which nothing is unusual.  Whatever it does not take, valid or not, raises
:class:`UnusualError` and is left to the way through rows (:mod:`onetrans.requests`), which names what does not fit.
Both give the same batch.

Shape suffixes: those of :mod:`onetrans.batch`, and

    C  values of one column     F  features of one side
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from operator import itemgetter
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from onetrans.batch import RequestBatch
from onetrans.errors import BadDataError
from onetrans.schema import HASH_SEED, Feature, FeatureSchema

EARLIEST_US, LATEST_US = 31_536_000 * 10**6, 2**53
"""Times that are taken, in microseconds: from 1971 on, so a time in seconds or milliseconds is not; below what a JSON
reader may hold in a double."""

_UINT64 = (1 << 64) - 1
_SHORTEST_INT64, _LONGEST_INT64 = -(2**63), 2**63 - 1

Ints = npt.NDArray[np.int64]


class UnusualError(Exception):
    """The requests hold something that is left to the way through rows."""


class _Columns:
    """How the values of one side become embedding rows."""

    def __init__(self, features: tuple[Feature, ...], also: str = "") -> None:
        self.features, self.also = features, int(bool(also))
        names = [*([also] if also else []), *(feature.name for feature in features)]
        self._get = itemgetter(*names) if len(names) > 1 else lambda given: tuple(given[name] for name in names)
        self._hashed = [n for n, f in enumerate(features) if f.kind == "hashed"]
        self._sizes_F1 = np.array([[features[n].hash_size] for n in self._hashed], dtype=np.int64)
        self._bucketized = [n for n, f in enumerate(features) if f.kind == "bucketized"]
        self._boundaries = [np.asarray(features[n].boundaries, dtype=np.float64) for n in self._bucketized]
        self._vectors = [n for n, f in enumerate(features) if f.kind == "vector"]

    def __call__(self, given: Sequence[Mapping[str, Any]]) -> tuple[Ints, Tensor | None, Sequence[Any]]:
        """Return rows (C, F), numbers of vectors (C, X), and the values of the field beside the features."""
        count, width = len(given), len(self.features) + self.also
        if not set(map(len, given)) <= {width}:
            raise UnusualError
        columns = list(zip(*map(self._get, given), strict=True)) if count else [()] * width
        of_features = columns[self.also :]
        rows_FC = np.empty((len(self.features), count), dtype=np.int64)
        if self._hashed:
            rows_FC[self._hashed] = self._hashed_rows([of_features[n] for n in self._hashed], count)
        if self._bucketized:
            rows_FC[self._bucketized] = self._bucketized_rows([of_features[n] for n in self._bucketized])
        for number in self._vectors:
            rows_FC[number] = [value is not None for value in of_features[number]]
        vectors_CX = self._numbers([of_features[n] for n in self._vectors], count) if self._vectors else None
        return np.ascontiguousarray(rows_FC.T), vectors_CX, columns[0] if self.also else ()

    def _hashed_rows(self, columns: Sequence[Sequence[Any]], count: int) -> Ints:
        digests: list[int] = []
        missing: list[int] = []
        for column in columns:
            kinds = set(map(type, column))
            if kinds <= {str}:
                digests += [xxhash.xxh64_intdigest(value.encode(), HASH_SEED) for value in column]
                continue
            if not kinds <= {str, int, NoneType}:
                raise UnusualError
            for value in column:
                if value is None:
                    missing.append(len(digests))
                    digests.append(0)
                elif type(value) is str:
                    digests.append(xxhash.xxh64_intdigest(value.encode(), HASH_SEED))
                elif _SHORTEST_INT64 <= value <= _LONGEST_INT64:
                    digests.append(value & _UINT64)
                else:
                    raise UnusualError
        rows_FC = np.array(digests, dtype=np.uint64).view(np.int64).reshape(len(columns), count) % self._sizes_F1
        rows_FC += 1
        if missing:
            rows_FC.reshape(-1)[missing] = 0
        return rows_FC

    def _bucketized_rows(self, columns: Sequence[Sequence[Any]]) -> Ints:
        if not set(map(type, chain.from_iterable(columns))) <= {float, int, NoneType}:
            raise UnusualError
        numbers_FC = np.array(columns, dtype=np.float64)  # None becomes NaN, which is missing too
        if np.isinf(numbers_FC).any():
            raise UnusualError
        rows_FC = np.empty(numbers_FC.shape, dtype=np.int64)
        for number, boundaries in enumerate(self._boundaries):
            rows_FC[number] = boundaries.searchsorted(numbers_FC[number], side="right")
        rows_FC += 1
        rows_FC[np.isnan(numbers_FC)] = 0
        return rows_FC

    def _numbers(self, columns: Sequence[Sequence[Any]], count: int) -> Tensor:
        features = [self.features[n] for n in self._vectors]
        numbers_CX = np.zeros((count, sum(feature.dim for feature in features)), dtype=np.float32)
        start = 0
        for feature, column in zip(features, columns, strict=True):
            there = [n for n, value in enumerate(column) if value is not None]
            if there:
                given_CD = np.stack([vector_of(column[n], feature, "") for n in there])
                numbers_CX[there, start : start + feature.dim] = feature.normalize(given_CD)
            start += feature.dim
        return torch.from_numpy(numbers_CX)


class PlainBatches:
    """Makes batches of the requests for one model."""

    def __init__(self, schema: FeatureSchema, max_seq_len: int) -> None:
        """Prepare to read requests with a schema's features, of each the latest ``max_seq_len`` events."""
        self._max_seq_len = max_seq_len
        self._user = _Columns(schema.of_side("user"))
        self._context = _Columns(schema.of_side("context"))
        self._item = _Columns(schema.of_side("item"), also="item_id")
        self._event = _Columns(schema.of_side("event"), also="ts")
        self._sequences = [(sequence.name, sequence.max_length) for sequence in schema.sequences]

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> RequestBatch:
        """Return requests as one batch on the CPU, labels 0.

        The values of events that are not among the latest are not looked at.

        Raises:
            UnusualError: if this is not the way for them.
        """
        try:
            return self._batch(requests)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, BadDataError) as error:
            raise UnusualError from error

    def _batch(self, requests: Sequence[Mapping[str, Any]]) -> RequestBatch:
        asked: list[Mapping[str, Any]] = []
        candidate_offsets, event_offsets = [0], [0]
        happened: list[tuple[int, int, Mapping[str, Any]]] = []
        for request in requests:
            candidates = request["candidates"]
            if type(candidates) is not list or not candidates:
                raise UnusualError
            asked += candidates
            candidate_offsets.append(len(asked))
            events = self._latest(request.get("sequences") or {})
            if events and events[-1][0] >= request["ts"]:
                raise UnusualError
            happened += events
            event_offsets.append(len(happened))
        request_times = [request["ts"] for request in requests]
        if not _are_times(request_times):
            raise UnusualError
        times, places, events_values = zip(*happened, strict=True) if happened else ((), (), ())
        user_RU, user_RX, _ = self._user([request.get("user") or {} for request in requests])
        context_RK, context_RX, _ = self._context([request.get("context") or {} for request in requests])
        item_NI, item_NX, item_ids = self._item(asked)
        event_EV, _, _ = self._event(events_values)
        _check_texts([*item_ids, *(text for r in requests if (text := r.get("request_id")) is not None)])
        return RequestBatch(
            user_RU=torch.from_numpy(user_RU),
            context_RK=torch.from_numpy(context_RK),
            item_NI=torch.from_numpy(item_NI),
            candidate_offsets_O=torch.tensor(candidate_offsets),
            event_EV=torch.from_numpy(event_EV),
            event_sequence_E=torch.tensor(places, dtype=torch.int64),
            event_time_E=torch.tensor(times, dtype=torch.int64),
            event_offsets_O=torch.tensor(event_offsets),
            request_time_R=torch.tensor(request_times),
            click_N=torch.zeros(len(asked)),
            conversion_N=torch.zeros(len(asked)),
            user_vector_RX=user_RX,
            context_vector_RX=context_RX,
            item_vector_NX=item_NX,
        )

    def _latest(self, given: Mapping[str, Any]) -> list[tuple[int, int, Mapping[str, Any]]]:
        """Return time, sequence and values of a request's latest events, oldest first."""
        if len(given) != len(self._sequences):
            raise UnusualError
        merged: list[tuple[int, int, Mapping[str, Any]]] = []
        for place, (name, max_length) in enumerate(self._sequences):
            events = given[name]
            if type(events) is not list:
                raise UnusualError
            times = [event["ts"] for event in events]
            if not _are_times(times):
                raise UnusualError
            # Sorting is stable: equal times stay in the order of sequences, and in that in which they were given.
            merged += sorted(zip(times, repeat(place), events, strict=False), key=_TIME)[-max_length:]
        merged.sort(key=_TIME)
        return merged[-self._max_seq_len :]


_TIME = itemgetter(0)


def _are_times(times: Sequence[Any]) -> bool:
    return set(map(type, times)) <= {int} and (not times or EARLIEST_US <= min(times) <= max(times) < LATEST_US)


def _check_texts(texts: list[Any]) -> None:
    """Refuse what is no text, or holds half of a surrogate pair, which no encoding can write."""
    if not set(map(type, texts)) <= {str}:
        raise UnusualError
    "".join(texts).encode()


def vector_of(value: Any, feature: Feature, where: str) -> npt.NDArray[np.float32]:
    """Return the numbers of a vector feature's value.

    Raises:
        BadDataError: if they are not ``dim`` finite numbers; ``where`` begins the message.
    """
    needed = f"needed is a list of {feature.dim} finite numbers"
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise BadDataError(f"{where}: feature {feature.name!r} is {shown(value)}, {needed}")
    if len(value) != feature.dim:
        raise BadDataError(f"{where}: feature {feature.name!r} has {len(value)} numbers, {needed}")
    for number in value:
        if not isinstance(number, (int, float, np.number)) or isinstance(number, bool):
            raise BadDataError(f"{where}: feature {feature.name!r} holds {shown(number)}, {needed}")
        if isinstance(number, int) and abs(number) >= 1 << 1023:
            raise BadDataError(f"{where}: feature {feature.name!r} holds {shown(number)}, {needed}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
        numbers = np.asarray(value, dtype=np.float64).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise BadDataError(
            f"{where}: feature {feature.name!r} holds {value[np.argmin(np.isfinite(numbers))]!r}, {needed}"
        )
    return numbers


def shown(value: Any) -> str:
    """Return a value as a message can hold it."""
    if isinstance(value, int) and abs(value) >= 1 << 1023:
        return "a number of more than 300 digits"
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_SHOWN = 200
