"""What a process tree costs while something runs: its peak of memory, and its processor time.

Counted as memory is the proportional set size (PSS), in which a page that N processes
share counts 1/N in each: Airflow forks its workers, so adding up resident sizes
would count the same pages many times.  Where the system does not tell the PSS,
the resident size is taken.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil


def tree_memory(pid: int | None = None) -> dict[str, int]:
    """Return the memory of a process (default: this one) and all under it, in bytes, by kind of process."""
    try:
        root = psutil.Process(pid or os.getpid())
        members = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    held: dict[str, int] = {}
    for member in members:
        try:
            kind = _kind(member)
            held[kind] = held.get(kind, 0) + _size(member)
        except psutil.NoSuchProcess:
            continue
    return held


def _size(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.AccessDenied, AttributeError):
        return int(process.memory_info().rss)


def _kind(process: psutil.Process) -> str:
    words = process.cmdline()
    if not words:
        return process.name()
    if words[0].startswith("airflow "):  # Airflow writes its own titles.
        return "airflow api-server" if "api_server" in words[0] else "airflow workers"
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        return f"{module} {rest[0]}" if module in ("airflow", "onetrans.cli") and rest else module
    return Path(words[0]).name


class TreeWatch(ABC):
    """Looks at a process and all under it now and then, in the background; use as a context manager."""

    def __init__(self, pid: int | None = None, every: float = 0.5) -> None:
        """Watch process ``pid`` (default: this one), ``every`` so many seconds."""
        self.pid = pid or os.getpid()
        self.every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    @abstractmethod
    def sample(self) -> None:
        """Look once."""

    def _run(self) -> None:
        while not self._stop.wait(self.every):
            self.sample()

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()


class MemoryWatch(TreeWatch):
    """Keeps the largest memory a process tree held."""

    def __init__(self, pid: int | None = None, every: float = 0.5) -> None:
        super().__init__(pid, every)
        self.peak = 0
        """Largest total seen, in bytes."""
        self.at_peak: dict[str, int] = {}
        """What each kind of process held at that moment, in bytes."""

    def sample(self) -> None:
        """Look once."""
        held = tree_memory(self.pid)
        total = sum(held.values())
        if total > self.peak:
            self.peak, self.at_peak = total, held


class ProcessorWatch(TreeWatch):
    """Adds up the processor time of a process tree.

    With Spark the tree is the JVM and its Python workers.  The system forgets what these used once they have ended, so
    they are looked at now and then.
    """

    def __init__(self, pid: int | None = None, every: float = 0.25) -> None:
        super().__init__(pid, every)
        self._before: dict[tuple[int, float], float] | None = None
        self._used: dict[tuple[int, float], float] = {}

    @property
    def seconds(self) -> float:
        """Processor time since the beginning, to within a sample for a process that has ended."""
        before = self._before or {}
        return sum(used - before.get(process, 0.0) for process, used in self._used.items())

    def sample(self) -> None:
        """Look once."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._used[process.pid, process.create_time()] = times.user + times.system
        if self._before is None:
            self._before = dict(self._used)
