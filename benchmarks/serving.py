"""The ranking service under load: a service in one process, a driver in another, over loopback.

The driver sends at fixed times whether or not answers have come (open loop), and counts the latency of a call from
the moment it was due; so a service that falls behind shows it.

The *highest sustained rate* is the highest at which no call fails or is turned away, and the queue does not grow: calls
of the last quarter of the time take as long as those of the second, give or take 50 ms.  The search begins at what the
service answers when some calls are always waiting (closed loop), and goes down until a rate is sustained.

*Cold* requests are of users never seen before; *warm* ones of users whose keys and values are kept, with the same past
events.  *Apart* means a call per candidate, as a service would score that knows nothing of requests.  All have 200
past events, of which `small` reads the latest 128 and `base` all.

Beside requests per second stands what a request costs in processor time of the service.  On a machine that is shared
the one measures the neighbours too, and ratios are taken of the other.

Part ``compute`` scores in one process, without HTTP: the model's own forward pass, the packed one in float32 and in
bfloat16, in turns.  With a C++ compiler and minutes to spend, ``--compile`` adds the forward pass through
``torch.compile``, and ``--ahead`` the packed stage II (all that a request of a kept user needs) by itself, as it is
against what AOTInductor makes of it.

Part ``nightly`` is what a Spark worker does with its Arrow batches in ``jobs.score_candidates``, in one process.
Reading and joining are not in it; the job logs its throughput with them.

Part ``mixed`` is an hour of traffic in five minutes: calls of 1 to 500 candidates at random moments of a rate that goes
up and down, of new and known users, with clients that send nonsense, are slow, or vanish, and a new champion half-way.

Everything is bounded in count and time, and listens on loopback alone.  Weights are random: they do not matter here.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks import traffic
from benchmarks.common import Report, parser
from onetrans.artifact import load_model, save_model
from onetrans.batch import RequestBatch
from onetrans.loader import batch_of
from onetrans.models import OneTrans, build_model, preset
from onetrans.models.compute import Precision
from onetrans.models.ranking import Scores
from onetrans.registry import CHAMPION, Registry
from onetrans.requests import score, to_rows
from onetrans.schema import FeatureSchema, Sequence
from onetrans.serving import OneTransInferenceEngine
from onetrans.serving.packed import PackedOneTrans
from onetrans.serving.prefix import UserState, event_table
from onetrans.settings import MlflowSettings, load_settings
from onetrans.tracking import connect, experiment_id

ROOT = Path(__file__).parents[1]
NOW = 1_767_225_600_000_000
EVENTS = {"click": 100, "cart": 60, "purchase": 40}
WARM_USERS = 32
AT_ONCE = 8
START_S = 300
MAY_GROW_S = 0.05
TRIES, STEP_DOWN = 12, 0.93
MIXED_SHARE = 0.4
COUNTS = (1, 10, 100, 500)
PARTS = ("costs", "rates", "compute", "nightly", "swap", "mixed")


@dataclass(frozen=True)
class Load:
    """What the service did in a while."""

    latency_S: np.ndarray
    """Seconds from when an answered call was due to its answer, in the order in which they were due."""
    failed: int
    """Calls with any other answer than 200."""
    refused: int
    """Those of them that were turned away with 429."""
    seconds: float
    """How long it took."""
    cpu_s: float
    """Processor time of the service."""

    @classmethod
    def together(cls, loads: Iterable[Load]) -> Load:
        """Return several loads as one."""
        parts = list(loads)
        return cls(
            np.concatenate([part.latency_S for part in parts]),
            sum(part.failed for part in parts),
            sum(part.refused for part in parts),
            sum(part.seconds for part in parts),
            sum(part.cpu_s for part in parts),
        )

    @property
    def per_second(self) -> float:
        """Answered calls per second."""
        return self.latency_S.shape[0] / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Processor time of the service per answered call."""
        return 1000 * self.cpu_s / max(self.latency_S.shape[0], 1)

    @property
    def grows(self) -> bool:
        """Whether calls took longer towards the end: the queue grew."""
        second, last = (np.median(self.latency_S[part]) for part in self._quarters)
        return bool(last > second + MAY_GROW_S)

    @property
    def _quarters(self) -> tuple[slice, slice]:
        quarter = self.latency_S.shape[0] // 4
        return slice(quarter, 2 * quarter), slice(-quarter, None)

    def ms(self, share: float) -> float:
        """Return a quantile of the latency in milliseconds."""
        return float(np.quantile(self.latency_S, share) * 1000) if self.latency_S.size else float("nan")


