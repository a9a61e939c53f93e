"""Table ``behaviors``: one row per past event, by the day it was delivered."""

from __future__ import annotations

from datetime import date, timedelta

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.checks import attributes, day_limits, good_rows, refuse, refuse_duplicates, typed
from jobs.contract import contract, event_columns
from jobs.impressions import conversion_known
from jobs.runner import main
from jobs.workspace import HISTORY, Reads, Workspace
from onetrans.days import day_bounds
from onetrans.errors import BadDataError
from onetrans.lake import Staged
from onetrans.schema import FeatureSchema

TABLE = "behaviors"


def behaviors(raw: DataFrame, schema: FeatureSchema, latest: SparkColumn) -> DataFrame:
    """Return the checked behaviours of one delivery (see ``jobs.checks``); several rows may still be one event.

    An event may be delivered late, so its time may lie on any earlier day, but not at or after ``latest``.  It is
    known at ``available_at``: at once where the log does not say, and never before it happened.  Its id is the hash
    of the log's own id, or of user, item, type and time.

    A row is refused if a key or the time is missing or unreadable, or if it lies in the future.
    """
    frame = typed(raw, contract(schema, "behaviors"), schema)
    frame = refuse(frame, (F.col("ts") >= latest, "ts: after the day"))
    known = F.greatest("available_at", "ts") if "available_at" in frame.columns else F.col("ts")
    derived = F.concat_ws("|", "user_id", "item_id", "type", F.unix_micros("ts"))
    identity = F.coalesce("event_id", derived) if "event_id" in frame.columns else derived
    return frame.withColumns({"available_at": known, "event_id": F.xxhash64(identity)})


def with_item_columns(checked: DataFrame, items: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Add the declared event columns that the log's behaviours do not have from the event's item.

    Raises:
        BadDataError: if the items lack one too.
    """
    wanted = [column for column in event_columns(schema) if column not in checked.columns]
    if not wanted:
        return checked
    for column in wanted:
        if column not in items.columns:
            raise BadDataError(
                f"behaviors: event column {column!r} is neither in the behaviours nor in the items; "
                f"the behaviours have {', '.join(c for c in checked.columns if c not in ('raw', 'reason'))}"
            )
    return checked.join(items.select("item_id", *wanted), "item_id", "left")


def derived(impressions: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Return past events made from impressions, for a log that has no behaviours of its own.

    Each declared type gives an event at the request's time, known ``outcome_delay_minutes`` later: an impression
    always, a click or a conversion where the label is 1.  A conversion is not known before
    :func:`jobs.impressions.conversion_known`.  Context columns that an event feature reads go along.
    """
    happened = {"impression": F.lit(True), "click": F.col("click") == 1, "conversion": F.col("conversion") == 1}
    soon = F.col("ts") + F.lit(timedelta(minutes=schema.outcome_delay_minutes))
    came = conversion_known(impressions, schema)
    known = {} if came is None else {"conversion": F.greatest(soon, came)}  # a null is passed over
    events = [
        F.when(happened[kind], F.struct(F.lit(kind).alias("type"), known.get(kind, soon).alias("available_at")))
        for kind in schema.derived_behaviors
    ]
    return impressions.select(
        "request_id", "user_id", "item_id", "ts",
        *(column for column in event_columns(schema) if column in impressions.columns),
        F.inline(F.array_compact(F.array(*events))),
    ).withColumn("event_id", F.concat_ws("|", "request_id", "item_id", "type"))  # fmt: skip


def build(work: Workspace, ds: date) -> Staged:
    """Stage one day.  The first day of the table takes the log's history in: it was delivered by then.

    Of several rows of one event, exact repeats count once, and rows that disagree are all refused.
    """
    schema = work.schema
    reads: Reads = {}
    raw_also: list[str] = []
    if schema.derived_behaviors:
        reads = {"impressions": (ds, ds)}
        raw = derived(work.read("impressions", [ds]), schema)
    else:
        raw = work.raw("behaviors", ds)
    checked = behaviors(raw, schema, day_limits(ds, schema)[1])
    if not any(day < ds for day in work.lake.days(TABLE)):
        history = work.history(ds)
        raw_also.append(HISTORY)
        if history is not None:
            earlier = behaviors(history, schema, F.lit(day_bounds(ds, schema.timezone)[0]))
            if set(earlier.columns) != set(checked.columns):
                differ = ", ".join(sorted(set(earlier.columns) ^ set(checked.columns)))
                raise BadDataError(f"behaviors history and {ds} differ in columns that features read: {differ}")
            delivered = checked.select("event_id")  # history may reach into what the first day delivers
            checked = checked.unionByName(earlier.join(delivered, "event_id", "left_anti"))
    checked = refuse_duplicates(checked, ("event_id",))
    if set(event_columns(schema)) - set(checked.columns):
        items = good_rows(attributes(work.raw("items", ds), "items", schema))
        raw_also.append("items")
        checked = with_item_columns(checked, items, schema)
    return work.stage_checked(TABLE, ds, checked, reads, ("user_id", "item_id", "type", "ts"), raw_also)


if __name__ == "__main__":
    raise SystemExit(main(TABLE, build))
