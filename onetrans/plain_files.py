"""Training data in plain files, for who has no lake: ``train``, ``val`` and ``test`` in one folder with a schema.

``DIR`` holds ``schema.toml`` and, for each split, a file ``train.csv`` (``.csv.gz``,
``.jsonl``, ``.parquet``) or a folder ``train/`` of such files.  A row is an
impression::

    request_id   text, optional: without it every row is a request of its own
    user_id, item_id                       text or whole numbers
    ts           time of the request: ISO 8601 (in the schema's time zone where it names none), or a whole number of
                 the schema's ``epoch`` (microseconds by default)
    click, conversion                      0 or 1; no conversion without a click
    <column>     what the schema's user, context and item features read; hour_of_day and day_of_week come from ts
    seq_<name>   per behaviour sequence the events before the request: a list, in CSV as JSON,
                 ``[{"ts": ..., <column of an event feature>: ...}, ...]``

Or a row is a request already, as in the table ``training_requests``: a Parquet file
that has a column ``candidates`` is read as it stands.

Rows become requests once, in ``<out>/data``; what follows is the path every
training takes.  A value that no feature can hold stops the reading, with file,
column, number of rows and an example: there is no quarantine here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onetrans import storage
from onetrans.errors import BadConfigError, BadDataError
from onetrans.plain_rows import opened, place, read_rows
from onetrans.progress import Progress, long_steps
from onetrans.requests import request_columns
from onetrans.schema import CONTEXT_FROM_CLOCK, Feature, FeatureSchema, Side, hash64

Split = Literal["train", "val", "test"]

SCHEMA_FILE = "schema.toml"
ENDINGS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
_ROW_GROUP = 8192
_STEPS = 3
"""Of the conversion of one file: read, made requests, written."""
_PER_UNIT = {"": 1, "us": 1, "ms": 1_000, "s": 1_000_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CONVERSION = 2
"""Raised when the same file becomes other requests: what an earlier release has converted is not read again."""

_KEYS = ("user_id", "item_id", "ts", "click", "conversion")


def read_schema(directory: str) -> FeatureSchema:
    """Return the schema of a folder of plain files.

    Raises:
        BadConfigError: if there is none, or it is refused.
    """
    return FeatureSchema.load(storage.join(storage.resolve(directory), SCHEMA_FILE))


def split_files(directory: str, split: Split) -> list[str]:
    """Return the files of a split, in the order of their names; none if there is no such split.

    Raises:
        BadDataError: if the split stands there both as a file and as a folder, or in two formats.
    """
    base = storage.resolve(directory)
    alone = [storage.join(base, f"{split}{ending}") for ending in ENDINGS]
    found = [file for file in alone if storage.exists(file)]
    inside = storage.list_files(storage.join(base, split))
    usable = sorted(file for file in inside if file.endswith(ENDINGS) and not _name(file).startswith(("_", ".")))
    if len(found) + bool(usable) > 1:
        raise BadDataError(f"{directory}: the split {split} stands there more than once: {_names(found + usable)}")
    if inside and not usable and not found:
        raise BadDataError(f"{directory}/{split} holds no {', '.join(ENDINGS)} file")
    return found or usable


def prepare(directory: str, split: Split, schema: FeatureSchema, out: str) -> list[str]:
    """Return files of requests (columns of ``training_requests``) of a split; converted on first use, under ``out``.

    Raises:
        BadConfigError: if the split is not there.
        BadDataError: if a row cannot be read; the text names file, column, how many rows, and an example.
    """
    files = split_files(directory, split)
    if not files:
        raise BadConfigError(
            f"{directory} has no {split}: needed is {split}.csv, .jsonl or .parquet, or a folder {split}/"
        )
    with long_steps(_STEPS * len(files), f"{split}: files to requests") as progress:
        return [_prepared(file, schema, out, progress) for file in files]


def digest(files: Sequence[str]) -> str:
    """Return a hash of some files' contents, in their order."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(hashlib.sha256(storage.read_bytes(file)).digest())
    return whole.hexdigest()[:16]


