"""What makes OneTrans fast: training step time and peak memory, one change after another.

    python -m benchmarks.model [--quick] [--device cpu|cuda] [--preset NAME ...] [--json FILE]

The first line of a shape is the plain reference of ``tests/padded_onetrans.py``:
padded, replicated per candidate, plain softmax attention.  Every further line
adds one change to those above it; figures stand against the line before and
against the reference.  A step is forward, backward and both optimizers on one
batch; its time is the fastest of several, which other load on the machine
disturbs least.  With ``--steps N`` every line has N of them after its first, so that
none is the fastest of more than another; otherwise as many as fit in ``--seconds``.
With ``--threads 1`` it is processor time: the same on an idle machine, and on a busy
one without the waiting.  Every line runs in a process of its own, so that its peak
memory is its own: what the process held at most, less what it held before the
model was built.  Before anything is timed, the scores of model and reference
are compared.

Lengths are skewed: of R requests, the r-th has ``longest * ((r + 1/2) / R)^3``
events, so that the mean is a quarter of the longest.  Where the reference needs
more memory than there is, it runs in parts of ``part`` requests whose gradients
add up; the other lines take the batch whole.

On a CUDA device model FLOPs utilisation is measured too: the operations that a
step needs (``benchmarks/flops.py``) over those the card does in the same time
on a large bfloat16 matrix product.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Report, parser
from benchmarks.flops import training_flops
from onetrans.batch import RequestBatch
from onetrans.freed_memory import keep_freed_memory
from onetrans.models import OneTrans, OneTransConfig, build_model, preset
from onetrans.models.compute import Compute
from onetrans.optim import build_optimizers
from onetrans.optim_config import optimizer_preset
from onetrans.plan import Recipe
from onetrans.schema import FeatureSchema, Side
from onetrans.train import compute_losses
from tests.padded_onetrans import PaddedOneTrans

SCHEMA_FILE = Path(__file__).parents[1] / "jobs" / "sources" / "kuairand" / "schema.toml"
_MIB = 2**20
_REQUEST_TIME_US = 1_650_000_000_000_000


@dataclass(frozen=True)
class Shape:
    """One batch."""

    candidates: int
    """Candidates of each request."""
    longest: int
    """Events of the longest request, and ``max_seq_len`` of the model."""
    requests: int
    """Requests."""
    skewed: bool = True
    """Whether lengths are skewed; otherwise all are the longest."""
    part: int = 0
    """Requests that the padded lines run at a time; 0: all."""

    @property
    def name(self) -> str:
        """What the tables call it."""
        lengths = f"up to {self.longest}" if self.skewed else f"{self.longest}"
        return f"{self.requests} x {self.candidates} candidates, {lengths} events"

    @property
    def samples(self) -> int:
        """Candidates of the batch."""
        return self.requests * self.candidates

    def lengths(self) -> list[int]:
        """Return the events of each request, in a fixed random order."""
        if not self.skewed:
            return [self.longest] * self.requests
        share = (np.arange(self.requests) + 0.5) / self.requests
        lengths = np.maximum(1, np.round(self.longest * share**3)).astype(int)
        # The longest is the one that gives the shape its name.
        lengths[-1] = self.longest
        return [int(length) for length in np.random.default_rng(0).permutation(lengths)]


@dataclass(frozen=True)
class Line:
    """One line of the table: a change, with all those before it."""

    name: str
    """What is added."""
    padded: dict[str, bool] | None = None
    """Flags of the padded reference; None for the model itself."""
    plain_attention: bool = False
    """Whether attention keeps its scores and weights in memory."""
    keeps_memory: bool = False
    """Whether the process keeps what it frees, as that of ``onetrans train`` does."""
    compute: Compute = field(default_factory=Compute)
    """How the model is computed."""
    compiled: bool = False
    """Whether forward and backward pass go through ``torch.compile``."""


_LINES = (
    Line("reference", {}, plain_attention=True),
    Line("+ shared user side", {"shared_user_side": True}, plain_attention=True),
    Line("+ pyramid", {"shared_user_side": True, "kept_queries_only": True}, plain_attention=True),
    Line("+ packed", plain_attention=True),
    Line("+ fused attention"),
    Line("+ freed memory kept", keeps_memory=True),
    Line("+ BF16", keeps_memory=True, compute=Compute("bfloat16")),
    Line("+ recomputation", keeps_memory=True, compute=Compute("bfloat16", recompute=True)),
    Line("+ compile", keeps_memory=True, compiled=True),
)
"""The last one adds to kept memory in float32, and is measured with ``--compile`` alone: compiling takes longer
than all the others."""

SHAPES: dict[str, dict[str, tuple[Shape, ...]]] = {
    "cpu": {
        "small": (
            Shape(16, 256, 32),
            Shape(16, 64, 32),
            Shape(100, 256, 3),
            Shape(16, 256, 8, skewed=False),
            Shape(16, 1190, 4, part=1),
        ),
        "base": (Shape(16, 256, 32, part=4), Shape(16, 1190, 2, part=1)),
    },
    "cuda": {
        "base": (Shape(16, 256, 128, part=16), Shape(16, 1190, 128, part=4), Shape(100, 1190, 20, part=1)),
        "large": (Shape(16, 1500, 128, part=2), Shape(100, 1500, 20, part=1)),
    },
}
"""Shapes by device and preset, counted from 1 in this order; 2048 candidates on a GPU, as in the paper (4.1)."""

_PROMISED = {"small": ("+ freed memory kept", ">= 8", "<= 0.3334"), "base": ("+ BF16", ">= 10", "")}
"""Line, and its speed and memory against the reference, promised on a CPU for the first shape of a preset.

