"""Ranking metrics: exact AUC, per-user AUC, log loss, calibration; all in float64.

Nothing is binned or sampled: AUC is the share of (positive, negative) pairs that
the scores put in the right order, with a tie counted as half (Hanley and McNeil,
1982), computed from ranks in O(N log N).

Shape suffixes:

    N  rows (impressions)      U  users that have both classes
    G  runs of equal score, or of equal (user, score)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onetrans.errors import BadDataError

Floats = npt.NDArray[np.float64]

_SMALLEST_PROBABILITY = float(np.finfo(np.float64).eps)


class UndefinedMetricError(BadDataError):
    """The figure does not exist for these rows, for example an AUC where every label is the same."""


@dataclass(frozen=True)
class UserAuc:
    """AUC of every user that has both a positive and a negative row."""

    user_U: npt.NDArray[Any]
    """The users, sorted."""
    auc_U: Floats
    """AUC over each user's own rows."""
    impressions_U: Floats
    """Rows of each user, the weight of its AUC."""

    def mean(self, user_weight_U: npt.ArrayLike | None = None) -> float:
        """Return the impression-weighted mean AUC; ``user_weight_U`` counts a user several times (bootstrap).

        Raises:
            UndefinedMetricError: if no user (of a weight above 0) has both classes.
        """
        weight_U = self.impressions_U
        if user_weight_U is not None:
            weight_U = weight_U * _weights(user_weight_U, weight_U.shape[0])
        total = float(weight_U.sum())
        if not total > 0:
            raise UndefinedMetricError("UAUC is undefined: no user has both a positive and a negative row")
        return float((weight_U * self.auc_U).sum() / total)


class RankedLabels:
    """Labels in the order of their scores: sorted once, then each weighting of the rows costs one pass."""

    def __init__(self, label_N: npt.ArrayLike, score_N: npt.ArrayLike) -> None:
        label, score = _labels(label_N), _finite("score", score_N)
        _same_length(label=label, score=score)
        self._order_N = np.argsort(score, kind="stable")
        self._start_G = _run_starts(score[self._order_N])
        self._label_N = label[self._order_N]

    def auc(self, weight_N: npt.ArrayLike | None = None) -> float:
        """Return the AUC; a weight of k counts a row k times (0 leaves it out), so integer weights stay exact.

        Raises:
            UndefinedMetricError: if the rows of a weight above 0 are all positive or all negative.
            BadDataError: if the weights are negative, not finite or of another length.
        """
        weight = np.ones(self._label_N.shape[0])
        if weight_N is not None:
            weight = _weights(weight_N, weight.shape[0])[self._order_N]
        positive_G = np.add.reduceat(weight * self._label_N, self._start_G)
        negative_G = np.add.reduceat(weight * (1.0 - self._label_N), self._start_G)
        below_G = np.cumsum(negative_G) - negative_G
        positives, negatives = float(positive_G.sum()), float(negative_G.sum())
        if not (positives > 0 and negatives > 0):
            raise UndefinedMetricError(
                f"AUC is undefined: the rows hold {positives:g} positives and {negatives:g} negatives; it needs both"
            )
        # Twice the pairs won, so that integer weights never meet a fraction before the division.
        return float((positive_G * (2.0 * below_G + negative_G)).sum() / (2.0 * positives * negatives))


def auc(label_N: npt.ArrayLike, score_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None) -> float:
    """Return the exact area under the ROC curve, ties counted as half.

    Args:
        label_N: 0 or 1.
        score_N: any finite number; only its order matters.
        weight_N: not negative; default 1 for every row.

    Raises:
        UndefinedMetricError: if all labels are the same.
        BadDataError: on no rows, a length that differs, a label outside {0, 1}, a NaN or an infinity.
    """
    if weight_N is not None:
        return RankedLabels(label_N, score_N).auc(weight_N)
    label, score = _labels(label_N), _finite("score", score_N)
    _same_length(label=label, score=score)
    # Without weights the classes are sorted apart: values sort several times faster than the order of rows does.
    positive_N = label > 0
    fewer, more = np.sort(score[positive_N]), np.sort(score[~positive_N])
    if not (fewer.size and more.size):
        raise UndefinedMetricError(
            f"AUC is undefined: the rows hold {fewer.size} positives and {more.size} negatives; it needs both"
        )
    swapped = fewer.size > more.size
    if swapped:
        fewer, more = more, fewer
    # Whole numbers, so nothing is rounded before the division: twice what lies below, and once more what is equal.
    below = np.searchsorted(more, fewer, side="left").sum() + np.searchsorted(more, fewer, side="right").sum()
    share = int(below) / (2 * fewer.size * more.size)
    return 1.0 - share if swapped else share


