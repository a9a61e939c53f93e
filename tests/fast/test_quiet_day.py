"""A day on which nobody buys, after days on which many did: stopped by default, passed as docs/input.md says."""

from __future__ import annotations

import math
import re
import tomllib
from datetime import date
from pathlib import Path

import pytest

from expectations import rules
from expectations.day import AuditDay
from onetrans.lake import Staged
from onetrans.settings import AuditSettings
from tests.audit_tables import audit_schema

PAGE = (Path(__file__).parents[2] / "docs" / "input.md").read_text(encoding="utf-8")


def stops(usual: int, rows: int, change: float, counted: int = 0) -> bool:
    """Tell whether a day of some rows and conversions is stopped, after days of as many rows and the usual number."""
    trailing = ({"conversion": (0, rows - usual, usual)},) * 3
    day = AuditDay(
        Staged("impressions", date(2026, 3, 8), "", rows),
        audit_schema(),
        AuditSettings(max_rate_change=change),
        trailing=trailing,
    )
    (rule,) = (rule for rule in rules.usual_rate(day, "conversion") if rule.severity == rules.CRITICAL)
    bounds = rule.configuration.kwargs
    return bool(counted / rows < bounds["min_value"] or counted / rows > bounds["max_value"])


def test_the_setting_of_the_page_lets_a_day_without_conversions_pass() -> None:
    told = re.search(
        r"```toml\n(\[audit\]\nmax_rate_change = .*# ([\d,]+) impressions, usually ([\d,]+) .*)\n```", PAGE
    )
    assert told is not None
    rows, usual = (int(number.replace(",", "")) for number in told.groups()[1:])
    given = tomllib.loads(told[1])["audit"]["max_rate_change"]
    assert given >= math.sqrt(usual) / 7
    assert stops(usual, rows, AuditSettings().max_rate_change)
    assert not stops(usual, rows, given)
    assert stops(usual, rows, given, counted=rows // 2), "a fault of the other kind is still found"


def test_few_conversions_may_be_missing_by_chance() -> None:
    assert "about 140\nconversions" in PAGE
    assert not stops(140, 40_000, AuditSettings().max_rate_change)
    assert stops(150, 40_000, AuditSettings().max_rate_change)


@pytest.mark.parametrize("share", [0.001, 0.03, 0.1, 0.23])
@pytest.mark.parametrize("rows", [10_000, 1_000_000])
def test_the_rule_of_the_page_holds_at_every_size(share: float, rows: int) -> None:
    usual = round(share * rows)
    assert not stops(usual, rows, max(1.0, math.sqrt(usual) / 7))
    exact = math.sqrt(usual / (1 - share)) / 8
    if exact > 1.02:
        assert stops(usual, rows, exact * 0.98)
    assert not stops(usual, rows, max(1.0, exact * 1.001))
