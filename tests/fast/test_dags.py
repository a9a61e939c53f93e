"""The DAG files: what they declare, what they import, how a day is decided, what an exit code means."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest

# Airflow writes a configuration file into its home as soon as it is imported.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))

from airflow.sdk import DAG, Asset
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException, AirflowTaskTimeout

from dags import notify, others, steps
from dags.days import run_day
from dags.feature_tables import FROM_THE_LOG_ALONE, NEEDS
from dags.feature_tables import dag as feature_tables
from dags.others import NotStartedError, Other
from dags.ranking_model import dag as ranking_model
from dags.steps import Ended, Step, WaitStep, raise_for
from dags.triggers import NOTHING_AHEAD, StepTrigger
from onetrans import errors

REPOSITORY = Path(__file__).parents[2]
DAGS = [feature_tables, ranking_model]
TASKS = [task for dag in DAGS for task in dag.tasks]
DAG_FILES = [path for path in sorted((REPOSITORY / "dags").glob("*.py")) if "with DAG(" in path.read_text()]
MODULES = [f"dags.{path.stem}" for path in DAG_FILES]
EVERY_DAG = list(
    {
        found.dag_id: found
        for name in MODULES
        for found in vars(importlib.import_module(name)).values()
        if isinstance(found, DAG)
    }.values()
)
HEAVY = (
    *("numpy", "pandas", "pyarrow", "pyspark", "torch", "mlflow", "great_expectations", "pyiceberg", "onetrans"),
    *("kubernetes", "kubernetes_asyncio", "yaml"),
)


def by_id(dag):
    return {task.task_id: task for task in dag.tasks}


# Declarations


def test_dag_files_parse_fast_and_import_nothing_heavy():
    program = f"""
        import sys, time
        import airflow.sdk, airflow.triggers.base
        before, begun = set(sys.modules), time.monotonic()
        import importlib
        for name in {MODULES!r}:
            importlib.import_module(name)
        seconds = time.monotonic() - begun
        loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
        print(seconds, *sorted(loaded & set({HEAVY!r})))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 2.0


def test_every_dag_is_found():
    assert {dag.dag_id for dag in EVERY_DAG} == {"feature_tables", "ranking_model", "retention"}


@pytest.mark.parametrize("dag", EVERY_DAG, ids=lambda dag: dag.dag_id)
def test_a_dag_says_what_the_ui_shows_and_tells_people_when_it_fails(dag):
    dag.check_cycle()
    assert dag.doc_md
    assert dag.description
    assert "ranking" in dag.tags
    assert dag.catchup is False
    assert dag.max_active_runs == 1
    assert dag.dagrun_timeout > timedelta(0)
    assert dag.start_date == datetime(2020, 1, 1, tzinfo=UTC)
    assert dag.on_failure_callback == notify.run_failed
    for name in dag.params:
        field = dag.params.get_param(name)
        assert field.schema.get("title"), f"{name} has no title"
        assert field.description.endswith("."), f"{name} has no sentence of help"
        assert field.schema.get("type"), f"{name} has no type"
        field.resolve()  # the default is one the field accepts


@pytest.mark.parametrize("dag", DAGS, ids=lambda dag: dag.dag_id)
def test_a_day_can_be_backfilled(dag):
    assert dag.timetable.expression == "0 0 * * *"


@pytest.mark.parametrize(
    "task",
    [task for dag in EVERY_DAG for task in dag.tasks],
    ids=lambda task: f"{task.dag.dag_id}.{task.task_id}",
)
def test_a_task_has_owner_retries_timeout_and_documentation(task):
    assert task.owner == "ranking"
    assert task.retries >= 2
    assert task.retry_delay >= timedelta(seconds=30)
    assert task.retry_exponential_backoff > 1
    assert task.execution_timeout > timedelta(0)
    assert "By hand:" in task.doc_md
    assert task.on_failure_callback == [notify.task_failed]
    assert task.unharmed.endswith(".")


@pytest.mark.parametrize(("this_try", "minutes"), [(1, 1), (2, 2), (3, 4)])
def test_airflow_waits_longer_before_each_further_try(this_try, minutes):
    """It spreads tries: between once and twice what the declaration says."""
    from airflow.models.taskinstance import TaskInstance

    ended = datetime(2022, 5, 5, tzinfo=UTC)
    for task in TASKS:
        failed = SimpleNamespace(
            **{"dag_id": task.dag.dag_id, "task_id": task.task_id, "logical_date": LOGICAL, "try_number": this_try},
            **{"task": task, "end_date": ended, "retry_delay_override": None},
        )
        waits = TaskInstance.next_retry_datetime(failed) - ended
        assert timedelta(minutes=minutes) <= waits < timedelta(minutes=2 * minutes), task.task_id


def test_a_day_without_a_verdict_has_a_deadline_that_a_deployment_sets():
    from dags.ranking_model import undecided_at

    (alert,) = ranking_model.deadline
    assert alert.interval == timedelta(hours=36)
    assert alert.callback.path == "dags.notify.day_undecided"
    assert alert.callback.kwargs["decided_by"] in by_id(ranking_model)
    assert undecided_at(0) == []
    assert undecided_at(30.5)[0].interval == timedelta(hours=30.5)


def test_every_table_is_built_audited_and_published_after_what_it_needs():
    from onetrans.lake import TABLES

    tasks = by_id(feature_tables)
    assert tuple(NEEDS) == TABLES
    steps_of_tables = {f"{table}.{step}" for table in TABLES for step in ("build", "audit", "publish")}
    assert set(tasks) == {"wait_for_log", "wait_for_day_before", *steps_of_tables}
    assert tasks["wait_for_log"].others == [], "a day's log is waited for whatever the day before does"
    assert tasks["wait_for_day_before"].upstream_task_ids == {"wait_for_log"}
    for table, needed in NEEDS.items():
        alone = table in FROM_THE_LOG_ALONE
        before = {"wait_for_log"} if alone else {"wait_for_log", "wait_for_day_before"}  # the first skips a lost day
        before = {f"{other}.publish" for other in needed} or before
        assert tasks[f"{table}.build"].upstream_task_ids == before
        assert tasks[f"{table}.audit"].upstream_task_ids == {
            f"{table}.build",
            *(["wait_for_day_before"] if alone else []),
        }
        assert tasks[f"{table}.publish"].upstream_task_ids == {f"{table}.audit"}
        assert [asset.name for asset in tasks[f"{table}.publish"].outlets] == [f"ranking.{table}"]


