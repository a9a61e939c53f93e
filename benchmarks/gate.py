"""The gate's statistics: time and memory of the bootstrap, and of AUC, against scikit-learn: python -m benchmarks.gate.

* The bootstrap of a large day: 1,000 replicates of 1 M impressions of 100 k users, whose activity differs by orders of
  magnitude, for both tasks and two models, four figures each (AUC, UAUC, log loss, calibration), all on the same draws;
  and the AUC of a popularity ranker, as on a real day.
* The obvious implementation in the same run: draw users, lay their rows out, and call scikit-learn for each figure.  It
  is measured on few replicates and scaled, and says so.  Its UAUC, a loop over users, is measured on few users and
  scaled too; the ratio without UAUC is told beside the one with it.
* AUC of 10 M rows against ``roc_auc_score``, and the difference of the two.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.common import Report, parser
from onetrans.gate import _Measured
from onetrans.metrics import auc
from onetrans.scores import BASELINE, CANDIDATE, TASKS, Scores
from onetrans.settings import GateSettings
from tests.gate_world import day_of

Floats = npt.NDArray[np.float64]


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Return the shortest time of some calls."""
    best = np.inf
    for _ in range(times):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return float(best)


def obvious_replicate(scores: Scores, rows_of: list[npt.NDArray[np.int64]], rng: np.random.Generator) -> None:
    """Draw users, lay out their rows, and call scikit-learn for AUC, log loss and calibration of everything."""
    drawn = rng.integers(len(rows_of), size=len(rows_of))
    rows = np.concatenate([rows_of[user] for user in drawn])
    click = scores.label_N["ctr"][rows]
    for task in TASKS:
        counted = rows if task == "ctr" else rows[click > 0]
        label = scores.label_N[task][counted]
        for model in (CANDIDATE, BASELINE):
            score = scores.score_N[model, task][counted]
            roc_auc_score(label, score)
            log_loss(label, score)
            float(score.mean() / label.mean())


def obvious_uauc(scores: Scores, rows_of: list[npt.NDArray[np.int64]], users: int) -> None:
    """Call scikit-learn for each of some users, for both tasks and models."""
    for rows in rows_of[:users]:
        for task in TASKS:
            counted = rows if task == "ctr" else rows[scores.label_N["ctr"][rows] > 0]
            label = scores.label_N[task][counted]
            if 0 < label.sum() < label.shape[0]:
                for model in (CANDIDATE, BASELINE):
                    roc_auc_score(label, scores.score_N[model, task][counted])


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a figure missed what is expected of it."""
    arguments = parser(__doc__).parse_args(argv)
    report = Report("gate", arguments)
    quick = arguments.quick
    rows, users, replicates = (100_000, 10_000, 200) if quick else (1_000_000, 100_000, 1_000)
    scores = day_of(seed=1, rows=rows, users=users)
    case = f"{replicates:,} replicates, {rows:,} rows, {users:,} users"

    used = time.process_time()
    ours = seconds(lambda: _Measured([scores], GateSettings(replicates=replicates)))
    used = time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    report.add(case, "both tasks, two models, four figures", ours, "s", "" if quick else "<= 60")
    report.add(case, "the same, processor time of all threads", used, "s")
    report.add(case, "peak memory of the process", peak, "GiB", "" if quick else "<= 2")

    order = np.argsort(scores.user_N, kind="stable")
    rows_of = np.split(order, np.cumsum(np.bincount(scores.user_N, minlength=scores.users))[:-1])
    rng = np.random.default_rng(0)
    some = 2 if quick else 3
    one = seconds(lambda: obvious_replicate(scores, rows_of, rng), some)
    few = min(users, 500)
    per_user = seconds(lambda: obvious_uauc(scores, rows_of, few)) / few
    report.add(case, f"scikit-learn without UAUC, best of {some} replicates scaled", one * replicates, "s")
    report.add(case, f"times as fast, both without UAUC's loop ({some} replicates scaled)",
               one * replicates / ours, "", ">= 30")  # fmt: skip
    whole = (one + per_user * users) * replicates
    report.add(case, f"times as fast, with UAUC ({few} users scaled)", whole / ours, "", ">= 30")

    rows = 1_000_000 if quick else 10_000_000
    rng = np.random.default_rng(2)
    appeal = rng.normal(size=rows)
    label = (rng.random(rows) < 1.0 / (1.0 + np.exp(2.0 - appeal))).astype(np.int64)
    for kind, score in (("all different", appeal), ("1,000 different", np.round(appeal * 125) / 125)):
        case = f"AUC of {rows:,} rows, scores {kind}"
        mine, theirs = seconds(lambda s=score: auc(label, s), 3), seconds(lambda s=score: roc_auc_score(label, s), 3)  # type: ignore[misc]
        report.add(case, "onetrans", mine, "s")
        report.add(case, "scikit-learn", theirs, "s")
        report.add(case, "times as fast", theirs / mine, "", ">= 1")
        report.add(case, "difference", abs(auc(label, score) - float(roc_auc_score(label, score))), "", "<= 1e-12")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
