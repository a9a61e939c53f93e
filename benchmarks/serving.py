"""The ranking service under load: a service in one process, a driver in another, over loopback.

The driver sends at fixed times whether or not answers have come (open loop), and counts the latency of a call from
the moment it was due; so a service that falls behind shows it.  How much a service can do at most is found before, by
as many calls at once as it takes (closed loop).

*Cold* requests are of users never seen before; *warm* ones of users whose keys and values are kept, with the same past
events.  *Apart* means a call per candidate, as a service would score that knows nothing of requests.  All have 200
past events, of which `small` reads the latest 128 and `base` all.

Beside requests per second stands what a request costs in processor time of the service.  On a machine that is shared
the one measures the neighbours too, and ratios are taken of the other.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.common import Report, parser
from onetrans.artifact import save_model
from onetrans.models import build_model, preset
from onetrans.registry import CHAMPION, Registry
from onetrans.requests import score
from onetrans.schema import FeatureSchema, Sequence
from onetrans.settings import MlflowSettings
from onetrans.tracking import connect, experiment_id

ROOT = Path(__file__).parents[1]
NOW = 1_767_225_600_000_000
EVENTS = {"click": 100, "cart": 60, "purchase": 40}
WARM_USERS = 32
AT_ONCE = 8
START_S = 300


@dataclass(frozen=True)
class Load:
    """What the service did in a while."""

    latency_S: np.ndarray
    """Seconds from when an answered call was due to its answer."""
    failed: int
    """Calls with any other answer than 200."""
    refused: int
    """Those of them that were turned away with 429."""
    seconds: float
    """How long it took."""
    cpu_s: float
    """Processor time of the service."""

    @property
    def per_second(self) -> float:
        """Answered calls per second."""
        return self.latency_S.shape[0] / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Processor time of the service per answered call."""
        return 1000 * self.cpu_s / max(self.latency_S.shape[0], 1)

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
        """Send one call and return the status of its answer."""
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self.port)
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
        self, body: Callable[[], bytes], rate: float, calls: int, meanwhile: Callable[[], None] = lambda: None
    ) -> Load:
        """Send calls at fixed times, ``rate`` per second; ``meanwhile`` runs in a thread after a third of them."""
        return asyncio.run(self._at_rate(body, rate, calls, meanwhile))

    async def _at_rate(self, body: Callable[[], bytes], rate: float, calls: int, meanwhile: Callable[[], None]) -> Load:
        connections, tally, sent, other = Connections(self.port), Tally(), [], None
        cpu, began = self.cpu_s, time.perf_counter()
        for number in range(calls):
            due = began + number / rate
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
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()

    async def timed(self, call: Any, due: float) -> None:
        """Wait for a call's answer and count it."""
        try:
            status = await call
        except (OSError, asyncio.IncompleteReadError):
            status = 0
        self.statuses[status] += 1
        if status == 200:
            self.latencies.append(time.perf_counter() - due)

    def load(self, seconds: float, cpu_s: float) -> Load:
        """Return what was counted.

        Raises:
            RuntimeError: if no call was answered.
        """
        if not self.latencies:
            raise RuntimeError(f"no call was answered; statuses (0: no answer) and how often: {dict(self.statuses)}")
        failed = self.statuses.total() - self.statuses[200]
        return Load(np.array(self.latencies), failed, self.statuses[429], seconds, cpu_s)


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


