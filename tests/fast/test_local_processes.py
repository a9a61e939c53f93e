"""Local server processes: started with a log, watched, stopped with everything under them."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.local.processes import Server, ServerError, free_port, listens, remember, stop, stop_remembered, wait_until
from infra.local.watch import MemoryWatch

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c",
    "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def server(folder: Path, program: str) -> Server:
    return Server("example", [sys.executable, "-c", program], dict(os.environ), folder / "logs" / "example.log", folder)


def child_of(running: Server) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        words = running.log.read_text().split()
        if words:
            return int(words[0])
        time.sleep(0.02)
    pytest.fail("the server printed nothing")


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_server_is_stopped_with_what_it_started_even_if_neither_listens(tmp_path: Path) -> None:
    running = server(tmp_path, STUBBORN)
    running.start()
    child = child_of(running)
    stop([running], grace=0.3)
    assert running.pid is None
    assert not runs(child)


def test_a_server_that_ends_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    failing = server(tmp_path, "print('the port is taken'); raise SystemExit(3)")
    failing.start()
    with pytest.raises(ServerError, match=r"(?s)example ended with exit code 3.*the port is taken"):
        wait_until(lambda: False, [failing], "example", seconds=20)


def test_a_server_that_is_never_ready_is_reported_in_time(tmp_path: Path) -> None:
    slow = server(tmp_path, "import time; time.sleep(600)")
    slow.start()
    try:
        with pytest.raises(ServerError, match="example is not ready after"):
            wait_until(lambda: False, [slow], "example", seconds=0.5)
    finally:
        stop([slow], grace=1)


def test_servers_of_a_launcher_that_was_killed_are_found_and_stopped(tmp_path: Path) -> None:
    running = server(tmp_path, STUBBORN)
    running.start()
    child = child_of(running)
    file = tmp_path / "processes.json"
    remember(file, [running], "http://127.0.0.1:1")
    assert stop_remembered(file, grace=0.3) == ["example"]
    assert not runs(child)
    assert not file.exists()
    assert running.process is not None
    running.process.wait()


def test_another_process_that_got_the_same_number_is_left_alone(tmp_path: Path) -> None:
    running = server(tmp_path, "import time; time.sleep(600)")
    running.start()
    try:
        file = tmp_path / "processes.json"
        assert running.pid
        remember(file, [running], "http://127.0.0.1:1")
        known = json.loads(file.read_text())
        known["servers"][0]["started"] = 1.0
        file.write_text(json.dumps(known))
        assert stop_remembered(file) == []
        running.check()
    finally:
        stop([running], grace=1)


def test_a_port_in_use_is_not_taken() -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        assert free_port(port) not in (0, port)
    assert free_port(port) == port


def test_memory_counts_the_whole_tree(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    held = "b = bytearray(200_000_000); b[::4096] = b'x' * len(b[::4096]); import time; time.sleep(3)"
    running = Server("example", [sys.executable, "-c", program, held], dict(os.environ), tmp_path / "log", tmp_path)
    running.start()
    assert running.process is not None
    # From its start on: before it, the new process shares the memory of this one, which would count twice.
    with MemoryWatch(running.process.pid, every=0.1) as watch:
        running.process.wait(timeout=60)
    assert 200_000_000 < watch.peak < 400_000_000
    assert sum(watch.at_peak.values()) == watch.peak


def test_servers_of_a_launcher_that_still_runs_are_left_to_it(tmp_path: Path) -> None:
    launcher, running = server(tmp_path, "import time; time.sleep(600)"), server(tmp_path, STUBBORN)
    launcher.start()
    running.start()
    file = tmp_path / "processes.json"
    try:
        remember(file, [running], "http://127.0.0.1:1")
        known = json.loads(file.read_text())
        known["launcher"] = {
            "name": "launcher", "pid": launcher.pid, "started": psutil.Process(launcher.pid).create_time(),
        }  # fmt: skip
        file.write_text(json.dumps(known))
        with pytest.raises(
            ServerError, match=f"in use: process {launcher.pid} runs its servers, at http://127.0.0.1:1"
        ):
            stop_remembered(file)
        running.check()
        stop([launcher], grace=1)
        assert stop_remembered(file, grace=0.3) == ["example"]
    finally:
        stop([launcher, running], grace=1)


def test_what_a_killed_server_leaves_is_found_by_its_session(tmp_path: Path) -> None:
    orphan = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(600)"
    running = Server("example", [sys.executable, "-c", orphan, STUBBORN], dict(os.environ), tmp_path / "log", tmp_path)
    running.start()
    try:
        file = tmp_path / "processes.json"
        remember(file, [running], "http://127.0.0.1:1")
        assert running.process is not None
        deadline = time.monotonic() + 20
        while not (children := psutil.Process(running.process.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        (child,) = children
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
        assert child.is_running()
        assert stop_remembered(file, grace=0.3) == []
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    finally:
        stop([running], grace=0.3)


def test_a_port_is_known_to_be_of_a_server_or_not(tmp_path: Path) -> None:
    port = free_port()
    other = server(tmp_path, "import time; time.sleep(600)")
    listening = server(
        tmp_path,
        f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)",
    )
    try:
        other.start()
        listening.start()
        wait_until(lambda: listens(listening, port), [listening], "the socket", 20)
        assert not listens(other, port)
    finally:
        stop([other, listening], grace=1)