def _prepared(file: str, schema: FeatureSchema, out: str, progress: Progress) -> str:
    before = progress.done
    if file.endswith(".parquet") and "candidates" in opened(file, lambda stream: pq.read_schema(stream)).names:
        progress.advance(_STEPS)
        return file
    target = storage.join(storage.resolve(out), "data", f"{digest([file])}-{schema.fingerprint}-{CONVERSION}.parquet")
    if not storage.exists(target):
        sink = pa.BufferOutputStream()
        rows = read_rows(file)
        progress.advance(1)
        requests = to_requests(rows, schema, file)
        progress.advance(1)
        pq.write_table(requests, sink, row_group_size=_ROW_GROUP)
        storage.write_bytes(target, sink.getvalue().to_pybytes())
    progress.advance(before + _STEPS - progress.done)
    return target


def to_requests(rows: pa.Table, schema: FeatureSchema, where: str) -> pa.Table:
    """Return impressions as requests, ordered by (time, request id); candidates keep the order of the rows.

    Raises:
        BadDataError: as for :func:`prepare`.
    """
    source = _Rows(rows, where, schema)
    user, context, item = (schema.of_side(side) for side in ("user", "context", "item"))
    ts_N, click_N, conversion_N = source.times("ts"), source.label("click"), source.label("conversion")
    source.refuse("conversion", (conversion_N == 1) & (click_N == 0), "a conversion without a click")
    user_id, item_id = source.ids("user_id"), source.ids("item_id")
    if "request_id" in rows.column_names:
        request_id = source.ids("request_id")
    else:
        told = _name_in_split(where)
        request_id = pa.array([f"{told}:{row + 1}" for row in range(rows.num_rows)])
    code_N = request_id.dictionary_encode().indices.to_numpy()
    order_N = np.argsort(code_N, kind="stable")
    first = np.flatnonzero(np.concatenate(([True], np.diff(code_N[order_N]) != 0)))
    head_R = order_N[first]
    owner_N = np.repeat(head_R, np.diff(np.append(first, len(order_N))))  # per row of order_N, its request's first row
    users = user_id.dictionary_encode().indices.to_numpy()
    for column, values in (("user_id", users), ("ts", ts_N)):
        differs = np.zeros(rows.num_rows, dtype=bool)
        differs[order_N] = values[order_N] != values[owner_N]
        source.refuse(column, differs, f"another {column} than the first row of the same request")
    items = item_id.dictionary_encode().indices.to_numpy()
    again = np.ones(rows.num_rows, dtype=bool)
    again[np.unique(code_N.astype(np.int64) * (int(items.max()) + 1) + items, return_index=True)[1]] = False
    source.refuse("item_id", again, "an item that the request has shown before")

    taken = pa.array(order_N)
    members = [item_id.take(taken), *(source.feature(f).take(taken) for f in item)]
    members += [pa.array(values[order_N], pa.int32()) for values in (click_N, conversion_N)]
    names = ["item_id", *(f.name for f in item), "click", "conversion"]
    offsets = pa.array(np.append(first, rows.num_rows), pa.int32())
    candidates = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(members, names=names))
    heads = pa.array(head_R)
    columns: dict[str, Any] = {
        "request_id": request_id.take(heads),
        "user_id": user_id.take(heads),
        "ts": pa.array(ts_N[head_R], pa.timestamp("us", tz="UTC")),
        **{f.name: source.feature(f).take(heads) for f in user},
        **{f.name: source.context(f, ts_N).take(heads) for f in context},
        **{s.column: source.events(s.column, head_R, ts_N[head_R]) for s in schema.sequences},
        "candidates": candidates,
    }
    kinds = {field.name: field.type for field in request_columns(schema)}
    table = pa.table({name: pa.array(column).cast(kinds.get(name, pa.string())) for name, column in columns.items()})
    return table.sort_by([("ts", "ascending"), ("request_id", "ascending")])


