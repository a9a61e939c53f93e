"""``onetrans schema check FILE``: every mistake of a schema file at once, with its line and what is allowed there.

The rules are those by which the file is read (``onetrans.schema``, ``jobs.contract``);
this only gathers what they say and finds the lines.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args
from zoneinfo import available_timezones

from jobs.contract import column_names, contract_mistakes
from onetrans import storage
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_OK, BadConfigError
from onetrans.process import add_json, print_json
from onetrans.schema import (
    DERIVED_EVENTS,
    EPOCHS,
    Aggregates,
    Feature,
    FeatureSchema,
    InputTable,
    Kind,
    Mistake,
    Sequence,
    Side,
    mistakes_in,
    schema_file,
)
from onetrans.settings import load_settings
from onetrans.toml_lines import Place, key_lines, statements

EXAMPLES = """examples:
  onetrans schema check schema.toml
  onetrans schema check                  the schema of the log that the settings name
  onetrans schema check schema.toml --json

exit codes: 0 the file is accepted (notes may be left), 78 it is not.  docs/input.md describes the file."""

_FIGURE = re.compile(r"(?P<key>\w+)_(?:impressions|clicks|conversions|ctr|cvr)_(?P<days>\d+)d")
_MOST_SYNTAX = 50
_NOT_CLOSED = "a list is not closed: ]"

_PARTS: dict[str, type[Any]] = {"features": Feature, "sequences": Sequence, "aggregates": Aggregates}


@dataclass(frozen=True)
class Finding:
    """One mistake, or a note on what is allowed and yet looks like one."""

    kind: str
    """``mistake`` or ``note``."""
    line: int
    """Line in the file, from 1; 0 where it belongs to none."""
    place: str
    """Keys that lead there, as ``features[2].kind``."""
    text: str
    """What is wrong."""
    hint: str
    """What was probably meant; empty if nothing is near."""
    source: str
    """The line as it is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's actions."""
    actions = parser.add_subparsers(dest="action", required=True)
    check = actions.add_parser("check", help="explain every mistake of a schema file, line by line")
    check.add_argument("file", nargs="?", metavar="FILE", help="schema file (default: that of the configured log)")
    add_json(check)


