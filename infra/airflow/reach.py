"""The Airflow of this deployment as its users reach it: where it is, how its servers are, what it runs now."""

from __future__ import annotations

import configparser
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.local.airflow_api import AirflowApi, AirflowApiError
from infra.local.homes import airflow_home
from onetrans.settings import config_file

SERVERS = ("metadatabase", "scheduler", "dag_processor", "triggerer")
"""Parts of Airflow whose health it reports."""

TOKEN = "AIRFLOW_CLI_TOKEN"
"""Variable with the bearer token of a user who may read runs, where Airflow has real logins."""

MOST_TROUBLED = 10
"""Tasks that failed, or wait for their next try, that are told."""

_PATIENCE_S = 5.0


def address(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the address of Airflow's API; None where none was ever set up.

    That is ``[api] base_url``, else where tasks reach the server (``[core] execution_api_server_url``, all that a
    deployment of several machines must set): each by its variable (``AIRFLOW__API__BASE_URL``,
    ``AIRFLOW__CORE__EXECUTION_API_SERVER_URL``), else by the ``airflow.cfg`` in ``AIRFLOW_HOME``, else by that of the
    local Airflow (``make ui``) of this configuration: never that of the demo where its configuration is not in force.

    Raises:
        BadConfigError: if ``ONETRANS_CONFIG`` names no file.
    """
    home = environ.get("AIRFLOW_HOME", "")
    own = config_file(environ)
    file = (Path(home) if home else airflow_home(own and own.resolve())) / "airflow.cfg"
    written = configparser.ConfigParser(interpolation=None, strict=False)
    written.read(file, encoding="utf-8")
    for section, option in (("api", "base_url"), ("core", "execution_api_server_url")):
        variable = environ.get(f"AIRFLOW__{section.upper()}__{option.upper()}", "")
        found = (variable or written.get(section, option, fallback="")).rstrip("/")
        if found:
            return found if section == "api" else found.removesuffix("/execution")
    return None


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

    A login is the bearer token in :data:`TOKEN`; without one Airflow is asked for the token that it gives to all.

    Raises:
        OSError: if the address does not answer.
    """
    api = _api(where, environ)
    try:
        runs = api.call("GET", "/dags/~/dagRuns?state=running&limit=100")["dag_runs"]
        tasks = api.call("GET", "/dags/~/dagRuns/~/taskInstances?state=running&limit=100")["task_instances"]
    except AirflowApiError:
        return None
    busy: dict[tuple[str, str], list[str]] = {(run["dag_id"], run["dag_run_id"]): [] for run in runs}
    for task in tasks:
        busy.setdefault((task["dag_id"], task["dag_run_id"]), []).append(task["task_id"])
    return [f"{dag_id} {run_id}: {', '.join(ids) or 'waits'}" for (dag_id, run_id), ids in busy.items()]


def troubled(where: str, since: str, environ: Mapping[str, str] = os.environ) -> list[dict[str, Any]] | None:
    """Return the tasks that have failed or wait for their next try, newest first; None if only logins see them.

    Args:
        where: Airflow's address.
        since: earliest day of the runs that are looked at; empty: any.
        environ: where the token of :func:`running` is.

    Raises:
        OSError: if the address does not answer.
    """
    asked = [("state", "failed"), ("state", "up_for_retry"), ("order_by", "-start_date"), ("limit", str(MOST_TROUBLED))]
    asked += [("logical_date_gte", f"{since}T00:00:00Z")] if since else []
    api = _api(where, environ)
    try:
        tasks = api.call("GET", f"/dags/~/dagRuns/~/taskInstances?{urllib.parse.urlencode(asked)}")["task_instances"]
    except AirflowApiError:
        return None
    return [
        {
            "dag_id": task["dag_id"],
            "run_id": task["dag_run_id"],
            "task_id": task["task_id"],
            "state": task["state"],
            "try": task["try_number"],
            "tries": task["max_tries"] + 1,
            "ended": task["end_date"],
            "link": f"{where}/dags/{task['dag_id']}/runs/{urllib.parse.quote(task['dag_run_id'], safe='')}"
            f"/tasks/{urllib.parse.quote(task['task_id'], safe='')}",
        }
        for task in tasks
    ]


def _api(where: str, environ: Mapping[str, str]) -> AirflowApi:
    return AirflowApi(where, _PATIENCE_S, environ.get(TOKEN, ""))
