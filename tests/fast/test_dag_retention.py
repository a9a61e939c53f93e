"""The weekly DAG: what it declares, and that its step needs no day."""

import os
import tempfile
from datetime import timedelta

import pytest

# Airflow writes a configuration file into its home as soon as it is imported.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))

from airflow.sdk.exceptions import AirflowFailException

from dags.retention import dag
from dags.steps import Ended

STEP = dag.get_task("retain")


def rendered(dry_run):
    step = STEP.prepare_for_execution()
    step.render_template_fields({"params": {"dry_run": dry_run}})  # a run without a logical date
    return step


def test_it_runs_once_a_week_and_says_what_the_ui_shows():
    dag.check_cycle()
    assert dag.timetable.expression == "0 3 * * 0"
    assert dag.catchup is False
    assert dag.max_active_runs == 1
    assert dag.doc_md
    assert dag.params.get_param("dry_run").description
    assert STEP.retries >= 2
    assert STEP.execution_timeout > timedelta(0)
    assert "By hand:" in STEP.doc_md


@pytest.mark.parametrize("dry_run", [True, False])
def test_its_command_is_the_one_a_person_would_run(dry_run):
    assert rendered(dry_run).command[1:] == ["-m", "onetrans.cli", "retain", *(["--dry-run"] if dry_run else [])]


def test_a_failure_names_the_step_where_there_is_no_day():
    with pytest.raises(
        AirflowFailException, match=r"^retain: BAD CONFIGURATION\. no plan\. What is published is as it"
    ):
        rendered(False)._raise_for(
            {"ti": type("TI", (), {"try_number": 1, "max_tries": 3})}, Ended(78, None, "no plan")
        )
