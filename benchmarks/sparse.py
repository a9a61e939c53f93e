"""What a large embedding table costs each step: nothing, but for its own memory.

    python -m benchmarks.sparse [--quick] [--json FILE]

A tiny OneTrans with one hashed table of 1 M and of 50 M rows (with ``--quick`` 0.1 M
and 2 M) takes the same batches through :class:`onetrans.train.Training`'s step:
forward, backward, both clips, both optimizers and the watch for weights that do
not move.  Each size runs in a process of its own; the two take turns so that other
load on the machine meets both.

* *step*: processor time of the fastest step.  A lookup into a larger table misses
  the caches more often, which is all that may be seen of its size.
* *memory*: the most the process held during the steps, less what it held when
  table and optimizer state were there and filled.  The same for a checkpoint.
* *first step*: what a training does once, at its beginning.

That an update leaves all other rows alone is tested (``tests/fast/test_optim.py``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Report, parser
from onetrans.batch import RequestBatch
from onetrans.checkpoint import Checkpoint
from onetrans.guards import UnmovedWeights
from onetrans.loader import Cursor
from onetrans.models import RankingModel, build_model, preset
from onetrans.optim import Optimizers, build_optimizers
from onetrans.optim_config import optimizer_preset
from onetrans.plan import Recipe
from onetrans.schema import Feature, FeatureSchema, Sequence
from onetrans.train import compute_losses

_MIB = 2**20
_REQUESTS, _CANDIDATES, _EVENTS = 64, 8, 40
_BATCHES = 12


@dataclass(frozen=True)
class Measured:
    """Figures of one size."""

    table_mib: float
    """Table and optimizer state."""
    first_step_ms: float
    """Processor time of the first step."""
    step_ms: float
    """Processor time of the fastest of the others."""
    step_memory_mib: float
    """Memory of the steps beyond table and state, model and batches."""
    checkpoint_memory_mib: float
    """Memory of writing a checkpoint, likewise."""
    checkpoint_s: float
    """Time of writing it."""


def schema_with(rows: int) -> FeatureSchema:
    """Return a schema whose item ids have a table of ``rows`` rows, shared by candidates and events."""
    return FeatureSchema(
        name="sparse",
        features=(
            Feature("user", "user", "hashed", "user_id", hash_size=1000),
            Feature("item", "item", "hashed", "item_id", hash_size=rows),
            Feature("event_item", "event", "hashed", "item_id", hash_size=rows, embedding="item"),
        ),
        sequences=(Sequence("click", "click", max_length=_EVENTS),),
    )


def random_batch(schema: FeatureSchema, seed: int) -> RequestBatch:
    """Return a batch whose ids are spread over the whole table."""
    rng = np.random.default_rng(seed)
    candidates, events = _REQUESTS * _CANDIDATES, _REQUESTS * _EVENTS
    rows = schema.feature("item").rows
    clicks = rng.integers(0, 2, candidates)
    batch = RequestBatch(
        user_RU=torch.from_numpy(rng.integers(0, 1001, (_REQUESTS, 1))),
        context_RK=torch.zeros(_REQUESTS, 0, dtype=torch.int64),
        item_NI=torch.from_numpy(rng.integers(0, rows, (candidates, 1))),
        candidate_offsets_O=torch.arange(0, candidates + 1, _CANDIDATES),
        event_EV=torch.from_numpy(rng.integers(0, rows, (events, 1))),
        event_sequence_E=torch.zeros(events, dtype=torch.int64),
        event_time_E=torch.from_numpy(np.tile(np.arange(_EVENTS), _REQUESTS) * 1_000_000),
        event_offsets_O=torch.arange(0, events + 1, _EVENTS),
        request_time_R=torch.full((_REQUESTS,), 1_000_000_000),
        click_N=torch.from_numpy(clicks).float(),
        conversion_N=torch.from_numpy(clicks * rng.integers(0, 2, candidates)).float(),
    )
    batch.check()
    return batch


def measure(rows: int) -> Measured:
    """Build the model, take some steps, write a checkpoint."""
    torch.set_num_threads(1)
    schema = schema_with(rows)
    torch.manual_seed(0)
    model = build_model(preset("onetrans", "tiny"), schema)
    optimizers = build_optimizers(model, optimizer_preset("tiny"))
    batches = [random_batch(schema, seed) for seed in range(_BATCHES)]
    # The state is filled when it is made; what the first step of all allocates for itself belongs to the step.
    table = sum(p.numel() * p.element_size() for p in model.embedding_parameters().values()) * 2
    held = _resident()
    _reset_peak()
    watched = UnmovedWeights(model)
    model.train()
    times = [_step(model, optimizers, watched, batch) for batch in batches]
    steps = _peak() - held
    _reset_peak()
    before = _resident()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="onetrans-sparse-") as folder:
        Checkpoint.capture(model, optimizers, len(times), Cursor(), {}).save(folder)
        seconds = time.perf_counter() - began
    written = _peak() - before
    return Measured(table / _MIB, times[0] * 1e3, min(times[1:]) * 1e3, steps / _MIB, written / _MIB, seconds)


def _step(model: RankingModel, optimizers: Optimizers, watched: UnmovedWeights, batch: RequestBatch) -> float:
    """Take one step as a training does; return its processor time in seconds."""
    began = time.process_time()
    optimizers.zero_grad()
    losses = compute_losses(model(batch), batch, Recipe(512, 1, 0, 1.0, 1.0))
    losses.total.backward()
    watched.before_step()
    optimizers.step()
    watched.after_step()
    return time.process_time() - began


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _in_own_process(rows: int) -> Measured:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sparse", "--only", str(rows)], stdout=subprocess.PIPE, text=True, check=True
    )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main(argv: list[str] | None = None) -> int:
    """Measure both sizes and compare them."""
    options = parser(__doc__)
    options.add_argument("--only", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    if arguments.only:
        print(json.dumps(asdict(measure(arguments.only))))
        return 0
    small, large = (100_000, 2_000_000) if arguments.quick else (1_000_000, 50_000_000)
    best: dict[int, Measured] = {}
    for _ in range(2 if arguments.quick else 3):
        for rows in (small, large):
            found = _in_own_process(rows)
            known = best.get(rows, found)
            fastest: dict[str, Any] = {
                name: min(getattr(known, name), getattr(found, name))
                for name in ("first_step_ms", "step_ms", "step_memory_mib", "checkpoint_memory_mib", "checkpoint_s")
            }
            best[rows] = replace(found, **fastest)
    report = Report("sparse", arguments)
    for rows, found in best.items():
        case = f"{rows / 1e6:g} M rows"
        report.add(case, "table and state", found.table_mib, "MiB")
        report.add(case, "first step", found.first_step_ms, "ms")
        report.add(case, "step", found.step_ms, "ms")
        report.add(case, "memory of the steps", found.step_memory_mib, "MiB")
        report.add(case, "memory of a checkpoint", found.checkpoint_memory_mib, "MiB")
        report.add(case, "writing a checkpoint", found.checkpoint_s, "s")
    one, other = best[small], best[large]
    case = f"{large / 1e6:g} M against {small / 1e6:g} M rows"
    report.add(case, "step", other.step_ms / one.step_ms, "times", expected="<= 1.25")
    report.add(case, "first step", other.first_step_ms - one.first_step_ms, "ms more", expected="<= 20")
    report.add(case, "memory of the steps", other.step_memory_mib - one.step_memory_mib, "MiB more", expected="<= 64")
    more = other.checkpoint_memory_mib - one.checkpoint_memory_mib
    report.add(case, "memory of a checkpoint", more, "MiB more", expected="<= 64")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
