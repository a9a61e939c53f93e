"""A Kubernetes API on loopback that runs a pod's container as a process of this machine.

It takes the place of a cluster, which is not to be had here, and answers the few
calls that a step's pod needs: create, read, list, patch and delete a pod, its
log, its events.  Of an image it knows the variables, of nodes, volumes and rights nothing: what is
tested with it is the real provider's way through creating, watching, reading and
deleting, and what becomes of an exit code.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class Cluster:
    """The pods there are, and how each stands."""

    def __init__(self, folder: Path, image: Mapping[str, str] | None = None) -> None:
        """Start the API.

        Args:
            folder: where pods run.
            image: variables that the pods' image sets; those of the same name in the pod's description win.
        """
        self.folder = folder
        self.image = dict(image or {})
        self.pods: dict[str, dict] = {}
        self.processes: dict[str, subprocess.Popen] = {}
        self._said: dict[str, list[tuple[datetime, str]]] = {}
        self._listening: dict[str, threading.Thread] = {}
        self.made: list[str] = []
        """Names of all pods that were ever created."""
        self.secrets: dict[str, dict[str, str]] = {"onetrans": {}}
        """The secrets of the namespace."""
        self.lacking: dict[str, str] = {}
        """What the node says of each pod that asks for a secret, or a key of one, that is not there."""
        self.full = False
        """Whether no node takes another pod: those created now stay pending."""
        self.refuses: tuple[int, str] | None = None
        """Code and reason with which every call is answered, if any."""
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                cluster._answer(self, "GET")

            def do_POST(self):
                cluster._answer(self, "POST")

            def do_PATCH(self):
                cluster._answer(self, "PATCH")

            def do_DELETE(self):
                cluster._answer(self, "DELETE")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """End every pod and the API."""
        for name in list(self.pods):
            self.kill(name)
        self.server.shutdown()
        self.server.server_close()

    def connection(self) -> str:
        """Return the Airflow connection to it."""
        kube = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": self.address}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }
        return json.dumps({"conn_type": "kubernetes", "extra": {"kube_config": json.dumps(kube)}})

    def kill(self, name: str) -> None:
        """Take a pod away, as when its node is lost."""
        process = self.processes.pop(name, None)
        if process is not None and process.poll() is None:
            process.kill()
        if process is not None:
            process.wait()
        self.pods.pop(name, None)

    def _create(self, pod: dict) -> dict:
        name, (container,) = pod["metadata"]["name"], pod["spec"]["containers"]
        pod["metadata"] |= {"uid": name, "creationTimestamp": "2022-05-05T00:00:00Z", "resourceVersion": "1"}
        command = [*container["command"], *container["args"]]
        command[0] = sys.executable if command[0] == "python" else command[0]
        self.pods[name] = pod
        self.made.append(name)
        if self.full:
            return pod
        try:
            variables = self._variables(container, pod["metadata"]["namespace"])
        except LookupError as error:
            self.lacking[name] = str(error.args[0])
            return pod
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("ONETRANS_")},
                **self.image,
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said: list[tuple[datetime, str]] = []
        listening = threading.Thread(target=_listen, args=(process, said), daemon=True)
        listening.start()
        self._said[name], self._listening[name] = said, listening
        self.processes[name] = process  # from now on it is asked for its log
        return pod

    def _variables(self, container: dict, namespace: str) -> dict[str, str]:
        """Return the variables of a container; those of whole secrets first, as the others win."""
        variables: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            variables |= self._secret(source["secretRef"]["name"])
        for entry in container["env"]:
            asked = entry.get("valueFrom", {}).get("secretKeyRef")
            if asked and asked["key"] not in self._secret(asked["name"]):
                raise LookupError(f"couldn't find key {asked['key']} in Secret {namespace}/{asked['name']}")
            variables[entry["name"]] = self._secret(asked["name"])[asked["key"]] if asked else entry.get("value", "")
        return variables

    def _secret(self, name: str) -> dict[str, str]:
        if name not in self.secrets:
            raise LookupError(f'secret "{name}" not found')
        return self.secrets[name]

    def _log(self, name: str, stamped: bool = False, seconds: float = math.inf) -> str:
        """Return what a pod's process wrote, in the last seconds alone, each line behind its time if ``stamped``."""
        if self.processes[name].poll() is not None:
            self._listening[name].join(timeout=5)  # what it started may keep its output open
        now = datetime.now(UTC)
        lines = [(when, line) for when, line in self._said[name] if (now - when).total_seconds() <= seconds]
        return "".join(f"{when.isoformat()} {line}" if stamped else line for when, line in lines)

    def _seen(self, name: str) -> dict:
        if name in self.lacking:
            state = {"waiting": {"reason": "CreateContainerConfigError", "message": self.lacking[name]}}
            status = {
                "phase": "Pending",
                "conditions": [{"type": "PodScheduled", "status": "True"}],
                "containerStatuses": [
                    {"name": "base", "state": state, "ready": False, "restartCount": 0, "image": "x", "imageID": ""}
                ],
            }
            return {**self.pods[name], "status": status}
        if name not in self.processes:
            return {**self.pods[name], "status": {"phase": "Pending"}}
        code = self.processes[name].poll()
        started = "2022-05-05T00:00:00Z"
        if code is None:
            phase, state = "Running", {"running": {"startedAt": started}}
        else:
            phase = "Failed" if code else "Succeeded"
            # As terminationMessagePolicy FallbackToLogsOnError asks for: the end of the log, where it failed.
            state = {
                "terminated": {
                    "exitCode": code if code >= 0 else 128 - code,
                    "reason": "Error" if code else "Completed",
                    "message": self._log(name)[-2048:] if code else None,
                    "startedAt": started,
                    "finishedAt": started,
                }
            }
        status = {
            "phase": phase,
            "startTime": started,
            "containerStatuses": [
                {"name": "base", "state": state, "ready": code is None, "restartCount": 0, "image": "x", "imageID": "x"}
            ],
        }
        return {**self.pods[name], "status": status}

    def _answer(self, call: BaseHTTPRequestHandler, method: str) -> None:
        url = urlsplit(call.path)
        parts = url.path.strip("/").split("/")[4:]  # after api/v1/namespaces/NAME
        length = int(call.headers.get("Content-Length") or 0)
        body = json.loads(call.rfile.read(length)) if length else None
        if self.refuses:
            code, answer = self.refuses[0], {"kind": "Status", "code": self.refuses[0], "message": self.refuses[1]}
        else:
            code, answer = self._do(method, parts, parse_qs(url.query), body)
        raw = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        call.send_response(code)
        call.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        call.send_header("Content-Length", str(len(raw)))
        call.end_headers()
        call.wfile.write(raw)

    def _do(self, method: str, parts: list[str], query: dict[str, list[str]], body: dict | None) -> tuple[int, object]:
        kind, name, *rest = [*parts, "", ""]
        if kind == "events":
            return 200, {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": []}
        if kind != "pods":
            return 404, {"kind": "Status", "reason": "NotFound", "code": 404}
        if not name:
            if method == "POST":
                return 201, self._create(body or {})
            wanted = [part for part in query.get("labelSelector", [""])[0].split(",") if part]
            found = [self._seen(name) for name in list(self.pods) if self._fits(self.pods[name], wanted)]
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": found}
        if name not in self.pods:
            return 404, {"kind": "Status", "reason": "NotFound", "code": 404}
        if rest[0] == "log" and name not in self.processes:
            return 400, {"kind": "Status", "reason": "BadRequest", "code": 400}
        if rest[0] == "log":
            stamped = query.get("timestamps", ["false"])[0].lower() == "true"
            return 200, self._log(name, stamped, float(query.get("sinceSeconds", ["inf"])[0]))
        seen = self._seen(name)
        if method == "PATCH":
            self.pods[name]["metadata"].setdefault("labels", {}).update((body or {})["metadata"].get("labels", {}))
        elif method == "DELETE":
            self.kill(name)
        return 200, seen

    @staticmethod
    def _fits(pod: dict, wanted: list[str]) -> bool:
        labels = pod["metadata"].get("labels", {})
        for part in wanted:
            if "!=" in part:
                key, value = part.split("!=")
                if labels.get(key) == value:
                    return False
            elif "=" in part:
                key, value = part.split("=")
                if labels.get(key) != value:
                    return False
        return True


def _listen(process: subprocess.Popen, said: list[tuple[datetime, str]]) -> None:
    """Keep what a process writes, with the time of each line as a node does."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            said.append((datetime.now(UTC), line))
