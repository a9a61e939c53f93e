"""
# Retention

Once a week removes what nobody can need any more: replaced versions of tables, files of attempts that were never
published, checkpoints of days long past.

What is published stays, and so does what the champion, the one before it and the challenger were trained on, and what
a run is reading. It may run beside the other DAGs at any time, and be interrupted: the next run goes on where it
stopped.

Section `[retention]` of the settings says how old things get. `onetrans retain --dry-run` lists what would be removed;
*Trigger* with *Dry run* does the same in the task's log.

**When it fails** as `BAD CONFIGURATION`, it could not tell what the champion was trained on, and has removed nothing.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, CronTriggerTimetable, Param

from dags.days import START
from dags.notify import run_failed
from dags.steps import DEFAULTS, Step

with DAG(
    dag_id="retention",
    description="Weekly: expired snapshots, orphaned files, old checkpoints",
    schedule=CronTriggerTimetable("0 3 * * 0", timezone="UTC"),
    start_date=START,
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=12),
    default_args=DEFAULTS,
    params={
        "dry_run": Param(False, type="boolean", title="Dry run", description="Remove nothing, only list it."),
    },
    tags=["ranking", "maintenance"],
    on_failure_callback=run_failed,
    doc_md=__doc__,
) as dag:
    Step(
        task_id="retain",
        module="onetrans.cli",
        arguments=["retain", "{{ '--dry-run' if params.dry_run else '' }}"],
        dated=False,
        execution_timeout=timedelta(hours=6),
        unharmed="What is published is as it was, and so is what models were trained on.",
        doc_md="Removes what is old and held by nobody. By hand: `onetrans retain --dry-run`, then `onetrans retain`",
    )