def test_spark_and_gpu_work_has_pools_and_nothing_else_waits_for_them():
    from infra.airflow.pools import pools
    from onetrans.settings import AirflowSettings

    pool_of = {f"{task.dag.dag_id}.{task.task_id}": task.pool for task in TASKS}
    spark = {name for name, pool in pool_of.items() if pool == steps.SPARK_POOL}
    gpu = {name for name, pool in pool_of.items() if pool == steps.GPU_POOL}
    assert spark == {
        *(f"feature_tables.{table}.{step}" for table in NEEDS for step in ("build", "audit")),
        "ranking_model.score_candidates",
    }
    assert gpu == {f"ranking_model.{name}" for name in ("train_onetrans", "train_dcnv2_din", "evaluate")}
    assert pool_of["ranking_model.promote"] == steps.REGISTRY_POOL
    assert {pool_of[name] for name in pool_of.keys() - spark - gpu - {"ranking_model.promote"}} == {steps.DEFAULT_POOL}
    made = pools(AirflowSettings(spark_slots=7, gpu_slots=4))
    # A training in a pod holds its GPU while it is deferred; the other pools' steps hold nothing then.
    assert {name: (pool["slots"], pool["include_deferred"]) for name, pool in made.items()} == {
        steps.SPARK_POOL: (7, False),
        steps.GPU_POOL: (4, True),
        steps.REGISTRY_POOL: (1, False),
    }


@pytest.mark.parametrize(
    ("run_type", "hours_late", "operator", "priority"),
    [
        ("SCHEDULED", 1, "Step", 7),
        ("MANUAL", 0, "WaitStep", 7),
        ("BACKFILL_JOB", 1, "Step", 0),
        ("BACKFILL_JOB", 1, "WaitStep", 0),
        ("SCHEDULED", 40, "Step", 0),  # a day that a backfill clears is of its first type while Airflow clears it
        ("BACKFILL_JOB", 40, "BashOperator", 7),
    ],
)
def test_what_makes_up_for_a_day_goes_last(run_type, hours_late, operator, priority):
    from airflow.utils.types import DagRunType

    from infra.airflow.priority import task_instance_mutation_hook

    task = SimpleNamespace(operator=operator, priority_weight=7)
    run = SimpleNamespace(run_type=DagRunType[run_type], run_after=datetime.now(UTC) - timedelta(hours=hours_late))
    task_instance_mutation_hook(task, run)
    assert task.priority_weight == priority


@pytest.mark.parametrize("folder", ["airflow/on_scheduler", "local/on_sqlite"])
def test_airflow_finds_the_order_of_runs_where_it_looks_for_it(folder):
    from infra.airflow.priority import task_instance_mutation_hook

    path = REPOSITORY / "infra" / folder / "airflow_local_settings.py"
    spec = importlib.util.spec_from_file_location("local_settings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.task_instance_mutation_hook is task_instance_mutation_hook
    assert "task_instance_mutation_hook" in module.__all__


def test_the_lowest_priority_that_a_task_declares_is_above_that_of_a_backfill():
    from infra.airflow.priority import LAST, STEPS

    assert all(type(task).__name__ in STEPS for task in TASKS)
    assert min(task.priority_weight for task in TASKS) > LAST


def test_what_a_wait_looks_at_exists():
    """A run is found by names that nothing else checks: a typo would find none, and wait for nothing."""
    dags_by_id = {dag.dag_id: dag for dag in DAGS}
    waits = [task for task in TASKS if isinstance(task, WaitStep)]
    watched = [other for task in waits for other in (*task.others, *task.others_of_a_backfill)]
    assert {(other.dag_id, other.days_back) for other in watched} == {
        *{("feature_tables", 1), ("feature_tables", 0), ("ranking_model", 1)}
    }
    for other in watched:
        assert not other.task_id or other.task_id in by_id(dags_by_id[other.dag_id])
        assert other.why.endswith(".")


def test_both_models_train_side_by_side():
    tasks = by_id(ranking_model)
    assert tasks["train_onetrans"].upstream_task_ids == tasks["train_dcnv2_din"].upstream_task_ids == {"plan"}
    assert tasks["evaluate"].upstream_task_ids == {"train_onetrans", "train_dcnv2_din"}
    assert list(tasks) == [
        "wait_for_day",
        "plan",
        "train_onetrans",
        "train_dcnv2_din",
        "evaluate",
        "gate",
        "promote",
        "score_candidates",
    ]


def test_the_form_offers_what_the_settings_accept():
    from typing import get_args

    from onetrans.settings import GateMode, Preset

    params = ranking_model.params
    assert params.get_param("preset").schema["enum"][1:] == list(get_args(Preset))
    assert params.get_param("gate_mode").schema["enum"][1:] == list(get_args(GateMode))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("ds", "4 May", "is not a 'date'|written YYYY-MM-DD"),
        ("preset", "huge", "not one of ['as configured', 'tiny'"),
        ("from_scratch", "yes", "is not of type 'boolean'"),
        ("gate_mode", "on", "not one of ['as configured', 'enabled', 'dry_run', 'off']"),
        ("force_reason", "  ", "'  ' is too short|a reason in words, of 3 to 500 characters"),
        ("force_reason", "x" * 501, "is too long|a reason in words"),
    ],
)
def test_a_value_the_form_refuses_is_told_why(field, value, why):
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError) as refused:
        ranking_model.params.get_param(field).resolve(value)
    for words in why.split("|"):
        assert words in str(refused.value)


def test_every_command_a_step_runs_exists():
    from onetrans.cli import COMMANDS

    for task in TASKS:
        if task.module == "onetrans.cli":
            assert task.arguments[0] in COMMANDS


def test_exit_codes_are_those_of_the_library():
    ours = (steps.EXIT_OK, steps.EXIT_BAD_DATA, steps.EXIT_NOT_READY, steps.EXIT_BAD_CONFIG)
    assert ours == (errors.EXIT_OK, errors.EXIT_BAD_DATA, errors.EXIT_NOT_READY, errors.EXIT_BAD_CONFIG)


def test_what_is_unharmed_is_said_in_the_words_of_the_library_and_once():
    assert steps.UNHARMED == errors.UNHARMED
    with pytest.raises(AirflowFailException) as raised:
        raise_for("x.build of 2022-05-04", Ended(65, None, f"BadDataError: 3 rows. {errors.UNHARMED} Correct them"))
    assert str(raised.value).count(errors.UNHARMED) == 1


# The day of a run


def context(**given):
    return {
        **{"params": {}, "logical_date": None, "partition_key": None, "triggering_asset_events": {}},
        **{"ti": SimpleNamespace(try_number=1, max_tries=3)},
        **given,
    }


def event(ds, second):
    return SimpleNamespace(extra={"ds": ds}, timestamp=datetime(2022, 5, 7, 0, 0, second, tzinfo=UTC))


LOGICAL = datetime(2022, 5, 4, tzinfo=UTC)