def wide_schema() -> FeatureSchema:
    """Return the simulated shop's features with sequences that hold 200 events."""
    schema = FeatureSchema.load(ROOT / "jobs" / "sources" / "simulated" / "schema.toml")
    return replace(schema, sequences=tuple(Sequence(name, name, length) for name, length in EVENTS.items()))


def request(schema: FeatureSchema, candidates: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return a request with all its events and some candidates, as a client would write it."""

    def values(side: Any) -> dict[str, Any]:
        return {
            f.name: f"v{rng.integers(20_000)}" if f.kind == "hashed" else round(float(rng.uniform(0, 100)), 3)
            for f in schema.of_side(side)
        }

    ago = np.sort(rng.choice(30 * 86_400, sum(EVENTS.values()), replace=False) + 1)[::-1]
    names = rng.permutation([name for name, length in EVENTS.items() for _ in range(length)])
    sequences: dict[str, list[dict[str, Any]]] = {name: [] for name in EVENTS}
    for name, seconds in zip(names, ago.tolist(), strict=True):
        sequences[name].append({"ts": NOW - 1_000_000 * seconds, **values("event")})
    return {
        "ts": NOW,
        "user": values("user"),
        "context": values("context"),
        "sequences": sequences,
        "candidates": [{"item_id": f"i{n}", **values("item")} for n in range(candidates)],
    }


class Calls:
    """Bodies of calls, made ahead; the user's id is put in at the end."""

    def __init__(self, schema: FeatureSchema, candidates: int, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, candidates])
        self._bodies = [json.dumps(request(schema, candidates, rng))[:-1].encode() for _ in range(8)]
        self._new = count()

    def cold(self) -> bytes:
        """Return a call of a user never seen before."""
        number = next(self._new)
        return self._bodies[number % 8] + f', "user_id": "new-{id(self)}-{number}"}}'.encode()

    def warm(self) -> bytes:
        """Return a call of one of a few users, each always with the same events."""
        number = next(self._new) % WARM_USERS
        return self._bodies[number % 8] + f', "user_id": "old-{id(self)}-{number}"}}'.encode()

    def anonymous(self) -> bytes:
        """Return a call without a user id."""
        return self._bodies[next(self._new) % 8] + b"}"


# The driver


