"""Paired bootstrap of ranking figures, with users as the unit that is drawn.

Impressions of one user are not independent, so a replicate draws users with
replacement and takes each drawn user's rows whole.  All models and figures are
measured on the same draws, so what they share cancels in a difference (a paired
comparison).  An interval is the percentile interval of the replicates, widened for
the number of *effective* users: where a few users have most of the rows, there is
less to draw from than their number says, and percentiles alone hold the truth too
seldom (:func:`widening`).

Drawing a user k times is the same as giving its rows the weight k.  Every figure
here is a ratio of two sums over rows, so it is exact in each replicate, and rows
of several days add up without comparing a row of one day with a row of another:

* AUC: pairs won over pairs.  Weights do not change the order of the scores, so the
  rows are sorted once and a replicate costs one pass over them
  (:class:`ResampledAuc`);
* UAUC, log loss and calibration: sums over users, each known before anything is
  drawn, so a replicate costs one multiplication with the weights
  (:class:`UserSums`).

Shape suffixes:

    N  rows        P  positive rows     M  negative rows, by rising score
    U  users       B  replicates        K  sums over users
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from onetrans.cores import usable_cores
from onetrans.errors import BadDataError
from onetrans.progress import SAID_AFTER_S, Progress

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[np.int32]
Key = TypeVar("Key", bound=Hashable)

_NORMAL = NormalDist()
_POWER = 0.8
_ROWS_TOGETHER = 4_000_000
_MOST_TOGETHER = 64


class ResampledAuc:
    """The AUC of one score under any weighting of the users; the rows are sorted once, here."""

    def __init__(self, label_N: npt.ArrayLike, score_N: npt.ArrayLike, user_N: npt.ArrayLike) -> None:
        """Prepare the rows.

        Args:
            label_N: 0 or 1.
            score_N: finite; only its order matters.
            user_N: column of each user in the weights, ``0..U-1``.

        Raises:
            BadDataError: if lengths differ, a score is not finite, or there are more rows than sums of whole numbers
                can count (2**30).
        """
        label, score = np.asarray(label_N), np.asarray(score_N, dtype=np.float64)
        user = np.asarray(user_N, dtype=np.int64)
        if not label.shape == score.shape == user.shape or label.ndim != 1:
            raise BadDataError(f"lengths differ: label {label.shape}, score {score.shape}, user {user.shape}")
        if not np.isfinite(score).all():
            raise BadDataError(f"{int((~np.isfinite(score)).sum())} of {score.shape[0]} scores are not finite")
        if label.shape[0] >= 1 << 30:
            raise BadDataError(f"{label.shape[0]:,} rows are more than one bootstrap takes (2**30)")
        positive_N = label > 0
        negatives, positives = np.flatnonzero(~positive_N), np.flatnonzero(positive_N)
        # Equal scores may come in any order: what is below and what is through a score is searched for.
        negatives = negatives[np.argsort(score[negatives])]
        positives = positives[np.argsort(score[positives])]  # neighbours read neighbouring sums
        self._negative_user_M = user[negatives]
        self._positive_user_P = user[positives]
        self._below_P = np.searchsorted(score[negatives], score[positives], side="left")
        through_P = np.searchsorted(score[negatives], score[positives], side="right")
        # A tie counts half: doubled, it is what was passed below the score plus what was passed through it.
        self._through_P = through_P if (self._below_P != through_P).any() else self._below_P

    @property
    def rows(self) -> int:
        """N."""
        return self._negative_user_M.shape[0] + self._positive_user_P.shape[0]

    def classes_of(self, users: int) -> tuple[Floats, Floats]:
        """Return how many positive and how many negative rows each user has, (U,) and (U,)."""
        positive_U, negative_U = (
            np.bincount(user, minlength=users).astype(np.float64)
            for user in (self._positive_user_P, self._negative_user_M)
        )
        return positive_U, negative_U

    def sums(self, weight_BU: Weights) -> tuple[Floats, Floats]:
        """Return twice the pairs won and twice the pairs there are, per replicate: (B,) and (B,).

        Sums of whole numbers are exact up to 2**53 pairs, so the AUC is that of the replicated rows and no
        approximation of it.
        """
        replicates, negatives = weight_BU.shape[0], self._negative_user_M.shape[0]
        won_B, pairs_B = np.zeros(replicates), np.zeros(replicates)
        weight_M = np.empty(negatives, dtype=np.int32)
        passed_M1 = np.zeros(negatives + 1, dtype=np.int32)
        for b, weight_U in enumerate(weight_BU):
            np.take(weight_U, self._negative_user_M, out=weight_M, mode="clip")  # "clip" writes without a buffer
            np.cumsum(weight_M, out=passed_M1[1:])
            positive_P = weight_U[self._positive_user_P].astype(np.float64)
            doubled_P = passed_M1[self._below_P].astype(np.float64)
            doubled_P += doubled_P if self._through_P is self._below_P else passed_M1[self._through_P]
            # Not "@": BLAS would start threads of its own, beside those that count replicates already.
            won_B[b] = np.einsum("p,p->", positive_P, doubled_P)
            pairs_B[b] = 2.0 * positive_P.sum() * float(passed_M1[-1])
        return won_B, pairs_B

    def auc(self, weight_BU: npt.ArrayLike) -> Floats:
        """Return one AUC per replicate, shape (B,); NaN where the weights leave only one class."""
        return _ratio(*self.sums(np.ascontiguousarray(weight_BU, dtype=np.int32)))


@dataclass(frozen=True)
class UserSums:
    """A figure that is a sum over users divided by another: UAUC, log loss, calibration."""

    numerator_U: Floats
    """Each user's part of the numerator."""
    denominator_U: Floats
    """Each user's part of the denominator."""


