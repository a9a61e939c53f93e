"""What a sliding window saves: a training step of long histories in stretches of queries, and under a mask alone.

    python -m benchmarks.window [--quick] [--json FILE]

Both forms give the same scores and gradients (``tests/component/test_padded_reference.py``).  They take turns in one
process, on one thread; a step is forward and backward, and the fastest of each form counts, in processor time.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import torch

from benchmarks.common import Report, parser
from onetrans.batch import RequestBatch
from onetrans.models import OneTransConfig, RankingModel, attention, build_model, preset
from tests.batches import model_schema, random_batch

EVENTS, WINDOWS = (256, 1190), (64, 128)
REQUESTS, CANDIDATES = 4, 16
NEVER = 1 << 30
"""So many queries together are all of them: the mask alone hides what lies before a window."""


def step(model: RankingModel, batch: RequestBatch, together: int) -> float:
    """Return the processor time of a step in which so many queries look through their windows together."""
    usual, attention.WINDOW_QUERIES = attention.WINDOW_QUERIES, together
    began = time.process_time()
    scores = model(batch)
    (scores.ctr_logit_N.sum() + scores.cvr_logit_N.sum()).backward()
    took = time.process_time() - began
    attention.WINDOW_QUERIES = usual
    model.zero_grad()
    return took


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    arguments = parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    report = Report("window", arguments)
    small = preset("onetrans", "tiny" if arguments.quick else "small")
    assert isinstance(small, OneTransConfig)
    schema = model_schema()
    for events in EVENTS[:1] if arguments.quick else EVENTS:
        batch = random_batch(schema, [CANDIDATES] * REQUESTS, [events] * REQUESTS)
        for window in WINDOWS:
            torch.manual_seed(0)
            config = replace(small, max_seq_len=events, sliding_window=window)
            windowed, whole = (build_model(c, schema) for c in (config, replace(config, sliding_window=0)))
            found: dict[str, list[float]] = {"in stretches": [], "under a mask": [], "no window": []}
            for _ in range(2 if arguments.quick else 7):
                found["in stretches"].append(step(windowed, batch, attention.WINDOW_QUERIES))
                found["under a mask"].append(step(windowed, batch, NEVER))
                found["no window"].append(step(whole, batch, NEVER))
            case = f"{events:,} events, window of {window}"
            for name, taken in found.items():
                report.add(case, f"step, {name}", 1e3 * min(taken[1:]), "ms")
            for name in ("under a mask", "no window"):
                report.add(case, f"{name} / in stretches", min(found[name][1:]) / min(found["in stretches"][1:]))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
