"""What each request sees of its user's past events: merged, cut and gathered as columns, a partition at a time.

Spark brings the requests, features, tails and events of a user into one partition; here they are put together with
NumPy and Arrow.  A list of past events is never made for a request row by row: every event has a position in its
user's list, and a request is a range of positions, less those not known yet.  Whoever has very many events is looked
through for blocks of requests, so that neither many events nor many requests of one user cost more than their number.

Shapes: U users who ask, Q requests, P positions (all events of the users' lists, one list after the other, each ordered
by (ts, event_id)), V events as they came (tails, then today's).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import types as T
from pyspark.sql.pandas.types import from_arrow_schema

from onetrans.errors import BadConfigError

ROW = "_row"
"""Column that says what a row of a partition is."""
REQUEST, USER, TAIL, EVENT = range(4)
"""Its values."""
FEATURES = "_user"
"""Column of a user's features, as a struct."""
HAPPENED = "_event"
"""Column of an event: a struct that begins with ts, event_id and available_at."""
TYPE = "_type"
"""Column of an event's type."""
DECIDING = ("event_id", "available_at")
"""Fields of an event that decide which are seen, and are not shown."""

Integers = npt.NDArray[np.int64]

_AT_ONCE = 1 << 22
"""Pairs of a request and an event that are compared at once."""
_HEAVY = 1 << 20
"""A user with more pairs is looked through in blocks of requests."""
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Seen:
    """One sequence of the table."""

    column: str
    """Its column."""
    event: str
    """Type of its events."""
    max_length: int
    """So many of the last known events are seen."""

    @property
    def tail(self) -> str:
        """Return the column of yesterday's tails."""
        return f"_tail_{self.column}"


@dataclass(frozen=True)
class RequestsOfPartition:
    """Puts the rows of a partition together; Spark's ``mapInArrow`` calls it in its workers."""

    sequences: tuple[Seen, ...]
    """What is seen of the past."""
    requests: tuple[str, ...]
    """Columns that a request brings."""
    kinds: pa.Schema
    """The table."""
    ds: date | None = None
    """Value of the column ``ds``, if the table has it."""

    def of_day(self, ds: date) -> RequestsOfPartition:
        """Return the same with a column ``ds`` before the others."""
        kinds = pa.schema([pa.field("ds", pa.date32()), *self.kinds])
        return replace(self, kinds=kinds, ds=ds)

    def spark_schema(self) -> T.StructType:
        """Return the table's columns as Spark names them."""
        return from_arrow_schema(self.kinds)

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Return the table's rows of one partition."""
        table = self.table(batches)
        if table is not None:
            yield from table.to_batches(max_chunksize=_ROWS_AT_ONCE)

    def table(self, batches: Iterable[pa.RecordBatch]) -> pa.Table | None:
        """Return the table's rows of one partition, by (ts, request_id); None if it has no request."""
        rows = _by_row(batches, {REQUEST: self.requests})
        if REQUEST not in rows:
            return None
        requests = rows[REQUEST]
        requests = requests.take(pc.sort_indices(requests, [("ts", "ascending"), ("request_id", "ascending")]))
        asking = _array(requests["user_id"])
        users = pc.unique(asking)
        user_Q = _numbers(pc.index_in(asking, users))
        columns = {name: _array(requests[name]) for name in self.requests}
        columns |= _features(rows.get(USER), users, user_Q)
        ts_Q = _microseconds(columns["ts"])
        for sequence in self.sequences:
            columns[sequence.column] = self._seen(sequence, rows, users, user_Q, ts_Q)
        if self.ds is not None:
            columns["ds"] = pa.repeat(pa.scalar(self.ds, pa.date32()), len(asking))
        arrays = []
        for field in self.kinds:
            found = columns.get(field.name)
            column = pa.nulls(len(asking), field.type) if found is None else found
            arrays.append(column if column.type == field.type else column.cast(field.type))
        return pa.Table.from_arrays(arrays, schema=self.kinds)

    def _seen(
        self, sequence: Seen, rows: dict[int, pa.Table], users: pa.Array, user_Q: Integers, ts_Q: Integers
    ) -> pa.Array:
        kind = self.kinds.field(sequence.column).type
        old, start_U, count_U = _tails(rows.get(TAIL), sequence.tail, users)
        new, new_user_V = _todays(rows.get(EVENT), sequence.event, users)
        parts = [part for part in (old, new) if part is not None]
        if not parts:
            return pa.ListArray.from_arrays(pa.array(np.zeros(len(ts_Q) + 1, np.int32)), pa.array([], kind.value_type))
        lists = _Lists.of(old, start_U, count_U, new, new_user_V)
        place_N, offset_Q = lists.last_known(user_Q, ts_Q, sequence.max_length)
        if offset_Q[-1] > np.iinfo(np.int32).max:
            raise BadConfigError(
                f"{sequence.column}: {len(ts_Q):,} requests of one partition see {offset_Q[-1]:,} events, more than a "
                "list of Arrow can hold; raise spark.shuffle_partitions"
            )
        events = pa.concat_arrays(parts) if len(parts) > 1 else parts[0]
        seen = pa.array(place_N)
        shown = [_array(pc.struct_field(events, field.name)).take(seen) for field in kind.value_type]
        value = pa.StructArray.from_arrays(
            [column.cast(field.type) for column, field in zip(shown, kind.value_type, strict=True)],
            fields=list(kind.value_type),
        )
        return pa.ListArray.from_arrays(pa.array(offset_Q.astype(np.int32)), value)