Part = ResampledAuc | UserSums
"""What adds to a figure: its rows of one day."""


@dataclass(frozen=True)
class Replicates:
    """One figure, as it is and in every draw of users."""

    value: float
    """The figure on the rows as they are; NaN where it does not exist."""
    value_B: Floats
    """The figure in each draw; NaN where it does not exist."""
    effective_users: float = np.inf
    """Users of equal activity that would tell as much as these do."""


@dataclass(frozen=True)
class Interval:
    """A figure and how sure it is."""

    value: float
    """On the rows as they are."""
    low: float
    """Lower bound."""
    high: float
    """Upper bound."""
    undefined: int
    """Draws in which the figure does not exist; the bounds mean nothing unless this is 0."""

    @property
    def bounded(self) -> bool:
        """Whether there is an interval: the figure exists in every draw, and there are users enough to draw from."""
        return not self.undefined and bool(np.isfinite(self.low) and np.isfinite(self.high))

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both bounds, or None if there is no interval."""
        return (self.low, self.high) if self.bounded else None

    @classmethod
    def of(cls, value: float, value_B: Floats, confidence: float, effective_users: float) -> Interval:
        """Return the widened percentile interval at a two-sided level, for example 0.9."""
        low, high, _, undefined = _bounds(value, value_B, confidence, widening(effective_users, confidence))
        return cls(value, low, high, undefined)


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
    """Half the interval: a true lift of this size is told from none about every second time."""
    detectable: float
    """A true lift so far above a threshold is shown to be above it in 4 of 5 cases."""
    confidence: float
    """Two-sided level of the interval."""
    replicates: int
    """Draws of users."""
    undefined: int
    """Draws in which one class was missing; the interval means nothing unless this is 0."""
    effective_users: float
    """Users of equal activity that would tell as much; the interval is widened for them."""

    @property
    def bounded(self) -> bool:
        """Whether there is an interval: no draw is without a class, and there are users enough to draw from."""
        return not self.undefined and bool(np.isfinite(self.low) and np.isfinite(self.high))

    @classmethod
    def between(cls, candidate: Replicates, baseline: Replicates, confidence: float) -> Lift:
        """Return the lift of one figure over another that was measured on the same draws."""
        difference_B = candidate.value_B - baseline.value_B
        value, effective = candidate.value - baseline.value, min(candidate.effective_users, baseline.effective_users)
        wider = widening(effective, confidence)
        low, high, error, undefined = _bounds(value, difference_B, confidence, wider)
        return cls(
            candidate=candidate.value,
            baseline=baseline.value,
            lift=value,
            low=low,
            high=high,
            standard_error=error,
            half_width=(high - low) / 2.0,
            detectable=error * wider * (_NORMAL.inv_cdf((1.0 + confidence) / 2.0) + _NORMAL.inv_cdf(_POWER)),
            confidence=confidence,
            replicates=int(difference_B.size),
            undefined=undefined,
            effective_users=effective,
        )


def effective_number(rows_U: npt.ArrayLike) -> float:
    """Return how many users of equal activity tell as much: (sum n)^2 / sum n^2 (Kish 1965); 0 for no rows."""
    rows = np.asarray(rows_U, dtype=np.float64)
    return float(rows.sum() ** 2 / max(np.square(rows).sum(), 1e-300))


def widening(effective_users: float, confidence: float) -> float:
    """Return the factor by which a percentile interval is widened for so many effective users; 1 for many.

    Two corrections of the order 1 / n, both for few or uneven clusters: the quantile is Student's with n - 1 degrees of
    freedom in place of the normal one, since the spread itself is estimated; and the spread is that of the jackknife,
    which leaves a user's own pull on the estimate out, larger by about 1 + 1/n.  Below 3 effective users there is no
    honest interval, and the factor is infinite.
    """
    if effective_users < 3.0:
        return float("inf")
    z = _NORMAL.inv_cdf((1.0 + confidence) / 2.0)
    freedom = effective_users - 1.0
    # Student's quantile by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / z * (1.0 + 1.0 / effective_users)


def draw_users(rng: np.random.Generator, users: int, replicates: int) -> Weights:
    """Return how often each user is drawn in each replicate, (B, U): U draws with replacement per replicate.

    The draws depend on the generator alone, not on how many replicates are asked for at a time.
    """
    weight_BU = np.empty((replicates, users), dtype=np.int32)
    for weight_U in weight_BU:
        weight_U[:] = np.bincount(rng.integers(users, size=users), minlength=users)
    return weight_BU


def resample(
    figures: Mapping[Key, Sequence[Part]], users: int, replicates: int, seed: int, threads: int | None = None
) -> dict[Key, Replicates]:
    """Return every figure as it is and on the same draws of users.

    Args:
        figures: per figure its parts, all of one kind; their sums are added before they are divided.
        users: U; rows of a part may belong to fewer.
        replicates: draws of users.
        seed: seed of the draws.
        threads: threads that count (default: as many as this process may use); the result does not depend on them.

    Time is rows times replicates.  Memory beside the rows is about 30 bytes per row of the largest part and thread.
    """
    keys = list(figures)
    sums = _LinearSums([part for parts in figures.values() for part in parts if isinstance(part, UserSums)])

    def measured(weight_BU: Weights) -> list[Floats]:
        linear = iter(sums.of(weight_BU))
        values = []
        for key in keys:
            numerator_B, denominator_B = np.zeros(weight_BU.shape[0]), np.zeros(weight_BU.shape[0])
            for part in figures[key]:
                above_B, below_B = part.sums(weight_BU) if isinstance(part, ResampledAuc) else next(linear)
                numerator_B += above_B
                denominator_B += below_B
            values.append(_ratio(numerator_B, denominator_B))
        return values

    rows = sum(part.rows for parts in figures.values() for part in parts if isinstance(part, ResampledAuc))
    together = int(np.clip(_ROWS_TOGETHER // max(rows, users, 1), 1, _MOST_TOGETHER))
    whole = measured(np.ones((1, users), dtype=np.int32))
    chunks = []
    with Progress(replicates, "draws", "bootstrap over users", after=SAID_AFTER_S) as progress:
        for chunk in _in_turns(measured, _draws(users, replicates, seed, together), threads or usable_cores()):
            chunks.append(chunk)
            progress.advance(len(chunk[0]) if chunk else 0)
    return {
        key: Replicates(
            float(whole[k][0]), np.concatenate([chunk[k] for chunk in chunks]), _effective(figures[key], users)
        )
        for k, key in enumerate(keys)
    }


class _LinearSums:
    """All sums over users of all figures, as one matrix: one multiplication per chunk of replicates."""

    def __init__(self, parts: Sequence[UserSums]) -> None:
        columns = [column for part in parts for column in (part.numerator_U, part.denominator_U)]
        self._sums_UK = np.column_stack(columns) if columns else None

    def of(self, weight_BU: Weights) -> Iterator[tuple[Floats, Floats]]:
        if self._sums_UK is not None:
            total_BK = weight_BU.astype(np.float64) @ self._sums_UK
            for k in range(0, total_BK.shape[1], 2):
                yield total_BK[:, k], total_BK[:, k + 1]


def _draws(users: int, replicates: int, seed: int, together: int) -> Iterator[Weights]:
    rng = np.random.default_rng(seed)
    for start in range(0, replicates, together):
        yield draw_users(rng, users, min(together, replicates - start))


def _in_turns(
    measured: Callable[[Weights], list[Floats]], chunks: Iterator[Weights], threads: int
) -> Iterator[list[Floats]]:
    """Yield ``measured(chunk)`` of every chunk, in order, with few chunks in memory at a time."""
    if threads < 2:
        yield from map(measured, chunks)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[list[Floats]]] = []
        for chunk in chunks:
            waiting.append(pool.submit(measured, chunk))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _effective(parts: Sequence[Part], users: int) -> float:
    """Return the effective number of users behind a figure: for an AUC, of the class that fewer users have.

    The spread of an AUC comes from users with positives as much as from users with negatives: a few users who have
    all conversions leave little to draw from, however many others only look.
    """
    counts = [np.zeros(users), np.zeros(users)]
    for part in parts:
        both = part.classes_of(users) if isinstance(part, ResampledAuc) else (part.denominator_U,) * 2
        for count_U, rows_U in zip(counts, both, strict=True):
            count_U += rows_U
    return min(map(effective_number, counts))


def _ratio(numerator_B: Floats, denominator_B: Floats) -> Floats:
    return np.divide(numerator_B, denominator_B, out=np.full_like(numerator_B, np.nan), where=denominator_B > 0)


def _bounds(value: float, value_B: Floats, confidence: float, wider: float) -> tuple[float, float, float, int]:
    """Return the widened percentile bounds, the standard error and the number of draws without a value."""
    defined = value_B[np.isfinite(value_B)]
    tail = (1.0 - confidence) / 2.0
    # Of B draws the k-th smallest has k / (B + 1) of the distribution below it on average (Weibull): NumPy's default
    # lies further in, and with 200 draws each side would err in 5.4 % of cases where 5 % are stated.
    low, high = np.quantile(defined, [tail, 1.0 - tail], method="weibull") if defined.size else (np.nan, np.nan)
    error = float(defined.std(ddof=1)) if defined.size > 1 else float("nan")
    if low < high:  # Equal scores have an interval of one point, however few the users.
        low, high = value - wider * (value - low), value + wider * (high - value)
    return float(low), float(high), error, int(value_B.size - defined.size)
