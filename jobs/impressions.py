"""Table ``impressions``: one row per item shown in a request, cleaned, each with its labels."""

from __future__ import annotations

from datetime import date, timedelta

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.checks import day_limits, refuse, refuse_duplicates, typed
from jobs.contract import context_columns, contract, request_columns
from jobs.runner import main
from jobs.workspace import Workspace
from onetrans.lake import Staged
from onetrans.schema import CONTEXT_FROM_CLOCK, FeatureSchema

TABLE = "impressions"


def impressions(raw: DataFrame, schema: FeatureSchema, ds: date) -> DataFrame:
    """Return the checked impressions of one day (see ``jobs.checks``).

    A row is refused if a key, the time or a label is missing or unreadable, if a label is not 0 or 1, if it
    converted without a click, if its time lies outside the day by more than the schema's tolerance, if its request
    has more than one user, or if another row of the same request and item says something else.  A log without
    request ids has requests made of ``request_from``.

    Where the log says when a conversion came (``conversion_at``), one that came more than the schema's
    ``attribution_hours`` after its row's time is none, however late the day is built: so a day's labels mean the same
    whenever it is built after its window has closed.

    All rows of a request get the request's time, the earliest of theirs, so nothing a request showed first can
    know what happened while the rest was shown.  Context columns of the clock are computed from it.
    """
    frame = _with_requests(typed(raw, contract(schema, "impressions"), schema), schema)
    first, after = day_limits(ds, schema)
    frame = refuse(
        frame,
        ((F.col("ts") < first) | (F.col("ts") >= after), "ts: outside the day"),
        ((F.col("conversion") == 1) & (F.col("click") == 0), "conversion: 1 without a click"),
        *_conversion_times(frame),
        *((~F.col(c).between(0, 1), f"{c}: not a probability") for c in ("true_ctr", "true_cvr") if c in frame.columns),
    )
    frame = _attributed(frame, schema)
    # One exchange serves the rules below: rows of one request and item are rows of one request.
    frame = refuse_duplicates(frame.repartition("request_id"), ("request_id", "item_id"))
    request = Window.partitionBy("request_id")
    good = F.col("reason").isNull()
    users = (F.min(F.when(good, F.col("user_id"))), F.max(F.when(good, F.col("user_id"))))
    frame = frame.withColumn("_users_differ", users[0].over(request) != users[1].over(request))
    frame = refuse(frame, (F.col("_users_differ"), "user_id: several users in one request")).drop("_users_differ")
    frame = frame.withColumn("ts", F.min(F.when(F.col("reason").isNull(), F.col("ts"))).over(request))
    clock = {name: from_clock(name, schema) for name in context_columns(schema) if name in CONTEXT_FROM_CLOCK}
    if "position" not in frame.columns:
        clock["position"] = F.lit(None).cast("int")
    return frame.withColumns(clock) if clock else frame


def _with_requests(frame: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Return the rows with a ``request_id``: the log's own, or the values of ``request_from`` as a JSON array."""
    if not schema.request_from:
        return frame
    parts = [F.unix_micros("ts") if name == "ts" else F.col(name) for name in schema.request_from]
    request = F.to_json(F.array(*(part.cast("string") for part in parts)))
    return frame.withColumn("request_id", request).drop(*request_columns(schema))


def _conversion_times(frame: DataFrame) -> list[tuple[SparkColumn, str]]:
    if "conversion_at" not in frame.columns:
        return []
    return [
        (F.col("conversion_at") < F.col("ts"), "conversion_at: before the request"),
        (F.col("conversion_at").isNotNull() & (F.col("conversion") == 0), "conversion_at: without a conversion"),
    ]


def _attributed(frame: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Return the rows with conversions that came too late taken back; without times or a window nothing changes."""
    if "conversion_at" not in frame.columns or not schema.attribution_hours:
        return frame
    window = timedelta(hours=schema.attribution_hours)
    late = F.coalesce(F.col("conversion_at") > F.col("ts") + F.lit(window), F.lit(False))
    return frame.withColumns(
        {
            "conversion": F.when(late, F.lit(0)).otherwise(F.col("conversion")),
            "conversion_at": F.when(~late, F.col("conversion_at")),
        }
    )


def conversion_known(impressions: DataFrame, schema: FeatureSchema) -> SparkColumn | None:
    """Return when a conversion of the table was known: when it came, or where that is not said, when its window closed.

    None, or null in a row, where neither is: then labels are complete when the day is delivered.
    """
    came = F.col("conversion_at") if "conversion_at" in impressions.columns else None
    if not schema.attribution_hours:
        return came
    closes = F.col("ts") + F.lit(timedelta(hours=schema.attribution_hours))
    return closes if came is None else F.coalesce(came, closes)


def from_clock(name: str, schema: FeatureSchema) -> SparkColumn:
    """Return a context column that is computed from ``ts``, as its feature reads it."""
    local = F.from_utc_timestamp("ts", schema.timezone)
    number = F.hour(local) if name == "hour_of_day" else F.weekday(local) + 1
    return number.cast("string" if context_columns(schema)[name] == "hashed" else "double")


def build(work: Workspace, ds: date) -> Staged:
    """Stage one day."""
    checked = impressions(work.raw("impressions", ds), work.schema, ds)
    return work.stage_checked(TABLE, ds, checked, {}, ("request_id", "item_id"))


if __name__ == "__main__":
    raise SystemExit(main(TABLE, build))
