"""The feature schema: one file that names every feature, read by jobs, models, artifacts and serving.

A schema file (TOML) declares user, item, context and event features, and the
behaviour sequences built from events.  Three kinds exist.  The first two end as
a row of an embedding table (paper section 3.2, "bucketized or one-hot encoded,
then embedded"), the third takes the place of one:

``hashed``
    an id or category.  Jobs store its 64-bit hash (:func:`hash64`); the modulo
    is applied when a batch is built, so a table can grow without a rebuild.
``bucketized``
    a number.  Jobs store the raw value; it is cut at ``boundaries`` when a
    batch is built.
``vector``
    a list of ``dim`` numbers, as an encoder of images or text gives it.  Jobs store
    it as it is; it is scaled to a mean square of 1 when a batch is built
    (:meth:`Feature.normalize`), and the models map it linearly to the width of
    the embeddings.  Its table has two rows: "missing", and "there", which is added
    to the map as its bias.

Row 0 of every table stands for "missing".  ``docs/input.md`` describes the file
for its authors.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import json
import re
import tomllib
from collections import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from datetime import date, datetime, timedelta
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import numpy.typing as npt
import xxhash

from onetrans import storage
from onetrans.days import day_bounds
from onetrans.errors import BadConfigError
from onetrans.settings import SourceSettings

Side = Literal["user", "item", "context", "event"]
Kind = Literal["hashed", "bucketized", "vector"]
InputTable = Literal["impressions", "behaviors", "users", "items"]

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_COMPARED_BOUNDARIES = 64
"""Fewer boundaries than this are compared with one by one."""

HASH_SEED = 42  # Spark's xxhash64 starts from this seed, so Spark and Python agree on every id.
_SMALLEST_SQUARE, _LARGEST_SQUARE = 1e-30, 1e30  # Between them a sum of squares is exact enough in float32.

CONTEXT_FROM_CLOCK = ("hour_of_day", "day_of_week")
"""Context columns every log has: they are computed from a request's time in the log's time zone."""

EPOCHS = ("", "s", "ms", "us")
"""Units of times that are whole numbers; empty: times are no numbers."""

DERIVED_EVENTS = ("impression", "click", "conversion")
"""Types of the events that can be derived from impressions."""


_UNREADABLE: Mapping[str, Mapping[str, str]] = {
    "context": {
        "click": "is a label, which the model is to predict",
        "conversion": "is a label, which the model is to predict",
        "position": "is decided by the ranking itself, and not known when a candidate is scored",
        "ts": "is a time that never comes again; hour_of_day and day_of_week are computed from it",
        "request_id": "names one request, and never comes again",
        "user_id": "belongs to the user; let a feature with side = 'user' read it",
        "item_id": "belongs to the candidate; let a feature with side = 'item' read it",
        "conversion_at": "tells the label, which the model is to predict",
    },
    "event": {
        "ts": "is a time that never comes again; the order of events is known to the models",
        "available_at": "is a time that never comes again; it decides which requests see the event",
        "event_id": "names one event, and never comes again",
        "user_id": "belongs to the user; let a feature with side = 'user' read it",
    },
}
"""Per side: columns of the input contract that no feature of it may read, and why."""

_OUTCOMES = ("request_id", "item_id", "position", "click", "conversion", "conversion_at", "true_ctr", "true_cvr")
"""Columns of impressions that differ within a request, or come of it."""

RESERVED_NAMES = frozenset(
    (
        *("ds", "request_id", "user_id", "item_id", "ts", "available_at", "event_id"),
        *("candidates", "position", "click", "conversion", "true_ctr", "true_cvr"),
    )
)
"""Columns of ``training_requests`` that are no features."""


def _modulo(values: npt.NDArray[np.int64], divisor: int) -> npt.NDArray[np.int64]:
    """Return ``values % divisor``: numpy divides many numbers at a time, but takes remainders one by one."""
    multiple = values // divisor
    multiple *= divisor  # may wrap around, and the difference back
    return np.subtract(values, multiple, out=multiple)


def hash64(value: str) -> int:
    """Return the signed 64-bit xxHash of ``value``; equal to Spark's ``xxhash64(value)`` on a string."""
    unsigned = xxhash.xxh64_intdigest(value.encode("utf-8"), seed=HASH_SEED)
    return unsigned - (1 << 64) if unsigned >= 1 << 63 else unsigned


