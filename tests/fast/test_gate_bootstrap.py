"""The bootstrap's arithmetic against scikit-learn on the same draws, and its error rates in a simulation."""

import numpy as np
import pytest
from gate_world import paired_lifts
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from onetrans.bootstrap import ResampledAuc, draw_users, effective_number, widening
from onetrans.errors import BadDataError


def _day(seed: int, rows: int = 400, users: int = 60, lift: float = 0.0, levels: int | None = None):
    """Rows whose users differ in how easy they are; ``lift`` separates the candidate from the baseline."""
    rng = np.random.default_rng(seed)
    user_N = rng.integers(users, size=rows)
    ease_U = rng.normal(size=users)
    truth_N = ease_U[user_N] + rng.normal(size=rows)
    label_N = (truth_N + rng.normal(size=rows) > 0).astype(np.int64)
    baseline_N = truth_N + rng.normal(scale=1.5, size=rows)
    candidate_N = truth_N + rng.normal(scale=1.5 - lift, size=rows)
    if levels:
        baseline_N, candidate_N = (np.round(s * levels) / levels for s in (baseline_N, candidate_N))
    return user_N, label_N, candidate_N, baseline_N


def _replicated_rows(user_N, weight_U):
    """The rows of a replicate written out: a user drawn k times brings its rows k times."""
    return np.repeat(np.arange(user_N.shape[0]), weight_U[user_N].astype(int))


@pytest.mark.parametrize("levels", [None, 2])
def test_every_replicate_equals_scikit_learn_on_the_replicated_rows(levels):
    user_N, label_N, score_N, _ = _day(seed=1, levels=levels)
    weight_BU = draw_users(np.random.default_rng(5), 60, 25)
    ours_B = ResampledAuc(label_N, score_N, user_N).auc(weight_BU)
    for b, ours in enumerate(ours_B):
        rows = _replicated_rows(user_N, weight_BU[b])
        assert ours == pytest.approx(roc_auc_score(label_N[rows], score_N[rows]), abs=1e-12)


def test_interval_equals_a_naive_bootstrap_on_the_same_draws():
    user_N, label_N, candidate_N, baseline_N = _day(seed=2, lift=0.5)
    pair = (ResampledAuc(label_N, candidate_N, user_N), ResampledAuc(label_N, baseline_N, user_N))
    lift = paired_lifts({"ctr": pair}, users=60, replicates=150, confidence=0.9, seed=7)["ctr"]

    rng, naive = np.random.default_rng(7), []
    for _ in range(150):
        drawn = rng.integers(60, size=60)
        rows = np.concatenate([np.flatnonzero(user_N == user) for user in drawn])
        naive.append(roc_auc_score(label_N[rows], candidate_N[rows]) - roc_auc_score(label_N[rows], baseline_N[rows]))
    wider = widening(min(effective_number(np.bincount(user_N[label_N == label])) for label in (0, 1)), 0.9)
    assert 1.0 < wider < 1.1
    expected = [lift.lift + wider * (q - lift.lift) for q in np.quantile(naive, [0.05, 0.95], method="weibull")]
    assert (lift.low, lift.high) == pytest.approx(tuple(expected), abs=1e-12)
    assert lift.standard_error == pytest.approx(np.std(naive, ddof=1), abs=1e-12)
    assert lift.lift == pytest.approx(
        roc_auc_score(label_N, candidate_N) - roc_auc_score(label_N, baseline_N), abs=1e-12
    )


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 5)), min_size=2, max_size=40),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_weights_count_rows_with_ties_at_every_level(rows, weights):
    label_N, score_N, user_N = (np.array(column) for column in zip(*rows, strict=True))
    weight_1U = np.array(weights)[None, :]
    ours = ResampledAuc(label_N, score_N, user_N).auc(weight_1U)[0]
    kept = _replicated_rows(user_N, weight_1U[0])
    if len(set(label_N[kept])) < 2:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(roc_auc_score(label_N[kept], score_N[kept]), abs=1e-12)


