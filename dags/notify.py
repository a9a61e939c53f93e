"""Tells people that something failed: always in the log, and over every connection that ``airflow.notify`` names.

The connection's type says how:

* ``smtp``: an e-mail, by Airflow's own notifier; ``to`` stands in the connection's extra fields;
* ``slackwebhook``: Slack's ``{"text": ...}``;
* any other: an HTTP POST with the fields of :class:`Message` as JSON.

The address of a webhook is the connection's password, because whoever has it can
write there: Airflow keeps it encrypted and masks it in logs.  Nothing here logs
an address, a header or an answer's body.

A receiver that is slow or down costs a failed task some seconds and a line in its
log, never its outcome: the outcome is reported before anyone is told.
"""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from time import sleep
from typing import Any

from airflow.sdk.exceptions import AirflowRuntimeError

from dags import others
from dags.configured import configured
from dags.days import is_backfill, run_day

logger = logging.getLogger(__name__)

TRIES = 3
TIMEOUT_S = 5.0
"""Seconds a receiver has to answer one try; between tries there are 1 and 2 more."""


@dataclass(frozen=True)
class Message:
    """What people are told."""

    title: str
    """A line: what failed, of which day."""
    text: str
    """One paragraph: what is wrong, what is unharmed, what to do."""
    dag_id: str
    run_id: str
    task_id: str
    """Empty where it is about a whole run."""
    day: str
    """Empty where the run says none."""
    link: str
    """Where to look: the log of the task, or the run, in Airflow's pages."""


def task_failed(context: Mapping[str, Any]) -> None:
    """Tell that a task has failed for good; Airflow calls this in the task's process, or where that was killed."""
    ti = context["ti"]
    error = context.get("exception")
    day = _day(context)
    text = str(error).strip() if isinstance(error, BaseException | str) else ""
    if not text:
        unharmed = getattr(context.get("task"), "unharmed", "")
        text = (
            f"{ti.task_id} of {day}: ENDED WITHOUT A WORD. Its worker was killed or lost its machine, most likely for "
            f"want of memory. {unharmed} Airflow has no try left: clear this task once the cause is gone."
        )
    send(
        Message(
            title=f"{' '.join(filter(None, (ti.dag_id, day)))}: {ti.task_id} failed",
            text=text,
            dag_id=ti.dag_id,
            run_id=str(ti.run_id),
            task_id=ti.task_id,
            day=day,
            link=str(getattr(ti, "log_url", "") or ""),
        ),
        # Behind one day of a backfill that fails, every later one is not started: that its run failed is told as well.
        people=not (is_backfill(context) and getattr(error, "behind_failure", False)),
    )


def run_failed(context: Mapping[str, Any]) -> None:
    """Tell that a run has failed; Airflow calls this in the DAG processor, once nothing of the run is left to do."""
    dag_id, run_id, day = context["dag"].dag_id, str(context["run_id"]), _day(context)
    reasons = {
        "task_failure": "a task has failed; its log says why",
        "timed_out": "it took longer than dagrun_timeout allows, and what was not done was skipped",
        "all_tasks_deadlocked": "its tasks wait for each other",
    }
    reason = reasons.get(str(context.get("reason")), str(context.get("reason")))
    send(
        Message(
            title=f"{' '.join(filter(None, (dag_id, day)))}: the run failed",
            text=f"The run of {day or 'no day'} is over: {reason}. Clear what failed or was skipped once its cause is "
            "gone; what follows it runs too.",
            dag_id=dag_id,
            run_id=run_id,
            task_id="",
            day=day,
            link=_run_link(dag_id, run_id),
        )
    )


