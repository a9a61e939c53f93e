"""Requests of several clients scored together, with deadlines, and a queue that does not grow without end.

One thread scores; while it does, requests gather and go together into its next turn, first come, first served, as many
as ``serving.batch_candidates`` and ``serving.batch_ms`` allow.  A request that finds the thread idle waits
``serving.batch_wait_ms`` at most for others.

A call is turned away at once (:class:`OverloadedError`) when the queue is full, or when what waits before it will take
longer than its deadline allows; that is judged by how fast recent work went.  What is past its deadline when its turn
comes is not scored, and neither is what its client no longer waits for: under overload no time goes to answers that
nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onetrans.batch import RequestBatch
from onetrans.errors import BadDataError
from onetrans.serving.calls import Call
from onetrans.serving.engine import Probabilities
from onetrans.serving.pace import Pace
from onetrans.serving.prefix import UserState
from onetrans.settings import ServingSettings

logger = logging.getLogger(__name__)

REQUEST_WORK = 40
"""What a request costs beside its candidates, in candidates (measured for `small`, a history to encode)."""

_REMEMBERED_WORK, _FIRST_GUESS_S = 2_000, 2e-4
"""Work by which speed is judged, and what a unit of it is taken for at first."""


class Scorer(Protocol):
    """What scores a batch: an engine."""

    def score(
        self,
        batch: RequestBatch,
        users: Sequence[str | None],
        known: Sequence[UserState | None],
        digests: Sequence[bytes | None],
    ) -> Probabilities:
        """Return the scores of all candidates of a batch."""


class OverloadedError(Exception):
    """The service has more to do than it can in time."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("more requests wait than can be answered in time; try again later")
        self.retry_after_s = max(1, math.ceil(retry_after_s))


class DeadlineError(Exception):
    """A request's turn came after its deadline."""


@dataclass(eq=False)
class Work:
    """A call that waits for its scores."""

    scorer: Scorer
    """The model it was encoded for."""
    call: Call
    """Its requests."""
    deadline: float
    """On the clock of :func:`time.monotonic`."""
    future: asyncio.Future[Probabilities]
    """Gets the scores."""

    @property
    def cost(self) -> int:
        """Work, in candidates."""
        return self.call.candidates + REQUEST_WORK * self.requests

    @property
    def requests(self) -> int:
        """Its requests."""
        return len(self.call.users)


class Batcher:
    """Gathers calls and scores them in one thread; lives in one event loop."""

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings
        self.batches = 0
        self.scored = 0
        self.busy_s = 0.0
        self._waiting: deque[Work] = deque()
        self._requests = 0
        self._pace = Pace(_REMEMBERED_WORK, _FIRST_GUESS_S)
        self._arrived = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._requests

    @property
    def wait_s(self) -> float:
        """Time until a call that comes now has its turn."""
        return self._pace.expected_s(self._pace.ahead)

    async def start(self) -> None:
        """Begin to score."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Score what still waits, then end."""
        while self._waiting:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._pool.shutdown()

    async def score(self, scorer: Scorer, call: Call, deadline: float) -> Probabilities:
        """Return the scores of a call's requests.

        Raises:
            OverloadedError: if the call is turned away.
            DeadlineError: if it was not scored in time.
            BadDataError: if it cannot be scored.
        """
        now = time.monotonic()
        work = Work(scorer, call, deadline, asyncio.get_running_loop().create_future())
        wait = self.wait_s
        if self._pace.ahead and (
            self._requests + work.requests > self.settings.queue_requests
            or now + wait + self._pace.expected_s(work.cost) > deadline
        ):
            raise OverloadedError(wait)
        self._waiting.append(work)
        self._requests += work.requests
        self._pace.ahead += work.cost
        self._arrived.set()
        try:
            async with asyncio.timeout(max(deadline - now, 0)):
                return await work.future
        except TimeoutError:
            raise DeadlineError from None

    async def _run(self) -> None:
        while True:
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
                await self._gather()
            batch = self._next()
            if batch:
                await self._score(batch)

    async def _gather(self) -> None:
        """Wait a moment for company: the thread was idle when the first request came."""
        until = time.monotonic() + self.settings.batch_wait_ms / 1000
        while sum(work.call.candidates for work in self._waiting) < self.settings.batch_candidates:
            left = until - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _next(self) -> list[Work]:
        """Take the next calls out of the queue: those of one model that fit, without those nobody waits for."""
        batch: list[Work] = []
        taken, cost = 0, 0
        while self._waiting:
            work = self._waiting[0]
            if work.future.done() or work.deadline <= time.monotonic():
                self._take(work)
                continue
            if batch and (
                work.scorer is not batch[0].scorer
                or taken + work.call.candidates > self.settings.batch_candidates
                or self._pace.expected_s(cost + work.cost) > self.settings.batch_ms / 1000
            ):
                break
            self._take(work)
            batch.append(work)
            taken += work.call.candidates
            cost += work.cost
        return batch

    def _take(self, work: Work) -> None:
        self._waiting.popleft()
        self._requests -= work.requests
        self._pace.ahead -= work.cost
        if not work.future.done() and work.deadline <= time.monotonic():
            work.future.set_exception(DeadlineError())

    async def _score(self, batch: list[Work]) -> None:
        cost = sum(work.cost for work in batch)
        self._pace.ahead += cost  # It is still ahead of what comes now.
        began = time.monotonic()
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._pool, score_together, batch)
        finally:
            self._pace.ahead -= cost
        spent = time.monotonic() - began
        self.batches += 1
        self.scored += sum(work.requests for work in batch)
        self.busy_s += spent
        self._pace.took(cost, spent)
        for work, result in zip(batch, results, strict=True):
            if work.future.done():
                continue  # its client has gone, or its deadline has passed
            if isinstance(result, BaseException):
                work.future.set_exception(result)
            else:
                work.future.set_result(result)


def score_together(batch: Sequence[Work]) -> list[Probabilities | Exception]:
    """Score calls of one model at once; if that fails each by itself, so that one bad call fails alone."""
    try:
        scores = batch[0].scorer.score(
            RequestBatch.join([work.call.batch for work in batch]),
            [user for work in batch for user in work.call.users],
            [kept for work in batch for kept in work.call.known],
            [digest for work in batch for digest in work.call.digests],
        )
    except Exception as error:
        if len(batch) == 1:
            if not isinstance(error, BadDataError):
                logger.exception("a request could not be scored")
            return [error]
        return [result for work in batch for result in score_together([work])]
    bounds = np.cumsum([work.call.candidates for work in batch])[:-1]
    return [Probabilities(*pair) for pair in zip(*(np.split(x_N, bounds) for x_N in scores), strict=True)]