@dataclass(frozen=True)
class _Lists:
    """The users' lists of one sequence."""

    place_P: Integers
    """Position -> the event there, among those that came."""
    available_P: Integers
    """Position -> when its event was known."""
    start_U: Integers
    """User -> where the list begins."""
    count_U: Integers
    """User -> how many events it has."""

    @classmethod
    def of(
        cls, old: pa.Array | None, old_start_U: Integers, old_count_U: Integers, new: pa.Array | None, user_V: Integers
    ) -> _Lists:
        """Put today's events into the lists of yesterday; one that was delivered before counts as it was then."""
        before = 0 if old is None else len(old)
        parts = [part for part in (old, new) if part is not None]
        ts_V, id_V, available_V = (
            np.concatenate([_field(part, name) for part in parts]) for name in ("ts", "event_id", "available_at")
        )
        fresh_V = np.arange(len(user_V))
        if old is not None and len(user_V):
            repeated_V = _repeated(id_V[:before], old_start_U, old_count_U, id_V[before:], user_V)
            fresh_V = np.flatnonzero(~repeated_V)
        order = np.lexsort((id_V[before + fresh_V], ts_V[before + fresh_V], user_V[fresh_V]))
        new_V = before + fresh_V[order]
        new_count_U = np.bincount(user_V[fresh_V], minlength=len(old_count_U)).astype(np.int64)
        count_U = old_count_U + new_count_U
        start_U = np.cumsum(count_U) - count_U
        place_P = np.empty(int(count_U.sum()), np.int64)
        place_P[_ranges(start_U, old_count_U)] = _ranges(old_start_U, old_count_U)
        place_P[_ranges(start_U + old_count_U, new_count_U)] = new_V
        both_U = np.flatnonzero((old_count_U > 0) & (new_count_U > 0))
        last = place_P[start_U[both_U] + old_count_U[both_U] - 1]
        first = place_P[start_U[both_U] + old_count_U[both_U]]
        earlier = (ts_V[first] < ts_V[last]) | ((ts_V[first] == ts_V[last]) & (id_V[first] < id_V[last]))
        mixed_U = both_U[earlier]
        positions = _ranges(start_U[mixed_U], count_U[mixed_U])
        events = place_P[positions]
        sorted_ = np.lexsort((id_V[events], ts_V[events], np.repeat(mixed_U, count_U[mixed_U])))
        place_P[positions] = events[sorted_]
        return cls(place_P, available_V[place_P], start_U, count_U)

    def last_known(self, user_Q: Integers, ts_Q: Integers, length: int) -> tuple[Integers, Integers]:
        """Return the last ``length`` events that each request knows: their places, and where each request's begin."""
        earliest_U = np.full(len(self.count_U), np.iinfo(np.int64).max)
        np.minimum.at(earliest_U, user_Q, ts_Q)
        stop_U = self.start_U + self.count_U
        unsure_P = np.flatnonzero(self.available_P >= np.repeat(earliest_U, self.count_U))
        # Every request of a user knows the events before the first that the earliest does not know.
        sure_U = np.minimum(stop_U, np.append(unsure_P, len(self.place_P))[np.searchsorted(unsure_P, self.start_U)])
        start_Q, sure_Q, stop_Q = self.start_U[user_Q], sure_U[user_Q], stop_U[user_Q]
        place_P, available_P = self.place_P, self.available_P
        asked_U = np.bincount(user_Q, minlength=len(self.count_U))
        heavy_U = np.flatnonzero((stop_U - sure_U) * asked_U > _HEAVY)
        if len(heavy_U):
            more, size = [], len(place_P)
            for user in heavy_U:
                mine_Q = np.flatnonzero(user_Q == user)
                mine_Q = mine_Q[np.argsort(ts_Q[mine_Q], kind="stable")]
                own_P = available_P[self.start_U[user] : stop_U[user]]
                for block_Q, positions, sure in _blocks(own_P, mine_Q, ts_Q, length):
                    more.append(self.start_U[user] + positions)
                    start_Q[block_Q], sure_Q[block_Q] = size, size + sure
                    size += len(positions)
                    stop_Q[block_Q] = size
            all_P = np.concatenate([np.arange(len(place_P)), *more])
            place_P, available_P = place_P[all_P], available_P[all_P]
        kept_N, kept_Q = _known(available_P, sure_Q, stop_Q, ts_Q, length)
        head_Q = np.minimum(sure_Q - start_Q, length - kept_Q)
        offset_Q = np.concatenate([[0], np.cumsum(head_Q + kept_Q)])
        found_N = np.empty(offset_Q[-1], np.int64)
        found_N[_ranges(offset_Q[:-1], head_Q)] = _ranges(sure_Q - head_Q, head_Q)
        found_N[_ranges(offset_Q[:-1] + head_Q, kept_Q)] = kept_N
        return place_P[found_N], offset_Q