async def day_undecided(context: Mapping[str, Any], decided_by: str) -> None:
    """Tell that a day has no verdict at its deadline; Airflow calls this in the triggerer.

    Airflow's deadline is about the run, which goes on after the verdict.  A run by hand that was asked for when the
    deadline had passed makes up for a day: nobody waits for it at a set hour.  One by the clock that is made so late is
    told of, with what may have kept it: a slot that another run held, a paused DAG, an Airflow that stood still.

    Args:
        context: what Airflow says of the run and of the deadline.
        decided_by: task whose success is the verdict.
    """
    from asgiref.sync import sync_to_async

    run, deadline = context["dag_run"], context["deadline"]["deadline_time"]
    due = deadline if isinstance(deadline, datetime) else datetime.fromisoformat(str(deadline))
    asked_for = datetime.fromisoformat(str(run["queued_at"] or run["run_after"]).replace("Z", "+00:00"))
    if run["run_type"] == "backfill" or (run["run_type"] == "manual" and asked_for > due):
        logger.info("%s %s was started after its deadline, %s; nobody is told", run["dag_id"], run["dag_run_id"], due)
        return
    try:
        decided = await sync_to_async(others.succeeded)(run["dag_id"], run["dag_run_id"], decided_by)
        known = "is neither promoted nor declined"
    except AirflowRuntimeError as error:
        logger.warning("Airflow does not say whether %s has succeeded: %s", decided_by, error)
        decided, known = False, "may be neither promoted nor declined: Airflow did not answer"
    if decided:
        logger.info("%s of %s %s has succeeded; nobody is told", decided_by, run["dag_id"], run["dag_run_id"])
        return
    day = str((run.get("conf") or {}).get("ds") or run["logical_date"])[:10]
    late = (
        f" It was made at {asked_for.astimezone(UTC):%Y-%m-%d %H:%M} UTC only: another run held its slot, the DAG was "
        "paused, or Airflow stood still."
        if asked_for > due
        else ""
    )
    await sync_to_async(send)(
        Message(
            title=f"{run['dag_id']} {day}: no verdict by {due:%Y-%m-%d %H:%M} UTC",
            text=f"The model of {day} {known}, and the run is {run['state']}.{late} The champion "
            "serves as before. The grid shows the task it is at: if that waits for tables or for the log, look there "
            "first.",
            dag_id=run["dag_id"],
            run_id=run["dag_run_id"],
            task_id="",
            day=day,
            link=_run_link(run["dag_id"], run["dag_run_id"]),
        )
    )


def send(message: Message, *, people: bool = True) -> None:
    """Log a message and, if ``people`` are to be told, deliver it; what goes wrong is logged, and nothing is raised."""
    logger.error("%s. %s %s", message.title, message.text, message.link)
    if not people:
        return
    try:
        names = [name.strip() for name in configured("airflow", "notify", "").split(",") if name.strip()]
    except (OSError, ValueError) as error:
        logger.error("nobody else is told: the configuration file cannot be read: %s", error)
        return
    for name in names:
        try:
            _deliver(message, name)
            logger.info("told over connection %s", name)
        except Exception as error:  # no fault of a receiver, or of its description, may reach the task
            logger.error("connection %s did not take the message: %s", name, _harmless(error))


def _deliver(message: Message, name: str) -> None:
    from airflow.sdk import Connection

    connection = Connection.get(name)
    if connection.conn_type in ("smtp", "email"):
        _mail(message, name, connection.extra_dejson)
    else:
        slack = connection.conn_type == "slackwebhook"
        text = "\n".join(filter(None, (message.title, message.text, message.link)))
        _post(_address(connection), {"text": text} if slack else {**asdict(message), "text": text})


def _address(connection: Any) -> str:
    """Return the whole address of a webhook; Slack's connections keep its first half as the host."""
    password, host = connection.password or "", connection.host or ""
    address = password if password.startswith(("http://", "https://")) else f"{host.rstrip('/')}/{password}"
    if not address.startswith(("http://", "https://")):
        raise ValueError("its password is not the address of a webhook, http://... or https://...")
    return address


def _post(address: str, fields: Mapping[str, str]) -> None:
    """Send JSON; a receiver that does not answer, is busy or fails is tried again."""
    request = urllib.request.Request(address, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    for number in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return
        except (urllib.error.URLError, OSError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
            if refused or number == TRIES:
                raise
            sleep(number)


def _mail(message: Message, name: str, extra: Mapping[str, Any]) -> None:
    from airflow.providers.smtp.notifications.smtp import SmtpNotifier

    if not extra.get("to"):
        raise ValueError('its extra fields do not say to whom: {"to": "oncall@example.com"}')
    link = f'<p><a href="{escape(message.link)}">{escape(message.link)}</a></p>' if message.link else ""
    SmtpNotifier(
        smtp_conn_id=name,
        from_email=extra.get("from_email"),
        to=extra["to"],
        subject=message.title,
        html_content=f"<p>{escape(message.text)}</p>{link}",
    ).notify({})


def _harmless(error: Exception) -> str:
    """Return an error's text without what may hold an address: that of a webhook is a secret."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    if isinstance(error, urllib.error.URLError):
        return f"no answer: {error.reason}"
    return f"{type(error).__name__}: {error}" if isinstance(error, ValueError | OSError) else type(error).__name__


def _day(context: Mapping[str, Any]) -> str:
    from airflow.sdk.exceptions import AirflowException

    try:
        return run_day(context)
    except AirflowException:
        return ""  # A weekly run has no day, and one that names none may have failed for just that.


def _run_link(dag_id: str, run_id: str) -> str:
    from urllib.parse import quote

    from airflow.sdk.configuration import conf

    base = conf.get("api", "base_url", fallback="")
    return f"{base.rstrip('/')}/dags/{dag_id}/runs/{quote(run_id)}" if base else ""
