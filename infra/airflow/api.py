"""A small client of Airflow's REST API: the calls the UI makes to start days and to watch them."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import PurePath
from typing import Any

from onetrans.errors import PipelineError

FINISHED = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})
"""States in which a task has come to its end."""


class AirflowApiError(PipelineError):
    """Airflow refused a call; ``status`` is that of its answer, 0 where there was none of Airflow's."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Task:
    """One task of one run."""

    dag_id: str
    run_id: str
    task_id: str
    state: str
    """State of the latest try; "none" before it is scheduled."""
    tries: int
    """Tries begun."""
    started: datetime | None
    ended: datetime | None

    @property
    def seconds(self) -> float:
        """Seconds the latest try has taken; 0 until it has ended."""
        return (self.ended - self.started).total_seconds() if self.started and self.ended else 0.0


@dataclass(frozen=True)
class Run:
    """One run of a DAG."""

    dag_id: str
    run_id: str
    state: str
    logical_date: date | None
    """Day of the run, if it has one."""

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.state in ("success", "failed")


class AirflowApi:
    """Calls to one API server: with a token, or where every caller is taken for an administrator, as on loopback."""

    def __init__(self, address: str, timeout: float = 120.0, token: str = "") -> None:
        # A machine that is busy was seen to take more than half a minute for an answer.
        self.address = address.rstrip("/")
        self.timeout = timeout
        self._token = token

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Make one call under ``/api/v2`` and return the decoded answer.

        Raises:
            AirflowApiError: if Airflow refuses; the text is its reason.
            OSError: if there is no answer, or it breaks off.
        """
        if not self._token:
            self._token = self._request("GET", "/auth/token")["access_token"]
        return self._request(method, f"/api/v2{path}", body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(f"{self.address}{path}", method=method)
        request.add_header("Accept", "application/json")
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        # Loopback must not go through a proxy the environment may name.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            try:
                with opener.open(request, data, timeout=self.timeout) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:
                text = error.read().decode(errors="replace")
                raise AirflowApiError(
                    f"Airflow answered {error.code} to {method} {path}: {text}", error.code
                ) from error
        except ValueError as error:  # a page: a login before it, or another server where Airflow was
            raise AirflowApiError(f"what answers {method} {path} at {self.address} is no API of Airflow's") from error
        except http.client.HTTPException as error:  # no OSError, though it is what a server leaves that was killed
            raise ConnectionError(f"Airflow's answer to {method} {path} broke off: {error!r}") from error

    def health(self) -> dict[str, Any]:
        """Return what each server reports of itself, by name.

        Raises:
            AirflowApiError: if Airflow refuses.
            OSError: if there is no answer.
        """
        return dict(self._request("GET", "/api/v2/monitor/health"))

    def healthy(self) -> bool:
        """Tell whether all four servers report to be healthy."""
        try:
            health = self.health()
        except (OSError, AirflowApiError):
            return False
        return all(
            (health.get(part) or {}).get("status") == "healthy"
            for part in ("metadatabase", "scheduler", "triggerer", "dag_processor")
        )

    def set_pools(self, pools: Mapping[str, Mapping[str, Any]]) -> None:
        """Make pools, given by name, or change those that are there.

        Raises:
            AirflowApiError: if one was refused.
        """
        entities = [{"name": name, **pool} for name, pool in pools.items()]
        action = {"action": "create", "action_on_existence": "overwrite", "entities": entities}
        answer = self.call("PATCH", "/pools", {"actions": [action]})
        refused = (answer.get("create") or {}).get("errors")
        if refused:
            raise AirflowApiError(f"Airflow refused pools: {refused}")

    def dag_files(self) -> set[str]:
        """Return the names of the files whose DAGs were parsed."""
        return {PurePath(dag["fileloc"]).name for dag in self.call("GET", "/dags?limit=100")["dags"]}

    def import_errors(self) -> list[str]:
        """Return "file: traceback" of every DAG file that could not be imported."""
        found = self.call("GET", "/importErrors")["import_errors"]
        return [f"{error['filename']}: {error['stack_trace']}" for error in found]

    def backfill(
        self,
        dag_id: str,
        first: date,
        last: date,
        conf: Mapping[str, Any] | None = None,
        reprocess: str = "completed",
        at_once: int = 1,
    ) -> int:
        """Create a run of every day from ``first`` to ``last``, ``at_once`` at a time, and return the backfill's id.

        Days that were run already are run again (``reprocess``: ``none``, ``failed`` or ``completed``).
        """
        answer = self.call(
            "POST",
            "/backfills",
            {
                "dag_id": dag_id,
                "from_date": f"{first}T00:00:00Z",
                "to_date": f"{last}T00:00:00Z",
                "dag_run_conf": dict(conf or {}),
                "reprocess_behavior": reprocess,
                "max_active_runs": at_once,
            },
        )
        return int(answer["id"])

    def trigger(self, dag_id: str, conf: Mapping[str, Any] | None = None, logical_date: date | None = None) -> Run:
        """Start one run by hand, as the UI's form does."""
        when = f"{logical_date}T00:00:00Z" if logical_date else None
        return _run(self.call("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": when, "conf": dict(conf or {})}))

    def run(self, dag_id: str, run_id: str) -> Run:
        """Return one run."""
        return _run(self.call("GET", f"/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}"))

    def runs(self, dag_id: str) -> list[Run]:
        """Return the latest 100 runs of a DAG, by day."""
        answer = self.call("GET", f"/dags/{dag_id}/dagRuns?limit=100&order_by=-run_after")
        return sorted((_run(run) for run in answer["dag_runs"]), key=lambda run: str(run.logical_date))

    def tasks(self, dag_id: str, run_id: str) -> list[Task]:
        """Return the tasks of one run."""
        answer = self.call("GET", f"/dags/{dag_id}/dagRuns/{urllib.parse.quote(run_id)}/taskInstances?limit=100")
        return [
            Task(
                dag_id=dag_id,
                run_id=run_id,
                task_id=task["task_id"],
                state=task["state"] or "none",
                tries=task["try_number"],
                started=_instant(task["start_date"]),
                ended=_instant(task["end_date"]),
            )
            for task in answer["task_instances"]
        ]

    def log(self, task: Task, attempt: int | None = None) -> list[str]:
        """Return the lines of one try's log (default: the latest)."""
        path = (
            f"/dags/{task.dag_id}/dagRuns/{urllib.parse.quote(task.run_id)}"
            f"/taskInstances/{urllib.parse.quote(task.task_id)}/logs/{attempt or max(task.tries, 1)}?full_content=true"
        )
        content = self.call("GET", path)["content"]
        return [_log_line(entry) for entry in content]


def _run(data: Mapping[str, Any]) -> Run:
    when = _instant(data["logical_date"])
    return Run(data["dag_id"], data["dag_run_id"], data["state"], when.date() if when else None)


def _instant(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None


def _log_line(entry: Any) -> str:
    """Write a structured log entry as text; Airflow keeps an error's traceback apart from its message."""
    if isinstance(entry, str):
        return entry
    lines = [str(entry.get("event", ""))]
    for error in entry.get("error_detail") or ():
        lines.append(f"{error.get('exc_type')}: {error.get('exc_value')}")
    return "\n".join(lines)