class Connections:
    """Open connections to the service, each for one call at a time."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call(self, body: bytes) -> int:
        """Send one call and return the status of its answer.

        A connection that was not used for long may be closed by the service just then: the call is sent once more.
        """
        while self._free:
            reader, writer = self._free.pop()
            if not reader.at_eof():
                try:
                    return await self._ask(reader, writer, body)
                except asyncio.IncompleteReadError as error:
                    if error.partial:
                        raise
                except ConnectionError:
                    pass
            writer.close()
        return await self._ask(*await asyncio.open_connection("127.0.0.1", self.port), body)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> int:
        writer.write(b"POST /v1/rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert found is not None, head
        await reader.readexactly(int(found[1]))
        self._free.append((reader, writer))
        return int(head[9:12])

    def close(self) -> None:
        """Close all."""
        for _, writer in self._free:
            writer.close()


class Service:
    """A running service, and the two ways to load it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = psutil.Process(process.pid)
        self.port = port

    @property
    def cpu_s(self) -> float:
        """Processor time so far."""
        return sum(self.process.cpu_times()[:2])

    @property
    def memory_mib(self) -> float:
        """Resident memory."""
        return self.process.memory_info().rss / 2**20

    def at_once(self, body: Callable[[], bytes], calls: int, workers: int = AT_ONCE) -> Load:
        """Send calls, some at once, the next one when one is answered."""
        return asyncio.run(self._at_once(body, calls, workers))

    async def _at_once(self, body: Callable[[], bytes], calls: int, workers: int) -> Load:
        connections, left, tally = Connections(self.port), iter(range(calls)), Tally()

        async def work() -> None:
            for _ in left:
                await tally.timed(connections.call(body()), time.perf_counter())

        cpu, began = self.cpu_s, time.perf_counter()
        await asyncio.gather(*(work() for _ in range(workers)))
        load = tally.load(time.perf_counter() - began, self.cpu_s - cpu)
        connections.close()
        return load

    def at_rate(
        self,
        body: Callable[[], bytes],
        rate: float,
        calls: int,
        meanwhile: Callable[[], None] = lambda: None,
        *,
        at_random: bool = False,
    ) -> Load:
        """Send calls at fixed times, ``rate`` per second, even or random; ``meanwhile`` runs after a third of them."""
        gap_S = np.random.default_rng(calls).exponential(1 / rate, calls) if at_random else np.full(calls, 1 / rate)
        return asyncio.run(self._at_times(body, np.cumsum(gap_S).tolist(), meanwhile))

    async def _at_times(self, body: Callable[[], bytes], times: list[float], meanwhile: Callable[[], None]) -> Load:
        connections, tally, sent, other = Connections(self.port), Tally(), [], None
        calls = len(times)
        cpu, began = self.cpu_s, time.perf_counter()
        for number in range(calls):
            due = began + times[number]
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            sent.append(asyncio.create_task(tally.timed(connections.call(body()), due)))
            if number == calls // 3:
                other = asyncio.create_task(asyncio.to_thread(meanwhile))
        await asyncio.gather(*sent)
        load = tally.load(time.perf_counter() - began, self.cpu_s - cpu)
        if other is not None:
            await other
        connections.close()
        return load


class Tally:
    """Latencies and failures while a load runs."""

    def __init__(self) -> None:
        self.latencies: list[tuple[float, float]] = []
        self.statuses: Counter[int] = Counter()

    async def timed(self, call: Any, due: float) -> None:
        """Wait for a call's answer and count it."""
        try:
            status = await call
        except (OSError, asyncio.IncompleteReadError):
            status = 0
        self.statuses[status] += 1
        if status == 200:
            self.latencies.append((due, time.perf_counter() - due))

    def load(self, seconds: float, cpu_s: float) -> Load:
        """Return what was counted.

        Raises:
            RuntimeError: if no call was answered.
        """
        if not self.latencies:
            raise RuntimeError(f"no call was answered; statuses (0: no answer) and how often: {dict(self.statuses)}")
        failed = self.statuses.total() - self.statuses[200]
        latency_S = np.array([latency for _, latency in sorted(self.latencies)])
        return Load(latency_S, failed, self.statuses[429], seconds, cpu_s)


