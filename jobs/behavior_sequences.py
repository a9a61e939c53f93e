"""Table ``behavior_sequences``: per user and sequence, the tail of past events that later days can still need."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.encoding import stored_all
from jobs.runner import main
from jobs.workspace import Workspace
from onetrans.days import day_bounds
from onetrans.errors import BadDataError, NotReadyError
from onetrans.lake import Staged
from onetrans.schema import FeatureSchema

TABLE = "behavior_sequences"


def collected(events: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Return one row per user with each sequence's events of a day as a list of struct, in no order.

    The struct begins with ``ts, event_id``, so that sorting a list of it orders events by time and breaks ties
    the same way everywhere.
    """
    event = F.struct("ts", "event_id", "available_at", *stored_all(schema.of_side("event"), F.col))
    lists = [F.collect_list(F.when(F.col("type") == s.event, event)).alias(s.column) for s in schema.sequences]
    used = F.col("type").isin([s.event for s in schema.sequences])
    return events.where(used).groupBy("user_id").agg(*lists)


def merged(tails: DataFrame | None, today: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Return each user's tail and today's events as one list per sequence, ordered by (ts, event_id).

    An event that was delivered before is in the tail; its second delivery is dropped, so the first one says when
    it was known.  ``tails`` is None on the first day.
    """
    lists = {field.name: field.dataType for field in today.schema}
    if tails is None:
        return today.select("user_id", *(F.sort_array(s.column).alias(s.column) for s in schema.sequences))
    tails = as_today(tails, {s.column: lists[s.column] for s in schema.sequences})
    old = tails.select("user_id", *(F.col(s.column).alias(f"old_{s.column}") for s in schema.sequences))

    def both(column: str) -> tuple[SparkColumn, SparkColumn]:
        return _or_empty(f"old_{column}", lists[column]), _or_empty(column, lists[column])

    def whole(column: str) -> SparkColumn:
        return _appended(*both(column), F.col(f"again_{column}")).alias(column)

    # A full outer join would move every tail; most users have no event today, and today's events are few.
    known = old.join(today, "user_id", "left")
    # A step of its own, because Spark evaluates anew whatever a lambda mentions for every element of the list.
    known = known.withColumns({f"again_{s.column}": _again(*both(s.column)) for s in schema.sequences})
    known = known.select("user_id", *(whole(s.column) for s in schema.sequences))
    new = today.join(tails.select("user_id"), "user_id", "left_anti")
    return known.unionByName(new.select("user_id", *(F.sort_array(s.column).alias(s.column) for s in schema.sequences)))


def behavior_sequences(tails: DataFrame | None, events: DataFrame, schema: FeatureSchema, ds: date) -> DataFrame:
    """Return the tails at the end of ``ds`` from those of the day before and the events delivered on ``ds``.

    An event is *settled* if it was known before the next day begins, less the day tolerance: every later request
    sees it.  So once ``max_length`` settled events follow an event, no later request can have it among its last
    ``max_length``, and it is dropped.  What stays is the last ``max_length`` settled events and the events not yet
    settled that are later than the first of these.  Dropping never depends on the order in which events arrived,
    so this equals a rebuild from all events.
    """
    settled_before = day_bounds(ds, schema.timezone)[1] - timedelta(minutes=schema.day_tolerance_minutes)
    both = merged(tails, collected(events, schema), schema)
    return _trimmed(both, schema, F.lit(settled_before))


def as_today(tails: DataFrame, kinds: Mapping[str, T.DataType]) -> DataFrame:
    """Return tails with the sequences and event features of today's schema, which yesterday's may not have had.

    What was not kept then is missing: an event lacks the feature, a user the events of the sequence.
    """
    known = {field.name: field.dataType for field in tails.schema}

    def shown(column: str, kind: T.DataType) -> SparkColumn:
        if column not in known:
            return F.array().cast(kind)
        before, now = _fields(known[column]), _fields(kind)
        if list(before.items()) == list(now.items()):
            return F.col(column)

        def of_today(event: SparkColumn) -> SparkColumn:
            return F.struct(
                *((event[name] if name in before else F.lit(None)).cast(of).alias(name) for name, of in now.items())
            )

        return F.transform(column, of_today)

    return tails.select("user_id", *(shown(column, kind).alias(column) for column, kind in kinds.items()))


def _fields(kind: T.DataType) -> dict[str, T.DataType]:
    assert isinstance(kind, T.ArrayType)
    assert isinstance(kind.elementType, T.StructType)
    return {field.name: field.dataType for field in kind.elementType}


def _again(old: SparkColumn, new: SparkColumn) -> SparkColumn:
    """Return the ids of events that came before, found by hashing; null where nothing is new."""
    return F.when(F.size(new) > 0, F.array_intersect(old["event_id"], new["event_id"]))


def _appended(old: SparkColumn, new: SparkColumn, again: SparkColumn) -> SparkColumn:
    # Few if any come twice, so each event is held against few.
    fresh = F.filter(new, lambda event: ~F.array_contains(again, event["event_id"]))
    fresh = F.when(F.size(again) > 0, fresh).otherwise(new)
    return F.when(F.size(new) == 0, old).otherwise(F.sort_array(F.concat(old, fresh)))


def _or_empty(column: str, kind: T.DataType) -> SparkColumn:
    return F.coalesce(F.col(column), F.array().cast(kind))


def _trimmed(tails: DataFrame, schema: FeatureSchema, settled_before: SparkColumn) -> DataFrame:
    # In three steps, because Spark evaluates anew whatever a lambda mentions for every element of the list.
    settled, oldest = ({s.column: f"_{name}_{s.column}" for s in schema.sequences} for name in ("settled", "oldest"))

    def is_settled(event: SparkColumn) -> SparkColumn:
        return event["available_at"] < settled_before

    def the_oldest(column: str, length: int) -> SparkColumn:
        events = F.col(settled[column])
        return F.when(F.size(events) >= length, events[F.size(events) - length])

    def recent(column: str) -> SparkColumn:
        first = F.col(oldest[column])
        later = F.filter(
            column,
            lambda event: (
                (event["ts"] > first["ts"]) | ((event["ts"] == first["ts"]) & (event["event_id"] >= first["event_id"]))
            ),
        )
        return F.when(first.isNull(), F.col(column)).otherwise(later)

    frame = tails.withColumns({settled[s.column]: F.filter(s.column, is_settled) for s in schema.sequences})
    frame = frame.withColumns({oldest[s.column]: the_oldest(s.column, s.max_length) for s in schema.sequences})
    return frame.select("user_id", *(recent(s.column).alias(s.column) for s in schema.sequences))


def yesterdays_tails(work: Workspace, ds: date) -> DataFrame | None:
    """Return the published tails of the day before, or None if ``ds`` is the log's first day.

    Days that the log lost (``source.absent_days``) are stepped over: nothing was delivered on them.

    Raises:
        NotReadyError: if there are earlier days but not yesterday's tails; a tail is built on the one before.
    """
    yesterday = work.day_before(TABLE, ds)
    published = work.lake.days(TABLE)
    if yesterday in published:
        return work.read(TABLE, [yesterday])
    earlier = [day for day in work.lake.days("behaviors") if day < ds]
    if not earlier and not any(day < ds for day in published):
        return None
    first = min(day for day in [*earlier, yesterday] if day not in published)
    raise NotReadyError(
        f"{TABLE} {yesterday} is needed for {ds} and not published; each day is built on the one before. "
        f"Build them in order: python -m jobs.backfill --from {first} --to {yesterday}. "
        "Days that the log lost for good go into source.absent_days"
    )


def tail_days(work: Workspace, ds: date) -> tuple[date, date]:
    """Return the days whose tails decide those of ``ds``: yesterday's, and before days that the log lost an earlier."""
    return work.day_before(TABLE, ds), ds - timedelta(days=1)


def build(work: Workspace, ds: date) -> Staged:
    """Stage one day."""
    tails = yesterdays_tails(work, ds)
    frame = behavior_sequences(tails, work.read("behaviors", [ds]), work.schema, ds)
    if not work.schema.sequences:
        raise BadDataError(f"{TABLE} {ds}: the schema declares no sequence, so this table cannot be built")
    return work.stage(TABLE, ds, frame, {"behaviors": (ds, ds), TABLE: tail_days(work, ds)})


if __name__ == "__main__":
    raise SystemExit(main(TABLE, build))