def dag_run(run_type):
    """Return a run as a task gets to see it."""
    from airflow.sdk.api.datamodels._generated import DagRun

    return DagRun.model_validate(
        {
            **{"dag_id": "ranking_model", "run_id": "r", "logical_date": LOGICAL, "run_after": LOGICAL},
            **{"data_interval_start": LOGICAL, "data_interval_end": LOGICAL, "start_date": LOGICAL, "end_date": None},
            **{"run_type": run_type, "state": "running", "consumed_asset_events": [], "partition_key": None},
        }
    )


@pytest.mark.parametrize(
    ("given", "day"),
    [
        ({"logical_date": LOGICAL}, "2022-05-04"),
        ({"logical_date": LOGICAL.astimezone(timezone(timedelta(hours=-8)))}, "2022-05-04"),
        ({"logical_date": LOGICAL, "params": {"ds": "2022-05-01"}}, "2022-05-01"),
        ({"params": {"ds": None}, "logical_date": LOGICAL}, "2022-05-04"),
        ({"partition_key": "2022-05-02"}, "2022-05-02"),
        ({"triggering_asset_events": {"a": [event("2022-05-03", 1)], "b": [event("2022-05-05", 2)]}}, "2022-05-05"),
        ({"logical_date": LOGICAL, "triggering_asset_events": {"a": [event("2022-05-09", 1)]}}, "2022-05-04"),
    ],
)
def test_the_day_of_a_run(given, day):
    assert run_day(context(**given)) == day


def test_a_backfill_with_one_day_for_all_its_runs_is_refused():
    """Each of its runs would build the same day, and the range would look done."""
    backfill = dag_run("backfill")
    with pytest.raises(AirflowFailException, match="The field Day says 2022-05-01 in a backfill"):
        run_day(context(dag_run=backfill, logical_date=LOGICAL, params={"ds": "2022-05-01"}))
    assert run_day(context(dag_run=backfill, logical_date=LOGICAL, params={"ds": "2022-05-04"})) == "2022-05-04"
    assert run_day(context(dag_run=backfill, logical_date=LOGICAL)) == "2022-05-04"
    by_hand = context(dag_run=dag_run("manual"), logical_date=LOGICAL, params={"ds": "2022-05-01"})
    assert run_day(by_hand) == "2022-05-01"


def test_a_step_whose_day_cannot_be_told_says_so_as_any_other_failure(script):
    step = script("", unharmed="All is as it was.")
    with pytest.raises(AirflowFailException) as raised:
        step.render_template_fields(context(params={"ds": "yesterday"}))
    assert str(raised.value) == (
        "program: REFUSED. The field ds of this run is 'yesterday', which is not a day written YYYY-MM-DD. "
        "All is as it was."
    )


def test_a_run_without_a_day_fails_for_good_and_says_what_to_do():
    with pytest.raises(AirflowFailException, match="fill in the field Day"):
        run_day(context())


@pytest.mark.parametrize("text", ["tomorrow", "2022-02-30", "2022-05-04; rm -rf /"])
def test_a_day_that_is_none_fails_for_good(text):
    with pytest.raises(AirflowFailException, match="not a day written YYYY-MM-DD"):
        run_day(context(params={"ds": text}))


# Exit codes


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (65, AirflowFailException, "BAD DATA"),
        (78, AirflowFailException, "BAD CONFIGURATION"),
        (75, AirflowException, "NOT READY"),
        (1, AirflowException, "FAILED with exit code 1"),
        (2, AirflowException, "FAILED with exit code 2"),
        (-9, AirflowException, "memory runs out"),
        (-15, AirflowException, "SIGTERM"),
    ],
)
def test_an_exit_code_decides_whether_airflow_retries(code, kind, text):
    with pytest.raises(AirflowException, match=text) as raised:
        raise_for("impressions.build of 2022-05-04", Ended(code, None, "column click: 3 rows"))
    assert type(raised.value) is kind
    assert "impressions.build of 2022-05-04" in str(raised.value)
    assert "column click: 3 rows" in str(raised.value)


@pytest.mark.parametrize(
    ("dag", "task_id", "code", "cleared"),
    [
        (feature_tables, "impressions.build", 65, "correct the data, then clear this task."),
        # What was staged is audited and published as it is, however often.
        (feature_tables, "impressions.audit", 65, "then clear impressions.build, and what follows it runs too."),
        (feature_tables, "behaviors.publish", 65, "then clear behaviors.build, and what follows it runs too."),
        # The plan pins files, recipe and what a training goes on from.
        (ranking_model, "train_onetrans", 65, "then clear this task; but what `plan` pins (tables, days, preset, "),
        (ranking_model, "evaluate", 78, "correct it, then clear this task; but what `plan` pins"),
        (ranking_model, "gate", 78, "correct it, then clear this task."),
    ],
)
def test_a_correction_is_taken_in_by_the_step_that_is_named(dag, task_id, code, cleared):
    step = by_id(dag)[task_id]
    with pytest.raises(AirflowFailException) as raised:
        step._raise_for(context(logical_date=LOGICAL), Ended(code, None, "3 rows"))
    assert cleared in str(raised.value)


@pytest.mark.parametrize("code", [65, 75, 78, 1, 2, -9])
@pytest.mark.parametrize("this_try", [1, 4])
def test_a_failure_says_what_is_unharmed_and_what_happens_next(code, this_try):
    with pytest.raises(AirflowException) as raised:
        raise_for("x.build of 2022-05-04", Ended(code, None, "3 rows"), "Readers see the day as it was.", this_try, 4)
    text = str(raised.value)
    assert "Readers see the day as it was." in text
    retried = code not in (65, 78) and this_try < 4
    assert ("Airflow tries it again: this was try 1 of 4." in text) is retried
    assert ("clear this task" in text) is not retried
    assert "tried again" not in text


def test_success_raises_nothing():
    raise_for("plan of 2022-05-04", Ended(0, "var/runs/x", ""))


# Processes


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Return a function that makes a step of the text of a program."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def step(text, cls=Step, **kwargs):
        (tmp_path / "program.py").write_text(textwrap.dedent(text))
        return cls(task_id="program", module="program", **kwargs)

    return step


def test_a_step_returns_the_last_line_it_printed_and_logs_the_rest(script, capsys):
    step = script(
        """
        import os, sys
        print("one"); print("WARN late rows", file=sys.stderr); print(sys.argv[1:], os.environ["COLOUR"]); print()
        """,
        arguments=["--ds", "2022-05-04", ""],
        environment={"COLOUR": "red", "HOME": ""},
    )
    assert step.run_process() == Ended(0, "['--ds', '2022-05-04'] red", "WARN late rows")
    command, *lines = [line for line in capsys.readouterr().out.splitlines() if "Step" in line]
    assert "COLOUR=red" in command
    assert "--ds 2022-05-04" in command
    assert "HOME" not in command
    assert any("[info     ] one " in line for line in lines)
    assert any("[warning  ] WARN late rows" in line for line in lines)


