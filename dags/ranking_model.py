"""
# Ranking model

Trains OneTrans and the DCNv2+DIN baseline on the same rows of the days before this one, measures both on this day,
which neither has seen, and makes OneTrans the champion if it is better beyond noise.

| step | what it does |
|---|---|
| `wait_for_day` | waits, without a worker, until the day's `training_requests` is published, by whatever means |
| `plan` | pins data snapshot, training days and the checkpoint to go on from; opens the day's MLflow run |
| `train_*` | both models, side by side; a killed training goes on where it was |
| `evaluate` | scores the day's rows with both: AUC, per-user AUC, log loss, calibration |
| `gate` | compares them, paired, by a bootstrap over users, and with the champion; `gate.html` in MLflow says why |
| `promote` | registers the model and moves the alias `champion`, if the gate says so |
| `score_candidates` | the champion scores each user's candidates; skipped if `scoring.candidates` is not set |

**No tables, no wait:** if the day's `feature_tables` has failed and the rows are not published, `wait_for_day` fails at
once and says so.

**Not better is not a failure:** the run succeeds, and `gate` and `promote` say why the champion stayed.

**A winner the gate does not see:** *Trigger* with a *Reason for a forced promotion*. The day's model then becomes
champion whatever the gate says. The reason is kept in `gate.json`, in MLflow, and with the model; it holds for that
run alone, counts once, and a backfill refuses it.

**Run one day by hand:** *Trigger*, fill in *Day*. If its tables are to be made anew too, start those first: while a run
of `feature_tables` with that *Day* is under way, `wait_for_day` waits for it; if that run fails, the tables published
before are taken. **Train a range:** *Trigger* -> *Backfill*, with a range of days D.
Choose under *Reprocess Behavior* what happens to days that were run before: *Missing Runs*, where the form begins,
runs none of them again; *Missing and Errored Runs* runs the failed ones, *All Runs* every day. Where the tables are
run again too, start their backfill first: a day waits for its tables while they are under way. Each day's training
goes on from the one before, so days run in order, whatever *Max Active Runs* says; after a day that failed, training
goes on from an earlier one. Begin one day after the first day of the tables: a model needs a day before to train on.

**Which run is which day:** a run is named after the moment it can start. That of 4 May is called `...__2022-05-05` and
stands at 5 May in the grid; one triggered by hand is named after the moment of the click. The log of its first task
says the day.

**When a step fails:** its log ends with one paragraph that says what to do. `BAD DATA` and `BAD CONFIGURATION` are not
retried, anything else is. *Clear* the task that it names: a step that was finished finds its own work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from airflow.sdk import DAG, Asset, AsyncCallback, DeadlineAlert, DeadlineReference, Param  # type: ignore[attr-defined]

from dags.configured import configured, configured_number
from dags.days import DAILY, START, day_param, is_backfill
from dags.launch import LaunchStep
from dags.notify import day_undecided, run_failed
from dags.others import Other
from dags.steps import (
    CLEAR,
    DAY,
    DEFAULT_POOL,
    DEFAULTS,
    GPU_POOL,
    NOTHING_TO_DO,
    REGISTRY_POOL,
    SPARK_POOL,
    Step,
    WaitStep,
)

AS_CONFIGURED = "as configured"
"""Choice of the form that leaves a setting as the deployment has it."""

PLAN = "{{ ti.xcom_pull(task_ids='plan') }}"
"""Folder of the run's plan: the line `onetrans plan` printed last."""


def choice(field: str, setting: str, choices: list[str], description: str) -> tuple[Param, dict[str, str]]:
    """Return a form field, and the variable by which the steps learn what was chosen."""
    title = field.replace("_", " ").capitalize()
    param = Param(AS_CONFIGURED, type="string", title=title, enum=[AS_CONFIGURED, *choices], description=description)
    return param, {setting: f"{{{{ '' if params.{field} == '{AS_CONFIGURED}' else params.{field} }}}}"}


preset, preset_variable = choice(
    "preset",
    "ONETRANS_TRAINING_PRESET",
    ["tiny", "small", "base", "large"],
    "Size of both models. A size that differs from yesterday's starts from fresh weights.",
)
gate_mode, gate_variable = choice(
    "gate_mode",
    "ONETRANS_GATE_MODE",
    ["enabled", "dry_run", "off"],
    "enabled: promote a winner; dry_run: judge, but leave the alias; off: do not judge.",
)
PINNED = f"{CLEAR}; but what `plan` pins (tables, days, preset, recipe) is taken in by clearing `plan`"
"""What is to be done once data or settings of a step that reads the plan are corrected."""

