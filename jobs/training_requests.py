"""Table ``training_requests``: one row per request: features, sequences strictly before it, candidates with labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many
from datetime import date

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.behavior_sequences import collected, merged_of, tail_days, yesterdays_tails
from jobs.contract import context_columns
from jobs.encoding import stored, stored_all
from jobs.pieces import MANY_EVENTS, PIECE, in_pieces, of_users, piece_of, users_with_many
from jobs.runner import main
from jobs.workspace import Workspace
from onetrans.lake import Staged
from onetrans.schema import FeatureSchema, Sequence

TABLE = "training_requests"

FEW_IMPRESSIONS = 20_000_000
"""Up to so many impressions a day, the list of their users fits the memory of every executor."""

logger = logging.getLogger(__name__)


def training_requests(
    impressions: DataFrame,
    user_features: DataFrame,
    item_features: DataFrame,
    tails: DataFrame | None,
    events: DataFrame,
    schema: FeatureSchema,
    many: Many[str] = (),
    *,
    few: bool = True,
) -> DataFrame:
    """Return the requests of one day.

    ``tails`` are the behaviour sequences of the day before (None on the log's first day), ``events`` the behaviours
    delivered on the day.  A request at ``t`` sees the events with ``available_at < t``, strictly, and of those the
    last ``max_length`` of each sequence by (ts, event_id), oldest first.  Candidates are ordered by item id.  A user
    or item without a row of features has missing features.

    ``many`` are users with very many events: their requests get a piece of their past (``jobs.pieces``).  With ``few``
    every executor is given the list of all users who ask.  Both change how long it takes, and no row.
    """
    requests = _requests(impressions, item_features, schema)
    users = user_features.select("user_id", F.struct(*stored_all(schema.of_side("user"), F.col)).alias("_user"))
    tails = None if tails is None else of_those_who_ask(tails, impressions, few=few)
    events = of_those_who_ask(events, impressions, few=few)
    asking = impressions.select("user_id").distinct()
    joined, past = _with_past(requests.join(users, "user_id", "left"), asking, tails, events, schema, many)
    kinds = {field.name: field.dataType for field in past.schema}
    joined = joined.withColumns({s.column: _known(s) for s in schema.sequences})
    user_columns = [
        F.col("_user")[f.name].alias(f.name) if f.column != "user_id" else stored(f, F.col("user_id"))
        for f in schema.of_side("user")
    ]
    return joined.select(
        "request_id", "user_id", "ts",
        *user_columns,
        *(f.name for f in schema.of_side("context")),
        *(_seen(sequence, kinds[sequence.column]) for sequence in schema.sequences),
        "candidates",
    )  # fmt: skip


def of_those_who_ask(rows: DataFrame, requests: DataFrame, *, few: bool = True) -> DataFrame:
    """Return the rows of users who have a request; with ``few`` every executor is given the list of them."""
    asking = requests.select("user_id").distinct()
    return rows.join(F.broadcast(asking) if few else asking, "user_id", "left_semi")


def _with_past(
    requests: DataFrame,
    asking: DataFrame,
    tails: DataFrame | None,
    events: DataFrame,
    schema: FeatureSchema,
    many: Many[str],
) -> tuple[DataFrame, DataFrame]:
    """Return the requests with their users' events, or the piece of them that they need; and these pasts."""
    if not many:
        past = merged_of(asking, tails, collected(events, schema), schema)
        return requests.join(past, "user_id", "left"), past
    few = ~of_users(many)
    today = collected(events.where(few), schema)
    whole = merged_of(asking.where(few), None if tails is None else tails.where(few), today, schema)
    pieces, starts = in_pieces(None if tails is None else tails.where(~few), events.where(~few), schema)
    past = whole.withColumn(PIECE, F.lit(0)).unionByName(pieces)
    placed = requests.join(F.broadcast(starts), "user_id", "left")
    placed = placed.withColumn(PIECE, piece_of(F.col("_starts"), F.col("ts"))).drop("_starts")
    return placed.join(past, ["user_id", PIECE], "left"), past


def _requests(impressions: DataFrame, item_features: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Group impressions into requests, each with its list of candidates."""
    computed = {"item_id"}
    wanted = dict.fromkeys(f.column for f in schema.of_side("item") if f.column not in computed)
    items = item_features.select("item_id", F.struct(*wanted).alias("_item") if wanted else F.lit(None).alias("_item"))
    shown = impressions.join(items, "item_id", "left")

    def item_column(column: str) -> SparkColumn:
        return F.col("item_id") if column == "item_id" else F.col("_item")[column]

    truth = [column for column in ("true_ctr", "true_cvr") if column in impressions.columns]
    candidate = F.struct(
        "item_id", "position", *stored_all(schema.of_side("item"), item_column), "click", "conversion", *truth
    )
    context = F.struct(*(F.col(column) for column in context_columns(schema))) if context_columns(schema) else None
    grouped = shown.groupBy("request_id").agg(
        F.min("user_id").alias("user_id"),
        F.min("ts").alias("ts"),
        *([F.min_by(context, "item_id").alias("_context")] if context is not None else []),
        F.sort_array(F.collect_list(candidate)).alias("candidates"),
    )
    stored = stored_all(schema.of_side("context"), lambda column: F.col("_context")[column])
    return grouped.select("request_id", "user_id", "ts", "candidates", *stored)


def _known(sequence: Sequence) -> SparkColumn:
    """Return those of a user's events that were known before the request."""
    return F.filter(sequence.column, lambda event: event["available_at"] < F.col("ts"))


def _seen(sequence: Sequence, kind: T.DataType) -> SparkColumn:
    """Return the last of the known events, without the columns that only decided which they are."""
    known, length = F.col(sequence.column), sequence.max_length
    last = F.when(F.size(known) > length, F.slice(known, -length, length)).otherwise(known)
    assert isinstance(kind, T.ArrayType)
    assert isinstance(kind.elementType, T.StructType)
    kept = [name for name in kind.elementType.names if name not in ("event_id", "available_at")]
    shown = F.transform(last, lambda event: F.struct(*(event[name].alias(name) for name in kept)))
    none = T.ArrayType(T.StructType([f for f in kind.elementType if f.name in kept]))
    return F.coalesce(shown, F.array().cast(none)).alias(sequence.column)


def build(work: Workspace, ds: date) -> Staged:
    """Stage one day, its rows in the order of time."""
    events = work.read("behaviors", [ds])
    many = users_with_many(events, work.schema)
    if many:
        logger.info("%s %s: %s users with more than %s events", TABLE, ds, f"{len(many):,}", f"{MANY_EVENTS:,}")
    impressions = sum(day.rows for day in work.lake.published("impressions") if day.ds == ds)
    frame = training_requests(
        work.read("impressions", [ds]),
        work.read("user_features", [ds]),
        work.read("item_features", [ds]),
        yesterdays_tails(work, ds),
        events,
        work.schema,
        many,
        few=impressions <= FEW_IMPRESSIONS,
    )
    today = dict.fromkeys(("impressions", "user_features", "item_features", "behaviors"), (ds, ds))
    reads = {**today, "behavior_sequences": tail_days(work, ds)}
    return work.stage(TABLE, ds, frame.sortWithinPartitions("ts", "request_id"), reads)


if __name__ == "__main__":
    raise SystemExit(main(TABLE, build))