class Mistake(NamedTuple):
    """What is wrong with a schema file, and where: each rule is told in these, so that all can be shown at once."""

    place: tuple[str | int, ...]
    """Keys that lead to it from the top of the file, with the number of an entry in a list of tables."""
    text: str
    """The rule that is broken, with the value."""


@dataclass(frozen=True)
class Feature:
    """One feature: where it is read and how it becomes a row of an embedding table."""

    name: str
    """Unique name; also its column in ``training_requests``."""
    side: Side
    """What it describes: the user, the candidate item, the request's context, or a past event."""
    kind: Kind
    """``hashed`` for ids and categories, ``bucketized`` for numbers, ``vector`` for lists of numbers."""
    column: str
    """Source column; for an event feature a column of ``behaviors`` (its own or its item's)."""
    hash_size: int = 0
    """Rows of a hashed feature's table, the "missing" row not counted."""
    boundaries: tuple[float, ...] = ()
    """Increasing cut points of a bucketized feature; a value equal to one falls above it."""
    embedding: str = ""
    """Embedding table to use; features that name the same table share it.  Default: ``name``."""
    dim: int = 0
    """Numbers of a vector feature's value."""

    def __post_init__(self) -> None:
        refuse(self.mistakes())
        if not self.embedding:
            object.__setattr__(self, "embedding", self.name)

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what is wrong with this feature taken alone."""
        where = f"feature {self.name!r}"
        if not _NAME.fullmatch(self.name):
            yield Mistake(("name",), f"{where}: a name is lower-case letters, digits and '_', at most 63 of them")
        if not self.column:
            yield Mistake(("column",), f"{where}: column is empty")
        if self.side not in get_args(Side):
            yield Mistake(("side",), f"{where}: side = {self.side!r} is none of {', '.join(get_args(Side))}")
        if self.kind == "hashed":
            if self.hash_size < 1:
                yield Mistake(("hash_size",), f"{where}: hash_size = {self.hash_size} must be at least 1")
            if self.boundaries:
                text = f"{where}: boundaries belong to a bucketized feature, this one is hashed"
                yield Mistake(("boundaries",), text)
        elif self.kind == "bucketized":
            if not self.boundaries:
                yield Mistake(("boundaries",), f"{where}: boundaries are missing")
            if any(not np.isfinite(b) for b in self.boundaries) or any(
                a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)
            ):
                text = f"{where}: boundaries = {list(self.boundaries)} must be finite and increasing"
                yield Mistake(("boundaries",), text)
            if self.hash_size:
                text = f"{where}: hash_size belongs to a hashed feature, this one is bucketized"
                yield Mistake(("hash_size",), text)
        elif self.kind == "vector":
            if not isinstance(self.dim, int) or self.dim < 1:
                yield Mistake(("dim",), f"{where}: dim = {self.dim!r} must be a whole number, at least 1")
            for name, given in (
                ("hash_size", self.hash_size),
                ("boundaries", self.boundaries),
                ("embedding", self.embedding not in ("", self.name)),
            ):
                if given:
                    text = f"{where}: {name} does not belong to a vector, which has a dim and nothing else"
                    yield Mistake((name,), text)
            if self.side == "event":
                yield Mistake(
                    ("side",),
                    f"{where}: side = 'event' cannot hold a vector: every request would carry it once per past event. "
                    f"Let the event read its item's id and share the item's embedding instead",
                )
        else:
            yield Mistake(("kind",), f"{where}: kind = {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if self.dim and self.kind in ("hashed", "bucketized"):
            yield Mistake(("dim",), f"{where}: dim belongs to a vector feature, this one is {self.kind}")
        if self.embedding not in ("", self.name) and not _NAME.fullmatch(self.embedding):
            text = f"{where}: embedding = {self.embedding!r} must be lower-case letters, digits and '_', at most 63"
            yield Mistake(("embedding",), text)

    @property
    def rows(self) -> int:
        """Rows of this feature's embedding table, row 0 ("missing") included."""
        if self.kind == "vector":
            return 2
        return self.hash_size + 1 if self.kind == "hashed" else len(self.boundaries) + 2

    def encode(self, values: npt.NDArray[Any], missing: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.int64]:
        """Return embedding rows for stored values: 64-bit hashes, raw numbers, or vectors (..., dim); any shape.

        ``missing`` marks nulls; a NaN counts as missing too, but not in a vector.
        """
        if self.kind == "vector":
            rows = np.ones(values.shape[:-1], dtype=np.int64)
        elif self.kind == "hashed":
            rows = _modulo(values.astype(np.int64, copy=False), self.hash_size)
            rows += 1
        else:
            numbers = values.astype(np.float64, copy=False)
            if len(self.boundaries) < _COMPARED_BOUNDARIES:
                # A pass per boundary, many numbers at a time, is faster than a search per number.
                bucket = (numbers == numbers).view(np.uint8)  # 0 where NaN
                for boundary in self.boundaries:
                    bucket += (numbers >= boundary).view(np.uint8)
                rows = bucket.astype(np.int64)
            else:
                rows = np.searchsorted(np.asarray(self.boundaries), numbers, side="right") + 1
                rows = np.where(np.isnan(numbers), 0, rows)
        if missing is not None:
            rows = np.where(missing, 0, rows)
        return rows.astype(np.int64, copy=False)

    @staticmethod
    def normalize(vectors_XD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return vectors (X, dim) scaled to a mean square of 1; a vector of zeros stays one.

        Encoders differ in the length of their vectors and mean the direction.  A vector that holds NaN or an infinite
        number becomes one of NaN.
        """
        squares_X = np.einsum("xd,xd->x", vectors_XD, vectors_XD)
        safe_X = (squares_X > _SMALLEST_SQUARE) & (squares_X < _LARGEST_SQUARE)
        scaled_XD = (
            vectors_XD / np.sqrt(np.where(safe_X, squares_X, 1) / vectors_XD.shape[1], dtype=np.float32)[:, None]
        )
        if not safe_X.all():
            exact_XD = vectors_XD[~safe_X].astype(np.float64)  # the square of a float32 fits
            size_X = np.sqrt(np.square(exact_XD).mean(axis=1, keepdims=True))
            scaled_XD[~safe_X] = exact_XD / np.where(np.isfinite(size_X), np.where(size_X == 0, 1, size_X), np.nan)
        return scaled_XD


@dataclass(frozen=True)
class Sequence:
    """One behaviour sequence: the latest events of one type."""

    name: str
    """Unique name; its column in the tables is ``seq_<name>``."""
    event: str
    """Value of ``behaviors.type`` that belongs to this sequence."""
    max_length: int
    """Events kept, the latest ones."""

    def __post_init__(self) -> None:
        refuse(self.mistakes())

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what is wrong with this sequence taken alone."""
        where = f"sequence {self.name!r}"
        if not _NAME.fullmatch(self.name):
            yield Mistake(("name",), f"{where}: a name is lower-case letters, digits and '_', at most 63 of them")
        if not self.event:
            yield Mistake(("event",), f"{where}: event is empty")
        if self.max_length < 1:
            yield Mistake(("max_length",), f"{where}: max_length = {self.max_length} must be at least 1")

    @property
    def column(self) -> str:
        """Column of this sequence in ``behavior_sequences`` and ``training_requests``."""
        return f"seq_{self.name}"


@dataclass(frozen=True)
class Aggregates:
    """Day-lagged counts and rates the feature tables carry."""

    windows: tuple[int, ...] = (1, 7)
    """Window lengths in days; a window for day D ends with D-1."""
    item_keys: tuple[str, ...] = ()
    """Item columns (author, category, ...) whose own counts and rates are added to ``item_features``."""
    smoothing: float = 20.0
    """Impressions (or clicks, for a conversion rate) of prior weight that pull a small rate to the overall one."""

    def __post_init__(self) -> None:
        refuse(self.mistakes())

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what is wrong with them."""
        if not self.windows or any(w < 1 for w in self.windows) or list(self.windows) != sorted(set(self.windows)):
            text = f"aggregates.windows = {list(self.windows)} must be increasing and at least 1"
            yield Mistake(("windows",), text)
        if self.smoothing < 0:
            yield Mistake(("smoothing",), f"aggregates.smoothing = {self.smoothing} must not be negative")

    def columns(self, key: str) -> list[str]:
        """Return the aggregate columns of ``key`` ("user", "item" or an item key), in table order."""
        return [
            f"{key}_{figure}_{window}d"
            for window in self.windows
            for figure in ("impressions", "clicks", "conversions", "ctr", "cvr")
        ]


@dataclass(frozen=True)
class FeatureSchema:
    """Everything a schema file says."""

    name: str
    """Name of the log, shown in runs and reports."""
    features: tuple[Feature, ...]
    """All features, in the order models concatenate them."""
    sequences: tuple[Sequence, ...]
    """Behaviour sequences, weakest intent first (click, cart, purchase)."""
    timezone: str = "UTC"
    """IANA zone in which a logical date begins and ends."""
    day_tolerance_minutes: int = 0
    """How far outside its day a row's time may lie before the row is refused."""
    aggregates: Aggregates = field(default_factory=Aggregates)
    """Windows and keys of the day-lagged counts and rates."""
    epoch: Literal["", "s", "ms", "us"] = ""
    """Unit of times given as whole numbers since 1970; empty: times are timestamps or ISO 8601 text."""
    derived_behaviors: tuple[str, ...] = ()
    """For a log without behaviours of its own: which of impression, click and conversion become past events."""
    outcome_delay_minutes: int = 30
    """How long after its request a derived event counts as known."""
    attribution_hours: float = 0.0
    """How long after its request a conversion still counts; 0: as delivered, and complete when the day is."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Per input table: column of the contract -> column of the team's own files, where they differ."""
    request_from: tuple[str, ...] = ()
    """For a log without request ids: columns of impressions whose values together tell one request from another."""

    def __post_init__(self) -> None:
        refuse(self.mistakes())

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what is wrong with the whole, its parts being right each for itself."""
        yield from _repeats("feature", "features", "name", [f.name for f in self.features])
        yield from _repeats("sequence", "sequences", "name", [s.name for s in self.sequences])
        yield from _repeats("sequence event", "sequences", "event", [s.event for s in self.sequences])
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError):
            yield Mistake(("timezone",), f"schema {self.name!r}: timezone = {self.timezone!r} is not known")
        if not 0 <= self.day_tolerance_minutes <= 720:
            text = f"schema {self.name!r}: day_tolerance_minutes = {self.day_tolerance_minutes} must be in 0..720"
            yield Mistake(("day_tolerance_minutes",), text)
        if self.epoch not in EPOCHS:
            text = f"schema {self.name!r}: epoch = {self.epoch!r} is none of {', '.join(map(repr, EPOCHS))}"
            yield Mistake(("epoch",), text)
        for event in self.derived_behaviors:
            if event not in DERIVED_EVENTS:
                text = (
                    f"schema {self.name!r}: derived_behaviors names {event!r}, "
                    f"which is none of {', '.join(DERIVED_EVENTS)}"
                )
                yield Mistake(("derived_behaviors",), text)
        for column in self.request_from:
            if column in (*_OUTCOMES, *CONTEXT_FROM_CLOCK):
                text = f"schema {self.name!r}: request_from names {column!r}, which is no part of what makes a request"
                yield Mistake(("request_from",), text)
        if self.outcome_delay_minutes < 0:
            text = f"schema {self.name!r}: outcome_delay_minutes must not be negative"
            yield Mistake(("outcome_delay_minutes",), text)
        if not 0 <= self.attribution_hours <= 24 * 365:
            text = f"schema {self.name!r}: attribution_hours = {self.attribution_hours} must be in 0..8760 (a year)"
            yield Mistake(("attribution_hours",), text)
        for side in ("user", "item"):
            if not self.of_side(side):
                yield Mistake(("features",), f"schema {self.name!r}: no feature has side = {side!r}")
        if self.sequences and not self.of_side("event"):
            text = f"schema {self.name!r}: sequences need at least one feature with side = 'event'"
            yield Mistake(("features",), text)
        for table in self.columns:
            if table not in get_args(InputTable):
                text = f"schema {self.name!r}: [columns.{table}] is none of {get_args(InputTable)}"
                yield Mistake(("columns", table), text)
        for side in get_args(Side):
            yield from self._unlike_lengths(side)
        vectors = {f.column: f.side for f in self.features if f.kind == "vector" and f.side in ("item", "context")}
        for number, feature in enumerate(self.features):
            if feature.side == "event" and feature.column in vectors:
                text = (
                    f"feature {feature.name!r}: column {feature.column!r} is a vector of side "
                    f"{vectors[feature.column]!r}; an event cannot read one"
                )
                yield Mistake(("features", number, "column"), text)
        for number, feature in enumerate(self.features):
            if feature.name in RESERVED_NAMES or feature.name.startswith("seq_"):
                text = (
                    f"feature {feature.name!r}: the name belongs to a column every table has; choose another name, "
                    f"its column may stay {feature.column!r}"
                )
                yield Mistake(("features", number, "name"), text)
            reason = _UNREADABLE.get(feature.side, {}).get(feature.column)
            if reason is not None:
                text = f"feature {feature.name!r}: column {feature.column!r} {reason}"
                yield Mistake(("features", number, "column"), text)
            if feature.column.startswith("true_"):
                text = (
                    f"feature {feature.name!r}: column {feature.column!r} holds a simulator's truth; "
                    "columns that begin with 'true_' may not be features"
                )
                yield Mistake(("features", number, "column"), text)
        yield from self._unlike_tables()

    def _unlike_lengths(self, side: Side) -> Iterator[Mistake]:
        """Yield vector features that read a column with another length than one before."""
        dims: dict[str, int] = {}
        for number, feature in enumerate(self.features):
            if feature.side != side or feature.kind != "vector":
                continue
            first = dims.setdefault(feature.column, feature.dim)
            if first != feature.dim:
                text = f"column {feature.column!r} is read with dim = {first} and with dim = {feature.dim}"
                yield Mistake(("features", number, "dim"), text)

    def unlike_kinds(self, side: Side) -> Iterator[Mistake]:
        """Yield features that read a column as another kind than one before."""
        kinds: dict[str, Kind] = {}
        for number, feature in enumerate(self.features):
            if feature.side == side and kinds.setdefault(feature.column, feature.kind) != feature.kind:
                both = " and as ".join((kinds[feature.column], feature.kind))
                yield Mistake(("features", number, "kind"), f"column {feature.column!r} is read both as {both}")

    def _unlike_tables(self) -> Iterator[Mistake]:
        """Yield features that share an embedding table with one before and disagree about it."""
        tables: dict[str, Feature] = {}
        for number, feature in enumerate(self.features):
            first = tables.setdefault(feature.embedding, feature)
            both = f"features {first.name!r} and {feature.name!r} share embedding {feature.embedding!r}"
            if "vector" in (first.kind, feature.kind) and first is not feature:
                text = f"{both}, but a vector has an embedding of its own; rename one"
                yield Mistake(("features", number, "embedding"), text)
            elif (first.kind, first.rows, first.boundaries) != (feature.kind, feature.rows, feature.boundaries):
                text = f"{both} but differ in kind, hash_size or boundaries"
                yield Mistake(("features", number, "embedding"), text)

    def labels_close(self, ds: date) -> datetime:
        """Return the instant (UTC) after which no conversion of a day can still come: the end of the day's window."""
        last_request = day_bounds(ds, self.timezone)[1] + timedelta(minutes=self.day_tolerance_minutes)
        return last_request + timedelta(hours=self.attribution_hours)

    def of_side(self, side: Side) -> tuple[Feature, ...]:
        """Return the features of one side, in schema order."""
        return tuple(f for f in self.features if f.side == side)

    def feature(self, name: str) -> Feature:
        """Return a feature by name.

        Raises:
            KeyError: if there is none.
        """
        return {feature.name: feature for feature in self.features}[name]

    def embedding_tables(self) -> dict[str, int]:
        """Return every embedding table's name and rows."""
        return {feature.embedding: feature.rows for feature in self.features}

    def source_columns(self, side: Side) -> dict[str, Kind]:
        """Return the columns that features of ``side`` read, each with the kind that decides its type.

        Raises:
            BadConfigError: if one column is read as two kinds.
        """
        refuse(self.unlike_kinds(side))
        return {feature.column: feature.kind for feature in self.of_side(side)}

    def vectors(self, side: Side) -> tuple[Feature, ...]:
        """Return the vector features of one side, in schema order: the order of a batch's numbers."""
        return tuple(f for f in self.of_side(side) if f.kind == "vector")

    def vector_columns(self, side: Side) -> dict[str, int]:
        """Return the columns that vector features of ``side`` read, each with the numbers of a value."""
        return {feature.column: feature.dim for feature in self.vectors(side)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_dict` reads back; keys are those of the schema file."""
        data = json.loads(json.dumps(asdict(self)))
        for feature in data["features"]:
            if feature["kind"] != "vector":
                del feature["dim"]  # What a schema without vectors says, and its fingerprint, stay as they were.
        if not self.request_from:
            del data["request_from"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FeatureSchema:
        """Build a schema from plain data.

        Raises:
            BadConfigError: on an unknown or missing key, or a value that is refused.
        """
        top = dict(data)
        features = tuple(_build(Feature, f"features[{i}]", f) for i, f in enumerate(_entries(top, "features")))
        sequences = tuple(_build(Sequence, f"sequences[{i}]", s) for i, s in enumerate(_entries(top, "sequences")))
        aggregates = _build(Aggregates, "aggregates", top.pop("aggregates", {}))
        return _build(cls, "schema", {**top, "features": features, "sequences": sequences, "aggregates": aggregates})

    @classmethod
    def load(cls, path: str | Path) -> FeatureSchema:
        """Read a schema file (TOML).

        Raises:
            BadConfigError: if the file is missing, is not TOML, or says something refused; the text names the file.
        """
        try:
            data = tomllib.loads(storage.read_bytes(str(path)).decode("utf-8"))
        except FileNotFoundError as error:
            raise BadConfigError(f"there is no schema file {path}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadConfigError(f"schema file {path} is not valid TOML: {error}") from error
        try:
            return cls.from_dict(data)
        except BadConfigError as error:
            raise BadConfigError(
                f"schema file {path}: {error} (with lines, and all there are: onetrans schema check {path})"
            ) from error

    @property
    def fingerprint(self) -> str:
        """Short hash of what decides a model's inputs: features and sequences, in order."""
        decides = {"features": self.to_dict()["features"], "sequences": self.to_dict()["sequences"]}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def load_schema(source: SourceSettings) -> FeatureSchema:
    """Return the feature schema of the configured log: the named file, the one beside the log, or the adapter's.

    Raises:
        BadConfigError: if there is none of them, or it is refused.
    """
    return FeatureSchema.load(schema_file(source))


def schema_file(source: SourceSettings) -> str:
    """Return the path of the schema file that :func:`load_schema` reads.

    Raises:
        BadConfigError: if there is none.
    """
    if source.schema:
        if not storage.exists(source.schema):
            raise BadConfigError(
                f"source.schema = {source.schema!r}: there is no file {storage.resolve(source.schema)}. A relative "
                "path is taken from the working directory; without this setting schema.toml in source.path is read"
            )
        return source.schema
    own = storage.join(source.path, "schema.toml")
    if storage.exists(own):
        return own
    with importlib.resources.as_file(_adapter(source.kind)) as adapter:
        if (adapter / "schema.toml").is_file():
            return str(adapter / "schema.toml")
    raise BadConfigError(f"there is no feature schema: source.schema is not set and there is no {own}")


def _adapter(kind: str) -> Traversable:
    """Return the folder of a source's code: that of its module, for a class outside the repository."""
    if ":" not in kind:
        return importlib.resources.files("jobs") / "sources" / kind
    module = kind.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)  # The module itself is not imported: it may need Spark.
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        raise BadConfigError(f"source.kind = {kind!r}: there is no module {module}; is it installed, or on PYTHONPATH?")
    return Path(found.origin).parent


def _repeats(what: str, section: str, key: str, names: Iterable[str]) -> Iterator[Mistake]:
    seen: set[str] = set()
    for number, name in enumerate(names):
        if name in seen:
            yield Mistake((section, number, key), f"{what} {name!r} is declared twice")
        seen.add(name)


def refuse(mistakes: Iterable[Mistake]) -> None:
    """Raise the first of some mistakes.

    Raises:
        BadConfigError: if there is one.
    """
    for mistake in mistakes:
        raise BadConfigError(mistake.text)


def mistakes_in(data: Mapping[str, Any]) -> tuple[list[Mistake], FeatureSchema]:
    """Return every mistake in the content of a schema file, and what can be made of it all the same.

    A part that cannot be made is left out of the rules for the whole.  Without mistakes the second is the schema.
    """
    top, found = dict(data), list[Mistake]()
    parts: dict[str, list[Any]] = {"features": [], "sequences": []}
    whole = True
    for section, cls in (("features", Feature), ("sequences", Sequence)):
        try:
            entries = list(_entries(top, section))
        except BadConfigError as error:
            found.append(Mistake((section,), str(error)))
            whole = False
            continue
        for number, entry in enumerate(entries):
            part = _attempt(cls, f"{section}[{number}]", (section, number), entry, found)
            parts[section] += [part]
            whole &= part is not None
    aggregates = _attempt(Aggregates, "aggregates", ("aggregates",), top.pop("aggregates", {}), found)
    # A part that is missing would move the numbers of those after it.
    features = tuple(
        part or Feature(f"left_out_{n}", "user", "hashed", f"left_out_{n}", 1)
        for n, part in enumerate(parts["features"])
    )
    sequences = tuple(
        part or Sequence(f"left_out_{n}", f"left_out_{n}", 1) for n, part in enumerate(parts["sequences"])
    )
    alone = len(found)
    together = {**top, "features": features, "sequences": sequences, "aggregates": aggregates or Aggregates()}
    schema: FeatureSchema = _attempt(FeatureSchema, "schema", (), together, found)
    return [m for number, m in enumerate(found) if number < alone or whole or m.place != ("features",)], schema


def _attempt(cls: type[Any], where: str, place: tuple[str | int, ...], data: Any, found: list[Mistake]) -> Any:
    """Return an instance made without its checks, all mistakes of which are added to ``found``; None: it cannot be."""
    mistakes = list(_value_mistakes(cls, where, data))
    found += [Mistake((*place, *mistake.place), mistake.text) for mistake in mistakes]
    if not isinstance(data, Mapping):
        return None
    missing = {f.name for f in _needed(cls) if f.name not in data}
    wrong = {mistake.place[0] for mistake in mistakes} | missing
    unusable = bool(wrong & {f.name for f in _needed(cls)}) and cls is not FeatureSchema
    made = object.__new__(cls)
    for part in fields(cls):
        if part.name in data and part.name not in wrong:
            value = _value(data[part.name])
        elif part.default is not MISSING:
            value = part.default
        elif part.default_factory is not MISSING:
            value = part.default_factory()
        else:
            value = 0 if part.name == "max_length" else ""
        object.__setattr__(made, part.name, value)
    if cls is Feature and not made.embedding:
        object.__setattr__(made, "embedding", made.name)
    own = [mistake for mistake in made.mistakes() if not mistake.place or mistake.place[0] not in wrong]
    found += [Mistake((*place, *mistake.place), mistake.text) for mistake in own]
    return None if unusable else made


def _needed(cls: type[Any]) -> list[Field[Any]]:
    """Return the fields that have no default."""
    return [f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def _entries(top: dict[str, Any], name: str) -> Iterable[Any]:
    """Take the list of tables ``name`` out of ``top``."""
    value = top.pop(name, ())
    if not isinstance(value, list | tuple):
        raise BadConfigError(f"schema: {name} = {value!r} is not a list of tables; write each as [[{name}]]")
    return value


def _build(cls: type[Any], where: str, data: Any) -> Any:
    """Construct a dataclass from file data: lists become tuples; unknown, missing and mistyped keys are named."""
    refuse(_value_mistakes(cls, where, data))
    return cls(**{key: _value(value) for key, value in data.items()})


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _value_mistakes(cls: type[Any], where: str, data: Any) -> Iterator[Mistake]:
    """Yield unknown keys of a table, values of the wrong type, and keys that are missing."""
    if not isinstance(data, Mapping):
        yield Mistake((), f"{where} = {data!r} is not a table of keys and values")
        return
    known = {f.name: f for f in fields(cls)}
    for key in sorted(set(data) - set(known)):
        yield Mistake((key,), f"{where}: unknown key {key!r}; known keys are {', '.join(known)}")
    label = f" ({data['name']})" if isinstance(data.get("name"), str) else ""
    hints = get_type_hints(cls)
    for key, value in data.items():
        if key in known and not _fits(_value(value), hints[key]):
            yield Mistake((key,), f"{where}{label}: {key} = {value!r} is not {_told(hints[key])}")
    missing = [f.name for f in _needed(cls) if f.name not in data]
    if missing:
        yield Mistake((missing[0],), f"{where}{label}: {', '.join(map(repr, missing))} must be given")


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a value of a file may stand where ``kind`` is expected; which words are allowed is checked later."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, inner[0]) for part in value)
    if origin is abc.Mapping:
        return isinstance(value, Mapping) and all(_fits(part, inner[1]) for part in value.values())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _told(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        return f"a list, each of it {_told(inner[0])}"
    if origin is abc.Mapping:
        return f"a table, each value of it {_told(inner[1])}"
    return {int: "a whole number", float: "a number"}.get(kind, "text")
