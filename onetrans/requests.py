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

A request in which nothing is unusual is encoded column by column
(:mod:`onetrans.plain_batch`).  Any other becomes, value by value, the same Arrow row
that ``training_requests`` holds, which names what does not fit, and goes through the
encoder of these rows.  Both ways give the same batch; tests hold one against the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from onetrans.batch import RequestBatch
from onetrans.errors import BadDataError
from onetrans.loader import batch_of
from onetrans.models.ranking import RankingModel
from onetrans.plain_batch import EARLIEST_US, LATEST_US, PlainBatches, UnusualError, shown, vector_of
from onetrans.schema import Feature, FeatureSchema, Kind, hash64

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME = pa.timestamp("us", tz="UTC")
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
    return pa.RecordBatch.from_pylist(
        [_row(request, number, schema) for number, request in enumerate(requests)], schema=request_columns(schema)
    )


class RequestEncoder:
    """Turns requests into batches for one model."""

    def __init__(self, schema: FeatureSchema, max_seq_len: int) -> None:
        """Prepare to read requests with a schema's features, of each the latest ``max_seq_len`` events."""
        self._schema, self._max_seq_len = schema, max_seq_len
        self._plain = PlainBatches(schema, max_seq_len)

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> RequestBatch:
        """Return requests as one batch on the CPU.

        Raises:
            BadDataError: on no requests, a value that does not fit, or an event that is not before its request.
        """
        if not requests:
            raise BadDataError("there are no requests to score")
        try:
            return self._plain(requests)
        except UnusualError:
            rows = to_rows(requests, self._schema)
            _check_times(rows, requests, self._schema)
            return batch_of(rows, self._schema, self._max_seq_len)


def to_batch(requests: Sequence[Mapping[str, Any]], schema: FeatureSchema, max_seq_len: int) -> RequestBatch:
    """Return requests as one batch on the CPU; raises as :class:`RequestEncoder` does."""
    return RequestEncoder(schema, max_seq_len)(requests)


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


# Plain data to rows, value by value


def _row(request: Any, number: int, schema: FeatureSchema) -> dict[str, Any]:
    request = _mapping(request, f"request {number}")
    request_id = request.get("request_id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadDataError(f"request {number}: request_id is {shown(request_id)}, needed is text or null")
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
        return vector_of(value, feature, where)
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if feature.kind == "hashed":
        if isinstance(value, str):
            _encodable(value, f"{where}: feature {feature.name!r}")
            return hash64(value)
        if whole and _SHORTEST_INT64 <= value <= _LONGEST_INT64:
            return int(value)
        raise BadDataError(f"{where}: feature {feature.name!r} is {shown(value)}, needed is text or a 64-bit hash")
    if whole and abs(value) < 1 << 1023:
        return float(value)
    if isinstance(value, (float, np.floating)) and not np.isinf(value):
        return float(value)
    raise BadDataError(f"{where}: feature {feature.name!r} is {shown(value)}, needed is a number, and a finite one")


def _check_times(rows: pa.RecordBatch, requests: Sequence[Mapping[str, Any]], schema: FeatureSchema) -> None:
    """Refuse an event that is not before its request: the model never saw one, and a label could leak."""
    ts_R = rows.column("ts").view(pa.int64()).to_numpy()
    for sequence in schema.sequences:
        events = rows.column(sequence.column)
        owner_E = np.repeat(np.arange(len(requests)), np.diff(events.offsets.to_numpy()))
        ts_E = events.values.field("ts").view(pa.int64()).to_numpy()
        late_E = ts_E >= ts_R[owner_E]
        if late_E.any():
            event = int(np.argmax(late_E))
            number = int(owner_E[event])
            raise BadDataError(
                f"request {requests[number].get('request_id') or number}, sequence {sequence.name}: an event has ts "
                f"{ts_E[event]}, which is not before the request's, {ts_R[number]}"
            )


def _time(value: Any, where: str) -> int:
    if isinstance(value, str):
        try:
            read = datetime.fromisoformat(value)
        except ValueError:
            _bad_time(value, where)
        if read.tzinfo is None or read.year < 1971:
            _bad_time(value, where)
        return (read - _EPOCH) // timedelta(microseconds=1)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and EARLIEST_US <= value < LATEST_US:
        return int(value)
    _bad_time(value, where)


def _bad_time(value: Any, where: str) -> NoReturn:
    raise BadDataError(
        f"{where}: ts is {shown(value)}, needed are microseconds since 1970-01-01 UTC, a whole number (seconds and "
        "milliseconds are refused, as times before 1971), or ISO 8601 text with an offset, such as 2026-01-31T12:00:00Z"
    )


def _item_id(candidate: Mapping[str, Any], where: str) -> str:
    item_id = candidate.get("item_id")
    if not isinstance(item_id, str):
        raise BadDataError(f"{where}: a candidate's item_id is {shown(item_id)}, needed is text")
    _encodable(item_id, f"{where}: a candidate's item_id")
    return item_id


def _encodable(text: str | None, what: str) -> None:
    """Refuse text that no encoding can hold, such as half of a surrogate pair."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise BadDataError(f"{what} is {shown(text)}, which is no valid text") from error


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise BadDataError(f"{where} is {shown(value)}, needed are names and values")


def _listed(value: Any, where: str) -> list[Any]:
    if isinstance(value, (list, tuple, np.ndarray)):
        return list(value)
    raise BadDataError(f"{where}: {shown(value)} is not a list")


def _refuse_unknown(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(set(given) - set(known), key=str)
    if unknown:
        raise BadDataError(f"{where}: {shown(unknown[0])} is not known; the model was trained with {', '.join(known)}")


# Rows


def _columns(features: tuple[Feature, ...]) -> list[pa.Field]:
    return [pa.field(f.name, _STORED[f.kind]) for f in features]


def _microseconds(value: datetime) -> int:
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(microseconds=1)