@contextmanager
def serving(model: str, **environment: str) -> Iterator[Service]:
    """Start ``onetrans serve`` on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "onetrans.cli", "serve", "--model", model, "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ONETRANS_SERVING_DEADLINE_MS": "5000", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        line = process.stdout.readline() if ready else ""
        if not line.startswith("http://"):
            process.kill()
            raise RuntimeError(f"the service did not start: {process.stderr.read()[-2000:]}")
        yield Service(process, int(line.rsplit(":", 1)[1]))
    finally:
        process.terminate()
        process.wait(timeout=60)


# What is measured


def save(folder: Path, size: str, seed: int = 0) -> FeatureSchema:
    """Save a model with fresh weights and its fixed batch, as MLflow keeps them."""
    torch.manual_seed(seed)
    schema = wide_schema()
    model = build_model(preset("onetrans", size), schema).eval()
    save_model(str(folder / "model"), model, schema, model.config)
    requests = [request(schema, 4, np.random.default_rng(n)) for n in range(2)]
    (folder / "check").mkdir()
    (folder / "check" / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    (folder / "check" / "scores.json").write_text(json.dumps(score(model, requests).to_pylist()), encoding="utf-8")
    return schema


def in_turns(cases: Mapping[str, Callable[[], Load]], turns: int) -> list[Load]:
    """Load a service in several ways, in turns, so that what else the machine does falls on all of them alike."""
    loads: dict[str, list[Load]] = {name: [] for name in cases}
    for _ in range(turns):
        for name, load in cases.items():
            loads[name].append(load())
    return [Load.together(of_case) for of_case in loads.values()]


def measure_costs(report: Report, size: str, folder: Path, schema: FeatureSchema, sizes: tuple[int, ...]) -> None:
    """Measure what a request costs: cold, warm, without the cache, and with every candidate apart."""
    per_case = 3 if report.quick else 25  # Processor time is counted in hundredths of a second.
    with serving(str(folder)) as kept, serving(str(folder), ONETRANS_SERVING_CACHE_MIB="0") as without:
        one = Calls(schema, 1)
        for service in (kept, without):
            service.at_once(one.anonymous, 20)
        for candidates in sizes:
            calls, case = Calls(schema, candidates), f"{size}, {candidates} candidates"
            number = AT_ONCE * max(per_case * 100 // (100 + candidates), 2)
            for body in (calls.cold, calls.warm):  # the second also makes the warm users known
                kept.at_once(body, max(WARM_USERS, AT_ONCE))
            cases = {
                "cold": partial(kept.at_once, calls.cold, number),
                "warm": partial(kept.at_once, calls.warm, number),
                "off": partial(without.at_once, calls.anonymous, number),
                "apart": partial(without.at_once, one.anonymous, AT_ONCE * per_case),
            }
            cold, warm, off, apart = in_turns(cases, 2 if report.quick else 8)
            for name, load in (("cold", cold), ("warm", warm), ("cache off", off)):
                report.add(case, f"{name}: answered", load.per_second, "1/s")
                report.add(case, f"{name}: processor time", load.cpu_ms, "ms")
                report.add(case, f"{name}: failed", load.failed, "", "== 0")
            report.add(case, "cold: p50, 8 at once", cold.ms(0.5), "ms")
            report.add(case, "cold: p99, 8 at once", cold.ms(0.99), "ms")
            report.add(
                case,
                "warm over cold",
                cold.cpu_ms / warm.cpu_ms,
                "",
                ">= 1.5" if candidates == 10 and not report.quick else "",
            )
            report.add(case, "warm over cold, by requests per second", warm.per_second / cold.per_second)
            report.add(case, "cold over cache off", off.cpu_ms / cold.cpu_ms)
            report.add(
                case,
                "one request over candidates apart",
                apart.cpu_ms * candidates / cold.cpu_ms,
                "",
                ">= 10" if candidates == 100 and size == "small" else "",
            )
            report.add(case, "the same, by requests per second", cold.per_second / (apart.per_second / candidates))
        report.add(size, "memory of the service", kept.memory_mib, "MiB")


def measure_rates(report: Report, size: str, folder: Path, schema: FeatureSchema, candidates: int) -> None:
    """Find the highest rate that is sustained with half of the users warm, and the latency at 70 % of it."""
    seconds = 4.0 if report.quick else 15.0
    case = f"{size}, {candidates} candidates, half of the users warm"
    with serving(str(folder)) as service:
        calls = Calls(schema, candidates)
        turn = count()

        def mixed() -> bytes:
            return calls.warm() if next(turn) % 2 else calls.cold()

        service.at_once(calls.warm, WARM_USERS)
        rate = service.at_once(mixed, int(AT_ONCE * (4 if report.quick else 25))).per_second * 1.1
        for _ in range(TRIES):
            tried = service.at_rate(mixed, rate, int(rate * seconds) + AT_ONCE)
            if not tried.failed and not tried.grows:
                break
            rate *= STEP_DOWN
        else:
            raise RuntimeError(
                f"{case}: no rate was sustained, the last one tried was {rate / STEP_DOWN:.1f} per second"
            )
        report.add(case, "highest sustained rate", rate, "1/s")
        report.add(case, "p50 at that rate", tried.ms(0.5), "ms")
        report.add(case, "p99 at that rate", tried.ms(0.99), "ms")
        number = int(0.7 * rate * seconds) + AT_ONCE
        calm = service.at_rate(mixed, 0.7 * rate, number)
        report.add(case, "p50 at 70 %", calm.ms(0.5), "ms")
        report.add(case, "p95 at 70 %", calm.ms(0.95), "ms")
        expected = "< 100" if (size, candidates, report.quick) == ("small", 100, False) else ""
        report.add(case, "p99 at 70 %", calm.ms(0.99), "ms", expected)
        report.add(case, "failed at 70 %", calm.failed, "", "== 0")
        report.add(case, "processor at 70 %", calm.cpu_s / calm.seconds, "cores")
        random = service.at_rate(mixed, 0.7 * rate, number, at_random=True)
        report.add(case, "p99 at 70 %, random moments", random.ms(0.99), "ms")
        report.add(case, "failed at 70 %, random moments", random.failed, "", "== 0")
        over = service.at_rate(mixed, 2 * rate, int(2 * rate * seconds / 2) + AT_ONCE)
        report.add(case, "turned away at 200 %", over.refused / (over.failed + over.latency_S.size), "")
        report.add(case, "answered at 200 %", over.per_second, "1/s")
        report.add(case, "p99 of what is answered at 200 %", over.ms(0.99), "ms")
        after = service.at_once(mixed, AT_ONCE)
        report.add(case, "failed afterwards", after.failed, "", "== 0")


@contextmanager
def following(scratch: Path, size: str) -> Iterator[tuple[Service, FeatureSchema, Callable[[str], None]]]:
    """Start a service that follows an alias with two versions behind it, and give what moves the alias."""
    settings = MlflowSettings(tracking_uri=f"sqlite:///{scratch}/mlflow.db", artifacts=str(scratch / "artifacts"))
    registry = Registry(settings)
    for seed in range(2):
        folder = scratch / f"version-{seed + 1}"
        schema = save(folder / "artifacts", size, seed)
        client = connect(settings)
        run = client.create_run(experiment_id(settings))
        logged = client.create_logged_model(experiment_id(settings), name="onetrans", source_run_id=run.info.run_id)
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        registry.register(logged.model_id, run.info.run_id, {}, "a benchmark")

    def move(version: str) -> None:
        registry.client.set_registered_model_alias(registry.name, CHAMPION, version)

    move("1")
    variables = {
        "ONETRANS_MLFLOW_TRACKING_URI": settings.tracking_uri,
        "ONETRANS_MLFLOW_ARTIFACTS": settings.artifacts,
        "ONETRANS_SERVING_POLL_S": "0.5",
        "ONETRANS_SERVING_BODY_TIMEOUT_S": "3",
    }
    with serving(f"models:/{registry.name}@{CHAMPION}", **variables) as service:
        yield service, schema, move


def measure_swap(report: Report, scratch: Path, size: str) -> None:
    """Move the champion while requests come at a fixed rate."""
    case = f"{size}, 10 candidates, the champion moves"
    with following(scratch, size) as (service, schema, move):
        calls = Calls(schema, 10)
        rate = 0.5 * service.at_once(calls.cold, AT_ONCE * 6).per_second
        number = int(rate * (20 if report.quick else 40))
        load = service.at_rate(calls.cold, rate, number, lambda: move("2"))
        report.add(case, "version at the end", float(_ready(service.port)["version"]), "", "== 2")
        report.add(case, "calls at half of the rate", load.latency_S.size + load.failed)
        report.add(case, "failed", load.failed, "", "== 0")
        report.add(case, "p99", load.ms(0.99), "ms")
        report.add(case, "memory of the service", service.memory_mib, "MiB")


def measure_mixed(report: Report, scratch: Path, size: str) -> None:
    """Send an hour of mixed traffic in five minutes; the champion moves half-way and back at three quarters."""
    seconds = 20.0 if report.quick else 300.0
    case = f"{size}, mixed traffic"
    with following(scratch, size) as (service, schema, move):
        bodies = {candidates: Calls(schema, candidates) for candidates in traffic.SIZES}
        rng = np.random.default_rng(1)
        sizes = iter(rng.choice(list(traffic.SIZES), 10_000, p=list(traffic.SIZES.values())).tolist())
        full = service.at_once(lambda: bodies[next(sizes)].cold(), AT_ONCE * 20).per_second
        rate = MIXED_SHARE * full
        before = service.memory_mib
        planned = traffic.plan(rate, seconds)
        cpu, began = service.cpu_s, time.perf_counter()
        outcome = asyncio.run(_mixed(service.port, planned, bodies, {seconds / 2: "2", seconds * 3 / 4: "1"}, move))
        cpu_s, took = service.cpu_s - cpu, time.perf_counter() - began
        report.add(case, "most at once, answered", full, "1/s")
        report.add(case, "calls", len(planned))
        report.add(case, "of them plain or slow", sum(call.kind in ("plain", "slow") for call in planned))
        report.add(case, "seconds", took, "s")
        report.add(case, "of these not answered with 200", _failed(outcome, ("plain", "slow")), "", "== 0")
        report.add(case, "misbehaving, and not told so", _failed(outcome, tuple(traffic.KINDS)[2:]), "", "== 0")
        for (kind, status), times in sorted(outcome.unexpected.items()):
            report.add(case, f"{kind} answered with {status}", times)
        for candidates in traffic.SIZES:
            report.add(case, f"p50, {candidates} candidates", outcome.ms(candidates, 0.5), "ms")
            report.add(case, f"p99, {candidates} candidates", outcome.ms(candidates, 0.99), "ms")
        report.add(case, "versions that took over", _metric(service.port, "onetrans_model_swaps_total"), "", "== 2")
        report.add(case, "processor", cpu_s / took, "cores")
        report.add(case, "memory before", before, "MiB")
        report.add(case, "memory afterwards", service.memory_mib, "MiB")


async def _mixed(
    port: int,
    planned: list[traffic.Planned],
    bodies: Mapping[int, Calls],
    versions: Mapping[float, str],
    move: Callable[[str], None],
) -> traffic.Outcome:
    connections = Connections(port)
    try:
        return await traffic.send_all(
            port, planned, bodies, connections.call, {at_s: partial(move, v) for at_s, v in versions.items()}
        )
    finally:
        connections.close()


def _failed(outcome: traffic.Outcome, kinds: tuple[str, ...]) -> int:
    return sum(times for (kind, _), times in outcome.unexpected.items() if kind in kinds)


def measure_compute(report: Report, size: str, folder: Path, sizes: tuple[int, ...], *, compiled: bool) -> None:
    """Compare ways to compute the scores of one request whose user is new, in one process and in turns."""
    engine = OneTransInferenceEngine(str(folder), load_settings())
    model = engine.model
    assert isinstance(model, OneTrans)
    packed = {name: PackedOneTrans(model, name) for name in get_args(Precision)}

    def own(batch: RequestBatch) -> Scores:
        return model(batch)

    def of(name: Precision) -> Callable[[RequestBatch], Scores]:
        return lambda batch: packed[name].score(batch, packed[name].encode(batch, event_table(batch)))

    ways: dict[str, Callable[[RequestBatch], Scores]] = {
        "the model's forward pass": own,
        **{f"packed, {name}": of(name) for name in packed},
    }
    if compiled:
        ways["torch.compile of the forward pass"] = torch.compile(model, dynamic=True)
    for candidates in sizes:
        asked = request(engine.schema, candidates, np.random.default_rng(candidates))
        batch = engine.encode([asked])
        case = f"{size}, {candidates} candidates, no HTTP"
        with torch.inference_mode():
            wanted = model(batch)
            least = dict.fromkeys(ways, float("inf"))
            for turn in range(5 if report.quick else 40):
                for name, way in ways.items():
                    began = time.perf_counter()
                    found = way(batch)
                    least[name] = min(least[name], time.perf_counter() - began)
                    if not turn:
                        report.add(case, f"{name}: largest difference of a logit", _difference(found, wanted))
        for name, spent in least.items():
            report.add(case, f"{name}: least time", 1000 * spent, "ms")
        short_s = _least_s(partial(engine.encode, [asked]))
        rows_s = _least_s(partial(_through_rows, asked, engine.schema, model.config.max_seq_len))
        report.add(case, "request to batch: least time", 1000 * short_s, "ms")
        report.add(case, "request to batch through rows: least time", 1000 * rows_s, "ms")
        for name in list(ways)[1:]:
            report.add(case, f"forward pass over {name}", least["the model's forward pass"] / least[name])


class StageII(torch.nn.Module):
    """Stage II of a packed model for one request, with tensors alone in and out, as ``torch.export`` takes it."""

    def __init__(self, packed: PackedOneTrans) -> None:
        super().__init__()
        self.packed = packed

    def forward(
        self,
        user_RU: Tensor,
        context_RK: Tensor,
        item_NI: Tensor,
        request_time_R: Tensor,
        keys_LHD: list[Tensor],
        values_LHD: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return the logits."""
        none = torch.zeros(0)
        batch = RequestBatch(
            user_RU=user_RU,
            context_RK=context_RK,
            item_NI=item_NI,
            candidate_offsets_O=none,
            event_EV=none,
            event_sequence_E=none,
            event_time_E=none,
            event_offsets_O=none,
            request_time_R=request_time_R,
            click_N=none,
            conversion_N=none,
        )
        user = UserState(none, tuple(keys_LHD), tuple(values_LHD), (), None)
        return tuple(self.packed.score_counted(batch, [user], [item_NI.shape[0]]))


