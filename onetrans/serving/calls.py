"""What a call to the service says, read and checked: JSON to rows, with an error that names the field."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from onetrans.batch import RequestBatch
from onetrans.errors import BadDataError
from onetrans.plain_batch import EARLIEST_US, LATEST_US
from onetrans.schema import Feature, FeatureSchema, Side
from onetrans.serving.engine import OneTransInferenceEngine, Probabilities, ranked, user_of
from onetrans.serving.prefix import UserState
from onetrans.settings import ServingSettings

FIELDS = ("request_id", "user_id", "ts", "user", "context", "sequences", "candidates")
"""Fields of a request."""

_EXAMPLE_TIME_US = 1_769_860_800_000_000  # 2026-01-31 12:00 UTC, as in docs/serving.md


@dataclass(frozen=True)
class Call:
    """A call that can be scored."""

    batch: RequestBatch
    """Its requests."""
    users: list[str | None]
    """User of each."""
    known: list[UserState | None]
    """What is kept of each, where the events came in the same text as before; such requests hold no events."""
    digests: list[bytes | None]
    """Digest of the text of each one's events; None without a user."""
    request_ids: list[str | None]
    """What the client calls each."""
    items: list[list[str]]
    """Candidates of each."""

    @property
    def candidates(self) -> int:
        """Candidates of all requests."""
        return sum(map(len, self.items))


def read_call(body: bytes, engine: OneTransInferenceEngine, limits: ServingSettings) -> Call:
    """Read the body of ``POST /v1/rank``: one request, or ``{"requests": [...]}``.

    Past events are most of a body.  If they came in the same text as at the user's last request, they are not read.

    Raises:
        BadDataError: naming what does not fit.
    """
    parts = _parts(body)
    if len(parts) > limits.max_requests:
        raise BadDataError(f"there are {len(parts)} requests, serving.max_requests allows {limits.max_requests}")
    schema = engine.schema
    requests: list[dict[str, Any]] = []
    known: list[UserState | None] = []
    digests: list[bytes | None] = []
    for number, part in enumerate(parts):
        request = {name: _decoded(text) for name, text in part.items() if name != "sequences"}
        user, events = user_of(request), part.get("sequences")
        digest = None if user is None or events is None else hashlib.blake2b(events, digest_size=16).digest()
        kept = None if digest is None else engine.known(user, digest, request.get("ts"))
        if kept is not None:
            request["sequences"] = {sequence.name: [] for sequence in schema.sequences}
        elif events is not None:
            request["sequences"] = _decoded(events)
        _check_limits(request, number, limits)
        requests.append(request)
        known.append(kept)
        digests.append(digest)
    return Call(
        engine.encode(requests),
        [user_of(request) for request in requests],
        known,
        digests,
        [request.get("request_id") for request in requests],
        [[candidate["item_id"] for candidate in request["candidates"]] for request in requests],
    )


def _parts(body: bytes) -> list[dict[str, msgspec.Raw]]:
    """Return the requests of a body, each with the text of its fields."""
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        if "requests" not in given:
            return [given]
        parts = msgspec.json.decode(given["requests"], type=list[dict[str, msgspec.Raw]])
    except msgspec.ValidationError as error:
        raise BadDataError(
            f'the body must be a JSON object: a request, or {{"requests": [...]}} with a list of them: {error}'
        ) from error
    except _NOT_JSON as error:
        raise BadDataError(f"the body is not valid JSON: {error}") from error
    if len(given) > 1:
        raise BadDataError("beside 'requests' the body may hold nothing else")
    if not parts:
        raise BadDataError("'requests' is empty; one request at least is needed")
    return parts


