"""Where a candidate gains and loses: its AUC lift on parts of the day's rows, with intervals.

Rows are cut by how much the user was seen before, how often the item was shown
before, and by each context feature.  The interval of a lift needs no draws here:
an AUC is a mean over pairs, so each row's part in it is known (its placement
value, DeLong et al. 1988), and the parts of one user's rows are added up before
they are squared (Obuchowski 1997).  The bootstrap of the gate gives the same
standard error where there are many users, at a hundred times the cost.

With many slices some lose by chance.  So the level is shared among those of a
report (Bonferroni): when no slice loses, a report warns of one as seldom as a
single interval errs.

Shape suffixes:

    N  rows     P  positive rows     M  negative rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from onetrans.bootstrap import Floats
from onetrans.history import POPULARITY_DAYS
from onetrans.scores import BASELINE, CANDIDATE, CONTEXT_PREFIX, TASKS, Scores

Bools = npt.NDArray[np.bool_]

FEWEST_OF_A_CLASS = 30
"""Rows of each class, below which a slice has no interval: the normal approximation needs some."""
FEWEST_USERS = 30
"""Users, likewise."""
MOST_VALUES = 6
"""Values of a context feature that are shown, the most frequent ones."""
LEAST_SHARE = 0.02
"""Share of the rows that a context feature's second value needs, or the feature is not shown."""
MOST_FEATURES = 4
"""Context features that are shown, those of the fewest values first."""

_BEFORE = f"by impressions in the last {POPULARITY_DAYS} days of training"
_USER_EDGES = (1, 10, 50, 200)
_ITEM_EDGES = (1, 10, 100, 1000)


@dataclass(frozen=True)
class Slice:
    """One task's lift on some rows."""

    cut: str
    """What the rows are cut by."""
    name: str
    """Which of them."""
    task: str
    """``ctr`` or ``cvr``."""
    rows: int
    """Rows the task is measured on."""
    positives: int
    """Positive ones."""
    candidate: float | None
    """AUC of the candidate; None where one class is missing."""
    baseline: float | None
    """AUC of the baseline."""
    low: float | None
    """Lower bound of the lift, at the shared level; None where rows or users are too few."""
    high: float | None
    """Upper bound."""

    @property
    def lift(self) -> float | None:
        """Candidate less baseline."""
        return None if self.candidate is None or self.baseline is None else self.candidate - self.baseline

    @property
    def loses(self) -> bool:
        """Whether the candidate is worse here beyond chance."""
        return self.high is not None and self.high < 0


def slices(scores: Scores, table: pa.Table, confidence: float) -> list[Slice]:
    """Return every slice's lift of the candidate over the baseline.

    Args:
        scores: of the day.
        table: the same rows with the columns to cut by (:func:`onetrans.evaluate.with_history`).
        confidence: two-sided level that the intervals keep together.
    """
    cuts = [(cut, name, inside_N) for cut, name, inside_N in _cuts(table)]
    measured = [(cut, name, task, scores.counted(task) & inside_N) for cut, name, inside_N in cuts for task in TASKS]
    share = (1.0 - confidence) / max(len(measured), 1)
    width = NormalDist().inv_cdf(1.0 - share / 2.0)
    return [_slice(scores, cut, name, task, inside_N, width) for cut, name, task, inside_N in measured]


def _slice(scores: Scores, cut: str, name: str, task: str, inside_N: Bools, width: float) -> Slice:
    label_N = scores.label_N[task][inside_N]
    rows, positives = int(label_N.shape[0]), int(label_N.sum())
    if not 0 < positives < rows:
        return Slice(cut, name, task, rows, positives, None, None, None, None)
    user_N = scores.user_N[inside_N]
    ours, theirs, error = clustered_lift(
        label_N, scores.score_N[CANDIDATE, task][inside_N], scores.score_N[BASELINE, task][inside_N], user_N
    )
    few = min(positives, rows - positives) < FEWEST_OF_A_CLASS or np.unique(user_N).shape[0] < FEWEST_USERS
    low, high = (None, None) if few else (ours - theirs - width * error, ours - theirs + width * error)
    return Slice(cut, name, task, rows, positives, ours, theirs, low, high)