def user_auc(label_N: npt.ArrayLike, score_N: npt.ArrayLike, user_N: npt.ArrayLike) -> UserAuc:
    """Return the AUC of each user that has both classes; ``user_N`` holds ids of any sortable type.

    Raises:
        BadDataError: as for :func:`auc`; no user with both classes is not an error here.
    """
    label, score, user = _labels(label_N), _finite("score", score_N), np.asarray(user_N)
    _same_length(label=label, score=score, user=user)
    names, code_N = np.unique(user, return_inverse=True)
    order_N = np.lexsort((score, code_N))
    code_N, score, label = code_N[order_N], score[order_N], label[order_N]
    start_G = _run_starts(code_N, score)
    user_G = code_N[start_G]
    positive_G = np.add.reduceat(label, start_G)
    negative_G = np.add.reduceat(1.0 - label, start_G)

    positives = np.bincount(user_G, positive_G, names.shape[0])
    negatives = np.bincount(user_G, negative_G, names.shape[0])
    below_G = np.cumsum(negative_G) - negative_G
    below_G -= (np.cumsum(negatives) - negatives)[user_G]  # count the same user's negatives only
    doubled_wins = np.bincount(user_G, positive_G * (2.0 * below_G + negative_G), names.shape[0])

    both = (positives > 0) & (negatives > 0)
    return UserAuc(
        user_U=names[both],
        auc_U=doubled_wins[both] / (2.0 * positives[both] * negatives[both]),
        impressions_U=(positives + negatives)[both].astype(np.float64),
    )


def uauc(label_N: npt.ArrayLike, score_N: npt.ArrayLike, user_N: npt.ArrayLike) -> float:
    """Return sum(n_u * AUC_u) / sum(n_u) over users with both classes (paper section 4.1, "UAUC").

    Raises:
        UndefinedMetricError: if no user has both classes.
        BadDataError: as for :func:`auc`.
    """
    return user_auc(label_N, score_N, user_N).mean()


def log_loss(label_N: npt.ArrayLike, probability_N: npt.ArrayLike) -> float:
    """Return the mean binary cross-entropy in nats; probabilities are kept 2.2e-16 away from 0 and 1.

    Raises:
        BadDataError: on no rows, a length that differs, a label outside {0, 1}, a probability outside [0, 1] or NaN.
    """
    return float(cross_entropies(label_N, probability_N).mean())


def cross_entropies(label_N: npt.ArrayLike, probability_N: npt.ArrayLike) -> Floats:
    """Return each row's binary cross-entropy in nats, (N,); :func:`log_loss` is their mean."""
    label, probability = _labels(label_N), _probabilities(probability_N)
    _same_length(label=label, probability=probability)
    clipped = np.clip(probability, _SMALLEST_PROBABILITY, 1.0 - _SMALLEST_PROBABILITY)
    return -np.where(label > 0, np.log(clipped), np.log1p(-clipped))


def calibration(label_N: npt.ArrayLike, probability_N: npt.ArrayLike) -> float:
    """Return mean prediction over mean label: above 1 the model promises too much.

    Raises:
        UndefinedMetricError: if no label is positive.
        BadDataError: as for :func:`log_loss`.
    """
    label, probability = _labels(label_N), _probabilities(probability_N)
    _same_length(label=label, probability=probability)
    if not label.any():
        raise UndefinedMetricError(f"calibration is undefined: none of {label.shape[0]} rows is positive")
    return float(probability.mean() / label.mean())