@pytest.mark.parametrize("result", ["nothing is scored: there is no champion yet", "12 rows"])
def test_a_step_that_had_nothing_to_do_is_skipped_and_its_assets_hear_nothing(script, result):
    asset = Asset("scores")
    step = script(f"print({result!r})", nothing_done="nothing is scored", outlets=[asset])
    events = {asset: SimpleNamespace(extra=None)}
    given = context(logical_date=LOGICAL, outlet_events=events)
    if result == "12 rows":
        assert step.execute(given) == result
        assert events[asset].extra == {"ds": "2022-05-04", "result": result}
    else:
        with pytest.raises(AirflowSkipException, match=f"program of 2022-05-04: {result}"):
            step.execute(given)
        assert events[asset].extra is None


def test_the_error_is_what_the_process_said_last(script):
    step = script(
        """
        import sys
        print("ValueError: an earlier one that was survived", file=sys.stderr)
        print("INFO going on", file=sys.stderr)
        print("BadDataError: impressions 2022-05-04: 3 rows have click = 7,\\nfor example request r1", file=sys.stderr)
        sys.exit(65)
        """
    )
    ended = step.run_process()
    assert ended.code == 65
    assert ended.error == "BadDataError: impressions 2022-05-04: 3 rows have click = 7,\nfor example request r1"


def test_a_failure_ends_with_the_page_the_process_named_last(script):
    step = script(
        """
        import sys
        print("see: run 1 in MLflow", file=sys.stderr)
        print("BadDataError: 3 rows", file=sys.stderr)
        print("see: http://docs/impressions/2022-05-04.html", file=sys.stderr)
        sys.exit(int(sys.argv[1]))
        """,
        arguments=["65"],
    )
    with pytest.raises(AirflowFailException) as raised:
        step.execute(context(logical_date=LOGICAL))
    assert str(raised.value).endswith("then clear this task. See http://docs/impressions/2022-05-04.html")
    assert "MLflow" not in str(raised.value)
    step.arguments = ["1"]
    with pytest.raises(AirflowException) as raised:
        step.execute(context(logical_date=LOGICAL))
    assert str(raised.value).endswith("this was try 1 of 4. See http://docs/impressions/2022-05-04.html")


@pytest.mark.parametrize("cls", [Step, WaitStep])
def test_a_step_that_takes_too_long_says_so_in_the_same_words(script, cls):
    from airflow.sdk.execution_time.timeout import timeout

    more = {"at_most": timedelta(hours=1)} if cls is WaitStep else {}
    step = script("import time; time.sleep(60)", cls=cls, execution_timeout=timedelta(seconds=1), **more)
    with pytest.raises(AirflowTaskTimeout) as raised, timeout(1):  # as Airflow's task runner does
        step.execute(context(logical_date=LOGICAL))
    text = str(raised.value)
    assert "program of 2022-05-04: TOO SLOW. It ran for longer than 0:00:01" in text
    assert "Published data is as it was. Airflow tries it again: this was try 1 of 4." in text


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("OSError: [Errno 28] No space left on device: '/lake/x.parquet'", "make room for it; `onetrans retain"),
        ("Caused by: java.lang.OutOfMemoryError: Java heap space", "raise spark.driver_memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB", "lower training.batch_size"),
    ],
)
def test_errors_of_others_come_with_what_to_do(error, hint):
    with pytest.raises(AirflowException) as raised:
        raise_for("x.build of 2022-05-04", Ended(1, None, error), this_try=4, tries=4)
    assert hint in str(raised.value)
    assert "clear this task" in str(raised.value)


def test_a_spark_error_is_found_before_its_stack(script):
    """Java's frames come last, in dozens; they say nothing of table, day or cause."""
    step = script(
        """
        import sys
        print("py4j.protocol.Py4JJavaError: An error occurred while calling o83.parquet.", file=sys.stderr)
        print(": org.apache.spark.SparkException: Job aborted.", file=sys.stderr)
        for n in range(60):
            print(f"\\tat org.apache.spark.sql.Some$Thing.run(Some.scala:{n})", file=sys.stderr)
        print("Caused by: java.io.IOException: No space left on device", file=sys.stderr)
        print("\\t... 53 more", file=sys.stderr)
        sys.exit(1)
        """
    )
    assert step.run_process().error.splitlines() == [
        "py4j.protocol.Py4JJavaError: An error occurred while calling o83.parquet.",
        ": org.apache.spark.SparkException: Job aborted.",
        "Caused by: java.io.IOException: No space left on device",
    ]


