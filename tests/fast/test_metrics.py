"""Metrics against scikit-learn, against counting pairs one by one, and what they refuse (guarantee G1)."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from onetrans.errors import BadDataError
from onetrans.metrics import (
    Metrics,
    RankedLabels,
    UndefinedMetricError,
    auc,
    calibration,
    log_loss,
    uauc,
    user_auc,
)

# Few distinct scores, so that nearly every example has ties.
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0]), st.integers(0, 3), st.integers(0, 3)),
    min_size=2,
    max_size=40,
)


def auc_by_pairs(labels, scores):
    """Count every (positive, negative) pair; None where there is no pair."""
    positives = [s for y, s in zip(labels, scores, strict=True) if y == 1]
    negatives = [s for y, s in zip(labels, scores, strict=True) if y == 0]
    pairs = list(itertools.product(positives, negatives))
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs) if pairs else None


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_auc_equals_counting_pairs(rows):
    labels, scores, _, _ = zip(*rows, strict=True)
    expected = auc_by_pairs(labels, scores)
    if expected is None:
        with pytest.raises(UndefinedMetricError):
            auc(labels, scores)
    else:
        assert auc(labels, scores) == pytest.approx(expected, abs=1e-15)


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_integer_weights_equal_repeated_rows(rows):
    labels, scores, weights, _ = (np.array(column) for column in zip(*rows, strict=True))
    expected = auc_by_pairs(np.repeat(labels, weights), np.repeat(scores, weights))
    if expected is None:
        with pytest.raises(UndefinedMetricError):
            auc(labels, scores, weights)
    else:
        assert auc(labels, scores, weights) == pytest.approx(expected, abs=1e-15)


@given(ROWS)
@settings(max_examples=200, deadline=None)
def test_uauc_equals_a_loop_over_users(rows):
    labels, scores, _, users = (np.array(column) for column in zip(*rows, strict=True))
    parts = {
        user: (auc_by_pairs(labels[users == user], scores[users == user]), (users == user).sum())
        for user in np.unique(users)
    }
    parts = {user: part for user, part in parts.items() if part[0] is not None}
    found = user_auc(labels, scores, users)
    assert list(found.user_U) == sorted(parts)
    assert found.auc_U.tolist() == pytest.approx([parts[u][0] for u in sorted(parts)], abs=1e-15)
    if parts:
        expected = sum(a * n for a, n in parts.values()) / sum(n for _, n in parts.values())
        assert uauc(labels, scores, users) == pytest.approx(expected, abs=1e-15)
    else:
        with pytest.raises(UndefinedMetricError):
            uauc(labels, scores, users)


def test_a_user_drawn_twice_weighs_twice():
    labels, scores = [1, 0, 1, 0, 0, 1], [0.9, 0.1, 0.2, 0.3, 0.5, 0.5]
    users = ["a", "a", "b", "b", "c", "c"]
    drawn = user_auc(labels, scores, users).mean([2, 0, 1])
    assert drawn == pytest.approx((2 * 2 * 1.0 + 2 * 0.5) / 6)


def test_agrees_with_scikit_learn_on_many_rows():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 20_000)
    scores = np.round(1 / (1 + np.exp(-(rng.normal(size=20_000) + labels * 0.5))), 3)
    weights = rng.random(20_000) * 3
    assert auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert auc(labels, scores, weights) == pytest.approx(
        sk.roc_auc_score(labels, scores, sample_weight=weights), abs=1e-12
    )
    assert log_loss(labels, scores) == pytest.approx(sk.log_loss(labels, scores), abs=1e-12)


def test_one_sort_serves_many_weightings():
    rng = np.random.default_rng(2)
    labels, scores = rng.integers(0, 2, 500), rng.integers(0, 20, 500)
    ranked = RankedLabels(labels, scores)
    for _ in range(5):
        weights = rng.integers(0, 4, 500)
        assert ranked.auc(weights) == auc(np.repeat(labels, weights), np.repeat(scores, weights))


def test_auc_sees_float32_ties_as_ties():
    scores = np.array([0.1, 0.1], dtype=np.float32)
    assert auc([1, 0], scores) == 0.5


def test_certain_and_wrong_costs_much_but_not_infinitely():
    assert 30 < log_loss([1], [0.0]) < 40
    assert log_loss([0, 1], [0.0, 1.0]) == pytest.approx(0.0, abs=1e-12)


def test_calibration_is_predicted_over_observed():
    assert calibration([1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]) == pytest.approx(2.0)
    with pytest.raises(UndefinedMetricError, match="none of 2 rows is positive"):
        calibration([0, 0], [0.5, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([1, 0], [float("nan"), 0.2]), "score: 1 of 2 values are not finite; row 0"),
        (lambda: auc([1, 2], [0.1, 0.2]), "label: 1 of 2 are neither 0 nor 1; row 1: 2"),
        (lambda: auc([], []), "at least one row"),
        (lambda: auc([1, 0], [0.1, 0.2, 0.3]), "lengths differ: label 2, score 3"),
        (lambda: auc([1, 1], [0.1, 0.2]), "2 positives and 0 negatives"),
        (lambda: auc([1, 0], [0.1, 0.2], [1, -1]), "not negative"),
        (lambda: auc([1, 0], [0.1, 0.2], [1, 1, 1]), "expected 2 values"),
        (lambda: log_loss([1, 0], [1.5, 0.2]), "1 of 2 lie outside"),
        (lambda: uauc([1, 1], [0.1, 0.2], ["a", "b"]), "no user has both"),
    ],
)
def test_refusals_name_what_and_where(call, message):
    with pytest.raises(BadDataError, match=message):
        call()


def test_cvr_figures_are_over_clicks_only():
    click = np.array([1, 1, 0, 1, 0, 1])
    conversion = np.array([1, 0, 0, 0, 0, 1])
    ctr = np.array([0.9, 0.8, 0.1, 0.7, 0.3, 0.6])
    cvr = np.array([0.9, 0.2, 0.99, 0.3, 0.98, 0.8])
    user = np.array(["a", "a", "a", "b", "b", "b"])
    figures = Metrics.compute(click_N=click, conversion_N=conversion, ctr_N=ctr, cvr_N=cvr, user_N=user)
    assert figures.ctr_auc == 1.0
    assert figures.cvr_auc == 1.0
    assert figures.cvr_uauc == 1.0
    assert figures.cvr_log_loss == pytest.approx(sk.log_loss([1, 0, 0, 1], [0.9, 0.2, 0.3, 0.8]))
    assert figures.cvr_calibration == pytest.approx(2.2 / 2)
    assert (figures.rows, figures.clicks, figures.conversions, figures.users) == (6, 4, 2, 2)
    assert Metrics.from_dict(figures.to_dict()) == figures
    assert set(figures.figures()) == set(figures.to_dict())


def test_figures_that_do_not_exist_are_none():
    figures = Metrics.compute(
        click_N=[0, 0], conversion_N=[0, 0], ctr_N=[0.1, 0.2], cvr_N=[0.1, 0.2], user_N=["a", "b"]
    )
    assert figures.ctr_auc is None
    assert figures.cvr_log_loss is None
    assert figures.ctr_log_loss == pytest.approx(sk.log_loss([0, 0], [0.1, 0.2], labels=[0, 1]))
    assert "cvr_auc" not in figures.figures()