VARIABLES = {**preset_variable, **gate_variable}

FORCE = "{{ '--force=' ~ params.force_reason if params.force_reason else '' }}"
"""Argument by which steps learn of a forced promotion; left out where nobody forces one."""


def refuse(context: Mapping[str, Any]) -> str:
    """Return why a run cannot be as the form asks; the fields by themselves were checked when it was sent."""
    asked = context["params"]
    if not asked.get("force_reason"):
        return ""
    if not asked["force_reason"].strip():
        return (
            "The reason for a forced promotion is blank; it is kept with the model, so that the next person knows why. "
            "Write it in words, or leave the field empty and the gate decides."
        )
    if is_backfill(context):
        return (
            "The backfill has a reason for a forced promotion, which would promote each of its days whatever the gate "
            "says. Leave the field empty in a backfill, or trigger the one day it is meant for."
        )
    chosen = asked["gate_mode"]
    mode, by = (configured("gate", "mode", "enabled"), ", as configured,") if chosen == AS_CONFIGURED else (chosen, "")
    if mode in ("dry_run", "off"):
        return (
            f"Gate mode {mode}{by} leaves the champion as it is, and the reason for a forced promotion asks for "
            "another one. Choose one of the two."
        )
    return ""


def undecided_at(hours: float) -> list[DeadlineAlert]:
    """Return the alert for a day that has no verdict so many hours after it began; none for 0.

    The callback runs in the triggerer, which every executor has beside it.  The reference is the logical date, so a
    run that nobody gave one has no deadline.
    """
    if hours == 0:
        return []
    when = DeadlineReference.DAGRUN_LOGICAL_DATE
    callback = AsyncCallback(day_undecided, kwargs={"decided_by": "promote"})
    return [DeadlineAlert(reference=when, interval=timedelta(hours=hours), callback=callback, name="verdict")]


TABLES_OF_THE_DAY = Other(
    "feature_tables",
    "training_requests.publish",
    if_failed="stop unless ready",
    if_done="stop unless ready",
    why="It makes the rows this run trains on and is measured by.",
    patience_s={"none": 12 * 3600},
)
"""While it is under way, what is published is about to be replaced; once it failed, nothing will be published."""

BEFORE_IN_A_BACKFILL = Other(
    "ranking_model",
    days_back=1,
    if_failed="go on",  # Then training goes on from an earlier day and reads the days since.
    why="Each day's training goes on from the one before.",
    # Where runs are made one at a time, a run that was cleared cannot begin before this one ends; a queued one that
    # is part of a long backfill can.
    patience_s={"stuck": 15 * 60, "queued": 6 * 3600},
)
"""The run of the day before has to end first, however it ends; if it does not even begin, this one goes on."""

DAY_BEFORE = replace(BEFORE_IN_A_BACKFILL, begins_with="wait_for_day", patience_s={"stuck": 0, "queued": 0})
"""The same by the clock or by hand: what is queued is made up for later, and tonight's model does not wait for it.

Nor for a run that a backfill has let in, to wait for its turn.
"""

WAIT_AT_MOST = timedelta(hours=62)
"""What feature_tables may take: its own wait for the log, and 12 hours."""

UNHARMED = "Published tables and the champion are as they were."

