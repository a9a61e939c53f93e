"""The benchmark of the model: its shapes, and the operations it counts as needed."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import forward_flops
from benchmarks.model import SHAPES, Shape, random_batch
from onetrans.models import build_model, preset
from tests.batches import model_schema

SCHEMA = model_schema()
TINY = replace(preset("onetrans", "tiny"), max_seq_len=48)


def counted_flops(config, batch):
    """Operations of the matrix products outside attention that a forward pass executes."""
    model = build_model(config, SCHEMA)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if "attention" not in str(operator))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TINY, id="auto-split"),
        pytest.param(replace(TINY, tokenizer="group_wise", top_block="s_tail"), id="group-wise"),
        pytest.param(replace(TINY, merge="intent_ordered", separators=True, pyramid=False), id="intent"),
    ],
)
def test_needed_operations_are_the_executed_ones_without_attention(config):
    """Linear layers run on packed rows, so what is executed is what is needed; attention is counted by hand below."""
    batch = random_batch(SCHEMA, Shape(3, 48, 5))
    none = replace(
        batch, event_EV=batch.event_EV[:0], event_sequence_E=batch.event_sequence_E[:0],
        event_time_E=batch.event_time_E[:0], event_offsets_O=torch.zeros(6, dtype=torch.int64),
    )  # fmt: skip
    d, positions, candidates = config.hidden_dim, config.num_ns_tokens, batch.num_candidates
    attention = forward_flops(config, SCHEMA, batch) - counted_flops(config, batch)
    assert attention > 0
    if config is TINY:
        # Two blocks of NS-tokens; S-tokens ask in the first alone, and all that are left are seen in the second.
        lengths = batch.event_offsets_O.diff()
        first = (lengths * (lengths + 1) // 2).sum() + (3 * positions * lengths).sum()
        second = (3 * positions * lengths.clamp(max=48)).sum()
        own = 2 * candidates * positions * (positions + 1) // 2
        assert attention == 4 * d * int(first + second + own)
        left = forward_flops(config, SCHEMA, none) - counted_flops(config, none)
        assert left == 4 * d * own


@pytest.mark.parametrize(
    "shape", [shape for by_preset in SHAPES.values() for part in by_preset.values() for shape in part]
)
def test_lengths_reach_the_longest_and_average_a_quarter_of_it(shape):
    lengths = shape.lengths()
    assert max(lengths) == shape.longest
    assert len(lengths) == shape.requests
    if shape.skewed and shape.requests >= 16:
        assert sum(lengths) / len(lengths) == pytest.approx(shape.longest / 4, rel=0.1)
