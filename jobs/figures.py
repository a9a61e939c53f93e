"""Day-lagged counts and rates of a key (user, item, author, ...), shared by both feature tables.

Figures for day D count the impressions of days before D, and of their conversions
those that were known when D began (``jobs.impressions.conversion_known``): a day
that is built again when its labels are complete gives later days no more than
they could know.  A rate is pulled to the overall rate of its window by a prior
worth ``smoothing`` impressions (for a conversion rate, clicks), so a key with
little evidence sits near the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.checks import attributes, day_limits, good_rows
from jobs.impressions import conversion_known
from jobs.workspace import Workspace
from onetrans.lake import Staged
from onetrans.schema import Aggregates, FeatureSchema, InputTable

Features = Callable[[DataFrame, DataFrame | None, FeatureSchema, date], DataFrame]
"""The rule of a feature table: good rows of the snapshot, impressions of the windows, schema and day to its rows."""

_COUNTED = ("impressions", "clicks", "conversions")


def counts(impressions: DataFrame, key: str, ds: date, schema: FeatureSchema) -> DataFrame:
    """Return per value of column ``key`` the counts ``<figure>_<window>d`` over the windows that end before ``ds``."""
    windows = schema.aggregates.windows
    labels = {"impressions": F.lit(1), "clicks": F.col("click"), "conversions": F.col("conversion")}
    known = conversion_known(impressions, schema)
    if known is not None:
        earliest_request = day_limits(ds, schema)[0]
        labels["conversions"] = F.when(known >= earliest_request, F.lit(0)).otherwise(F.col("conversion"))
    sums = []
    for window in windows:
        inside = F.col("ds").between(ds - timedelta(days=window), ds - timedelta(days=1))
        for figure in _COUNTED:
            sums.append(F.sum(F.when(inside, labels[figure]).otherwise(0)).alias(f"{figure}_{window}d"))
    return impressions.groupBy(key).agg(*sums)


def count_columns(aggregates: Aggregates) -> list[str]:
    """Return the columns :func:`counts` makes, its key not counted."""
    return [f"{figure}_{window}d" for window in aggregates.windows for figure in _COUNTED]


def totals(counted: DataFrame, aggregates: Aggregates) -> DataFrame:
    """Return one row with the sums of all counts, for the overall rates."""
    return counted.agg(*(F.sum(column).alias(f"all_{column}") for column in count_columns(aggregates)))


def with_figures(rows: DataFrame, total: DataFrame, key: str, name: str, aggregates: Aggregates) -> DataFrame:
    """Turn the counts of ``rows`` (null: never shown) into the columns ``aggregates.columns(name)``.

    A key that was never shown has counts of 0 and the overall rates.  Where the key itself is null every figure is
    null: it is unknown, which is not 0.
    """
    figures = {}
    for window in aggregates.windows:
        value = {figure: F.coalesce(F.col(f"{figure}_{window}d"), F.lit(0)).cast("double") for figure in _COUNTED}
        overall = {figure: F.col(f"all_{figure}_{window}d").cast("double") for figure in _COUNTED}
        for rate, events, trials in (("ctr", "clicks", "impressions"), ("cvr", "conversions", "clicks")):
            prior = F.when(overall[trials] > 0, overall[events] / overall[trials])
            weight = value[trials] + aggregates.smoothing
            value[rate] = F.when(weight > 0, (value[events] + aggregates.smoothing * prior) / weight)
        for figure, result in value.items():
            figures[f"{name}_{figure}_{window}d"] = F.when(F.col(key).isNotNull(), result)
    kept = [column for column in rows.columns if column not in count_columns(aggregates)]
    return rows.crossJoin(F.broadcast(total)).withColumns(figures).select(*kept, *aggregates.columns(name))


def unknown_figures(rows: DataFrame, name: str, aggregates: Aggregates) -> DataFrame:
    """Add the columns ``aggregates.columns(name)`` as null: nothing was published before this day."""
    return rows.withColumns({column: F.lit(None).cast("double") for column in aggregates.columns(name)})


def stage_features(work: Workspace, ds: date, table: str, raw: InputTable, key: str, features: Features) -> Staged:
    """Stage one day of a feature table from the raw snapshot ``raw``, whose rows ``key`` names.

    Raises:
        BadDataError: if more rows are refused than the settings allow, or none is left.
    """
    checked = attributes(work.raw(raw, ds), raw, work.schema)
    quarantined = work.quarantine_attributes(table, ds, checked, key)
    longest = max(work.schema.aggregates.windows)
    days = work.window("impressions", ds, longest)
    impressions = work.read("impressions", days) if days else None
    frame = features(good_rows(checked), impressions, work.schema, ds)
    window = (ds - timedelta(days=longest), ds - timedelta(days=1))
    return work.stage(table, ds, frame, {"impressions": window}, quarantined)
