"""What knowing a user's own day does to UAUC: a world in which the best possible score is known.

Click log-odds are a user's inclination plus an item's appeal, and appeal is known to
all.  Three scores, each the exact posterior probability of a click:

    before the day    the inclination inferred from the user's history before the day
    up to the moment  the same, and from the impressions earlier that day
    truth             the inclination itself

The second knows strictly more than the first and no score with its information can
be better; so AUC and log loss rise.  UAUC falls nevertheless: it compares a user's impressions of
one day with each other, and with the day's clicks given, every click that came
earlier is one fewer among the rest.  The truth gives all impressions of a user the
same inclination, and has the highest UAUC.  A pipeline that reads fresh events pays
this in UAUC by construction, so figures with and without them are not comparable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Report, parser
from onetrans.metrics import auc, log_loss, uauc

Floats = NDArray[np.float64]

INCLINATION, APPEAL, OFFSET = 1.0, 1.0, -0.3
"""Standard deviations of both parts of the log-odds, and their mean: AUC .76 to .77, as on short-video logs."""
GRID_G = np.linspace(-4.0, 4.0, 81) * INCLINATION
"""Inclinations at which a posterior is held."""


def sigmoid(log_odds: Floats) -> Floats:
    """Return the probability of log-odds."""
    return 1.0 / (1.0 + np.exp(-log_odds))


def learn(posterior_UG: Floats, appeal_U: Floats, click_U: Floats, seen_U: NDArray[np.bool_]) -> Floats:
    """Return the posterior after one more impression of the users that ``seen_U`` marks (Bayes' rule on a grid)."""
    click_UG = sigmoid(GRID_G[None, :] + appeal_U[:, None] + OFFSET)
    likelihood_UG = np.where(click_U[:, None] > 0, click_UG, 1.0 - click_UG)
    updated_UG = posterior_UG * np.where(seen_U[:, None], likelihood_UG, 1.0)
    return updated_UG / updated_UG.sum(axis=1, keepdims=True)


def expected_click(posterior_UG: Floats, appeal_U: Floats) -> Floats:
    """Return the posterior probability of a click."""
    return (posterior_UG * sigmoid(GRID_G[None, :] + appeal_U[:, None] + OFFSET)).sum(axis=1)


def day(users: int, history: int, impressions: int, seed: int) -> tuple[Floats, NDArray[np.int64], dict[str, Floats]]:
    """Return a day's labels, users and scores: ``1`` to ``impressions`` impressions a user after ``history`` each."""
    random = np.random.default_rng(seed)
    inclination_U = random.normal(0.0, INCLINATION, users)
    everyone_U = np.ones(users, dtype=bool)

    def impression() -> tuple[Floats, Floats]:
        appeal_U = random.normal(0.0, APPEAL, users)
        click_U = (random.random(users) < sigmoid(inclination_U + appeal_U + OFFSET)).astype(np.float64)
        return appeal_U, click_U

    prior_G = np.exp(-0.5 * (GRID_G / INCLINATION) ** 2)
    before_UG = np.tile(prior_G / prior_G.sum(), (users, 1))
    for _ in range(history):
        before_UG = learn(before_UG, *impression(), everyone_U)
    now_UG = before_UG
    shown_U = random.integers(1, impressions + 1, users)
    labels: list[Floats] = []
    who: list[NDArray[np.int64]] = []
    scores: dict[str, list[Floats]] = {"before the day": [], "up to the moment": [], "truth": []}
    for step in range(impressions):
        appeal_U, click_U = impression()
        seen_U = shown_U > step
        labels.append(click_U[seen_U])
        who.append(np.flatnonzero(seen_U))
        scores["before the day"].append(expected_click(before_UG, appeal_U)[seen_U])
        scores["up to the moment"].append(expected_click(now_UG, appeal_U)[seen_U])
        scores["truth"].append(sigmoid(inclination_U + appeal_U + OFFSET)[seen_U])
        now_UG = learn(now_UG, appeal_U, click_U, seen_U)
    return np.concatenate(labels), np.concatenate(who), {name: np.concatenate(found) for name, found in scores.items()}


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a figure missed what is expected of it."""
    options = parser(__doc__)
    options.add_argument("--users", type=int, default=100_000, help="users (default: %(default)s)")
    options.add_argument("--impressions", type=int, default=4, help="most impressions of a day (default: %(default)s)")
    arguments = options.parse_args(argv)
    report = Report("uauc", arguments)
    for history in (0, 5, 20, 50):
        users = 20_000 if arguments.quick else arguments.users
        label_N, user_N, scores = day(users, history, arguments.impressions, seed=history)
        found = {
            name: {
                "AUC": auc(label_N, score_N),
                "UAUC": uauc(label_N, score_N, user_N),
                "log loss": log_loss(label_N, score_N),
            }
            for name, score_N in scores.items()
        }
        for name, values in found.items():
            for figure, value in values.items():
                report.add(f"{history} earlier impressions, {name}", figure, value)
        before, now = found["before the day"], found["up to the moment"]
        case = f"{history} earlier impressions, what the day's own events change"
        report.add(case, "AUC", now["AUC"] - before["AUC"], "", "> 0")
        report.add(case, "log loss", now["log loss"] - before["log loss"], "", "< 0")
        report.add(case, "UAUC", now["UAUC"] - before["UAUC"], "", "< 0")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