def measure_ahead_of_time(report: Report, size: str, folder: Path, sizes: tuple[int, ...]) -> None:
    """Compare the packed stage II of one request with what AOTInductor makes of it."""
    engine = OneTransInferenceEngine(str(folder), load_settings())
    packed = engine.packed
    assert packed is not None

    def asked(candidates: int) -> tuple[RequestBatch, list[UserState], tuple[Any, ...]]:
        batch = engine.encode([request(engine.schema, candidates, np.random.default_rng(candidates))])
        users = packed.encode(batch, event_table(batch))
        tensors = (batch.user_RU, batch.context_RK, batch.item_NI, batch.request_time_R)
        return batch, users, (*tensors, list(users[0].keys_LHD), list(users[0].values_LHD))

    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        example = asked(10)[2]
        any_number = torch.export.Dim.AUTO
        lengths = [{0: any_number}] * len(example[4])
        shapes = (None, None, {0: any_number}, None, lengths, lengths)
        began = time.perf_counter()
        exported = torch.export.export(StageII(packed), example, dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=f"{scratch}/stage.pt2")
        report.add(f"{size}, stage II by itself", "AOTInductor: to compile", time.perf_counter() - began, "s")
        compiled = torch._inductor.aoti_load_package(package)
        for candidates in sizes:
            batch, users, tensors = asked(candidates)
            case = f"{size}, {candidates} candidates, stage II by itself"
            wanted = packed.score(batch, users)
            report.add(case, "AOTInductor: largest difference of a logit", _difference(compiled(*tensors), wanted))
            least = [float("inf")] * 2
            ways = (partial(packed.score, batch, users), partial(compiled, *tensors))
            for _ in range(5 if report.quick else 60):
                for number, way in enumerate(ways):
                    began = time.perf_counter()
                    way()
                    least[number] = min(least[number], time.perf_counter() - began)
            report.add(case, "packed: least time", 1000 * least[0], "ms")
            report.add(case, "AOTInductor: least time", 1000 * least[1], "ms")
            report.add(case, "packed over AOTInductor", least[0] / least[1])