def run(arguments: argparse.Namespace) -> int:
    """Print what is found, by line.

    Raises:
        BadConfigError: if there is no such file.
    """
    path = arguments.file or schema_file(load_settings().source)
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except FileNotFoundError as error:
        raise BadConfigError(f"there is no schema file {path}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise BadConfigError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from error
    found, schema = check_text(text)
    mistakes = sum(finding.kind == "mistake" for finding in found)
    if arguments.json:
        findings = [asdict(finding) for finding in found]
        print_json({"file": path, "ok": not mistakes, "findings": findings})
    else:
        for finding in found:
            print(told(finding))
        count = "1 mistake" if mistakes == 1 else f"{mistakes} mistakes"
        print(f"{path}: {count}" if mistakes else summary(path, schema))
    return EXIT_BAD_CONFIG if mistakes else EXIT_OK


def check_text(text: str) -> tuple[list[Finding], FeatureSchema | None]:
    """Return what there is to say about the text of a schema file, by line, and the schema if it can be read."""
    lines = text.splitlines()
    readable, syntax = _without_broken(text)
    found = [Finding("mistake", line, "", told, hint, _line(lines, line)) for line, told, hint in syntax]
    if readable is None:
        return found, None
    data, where = tomllib.loads(readable), key_lines(readable)
    mistakes, schema = mistakes_in(data)
    mistakes += list(contract_mistakes(schema))
    if syntax:  # what a line that cannot be read would have said is not missing
        mistakes = [m for m in mistakes if "must be given" not in m.text and m.place not in (("features",), ())]
    if any(hint == _NOT_CLOSED for _, _, hint in syntax):  # it has swallowed keys of its table
        mistakes = [m for m in mistakes if m.place in where or m.place[:-1] not in where]
    for mistake in mistakes:
        line = _line_of(mistake.place, where)
        hint = _hint(mistake, data, schema)
        found.append(Finding("mistake", line, _written(mistake.place), mistake.text, hint, _line(lines, line)))
    for note in _notes(schema):
        line = _line_of(note.place, where)
        found.append(Finding("note", line, _written(note.place), note.text, "", _line(lines, line)))
    return sorted(found, key=lambda finding: finding.line), schema


def told(finding: Finding) -> str:
    """Return a finding as text: where, what, the line itself, and what was probably meant."""
    where = f"line {finding.line}" if finding.line else "the file"
    note = "note: " if finding.kind == "note" else ""
    parts = [f"{where}: {note}{finding.text}"]
    if finding.source:
        parts.append(f"    {finding.source.strip()}")
    if finding.hint:
        parts.append(f"    {finding.hint}")
    return "\n".join(parts) + "\n"


def summary(path: str, schema: FeatureSchema | None) -> str:
    """Say what an accepted schema declares."""
    if schema is None:
        return path
    sides = ", ".join(f"{len(schema.of_side(side))} {side}" for side in get_args(Side))
    rows = sum(schema.embedding_tables().values())
    names = ", ".join(f"{sequence.name} ({sequence.max_length})" for sequence in schema.sequences) or "none"
    return f"{path}: accepted; {schema.name!r}, features: {sides}; sequences: {names}; {rows:,} rows of embeddings"


# What is no TOML


def _without_broken(text: str) -> tuple[str | None, list[tuple[int, str, str]]]:
    """Return the text with every statement left blank that is no TOML, and why each is not: line, text, hint.

    None instead of the text if what is left cannot be read either.
    """
    lines, found = text.splitlines(), list[tuple[int, str, str]]()
    for _ in range(_MOST_SYNTAX):
        try:
            tomllib.loads("\n".join(lines))
            return "\n".join(lines), found
        except tomllib.TOMLDecodeError as error:
            at = re.search(r"at line (\d+)", str(error))
            line = int(at[1]) if at else len(lines)
            what = re.sub(r" \(at .*\)$", "", str(error))
        first, last = _statement_at("\n".join(lines), line)
        hint = _syntax_hint(lines[first - 1])
        # A list that is not closed is noticed lines later, at a statement that is right.
        shown = line if at and hint != _NOT_CLOSED else first
        found.append((shown, f"not TOML: {what[0].lower()}{what[1:]}", hint))
        blank = [""] * (last - first + 1)
        if lines[first - 1 : last] == blank:
            break
        lines[first - 1 : last] = blank
    return None, found


def _statement_at(text: str, line: int) -> tuple[int, int]:
    last = (line, line)
    for first, end, _ in statements(text):
        if first > line:
            break
        last = (first, end)
    return last


def _syntax_hint(line: str) -> str:
    assigned = re.match(r"\s*[\w.-]+\s*=\s*(?P<value>[^#]*)", line)
    value = assigned["value"].strip() if assigned else ""
    if value in ("True", "False"):
        return f"write {value.lower()}"
    if re.fullmatch(r"[A-Za-z_][\w /.-]*", value):
        return f'text stands in quotes: "{value}"'
    if re.match(r"\s*[\w.-]+\s*:", line):
        return "a key and its value are joined by =, not by :"
    if value.count('"') == 1 or value.count("'") == 1:
        return "a quote is not closed"
    if value.startswith("[") and value.count("[") > value.count("]"):
        return _NOT_CLOSED
    return ""


# Lines


def _line_of(place: Place, where: Mapping[Place, int]) -> int:
    """Return the line of a place, or of the nearest table above it that stands in the file."""
    for length in range(len(place), 0, -1):
        if place[:length] in where:
            return where[place[:length]]
    return 0


def _line(lines: list[str], number: int) -> str:
    return lines[number - 1] if 0 < number <= len(lines) else ""


def _written(place: Place) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


# What was meant


def _hint(mistake: Mistake, data: Mapping[str, Any], schema: FeatureSchema) -> str:
    allowed = _allowed(mistake, schema)
    given = _given(mistake.place, data)
    unknown_key = "unknown key" in mistake.text or mistake.place[:1] == ("columns",)
    word = str(mistake.place[-1]) if unknown_key and mistake.place else given if isinstance(given, str) else None
    if isinstance(given, list) and not unknown_key:  # derived_behaviors
        word = next((part for part in given if isinstance(part, str) and part not in allowed), None)
    if word is None or not allowed:
        return ""
    near = difflib.get_close_matches(word.lower(), allowed, 1, cutoff=0.5)
    if not near:
        near = [name for name in allowed if name.rpartition("/")[2].lower() == word.lower()][:1]
    return f"did you mean {near[0] if unknown_key else json.dumps(near[0])}?" if near else ""


def _allowed(mistake: Mistake, schema: FeatureSchema) -> list[str]:
    """Return the words that may stand where the mistake is; empty where anything may."""
    place = mistake.place
    if "unknown key" in mistake.text:
        part = next((_PARTS[name] for name in map(str, place[:1]) if name in _PARTS and len(place) > 1), FeatureSchema)
        return [field.name for field in fields(part)]
    if place[:1] == ("columns",):
        tables = {name: name for name in get_args(InputTable)}
        return [*tables] if len(place) == 2 else column_names(schema, tables[place[1]])
    key = str(place[-1]) if place else ""
    if key == "timezone":
        return sorted(available_timezones())
    words: dict[str, tuple[str, ...]] = {
        "side": get_args(Side),
        "kind": get_args(Kind),
        "epoch": EPOCHS,
        "derived_behaviors": DERIVED_EVENTS,
    }
    return [word for word in words.get(key, ()) if word]


def _given(place: Place, data: Any) -> Any:
    for part in place:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _notes(schema: FeatureSchema) -> Iterator[Mistake]:
    """Yield what is allowed and yet rarely meant."""
    keys = {"user": {"user"}, "item": {"item", *schema.aggregates.item_keys}}
    windows = schema.aggregates.windows
    for number, feature in enumerate(schema.features):
        figure = _FIGURE.fullmatch(feature.column)
        if figure and figure["key"] in keys.get(feature.side, ()) and int(figure["days"]) not in windows:
            text = (
                f"feature {feature.name!r}: column {feature.column!r} is named like a computed one, but "
                f"{figure['days']} is no window of [aggregates] ({', '.join(map(str, windows))}); it is looked for in "
                "your files"
            )
            yield Mistake(("features", number, "column"), text)
    for sequence_number, sequence in enumerate(schema.sequences):
        if schema.derived_behaviors and sequence.event not in schema.derived_behaviors:
            text = (
                f"sequence {sequence.name!r}: event {sequence.event!r} is none of derived_behaviors, the only events "
                "that come every day; it stays empty"
            )
            yield Mistake(("sequences", sequence_number, "event"), text)
