"""A ranking request as plain data, and its scores: what a saved model is asked, and what it answers.

A request is JSON-able::

    {"request_id": "r1", "ts": 1651622400000000,
     "user": {<user feature>: value, ...},
     "context": {<context feature>: value, ...},
     "sequences": {<sequence>: [{"ts": ..., <event feature>: value, ...}, ...], ...},
     "candidates": [{"item_id": "i1", <item feature>: value, ...}, ...]}

Times are microseconds since 1970-01-01 UTC, or ISO 8601 text with an offset.  The
value of a hashed feature is text, which is hashed here, or a whole number, which is
a stored hash (:func:`onetrans.schema.hash64`); the value of a bucketized feature is a
number, that of a vector feature a list of ``dim`` finite numbers.
None stands for "missing" and has to be written: a feature that is merely left
out is refused, since a forgotten one would cost quality and never be noticed.

A request becomes the same Arrow row that ``training_requests`` holds and goes
through the same encoder, so there is one path from values to embedding rows.
Values are converted column by column; requests in which something is unusual go
through a slower conversion value by value, which names what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from types import NoneType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from onetrans.batch import RequestBatch
from onetrans.errors import BadDataError
from onetrans.loader import batch_of
from onetrans.models.ranking import RankingModel
from onetrans.schema import Feature, FeatureSchema, Kind, hash64

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME = pa.timestamp("us", tz="UTC")
_LATEST = 2**53
_SHOWN = 200
_SHORTEST_INT64, _LONGEST_INT64 = -(2**63), 2**63 - 1
_STORED: dict[Kind, pa.DataType] = {
    "hashed": pa.int64(),
    "bucketized": pa.float64(),
    "vector": pa.list_(pa.float32()),
}


def request_columns(schema: FeatureSchema) -> pa.Schema:
    """Return the columns of ``training_requests`` that a model reads, with their types."""
    event = pa.struct([pa.field("ts", _TIME), *_columns(schema.of_side("event"))])
    candidate = pa.struct(
        [
            pa.field("item_id", pa.string()),
            *_columns(schema.of_side("item")),
            pa.field("click", pa.int32()),
            pa.field("conversion", pa.int32()),
        ]
    )
    return pa.schema(
        [
            pa.field("request_id", pa.string()),
            pa.field("ts", _TIME),
            *_columns(schema.of_side("user")),
            *_columns(schema.of_side("context")),
            *(pa.field(sequence.column, pa.list_(event)) for sequence in schema.sequences),
            pa.field("candidates", pa.list_(candidate)),
        ]
    )


def from_rows(rows: pa.Table, schema: FeatureSchema) -> list[dict[str, Any]]:
    """Return stored rows of ``training_requests`` as requests; labels and positions are left behind."""
    events = ["ts", *(f.name for f in schema.of_side("event"))]
    items = ["item_id", *(f.name for f in schema.of_side("item"))]

    def picked(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _microseconds(values[name]) if name == "ts" else values[name] for name in names}

    return [
        {
            "request_id": row["request_id"],
            "ts": _microseconds(row["ts"]),
            "user": picked((f.name for f in schema.of_side("user")), row),
            "context": picked((f.name for f in schema.of_side("context")), row),
            "sequences": {s.name: [picked(events, e) for e in row[s.column] or ()] for s in schema.sequences},
            "candidates": [picked(items, candidate) for candidate in row["candidates"]],
        }
        for row in rows.select(request_columns(schema).names).to_pylist()
    ]


def to_rows(requests: Sequence[Mapping[str, Any]], schema: FeatureSchema) -> pa.RecordBatch:
    """Return requests as rows with the columns of :func:`request_columns`; labels are 0.

    Of each sequence the latest ``max_length`` events are read, in any order given; of the others only the time is.

    Raises:
        BadDataError: naming the request, the feature and the value that does not fit.
    """
    try:
        return _columnwise(requests, schema)
    except (
        _UnusualError,
        BadDataError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
        pa.ArrowException,
    ):
        return pa.RecordBatch.from_pylist(
            [_row(request, number, schema) for number, request in enumerate(requests)], schema=request_columns(schema)
        )


def to_batch(requests: Sequence[Mapping[str, Any]], schema: FeatureSchema, max_seq_len: int) -> RequestBatch:
    """Return requests as one batch on the CPU.

    Raises:
        BadDataError: on no requests, a value that does not fit, or an event that is not before its request.
    """
    if not requests:
        raise BadDataError("there are no requests to score")
    return batch_of(to_rows(requests, schema), schema, max_seq_len)


def score(model: RankingModel, requests: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return ``request_id, item_id, ctr, cvr``, one row per candidate, in the order of the requests.

    Raises:
        BadDataError: as for :func:`to_batch`.
    """
    batch = to_batch(requests, model.schema, model.config.max_seq_len)
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(batch.to(device))
    finally:
        model.train(training)
    asked = [(request.get("request_id"), candidate) for request in requests for candidate in request["candidates"]]
    return pa.table(
        {
            "request_id": pa.array([request_id for request_id, _ in asked], pa.string()),
            "item_id": pa.array([candidate["item_id"] for _, candidate in asked], pa.string()),
            "ctr": torch.sigmoid(logits.ctr_logit_N.double()).cpu().numpy(),
            "cvr": torch.sigmoid(logits.cvr_logit_N.double()).cpu().numpy(),
        }
    )


