"""A deployment of a test's own, beside the shared one of ``conftest.py``: on PostgreSQL, or driven by the clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.local.airflow import REPOSITORY, LocalAirflow
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import write_days
from onetrans.lake import Lake
from onetrans.settings import load_settings
from tests.day.conftest import Deployment

PROMOTE_ALL = """
[gate]
min_lift_ctr_auc = -1.0
min_lift_cvr_auc = -1.0
max_loss_to_champion = 1.0
min_rows = 1
min_positives = 1
min_users = 1
max_uauc_loss = 1.0
max_log_loss_increase = 1e6
max_calibration_error = 1e6
replicates = 100
"""
"""A gate that lets every candidate pass that ranks at all, for tests of what a promotion does.

It asks for no lift over the baseline, but no setting lets a candidate pass that is no better than a coin or than
popularity; :func:`_plain` makes a log in which a day is enough for that.
"""


def rows(lake: Lake, table: str, ds: date) -> list[str]:
    """Return the rows of a published day as sorted text, so that neither files nor their order matter."""
    return sorted(json.dumps(row, default=str, sort_keys=True) for row in lake.read(table, [ds]).to_pylist())


def describe(
    folder: Path,
    first: date,
    days: int,
    more: str = "",
    database: str = "",
    schedule: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Deployment:
    """Write a log whose labels follow the surface, and its configuration; nothing is built, no Airflow is started yet.

    Args:
        folder: an empty folder.
        first: first day of the log.
        days: days it has.
        more: further sections of the configuration file.
        database: address of Airflow's database; empty: SQLite.
        schedule: whether Airflow starts runs by the clock.
        environment: variables of Airflow's processes, besides the one that names the configuration.
    """
    config = folder / "onetrans.toml"
    config.write_text(
        f"""
[source]
path = "{folder / "raw"}"
wait_hours = 36
[lake]
warehouse = "{folder / "lake"}"
[training]
preset = "tiny"
batch_size = 32
runs = "{folder / "runs"}"
threads = 1
[mlflow]
tracking_uri = "sqlite:///{folder / "mlflow" / "mlflow.db"}"
artifacts = "{folder / "mlflow" / "artifacts"}"
{more}
""",
        encoding="utf-8",
    )
    write_days(WorldConfig(users=400, items=120, history_days=3, epoch=first), str(folder / "raw"), first, days)
    for day in range(days):
        _plain(folder / "raw" / "impressions" / f"ds={first + timedelta(days=day)}" / "part-0.parquet")
    (folder / "dags").mkdir()
    for name in ("feature_tables.py", "ranking_model.py", "retention.py"):
        (folder / "dags" / name).symlink_to(REPOSITORY / "dags" / name)
    variables = {"ONETRANS_CONFIG": str(config), **(environment or {})}
    airflow = LocalAirflow(folder / "airflow", variables, dags=folder / "dags", database=database, schedule=schedule)
    return Deployment(folder, load_settings({**os.environ, **variables}), airflow, [])


def _plain(path: Path) -> None:
    """Draw the labels of a day anew: clicks come from the feed, and of the clicks in search most convert.

    A model has seen as much after some dozens of steps, and how popular an item is does not tell it.
    """
    shown = pq.read_table(path)
    feed = np.array(shown["surface"].to_pylist()) == "feed"
    rng = np.random.default_rng(feed.size)
    true = {"ctr": np.where(feed, 0.6, 0.2), "cvr": np.where(feed, 0.2, 0.9)}
    click = rng.random(feed.size) < true["ctr"]
    labels = {"click": click, "conversion": click & (rng.random(feed.size) < true["cvr"])}
    for name, values in (*labels.items(), *((f"true_{task}", values) for task, values in true.items())):
        place = shown.schema.get_field_index(name)
        shown = shown.set_column(place, name, pa.array(values).cast(shown.schema.field(place).type))
    pq.write_table(shown, path)


def build(deployment: Deployment, first: date, last: date, environment: Mapping[str, str] | None = None) -> None:
    """Build and publish a range of days in one Spark session, without Airflow."""
    built = subprocess.run(
        [sys.executable, "-m", "jobs.backfill", "--from", str(first), "--to", str(last)],
        env={**deployment.airflow.environment, **(environment or {})},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
