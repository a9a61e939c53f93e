"""A world of scored impressions whose truth is known: what the gate's error rates and speed are measured on.

A user has a number of impressions that differs by orders of magnitude between
users (log-normal), and tastes that both models misread in a way of their own, so
that the rows of a user are not independent.  A model's score is the truth blurred
by noise; the two models share part of the noise, as two models trained on the same
rows do.  A lift is made by giving the candidate less noise of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from onetrans.bootstrap import Lift, ResampledAuc, resample
from onetrans.scores import UNKNOWN, ChampionRecord, Scores

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """How users and models are."""

    activity: float = 1.5
    """Spread (log-normal sigma) of the users' impressions: at 1.5 one in a hundred has 33 times the middle one's."""
    click_rate: float = -1.0
    """Log-odds of a click at appeal 0."""
    appeal: float = 1.5
    """Weight of what decides a click, and of what decides a conversion."""
    shared: float = 1.0
    """Noise that both models have in common."""
    own: float = 0.35
    """Noise of each model by itself."""
    per_user: float = 0.25
    """Noise of each model by itself that is the same for all rows of a user: it scales what the model sees in them."""


def sigmoid(x: Any) -> Floats:
    """Return probabilities of log-odds."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.asarray(x, dtype=np.float64))))


def day_of(
    seed: int,
    rows: int,
    users: int,
    world: World | None = None,
    ctr_own: float | None = None,
    cvr_own: float | None = None,
    champion_own: float | None = None,
) -> Scores:
    """Return a day; ``ctr_own`` and ``cvr_own`` are the candidate's own noise where it is not the baseline's.

    With ``champion_own`` there is a champion too, with so much noise of its own in both tasks.
    """
    world = world or World()
    rng, others = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    share_U = rng.lognormal(0.0, world.activity, users)
    user_N = rng.choice(users, size=rows, p=share_U / share_U.sum()).astype(np.int64)
    label_N: dict[str, npt.NDArray[np.int64]] = {}
    score_N: dict[tuple[str, str], Floats] = {}
    for task, better in (("ctr", ctr_own), ("cvr", cvr_own)):
        appeal_N, shared_N = rng.normal(size=rows), world.shared * rng.normal(size=rows)
        rate = world.click_rate if task == "ctr" else 0.0
        happened_N = (rng.random(rows) < sigmoid(rate + world.appeal * appeal_N)).astype(np.int64)
        label_N[task] = happened_N if task == "ctr" else happened_N * label_N["ctr"]
        models = [("onetrans", world.own if better is None else better, rng), ("dcnv2_din", world.own, rng)]
        if champion_own is not None:
            models.append(("champion", champion_own, others))
        for model, own, noise in models:
            misread_N = np.exp(world.per_user * noise.normal(size=users))[user_N]
            blurred_N = misread_N * appeal_N + shared_N + own * noise.normal(size=rows)
            shrunk = world.appeal / (1.0 + world.shared**2 + world.own**2)
            score_N[model, task] = sigmoid(rate + shrunk * blurred_N)
        known_N = 0.2 * appeal_N + rng.normal(size=rows)
        score_N["popularity", task] = sigmoid(rate + 0.2 * known_N)
    return Scores(
        ds=f"day {seed}",
        user_ids=pa.array([str(user) for user in range(users)]),
        user_N=user_N,
        label_N=label_N,
        score_N=score_N,
        champion=UNKNOWN if champion_own is None else ChampionRecord("scored", "a champion", "1", "2024-01-01"),
    )


def paired_lifts(
    tasks: Mapping[str, tuple[ResampledAuc, ResampledAuc]], users: int, replicates: int, confidence: float, seed: int
) -> dict[str, Lift]:
    """Return the AUC lift of every task, (candidate, baseline), all tasks and both models on the same draws."""
    figures = {(task, side): [pair[side]] for task, pair in tasks.items() for side in (0, 1)}
    drawn = resample(figures, users, replicates, seed)
    return {task: Lift.between(drawn[task, 0], drawn[task, 1], confidence) for task in tasks}
