"""Server processes on this machine: start, watch, stop, and leave nothing behind.

Every server gets a process group and a log file of its own.  A server is
stopped with everything it started, also what moved to another group: Airflow's
tasks do, and a scheduler that is merely asked to stop waits for them.  A server
that was killed leaves orphans; they are found by the session it had begun.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from onetrans.errors import PipelineError


class ServerError(PipelineError):
    """A local server did not start, or stopped by itself."""


@dataclass
class Server:
    """One server process."""

    name: str
    """Name shown to people, and of the log file."""
    command: Sequence[str]
    """Program and arguments."""
    environment: Mapping[str, str]
    """The whole environment of the process."""
    log: Path
    """File that takes its output; the previous one is replaced."""
    folder: Path
    """Working directory."""
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self, again: bool = False) -> None:
        """Start the process in a group of its own, away from the terminal's Ctrl-C; ``again`` keeps its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab" if again else "wb") as output:
            self.process = subprocess.Popen(
                list(self.command),
                env=dict(self.environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise if the process is not running.

        Raises:
            ServerError: with the end of its log.
        """
        if self.process is None:
            raise ServerError(f"{self.name} was not started")
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"{self.name} ended with exit code {code}; {self.log} ends with:\n{tail(self.log, 30)}")

    @property
    def pid(self) -> int | None:
        """Process id while it is known to run."""
        return self.process.pid if self.process and self.process.poll() is None else None


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a text file; empty if it is not there."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def stop(servers: Iterable[Server], grace: float = 8.0) -> None:
    """Stop servers and all processes under them: ask, wait at most ``grace`` seconds, then kill."""
    running = list(servers)
    begun = [server.process.pid for server in running if server.process is not None]
    stop_processes([server.pid for server in running if server.pid], grace, begun)
    for server in running:
        if server.process is not None:
            server.process.wait()


def stop_processes(pids: Iterable[int], grace: float, sessions: Iterable[int] = ()) -> None:
    """Stop processes with their descendants: ask the youngest first, wait ``grace`` seconds in all, then kill.

    ``sessions`` are numbers of processes, running or not, that began a session: what is left of it is stopped too.
    """
    named = list(pids)
    orphans = _of_sessions({number for number in sessions if number in named or not psutil.pid_exists(number)})
    roots = [process for pid in dict.fromkeys([*named, *orphans]) if (process := _process(pid))]
    family = {member.pid: member for root in roots for member in (root, *_descendants(root))}
    for member in reversed(family.values()):
        _signal(member.terminate)
    _, left = psutil.wait_procs(list(family.values()), timeout=grace)
    # A process may have started another between the two looks.
    late = {member.pid: member for root in [*roots, *left] for member in _descendants(root)}
    for member in {**{m.pid: m for m in left}, **late}.values():
        _signal(member.kill)
    psutil.wait_procs([*left, *late.values()], timeout=grace)


def _of_sessions(sessions: set[int]) -> list[int]:
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) in sessions:
                found.append(pid)
    return found


def listens(server: Server, port: int) -> bool:
    """Tell whether a server, or a process under it, listens on a port of this machine."""
    root = _process(server.pid) if server.pid else None
    for member in (root, *_descendants(root)) if root else ():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for connection in member.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _descendants(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _signal(send: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        send()


def free_port(preferred: int = 0) -> int:
    """Return a free port on loopback: ``preferred`` if nothing listens there, else any."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As servers do, so that a port whose last user has just gone counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServerError("no free port on 127.0.0.1")


_TOLD_EVERY_S = 15.0


def wait_until(ready: Callable[[], bool], servers: Sequence[Server], what: str, seconds: float) -> None:
    """Wait until ``ready()``, looking every 0.2 s; a line now and then says for what, and how long by now.

    Raises:
        ServerError: if a server ends meanwhile, or after ``seconds``.
    """
    begun = told = time.monotonic()
    deadline = begun + seconds
    while not ready():
        for server in servers:
            server.check()
        now = time.monotonic()
        if now - told >= _TOLD_EVERY_S:
            told = now
            print(f"  waiting for {what}, {now - begun:.0f} s (at most {seconds:.0f} s)", flush=True)
        if now > deadline:
            logs = "\n".join(f"--- {server.log}\n{tail(server.log, 15)}" for server in servers)
            raise ServerError(f"{what} is not ready after {seconds:.0f} s; the logs end with:\n{logs}")
        time.sleep(0.2)


# A launcher that was killed leaves its servers running; the file below lets the next one find and stop them, and
# keeps it from stopping those of a launcher that still runs.


def remember(path: Path, servers: Iterable[Server], address: str) -> None:
    """Write which processes run and who started them, for :func:`stop_remembered` of a later launcher."""
    known = {
        "address": address,
        "launcher": _identity("launcher", os.getpid()),
        "servers": [_identity(server.name, server.pid) for server in servers if server.pid],
    }
    path.write_text(json.dumps(known) + "\n", encoding="utf-8")


def stop_remembered(path: Path, grace: float = 8.0) -> list[str]:
    """Stop the processes a file of :func:`remember` names, if they still are the same; return their names.

    Raises:
        ServerError: if the launcher that started them still runs: they are in use.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    launcher = known["launcher"]
    if launcher["pid"] != os.getpid() and _is_same(launcher):
        raise ServerError(
            f"{path.parent} is in use: process {launcher['pid']} runs its servers, at {known['address']}; "
            f"look there, or end it first (Ctrl-C, or kill {launcher['pid']})"
        )
    found = [entry for entry in known["servers"] if _is_same(entry)]
    stop_processes([entry["pid"] for entry in found], grace, [entry["pid"] for entry in known["servers"]])
    path.unlink(missing_ok=True)
    return [entry["name"] for entry in found]


def _identity(name: str, pid: int) -> dict[str, Any]:
    return {"name": name, "pid": pid, "started": psutil.Process(pid).create_time()}


def _is_same(entry: Mapping[str, Any]) -> bool:
    """Tell whether a process still is the one that was remembered; numbers of ended ones are given again."""
    process = _process(entry["pid"])
    try:
        return (
            process is not None
            and abs(process.create_time() - entry["started"]) < 1.0
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False