def measure_nightly(report: Report, size: str, folder: Path, candidates: int) -> None:
    """Score Arrow batches of users as a worker of the nightly job does."""
    from jobs.score_candidates import score_rows  # imports Spark

    model, schema, _ = load_model(str(folder / "model"))
    users = max(4096 // candidates, 1)
    rng = np.random.default_rng(candidates)
    rows = to_rows([request(schema, candidates, rng) for _ in range(users)], schema)
    rows = rows.append_column("user_id", pa.array([f"u{n}" for n in range(users)]))
    least = _least_s(lambda: score_rows(model, schema, rows, "1"), 2 if report.quick else 6)
    case = f"{size}, nightly, {users} users of {candidates} candidates at once"
    report.add(case, "candidates per second of processor time", users * candidates / least, "1/s")
    report.add(case, "users per second of processor time", users / least, "1/s")


def _through_rows(asked: Mapping[str, Any], schema: FeatureSchema, max_seq_len: int) -> RequestBatch:
    return batch_of(to_rows([asked], schema), schema, max_seq_len)


def _least_s(run: Callable[[], object], times: int = 20) -> float:
    """Return the least processor time of some runs."""
    least = float("inf")
    for _ in range(times):
        began = time.process_time()
        run()
        least = min(least, time.process_time() - began)
    return least


def _difference(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, wanted, strict=True))


