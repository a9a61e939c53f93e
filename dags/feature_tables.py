"""
# Feature tables

Builds, audits and publishes the six tables of one day.

| step | what it does | when it fails |
|---|---|---|
| `wait_for_log` | waits, without a worker, for the day's files | nothing began |
| `wait_for_day_before` | waits, without a worker, for the day before while it runs | nothing is published |
| `build` | a Spark job writes the day's rows to files of their own | nothing is published |
| `audit` | Great Expectations judges exactly those files; pages in Data Docs | the day stops, published data stays |
| `publish` | one Iceberg commit replaces the day | readers see the old day or the new one, never a part |

**Order.** Features of users and items are counted over the days *before* this one, so they wait for no other table.
`behaviors` waits for `impressions`, as a log without behaviours of its own has them made from these.
`behavior_sequences` adds today's events to yesterday's tail. `training_requests` joins them all, with yesterday's tail
for what was known before each request, and every audit compares with the days before. So days are published one after
another. What reads the day's log alone, `impressions.build`, goes ahead: days that are backfilled side by side do it
beside the day that is being published.

**The log may be late:** a day is due when it has ended in the log's time zone and its files are there. They may come
`source.wait_hours` after that; then the day fails as `BAD DATA`.

**Run one day by hand:** *Trigger*, fill in *Day*. **Run a range:** *Trigger* -> *Backfill*, with a range of days D.
Choose under *Reprocess Behavior* what happens to days that were run before: *Missing Runs*, where the form begins,
runs none of them again; *Missing and Errored Runs* runs the failed ones, *All Runs* every day. A day that is run
again replaces its rows and gives the same ones. Days of a backfill run in order, whatever *Max Active Runs* says: each
waits for the day before, and if that fails, those after it do not start. *Run Backwards* cannot work: a day does not
start while the one before is queued. Only the reading of logs goes on side by side. **Tonight's run** and one by hand
wait for the day before while it is at work; where a backfill has it queued or waiting for its turn, or it failed, they
go on if its six tables are published, and else say so.

**Tables and model of a day again, by hand:** *Trigger* `feature_tables` with that *Day*, and when it runs,
`ranking_model` with the same *Day*: it waits for the tables. If they fail it takes those that are published before; to
train on nothing but the new ones, start it once they are there.

**Which run is which day:** a run is named after the moment it can start. That of 4 May is called `...__2022-05-05` and
stands at 5 May in the grid; one triggered by hand is named after the moment of the click. The log of its first task
says the day.

**When a step fails:** its log ends with one paragraph: table, day, what is wrong with an example, whether published
data is affected, what to do. `BAD DATA` and `BAD CONFIGURATION` are not retried, anything else is. Correct the cause,
then *Clear* the task that it names: what follows it runs too; then clear the days after it that waited for it. Single
bad rows do not fail a step: they go to the table `quarantine`, with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from airflow.sdk import DAG, Asset, TaskGroup

from dags.days import DAILY, START, day_param
from dags.notify import run_failed
from dags.others import Other
from dags.steps import DAY, DEFAULTS, NOTHING_TO_DO, PREVIOUS_DAY, SPARK_POOL, Step, WaitStep

NEEDS: dict[str, tuple[str, ...]] = {
    "impressions": (),
    "behaviors": ("impressions",),  # Where the log has no behaviours of its own, they are made from impressions.
    "user_features": (),
    "item_features": (),
    "behavior_sequences": ("behaviors",),
    "training_requests": ("impressions", "behaviors", "user_features", "item_features"),
}
"""Table -> tables whose same day it reads."""

FROM_THE_LOG_ALONE = ("impressions",)
"""Tables that are built of the day's log and nothing published; audited they are by what the days before are like."""

ABOUT: dict[str, str] = {
    "impressions": "What was shown, with clicks and conversions: cleaned, deduplicated, bad rows in quarantine.",
    "behaviors": "What users did, with the time at which each event became known.",
    "user_features": "Users, with their counts and rates over the days before.",
    "item_features": "Items, with their counts and rates over the days before.",
    "behavior_sequences": "Per user the latest events at the end of the day: yesterday's tail plus today.",
    "training_requests": "One row per request: user, context, sequences strictly before it, candidates with labels.",
}
"""Table -> what it holds, shown beside its steps."""


def table_asset(table: str) -> Asset:
    """Return the asset that stands for a published table; its events carry the day as ``ds``."""
    return Asset(name=f"ranking.{table}", uri=f"iceberg://ranking/{table}", group="feature_tables")


