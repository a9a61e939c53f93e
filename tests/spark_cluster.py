"""A real Spark cluster on loopback: a standalone master and workers, each a process, as they come with PySpark."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyspark

SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"


@contextmanager
def spark_cluster(folder: Path, workers: int = 2) -> Iterator[str]:
    """Start a cluster, yield its address when all workers have registered, and end it.

    ``folder/worker-N`` holds what the executors of a worker wrote.
    """
    port = _free_port()
    address = f"spark://127.0.0.1:{port}"
    master = ["org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", str(port)]
    started = [_start([*master, "--webui-port", str(_free_port())], folder / "master.log")]
    try:
        _wait(folder / "master.log", "I have been elected leader", 1)
        for number in range(workers):
            worker = ["org.apache.spark.deploy.worker.Worker", address, "--host", "127.0.0.1", "--cores", "1"]
            worker += ["--memory", "1g", "--work-dir", str(folder / f"worker-{number}")]
            started.append(_start([*worker, "--webui-port", str(_free_port())], folder / f"worker-{number}.log"))
        _wait(folder / "master.log", "Registering worker", workers)
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)


def _start(command: list[str], log: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Dspark.master.rest.enabled=false "
        + talking(log.parent),
    }
    with log.open("wb") as out:
        return subprocess.Popen([str(SPARK_CLASS), *command], env=environment, stdout=out, stderr=out)


def talking(folder: Path) -> str:
    """Return the Java option that logs what is waited for; PySpark's own configuration logs warnings only."""
    path = folder / "log4j2.properties"
    path.write_text(
        "rootLogger.level = info\nrootLogger.appenderRef.stderr.ref = stderr\nappender.stderr.type = Console\n"
        "appender.stderr.name = stderr\nappender.stderr.target = SYSTEM_ERR\n",
        encoding="utf-8",
    )
    return f"-Dlog4j2.configurationFile={path.as_uri()}"


def _wait(log: Path, text: str, times: int, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while log.read_text(encoding="utf-8", errors="replace").count(text) < times:
        if time.monotonic() > deadline:
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise AssertionError(f"no {times} x {text!r} within {seconds:.0f} s: {said}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
