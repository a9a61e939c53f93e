"""AUC so far: of the click scores of the last impressions trained on, each given before the step that learned from it.

So no score has seen its own label, and the figure rises while a training learns.
Dropout is on as in training, and of several processes each knows its own share;
it is for watching, no decision hangs on it.

Shape suffix: N  impressions of a batch
"""

from __future__ import annotations

from collections import deque

import numpy as np
from torch import Tensor

from onetrans.metrics import UndefinedMetricError, auc

IMPRESSIONS = 20_000
"""Impressions that are kept, about."""


class RecentAuc:
    """Labels and scores of the last batches."""

    def __init__(self) -> None:
        self._batches: deque[tuple[Tensor, Tensor]] = deque()
        self._held = 0

    def add(self, click_N: Tensor, logit_N: Tensor) -> None:
        """Take a batch's labels and scores; the oldest batches are forgotten."""
        self._batches.append((click_N, logit_N.detach()))
        self._held += click_N.shape[0]
        while self._held - self._batches[0][0].shape[0] >= IMPRESSIONS:
            self._held -= self._batches.popleft()[0].shape[0]

    def value(self) -> float | None:
        """Return the AUC of what is held; None without both clicks and others."""
        if not self._held:
            return None
        click_N, score_N = (np.concatenate([each[n].float().cpu().numpy() for each in self._batches]) for n in (0, 1))
        try:
            return auc(click_N, score_N)
        except UndefinedMetricError:
            return None
