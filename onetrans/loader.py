"""The loader: published days of ``training_requests`` become packed batches, in bounded memory.

Parquet files are read in order, window by window.  A *window* is a run of
requests; training shuffles the requests within it, evaluation keeps the stored
order.  Windows are laid out from the files' footers before any row is read, so
that each holds at most ``window_batches`` batches and ``window_bytes`` of
embedding rows, and all are about equally large: memory does not grow with the
table, and no pass ends in a sliver of a batch.

A *cursor* names the next batch: pass, window, batch.  A window's shuffle depends
on the seed, the pass and the window alone, so reading from a cursor gives exactly
the batches that an unbroken run would have given.

Several readers (the processes of one training) share every batch: the batch is
the same however many they are, and each takes one stretch of it in stored order,
so that its requests lie together and it decodes the row groups of that stretch
of the window only.  To know the batches it reads of the others' rows one column,
whose lists say how many candidates a request has.

Values never become Python objects: nested columns, lists of numbers included, are
flattened by their offsets, and the behaviour sequences of a request are merged by
(time, position of the sequence in the schema) with one stable sort.

Shape suffixes beyond those of :mod:`onetrans.batch`: F features of one side,
S sequences, G row groups, W windows + 1, C rows of one side.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from onetrans import storage
from onetrans.batch import RequestBatch
from onetrans.errors import BadConfigError, BadDataError
from onetrans.schema import Feature, FeatureSchema

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
T = TypeVar("T")

TRUTH_COLUMNS = ("true_ctr", "true_cvr")
"""A simulator's probabilities: read for reports only, never part of a batch."""

_CANDIDATES = "candidates"
_LABELS = ("click", "conversion")
_CHUNK_BYTES = 8 << 20
_COUNTED_ROWS = 1 << 16
_INT_BYTES = 8
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class LoaderConfig:
    """How rows become batches."""

    batch_size: int
    """Impressions of a batch, about: whole requests are packed."""
    max_seq_len: int
    """Most recent events kept of a request, all sequences together."""
    window_batches: int = 16
    """Batches a window holds at most; training shuffles requests within a window."""
    window_bytes: int = 256 << 20
    """Bytes of embedding rows a window holds at most; long sequences make windows shorter."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise BadConfigError(f"loader: {name} = {value} must be at least 1")


@dataclass(frozen=True)
class Place:
    """A row of the data."""

    file: str
    """Parquet file."""
    row_group: int
    """Row group within the file."""
    row: int
    """Row within the row group."""

    def __str__(self) -> str:
        return f"{self.file}, row group {self.row_group}, row {self.row}"


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on."""

    epoch: int = 0
    """Pass over the data."""
    window: int = 0
    """Window of the pass."""
    batch: int = 0
    """Batch of the window."""
    place: Place | None = None
    """First row of the window; checked on resume, and tells a person where in the data a batch lies."""

    def __str__(self) -> str:
        where = f", which starts at {self.place}" if self.place else ""
        return f"pass {self.epoch}, batch {self.batch} of window {self.window}{where}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cursor:
        """Read what :meth:`to_dict` wrote."""
        place = data.get("place")
        return cls(data["epoch"], data["window"], data["batch"], Place(**place) if place else None)


@dataclass(frozen=True)
class Share:
    """Which part of every batch one of several readers takes."""

    number: int = 0
    """Number of the reader, from 0."""
    of: int = 1
    """Readers."""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise BadConfigError(f"loader: share number {self.number} of {self.of} must be in 0..{self.of - 1}")

    def own(self, part: Ints, sizes_R: Ints) -> Ints:
        """Return this reader's requests of a batch: a stretch in stored order with its share of the impressions."""
        if self.of == 1:
            return part
        stored = np.sort(part)
        reached = np.cumsum(sizes_R[stored])
        targets = reached[-1] * np.arange(1, self.of) / self.of
        return np.split(stored, np.searchsorted(reached, targets, side="right"))[self.number]


@dataclass(frozen=True)
class Loaded:
    """One batch and what belongs to it."""

    batch: RequestBatch
    """The batch, or the reader's share of it, which may be empty; on the CPU."""
    cursor: Cursor
    """Names this batch."""
    following: Cursor
    """Names the next one."""
    keys: pa.Table | None
    """Per candidate request_id, user_id, item_id, ts, click, conversion and, where stored, true_ctr and
    true_cvr; only when asked for."""


@dataclass(frozen=True)
class _RowGroup:
    """One row group, as the footer describes it."""

    file: str
    index: int
    requests: int
    impressions: int
    events: int