def _known(
    available_P: Integers, start_Q: Integers, stop_Q: Integers, ts_Q: Integers, length: int
) -> tuple[Integers, Integers]:
    """Return the last ``length`` positions from ``start`` to ``stop`` that are known to each request, and how many."""
    width_Q = stop_Q - start_Q
    chunk_Q = np.cumsum(width_Q) // _AT_ONCE
    kept_N, kept_Q = [np.empty(0, np.int64)], np.zeros(len(ts_Q), np.int64)
    bounds = np.flatnonzero(np.diff(chunk_Q)) + 1
    for begin, end in zip([0, *bounds], [*bounds, len(ts_Q)], strict=True):
        position_N = _ranges(start_Q[begin:end], width_Q[begin:end])
        owner_N = np.repeat(np.arange(begin, end), width_Q[begin:end])
        known_N = available_P[position_N] < ts_Q[owner_N]
        position_N, owner_N = position_N[known_N], owner_N[known_N] - begin
        known_Q = np.bincount(owner_N, minlength=end - begin)
        place_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(known_Q) - known_Q, known_Q)
        kept_Q[begin:end] = np.minimum(known_Q, length)
        kept_N.append(position_N[place_N >= (known_Q - kept_Q[begin:end])[owner_N]])
    return np.concatenate(kept_N), kept_Q


def _blocks(
    available_P: Integers, mine_Q: Integers, ts_Q: Integers, length: int
) -> Iterator[tuple[Integers, Integers, int]]:
    """Cut a user's requests, ordered by time, into blocks, each with all that its requests can see of the list.

    Yields the requests, the positions in the list, and how many of these every request of the block knows.
    """
    size = math.isqrt(len(mine_Q) - 1) + 1
    for begin in range(0, len(mine_Q), size):
        block_Q = mine_Q[begin : begin + size]
        first, last = ts_Q[block_Q[0]], ts_Q[block_Q[-1]]
        sure = np.flatnonzero(available_P < first)[-length:]
        unsure = np.flatnonzero((available_P >= first) & (available_P < last))
        positions = np.sort(np.concatenate([sure, unsure]))
        yield block_Q, positions, int(np.searchsorted(positions, unsure[0])) if len(unsure) else len(positions)


