"""Where in a TOML file each key stands: ``tomllib`` reads values and forgets their lines.

Only files that ``tomllib`` accepts are meant; of others as much is found as can
be.  The inside of an inline table counts as the line of its key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Place = tuple[str | int, ...]

_KEY = r'(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|\'[^\']*\')'
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]\]?")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=")
_TOKEN = re.compile(r'"""|\'\'\'|"(?:[^"\\]|\\.)*"|\'[^\']*\'|#|[\[\]{}]')


def key_lines(text: str) -> dict[Place, int]:
    """Return the line, from 1, of every table and key; entries of a list of tables have their number in the place."""
    lines: dict[Place, int] = {}
    counts: dict[Place, int] = {}
    table: Place = ()
    for number, _, line in statements(text):
        header = _HEADER.match(line)
        if header:
            table = _within(_names(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                lines.setdefault(table, number)
                table = (*table, counts[table])
            lines.setdefault(table, number)
            continue
        assignment = _ASSIGNMENT.match(line)
        if assignment:
            lines.setdefault((*table, *_names(assignment[1])), number)
    return lines


def statements(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield the first line, the last line and the first line's text of every header and assignment."""
    begun, first, depth, quote = 0, "", 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if not begun:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            begun, first = number, line
        depth, quote = _after(line, depth, quote)
        if depth <= 0 and not quote:
            yield begun, number, first
            begun, depth = 0, 0
    if begun:
        yield begun, len(text.splitlines()), first


def _after(line: str, depth: int, quote: str) -> tuple[int, str]:
    """Return how many brackets are open after a line, and the quotes of a text of several lines it is in."""
    at = 0
    while at < len(line):
        if quote:
            end = line.find(quote, at)
            if end < 0:
                return depth, quote
            at, quote = end + 3, ""
            continue
        token = _TOKEN.search(line, at)
        if token is None or token[0] == "#":
            return depth, ""
        at = token.end()
        if token[0] in ('"""', "'''"):
            quote = token[0]
        elif token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
    return depth, quote


def _names(dotted: str) -> Place:
    return tuple(part[0].strip("\"'") for part in re.finditer(_KEY, dotted))


def _within(names: Place, counts: dict[Place, int]) -> Place:
    """Return the place of a header: below a list of tables it belongs to the entry that was begun last."""
    place: Place = ()
    for number, name in enumerate(names):
        place = (*place, name)
        if place in counts and number < len(names) - 1:
            place = (*place, counts[place])
    return place
