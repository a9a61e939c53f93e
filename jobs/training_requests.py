"""Table ``training_requests``: one row per request: features, sequences strictly before it, candidates with labels."""

from __future__ import annotations

from collections.abc import Sequence as Many
from datetime import date
from functools import reduce
from typing import cast

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

from jobs.behavior_sequences import as_today, tail_days, yesterdays_tails
from jobs.contract import context_columns
from jobs.encoding import stored, stored_all
from jobs.past_events import (
    DECIDING,
    EVENT,
    FEATURES,
    HAPPENED,
    REQUEST,
    ROW,
    TAIL,
    TYPE,
    USER,
    RequestsOfPartition,
    Seen,
)
from jobs.runner import main
from jobs.workspace import Workspace
from onetrans.lake import Staged
from onetrans.schema import FeatureSchema

TABLE = "training_requests"

FEW_IMPRESSIONS = 20_000_000
"""Up to so many impressions a day, the list of their users fits the memory of every executor."""


def training_requests(
    impressions: DataFrame,
    user_features: DataFrame,
    item_features: DataFrame,
    tails: DataFrame | None,
    events: DataFrame,
    schema: FeatureSchema,
    *,
    few: bool = True,
) -> DataFrame:
    """Return the requests of one day.

    ``tails`` are the behaviour sequences of the day before (None on the log's first day), ``events`` the behaviours
    delivered on the day.  A request at ``t`` sees the events with ``available_at < t``, strictly, and of those the
    last ``max_length`` of each sequence by (ts, event_id), oldest first.  Candidates are ordered by item id, the rows
    of a partition by (ts, request_id).  A user or item without a row of features has missing features.

    With ``few`` every executor is given the list of all users who ask.  It changes how long it takes, and no row.
    """
    rows, made = partitions(impressions, user_features, item_features, tails, events, schema, few=few)
    return rows.mapInArrow(made, made.spark_schema())


def partitions(
    impressions: DataFrame,
    user_features: DataFrame,
    item_features: DataFrame,
    tails: DataFrame | None,
    events: DataFrame,
    schema: FeatureSchema,
    *,
    few: bool = True,
) -> tuple[DataFrame, RequestsOfPartition]:
    """Return what :func:`training_requests` is made of, the rows of a user in one partition, and what makes it."""
    requests = _requests(impressions, item_features, schema)
    own = [f for f in schema.of_side("user") if f.column == "user_id"]
    requests = requests.withColumns({f.name: stored(f, F.col("user_id")) for f in own})
    declared = [stored(f, F.col(f.column)) for f in schema.of_side("user") if f not in own]
    users = user_features.select("user_id", *declared) if declared else None
    events = of_those_who_ask(events, impressions, few=few)
    tails = None if tails is None else of_those_who_ask(tails, impressions, few=few)
    users = None if users is None else of_those_who_ask(users, impressions, few=few)
    names = [
        "request_id", "user_id", "ts",
        *(f.name for f in schema.of_side("user")),
        *(f.name for f in schema.of_side("context")),
    ]  # fmt: skip
    return with_past(requests, users, tails, events, schema, names, ["candidates"])


def with_past(
    requests: DataFrame,
    users: DataFrame | None,
    tails: DataFrame | None,
    events: DataFrame,
    schema: FeatureSchema,
    before: Many[str],
    after: Many[str] = (),
) -> tuple[DataFrame, RequestsOfPartition]:
    """Return requests, features, tails and events as one frame, divided by user, and what puts them together.

    The table has the columns ``before`` of requests and users, the sequences, and the columns ``after``.
    """
    event = F.struct("ts", "event_id", "available_at", *stored_all(schema.of_side("event"), F.col))
    happened = events.where(F.col("type").isin([s.event for s in schema.sequences]))
    happened = happened.select(F.lit(EVENT).alias(ROW), "user_id", event.alias(HAPPENED), F.col("type").alias(TYPE))
    seen = tuple(Seen(s.column, s.event, s.max_length) for s in schema.sequences)
    parts = [requests.withColumn(ROW, F.lit(REQUEST)), happened]
    if users is not None:
        features = F.struct(*(name for name in users.columns if name != "user_id")).alias(FEATURES)
        parts.append(users.select(F.lit(USER).alias(ROW), "user_id", features))
    if tails is not None:
        kind = T.ArrayType(happened.schema[HAPPENED].dataType)
        told = [F.col(s.column).alias(s.tail) for s in seen]
        tails = as_today(tails, {s.column: kind for s in seen})
        parts.append(tails.select(F.lit(TAIL).alias(ROW), "user_id", *told))
    rows = reduce(lambda one, other: one.unionByName(other, allowMissingColumns=True), parts)
    fields = {f.name: f.dataType for f in [*(users.schema if users is not None else ()), *requests.schema]}
    event_kind = cast("T.StructType", rows.schema[HAPPENED].dataType)
    shown = T.ArrayType(T.StructType([field for field in event_kind if field.name not in DECIDING]))
    kinds = T.StructType(
        [
            *(T.StructField(name, fields[name]) for name in before),
            *(T.StructField(s.column, shown) for s in seen),
            *(T.StructField(name, fields[name]) for name in after),
        ]
    )
    made = RequestsOfPartition(seen, tuple(requests.columns), to_arrow_schema(kinds))
    return rows.repartition("user_id"), made


def of_those_who_ask(rows: DataFrame, requests: DataFrame, *, few: bool = True) -> DataFrame:
    """Return the rows of users who have a request; with ``few`` every executor is given the list of them."""
    asking = requests.select("user_id").distinct()
    return rows.join(F.broadcast(asking) if few else asking, "user_id", "left_semi")


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


def build(work: Workspace, ds: date) -> Staged:
    """Stage one day, the rows of a partition in the order of time."""
    impressions = sum(day.rows for day in work.lake.published("impressions") if day.ds == ds)
    rows, made = partitions(
        work.read("impressions", [ds]),
        work.read("user_features", [ds]),
        work.read("item_features", [ds]),
        yesterdays_tails(work, ds),
        work.read("behaviors", [ds]),
        work.schema,
        few=impressions <= FEW_IMPRESSIONS,
    )
    today = dict.fromkeys(("impressions", "user_features", "item_features", "behaviors"), (ds, ds))
    reads = {**today, "behavior_sequences": tail_days(work, ds)}
    return work.stage_partitions(TABLE, ds, rows, made, reads)


if __name__ == "__main__":
    raise SystemExit(main(TABLE, build))
