"""Table ``item_features``: one row per item and day: declared attributes, and counts and rates of the days before."""

from __future__ import annotations

from datetime import date

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.figures import count_columns, counts, stage_features, totals, unknown_figures, with_figures
from jobs.runner import main
from jobs.workspace import Workspace
from onetrans.lake import Staged
from onetrans.schema import FeatureSchema

TABLE = "item_features"


def item_features(items: DataFrame, impressions: DataFrame | None, schema: FeatureSchema, ds: date) -> DataFrame:
    """Return the features of every item of the snapshot, and of every item shown in the windows.

    ``impressions`` are the published days before ``ds`` as far as the longest window, None if there are none; no
    row of ``ds`` itself is read.  An item's key (author, category, ...) is the one it has in today's snapshot, so
    a key's figures are the sums over the items it has now.
    """
    aggregates = schema.aggregates
    if impressions is None:
        for name in ("item", *aggregates.item_keys):
            items = unknown_figures(items, name, aggregates)
        return items
    counted = counts(impressions, "item_id", ds, schema)
    total = totals(counted, aggregates)
    items = items.join(counted, "item_id", "full_outer")
    frame = with_figures(items, total, "item_id", "item", aggregates)
    for key in aggregates.item_keys:
        sums = [F.sum(column).alias(column) for column in count_columns(aggregates)]
        by_key = items.where(F.col(key).isNotNull()).groupBy(key).agg(*sums)
        frame = with_figures(frame.join(by_key, key, "left"), total, key, key, aggregates)
    return frame


def build(work: Workspace, ds: date) -> Staged:
    """Stage one day."""
    return stage_features(work, ds, TABLE, "items", "item_id", item_features)


if __name__ == "__main__":
    raise SystemExit(main(TABLE, build))