def test_what_a_step_started_ends_with_it(script, tmp_path):
    """A JVM left behind would hold memory, and its copy of the output pipe would hold the task."""
    step = script(
        f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        """
    )
    begun = time.monotonic()
    assert step.run_process().code == 0
    assert time.monotonic() - begun < 20
    assert not _runs(int((tmp_path / "pid").read_text()))


def test_a_step_ends_with_its_worker_when_that_is_killed(script, tmp_path):
    """Airflow starts the next try elsewhere, and the first would go on beside it."""
    script(
        f"""
        import os, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        time.sleep(600)
        """
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", "from dags.steps import Step; Step(task_id='x', module='program').run_process()"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    worker.kill()
    worker.wait()
    left_behind = _runs(pid)
    if left_behind:
        os.kill(pid, signal.SIGKILL)
    assert not left_behind


def test_progress_is_not_told_as_the_error_of_a_step_that_was_killed():
    said = "onetrans: 100 of 900 (11 %) samples\nonetrans: 200 of 900 (22 %) samples\n"
    with pytest.raises(AirflowException) as raised:
        steps.raise_for("train of 2022-05-04", steps.ended_by(137, said), this_try=1, tries=4)
    assert str(raised.value) == (
        "train of 2022-05-04: ended by SIGKILL. The system does this when memory runs out. It had last said: onetrans: "
        "200 of 900 (22 %) samples. Published data is as it was. Airflow tries it again: this was try 1 of 4."
    )
    with pytest.raises(AirflowException, match=r"runs out\. MemoryError: no room\. Published data"):
        steps.raise_for("train of 2022-05-04", steps.ended_by(137, f"{said}MemoryError: no room\n"))


def test_killing_a_task_kills_its_process_group(script, tmp_path):
    step = script(
        f"""
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a process that does not listen
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        print("ready", flush=True)
        time.sleep(600)
        """
    )

    def kill(number, frame):
        step.on_kill()

    previous = signal.signal(signal.SIGALRM, kill)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        ended = step.run_process()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert ended.code == -signal.SIGKILL
    assert not _runs(int((tmp_path / "pid").read_text()))


def _runs(pid):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        with open(f"/proc/{pid}/stat") as file:
            if file.read().split()[2] == "Z":
                return False
        time.sleep(0.05)
    return True


def test_a_wait_that_is_over_before_it_begins_ends_at_once(script):
    step = script("print('published')", cls=WaitStep, at_most=timedelta(hours=2))
    assert step.execute(context(logical_date=LOGICAL)) == "published"


def test_a_wait_is_handed_to_the_triggerer(script):
    from airflow.sdk.exceptions import TaskDeferred

    step = script("raise SystemExit(75)", cls=WaitStep, at_most=timedelta(hours=2))
    with pytest.raises(TaskDeferred) as deferred:
        step.execute(context(logical_date=LOGICAL))
    path, arguments = deferred.value.trigger.serialize()
    assert path == "dags.triggers.StepTrigger"
    assert StepTrigger(**arguments).serialize() == (path, arguments)
    left = datetime.fromisoformat(arguments["until"]) - datetime.now(UTC)
    assert timedelta(hours=1, minutes=59) < left <= timedelta(hours=2)


FORM = {"preset": "as configured", "from_scratch": False, "gate_mode": "as configured", "ds": None}


@pytest.mark.parametrize(
    ("asked", "run_type", "why"),
    [
        ({"force_reason": "a broken baseline"}, "manual", ""),
        ({"force_reason": None}, "backfill", ""),
        ({"force_reason": "    "}, "manual", "forced promotion is blank"),
        ({"force_reason": "a broken baseline"}, "backfill", "would promote each of its days"),
        ({"force_reason": "a broken baseline", "gate_mode": "dry_run"}, "manual", "Gate mode dry_run leaves"),
        ({"force_reason": "a broken baseline", "gate_mode": "off"}, "manual", "Gate mode off leaves"),
        ({"force_reason": "a broken baseline", "configured": "dry_run"}, "manual", "Gate mode dry_run, as configured,"),
        ({"force_reason": "a broken baseline", "configured": "off", "gate_mode": "enabled"}, "manual", ""),
    ],
)
def test_a_forced_promotion_that_cannot_be_meant_is_refused_before_anything_runs(
    script, monkeypatch, asked, run_type, why
):
    asked = dict(asked)
    monkeypatch.setenv("ONETRANS_GATE_MODE", asked.pop("configured", "enabled"))
    refuse = by_id(ranking_model)["wait_for_day"].refuse
    step = script("print('published')", cls=WaitStep, at_most=timedelta(hours=2), refuse=refuse)
    given = context(logical_date=LOGICAL, params={**FORM, **asked}, dag_run=dag_run(run_type))
    if not why:
        assert step.execute(given) == "published"
        return
    with pytest.raises(AirflowFailException, match=why) as refused:
        step.execute(given)
    assert "program of 2022-05-04: REFUSED." in str(refused.value)
    assert "Airflow does not retry this" in str(refused.value)


@pytest.mark.parametrize("reason", [None, "it's the --baseline"])
def test_the_reason_of_a_forced_promotion_reaches_the_steps_that_keep_and_use_it(reason):
    for task_id in ("plan", "gate", "promote"):
        step = by_id(ranking_model)[task_id].prepare_for_execution()
        ti = SimpleNamespace(xcom_pull=lambda task_ids: "var/runs/x")
        step.render_template_fields(context(logical_date=LOGICAL, params={**FORM, "force_reason": reason}, ti=ti))
        forced = [argument for argument in step.command if argument.startswith("--force")]
        assert forced == ([f"--force={reason}"] if reason else [])


@pytest.mark.parametrize(
    ("asked", "variables", "from_scratch"),
    [
        ({}, {}, False),
        ({"preset": "large"}, {"ONETRANS_TRAINING_PRESET": "large"}, False),
        ({"gate_mode": "dry_run"}, {"ONETRANS_GATE_MODE": "dry_run"}, False),
        ({"from_scratch": True}, {}, True),
        (
            {"preset": "tiny", "gate_mode": "off", "from_scratch": True},
            {"ONETRANS_TRAINING_PRESET": "tiny", "ONETRANS_GATE_MODE": "off"},
            True,
        ),
    ],
)
def test_what_the_form_chose_reaches_every_step_and_what_it_left_does_not(asked, variables, from_scratch):
    plan = ["--plan", "var/runs/x"]
    arguments = {
        "plan": ["plan", "--ds", "2022-05-04", *(["--from-scratch"] if from_scratch else [])],
        "train_onetrans": ["train", *plan, "--model", "onetrans"],
        "train_dcnv2_din": ["train", *plan, "--model", "dcnv2_din"],
        "evaluate": ["evaluate", *plan],
        "gate": ["gate", *plan],
        "promote": ["promote", *plan],
    }
    ti = SimpleNamespace(xcom_pull=lambda task_ids: {"plan": "var/runs/x"}[task_ids])
    form = {**FORM, "force_reason": None, **asked}
    for task_id, wanted in arguments.items():
        step = by_id(ranking_model)[task_id].prepare_for_execution()
        step.render_template_fields(context(logical_date=LOGICAL, params=form, ti=ti))
        assert step.variables == variables, task_id
        assert step.command == [sys.executable, "-m", "onetrans.cli", *wanted], task_id


def test_a_wait_for_something_impossible_fails_at_once(script):
    step = script("raise SystemExit(78)", cls=WaitStep, at_most=timedelta(hours=2))
    with pytest.raises(AirflowFailException, match="BAD CONFIGURATION"):
        step.execute(context(logical_date=LOGICAL))


def look(trigger):
    import asyncio

    async def first():
        async for happened in trigger.run():
            return happened.payload

    return asyncio.run(first())


def test_the_triggerer_looks_until_the_answer_is_final(tmp_path):
    program = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); seen = p.exists(); p.touch(); "
        "print('published' if seen else '', sys.argv[2:]); sys.exit(0 if seen else 1)"
    )
    until = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    command = [sys.executable, "-c", program, str(tmp_path / "seen")]
    payload = look(StepTrigger(command, {}, until, pause_s=0.1))
    waited = int(payload["result"].split("'")[-2])
    assert 280 < waited <= 300
    answer = f"published ['--wait', '{waited}']"
    good = {"late": False, "stop": "", "behind_failure": False}
    assert payload == {"code": 0, "result": answer, "error": "", **good}


def test_the_triggerer_gives_up_at_the_deadline():
    command = [sys.executable, "-c", "import sys; print('not there', file=sys.stderr); sys.exit(75)"]
    payload = look(StepTrigger(command, {}, datetime.now(UTC).isoformat()))
    assert payload == {
        "code": 75,
        "result": None,
        "error": "not there",
        "late": True,
        "stop": "",
        "behind_failure": False,
    }
    step = WaitStep(task_id="wait", module="x", at_most=timedelta(seconds=1))
    with pytest.raises(AirflowFailException, match="still not ready"):
        step.resume(context(logical_date=LOGICAL), payload)


def test_a_day_that_the_log_lost_is_skipped(script):
    """Its run succeeds with nothing done, so the next day of a backfill goes on."""
    from airflow.sdk.exceptions import AirflowSkipException

    rules = {"cls": WaitStep, "at_most": timedelta(hours=2), "nothing_done": steps.NOTHING_TO_DO}
    step = script("print('nothing to do: the log lost 2022-05-04')", **rules)
    with pytest.raises(AirflowSkipException, match="program of 2022-05-04: nothing to do"):
        step.execute(context(logical_date=LOGICAL))
    payload = {"code": 0, "result": "nothing to do: the log lost it", "error": "", "late": False, "stop": ""}
    with pytest.raises(AirflowSkipException):
        step.resume(context(logical_date=LOGICAL), payload)
    assert script("print('there')", **rules).execute(context(logical_date=LOGICAL)) == "there"
    for dag, task_id in ((feature_tables, "wait_for_log"), (ranking_model, "wait_for_day")):
        look = by_id(dag)[task_id]
        assert (look.nothing_done, look.arguments[-1]) == ("nothing to do", "--unless-absent")
        rules = {task.trigger_rule for task in dag.tasks if task.task_id != "wait_for_day_before"}
        assert rules == {"all_success"}, "what follows is skipped too"
    # Were this wait skipped too, the day after would begin before its past is built.
    assert by_id(feature_tables)["wait_for_day_before"].trigger_rule == "none_failed"


def test_an_answer_from_the_triggerer_ends_the_wait():
    step = WaitStep(task_id="wait", module="x", at_most=timedelta(seconds=1))
    payload = {"code": 0, "result": "published", "error": "", "late": False, "stop": ""}
    assert step.resume(context(logical_date=LOGICAL), payload) == "published"
    with pytest.raises(AirflowFailException, match="BAD CONFIGURATION"):
        step.resume(context(logical_date=LOGICAL), {**payload, "code": 78})


# Other runs; tests/day asks a real Airflow how they stand

TABLES_FAIL = Other("feature_tables", "publish", if_failed="stop unless ready", why="It makes the rows.")
DAY_BEFORE = Other("feature_tables", days_back=1, why="Tails are built on it.", patience_s={"stuck": 0.3})
TONIGHT = replace(DAY_BEFORE, if_failed="stop unless ready", if_queued="wait unless ready", if_done="stop unless ready")


@pytest.fixture
def stands(monkeypatch):
    """Return a list of the states other runs are found in, look by look; the last one stays."""
    states = []
    monkeypatch.setattr(others, "state_of", lambda *_: states.pop(0) if states[1:] else states[0])
    monkeypatch.setattr(others, "failed_tasks", lambda *_: ["impressions.audit", "publish"])
    monkeypatch.setattr(steps, "by_hand", lambda *_: [])
    return states


@pytest.mark.parametrize(
    ("other", "state", "code", "outcome"),
    [
        (DAY_BEFORE, "none", 0, "done"),
        (DAY_BEFORE, "done", 0, "done"),
        (
            DAY_BEFORE,
            "failed",
            0,
            "feature_tables of 2022-05-03 has failed at impressions.audit and publish. Tails are built on it. Clear "
            "that run",
        ),
        (DAY_BEFORE, "running", 0, "deferred"),
        (DAY_BEFORE, "queued", 0, "deferred"),
        (TABLES_FAIL, "running", 0, "deferred"),
        (TABLES_FAIL, "failed", 0, "done"),
        (TABLES_FAIL, "failed", 75, "feature_tables's task publish of 2022-05-04 has failed. It makes the rows."),
        (Other("ranking_model", days_back=1, if_failed="go on"), "failed", 0, "done"),
        (TONIGHT, "failed", 0, "done"),
        (TONIGHT, "failed", 75, "feature_tables of 2022-05-03 has failed at impressions.audit and publish. Tails"),
        (TONIGHT, "queued", 0, "done"),
        (TONIGHT, "queued", 75, "deferred"),
        (TONIGHT, "stuck", 0, "done"),
        (TONIGHT, "running", 0, "deferred"),
    ],
)
def test_how_another_run_stands_decides_whether_a_step_begins(script, stands, other, state, code, outcome):
    from airflow.sdk.exceptions import TaskDeferred

    stands.append(state)
    step = script(f"raise SystemExit({code})", cls=WaitStep, at_most=timedelta(hours=2), others=[other])
    given = context(logical_date=LOGICAL)
    if outcome == "done":
        step.execute(given)
        return
    with pytest.raises(TaskDeferred if outcome == "deferred" else AirflowFailException) as raised:
        step.execute(given)
    if outcome != "deferred":
        assert outcome in str(raised.value)
        assert "Published data is as it was." in str(raised.value)


@pytest.mark.parametrize(
    ("failed", "words"),
    [
        (["publish"], "feature_tables's task publish of 2022-05-04 has failed. It makes the rows."),
        (["build"], "feature_tables's task publish of 2022-05-04 was not run: build has failed. It makes the rows."),
        ([], "feature_tables's task publish of 2022-05-04 was not run: its run has failed. It makes the rows."),
    ],
)
def test_a_task_that_was_not_run_is_not_told_as_one_that_failed(stands, monkeypatch, failed, words):
    stands.append("failed")
    monkeypatch.setattr(others, "failed_tasks", lambda *_: failed)
    assert others.look_at([TABLES_FAIL.of("2022-05-04")]).unless_ready.startswith(words)


def test_an_airflow_that_does_not_say_how_other_runs_stand_is_asked_again(script, monkeypatch):
    from airflow.sdk.exceptions import AirflowRuntimeError
    from airflow.sdk.execution_time.comms import ErrorResponse, ErrorType

    def away(*_):
        raise AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={"status_code": 503}))

    monkeypatch.setattr(steps, "by_hand", away)
    step = script("raise SystemExit(0)", cls=WaitStep, at_most=timedelta(hours=2), others=[DAY_BEFORE])
    with pytest.raises(AirflowException) as raised:
        step.execute(context(logical_date=LOGICAL))
    assert type(raised.value) is AirflowException, "it would not be tried again"
    text = str(raised.value)
    assert text.startswith(
        "program of 2022-05-04: NOT READY. Airflow does not say how other runs stand: API_SERVER_ERR"
    )
    assert "503" in text
    assert text.endswith("Airflow tries it again: this was try 1 of 4.")


def test_a_wait_for_other_runs_alone_starts_no_process(stands):
    from airflow.sdk.exceptions import TaskDeferred

    stands += ["running", "queued", "running", "done"]
    step = WaitStep(task_id="wait", at_most=timedelta(hours=2), others=[DAY_BEFORE])
    with pytest.raises(TaskDeferred) as deferred:
        step.execute(context(logical_date=LOGICAL))
    _, arguments = deferred.value.trigger.serialize()
    assert arguments["command"] == []
    payload = look(StepTrigger(**{**arguments, "look_s": 0.1}))
    assert stands == ["done"]
    assert step.resume(context(logical_date=LOGICAL), payload) == NOTHING_AHEAD
    assert step.execute(context(logical_date=LOGICAL)) == NOTHING_AHEAD
    stands[:] = ["failed"]
    with pytest.raises(AirflowFailException, match=r"NOT STARTED\. feature_tables of 2022-05-03 has failed"):
        step.execute(context(logical_date=LOGICAL))


def waiting(program, other, **kwargs):
    until = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    command = [sys.executable, "-c", program]
    return StepTrigger(command, {}, until, [other.of("2022-05-04")], look_s=0.1, **kwargs)


def test_the_triggerer_lets_another_run_end_first(stands):
    stands += ["stuck", "queued", "running", "running", "done"]
    assert look(waiting("print('there')", DAY_BEFORE))["result"] == "there"
    assert stands == ["done"]


def published(day):
    """Return a program that waits for a file, as `onetrans published` does for a day."""
    return (
        "import pathlib, sys, time; until = time.monotonic() + float(sys.argv[-1])\n"
        f"while not (there := pathlib.Path({str(day)!r}).exists()) and time.monotonic() < until: time.sleep(0.05)\n"
        "print('there'); sys.exit(0 if there else 75)"
    )


def test_a_failure_elsewhere_ends_a_wait_that_is_under_way(stands, tmp_path):
    stands += ["none", "none", "running", "running", "none", "failed"]
    begun = time.monotonic()
    payload = look(waiting(published(tmp_path / "day"), TABLES_FAIL))
    assert time.monotonic() - begun < 20
    assert "publish of 2022-05-04 has failed" in payload["stop"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("run_type", ["scheduled", "backfill"])
def test_a_day_before_that_a_person_marked_as_success_is_asked_for_its_tables(script, stands, there, run_type):
    """Without them this day would be published by half: what counts over earlier days would not be built."""
    stands.append("done")
    program = (
        "import sys\n"
        "print('NotReadyError: behaviors 2022-05-03 is not published; published are none', file=sys.stderr)\n"
        f"sys.exit(0 if sys.argv[1:] == ['--or-first'] and {there} else 75)"
    )
    rules = {"others": [TONIGHT], "if_nothing_before": ["--or-first"]}
    step = script(program, cls=WaitStep, at_most=timedelta(hours=2), **rules)
    given = context(logical_date=LOGICAL, dag_run=dag_run(run_type))
    if there:
        step.execute(given)
        return
    with pytest.raises(NotStartedError) as raised:
        step.execute(given)
    text = str(raised.value)
    assert (
        "NOT STARTED. feature_tables of 2022-05-03 has ended, and what it makes is not published: was it mark" in text
    )
    assert "What is missing: behaviors 2022-05-03 is not published; published are none. Published data is" in text
    assert "If the log lost that day, name it in source.absent_days first." in text
    assert "mark this task" not in text, "that would publish this day by half"
    assert not raised.value.behind_failure


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (0, ""),
        (75, "NOT STARTED. feature_tables of 2022-05-03 has no run by the clock or of a backfill. Tails are built"),
        (1, "FAILED with exit code 1. CatalogAwayError: the catalog is away."),
        (78, "BAD CONFIGURATION. CatalogAwayError: the catalog is away."),
    ],
)
def test_a_day_before_that_was_never_run_is_asked_for_its_tables(script, stands, code, outcome):
    """Airflow makes no run of a day that went by while it stood still: this day would be half published."""
    stands.append("none")
    step = script(
        f"""
        import sys
        print("CatalogAwayError: the catalog is away", file=sys.stderr)
        sys.exit({code} if sys.argv[1:] == ["--or-first"] else 99)
        """,
        cls=WaitStep,
        at_most=timedelta(hours=2),
        others=[replace(TONIGHT, if_none="stop unless ready")],
        if_nothing_before=["--or-first"],
    )
    if not outcome:
        step.execute(context(logical_date=LOGICAL))
        return
    with pytest.raises(AirflowException) as raised:
        step.execute(context(logical_date=LOGICAL))
    assert outcome in str(raised.value)
    assert isinstance(raised.value, AirflowFailException) is (code in (75, 78))


@pytest.mark.parametrize("state", ["queued", "stuck", "failed"])
def test_a_backfill_waits_for_the_day_before_where_tonights_run_takes_what_is_published(script, stands, state):
    """Its days are to be built anew, each on the one before; a backfill beside it must not hold tonight's run."""
    from airflow.sdk.exceptions import TaskDeferred

    stands.append(state)
    rules = {"others": [TONIGHT], "others_of_a_backfill": [DAY_BEFORE]}
    step = script("raise SystemExit(0)", cls=WaitStep, at_most=timedelta(hours=2), **rules)
    step.execute(context(logical_date=LOGICAL, dag_run=dag_run("scheduled")))
    with pytest.raises(AirflowFailException if state == "failed" else TaskDeferred):
        step.execute(context(logical_date=LOGICAL, dag_run=dag_run("backfill")))


def test_the_real_dags_wait_that_way():
    before = by_id(feature_tables)["wait_for_day_before"]
    assert before.arguments == ["published", *NEEDS, "--ds", "{{ previous_day }}", "--or-absent"]
    assert before.if_nothing_before == ["--or-first"]
    for other in (*before.others, *before.others_of_a_backfill):
        assert (other.if_none, other.if_done) == ("stop unless ready", "stop unless ready")
    ((tonight,), (made_up,)) = before.others, before.others_of_a_backfill
    assert (tonight.if_failed, tonight.if_queued) == ("stop unless ready", "wait unless ready")
    assert "queued" not in tonight.patience_s, "a backfill that ends yesterday may take the whole night"
    assert (made_up.if_failed, made_up.if_queued) == ("stop", "wait")
    model = by_id(ranking_model)["wait_for_day"]
    for wait in (before, model):  # of the day before's run: its own wait, by a name that is one
        assert wait.others[0].begins_with == wait.task_id
        assert [other.begins_with for other in wait.others_of_a_backfill] == [""] * len(wait.others_of_a_backfill)
    assert model.others[1].if_done == "stop unless ready"
    assert model.others[0].patience_s == {"stuck": 0, "queued": 0}
    assert model.others_of_a_backfill[0].patience_s["queued"] > 3600
    ready = before.prepare_for_execution()
    ready.render_template_fields(context(logical_date=datetime(2022, 3, 1, tzinfo=UTC)))
    assert ready.command[-3:] == ["--ds", "2022-02-28", "--or-absent"]


def test_a_day_that_is_published_ends_the_wait_for_a_queued_run(stands, tmp_path):
    there = tmp_path / "day"
    stands += ["queued", "running", "queued"]
    trigger = waiting(published(there), TONIGHT)
    timer = threading.Timer(2.0, there.touch)
    timer.start()
    assert look(trigger)["result"] == "there"
    timer.join()


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_while_it_is_waited_for_stops_only_what_has_no_tables(stands, tmp_path, there):
    stands += ["running", "running", "failed"]
    day = tmp_path / "day"
    if there:
        day.touch()
    payload = look(waiting(published(day), TONIGHT))
    assert bool(payload["stop"]) is not there
    assert payload["code"] == (0 if there else 75)


def test_a_catalog_that_is_away_is_asked_again_and_does_not_end_the_wait(stands, tmp_path):
    stands.append("failed")
    program = (
        f"import pathlib, sys; seen = pathlib.Path({str(tmp_path / 'seen')!r}); there = seen.exists(); seen.touch()\n"
        "print('there'); sys.exit(0 if there else 1)"
    )
    payload = look(waiting(program, TONIGHT, pause_s=0.1))
    assert (payload["code"], payload["result"], payload["stop"]) == (0, "there", "")


def test_a_queued_run_that_a_person_marked_as_success_is_not_waited_for(stands, tmp_path):
    stands += ["queued", "queued", "done"]
    payload = look(waiting(published(tmp_path / "day"), TONIGHT))
    assert payload["stop"].startswith("feature_tables of 2022-05-03 has ended, and what it makes is not published")
    assert not payload["behind_failure"]


def test_a_wait_that_goes_well_between_two_breaks_is_not_broken(stands, tmp_path, monkeypatch):
    """A catalog that blips, another run that takes hours, one more blip: only what does nothing but break is broken."""
    from dags import triggers

    tries = tmp_path / "tries"
    program = (
        "import pathlib, sys, time\n"
        f"tries = pathlib.Path({str(tries)!r}); n = len(tries.read_text()) if tries.exists() else 0\n"
        "tries.write_text('x' * (n + 1)); time.sleep(1.5 if n == 1 else 0); sys.exit(1 if n < 3 else 0)"
    )
    until = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    monkeypatch.setattr(triggers, "_GOES_WELL_S", 1.2)
    payload = look(StepTrigger([sys.executable, "-c", program], {}, until, pause_s=0.1, broken_s=1.4))
    assert (payload["code"], payload["late"]) == (0, False), "the second look broke after a while, and counted on"

    tries.unlink()
    stands += ["none", *["running"] * 20, "none"]
    trigger = waiting(program.replace("n < 3", "n < 1").replace("1.5", "0"), DAY_BEFORE, pause_s=0.1, broken_s=1.5)
    payload = look(trigger)
    assert (payload["code"], payload["stop"]) == (0, ""), "what another run took counted as broken"


@pytest.mark.parametrize("breaks", ["always", "once"])
def test_a_look_that_is_broken_for_good_does_not_wait_in_silence(script, capsys, tmp_path, breaks):
    """An import that fails in the triggerer, a password that is wrong: nobody would hear of it for two days."""
    there = tmp_path / "there"
    program = "import sys; print('ImportError: no module', file=sys.stderr); sys.exit(1)"
    if breaks == "once":
        program = (
            f"import pathlib, sys; seen = pathlib.Path({str(there)!r}); there = seen.exists(); seen.touch()\n"
            "print('ImportError: no module', file=sys.stderr); sys.exit(0 if there else 1)"
        )
    until = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    trigger = StepTrigger([sys.executable, "-c", program], {}, until, pause_s=0.3, broken_s=0.2)
    again = StepTrigger(**trigger.serialize()[1])
    payload = look(again)
    assert capsys.readouterr().out.count("[warning  ] not yet: ImportError") == 1
    step = script("", cls=WaitStep, at_most=timedelta(hours=2))
    if breaks == "once":
        step.resume(context(logical_date=LOGICAL), payload)
        return
    with pytest.raises(AirflowException, match=r"FAILED with exit code 1\. ImportError: no module\.") as raised:
        step.resume(context(logical_date=LOGICAL), payload)
    assert not isinstance(raised.value, AirflowFailException), "it is tried again, and then people are told"


def test_what_may_be_the_first_day_is_asked_for_as_one_whenever_that_is_known(stands):
    """A run that is under way at the first look, and has ended well at a later one."""
    stands += ["running", "done"]
    program = "import sys; print('first'); sys.exit(0 if '--or-first' in sys.argv else 75)"
    assert look(waiting(program, TONIGHT, if_nothing_before=["--or-first"]))["result"] == "first"


def test_a_run_that_is_left_aside_while_it_is_queued_is_waited_for_when_it_begins(stands, tmp_path):
    """Yesterday's model in a backfill, whose tables come first; then it trains, and tonight's goes on from it."""
    there = tmp_path / "there"
    stands += ["queued", "queued", "running", "running", "running", "running", "done"]
    before = replace(DAY_BEFORE, if_failed="go on", patience_s={"queued": 0, "stuck": 0})
    program = (
        f"import pathlib, time; there = pathlib.Path({str(there)!r})\n"
        "while not there.exists():\n    time.sleep(0.1)\nprint('there')"
    )
    timer = threading.Timer(2.0, there.touch)
    timer.start()
    payload = look(waiting(program, before))
    timer.join()
    assert (payload["code"], payload["result"], payload["stop"]) == (0, "there", "")
    assert stands == ["done"], "it did not wait for the end of a run that had begun"


def test_a_run_that_cannot_begin_is_not_waited_for_without_end(stands):
    stands.append("stuck")
    payload = look(waiting("print('there')", DAY_BEFORE))
    assert "feature_tables of 2022-05-03 has been queued for" in payload["stop"]
    assert payload["stop"].endswith(
        "It begins by itself now that this run has ended; wait for its end, then clear this task."
    )
    payload = look(waiting("print('there')", replace(DAY_BEFORE, if_failed="go on")))
    assert (payload["stop"], payload["result"]) == ("", "there")