def test_draws_do_not_depend_on_how_many_are_made_at_a_time():
    together = draw_users(np.random.default_rng(3), 101, 10)
    rng = np.random.default_rng(3)
    apart = np.concatenate([draw_users(rng, 101, n) for n in (1, 4, 5)])
    assert (together == apart).all()
    assert (together.sum(axis=1) == 101).all()


def test_both_tasks_and_models_share_the_draws():
    user_N, label_N, candidate_N, _ = _day(seed=4)
    same = ResampledAuc(label_N, candidate_N, user_N)
    lifts = paired_lifts({"ctr": (same, same), "cvr": (same, same)}, 60, 50, 0.9, seed=1)
    assert {(lift.low, lift.high, lift.standard_error) for lift in lifts.values()} == {(0.0, 0.0, 0.0)}


def test_few_effective_users_widen_an_interval_as_students_quantile_does():
    assert effective_number([5, 5, 5, 5]) == 4
    assert effective_number([1000, 1, 1, 1]) == pytest.approx(1.0, abs=0.01)
    # t(0.95; 19) = 1.7291, t(0.975; 9) = 2.2622, from the usual tables
    assert widening(20, 0.90) == pytest.approx(1.7291 / 1.6449 * 1.05, rel=2e-3)
    assert widening(10, 0.95) == pytest.approx(2.2622 / 1.9600 * 1.1, rel=5e-3)
    assert widening(1e9, 0.9) == pytest.approx(1.0)
    assert widening(2.0, 0.9) == np.inf


def test_draws_that_lose_a_class_are_counted():
    user_N = np.array([0, 0, 1, 1])
    rows = ResampledAuc([1, 0, 0, 0], [0.9, 0.1, 0.2, 0.3], user_N)
    lift = paired_lifts({"ctr": (rows, rows)}, users=2, replicates=400, confidence=0.9, seed=1)["ctr"]
    assert lift.undefined == pytest.approx(100, abs=40), "user 0 is missing from a quarter of all draws"
    assert lift.replicates == 400


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(BadDataError, match="1 of 2 scores are not finite"):
        ResampledAuc([1, 0], [0.5, np.nan], [0, 1])


def _day_of_misjudged_users(seed: int, users: int = 80, impressions: int = 12):
    """Two equally good models, each of which reads some users' taste too weakly or the wrong way round."""
    rng = np.random.default_rng(seed)
    user_N = np.repeat(np.arange(users), impressions)
    appeal_N = rng.normal(size=user_N.shape)
    label_N = (appeal_N + rng.normal(size=appeal_N.shape) > 0).astype(np.int64)
    candidate_N, baseline_N = (rng.normal(1.0, 1.5, size=users)[user_N] * appeal_N for _ in range(2))
    return user_N, label_N, candidate_N, baseline_N


def _intervals(days: int, *, draw_rows: bool = False) -> np.ndarray:
    intervals = []
    for seed in range(days):
        user_N, label_N, candidate_N, baseline_N = _day_of_misjudged_users(seed)
        drawn_N = np.arange(user_N.shape[0]) if draw_rows else user_N
        pair = (ResampledAuc(label_N, candidate_N, drawn_N), ResampledAuc(label_N, baseline_N, drawn_N))
        found = paired_lifts({"ctr": pair}, int(drawn_N.max()) + 1, 200, 0.9, seed)["ctr"]
        intervals.append((found.low, found.high))
    return np.array(intervals)


def test_intervals_cover_the_truth_as_often_as_they_say_and_rarely_promote_a_model_that_is_no_better():
    low, high = _intervals(days=300).T
    assert 0.84 <= np.mean((low <= 0) & (high >= 0)) <= 0.96  # 0.90, three standard errors of 300 days
    assert np.mean(low > 0) <= 0.09  # 0.05, three standard errors of 300 days


def test_drawing_rows_instead_of_users_would_promote_far_too_often():
    """Shows that the simulation has the dependence that users bring, so that the test above can fail."""
    low, _ = _intervals(days=150, draw_rows=True).T
    assert np.mean(low > 0) > 0.12
