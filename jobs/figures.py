"""Day-lagged counts and rates of a key (user, item, author, ...), shared by both feature tables.

Figures for day D count the impressions of days before D; a rate is pulled to
the overall rate of its window by a prior worth ``smoothing`` impressions (for a
conversion rate, clicks), so a key with little evidence sits near the mean.
"""

from __future__ import annotations

from datetime import date, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from onetrans.schema import Aggregates


def counts(impressions: DataFrame, key: str, ds: date, windows: tuple[int, ...]) -> DataFrame:
    """Return per value of column ``key`` the counts ``<figure>_<window>d`` over the windows that end before ``ds``."""
    labels = {"impressions": F.lit(1), "clicks": F.col("click"), "conversions": F.col("conversion")}
    sums = [
        F.sum(
            F.when(F.col("ds").between(ds - timedelta(days=window), ds - timedelta(days=1)), label).otherwise(0)
        ).alias(f"{figure}_{window}d")
        for window in windows
        for figure, label in labels.items()
    ]
    return impressions.groupBy(key).agg(*sums)


def with_figures(rows: DataFrame, counted: DataFrame | None, key: str, name: str, aggregates: Aggregates) -> DataFrame:
    """Add the columns ``aggregates.columns(name)`` to ``rows``, which has a column ``key`` as ``counted`` has.

    A key that was never shown has counts of 0 and the overall rates.  Where the key itself is null, or nothing was
    published before the day (``counted`` is None), every figure is null: it is unknown, which is not 0.
    """
    if counted is None:
        return rows.withColumns({column: F.lit(None).cast("double") for column in aggregates.columns(name)})
    total = counted.agg(*(F.sum(c).alias(f"all_{c}") for c in counted.columns if c != key))
    joined = rows.join(counted, key, "left").crossJoin(F.broadcast(total))
    known = F.col(key).isNotNull()
    figures = {}
    for window in aggregates.windows:
        count = {
            figure: F.coalesce(F.col(f"{figure}_{window}d"), F.lit(0)).cast("double")
            for figure in ("impressions", "clicks", "conversions")
        }
        overall = {figure: F.col(f"all_{figure}_{window}d").cast("double") for figure in count}
        for rate, events, trials in (("ctr", "clicks", "impressions"), ("cvr", "conversions", "clicks")):
            prior = F.when(overall[trials] > 0, overall[events] / overall[trials])
            weight = count[trials] + aggregates.smoothing
            count[rate] = F.when(weight > 0, (count[events] + aggregates.smoothing * prior) / weight)
        for figure, value in count.items():
            figures[f"{name}_{figure}_{window}d"] = F.when(known, value)
    return joined.withColumns(figures).select(*rows.columns, *aggregates.columns(name))
