"""Where the time of a training goes: loading, embedding, each side of the model, backward pass, optimizers.

Parts may lie within each other; each counts only what is not within another.  On a
CPU every step is measured.  A GPU works while Python goes on, so there one step in
:data:`_GPU_STRIDE` is measured, each part waited for to its end.

*loading* is the time in which the model waits for the next batch, not the work of
the threads that prepare it meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

from onetrans.models import RankingModel

T = TypeVar("T")

LOADING, EMBEDDING, BACKWARD, EXCHANGE, OPTIMIZER, REST = (
    "loading", "embedding", "backward", "exchange", "optimizer", "rest",
)  # fmt: skip

_GPU_STRIDE = 50


class StepProfile:
    """Seconds of each part of some training steps."""

    def __init__(self, model: RankingModel, device: torch.device) -> None:
        """Watch a model's embeddings and the methods it names in ``parts``."""
        self.seconds: dict[str, float] = {}
        self.steps = 0
        self._gpu = device.type == "cuda"
        self._device = device
        self._seen = 0
        self._on = False
        self._open: list[str] = []
        self._since = 0.0
        model.embeddings.register_forward_pre_hook(lambda *_: self._enter(EMBEDDING))
        model.embeddings.register_forward_hook(lambda *_: self._leave())
        for name, method in model.parts.items():
            setattr(model, method, self._watched(name, getattr(model, method)))

    def shares(self) -> dict[str, float]:
        """Return each part's share of the time of all steps measured, the largest first."""
        total = sum(self.seconds.values())
        return {name: spent / total for name, spent in sorted(self.seconds.items(), key=lambda item: -item[1])}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: steps measured, seconds of a step, and shares."""
        mean = sum(self.seconds.values()) / max(self.steps, 1)
        return {
            "steps_measured": self.steps,
            "seconds_per_step": round(mean, 6),
            "shares": {name: round(share, 4) for name, share in self.shares().items()},
        }

    def steps_of(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches; from one to the next is a step."""
        while True:
            self._on = not self._gpu or self._seen % _GPU_STRIDE == _GPU_STRIDE - 1
            with self.part(LOADING):
                try:
                    batch = next(batches)
                except StopIteration:
                    self._on = False
                    return
            self._seen += 1
            self.steps += self._on
            with self.part(REST):
                yield batch

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def _watched(self, name: str, method: Callable[..., T]) -> Callable[..., T]:
        @wraps(method)
        def measured(*arguments: Any, **named: Any) -> T:
            with self.part(name):
                return method(*arguments, **named)

        return measured

    def _enter(self, name: str) -> None:
        self._close_interval()
        self._open.append(name)

    def _leave(self) -> None:
        self._close_interval()
        self._open.pop()

    def _close_interval(self) -> None:
        if self._on and self._gpu:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._on and self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
