"""The convention every benchmark follows: the same options, the same table, the same JSON.

A benchmark is a module with a ``main``::

    def main(argv: list[str] | None = None) -> int:
        arguments = parser(__doc__).parse_args(argv)
        report = Report("day", arguments)
        report.add("impressions", "time", 4.2, "s", expected="<= 10")
        return report.finish()

``finish`` prints the table, writes ``--json FILE`` and returns 1 when a figure
missed what was expected of it, so that a benchmark can guard a change.
"""

from __future__ import annotations

import argparse
import json
import operator
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from onetrans.cores import usable_cores

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
_EXPECTED = re.compile(r"(>=|<=|==|>|<)\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    case: str
    """What was measured: a step, a model, a size."""
    figure: str
    """Which quantity: time, peak memory, speed-up."""
    value: float
    """The measurement."""
    unit: str
    """Its unit; empty for a ratio."""
    expected: str
    """A comparison the value must satisfy, such as ``>= 8``; empty when nothing is promised."""
    ok: bool
    """Whether it does; true when nothing is promised."""


def meets(value: float, expected: str) -> bool:
    """Tell whether ``value`` satisfies ``expected`` (``>= 8``); nothing expected is always met.

    Raises:
        ValueError: if ``expected`` is not a comparison with a number.
    """
    if not expected:
        return True
    found = _EXPECTED.fullmatch(expected.strip())
    if not found:
        raise ValueError(f"expected = {expected!r} is not a comparison with a number, such as '>= 8'")
    return _COMPARISONS[found[1]](value, float(found[2]))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options all benchmarks share; a benchmark may add its own."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a smaller measurement, for every change")
    options.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to FILE")
    return options


class Report:
    """Collects figures, then prints them as a table and writes them as JSON."""

    def __init__(self, name: str, arguments: argparse.Namespace, *, line_per_case: bool = False) -> None:
        """Start an empty report; ``line_per_case`` prints a column per figure in place of a line per figure."""
        self.name = name
        self.line_per_case = line_per_case
        self.quick: bool = arguments.quick
        self.json: Path | None = arguments.json
        self.rows: list[Row] = []

    def add(self, case: str, figure: str, value: float, unit: str = "", expected: str = "") -> Row:
        """Add one figure."""
        row = Row(case, figure, float(value), unit, expected, meets(value, expected))
        self.rows.append(row)
        return row

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` writes."""
        return {
            "benchmark": self.name,
            "quick": self.quick,
            "commit": commit(),
            "hardware": hardware(),
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self) -> None:
        """Write the figures so far to the JSON file if one was asked for: a long benchmark may be cut off."""
        if self.json:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            partial = self.json.with_name(f".{self.json.name}.partial")
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            partial.replace(self.json)

    def finish(self) -> int:
        """Print the table, write the JSON file if one was asked for, and return 1 if an expectation was missed."""
        print(f"benchmark {self.name}{' (quick)' if self.quick else ''}, commit {commit()}, {hardware()}")
        print(self._table())
        self.save()
        if self.json:
            print(f"written to {self.json}")
        missed = [row for row in self.rows if not row.ok]
        for row in missed:
            print(f"MISSED {row.case} {row.figure}: {_number(row.value)} {row.unit}, expected {row.expected}")
        return 1 if missed else 0

    def _table(self) -> str:
        return _aligned(self._cases(), left=(0,)) if self.line_per_case else _aligned(self._figures(), (0, 1, 3, 4, 5))

    def _cases(self) -> list[tuple[str, ...]]:
        figures = list(dict.fromkeys((row.figure, row.unit) for row in self.rows))
        values = {(row.case, row.figure, row.unit): row for row in self.rows}
        lines: list[tuple[str, ...]] = [
            ("case", *(f"{figure}, {unit}" if unit else figure for figure, unit in figures))
        ]
        for case in dict.fromkeys(row.case for row in self.rows):
            found = [values.get((case, *figure)) for figure in figures]
            lines.append((case, *("" if row is None else _promise(row) for row in found)))
        return lines

    def _figures(self) -> list[tuple[str, ...]]:
        lines: list[tuple[str, ...]] = [("case", "figure", "value", "unit", "expected", "ok")]
        for r in self.rows:
            ok = ("yes" if r.ok else "NO") if r.expected else ""
            lines.append((r.case, r.figure, _number(r.value), r.unit, r.expected, ok))
        return lines


def _aligned(cells: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _promise(row: Row) -> str:
    return f"{_number(row.value)} ({row.expected}{'' if row.ok else ' MISSED'})" if row.expected else _number(row.value)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    magnitude = abs(value)
    return f"{value:,.0f}" if magnitude >= 1000 else f"{value:.4g}"


def commit() -> str:
    """Return the short commit of the working tree, with ``+`` when files differ from it; "unknown" outside git."""
    here = Path(__file__).parent
    if not shutil.which("git"):
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def hardware() -> str:
    """Return the machine in one line: processor, cores, memory and GPUs."""
    memory = psutil.virtual_memory().total / 2**30
    parts = [_processor(), f"{usable_cores()} cores", f"{memory:.0f} GiB", *_gpus()]
    return ", ".join(parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True
    )
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()] if not listed.returncode else []