def _repeated(
    old_V: Integers, old_start_U: Integers, old_count_U: Integers, new_V: Integers, user_V: Integers
) -> npt.NDArray[np.bool_]:
    """Return which of today's events are in their user's tail already."""
    repeated_V = np.array(pc.is_in(pa.array(new_V), value_set=pa.array(old_V)))
    if not repeated_V.any():
        return repeated_V
    ids = np.unique(new_V[repeated_V])
    own_P = _ranges(old_start_U, old_count_U)
    old_user_P = np.repeat(np.arange(len(old_count_U)), old_count_U)
    same_P = np.flatnonzero(np.isin(old_V[own_P], ids))
    old_key = old_user_P[same_P] * len(ids) + np.searchsorted(ids, old_V[own_P[same_P]])
    new_key = user_V[repeated_V] * len(ids) + np.searchsorted(ids, new_V[repeated_V])
    repeated_V[repeated_V] = np.isin(new_key, old_key)
    return repeated_V


def _by_row(batches: Iterable[pa.RecordBatch], named: dict[int, tuple[str, ...]]) -> dict[int, pa.Table]:
    """Sort the rows of a partition by what they are; of each kind only the columns it has."""
    found: dict[int, list[pa.RecordBatch]] = {}
    for batch in batches:
        row = np.asarray(batch.column(ROW))
        for kind in np.unique(row):
            mine = np.flatnonzero(row == kind)
            names = named.get(kind) or _columns_of(kind, batch.schema)
            part = batch.select(list(names))
            found.setdefault(int(kind), []).append(part if len(mine) == len(row) else part.take(pa.array(mine)))
    return {kind: pa.Table.from_batches(parts) for kind, parts in found.items()}


def _columns_of(kind: int, schema: pa.Schema) -> list[str]:
    if kind == USER:
        return ["user_id", FEATURES]
    if kind == EVENT:
        return ["user_id", HAPPENED, TYPE]
    return ["user_id", *(name for name in schema.names if name.startswith("_tail_"))]


def _features(rows: pa.Table | None, users: pa.Array, user_Q: Integers) -> dict[str, pa.Array]:
    """Return a column per feature of the users; who has no row has none."""
    if rows is None:
        return {}
    features = _array(rows[FEATURES])
    row_U = pc.index_in(users, _array(rows["user_id"]))
    mine = features.take(row_U.take(pa.array(user_Q)))
    return dict(zip([field.name for field in features.type], mine.flatten(), strict=True))


def _tails(rows: pa.Table | None, column: str, users: pa.Array) -> tuple[pa.Array | None, Integers, Integers]:
    """Return the events of the tails, and where those of each user begin and how many they are."""
    start_U, count_U = np.zeros(len(users), np.int64), np.zeros(len(users), np.int64)
    if rows is None or column not in rows.column_names:
        return None, start_U, count_U
    lists = _array(rows[column])
    count = _numbers(pc.fill_null(pc.list_value_length(lists), 0))
    start = np.cumsum(count) - count
    row_U = pc.index_in(users, _array(rows["user_id"]))
    has_U = np.asarray(row_U.is_valid())
    row = _numbers(row_U.drop_null())
    start_U[has_U], count_U[has_U] = start[row], count[row]
    return lists.flatten(), start_U, count_U


def _todays(rows: pa.Table | None, kind: str, users: pa.Array) -> tuple[pa.Array | None, Integers]:
    """Return today's events of a type, and whose they are; those of users who do not ask are left out."""
    if rows is None:
        return None, np.empty(0, np.int64)
    user = pc.index_in(_array(rows["user_id"]), users)
    mine = pc.and_(pc.equal(_array(rows[TYPE]), kind), user.is_valid())
    return _array(rows[HAPPENED]).filter(mine), _numbers(user.filter(mine))


def _field(events: pa.Array, name: str) -> Integers:
    column = pc.struct_field(events, name)
    return _microseconds(column) if pa.types.is_timestamp(column.type) else _numbers(column)


def _microseconds(times: pa.Array) -> Integers:
    return _numbers(times.cast(pa.int64()))


def _numbers(column: pa.Array) -> Integers:
    return column.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)


def _array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _ranges(start: Integers, count: Integers) -> Integers:
    """Return ``start, start + 1, ...``, ``count`` numbers of each, one range after the other."""
    end = np.cumsum(count)
    return np.arange(end[-1] if len(end) else 0) + np.repeat(start - (end - count), count)