On a CPU with bfloat16 products the wide ones of ``base`` gain from them, and the narrow ones of ``small`` lose.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--preset", nargs="+", choices=("tiny", "small", "base", "large"), help="default: all measured"
    )
    options.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options.add_argument("--seconds", type=float, default=8.0, help="time given to the steps of a line (default: 8)")
    options.add_argument("--steps", type=int, metavar="N", help="time N steps of every line, however long they take")
    options.add_argument("--shapes", type=int, nargs="+", metavar="N", help="measure these shapes of each preset alone")
    options.add_argument(
        "--lines", type=int, nargs="+", metavar="N", help="measure these lines alone; line 1 is the reference of all"
    )
    options.add_argument("--compile", action="store_true", help="also a line with torch.compile, which takes minutes")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    if arguments.worker:
        print(json.dumps(measure(**json.loads(arguments.worker))))
        return 0
    if arguments.steps is not None and arguments.steps < 1:
        options.error(f"--steps {arguments.steps}: at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda, but there is no CUDA device")
    report = Report("model", arguments, line_per_case=True)
    cases = _cases(arguments)
    for preset_name, shape in cases:
        _table(report, arguments, preset_name, shape)
    if arguments.device == "cpu":
        print("model FLOPs utilisation: not measured, there is no CUDA device in this run")
    return report.finish()


def _cases(arguments: argparse.Namespace) -> list[tuple[str, Shape]]:
    shapes = SHAPES[arguments.device]
    if arguments.quick:
        # Enough to notice that a change was lost; the reference's step alone takes seconds at full size.
        small = Shape(16, 256, 8) if arguments.device == "cpu" else Shape(16, 256, 32)
        return [(name, small) for name in arguments.preset or ["small"]]
    chosen = arguments.preset or list(shapes)
    return [
        (name, shape)
        for name in chosen
        for number, shape in enumerate(shapes.get(name, (Shape(16, 64, 32),)), start=1)
        if not arguments.shapes or number in arguments.shapes
    ]


def _table(report: Report, arguments: argparse.Namespace, preset_name: str, shape: Shape) -> None:
    """Measure all lines of one shape and add them to the report."""
    reference: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    promised = SHAPES["cpu"].get(preset_name, (None,))[0] == shape or arguments.quick
    for number, line in enumerate(_LINES):
        if (line.compiled and not arguments.compile) or (arguments.lines and number + 1 not in arguments.lines):
            continue
        cost = _in_own_process(arguments, preset_name, shape, number)
        before = before or cost
        if number == 0:
            reference = cost
        case = f"{preset_name}, {shape.name}: {line.name}"
        speed, memory = ("", "")
        if promised and arguments.device == "cpu" and preset_name in _PROMISED:
            where, *expected = _PROMISED[preset_name]
            speed, memory = expected if where == line.name else ("", "")
        report.add(case, "step", cost["step_s"] * 1e3, "ms")
        report.add(case, "samples", shape.samples / cost["step_s"], "1/s")
        report.add(case, "peak", cost["peak"] / _MIB, "MiB")
        report.add(case, "speed, before", before["step_s"] / cost["step_s"], "x")
        report.add(case, "memory, before", cost["peak"] / before["peak"], "x")
        if reference is not None:
            report.add(case, "speed, reference", reference["step_s"] / cost["step_s"], "x", speed)
            report.add(case, "memory, reference", cost["peak"] / reference["peak"], "x", memory)
        report.add(case, "first step", cost["first_s"], "s")
        if arguments.device == "cuda":
            report.add(case, "MFU", 100 * cost["flops"] / cost["step_s"] / cost["ceiling"], "%")
        print(
            f"{case:<75} {cost['step_s'] * 1e3:10,.1f} ms {shape.samples / cost['step_s']:10,.0f} samples/s "
            f"{cost['peak'] / _MIB:8,.0f} MiB "
            + (f"{reference['step_s'] / cost['step_s']:7.2f} x" if reference is not None else ""),
            flush=True,
        )
        report.save()
        before = cost


def _in_own_process(arguments: argparse.Namespace, preset_name: str, shape: Shape, number: int) -> dict[str, Any]:
    case = {
        "preset_name": preset_name,
        "shape": asdict(shape),
        "number": number,
        "device": arguments.device,
        "threads": arguments.threads,
        "seconds": 1.0 if arguments.quick else arguments.seconds,
        "steps": arguments.steps,
    }
    command = [sys.executable, "-m", "benchmarks.model", "--worker", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{preset_name}, {_LINES[number].name} ended with exit code {done.returncode}")
    return cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1]))


