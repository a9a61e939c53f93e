"""Table ``user_features``: one row per user and day: declared attributes, and counts and rates of the days before."""

from __future__ import annotations

from datetime import date

from pyspark.sql import DataFrame

from jobs.figures import counts, stage_features, totals, unknown_figures, with_figures
from jobs.runner import main
from jobs.workspace import Workspace
from onetrans.lake import Staged
from onetrans.schema import FeatureSchema

TABLE = "user_features"


def user_features(users: DataFrame, impressions: DataFrame | None, schema: FeatureSchema, ds: date) -> DataFrame:
    """Return the features of every user of the snapshot, and of every user shown something in the windows.

    ``impressions`` are the published days before ``ds`` as far as the longest window, None if there are none; no
    row of ``ds`` itself is read.  A user the snapshot does not know has null attributes.
    """
    aggregates = schema.aggregates
    if impressions is None:
        return unknown_figures(users, "user", aggregates)
    counted = counts(impressions, "user_id", ds, schema)
    users = users.join(counted, "user_id", "full_outer")
    return with_figures(users, totals(counted, aggregates), "user_id", "user", aggregates)


def build(work: Workspace, ds: date) -> Staged:
    """Stage one day."""
    return stage_features(work, ds, TABLE, "users", "user_id", user_features)


if __name__ == "__main__":
    raise SystemExit(main(TABLE, build))