# Plain data to rows, column by column


class _UnusualError(Exception):
    """Something that the conversion by columns leaves to the one by values."""


_LEFT_TO_VALUES = (
    *(_UnusualError, BadDataError, pa.ArrowException),
    *(KeyError, TypeError, ValueError, OverflowError, AttributeError),
)
"""Whatever stops the conversion by columns: the one by values names it, or finds that it is all right."""


def _columnwise(requests: Sequence[Mapping[str, Any]], schema: FeatureSchema) -> pa.RecordBatch:
    """Return the rows of requests in which nothing is unusual; anything else raises."""
    request_ids = [request.get("request_id") for request in requests]
    if not set(map(type, request_ids)) <= {str, NoneType}:
        raise _UnusualError
    columns: list[pa.Array] = [
        pa.array(request_ids, pa.string()),
        _times([request["ts"] for request in requests]),
    ]
    for side in ("user", "context"):
        features = schema.of_side("user" if side == "user" else "context")
        columns += _arrays([request.get(side) or {} for request in requests], features)
    none: Mapping[str, Any] = {}
    given = [request.get("sequences") or none for request in requests]
    if any(len(sequences) != len(schema.sequences) for sequences in given):
        raise _UnusualError
    for sequence in schema.sequences:
        kept = [_latest(sequences[sequence.name], sequence.max_length) for sequences in given]
        events = list(chain.from_iterable(kept))
        members = [_times([event["ts"] for event in events]), *_arrays(events, schema.of_side("event"), also=1)]
        columns.append(_lists(kept, ["ts", *(f.name for f in schema.of_side("event"))], members))
    asked = [request["candidates"] for request in requests]
    if not all(asked) or not set(map(type, asked)) <= {list}:
        raise _UnusualError
    candidates = list(chain.from_iterable(asked))
    items = [candidate["item_id"] for candidate in candidates]
    if not set(map(type, items)) <= {str}:
        raise _UnusualError
    labels = pa.array(np.zeros(len(candidates), dtype=np.int32))
    members = [pa.array(items, pa.string()), *_arrays(candidates, schema.of_side("item"), also=1), labels, labels]
    columns.append(
        _lists(asked, ["item_id", *(f.name for f in schema.of_side("item")), "click", "conversion"], members)
    )
    return pa.RecordBatch.from_arrays(columns, schema=request_columns(schema))


