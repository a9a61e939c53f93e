"""A ranking request as plain data, and its scores: what a saved model is asked, and what it answers.

A request is JSON-able::

    {"request_id": "r1", "ts": 1651622400000000,
     "user": {<user feature>: value, ...},
     "context": {<context feature>: value, ...},
     "sequences": {<sequence>: [{"ts": ..., <event feature>: value, ...}, ...], ...},
     "candidates": [{"item_id": "i1", <item feature>: value, ...}, ...]}

Times are microseconds since 1970-01-01 UTC.  The value of a hashed feature is
text, which is hashed here, or a whole number, which is a stored hash
(:func:`onetrans.schema.hash64`); the value of a bucketized feature is a number,
that of a vector feature a list of ``dim`` finite numbers.
None stands for "missing" and has to be written: a feature that is merely left
out is refused, since a forgotten one would cost quality and never be noticed.

A request becomes the same Arrow row that ``training_requests`` holds and goes
through the same encoder, so there is one path from values to embedding rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

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

    Raises:
        BadDataError: naming the request, the feature and the value that does not fit.
    """
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


# Plain data to rows


def _row(request: Mapping[str, Any], number: int, schema: FeatureSchema) -> dict[str, Any]:
    where = f"request {request.get('request_id') or number}"
    user, context = schema.of_side("user"), schema.of_side("context")
    row = {"request_id": request.get("request_id"), "ts": _time(request.get("ts"), where)}
    row |= _values(request.get("user") or {}, user, f"{where}, user")
    row |= _values(request.get("context") or {}, context, f"{where}, context")
    sequences = request.get("sequences") or {}
    _refuse_unknown(sequences, [s.name for s in schema.sequences], f"{where}, sequences")
    for sequence in schema.sequences:
        at = f"{where}, sequence {sequence.name}"
        if sequence.name not in sequences:
            raise BadDataError(f"{at} is absent; write an empty list if there are no events")
        events = [
            {"ts": _time(event.get("ts"), at), **_values(event, schema.of_side("event"), at, also=("ts",))}
            for event in _listed(sequences[sequence.name], at)
        ]
        row[sequence.column] = sorted(events, key=lambda event: event["ts"])[-sequence.max_length :]
    candidates = _listed(request.get("candidates"), f"{where}, candidates")
    if not candidates:
        raise BadDataError(f"{where} has no candidates")
    row["candidates"] = [
        {
            "item_id": _item_id(candidate, where),
            **_values(candidate, schema.of_side("item"), f"{where}, candidate", also=("item_id",)),
            "click": 0,
            "conversion": 0,
        }
        for candidate in candidates
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
            return hash64(value)
        if whole and _SHORTEST_INT64 <= value <= _LONGEST_INT64:
            return int(value)
        raise BadDataError(f"{where}: feature {feature.name!r} is {value!r}, needed is text or a 64-bit hash")
    if whole or isinstance(value, (float, np.floating)):
        return float(value)
    raise BadDataError(f"{where}: feature {feature.name!r} is {value!r}, needed is a number")


def _vector(value: Any, feature: Feature, where: str) -> npt.NDArray[np.float32]:
    needed = f"needed is a list of {feature.dim} finite numbers"
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise BadDataError(f"{where}: feature {feature.name!r} is {value!r}, {needed}")
    if len(value) != feature.dim:
        raise BadDataError(f"{where}: feature {feature.name!r} has {len(value)} numbers, {needed}")
    for number in value:
        if not isinstance(number, (int, float, np.number)) or isinstance(number, bool):
            raise BadDataError(f"{where}: feature {feature.name!r} holds {number!r}, {needed}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
        numbers = np.asarray(value, dtype=np.float64).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise BadDataError(
            f"{where}: feature {feature.name!r} holds {value[np.argmin(np.isfinite(numbers))]!r}, {needed}"
        )
    return numbers


def _time(value: Any, where: str) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise BadDataError(f"{where}: ts is {value!r}, needed are microseconds since 1970-01-01 UTC, a whole number")


def _item_id(candidate: Mapping[str, Any], where: str) -> str:
    if not isinstance(candidate.get("item_id"), str):
        raise BadDataError(f"{where}: a candidate's item_id is {candidate.get('item_id')!r}, needed is text")
    return candidate["item_id"]


def _listed(value: Any, where: str) -> list[Any]:
    if isinstance(value, (list, tuple, np.ndarray)):
        return list(value)
    raise BadDataError(f"{where}: {value!r} is not a list")


def _refuse_unknown(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise BadDataError(f"{where}: {unknown[0]!r} is not known; the model was trained with {', '.join(known)}")


# Rows


def _columns(features: tuple[Feature, ...]) -> list[pa.Field]:
    return [pa.field(f.name, _STORED[f.kind]) for f in features]


def _microseconds(value: datetime) -> int:
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(microseconds=1)
