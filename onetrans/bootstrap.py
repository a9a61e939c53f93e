"""Paired bootstrap of an AUC lift, with users as the unit that is drawn.

Impressions of one user are not independent, so a replicate draws users with
replacement and takes each drawn user's rows whole.  Both models are measured on
the same draws, so what they share cancels in the difference (a paired
comparison).  The interval is the percentile interval of the differences.

Each replicate's AUC is exact.  Drawing a user k times is the same as giving its
rows the weight k, and weights do not change the order of the scores, so every
score is sorted once and a replicate costs one pass over the rows.

Shape suffixes:

    N  rows        P  positive rows     M  negative rows, by rising score
    U  users       B  replicates that are computed together
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onetrans.errors import BadDataError

Floats = npt.NDArray[np.float64]

_CHUNK_BYTES = 48 << 20
_BYTES_PER_ROW = 3 * 8  # the gathered weights, their running sum, and the sums gathered for the positives
_MOST_TOGETHER = 64


class ResampledAuc:
    """The AUC of one score under any weighting of the users; the rows are sorted once, here."""

    def __init__(self, label_N: npt.ArrayLike, score_N: npt.ArrayLike, user_N: npt.ArrayLike) -> None:
        """Prepare the rows.

        Args:
            label_N: 0 or 1.
            score_N: finite; only its order matters.
            user_N: row of each user in the weights, ``0..U-1``.

        Raises:
            BadDataError: if lengths differ or a score is not finite.
        """
        label, score = np.asarray(label_N), np.asarray(score_N, dtype=np.float64)
        user = np.asarray(user_N, dtype=np.int64)
        if not label.shape == score.shape == user.shape or label.ndim != 1:
            raise BadDataError(f"lengths differ: label {label.shape}, score {score.shape}, user {user.shape}")
        if not np.isfinite(score).all():
            raise BadDataError(f"{int((~np.isfinite(score)).sum())} of {score.shape[0]} scores are not finite")
        positive_N = label > 0
        negatives = np.flatnonzero(~positive_N)
        negatives = negatives[np.argsort(score[negatives], kind="stable")]
        positives = np.flatnonzero(positive_N)
        positives = positives[np.argsort(score[positives], kind="stable")]  # neighbours read neighbouring sums
        self._negative_user_M = user[negatives]
        self._positive_user_P = user[positives]
        self._below_P = np.searchsorted(score[negatives], score[positives], side="left")
        self._through_P = np.searchsorted(score[negatives], score[positives], side="right")
        self._tied = bool((self._below_P != self._through_P).any())

    @property
    def rows(self) -> int:
        """N."""
        return self._negative_user_M.shape[0] + self._positive_user_P.shape[0]

    def auc(self, weight_UB: Floats) -> Floats:
        """Return one AUC per replicate, shape (B,); NaN where the weights leave only one class.

        Whole-number weights are summed without rounding up to 2**53 pairs, so the result is the AUC of the
        replicated rows and not an approximation of it.
        """
        replicates = weight_UB.shape[1]
        passed_MB = np.zeros((self._negative_user_M.shape[0] + 1, replicates))
        np.cumsum(weight_UB[self._negative_user_M], axis=0, out=passed_MB[1:])
        positive_PB = weight_UB[self._positive_user_P]
        # A tie counts half: doubled, it is what was passed below the score plus what was passed through it.
        doubled_PB = passed_MB[self._below_P]
        doubled_PB += passed_MB[self._through_P] if self._tied else doubled_PB
        wins_B = np.einsum("pb,pb->b", positive_PB, doubled_PB)
        pairs_B = positive_PB.sum(axis=0) * passed_MB[-1]
        return np.divide(wins_B, 2.0 * pairs_B, out=np.full(replicates, np.nan), where=pairs_B > 0)


@dataclass(frozen=True)
class Lift:
    """How much higher the candidate's AUC is than the baseline's, and how sure that is."""

    candidate: float
    """AUC of the candidate on the rows as they are."""
    baseline: float
    """AUC of the baseline on the same rows."""
    lift: float
    """Candidate less baseline."""
    low: float
    """Lower bound of the lift."""
    high: float
    """Upper bound of the lift."""
    standard_error: float
    """Standard deviation of the lift over the replicates."""
    half_width: float
    """Half the interval: a true lift of this size would be told from none about every second time."""
    confidence: float
    """Two-sided level of the interval."""
    replicates: int
    """Draws of users."""
    undefined: int
    """Draws in which one class was missing; the interval means nothing unless this is 0."""


def draw_users(rng: np.random.Generator, users: int, replicates: int) -> Floats:
    """Return how often each user is drawn in each replicate, (U, B): U draws with replacement per replicate.

    The draws depend on the generator alone, not on how many replicates are asked for at a time.
    """
    drawn = rng.integers(users, size=(replicates, users))
    drawn += np.arange(replicates)[:, None] * users
    counts = np.bincount(drawn.ravel(), minlength=replicates * users)
    return np.ascontiguousarray(counts.reshape(replicates, users).T, dtype=np.float64)


def paired_lifts(
    tasks: Mapping[str, tuple[ResampledAuc, ResampledAuc]],
    users: int,
    replicates: int,
    confidence: float,
    seed: int,
) -> dict[str, Lift]:
    """Return the lift of every task, all tasks and both models on the same draws of users.

    Args:
        tasks: per task the candidate's and the baseline's rows, (candidate, baseline).
        users: U; rows of a task may belong to fewer.
        replicates: draws of users.
        confidence: two-sided level of the percentile interval, for example 0.9.
        seed: seed of the draws.

    Memory stays below about 150 MB up to a million rows and grows with the rows beyond; time is rows times replicates.
    """
    differences: dict[str, list[Floats]] = {task: [] for task in tasks}
    largest = max(auc.rows for pair in tasks.values() for auc in pair)
    for weight_UB in _draws(users, replicates, seed, max(largest, users)):
        for task, (candidate, baseline) in tasks.items():
            differences[task].append(candidate.auc(weight_UB) - baseline.auc(weight_UB))
    whole_U1 = np.ones((users, 1))
    return {
        task: _lift(float(pair[0].auc(whole_U1)[0]), float(pair[1].auc(whole_U1)[0]), differences[task], confidence)
        for task, pair in tasks.items()
    }


def _draws(users: int, replicates: int, seed: int, rows: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    together = int(np.clip(_CHUNK_BYTES // (rows * _BYTES_PER_ROW), 1, _MOST_TOGETHER))
    for start in range(0, replicates, together):
        yield draw_users(rng, users, min(together, replicates - start))


def _lift(candidate: float, baseline: float, differences: list[Floats], confidence: float) -> Lift:
    difference = np.concatenate(differences)
    defined = difference[np.isfinite(difference)]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail]) if defined.size else (np.nan, np.nan)
    return Lift(
        candidate=candidate,
        baseline=baseline,
        lift=candidate - baseline,
        low=float(low),
        high=float(high),
        standard_error=float(defined.std(ddof=1)) if defined.size > 1 else float("nan"),
        half_width=float((high - low) / 2.0),
        confidence=confidence,
        replicates=int(difference.size),
        undefined=int(difference.size - defined.size),
    )
