"""What the DAG files say once more that stands elsewhere: how long a log is waited for, and names that status knows."""

import importlib
import os
import tempfile
import zoneinfo
from datetime import datetime, timedelta
from pathlib import Path

# Airflow writes a configuration file into its home as soon as it is imported.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))

from airflow.sdk import DAG

from dags import feature_tables, ranking_model
from dags.steps import WaitStep
from infra.airflow import reach
from onetrans.errors import BadConfigError
from onetrans.settings import SourceSettings

REPOSITORY = Path(__file__).parents[2]
MODULES = [path.stem for path in sorted((REPOSITORY / "dags").glob("*.py")) if "with DAG(" in path.read_text()]
DAGS: list[DAG] = [importlib.import_module(f"dags.{name}").dag for name in MODULES]


def _taken(hours: int) -> bool:
    try:
        SourceSettings(wait_hours=hours)
    except BadConfigError:
        return False
    return True


def test_a_wait_for_the_log_is_never_cut_off_before_source_wait_hours() -> None:
    """The log's own deadline says what is missing; Airflow's, which knows neither hours nor time zone, comes after."""
    most = max(hours for hours in range(1000) if _taken(hours))
    assert not _taken(most + 1)
    now = datetime(2026, 1, 1)
    shifts = [zoneinfo.ZoneInfo(name).utcoffset(now) for name in zoneinfo.available_timezones() if name != "localtime"]
    latest = -min(shift for shift in shifts if shift is not None)
    assert latest == timedelta(hours=12), "how long after UTC's a day ends in the log's time zone"
    assert timedelta(hours=most) + latest < feature_tables.WAIT_AT_MOST


def test_a_model_waits_for_as_long_as_its_tables_may_take() -> None:
    run = feature_tables.dag.dagrun_timeout
    assert run is not None
    assert feature_tables.WAIT_AT_MOST < run <= ranking_model.WAIT_AT_MOST


def test_status_knows_every_dag() -> None:
    assert sorted(dag.dag_id for dag in DAGS) == sorted(reach.OURS)


def test_status_tells_last_of_every_task_that_fails_where_another_run_has_failed() -> None:
    waits = [task for dag in DAGS for task in dag.tasks if isinstance(task, WaitStep)]
    with_others = {task.task_id for task in waits if task.others or task.others_of_a_backfill}
    assert with_others == set(reach._WAIT_FOR_OTHERS)
    assert with_others < {task.task_id for task in waits}