def measure_costs(report: Report, size: str, folder: Path, schema: FeatureSchema, sizes: tuple[int, ...]) -> None:
    """Measure what a request costs: cold, warm, without the cache, and with every candidate apart."""
    per_case = 6 if report.quick else 40
    with serving(str(folder)) as kept, serving(str(folder), ONETRANS_SERVING_CACHE_MIB="0") as without:
        one = Calls(schema, 1)
        without.at_once(one.anonymous, 20)
        for candidates in sizes:
            calls, case = Calls(schema, candidates), f"{size}, {candidates} candidates"
            number = AT_ONCE * max(per_case * 100 // (100 + candidates), 3)
            for body in (calls.cold, calls.warm):  # the second also makes the warm users known
                kept.at_once(body, max(WARM_USERS, AT_ONCE))
            cold, warm = kept.at_once(calls.cold, number), kept.at_once(calls.warm, number)
            off = without.at_once(calls.anonymous, number)
            apart = without.at_once(one.anonymous, AT_ONCE * per_case)
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
    seconds = 4.0 if report.quick else 20.0
    case = f"{size}, {candidates} candidates, half of the users warm"
    with serving(str(folder)) as service:
        calls = Calls(schema, candidates)
        turn = count()

        def mixed() -> bytes:
            return calls.warm() if next(turn) % 2 else calls.cold()

        service.at_once(calls.warm, WARM_USERS)
        rate = service.at_once(mixed, int(AT_ONCE * (4 if report.quick else 25))).per_second
        sustained = Load(np.zeros(0), 1, 0, 1.0, 0.0)
        for _ in range(8):
            sustained = service.at_rate(mixed, rate, int(rate * seconds) + AT_ONCE)
            if not sustained.failed and sustained.ms(0.99) < 1000:
                break
            rate *= 0.85
        report.add(case, "highest sustained rate", rate if not sustained.failed else 0, "1/s")
        report.add(case, "p99 at that rate", sustained.ms(0.99), "ms")
        calm = service.at_rate(mixed, 0.7 * rate, int(0.7 * rate * seconds) + AT_ONCE)
        report.add(case, "p50 at 70 %", calm.ms(0.5), "ms")
        report.add(case, "p95 at 70 %", calm.ms(0.95), "ms")
        report.add(case, "p99 at 70 %", calm.ms(0.99), "ms", "" if report.quick else "< 100")
        report.add(case, "failed at 70 %", calm.failed, "", "== 0")
        report.add(case, "processor at 70 %", calm.cpu_s / calm.seconds, "cores")
        over = service.at_rate(mixed, 2 * rate, int(2 * rate * seconds / 2) + AT_ONCE)
        report.add(case, "turned away at 200 %", over.refused / (over.failed + over.latency_S.size), "")
        report.add(case, "answered at 200 %", over.per_second, "1/s")
        report.add(case, "p99 of what is answered at 200 %", over.ms(0.99), "ms")
        after = service.at_once(mixed, AT_ONCE)
        report.add(case, "failed afterwards", after.failed, "", "== 0")


def measure_swap(report: Report, scratch: Path, size: str) -> None:
    """Move the champion while requests come at a fixed rate."""
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
    registry.client.set_registered_model_alias(registry.name, CHAMPION, "1")
    variables = {
        "ONETRANS_MLFLOW_TRACKING_URI": settings.tracking_uri,
        "ONETRANS_MLFLOW_ARTIFACTS": settings.artifacts,
        "ONETRANS_SERVING_POLL_S": "0.5",
    }
    calls = Calls(schema, 10)
    case = f"{size}, 10 candidates, the champion moves"
    with serving(f"models:/{registry.name}@{CHAMPION}", **variables) as service:
        rate = 0.5 * service.at_once(calls.cold, AT_ONCE * 6).per_second

        def move() -> None:
            registry.client.set_registered_model_alias(registry.name, CHAMPION, "2")

        load = service.at_rate(calls.cold, rate, int(rate * (20 if report.quick else 40)), move)
        version = _ready(service.port)["version"]
        report.add(case, "version at the end", float(version), "", "== 2")
        report.add(case, "calls at half of the rate", load.latency_S.size + load.failed)
        report.add(case, "failed", load.failed, "", "== 0")
        report.add(case, "p99", load.ms(0.99), "ms")
        report.add(case, "memory of the service", service.memory_mib, "MiB")


def _ready(port: int) -> Mapping[str, Any]:
    import httpx

    found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/readyz").json()
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--sizes", default="small", help="presets, separated by commas (default: small)")
    options.add_argument(
        "--parts", default="costs,rates,swap", help="what to measure, separated by commas (default: all)"
    )
    arguments = options.parse_args(argv)
    report = Report("serving", arguments)
    parts = arguments.parts.split(",")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="onetrans-serving-") as scratch:
        for size in arguments.sizes.split(","):
            folder = Path(scratch) / size
            schema = save(folder, size)
            if "costs" in parts:
                measure_costs(report, size, folder, schema, (10, 100) if report.quick else (1, 10, 100, 500))
            if "rates" in parts:
                measure_rates(report, size, folder, schema, 10 if report.quick else 100)
        if "swap" in parts:
            measure_swap(report, Path(scratch) / "registry", "tiny" if report.quick else "small")
    report.add("machine", "load average at the end", os.getloadavg()[0])
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