def _ready(port: int) -> Mapping[str, Any]:
    import httpx

    found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/readyz").json()
    return found


def _metric(port: int, name: str) -> float:
    import httpx

    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + " ", name + "{")))


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--sizes", default="small", help="presets, separated by commas (default: small)")
    options.add_argument(
        "--parts", default=",".join(PARTS), help=f"what to measure, separated by commas (default: {','.join(PARTS)})"
    )
    options.add_argument(
        "--candidates",
        help=f"sizes of a request (default: {','.join(map(str, COUNTS))}, quick: 10,100; rates: 100, quick: 10)",
    )
    options.add_argument("--compile", action="store_true", help="compute: torch.compile as well; needs a C++ compiler")
    options.add_argument("--ahead", action="store_true", help="compute: AOTInductor as well; needs a C++ compiler")
    options.add_argument("--device", default="cpu", help="where the service scores: cpu, cuda or cuda:N (default: cpu)")
    options.add_argument("--precision", default="float32", help="of the service: float32 or bfloat16")
    arguments = options.parse_args(argv)
    os.environ["ONETRANS_SERVING_DEVICE"] = arguments.device
    os.environ["ONETRANS_SERVING_PRECISION"] = arguments.precision
    report = Report("serving", arguments)
    parts = arguments.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        options.error(f"--parts: {unknown[0]!r} is none of {', '.join(PARTS)}")
    counts: tuple[int, ...] = (10, 100) if report.quick else COUNTS
    if arguments.candidates:
        counts = tuple(int(number) for number in arguments.candidates.split(","))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="onetrans-serving-") as scratch:
        for size in arguments.sizes.split(","):
            folder = Path(scratch) / size
            schema = save(folder, size)
            if "costs" in parts:
                measure_costs(report, size, folder, schema, counts)
            if "rates" in parts:
                for candidates in counts if arguments.candidates else (10 if report.quick else 100,):
                    measure_rates(report, size, folder, schema, candidates)
            if "compute" in parts:
                measure_compute(report, size, folder, counts, compiled=arguments.compile)
            if "compute" in parts and arguments.ahead:
                measure_ahead_of_time(report, size, folder, counts)
            if "nightly" in parts:
                for candidates in counts:
                    measure_nightly(report, size, folder, candidates)
        small = "tiny" if report.quick else "small"
        if "swap" in parts:
            measure_swap(report, Path(scratch) / "swap", small)
        if "mixed" in parts:
            measure_mixed(report, Path(scratch) / "mixed", small)
    report.add("machine", "load average at the end", os.getloadavg()[0])
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