@dataclass(frozen=True)
class _Rows:
    """Some requests, encoded; the members are those of :class:`onetrans.batch.RequestBatch`, in numpy."""

    user_RU: Ints
    context_RK: Ints
    item_NI: Ints
    candidate_offsets_O: Ints
    event_EV: Ints
    event_sequence_E: Ints
    event_time_E: Ints
    event_offsets_O: Ints
    request_time_R: Ints
    click_N: Floats
    conversion_N: Floats
    user_vector_RX: Floats | None
    context_vector_RX: Floats | None
    item_vector_NX: Floats | None
    keys: pa.Table | None = field(default=None)


class RequestData:
    """Some files of ``training_requests``, readable as batches from any cursor."""

    def __init__(
        self, files: Iterable[str], schema: FeatureSchema, config: LoaderConfig, *, with_keys: bool = False
    ) -> None:
        """Read the footers of ``files`` (in reading order) and lay out the windows.

        Raises:
            BadDataError: if there are no rows, a file is unreadable, or a column is missing or of another type.
        """
        self.files = list(files)
        self.schema = schema
        self.config = config
        self.with_keys = with_keys
        groups = [group for file in self.files for group in self._footer(file)]
        self._groups = [group for group in groups if group.requests]
        if not self._groups:
            raise BadDataError(f"training_requests: there are no rows in {len(self.files)} files")
        self.requests = sum(group.requests for group in self._groups)
        self.impressions = sum(group.impressions for group in self._groups)
        self.events = sum(group.events for group in self._groups)
        self._first_row_G = np.cumsum([0] + [group.requests for group in self._groups])
        self._window_start_W = self._lay_out_windows()

    @property
    def num_windows(self) -> int:
        """Windows of one pass."""
        return len(self._window_start_W) - 1

    # Layout

    def _footer(self, file: str) -> Iterator[_RowGroup]:
        parquet = _open(file)
        _check_columns(file, parquet.schema_arrow, self.schema, self.with_keys)
        metadata = parquet.metadata
        path = [parquet.schema.column(column).path for column in range(metadata.num_columns)]
        # One leaf of each list counts its elements; an empty list counts as one, so the figures are upper bounds.
        click = next(c for c, p in enumerate(path) if p.startswith(f"{_CANDIDATES}.") and p.endswith(".click"))
        event = [
            next(c for c, p in enumerate(path) if p.startswith(f"{sequence.column}.") and p.endswith(".ts"))
            for sequence in self.schema.sequences
        ]
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            impressions = group.column(click).num_values
            yield _RowGroup(
                file, index, group.num_rows, impressions, sum(group.column(column).num_values for column in event)
            )

    def _request_bytes(self, group: _RowGroup) -> float:
        """Return the size of the group's average request once encoded."""
        sides = {side: len(self.schema.of_side(side)) for side in ("user", "context", "item", "event")}
        total = (
            group.requests * (sides["user"] + sides["context"] + 3)
            + group.impressions * (sides["item"] + 2)
            + group.events * (sides["event"] + 2)
        )
        numbers = {side: sum(f.dim for f in self.schema.vectors(side)) for side in ("user", "context", "item")}
        vectors = group.requests * (numbers["user"] + numbers["context"]) + group.impressions * numbers["item"]
        return (total * _INT_BYTES + vectors * _FLOAT_BYTES) / group.requests

    def _request_costs(self) -> npt.NDArray[np.float64]:
        """Return the share of a window, (G,), that an average request of each row group takes."""
        window_impressions = self.config.window_batches * self.config.batch_size
        return np.array(
            [
                max(
                    group.impressions / group.requests / window_impressions,
                    self._request_bytes(group) / self.config.window_bytes,
                )
                for group in self._groups
            ]
        )

    def _lay_out_windows(self) -> Ints:
        """Cut the requests so that every window costs about the same, and none more than the limits allow."""
        cost_G = self._request_costs()
        requests_G = np.diff(self._first_row_G)
        reached_G = np.concatenate([[0.0], np.cumsum(cost_G * requests_G)])
        windows = int(np.ceil(reached_G[-1] - 1e-9)) or 1
        starts = np.interp(np.linspace(0.0, reached_G[-1], windows + 1), reached_G, self._first_row_G)
        return np.unique(np.round(starts).astype(np.int64))

    def place(self, window: int) -> Place:
        """Return the first row of a window."""
        row = int(self._window_start_W[window])
        group = int(np.searchsorted(self._first_row_G, row, side="right")) - 1
        return Place(self._groups[group].file, self._groups[group].index, row - int(self._first_row_G[group]))

    # Reading

    def batches(
        self, *, shuffle_seed: int | None, start: Cursor | None = None, epochs: int = 1, share: Share | None = None
    ) -> Iterator[Loaded]:
        """Yield every batch from ``start`` to the end of the last pass; with ``share``, that part of each batch.

        ``shuffle_seed`` shuffles the requests of each window; None keeps the stored order.

        Raises:
            BadConfigError: if ``start`` belongs to other data or another layout.
            BadDataError: on a null or mistyped value that no batch can hold; the text names file and row.
        """
        start, share = start or Cursor(), share or Share()
        self._check_cursor(start, epochs)
        skip = start.batch
        for epoch in range(start.epoch, epochs):
            first = start.window if epoch == start.epoch else 0
            for window, rows, ends in self._windows(
                first, None if shuffle_seed is None else [shuffle_seed, epoch], share
            ):
                for number in range(skip, len(ends) - 1):
                    here = Cursor(epoch, window, number, self.place(window))
                    packed = _stretch(rows, ends[number], ends[number + 1])
                    yield Loaded(_tensors(packed), here, self._following(here, len(ends) - 1), packed.keys)
                    del packed
                skip = 0
                del rows

    def _check_cursor(self, start: Cursor, epochs: int) -> None:
        if start.epoch >= epochs:
            return
        fits = 0 <= start.window < self.num_windows
        if not fits or (start.place is not None and start.place != self.place(start.window)):
            raise BadConfigError(
                f"the cursor ({start}) does not belong to this data: it has {self.num_windows} windows of "
                f"{self.requests} requests in {len(self.files)} files; delete the checkpoint to start over"
            )

    def _following(self, cursor: Cursor, parts: int) -> Cursor:
        if cursor.batch + 1 < parts:
            return Cursor(cursor.epoch, cursor.window, cursor.batch + 1, cursor.place)
        if cursor.window + 1 < self.num_windows:
            return Cursor(cursor.epoch, cursor.window + 1, 0, self.place(cursor.window + 1))
        return Cursor(cursor.epoch + 1, 0, 0, self.place(0))

    def _batch_parts(self, sizes_R: Ints, seed: list[int] | None) -> list[Ints]:
        """Cut a window's requests into batches of nearly equal impressions, each about ``batch_size``."""
        order_R = np.arange(sizes_R.shape[0])
        if seed is not None:
            order_R = np.random.default_rng(seed).permutation(order_R)
        reached_R = np.cumsum(sizes_R[order_R])
        parts = max(1, round(float(reached_R[-1]) / self.config.batch_size))
        targets = reached_R[-1] * np.arange(1, parts) / parts
        cuts = np.unique(np.searchsorted(reached_R, targets, side="right"))
        return [part for part in np.split(order_R, cuts) if part.shape[0]]

    def _windows(self, first: int, seed: list[int] | None, share: Share) -> Iterator[tuple[int, _Rows, list[int]]]:
        """Yield each window from ``first`` on: its number, the rows of its batches end to end, and where each begins.

        The last number is where the last batch ends.
        """
        reader = self._reader()
        counter = _Reader(self._groups, lambda parquet: [_click_leaf(parquet)], lambda group: _COUNTED_ROWS)
        for window in range(first, self.num_windows):
            start, stop = (int(self._window_start_W[edge]) for edge in (window, window + 1))
            seeds = None if seed is None else [*seed, window]
            if share.of == 1:
                rows = self._encoded(reader, start, stop)
                parts = self._batch_parts(np.diff(rows.candidate_offsets_O), seeds)
            else:
                sizes_R = _candidate_counts(counter.read(start, stop))
                parts = [share.own(part, sizes_R) for part in self._batch_parts(sizes_R, seeds)]
                own = np.concatenate(parts)
                # Where nothing is its own it holds one row: an empty batch still knows how wide its parts are.
                low, high = (int(own.min()), int(own.max()) + 1) if own.shape[0] else (0, 1)
                rows = self._encoded(reader, start + low, start + high)
                parts = [part - low for part in parts]
            rows = _take(rows, np.concatenate(parts))
            yield window, rows, _edges(parts)
            del rows

    def _reader(self) -> _Reader:
        return _Reader(self._groups, lambda parquet: _leaves(parquet, self.schema, self.with_keys), self._chunk_rows)

    def _pieces(self, reader: _Reader, start: int, stop: int) -> list[_Rows]:
        """Return some rows, encoded; a chunk that several windows share is encoded once."""
        pieces = []
        for chunk, where, first, last in reader.chunks(start, stop):
            if reader.encoded is None or reader.encoded[0] is not chunk:
                encoded = _encode(chunk, self.schema, self.config.max_seq_len, self.with_keys, where)
                reader.encoded = chunk, encoded
            pieces.append(_stretch(reader.encoded[1], first, last))
        return pieces

    def _encoded(self, reader: _Reader, start: int, stop: int) -> _Rows:
        return _concatenate(self._pieces(reader, start, stop))

    def _chunk_rows(self, group: _RowGroup) -> int:
        return max(1, int(_CHUNK_BYTES / self._request_bytes(group)))