BEFORE_IN_A_BACKFILL = Other(
    "feature_tables",
    days_back=1,
    if_none="stop unless ready",
    if_done="stop unless ready",
    why="The tables of a day are built on those of the day before: tails of sequences, counts and rates.",
    # Where runs are made one at a time, a run that was cleared cannot begin before this one ends; a queued one that
    # is part of a long backfill can.
    patience_s={"stuck": 15 * 60, "queued": 6 * 3600},
)
"""The run of the day before has to end first; if it failed, this one would be built on what it was to replace.

Where it has none (built by ``jobs.backfill``, or the log begins today, or Airflow stood still), its tables decide.
"""

DAY_BEFORE = replace(
    BEFORE_IN_A_BACKFILL,
    if_failed="stop unless ready",
    if_queued="wait unless ready",
    # A backfill may have let all its days in, each to wait for the one before.
    begins_with="wait_for_day_before",
    patience_s={"stuck": 15 * 60},
)
"""The same by the clock or by hand, but tables that are published are enough.

A month's backfill that ends yesterday has yesterday's run queued, or waiting for its turn, for as long as it takes, and
failed if one of its days fails.
"""

WAIT_AT_MOST = timedelta(hours=50)
"""``source.wait_hours`` is at most 36 and begins when the day ends in the log's time zone, up to 12 h after UTC's."""

with DAG(
    dag_id="feature_tables",
    description="One day's tables: built by Spark, audited, published as Iceberg commits",
    schedule=DAILY,
    start_date=START,
    catchup=False,
    max_active_runs=1,  # The limit of scheduled runs; in a backfill, which has its own, a step keeps the order.
    dagrun_timeout=WAIT_AT_MOST + timedelta(hours=12),
    default_args=DEFAULTS,
    params={"ds": day_param()},
    tags=["ranking", "data"],
    on_failure_callback=run_failed,
    doc_md=__doc__,
) as dag:
    wait_for_log = WaitStep(
        task_id="wait_for_log",
        module="jobs.raw",
        arguments=["--ds", DAY, "--unless-absent"],
        nothing_done=NOTHING_TO_DO,
        at_most=WAIT_AT_MOST,
        execution_timeout=timedelta(minutes=10),
        doc_md="Looks at once, then from the triggerer. By hand: `python -m jobs.raw --ds DAY`",
    )
    wait_for_day_before = WaitStep(
        task_id="wait_for_day_before",
        at_most=WAIT_AT_MOST,
        module="onetrans.cli",
        arguments=["published", *NEEDS, "--ds", PREVIOUS_DAY, "--or-absent"],
        if_nothing_before=["--or-first"],
        # A day that the log lost is skipped, but ends after the day before it, as the one after it waits for its end.
        trigger_rule="none_failed",
        others=[DAY_BEFORE],
        others_of_a_backfill=[BEFORE_IN_A_BACKFILL],
        execution_timeout=timedelta(minutes=10),
        doc_md="Asks Airflow at once, then from the triggerer. By hand: `onetrans lake` lists the published days",
    )
    wait_for_log >> wait_for_day_before
    groups: dict[str, TaskGroup] = {}
    for table, needed in NEEDS.items():
        with TaskGroup(group_id=table, tooltip=ABOUT[table]) as groups[table]:
            taken_in = f"clear {table}.build, and what follows it runs too"  # what was staged is read as it is
            build = Step(
                task_id="build",
                module=f"jobs.{table}",
                pool=SPARK_POOL,
                arguments=["--ds", DAY],
                execution_timeout=timedelta(hours=2),
                doc_md=f"{ABOUT[table]}\n\nBy hand: `python -m jobs.{table} --ds DAY`",
            )
            audit = Step(
                task_id="audit",
                module="expectations.audit",
                pool=SPARK_POOL,
                arguments=[table, "--ds", DAY],
                clear=taken_in,
                execution_timeout=timedelta(hours=1),
                doc_md=f"Judges the staged files of `{table}`.\n\n"
                f"By hand: `python -m expectations.audit {table} --ds DAY`",
            )
            publish = Step(
                task_id="publish",
                module="onetrans.cli",
                arguments=["publish", table, "--ds", DAY],
                clear=taken_in,
                execution_timeout=timedelta(minutes=30),
                outlets=[table_asset(table)],
                unharmed=f"Readers see the day as it was, or whole as it is now; `onetrans lake {table}` tells which.",
                doc_md=f"Makes the audited day of `{table}` what readers see.\n\n"
                f"By hand: `onetrans publish {table} --ds DAY`",
            )
            build >> audit >> publish
        for other in needed:
            groups[other] >> groups[table]
        if table in FROM_THE_LOG_ALONE:
            wait_for_log >> build
            wait_for_day_before >> audit
        elif not needed:
            [wait_for_log, wait_for_day_before] >> groups[table]
