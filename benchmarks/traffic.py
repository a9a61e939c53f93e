"""Mixed traffic for the ranking service: calls of every size at random moments, and clients that misbehave.

The rate rises and falls three times over the run, by half of its mean.  A client is one of ``KINDS``; what the service
must answer it with stands beside.  Only calls that make sense are timed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

SIZES = {1: 0.4, 10: 0.3, 100: 0.25, 500: 0.05}
"""Candidates of a call, and the share of such calls."""

KINDS: Mapping[str, tuple[float, tuple[int, ...]]] = {
    "plain": (0.93, (200,)),
    "slow": (0.01, (200,)),
    "unfinished": (0.01, (408,)),
    "vanished": (0.01, (0,)),
    "no JSON": (0.01, (422,)),
    "unknown field": (0.01, (422,)),
    "no candidates": (0.01, (422,)),
    "too large": (0.01, (413,)),
}
"""Clients: their share, and the status each must get; 0 where it does not wait for one."""

SLOW_S = 1.0
SWINGS, SWING = 3, 0.5


class Bodies(Protocol):
    """Makes bodies of calls."""

    def cold(self) -> bytes:
        """Return a call of a user never seen before."""

    def warm(self) -> bytes:
        """Return a call of a known user."""


@dataclass(frozen=True)
class Planned:
    """A call that will be made."""

    at_s: float
    kind: str
    candidates: int
    warm: bool


@dataclass
class Outcome:
    """What became of all calls."""

    latency_S: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By candidates: seconds from when a plain call was due to its answer."""
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How often a kind of client got a status; 0: it did not wait for one; -1: the connection broke."""

    @property
    def unexpected(self) -> dict[tuple[str, int], int]:
        """Those of the statuses that should not have been."""
        return {(kind, status): n for (kind, status), n in self.statuses.items() if status not in KINDS[kind][1]}

    def ms(self, candidates: int, share: float) -> float:
        """Return a quantile of the latency of calls of one size, in milliseconds."""
        return float(np.quantile(self.latency_S[candidates], share) * 1000)


def plan(rate: float, seconds: float, seed: int = 0) -> list[Planned]:
    """Return the calls of a run, ``rate`` per second on average, in order of time."""
    rng = np.random.default_rng(seed)
    calls = round(rate * seconds)
    curve_s = np.linspace(0, seconds, 1000)
    weight = 1 + SWING * np.sin(2 * np.pi * SWINGS * curve_s / seconds)
    reached = np.concatenate([[0], np.cumsum((weight[1:] + weight[:-1]) / 2)])
    times = np.sort(np.interp(rng.uniform(0, reached[-1], calls), reached, curve_s))
    kinds = rng.choice(list(KINDS), calls, p=[share for share, _ in KINDS.values()])
    sizes = rng.choice(list(SIZES), calls, p=list(SIZES.values()))
    warm = rng.random(calls) < 0.5
    return [Planned(*one) for one in zip(times.tolist(), kinds.tolist(), sizes.tolist(), warm.tolist(), strict=True)]


async def send_all(
    port: int,
    planned: Sequence[Planned],
    bodies: Mapping[int, Bodies],
    send: Callable[[bytes], Coroutine[Any, Any, int]],
    moments: Mapping[float, Callable[[], None]],
) -> Outcome:
    """Make the calls at their times; ``send`` answers a plain one, ``moments`` run in threads at their seconds."""
    outcome, running = Outcome(), []
    began = time.perf_counter()

    async def make(call: Planned) -> None:
        body = bodies[call.candidates].warm() if call.warm else bodies[call.candidates].cold()
        try:
            status = await (send(body) if call.kind == "plain" else misbehave(port, call.kind, body))
        except (OSError, asyncio.IncompleteReadError):
            status = -1
        outcome.statuses[call.kind, status] += 1
        if call.kind == "plain" and status == 200:
            outcome.latency_S[call.candidates].append(time.perf_counter() - began - call.at_s)

    async def run_at(at_s: float, run: Callable[[], None]) -> None:
        await asyncio.sleep(at_s)
        await asyncio.to_thread(run)

    running += [asyncio.create_task(run_at(*moment)) for moment in moments.items()]
    for call in planned:
        await asyncio.sleep(max(began + call.at_s - time.perf_counter(), 0))
        running.append(asyncio.create_task(make(call)))
    await asyncio.gather(*running)
    return outcome


async def misbehave(port: int, kind: str, body: bytes) -> int:
    """Make one call as a client of this kind does, and return the status of its answer, 0 if it waits for none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        announced = len(body)
        if kind == "no JSON":
            body = b"{" * announced
        elif kind == "unknown field":
            body = b'{"surprise": 1, ' + body.lstrip()[1:]
            announced = len(body)
        elif kind == "no candidates":
            body = body.replace(b'"candidates"', b'"candidatez"')
        elif kind == "too large":
            announced, body = 1 << 40, b""
        writer.write(b"POST /v1/rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % announced)
        half = len(body) // 2
        writer.write(body[:half])
        if kind == "slow":
            await asyncio.sleep(SLOW_S)
        if kind != "unfinished":
            writer.write(body[half:])
        await writer.drain()
        if kind == "vanished":
            return 0
        head = await reader.readuntil(b"\r\n\r\n")
        return int(head[9:12])
    finally:
        writer.close()