with DAG(
    dag_id="ranking_model",
    description="Trains OneTrans and its baseline, compares them on the day, promotes what is better",
    schedule=DAILY,
    start_date=START,
    catchup=False,
    max_active_runs=1,  # The limit of scheduled runs; in a backfill, which has its own, a step keeps the order.
    dagrun_timeout=WAIT_AT_MOST + timedelta(hours=24),
    # Where workers are few, the model of a day goes before the tables of the days after it.
    default_args={**DEFAULTS, "priority_weight": 10},
    params={
        "ds": day_param(),
        "preset": preset,
        "from_scratch": Param(
            False,
            type="boolean",
            title="Train from scratch",
            description="Leave yesterday's checkpoint aside: fresh weights and the whole look-back window.",
        ),
        "gate_mode": gate_mode,
        "force_reason": Param(
            None,
            type=["null", "string"],
            # No pattern: Airflow would answer with it. Longer blanks are refused by the first task.
            minLength=3,
            maxLength=500,
            hint="a reason in words, of 3 to 500 characters; or leave the field empty",
            title="Reason for a forced promotion",
            description="Why this day's model becomes champion whatever the gate says. Empty: the gate decides; leave "
            "it empty in a backfill.",
        ),
    },
    tags=["ranking", "model"],
    on_failure_callback=run_failed,
    deadline=undecided_at(configured_number("airflow", "deadline_hours", 36.0, most=720.0)),
    doc_md=__doc__,
) as dag:

    def command(
        task_id: str,
        *arguments: str,
        timeout: timedelta,
        doc: str,
        outlets: tuple[Asset, ...] = (),
        unharmed: str = UNHARMED,
        step: Callable[..., Step] = Step,
        pool: str = DEFAULT_POOL,
        clear: str = CLEAR,
    ) -> Step:
        """Return the step that runs one `onetrans` command with the choices of the form."""
        return step(
            task_id=task_id,
            module="onetrans.cli",
            arguments=arguments,
            environment=VARIABLES,
            execution_timeout=timeout,
            outlets=list(outlets),
            unharmed=unharmed,
            pool=pool,
            clear=clear,
            doc_md=doc,
        )

    wait_for_day = WaitStep(
        task_id="wait_for_day",
        module="onetrans.cli",
        arguments=["published", "training_requests", "--ds", DAY, "--unless-absent"],
        nothing_done=NOTHING_TO_DO,
        at_most=WAIT_AT_MOST,
        others=[DAY_BEFORE, TABLES_OF_THE_DAY],
        others_of_a_backfill=[BEFORE_IN_A_BACKFILL, TABLES_OF_THE_DAY],
        refuse=refuse,
        unharmed=UNHARMED,
        execution_timeout=timedelta(minutes=10),
        doc_md="Looks at once, then from the triggerer. By hand: `onetrans published training_requests --ds DAY`",
    )
    plan = command(
        "plan",
        *("plan", "--ds", DAY, "{{ '--from-scratch' if params.from_scratch else '' }}", FORCE),
        timeout=timedelta(minutes=30),
        doc="Decides once what this run reads and starts from; every later step reads the plan. "
        "By hand: `onetrans plan --ds DAY`",
    )
    trained = [
        command(
            f"train_{model}",
            *("train", "--plan", PLAN, "--model", model),
            timeout=timedelta(hours=12),
            step=partial(LaunchStep, parallel=True),
            pool=GPU_POOL,
            clear=PINNED,
            doc=f"Trains `{model}` on the plan's days. By hand: `onetrans train --plan PLAN --model {model}`",
        )
        for model in ("onetrans", "dcnv2_din")
    ]
    evaluate = command(
        "evaluate",
        *("evaluate", "--plan", PLAN),
        timeout=timedelta(hours=3),
        step=LaunchStep,
        pool=GPU_POOL,
        clear=PINNED,
        doc="Both models and the champion score the same rows of the day. By hand: `onetrans evaluate --plan PLAN`",
    )
    gate = command(
        "gate",
        *("gate", "--plan", PLAN, FORCE),
        timeout=timedelta(hours=1),
        doc="Writes `gate.json`, every figure and the verdict, and `gate.html`. By hand: `onetrans gate --plan PLAN`",
    )
    promote = command(
        "promote",
        *("promote", "--plan", PLAN, FORCE),
        timeout=timedelta(minutes=30),
        pool=REGISTRY_POOL,
        unharmed="Published tables are as they were; `onetrans registry list` tells which version is the champion.",
        outlets=(Asset(name="ranking.model", uri="mlflow://onetrans-ranker", group="ranking_model"),),
        doc="Registers the model and moves the aliases the gate allows. By hand: `onetrans promote --plan PLAN`",
    )
    score_candidates = Step(
        task_id="score_candidates",
        module="jobs.score_candidates",
        arguments=["--ds", DAY, "--publish"],
        pool=SPARK_POOL,
        nothing_done="nothing is scored",
        execution_timeout=timedelta(hours=6),
        outlets=[
            Asset(name="ranking.candidate_scores", uri="iceberg://ranking/candidate_scores", group="ranking_model")
        ],
        unharmed="Models and aliases are as `promote` left them, and scores published before stay as they are.",
        doc_md="The champion scores each user's candidates; skipped if `scoring.candidates` is not set. "
        "By hand: `python -m jobs.score_candidates --ds DAY --publish`",
    )
    wait_for_day >> plan >> trained >> evaluate >> gate >> promote >> score_candidates
