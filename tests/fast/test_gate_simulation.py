"""The gate's stated error rates, by simulation (nightly): equal models, a known lift, and the cover of the interval."""

import math

import pytest

from benchmarks.gate_errors import BETTER, EQUAL, LARGE, SETTINGS, SMALL, STATED, count_days, plot, true_lift
from onetrans.scores import TASKS


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_equal_models_are_promoted_at_most_as_often_as_stated_and_intervals_cover_the_truth():
    blocks = [count_days(1000, SMALL, EQUAL, true_lift(EQUAL), seed=seed) for seed in (0, 10_000, 30_000)]
    assert max(counted.promoted for counted in blocks) / 1000 <= STATED
    days = sum(counted.days for counted in blocks)
    level = SETTINGS.confidence
    for task in TASKS:
        shown, covered = (sum(getattr(counted, kind)[task] for counted in blocks) for kind in ("shown", "covered"))
        assert shown / days <= STATED + 3 * math.sqrt(STATED * (1 - STATED) / days)
        assert abs(covered / days - level) <= 3 * math.sqrt(level * (1 - level) / days)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_lift_of_half_a_percent_is_found_on_two_hundred_thousand_rows():
    truth = true_lift(BETTER)
    assert truth["ctr"] == pytest.approx(0.005, abs=0.0005)
    counted = count_days(30, LARGE, BETTER, truth, seed=20_000)
    assert counted.promoted / 30 >= 0.8
    assert min(counted.covered.values()) >= 22, "of 30 days at 90 %: fewer happen once in a thousand times"


def test_the_chart_is_made_of_what_was_counted():
    counted = count_days(3, (2000, 200), EQUAL, true_lift(EQUAL))
    assert counted.days == 3
    assert plot({"a": [(0.0, counted), (0.005, counted)], "b": [(0.0, counted)]}).startswith("<svg")