class _Rows:
    """Columns of a file as what the schema says they are; whatever does not fit is refused by name."""

    def __init__(self, rows: pa.Table, where: str, schema: FeatureSchema) -> None:
        self.rows, self.file, self.where = rows.combine_chunks(), where, where.removeprefix("file://")
        self.schema = schema
        needed = [*_KEYS, *(f.column for side in ("user", "item") for f in schema.of_side(side))]
        needed += [f.column for f in schema.of_side("context") if f.column not in CONTEXT_FROM_CLOCK]
        needed += [s.column for s in schema.sequences]
        missing = [name for name in dict.fromkeys(needed) if name not in rows.column_names]
        if missing:
            told = ", ".join(f"{name!r}{self._readers(name, ('user', 'item', 'context'))}" for name in missing)
            renamed = "; plain files have the schema's own names, [columns] is not read" if schema.columns else ""
            raise BadDataError(f"{self.where} has no column {told}; it has {', '.join(rows.column_names)}{renamed}")

    def _readers(self, column: str, sides: Sequence[Side]) -> str:
        names = [repr(f.name) for side in sides for f in self.schema.of_side(side) if f.column == column]
        return f" (read by feature {', '.join(names)})" if names else ""

    def column(self, name: str) -> pa.Array:
        """Return a column as one array, empty text as null."""
        column = self.rows[name].combine_chunks() if isinstance(self.rows[name], pa.ChunkedArray) else self.rows[name]
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.string())
            column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)
        return column

    def refuse(self, name: str, bad_N: np.ndarray[Any, Any], what: str) -> None:
        """Stop at rows that cannot be read.

        Raises:
            BadDataError: if there is one.
        """
        if bad_N.any():
            row = int(np.argmax(bad_N))
            raise BadDataError(
                f"{self.where}, column {name}: {int(bad_N.sum()):,} of {len(bad_N):,} rows have {what}, first "
                f"{place(self.file, row)}: {self.rows[name][row].as_py()!r}"
            )

    def ids(self, name: str) -> pa.Array:
        """Return an id column as text."""
        column = self.column(name)
        self.refuse(name, column.is_null().to_numpy(zero_copy_only=False), "no value")
        return self.text(name, column)

    def text(self, name: str, column: pa.Array) -> pa.Array:
        """Return whole numbers and text as text."""
        if pa.types.is_floating(column.type):
            raise BadDataError(f"{self.where}, column {name} is floating point; write whole numbers or text")
        return column.cast(pa.string())

    def label(self, name: str) -> np.ndarray[Any, Any]:
        """Return a label column."""
        number_N = self.numbers(name, self.column(name)).fill_null(float("nan")).to_numpy(zero_copy_only=False)
        self.refuse(name, (number_N != 0) & (number_N != 1), "neither 0 nor 1")
        return number_N.astype(np.int32)

    def numbers(self, name: str, column: pa.Array) -> pa.Array:
        """Return a column of numbers; NaN is missing."""
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        parsed = _parsed(column, pa.float64())
        self.refuse(name, _lost(column, parsed), "no number")
        return pc.if_else(pc.is_nan(parsed), None, parsed)

    def times(self, name: str) -> np.ndarray[Any, Any]:
        """Return a column of times in microseconds since 1970-01-01 UTC."""
        column = self.column(name)
        parsed = microseconds(column, self.schema)
        self.refuse(name, parsed.is_null().to_numpy(zero_copy_only=False), "no time")
        return parsed.to_numpy(zero_copy_only=False)

    def feature(self, feature: Feature) -> pa.Array:
        """Return a feature's column as it is stored in requests."""
        return self.stored(feature, self.column(feature.column), feature.column)

    def context(self, feature: Feature, ts_N: np.ndarray[Any, Any]) -> pa.Array:
        """Return a context feature's column; what a clock tells is computed from ``ts``, as for a day of the lake."""
        if feature.column not in CONTEXT_FROM_CLOCK:
            return self.feature(feature)
        local = pa.array(ts_N, pa.timestamp("us", tz="UTC")).cast(pa.timestamp("us", tz=self.schema.timezone))
        hour = feature.column == "hour_of_day"
        number = pc.hour(local) if hour else pc.day_of_week(local, count_from_zero=False, week_start=1)
        return self.stored(feature, number, feature.column)

    def stored(self, feature: Feature, column: pa.Array, name: str) -> pa.Array:
        """Return values as they are stored: hashes, numbers, vectors."""
        if feature.kind == "hashed":
            return _hashed(self.text(name, column))
        if feature.kind == "bucketized":
            return self.numbers(name, column)
        if pa.types.is_string(column.type):
            column = pa.array([None if v is None else json.loads(v) for v in column.to_pylist()])
        return column.cast(pa.list_(pa.float32()))

    def events(self, name: str, head_R: np.ndarray[Any, Any], ts_R: np.ndarray[Any, Any]) -> pa.Array:
        """Return the events of each request, oldest first; a list of structs, or the same as JSON text.

        Raises:
            BadDataError: if one lacks a column, has no time, or is not before its request.
        """
        given = self.column(name).take(pa.array(head_R))
        features = self.schema.of_side("event")
        wanted = list(dict.fromkeys(("ts", *(f.column for f in features))))
        if pa.types.is_string(given.type):
            given = self._parse_events(name, given, head_R)
        lengths_R = pc.fill_null(pc.list_value_length(given), 0).to_numpy(zero_copy_only=False)
        values = given.flatten()
        fields = [values.type.field(i).name for i in range(values.type.num_fields)] if len(values) else wanted
        missing = [column for column in wanted if column not in fields]
        if missing:
            raise BadDataError(
                f"{self.where}, column {name}: its events have no {missing[0]!r}"
                f"{self._readers(missing[0], ('event',))}, but {', '.join(fields)}; "
                "every event carries it, null where it is not known"
            )
        parts = {column: values.field(column) if len(values) else pa.nulls(0) for column in wanted}
        time_E = microseconds(parts["ts"], self.schema)
        owner_E = np.repeat(np.arange(len(given)), lengths_R)
        if time_E.null_count:
            first = int(np.argmax(time_E.is_null().to_numpy(zero_copy_only=False)))
            raise BadDataError(
                f"{self.where}, column {name}: {time_E.null_count} events have no time that can be read, first in "
                f"{place(self.file, int(head_R[owner_E[first]]))}: {parts['ts'][first].as_py()!r}"
            )
        self._refuse_late(name, head_R[owner_E], time_E.to_numpy(zero_copy_only=False), ts_R[owner_E])
        order = pa.array(np.lexsort((time_E.to_numpy(zero_copy_only=False), owner_E)))
        stored = [self.stored(f, parts[f.column], f"{name}.{f.column}").take(order) for f in features]
        event = pa.StructArray.from_arrays(
            [time_E.cast(pa.timestamp("us", tz="UTC")).take(order), *stored], names=["ts", *(f.name for f in features)]
        )
        offsets = pa.array(np.concatenate(([0], np.cumsum(lengths_R))), pa.int32())
        return pa.ListArray.from_arrays(offsets, event)

    def _refuse_late(
        self, name: str, row_E: np.ndarray[Any, Any], time_E: np.ndarray[Any, Any], request_E: np.ndarray[Any, Any]
    ) -> None:
        late_E = time_E >= request_E
        if late_E.any():
            first = int(np.argmax(late_E))
            event, request = (self._told(int(us)) for us in (time_E[first], request_E[first]))
            raise BadDataError(
                f"{self.where}, column {name}: {int(late_E.sum()):,} of {len(late_E):,} events are not before their "
                f"request, first in {place(self.file, int(row_E[first]))}: event at {event}, request of {request}. "
                "What comes after a request may tell its outcome: take such events out of the row, or correct the time "
                "that is wrong"
            )

    def _told(self, microsecond: int) -> str:
        return (_EPOCH + timedelta(microseconds=microsecond)).astimezone(ZoneInfo(self.schema.timezone)).isoformat()

    def _parse_events(self, name: str, given: pa.Array, head_R: np.ndarray[Any, Any]) -> pa.Array:
        lists: list[Any] = []
        for number, text in enumerate(given.to_pylist()):
            try:
                events = [] if text is None else json.loads(text)
                if not (isinstance(events, list) and all(isinstance(event, dict) for event in events)):
                    raise ValueError("not a list of objects")
            except ValueError as error:
                raise BadDataError(
                    f"{self.where}, column {name}, {place(self.file, int(head_R[number]))}: {error}; needed is a JSON "
                    f'list of events, [{{"ts": ..., ...}}], found {text[:80]!r}'
                ) from error
            lists.append(events)
        try:
            return pa.array(lists, None if any(lists) else pa.list_(pa.struct([])))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise BadDataError(f"{self.where}, column {name}: events of one column differ in type: {error}") from error