@dataclass(frozen=True)
class Metrics:
    """Figures of one model on some rows; CVR figures are over clicked impressions only.

    A figure is None where it does not exist for these rows (an AUC of one class, a CVR figure without clicks).
    """

    ctr_auc: float | None
    """AUC of click."""
    ctr_uauc: float | None
    """Impression-weighted per-user AUC of click."""
    cvr_auc: float | None
    """AUC of conversion given click."""
    cvr_uauc: float | None
    """Per-user AUC of conversion given click, weighted by each user's clicks."""
    ctr_log_loss: float | None
    """Mean cross-entropy of click, nats."""
    cvr_log_loss: float | None
    """Mean cross-entropy of conversion given click, nats."""
    ctr_calibration: float | None
    """Mean predicted over mean observed click rate."""
    cvr_calibration: float | None
    """Mean predicted over mean observed conversion rate."""
    rows: int
    """Impressions."""
    clicks: int
    """Clicked impressions."""
    conversions: int
    """Clicked impressions that converted."""
    users: int
    """Distinct users."""

    @classmethod
    def compute(
        cls,
        *,
        click_N: npt.ArrayLike,
        conversion_N: npt.ArrayLike,
        ctr_N: npt.ArrayLike,
        cvr_N: npt.ArrayLike,
        user_N: npt.ArrayLike,
    ) -> Metrics:
        """Compute every figure from labels, probabilities and users, one entry per impression.

        Raises:
            BadDataError: on no rows, lengths that differ, labels outside {0, 1}, probabilities outside [0, 1] or NaN.
        """
        click, conversion, user = _labels(click_N), _labels(conversion_N), np.asarray(user_N)
        ctr, cvr = _probabilities(ctr_N), _probabilities(cvr_N)
        _same_length(click=click, conversion=conversion, ctr=ctr, cvr=cvr, user=user)
        clicked = click > 0
        converted, clicked_cvr, clicker = conversion[clicked], cvr[clicked], user[clicked]
        some = bool(clicked.any())
        return cls(
            ctr_auc=_or_none(lambda: auc(click, ctr)),
            ctr_uauc=_or_none(lambda: uauc(click, ctr, user)),
            cvr_auc=_or_none(lambda: auc(converted, clicked_cvr)) if some else None,
            cvr_uauc=_or_none(lambda: uauc(converted, clicked_cvr, clicker)) if some else None,
            ctr_log_loss=log_loss(click, ctr),
            cvr_log_loss=log_loss(converted, clicked_cvr) if some else None,
            ctr_calibration=_or_none(lambda: calibration(click, ctr)),
            cvr_calibration=_or_none(lambda: calibration(converted, clicked_cvr)) if some else None,
            rows=int(click.shape[0]),
            clicks=int(click.sum()),
            conversions=int(converted.sum()),
            users=int(np.unique(user).shape[0]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Metrics:
        """Read what :meth:`to_dict` wrote."""
        return cls(**data)

    def figures(self) -> dict[str, float]:
        """Return the figures that exist, by name, for a tracker that takes numbers only."""
        return {name: float(value) for name, value in asdict(self).items() if value is not None}


def _or_none(figure: Callable[[], float]) -> float | None:
    try:
        return figure()
    except UndefinedMetricError:
        return None


def _run_starts(*sorted_N: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return where a new run of equal values begins in arrays that are sorted together."""
    new = np.ones(sorted_N[0].shape[0], dtype=bool)
    new[1:] = np.any([values[1:] != values[:-1] for values in sorted_N], axis=0)
    return np.flatnonzero(new)


def _finite(name: str, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.shape[0] == 0:
        raise BadDataError(f"{name}: expected one value per row and at least one row, got shape {array.shape}")
    bad = ~np.isfinite(array)
    if bad.any():
        row = int(np.argmax(bad))
        raise BadDataError(
            f"{name}: {int(bad.sum())} of {array.shape[0]} values are not finite; row {row}: {array[row]}"
        )
    return array


def _labels(values: npt.ArrayLike) -> Floats:
    array = _finite("label", values)
    bad = (array != 0) & (array != 1)
    if bad.any():
        row = int(np.argmax(bad))
        raise BadDataError(
            f"label: {int(bad.sum())} of {array.shape[0]} are neither 0 nor 1; row {row}: {array[row]:g}"
        )
    return array


def _probabilities(values: npt.ArrayLike) -> Floats:
    array = _finite("probability", values)
    bad = (array < 0) | (array > 1)
    if bad.any():
        row = int(np.argmax(bad))
        raise BadDataError(
            f"probability: {int(bad.sum())} of {array.shape[0]} lie outside [0, 1]; row {row}: {array[row]:g}"
        )
    return array


def _weights(values: npt.ArrayLike, length: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (length,):
        raise BadDataError(f"weight: expected {length} values, got shape {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise BadDataError("weight: every weight must be finite and not negative")
    return array


def _same_length(**arrays: npt.NDArray[Any]) -> None:
    lengths = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise BadDataError("lengths differ: " + ", ".join(f"{name} {length}" for name, length in lengths.items()))