def _latest(events: list[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """Return a sequence's latest events, oldest first."""
    if type(events) is not list:
        raise _UnusualError
    times = [event["ts"] for event in events]
    if not set(map(type, times)) <= {int}:
        raise _UnusualError
    if times != sorted(times):
        events = sorted(events, key=lambda event: event["ts"])
    return events[-limit:]


def _times(times: list[int]) -> pa.Array:
    if not set(map(type, times)) <= {int} or (times and not 0 <= min(times) <= max(times) < _LATEST):
        raise _UnusualError
    return pa.array(times, pa.int64()).cast(_TIME)


def _arrays(given: Sequence[Mapping[str, Any]], features: tuple[Feature, ...], also: int = 0) -> list[pa.Array]:
    """Return an array per feature; every mapping has exactly these features and ``also`` other keys."""
    if not set(map(len, given)) <= {len(features) + also}:
        raise _UnusualError
    return [_array([values[feature.name] for values in given], feature) for feature in features]


def _array(values: list[Any], feature: Feature) -> pa.Array:
    kinds = set(map(type, values))
    if feature.kind == "hashed":
        if not kinds <= {str, int, NoneType}:
            raise _UnusualError
        if str in kinds:
            values = [hash64(value) if type(value) is str else value for value in values]
    elif feature.kind == "vector":
        values = [None if value is None else _vector(value, feature, "") for value in values]
    elif not kinds <= {float, int, NoneType}:
        raise _UnusualError
    array = pa.array(values, _STORED[feature.kind])
    if feature.kind == "bucketized" and float in kinds and np.isinf(array.to_numpy(zero_copy_only=False)).any():
        raise _UnusualError
    return array


def _lists(parts: Sequence[Sequence[Any]], names: list[str], members: list[pa.Array]) -> pa.Array:
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(members, names=names))


# Plain data to rows, value by value


def _row(request: Any, number: int, schema: FeatureSchema) -> dict[str, Any]:
    request = _mapping(request, f"request {number}")
    request_id = request.get("request_id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadDataError(f"request {number}: request_id is {_shown(request_id)}, needed is text or null")
    _encodable(request_id, f"request {number}: request_id")
    where = f"request {request_id or number}"
    user, context = schema.of_side("user"), schema.of_side("context")
    row: dict[str, Any] = {"request_id": request_id, "ts": _time(request.get("ts"), where)}
    row |= _values(_mapping(request.get("user") or {}, f"{where}, user"), user, f"{where}, user")
    row |= _values(_mapping(request.get("context") or {}, f"{where}, context"), context, f"{where}, context")
    sequences = _mapping(request.get("sequences") or {}, f"{where}, sequences")
    _refuse_unknown(sequences, [s.name for s in schema.sequences], f"{where}, sequences")
    for sequence in schema.sequences:
        at = f"{where}, sequence {sequence.name}"
        if sequence.name not in sequences:
            raise BadDataError(f"{at} is absent; write an empty list if there are no events")
        places = [f"{at}, event {n}" for n in range(len(_listed(sequences[sequence.name], at)))]
        given = [_mapping(event, place) for event, place in zip(sequences[sequence.name], places, strict=True)]
        timed = sorted(
            ((_time(event.get("ts"), place), event, place) for event, place in zip(given, places, strict=True)),
            key=lambda entry: entry[0],
        )
        row[sequence.column] = [
            {"ts": ts, **_values(event, schema.of_side("event"), place, also=("ts",))}
            for ts, event, place in timed[-sequence.max_length :]
        ]
    candidates = _listed(request.get("candidates"), f"{where}, candidates")
    if not candidates:
        raise BadDataError(f"{where} has no candidates")
    row["candidates"] = [
        {
            "item_id": _item_id(_mapping(candidate, f"{where}, candidate {n}"), f"{where}, candidate {n}"),
            **_values(candidate, schema.of_side("item"), f"{where}, candidate {n}", also=("item_id",)),
            "click": 0,
            "conversion": 0,
        }
        for n, candidate in enumerate(candidates)
    ]
    return row


def _values(
    given: Mapping[str, Any], features: tuple[Feature, ...], where: str, also: tuple[str, ...] = ()
) -> dict[str, Any]:
    _refuse_unknown(given, [*also, *(f.name for f in features)], where)
    return {feature.name: _value(given, feature, where) for feature in features}


def _value(given: Mapping[str, Any], feature: Feature, where: str) -> int | float | npt.NDArray[np.float32] | None:
    if feature.name not in given:
        raise BadDataError(f"{where}: feature {feature.name!r} is absent; write null where its value is not known")
    value = given[feature.name]
    if value is None:
        return None
    if feature.kind == "vector":
        return _vector(value, feature, where)
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if feature.kind == "hashed":
        if isinstance(value, str):
            _encodable(value, f"{where}: feature {feature.name!r}")
            return hash64(value)
        if whole and _SHORTEST_INT64 <= value <= _LONGEST_INT64:
            return int(value)
        raise BadDataError(f"{where}: feature {feature.name!r} is {_shown(value)}, needed is text or a 64-bit hash")
    if whole and abs(value) < 1 << 1023:
        return float(value)
    if isinstance(value, (float, np.floating)) and not np.isinf(value):
        return float(value)
    raise BadDataError(f"{where}: feature {feature.name!r} is {_shown(value)}, needed is a number, and a finite one")


def _vector(value: Any, feature: Feature, where: str) -> npt.NDArray[np.float32]:
    needed = f"needed is a list of {feature.dim} finite numbers"
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise BadDataError(f"{where}: feature {feature.name!r} is {_shown(value)}, {needed}")
    if len(value) != feature.dim:
        raise BadDataError(f"{where}: feature {feature.name!r} has {len(value)} numbers, {needed}")
    for number in value:
        if not isinstance(number, (int, float, np.number)) or isinstance(number, bool):
            raise BadDataError(f"{where}: feature {feature.name!r} holds {_shown(number)}, {needed}")
        if isinstance(number, int) and abs(number) >= 1 << 1023:
            raise BadDataError(f"{where}: feature {feature.name!r} holds {_shown(number)}, {needed}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
        numbers = np.asarray(value, dtype=np.float64).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise BadDataError(
            f"{where}: feature {feature.name!r} holds {value[np.argmin(np.isfinite(numbers))]!r}, {needed}"
        )
    return numbers


def _time(value: Any, where: str) -> int:
    if isinstance(value, str):
        try:
            read = datetime.fromisoformat(value)
        except ValueError:
            _bad_time(value, where)
        if read.tzinfo is None or read.year < 1971:
            _bad_time(value, where)
        return (read - _EPOCH) // timedelta(microseconds=1)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < _LATEST:
        return int(value)
    _bad_time(value, where)


def _bad_time(value: Any, where: str) -> NoReturn:
    raise BadDataError(
        f"{where}: ts is {_shown(value)}, needed are microseconds since 1970-01-01 UTC, a whole number, or ISO 8601 "
        "text with an offset, such as 2026-01-31T12:00:00Z"
    )


def _item_id(candidate: Mapping[str, Any], where: str) -> str:
    item_id = candidate.get("item_id")
    if not isinstance(item_id, str):
        raise BadDataError(f"{where}: a candidate's item_id is {_shown(item_id)}, needed is text")
    _encodable(item_id, f"{where}: a candidate's item_id")
    return item_id


def _encodable(text: str | None, what: str) -> None:
    """Refuse text that no encoding can hold, such as half of a surrogate pair."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise BadDataError(f"{what} is {_shown(text)}, which is no valid text") from error


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise BadDataError(f"{where} is {_shown(value)}, needed are names and values")


def _listed(value: Any, where: str) -> list[Any]:
    if isinstance(value, (list, tuple, np.ndarray)):
        return list(value)
    raise BadDataError(f"{where}: {_shown(value)} is not a list")


def _refuse_unknown(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(set(given) - set(known), key=str)
    if unknown:
        raise BadDataError(f"{where}: {_shown(unknown[0])} is not known; the model was trained with {', '.join(known)}")


def _shown(value: Any) -> str:
    """Return a value as a message can hold it."""
    if isinstance(value, int) and abs(value) >= 1 << 1023:
        return "a number of more than 300 digits"
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


# Rows


def _columns(features: tuple[Feature, ...]) -> list[pa.Field]:
    return [pa.field(f.name, _STORED[f.kind]) for f in features]


def _microseconds(value: datetime) -> int:
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(microseconds=1)
