"""Users with very many events of a day: their past in pieces, so that a request is not given all of it.

A request is joined with its user's list of events and looks through it.  For a crawler, a shared account or a test
account with a million events and thousands of requests that would be the whole job's time many times over.  Such a
past is cut by the time at which events became known, into pieces of ``PIECE_EVENTS``; each piece begins with what the
pieces before it leave for a request: the last ``max_length`` of each sequence.  So a request needs one piece, and
sees what it would see in the whole list.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.encoding import stored_all
from onetrans.schema import FeatureSchema

MANY_EVENTS = 5_000
"""A user with more events delivered on a day has the past cut into pieces."""

PIECE_EVENTS = 1_000
"""Events of a piece."""

PIECE = "_piece"
"""Column of requests and of pasts: the number of the piece, 0 for a past that is whole."""


def users_with_many(events: DataFrame, schema: FeatureSchema) -> list[str]:
    """Return the users with more than ``MANY_EVENTS`` events of the sequences among a day's."""
    used = events.where(F.col("type").isin([s.event for s in schema.sequences]))
    counted = used.groupBy("user_id").agg(F.count("*").alias("events")).where(F.col("events") > MANY_EVENTS)
    return [row["user_id"] for row in counted.select("user_id").collect()]


def of_users(users: Many[str]) -> SparkColumn:
    """Return whether a row is of one of the users."""
    return F.col("user_id").isin(list(users))


def in_pieces(tails: DataFrame | None, events: DataFrame, schema: FeatureSchema) -> tuple[DataFrame, DataFrame]:
    """Return the pieces of these users' pasts, and when they begin.

    The first frame has a row per user and ``PIECE`` with each sequence's events, ordered by (ts, event_id); the second
    a row per user with ``_starts``: the earliest ``available_at`` of each piece, in order.  An event that was delivered
    before is in the tail, and counts as it was told there.
    """
    columns = [s.column for s in schema.sequences]
    rows = _rows(tails, events, schema)
    order = Window.partitionBy("user_id").orderBy("_event.available_at")
    place = F.row_number().over(order) - 1
    rows = rows.withColumn(PIECE, F.floor(place / F.lit(PIECE_EVENTS)).cast("int"))
    own = [F.sort_array(F.collect_list(F.when(F.col("_sequence") == c, F.col("_event")))).alias(c) for c in columns]
    pieces = rows.groupBy("user_id", PIECE).agg(F.min("_event.available_at").alias("_start"), *own)
    kinds = {field.name: field.dataType for field in pieces.schema}
    ends = [_last(F.col(s.column), s.max_length).alias(s.column) for s in schema.sequences]
    listed = F.sort_array(F.collect_list(F.struct(PIECE, "_start", *ends))).alias("_pieces")
    by_user = pieces.groupBy("user_id").agg(listed)
    starts = by_user.select("user_id", F.col("_pieces._start").alias("_starts"))
    left = [
        _left_by_pieces(s.column, s.max_length, kinds[s.column]).alias(f"_left_{s.column}") for s in schema.sequences
    ]
    carried = by_user.select("user_id", *left).select(
        "user_id", F.posexplode(F.arrays_zip(*(f"_left_{c}" for c in columns))).alias(PIECE, "_before")
    )
    whole = pieces.join(carried, ["user_id", PIECE])
    lists = [F.sort_array(F.concat(F.col("_before")[f"_left_{c}"], c)).alias(c) for c in columns]
    return whole.select("user_id", PIECE, *lists), starts


def piece_of(starts: SparkColumn, ts: SparkColumn) -> SparkColumn:
    """Return the piece in which a request at ``ts`` finds all that it sees: the last that begins before it."""
    begun = F.size(F.filter(starts, lambda start: start < ts))
    return F.greatest(F.coalesce(begun, F.lit(0)) - 1, F.lit(0))


def _rows(tails: DataFrame | None, events: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Return a row per user, sequence and event, each event once."""
    event = F.struct("ts", "event_id", "available_at", *stored_all(schema.of_side("event"), F.col)).alias("_event")
    of = F.array(*(F.when(F.col("type") == s.event, F.lit(s.column)) for s in schema.sequences))
    today = events.select("user_id", F.explode(F.array_compact(of)).alias("_sequence"), event)
    if tails is None:
        return today
    told = [
        tails.select("user_id", F.lit(s.column).alias("_sequence"), F.explode(s.column).alias("_event"))
        for s in schema.sequences
    ]
    before = told[0]
    for more in told[1:]:
        before = before.unionByName(more)
    known = before.select("user_id", "_sequence", F.col("_event.event_id").alias("_id"))
    same = ["user_id", "_sequence", "_id"]
    fresh = today.withColumn("_id", F.col("_event.event_id")).join(F.broadcast(known), same, "left_anti").drop("_id")
    return before.unionByName(fresh)


def _last(events: SparkColumn, length: int) -> SparkColumn:
    return F.when(F.size(events) > length, F.slice(events, -length, length)).otherwise(events)


def _left_by_pieces(column: str, length: int, kind: T.DataType) -> SparkColumn:
    """Return per piece the last ``length`` events of those before it."""

    def with_next(left: SparkColumn, ends: SparkColumn) -> SparkColumn:
        both = F.sort_array(F.concat(F.element_at(left, -1), ends))
        return F.concat(left, F.array(_last(both, length)))

    return F.aggregate(F.col("_pieces")[column], F.array(F.array().cast(kind)), with_next)
