"""Counters, gauges and histograms of one process, in Prometheus' text format (version 0.0.4).

A few lines of our own in place of a client library: the format is small, and this is all the service needs.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SIZE_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that only grows, per set of labels."""

    kind = "counter"

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._values: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Add to the number with these labels."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def value(self, **labels: str) -> float:
        """Return the number with these labels."""
        return self._values.get(tuple(sorted(labels.items())), 0)

    def lines(self) -> list[str]:
        """Return the samples."""
        with self._lock:
            found = dict(self._values)
        return [f"{self.name}{_braces(labels)} {_number(value)}" for labels, value in sorted(found.items())]


class Gauge:
    """A number that is asked for when somebody looks; ``read`` returns it per set of labels."""

    def __init__(
        self, name: str, text: str, read: Callable[[], dict[Labels, float] | float], kind: str = "gauge"
    ) -> None:
        self.name, self.text, self.kind = name, text, kind
        self._read = read

    def lines(self) -> list[str]:
        """Return the samples."""
        found = self._read()
        values = found if isinstance(found, dict) else {(): found}
        return [f"{self.name}{_braces(labels)} {_number(value)}" for labels, value in sorted(values.items())]


class Histogram:
    """How often a quantity fell below each of some bounds."""

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self.bounds = name, text, tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count one observation."""
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._sum += value

    def lines(self) -> list[str]:
        """Return the samples."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        reached, found = 0, []
        for bound, count in zip((*map(_number, self.bounds), "+Inf"), counts, strict=True):
            reached += count
            found.append(f'{self.name}_bucket{{le="{bound}"}} {reached}')
        return [*found, f"{self.name}_sum {_number(total)}", f"{self.name}_count {reached}"]


Metric = Counter | Gauge | Histogram


def render(metrics: Sequence[Metric]) -> str:
    """Return the page that Prometheus reads."""
    lines: list[str] = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
    return "\n".join(lines) + "\n"


def _braces(labels: Labels) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{quoted(value)}"' for name, value in labels) + "}" if labels else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