def measure(
    preset_name: str,
    shape: dict[str, Any],
    number: int,
    device: str,
    threads: int,
    seconds: float,
    steps: int | None = None,
) -> dict[str, Any]:
    """Measure one line of one shape in this process: ``steps`` timed steps, or as many as fit in ``seconds``."""
    line, drawn = _LINES[number], Shape(**shape)
    if line.keeps_memory:
        keep_freed_memory()
    torch.set_num_threads(threads)
    config = preset("onetrans", preset_name)
    assert isinstance(config, OneTransConfig)
    config = replace(config, max_seq_len=drawn.longest)
    schema = FeatureSchema.load(SCHEMA_FILE)
    held = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    model = cast(OneTrans, build_model(config, schema).to(device))
    batch = random_batch(schema, drawn).to(device)
    _check_same(model, batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = _stepper(model, line, batch, drawn, preset_name, device)
    clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
    first_s = _timed(step, device, clock)
    timed: list[float] = []
    while len(timed) < (steps or 1) or (steps is None and first_s + sum(timed) < seconds and len(timed) < 200):
        timed.append(_timed(step, device, clock))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    cost: dict[str, Any] = {"step_s": min(timed), "first_s": first_s, "peak": used}
    if device == "cuda":
        cost |= {"peak": torch.cuda.max_memory_allocated(), "ceiling": _matmul_ceiling()}
        cost["flops"] = training_flops(config, schema, batch)
    return cost


def _stepper(
    model: OneTrans, line: Line, batch: RequestBatch, shape: Shape, preset_name: str, device: str
) -> Callable[[], None]:
    """Return one training step."""
    optimizers = build_optimizers(model, optimizer_preset(preset_name))
    recipe = Recipe(batch_size=shape.samples, epochs=1, click_weight=1.0, conversion_weight=1.0, seed=0)
    network: nn.Module = model
    parts = [batch]
    if line.padded is not None:
        network = PaddedOneTrans(model, **line.padded)
        size = shape.part or shape.requests
        parts = [batch.select(chosen) for chosen in torch.arange(shape.requests, device=device).split(size)]
    else:
        model.use(line.compute)
        if line.compiled:
            model.compile(dynamic=True)

    def step() -> None:
        optimizers.zero_grad()
        for part in parts:
            with _attention(line), model.autocast():
                scores = network(part)
            (compute_losses(scores, part, recipe).total * (part.num_candidates / batch.num_candidates)).backward()
        optimizers.step()

    return step


def _attention(line: Line) -> AbstractContextManager[None]:
    return cast(AbstractContextManager[None], sdpa_kernel(SDPBackend.MATH)) if line.plain_attention else nullcontext()


def _timed(step: Callable[[], None], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


@torch.no_grad()
def _check_same(model: OneTrans, batch: RequestBatch) -> None:
    """Stop if the reference is not a reference of this model; two requests are enough to see it.

    The user side is shared, as the whole reference would take more memory than what is measured afterwards.
    """
    few = batch.select(torch.arange(min(2, batch.num_requests), device=batch.user_RU.device))
    for got, expected in zip(model(few), PaddedOneTrans(model, shared_user_side=True)(few), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def _matmul_ceiling() -> float:
    """Return the operations per second of a large bfloat16 matrix product on the current CUDA device."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = min(_timed(lambda: cast(None, a @ b), "cuda") for _ in range(20))
    return 2 * 8192**3 / best


def random_batch(schema: FeatureSchema, shape: Shape) -> RequestBatch:
    """Return a batch of uniformly random features: the least favourable one for caches and sparse gradients."""
    rng = np.random.default_rng(1)
    lengths = shape.lengths()

    def rows(side: Side, count: int) -> Tensor:
        columns = [rng.integers(0, f.rows, count) for f in schema.of_side(side)]
        return torch.from_numpy(np.stack(columns, axis=1)) if columns else torch.zeros(count, 0, dtype=torch.int64)

    ages = [np.sort(rng.integers(1, 30 * 86_400, length))[::-1] for length in lengths]
    samples = shape.samples
    batch = RequestBatch(
        user_RU=rows("user", shape.requests),
        context_RK=rows("context", shape.requests),
        item_NI=rows("item", samples),
        candidate_offsets_O=torch.arange(0, samples + 1, shape.candidates),
        event_EV=rows("event", sum(lengths)),
        event_sequence_E=torch.from_numpy(rng.integers(0, len(schema.sequences), sum(lengths))),
        event_time_E=torch.from_numpy(_REQUEST_TIME_US - np.concatenate(ages) * 1_000_000),
        event_offsets_O=torch.tensor([0, *np.cumsum(lengths)]),
        request_time_R=torch.full((shape.requests,), _REQUEST_TIME_US),
        click_N=torch.from_numpy(rng.integers(0, 2, samples)).float(),
        conversion_N=torch.from_numpy(rng.integers(0, 2, samples)).float(),
    )
    batch.check()
    return batch


if __name__ == "__main__":
    sys.exit(main())