def clustered_lift(
    label_N: npt.NDArray[np.int64], candidate_N: Floats, baseline_N: Floats, user_N: npt.NDArray[np.int64]
) -> tuple[float, float, float]:
    """Return both AUCs and the standard error of their difference, with users as clusters; both classes must be there.

    Sources: DeLong, DeLong and Clarke-Pearson (1988), "Comparing the areas under two or more correlated ROC curves";
    Obuchowski (1997), "Nonparametric analysis of clustered ROC curve data".
    """
    ours, ours_N = _parts(label_N, candidate_N)
    theirs, theirs_N = _parts(label_N, baseline_N)
    _, place_N = np.unique(user_N, return_inverse=True)
    of_user = np.bincount(place_N, ours_N - theirs_N)
    users = of_user.shape[0]
    return ours, theirs, float(np.sqrt(np.square(of_user).sum() * users / max(users - 1, 1)))


def _parts(label_N: npt.NDArray[np.int64], score_N: Floats) -> tuple[float, Floats]:
    """Return the AUC, and each row's part in its deviation from the truth (they sum to 0)."""
    positive_N = label_N > 0
    score_P, score_M = score_N[positive_N], score_N[~positive_N]
    sorted_P, sorted_M = np.sort(score_P), np.sort(score_M)
    won_P = (np.searchsorted(sorted_M, score_P, "left") + np.searchsorted(sorted_M, score_P, "right")) / 2.0
    lost_M = (np.searchsorted(sorted_P, score_M, "left") + np.searchsorted(sorted_P, score_M, "right")) / 2.0
    positives, negatives = score_P.shape[0], score_M.shape[0]
    auc = float(won_P.sum()) / (positives * negatives)
    part_N = np.empty(score_N.shape[0])
    part_N[positive_N] = (won_P / negatives - auc) / positives
    part_N[~positive_N] = (1.0 - lost_M / positives - auc) / negatives
    return auc, part_N


# Cuts


def _cuts(table: pa.Table) -> Iterator[tuple[str, str, Bools]]:
    """Yield (what is cut by, which part, the rows in it); parts without rows are left out."""
    if "user_impressions" in table.column_names:
        yield from _counted(
            f"user, {_BEFORE}",
            table["user_impressions"],
            "new user",
            _USER_EDGES,
        )
    if "item_impressions" in table.column_names:
        yield from _counted(
            f"item, {_BEFORE}",
            table["item_impressions"],
            "new item",
            _ITEM_EDGES,
        )
    contexts = [
        (name.removeprefix(CONTEXT_PREFIX), pc.value_counts(table[name]), table[name])
        for name in table.column_names
        if name.startswith(CONTEXT_PREFIX)
    ]
    several = sorted((c for c in contexts if _divides(c[1])), key=lambda c: len(c[1]))
    for name, counts, column in several[:MOST_FEATURES]:
        yield from _valued(name, counts, column)


def _divides(counts: pa.StructArray) -> bool:
    """Tell whether at least two values have a share of the rows that is worth a line."""
    frequent = sorted((entry["counts"] for entry in counts.to_pylist()), reverse=True)
    return len(frequent) > 1 and frequent[1] >= LEAST_SHARE * sum(frequent)


def _counted(cut: str, column: pa.ChunkedArray, none: str, edges: Sequence[int]) -> Iterator[tuple[str, str, Bools]]:
    count_N = column.to_numpy()
    bounds = [0, *edges, np.inf]
    for low, high in pairwise(bounds):
        inside_N = (count_N >= low) & (count_N < high)
        if inside_N.any():
            name = none if low == 0 else f"{low:,} and more" if np.isinf(high) else f"{low:,} to {int(high) - 1:,}"
            yield cut, name, inside_N


def _valued(name: str, counts: pa.StructArray, column: pa.ChunkedArray) -> Iterator[tuple[str, str, Bools]]:
    frequent = sorted(counts.to_pylist(), key=lambda entry: -entry["counts"])
    left_N = np.ones(len(column), dtype=bool)
    for entry in frequent[:MOST_VALUES]:
        value = entry["values"]
        same = pc.is_null(column) if value is None else pc.fill_null(pc.equal(column, value), False)
        inside_N = same.to_numpy(zero_copy_only=False) if isinstance(same, pa.Array) else same.to_numpy()
        left_N &= ~inside_N
        yield f"context, {name}", "missing" if value is None else str(value), inside_N
    if left_N.any():
        yield f"context, {name}", f"the other {len(frequent) - MOST_VALUES:,}", left_N
