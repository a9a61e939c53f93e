"""`onetrans schema check`: all mistakes of a file at once, each with its line and what is allowed there."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.schema_check import check_text
from onetrans import cli
from onetrans.errors import EXIT_BAD_CONFIG, BadConfigError
from onetrans.schema import FeatureSchema, mistakes_in
from onetrans.toml_lines import key_lines

ROOT = Path(__file__).parents[2]
GOOD = (ROOT / "jobs" / "sources" / "simulated" / "schema.toml").read_text(encoding="utf-8")

WRONG = """\
name = shop
timezone = "Europe/Berln"
epoch = "sec"
atribution_hours = 3
day_tolerance_minutes = "ten"   # a number

[aggregates]
windows = [7, 1]

[[features]]
name = "user"
side = "users"
kind = "hash"
column = "user_id"
hash_size = 100

[[features]]
name = "Price"
side = "item"
kind = "bucketized"
column = "price"
boundaries = [
  5,   # ] a bracket in a comment
  1,
]
bounderies = [3]

[[features]]
name = "label"
side = "context"
column = "click"
kind = "hashed"
hash_size = 3

[[features]]
name = "label"
side = "event"
kind = "hashed"
column = "item_id"

[[sequences]]
event = "click"
max_length = 0

[columns.impressions]
item = "sku"
[columns.user]
user_id = "uid"
"""

EXPLAINED = {
    1: ("not TOML: invalid value", 'text stands in quotes: "shop"'),
    2: ("timezone = 'Europe/Berln' is not known", 'did you mean "Europe/Berlin"?'),
    3: ("epoch = 'sec' is none of '', 's', 'ms', 'us'", ""),
    4: ("unknown key 'atribution_hours'", "did you mean attribution_hours?"),
    5: ("day_tolerance_minutes = 'ten' is not a whole number", ""),
    8: ("aggregates.windows = [7, 1] must be increasing", ""),
    12: ("side = 'users' is none of user, item, context, event", 'did you mean "user"?'),
    13: ("kind = 'hash' is none of hashed, bucketized, vector", 'did you mean "hashed"?'),
    18: ("a name is lower-case letters", ""),
    22: ("boundaries = [5, 1] must be finite and increasing", ""),
    26: ("unknown key 'bounderies'", "did you mean boundaries?"),
    31: ("column 'click' is a label", ""),
    36: ("feature 'label' is declared twice", ""),
    43: ("max_length = 0 must be at least 1", ""),
    46: ("[columns.impressions] item is no column of the contract", "did you mean item_id?"),
    47: ("[columns.user] is none of", "did you mean users?"),
}


def test_every_mistake_is_told_with_its_line() -> None:
    found, _ = check_text(WRONG)
    for line, (text, hint) in EXPLAINED.items():
        here = [finding for finding in found if finding.line == line]
        assert any(text in finding.text for finding in here), (line, [f.text for f in here])
        assert hint in {finding.hint for finding in here} or not hint
    assert all(finding.source == WRONG.splitlines()[finding.line - 1] for finding in found if finding.line)
    # hash_size that is missing, and the table that the two of one name share, stand at the head of the feature
    assert {f.line for f in found} - set(EXPLAINED) == {35}


def test_the_command_tells_a_script_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.toml"
    file.write_text(WRONG)
    assert cli.main(["schema", "check", str(file), "--json"]) == EXIT_BAD_CONFIG
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"]
    assert {finding["line"] for finding in answer["findings"]} >= set(EXPLAINED)
    assert cli.main(["schema", "check", str(file)]) == EXIT_BAD_CONFIG
    assert "line 12: feature 'user': side = 'users' is none of user" in capsys.readouterr().out
    with pytest.raises(BadConfigError, match=r"onetrans schema check .*schema.toml\)|is not valid TOML"):
        FeatureSchema.load(file)


@pytest.mark.parametrize("kind", ["simulated", "kuairand"])
def test_the_schemas_of_the_repository_are_accepted(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "check", str(ROOT / "jobs" / "sources" / kind / "schema.toml")]) == 0
    assert "accepted" in capsys.readouterr().out


def test_a_file_that_is_accepted_may_have_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.toml"
    file.write_text(GOOD.replace('column = "item_ctr_7d"', 'column = "item_ctr_3d"'))
    assert cli.main(["schema", "check", str(file)]) == 0
    assert "note: feature 'item_ctr_7d': column 'item_ctr_3d' is named like a computed one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("broken", "line", "hint"),
    [
        ("name: 'x'", 1, "joined by =, not by :"),
        ("name = 'x'\nepoch = \"s", 2, "a quote is not closed"),
        ("name = 'x'\nderived_behaviors = ['click'\n", 2, "a list is not closed"),
        ("name = 'x'\n\n[aggregates\nsmoothing = 3", 3, ""),
    ],
)
def test_what_is_no_toml_is_found_by_line(broken: str, line: int, hint: str) -> None:
    found, _ = check_text(broken)
    first = next(finding for finding in found if finding.text.startswith("not TOML"))
    assert first.line in (line, line + 1)
    assert hint in first.hint


def test_a_list_that_is_not_closed_is_one_mistake_at_its_own_line() -> None:
    lines = GOOD.splitlines()
    at = next(number for number, line in enumerate(lines) if re.match(r"boundaries = \[.*\]", line))
    lines[at] = lines[at].replace("]", "")
    found = [finding for finding in check_text("\n".join(lines))[0] if finding.kind == "mistake"]
    assert [(finding.line, finding.hint) for finding in found] == [(at + 1, "a list is not closed: ]")]


STATEMENTS = [line for line in GOOD.splitlines() if line.strip() and not line.lstrip().startswith("#")]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_check_and_the_reader_agree(data: st.DataObject) -> None:
    """Whatever is done to a good file: the check finds nothing exactly when the file is accepted."""
    lines = list(STATEMENTS)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        change = data.draw(st.sampled_from(["drop", "twice", "zero", "word"]))
        key = lines[at].split("=")[0]
        if change == "drop":
            lines[at] = ""
        elif change == "twice":
            lines.insert(at, lines[at])
        elif "=" in lines[at]:
            lines[at] = f"{key}= " + ("0" if change == "zero" else '"hashed"')
    text = "\n".join(lines)
    found = [finding for finding in check_text(text)[0] if finding.kind == "mistake" and "contract" not in finding.text]
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assert found
        return
    mistakes = mistakes_in(content)[0]
    if not mistakes:
        FeatureSchema.from_dict(content)
        return
    assert found
    with pytest.raises(BadConfigError) as refused:
        FeatureSchema.from_dict(content)
    assert str(refused.value) in [mistake.text for mistake in mistakes]


def test_lines_of_keys() -> None:
    text = '# c\na = """\n[x]\nb = 1\n"""\n[t]\n"q.r" = 1\nu.v = [ [1, 2],\n "]" ]\nw = 3\n'
    text += "[[l]]\nk = 1\n[[l]]\nk = 2\n[l.s]\nz = 1"
    assert key_lines(text) == {
        ("a",): 2,
        ("t",): 6,
        ("t", "q.r"): 7,
        ("t", "u", "v"): 8,
        ("t", "w"): 10,
        ("l",): 11,
        ("l", 0): 11,
        ("l", 0, "k"): 12,
        ("l", 1): 13,
        ("l", 1, "k"): 14,
        ("l", 1, "s"): 15,
        ("l", 1, "s", "z"): 16,
    }
