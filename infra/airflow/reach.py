"""The Airflow of this deployment as its users reach it: where it is, how its servers are, what it runs now."""

from __future__ import annotations

import configparser
import os
import urllib.parse
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.airflow.api import AirflowApi, AirflowApiError
from infra.local.homes import airflow_home
from onetrans.settings import config_file

SERVERS = ("metadatabase", "scheduler", "dag_processor", "triggerer")
"""Parts of Airflow whose health it reports."""

TOKEN = "AIRFLOW_CLI_TOKEN"
"""Variable with the bearer token of a user who may read runs, where Airflow has real logins."""

OURS = ("feature_tables", "ranking_model", "retention")
"""The DAGs of this product; others may run beside them."""

MOST_TROUBLED = 10
"""Tasks that failed, or wait for their next try, that are told."""
_LOOKED_THROUGH = 100
_WAIT_FOR_OTHERS = ("wait_for_day", "wait_for_day_before")
"""Tasks that fail where another run has failed."""

_BUSY = "state=running&state=deferred"
"""Tasks that are under way: in a process, or watched by the triggerer."""
_ADDRESSES = (("core", "execution_api_server_url"), ("api", "base_url"))
"""Section and option of Airflow's addresses."""
_PATIENCE_S = 5.0


def address(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the address at which Airflow's API is asked from here; None where none was ever set up.

    That is where tasks reach the server (``[core] execution_api_server_url``, all that a deployment of several
    machines must set), else ``[api] base_url``, which a browser reaches and a container or a pod may not: by their
    variables (``AIRFLOW__CORE__EXECUTION_API_SERVER_URL``, ``AIRFLOW__API__BASE_URL``), else by the ``airflow.cfg`` in
    ``AIRFLOW_HOME``, else by that of the local Airflow (``make ui``) of this configuration: never that of the demo
    where its configuration is not in force.

    Raises:
        BadConfigError: if ``ONETRANS_CONFIG`` names no file.
    """
    for options in (_variables(environ), _file(environ)):
        found = options["execution_api_server_url"].removesuffix("/execution") or options["base_url"]
        if found:
            return found
    return None


def pages(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the address at which people open Airflow's pages: ``[api] base_url``, else :func:`address`.

    Raises:
        BadConfigError: if ``ONETRANS_CONFIG`` names no file.
    """
    return _variables(environ)["base_url"] or _file(environ)["base_url"] or address(environ)


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return Airflow's addresses as variables name them, without a slash at their end; empty where none does."""
    found = {option: f"AIRFLOW__{section.upper()}__{option.upper()}" for section, option in _ADDRESSES}
    return {option: environ.get(name, "").rstrip("/") for option, name in found.items()}


def _file(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the same of ``airflow.cfg``."""
    home = environ.get("AIRFLOW_HOME", "")
    own = config_file(environ)
    file = (Path(home) if home else airflow_home(own and own.resolve())) / "airflow.cfg"
    written = configparser.ConfigParser(interpolation=None, strict=False)
    written.read(file, encoding="utf-8")
    return {option: written.get(section, option, fallback="").rstrip("/") for section, option in _ADDRESSES}


def health(where: str) -> dict[str, str]:
    """Return the health of each of :data:`SERVERS`: ``healthy``, ``unhealthy`` or ``not there``.

    Raises:
        OSError: if the address does not answer.
        AirflowApiError: if it refuses.
    """
    found = AirflowApi(where, _PATIENCE_S).health()
    return {part: (found.get(part) or {}).get("status") or "not there" for part in SERVERS}


def running(where: str, environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return what runs now, as ``dag_id run_id: tasks``; None if Airflow shows that only to those who log in.

    A task that the triggerer watches, as a wait or a training in a pod, is told as ``deferred``; a run without any
    task that runs ``waits``: for a slot of a pool, or for the next try of a task.

    A login is the bearer token in :data:`TOKEN`; without one Airflow is asked for the token that it gives to all.

    Raises:
        OSError: if the address does not answer.
    """
    api = _api(where, environ)
    try:
        runs = api.call("GET", "/dags/~/dagRuns?state=running&limit=100")["dag_runs"]
        tasks = api.call("GET", f"/dags/~/dagRuns/~/taskInstances?{_BUSY}&limit=100")["task_instances"]
    except AirflowApiError:
        return None
    busy: dict[tuple[str, str], list[str]] = {(run["dag_id"], run["dag_run_id"]): [] for run in runs}
    for task in tasks:
        name = f"{task['task_id']} (deferred)" if task["state"] == "deferred" else task["task_id"]
        busy.setdefault((task["dag_id"], task["dag_run_id"]), []).append(name)
    return [f"{dag_id} {run_id}: {', '.join(ids) or 'waits'}" for (dag_id, run_id), ids in busy.items()]


def troubled(
    where: str, days: int, environ: Mapping[str, str] = os.environ, shown: str | None = None
) -> dict[str, Any] | None:
    """Return what of our DAGs has failed or waits for its next try; None if Airflow shows it only to who logs in.

    First what failed by itself, of the earliest day first, then what was not started for it; of a run that failed
    without a task that did, as one that took too long, the run.

    Args:
        where: Airflow's address.
        days: how far back what failed had begun.
        environ: where the token of :func:`running` is.
        shown: address of its pages, for links; None: the same.

    Raises:
        OSError: if the address does not answer.
        AirflowApiError: if Airflow fails to say.
    """
    since = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    recent = [("start_date_gte", since), ("order_by", "start_date"), ("limit", str(_LOOKED_THROUGH))]
    of_tasks = urllib.parse.urlencode([("state", "failed"), ("state", "up_for_retry"), *recent])
    of_runs = urllib.parse.urlencode([("state", "failed"), *recent])
    api, found, count = _api(where, environ), [], 0
    for dag_id in OURS:
        try:
            tasks = api.call("GET", f"/dags/{dag_id}/dagRuns/~/taskInstances?{of_tasks}")
            runs = api.call("GET", f"/dags/{dag_id}/dagRuns?{of_runs}")["dag_runs"]
        except AirflowApiError as error:
            if error.status == 404:
                continue  # not all of our DAGs need to be there
            if error.status in (401, 403):
                return None
            raise
        named = {task["dag_run_id"] for task in tasks["task_instances"]}
        without = [run | {"task_id": ""} for run in runs if run["dag_run_id"] not in named]
        found += [*tasks["task_instances"], *without]
        count += tasks["total_entries"] + len(without)
    found.sort(key=_weight)
    return {
        "tasks": [_entry(shown or where, entry) for entry in found[:MOST_TROUBLED]],
        "more": max(0, count - MOST_TROUBLED),
    }


def _weight(entry: Mapping[str, Any]) -> tuple[bool, str]:
    return entry["task_id"] in _WAIT_FOR_OTHERS, str(entry.get("logical_date") or entry.get("start_date"))


def _entry(shown: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    run = f"{shown}/dags/{entry['dag_id']}/runs/{urllib.parse.quote(entry['dag_run_id'], safe='')}"
    task = entry["task_id"]
    return {
        "dag_id": entry["dag_id"],
        "run_id": entry["dag_run_id"],
        "task_id": task or None,
        "state": entry["state"],
        "try": entry["try_number"] if task else None,
        "tries": entry["max_tries"] + 1 if task else None,
        "ended": entry["end_date"],
        "link": f"{run}/tasks/{urllib.parse.quote(task, safe='')}" if task else run,
    }


def _api(where: str, environ: Mapping[str, str]) -> AirflowApi:
    return AirflowApi(where, _PATIENCE_S, environ.get(TOKEN, ""))