class _Reader:
    """Reads rows by their number over all row groups, forwards; row groups that nothing is read of are not decoded."""

    def __init__(
        self,
        groups: list[_RowGroup],
        leaves: Callable[[pq.ParquetFile], list[str]],
        chunk_rows: Callable[[_RowGroup], int],
    ) -> None:
        self._groups, self._leaves, self._chunk_rows = groups, leaves, chunk_rows
        self._first_row_G = np.cumsum([0] + [group.requests for group in groups])
        self._parquet: pq.ParquetFile | None = None
        self._file, self._group = "", -1
        self._chunks: Iterator[pa.RecordBatch] = iter(())
        self._chunk: pa.RecordBatch | None = None
        self._begin = self._end = 0  # rows of the chunk
        self.encoded: tuple[pa.RecordBatch, _Rows] | None = None
        """The last chunk that was encoded, and what it became; kept for its reader."""

    def chunks(self, start: int, stop: int) -> Iterator[tuple[pa.RecordBatch, Place, int, int]]:
        """Yield the record batches that hold the rows from ``start`` to before ``stop``.

        Each with its first row, and which of its rows are wanted: from one number to before another.
        """
        while start < stop:
            while self._chunk is None or start >= self._end:
                self._next_chunk(start)
            group, upto = self._groups[self._group], min(stop, self._end)
            place = Place(group.file, group.index, self._begin - int(self._first_row_G[self._group]))
            yield self._chunk, place, start - self._begin, upto - self._begin
            start = upto

    def read(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows from ``start`` to before ``stop`` in record batches."""
        for chunk, _, first, last in self.chunks(start, stop):
            yield chunk.slice(first, last - first)

    def _next_chunk(self, row: int) -> None:
        number = int(np.searchsorted(self._first_row_G, row, side="right")) - 1
        group = self._groups[number]
        if number != self._group:
            if self._parquet is None or group.file != self._file:
                self._parquet, self._file = _open(group.file), group.file
            # A thread decodes the next chunk while this one is encoded.
            self._chunks = prefetch(
                self._parquet.iter_batches(
                    batch_size=self._chunk_rows(group), row_groups=[group.index], columns=self._leaves(self._parquet)
                ),
                depth=1,
            )
            self._group, self._end = number, int(self._first_row_G[number])
        self._chunk = self.encoded = None  # before the next is taken, so that no more are held than need be
        self._chunk = next(self._chunks, None)
        if self._chunk is None:
            found = self._end - int(self._first_row_G[number])
            raise BadDataError(f"{group.file}, row group {group.index}: {group.requests} rows declared, {found} read")
        self._begin, self._end = self._end, self._end + self._chunk.num_rows


def _click_leaf(parquet: pq.ParquetFile) -> str:
    paths = [parquet.schema.column(column).path for column in range(len(parquet.schema))]
    return next(path for path in paths if path.startswith(f"{_CANDIDATES}.") and path.endswith(".click"))


def _candidate_counts(chunks: Iterator[pa.RecordBatch]) -> Ints:
    """Return the number of candidates of each request."""
    lengths = [pc.fill_null(pc.list_value_length(chunk.column(_CANDIDATES)), 0) for chunk in chunks]
    return np.concatenate([length.to_numpy(zero_copy_only=False) for length in lengths]).astype(np.int64)


def prefetch(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield ``items`` while a thread prepares up to ``depth`` ahead; an error in the thread is raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    worker = threading.Thread(target=fill, name="loader", daemon=True)
    worker.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        worker.join()


def batch_of(rows: pa.RecordBatch, schema: FeatureSchema, max_seq_len: int, where: str = "requests") -> RequestBatch:
    """Return some rows of ``training_requests`` that are in memory as one batch, in their order.

    Raises:
        BadDataError: as :meth:`RequestData.batches` does; ``where`` takes the place of the file's name.
    """
    encoded = _encode(rows, schema, max_seq_len, False, Place(where, 0, 0))
    return _tensors(_take(encoded, np.arange(rows.num_rows)))  # copies: a tensor must not write into Arrow's memory


# Opening and checking files


def _open(file: str) -> pq.ParquetFile:
    filesystem, inner = storage.open_filesystem(file)
    try:
        return pq.ParquetFile(inner, filesystem=filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        if storage.is_lost(error):
            raise
        raise BadDataError(f"training_requests: {file} cannot be read: {error}") from error


def _wanted(schema: FeatureSchema, with_keys: bool) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the columns to read, plain and nested, each with the type it must have."""
    types = {"hashed": "bigint", "bucketized": "double", "vector": "list of float"}
    plain = {f.name: types[f.kind] for f in (*schema.of_side("user"), *schema.of_side("context"))}
    events = {"ts": "timestamp", **{f.name: types[f.kind] for f in schema.of_side("event")}}
    candidates = {**{f.name: types[f.kind] for f in schema.of_side("item")}, **dict.fromkeys(_LABELS, "int")}
    if with_keys:
        plain.update(request_id="text", user_id="text")
        candidates.update(item_id="text")
    plain["ts"] = "timestamp"
    nested = {sequence.column: events for sequence in schema.sequences}
    return plain, {**nested, _CANDIDATES: candidates}


_FITS = {
    "bigint": lambda kind: kind == pa.int64(),
    "double": lambda kind: kind == pa.float64(),
    "int": pa.types.is_integer,
    "text": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "list of float": lambda kind: pa.types.is_list(kind) and kind.value_type == pa.float32(),
    "timestamp": lambda kind: pa.types.is_timestamp(kind) and kind.unit == "us",
}


def _check_columns(file: str, found: pa.Schema, schema: FeatureSchema, with_keys: bool) -> None:
    """Refuse a file that lacks a column the schema needs, or has it in another type."""
    plain, nested = _wanted(schema, with_keys)
    kinds: dict[str, pa.DataType] = {column.name: column.type for column in found}
    needed = dict(plain)
    for top, members in nested.items():
        kind = kinds.get(top)
        if kind is None or not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise BadDataError(f"training_requests: {file}: column {top} is {kind or 'missing'}, needed is a list")
        for member in kind.value_type if pa.types.is_struct(kind.value_type) else ():
            kinds[f"{top}.{member.name}"] = member.type
        needed |= {f"{top}.{name}": wanted for name, wanted in members.items()}
    for name, wanted in needed.items():
        if name not in kinds:
            raise BadDataError(
                f"training_requests: {file} has no column {name}; build the day again with schema {schema.name!r}"
            )
        if not _FITS[wanted](kinds[name]):
            raise BadDataError(f"training_requests: {file}: column {name} is {kinds[name]}, needed is {wanted}")


def _leaves(parquet: pq.ParquetFile, schema: FeatureSchema, with_keys: bool) -> list[str]:
    """Return the Parquet leaf columns to read; others (positions, keys, a simulator's truth) stay on disk."""
    plain, nested = _wanted(schema, with_keys)
    if with_keys:
        nested = {**nested, _CANDIDATES: {**nested[_CANDIDATES], **dict.fromkeys(TRUTH_COLUMNS, "double")}}
    leaves = []
    for column in map(parquet.schema.column, range(len(parquet.schema))):
        top, *inner = column.path.split(".")
        # A list within a list has two more levels: its path ends with the member, "list" and "element".
        member = inner[-3 if column.max_repetition_level > 1 else -1] if inner else ""
        if top in plain or member in nested.get(top, ()):
            leaves.append(column.path)
    return leaves


# Arrow to embedding rows


def _encode(chunk: pa.RecordBatch, schema: FeatureSchema, max_seq_len: int, with_keys: bool, where: Place) -> _Rows:
    """Return the chunk's requests as embedding rows."""
    count = chunk.num_rows
    request_time_R = _int64(chunk.column("ts"), "ts", where)
    offsets_O, members = _flatten(chunk.column(_CANDIDATES))
    if (np.diff(offsets_O) == 0).any():
        row = where.row + int(np.argmax(np.diff(offsets_O) == 0))
        raise BadDataError(f"training_requests: {where.file}, row group {where.row_group}: row {row} has no candidate")
    labels = {name: _label(members[name], name, where) for name in _LABELS}
    event_EV, event_sequence_E, event_time_E, event_offsets_O = _merge_sequences(chunk, schema, max_seq_len, where)
    if event_time_E.shape[0]:
        owner_E = np.repeat(np.arange(count), np.diff(event_offsets_O))
        late_E = event_time_E >= request_time_R[owner_E]
        if late_E.any():
            row = where.row + int(owner_E[np.argmax(late_E)])
            raise BadDataError(
                f"training_requests: {where.file}, row group {where.row_group}: {int(late_E.sum())} events are not "
                f"before their request, first in row {row}; a label may leak: build the day again, "
                "or correct the file if it is your own"
            )
    keys = None
    if with_keys:
        owner_N = pa.array(np.repeat(np.arange(count), np.diff(offsets_O)))
        keys = pa.table(
            {
                **{name: chunk.column(name).take(owner_N) for name in ("request_id", "user_id")},
                "item_id": members["item_id"],
                "ts": chunk.column("ts").take(owner_N),
                **{name: labels[name].astype(np.int8) for name in _LABELS},
                **{name: members[name] for name in TRUTH_COLUMNS if name in members},
            }
        )
    return _Rows(
        user_RU=_embed(schema.of_side("user"), chunk.column, count),
        context_RK=_embed(schema.of_side("context"), chunk.column, count),
        item_NI=_embed(schema.of_side("item"), members.__getitem__, int(offsets_O[-1])),
        user_vector_RX=_vectors(schema.vectors("user"), chunk.column, count, where),
        context_vector_RX=_vectors(schema.vectors("context"), chunk.column, count, where),
        item_vector_NX=_vectors(schema.vectors("item"), members.__getitem__, int(offsets_O[-1]), where),
        candidate_offsets_O=offsets_O,
        event_EV=event_EV,
        event_sequence_E=event_sequence_E,
        event_time_E=event_time_E,
        event_offsets_O=event_offsets_O,
        request_time_R=request_time_R,
        click_N=labels["click"],
        conversion_N=labels["conversion"],
        keys=keys,
    )


def _merge_sequences(
    chunk: pa.RecordBatch, schema: FeatureSchema, max_seq_len: int, where: Place
) -> tuple[Ints, Ints, Ints, Ints]:
    """Return rows, sequence, time and offsets of all events by (request, time, sequence), the latest ones only."""
    features = schema.of_side("event")
    owners, times, names, flat = [], [], [], []
    for number, sequence in enumerate(schema.sequences):
        offsets_O, members = _flatten(chunk.column(sequence.column))
        length_R = np.diff(offsets_O)
        kept_R = np.minimum(length_R, sequence.max_length)
        if (kept_R < length_R).any():  # the rows were built for a schema that keeps more than this model was trained on
            latest = pa.array(_ranges(offsets_O[1:] - kept_R, kept_R))
            offsets_O, members = _offsets(kept_R), {name: values.take(latest) for name, values in members.items()}
        total = int(offsets_O[-1])
        owners.append(np.repeat(np.arange(chunk.num_rows), np.diff(offsets_O)))
        times.append(_int64(members["ts"], f"{sequence.column}.ts", where))
        names.append(np.full(total, number, dtype=np.int64))
        flat.append(members)
    if not owners:
        none = np.zeros(0, dtype=np.int64)
        return none.reshape(0, len(features)), none, none, np.zeros(chunk.num_rows + 1, dtype=np.int64)

    owner_E, time_E = np.concatenate(owners), np.concatenate(times)
    order_E = _stable_order(owner_E, time_E)
    length_R = np.bincount(owner_E, minlength=chunk.num_rows)
    end_R = np.cumsum(length_R)
    kept_R = np.minimum(length_R, max_seq_len)
    if (kept_R < length_R).any():
        order_E = order_E[_ranges(end_R - kept_R, kept_R)]
    # One array per feature: the chunk's sequences may be many and short.
    rows_EV = _embed(features, lambda name: pa.concat_arrays([m[name] for m in flat]), time_E.shape[0])
    return (
        rows_EV.take(order_E, 0),
        np.concatenate(names).take(order_E),
        time_E.take(order_E),
        _offsets(kept_R),
    )


def _stable_order(owner_E: Ints, time_E: Ints) -> Ints:
    """Return the order by (owner, time) that keeps equal events as they came."""
    if not owner_E.shape[0]:
        return np.zeros(0, dtype=np.int64)
    earliest = int(time_E.min())
    span = int(time_E.max()) - earliest + 1
    if span * (int(owner_E.max()) + 1) < 1 << 62:
        # One key instead of two: the sequences come in as sorted runs, which numpy's stable sort merges.
        return np.argsort(owner_E * span + (time_E - earliest), kind="stable")
    return np.lexsort((time_E, owner_E))


def _flatten(column: pa.Array) -> tuple[Ints, dict[str, pa.Array]]:
    """Return offsets and member arrays of a list of structs; a null list is empty, slices are honoured."""
    lengths_R = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    values = column.flatten()
    names = [values.type.field(i).name for i in range(values.type.num_fields)]
    return _offsets(lengths_R), dict(zip(names, values.flatten(), strict=True))


def _embed(features: tuple[Feature, ...], column: Any, count: int) -> Ints:
    """Return embedding rows, shape (count, F), of some features' columns."""
    rows_FC = np.empty((len(features), count), dtype=np.int64)
    for number, feature in enumerate(features):
        stored = column(feature.name)
        missing = stored.is_null().to_numpy(zero_copy_only=False) if stored.null_count else None
        if feature.kind == "vector":
            rows_FC[number] = 1 if missing is None else ~missing
            continue
        if missing is not None:
            stored = pc.fill_null(stored, 0)
        rows_FC[number] = feature.encode(stored.to_numpy(zero_copy_only=False), missing)
    return np.ascontiguousarray(rows_FC.T)


def _vectors(features: tuple[Feature, ...], column: Any, count: int, where: Place) -> Floats | None:
    """Return the numbers of some vector features, shape (count, X), scaled; zeros where one is missing."""
    if not features:
        return None
    numbers_CX = np.zeros((count, sum(f.dim for f in features)), dtype=np.float32)
    start = 0
    for feature in features:
        stored = column(feature.name)
        lengths = pc.list_value_length(stored).drop_null().to_numpy(zero_copy_only=False)
        if (lengths != feature.dim).any():
            found = lengths[np.argmax(lengths != feature.dim)]
            raise _bad_vector(feature, f"hold {found} numbers", (lengths != feature.dim).sum(), where)
        given_CD = stored.flatten().to_numpy(zero_copy_only=False).reshape(-1, feature.dim)  # a null number is NaN here
        scaled_CD = feature.normalize(given_CD)
        bad_C = np.isnan(scaled_CD[:, 0])
        if bad_C.any():
            raise _bad_vector(feature, "hold a number that is null, NaN or infinite", bad_C.sum(), where)
        place = slice(start, start + feature.dim)
        if stored.null_count:
            numbers_CX[stored.is_valid().to_numpy(zero_copy_only=False), place] = scaled_CD
        else:
            numbers_CX[:, place] = scaled_CD
        start += feature.dim
    return numbers_CX


def _bad_vector(feature: Feature, what: str, count: int, where: Place) -> BadDataError:
    return BadDataError(
        f"training_requests: {where.file}, row group {where.row_group}, from row {where.row}: {count} values of "
        f"{feature.name} {what}, needed are {feature.dim} finite ones; build the day again"
    )


def _int64(times: pa.Array, name: str, where: Place) -> Ints:
    if times.null_count:
        raise BadDataError(
            f"training_requests: {where.file}, row group {where.row_group}, from row {where.row}: "
            f"{times.null_count} values of {name} are null"
        )
    return times.view(pa.int64()).to_numpy(zero_copy_only=False)


def _label(values: pa.Array, name: str, where: Place) -> Floats:
    numbers = pc.fill_null(pc.cast(values, pa.float32()), float("nan")).to_numpy(zero_copy_only=False)
    bad = (numbers != 0) & (numbers != 1)
    if bad.any():
        raise BadDataError(
            f"training_requests: {where.file}, row group {where.row_group}, from row {where.row}: "
            f"{int(bad.sum())} values of candidates.{name} are neither 0 nor 1, for example {numbers[np.argmax(bad)]}"
        )
    return numbers


# Rows to batches


def _concatenate(pieces: list[_Rows]) -> _Rows:
    if len(pieces) == 1:
        return pieces[0]

    def joined(name: str) -> Any:
        parts = [getattr(piece, name) for piece in pieces]
        return None if parts[0] is None else np.concatenate(parts)

    def joined_offsets(name: str) -> Ints:
        return _offsets(np.concatenate([np.diff(getattr(piece, name)) for piece in pieces]))

    values: dict[str, Any] = {
        name: joined_offsets(name) if name.endswith("_O") else joined(name)
        for name in _Rows.__dataclass_fields__
        if name != "keys"
    }
    tables = [piece.keys for piece in pieces if piece.keys is not None]
    return _Rows(**values, keys=pa.concat_tables(tables, promote_options="default") if tables else None)


def _take(rows: _Rows, order_R: Ints) -> _Rows:
    """Return some requests of ``rows``, in the given order."""
    sizes_R = np.diff(rows.candidate_offsets_O)[order_R]
    lengths_R = np.diff(rows.event_offsets_O)[order_R]
    of_N = _ranges(rows.candidate_offsets_O[order_R], sizes_R)
    of_E = _ranges(rows.event_offsets_O[order_R], lengths_R)

    def taken(vectors: Floats | None, order: Ints) -> Floats | None:
        return None if vectors is None else vectors.take(order, 0)

    return _Rows(
        user_RU=rows.user_RU.take(order_R, 0),
        context_RK=rows.context_RK.take(order_R, 0),
        item_NI=rows.item_NI.take(of_N, 0),
        candidate_offsets_O=_offsets(sizes_R),
        event_EV=rows.event_EV.take(of_E, 0),
        event_sequence_E=rows.event_sequence_E.take(of_E, 0),
        event_time_E=rows.event_time_E.take(of_E, 0),
        event_offsets_O=_offsets(lengths_R),
        request_time_R=rows.request_time_R.take(order_R, 0),
        click_N=rows.click_N.take(of_N, 0),
        conversion_N=rows.conversion_N.take(of_N, 0),
        user_vector_RX=taken(rows.user_vector_RX, order_R),
        context_vector_RX=taken(rows.context_vector_RX, order_R),
        item_vector_NX=taken(rows.item_vector_NX, of_N),
        keys=None if rows.keys is None else rows.keys.take(pa.array(of_N)),
    )


def _edges(parts: list[Ints]) -> list[int]:
    """Return where each of some parts begins, end to end, and where the last one ends."""
    return _offsets(np.array([part.shape[0] for part in parts])).tolist()


def _stretch(rows: _Rows, first: int, last: int) -> _Rows:
    """Return the requests from ``first`` to before ``last``, without a copy of what they hold."""
    if first == 0 and last == rows.request_time_R.shape[0]:
        return rows
    candidates_O = rows.candidate_offsets_O[first : last + 1]
    events_O = rows.event_offsets_O[first : last + 1]
    of_R, of_N = slice(first, last), slice(int(candidates_O[0]), int(candidates_O[-1]))
    of_E = slice(int(events_O[0]), int(events_O[-1]))
    return _Rows(
        user_RU=rows.user_RU[of_R],
        context_RK=rows.context_RK[of_R],
        item_NI=rows.item_NI[of_N],
        candidate_offsets_O=candidates_O - candidates_O[0],
        event_EV=rows.event_EV[of_E],
        event_sequence_E=rows.event_sequence_E[of_E],
        event_time_E=rows.event_time_E[of_E],
        event_offsets_O=events_O - events_O[0],
        request_time_R=rows.request_time_R[of_R],
        click_N=rows.click_N[of_N],
        conversion_N=rows.conversion_N[of_N],
        user_vector_RX=None if rows.user_vector_RX is None else rows.user_vector_RX[of_R],
        context_vector_RX=None if rows.context_vector_RX is None else rows.context_vector_RX[of_R],
        item_vector_NX=None if rows.item_vector_NX is None else rows.item_vector_NX[of_N],
        keys=None if rows.keys is None else rows.keys.slice(of_N.start, of_N.stop - of_N.start),
    )


def _tensors(rows: _Rows) -> RequestBatch:
    tensors: dict[str, Any] = {}
    for name in _Rows.__dataclass_fields__:
        value = getattr(rows, name)
        if name != "keys" and value is not None:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(value))
    return RequestBatch(**tensors)


def _offsets(lengths_R: Ints) -> Ints:
    offsets_O = np.zeros(lengths_R.shape[0] + 1, dtype=np.int64)
    np.cumsum(lengths_R, out=offsets_O[1:])
    return offsets_O


def _ranges(start_R: Ints, length_R: Ints) -> Ints:
    """Return start[r], start[r] + 1, ... (length[r] of them) for every r, end to end."""
    offsets_O = _offsets(length_R)
    return np.repeat(start_R - offsets_O[:-1], length_R) + np.arange(offsets_O[-1])