def microseconds(column: pa.Array, schema: FeatureSchema) -> pa.Array:
    """Return times as int64 microseconds since 1970-01-01 UTC; null where one cannot be read."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        if kind.tz is None:
            column = _localized(column, schema.timezone)
        return column.cast(pa.timestamp("us", tz="UTC"), safe=False).cast(pa.int64())
    if pa.types.is_integer(kind):
        return pc.multiply(column.cast(pa.int64()), _PER_UNIT[schema.epoch])
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return pa.nulls(len(column), pa.int64())
    return pa.array([_microsecond(text, schema) for text in column.to_pylist()], pa.int64())


def _localized(column: pa.Array, zone: str) -> pa.Array:
    """Return local times as moments; one that clocks show twice is the first, one they skip goes on from before."""
    try:
        return pc.assume_timezone(column, zone, ambiguous="earliest")
    except pa.ArrowInvalid:  # Arrow knows no rule for skipped times by which they keep apart
        times = column.cast(pa.timestamp("us"), safe=False).to_pylist()
        aware = [None if time is None else time.replace(tzinfo=ZoneInfo(zone)).astimezone(UTC) for time in times]
        return pa.array(aware, pa.timestamp("us", tz="UTC"))


def _microsecond(text: str | None, schema: FeatureSchema) -> int | None:
    if text is None:
        return None
    if text.lstrip("-").isdigit():
        return int(text) * _PER_UNIT[schema.epoch]
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    time = time if time.tzinfo else time.replace(tzinfo=ZoneInfo(schema.timezone))
    return (time - _EPOCH) // timedelta(microseconds=1)


def _hashed(text: pa.Array) -> pa.Array:
    """Return the hashes of text, each distinct value hashed once."""
    coded = text.dictionary_encode()
    hashes = pa.array([hash64(value) for value in coded.dictionary.to_pylist()], pa.int64())
    return hashes.take(coded.indices)


def _parsed(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return the column in another type, null where a value has no meaning in it."""
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        return pa.array([_float(value) for value in column.to_pylist()], kind)


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _lost(given: pa.Array, parsed: pa.Array) -> np.ndarray[Any, Any]:
    lost = pc.and_(given.is_valid(), parsed.is_null())
    return np.asarray(lost.to_numpy(zero_copy_only=False), dtype=bool)


def _name(file: str) -> str:
    return Path(file).name


def _name_in_split(file: str) -> str:
    """Return a file's name, with its folder's where that is a split: two splits may have files of the same names."""
    path = Path(file)
    return f"{path.parent.name}/{path.name}" if path.parent.name in get_args(Split) else path.name


def _names(files: Sequence[str]) -> str:
    return ", ".join(_name(file) for file in files)