def _decoded(text: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(text)
    except _NOT_JSON as error:
        raise BadDataError(f"the body is not valid JSON: {error}") from error


_NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


def answer(call: Call, scores: Probabilities, version: str) -> bytes:
    """Return the body of the answer."""
    results, start = [], 0
    for request_id, items in zip(call.request_ids, call.items, strict=True):
        part = slice(start, start + len(items))
        results.append({"request_id": request_id, "items": ranked(items, scores.ctr_N[part], scores.cvr_N[part])})
        start += len(items)
    return msgspec.json.encode({"model_version": version, "results": results})


def _check_limits(request: dict[str, Any], number: int, limits: ServingSettings) -> None:
    where = f"request {request.get('request_id') or number}"[:200]
    unknown = sorted(set(request) - set(FIELDS))
    if unknown:
        raise BadDataError(f"{where}: {unknown[0][:100]!r} is not known; its fields are {', '.join(FIELDS)}")
    candidates = request.get("candidates")
    if isinstance(candidates, list) and len(candidates) > limits.max_candidates:
        raise BadDataError(
            f"{where}: there are {len(candidates)} candidates, serving.max_candidates allows {limits.max_candidates}"
        )
    sequences = request.get("sequences")
    if isinstance(sequences, dict):
        events = sum(len(events) for events in sequences.values() if isinstance(events, list))
        if events > limits.max_events:
            raise BadDataError(f"{where}: there are {events} events, serving.max_events allows {limits.max_events}")


# The interface as a JSON schema


def call_schema(schema: FeatureSchema, limits: ServingSettings) -> dict[str, Any]:
    """Return the JSON schema of a call's body for a model with this feature schema."""
    one = request_schema(schema, limits)
    several = _object(
        {"requests": {"type": "array", "items": one, "minItems": 1, "maxItems": limits.max_requests}}, ["requests"]
    )
    return {"oneOf": [one, several]}


def request_schema(schema: FeatureSchema, limits: ServingSettings) -> dict[str, Any]:
    """Return the JSON schema of one request."""
    time = {
        "description": "microseconds since 1970-01-01 UTC, or ISO 8601 with an offset",
        "anyOf": [
            {"type": "integer", "minimum": EARLIEST_US, "maximum": LATEST_US - 1},
            {"type": "string", "format": "date-time"},
        ],
    }
    text_or_null = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    event = _features(schema.of_side("event"), {"ts": time})
    candidate = _features(schema.of_side("item"), {"item_id": {"type": "string"}})
    sequences = {
        s.name: {"type": "array", "items": event, "description": f"the latest {s.max_length} are read"}
        for s in schema.sequences
    }
    properties: dict[str, Any] = {
        "request_id": {**text_or_null, "description": "returned as it is"},
        "user_id": {**text_or_null, "description": "lets the service keep the user's side for the next request"},
        "ts": time,
        "user": _features(schema.of_side("user"), {}),
        "context": _features(schema.of_side("context"), {}),
        "sequences": _object(sequences, list(sequences)),
        "candidates": {"type": "array", "items": candidate, "minItems": 1, "maxItems": limits.max_candidates},
    }
    required = ["ts", "user", "candidates"]
    required += ["context"] if schema.of_side("context") else []
    required += ["sequences"] if schema.sequences else []
    return _object(properties, required)


def answer_schema() -> dict[str, Any]:
    """Return the JSON schema of an answer."""
    share = {"type": "number", "minimum": 0, "maximum": 1}
    item = _object(
        {
            "item_id": {"type": "string"},
            "index": {"type": "integer", "description": "place among the candidates of the request, from 0"},
            "ctr": {**share, "description": "P(click | impression)"},
            "cvr": {**share, "description": "P(conversion | click)"},
            "ctcvr": {**share, "description": "ctr * cvr; items are ordered by it, best first"},
        },
        ["item_id", "index", "ctr", "cvr", "ctcvr"],
    )
    result = _object(
        {"request_id": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "items": {"type": "array", "items": item}},
        ["request_id", "items"],
    )
    return _object(
        {"model_version": {"type": "string"}, "results": {"type": "array", "items": result}},
        ["model_version", "results"],
    )


def error_schema() -> dict[str, Any]:
    """Return the JSON schema of an error."""
    error = _object({"code": {"type": "string"}, "message": {"type": "string"}}, ["code", "message"])
    return _object({"error": error}, ["error"])


def example_request(schema: FeatureSchema) -> dict[str, Any]:
    """Return a request with made-up values of every feature: the example of a model that comes without requests."""

    def values(side: Side, number: int = 1) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for feature in schema.of_side(side):
            if feature.kind == "hashed":
                made[feature.name] = f"{feature.name}-{number}"
            else:
                made[feature.name] = [0.5] * feature.dim if feature.kind == "vector" else feature.boundaries[0]
        return made

    ts = _EXAMPLE_TIME_US
    return {
        "request_id": "r1",
        "ts": ts,
        "user": values("user"),
        "context": values("context"),
        "sequences": {
            s.name: [{"ts": ts - back * 3_600_000_000, **values("event", back)} for back in (2, 1)]
            for s in schema.sequences
        },
        "candidates": [{"item_id": f"item-{number}", **values("item", number)} for number in (1, 2)],
    }


def shortened(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request with a user, two events per sequence and two candidates: an example one can read and send.

    Stored hashes are shown as text: a browser would round whole numbers of 64 bits, and the scores would be others'.
    """
    sequences = {
        name: [_readable(event, number) for number, event in enumerate(list(events)[-2:], 1)]
        for name, events in (request.get("sequences") or {}).items()
    }
    candidates = [_readable(candidate, number) for number, candidate in enumerate(list(request["candidates"])[:2], 1)]
    sides = {side: _readable(request.get(side) or {}, 1) for side in ("user", "context")}
    return {**request, **sides, "user_id": "u1", "sequences": sequences, "candidates": candidates}


def _readable(values: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {
        name: f"{name}-{number}" if isinstance(value, int) and name != "ts" else value for name, value in values.items()
    }


def _features(features: tuple[Feature, ...], also: dict[str, Any]) -> dict[str, Any]:
    properties = {**also, **{feature.name: _value_schema(feature) for feature in features}}
    return _object(properties, list(properties))


def _value_schema(feature: Feature) -> dict[str, Any]:
    kinds: dict[str, list[dict[str, Any]]] = {
        "hashed": [{"type": "string"}, {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}],
        "bucketized": [{"type": "number"}],
        "vector": [{"type": "array", "items": {"type": "number"}, "minItems": feature.dim, "maxItems": feature.dim}],
    }
    says = {"hashed": "text; a whole number is a stored 64-bit hash, not an id", "bucketized": "", "vector": ""}
    schema: dict[str, Any] = {"anyOf": [*kinds[feature.kind], {"type": "null"}]}
    return {**schema, "description": says[feature.kind]} if says[feature.kind] else schema


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
