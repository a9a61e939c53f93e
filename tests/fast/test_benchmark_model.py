"""The benchmark of the model: its shapes, and the operations it counts as needed."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.model
from benchmarks.flops import forward_flops
from benchmarks.model import SHAPES, Shape, main, random_batch
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


def pairs_by_hand(config, batch):
    """Count the pairs of query and key one by one, block after block, as the paper describes them."""
    separators = len(SCHEMA.sequences) - 1 if config.separators else 0
    positions, causal = config.num_ns_tokens, config.attention == "causal"
    pairs = 0
    for events, candidates in zip(
        batch.event_offsets_O.diff().tolist(), batch.candidate_offsets_O.diff().tolist(), strict=True
    ):
        tokens = min(events, config.max_seq_len) + separators
        for queries in config.query_schedule():
            kept = min(tokens, queries + (separators if queries == config.max_seq_len else 0))
            for query in range(tokens - kept, tokens):
                seen = [key for key in range(tokens) if not causal or key <= query]
                pairs += len([key for key in seen if not config.sliding_window or query - key < config.sliding_window])
            own = [(a, b) for a in range(positions) for b in range(positions) if not causal or b <= a]
            pairs += candidates * (positions * tokens + len(own))
            tokens = kept
    return pairs


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="default"),
        pytest.param({"tokenizer": "group_wise", "attention": "full", "top_block": "s_tail"}, id="full"),
        pytest.param({"sliding_window": 5, "first_block": "pruned", "gated_attention": True}, id="window"),
        pytest.param({"num_kv_heads": 1, "ns_parameters": "shared", "num_layers": 4}, id="grouped"),
        pytest.param({"merge": "intent_ordered", "separators": True}, id="separators"),
    ],
)
def test_needed_operations_of_every_switch(change):
    """Everything but attention as torch counts it while the model runs, and attention pair by pair."""
    config = replace(TINY, max_seq_len=32, **change)
    batch = random_batch(SCHEMA, Shape(3, 48, 6))
    attention = 4 * config.hidden_dim * pairs_by_hand(config, batch)
    assert forward_flops(config, SCHEMA, batch) == counted_flops(config, batch) + attention


def test_without_a_cuda_device_the_gpu_part_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda, but there is no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape", [shape for by_preset in SHAPES.values() for part in by_preset.values() for shape in part]
)
def test_lengths_reach_the_longest_and_average_a_quarter_of_it(shape):
    lengths = shape.lengths()
    assert max(lengths) == shape.longest
    assert len(lengths) == shape.requests
    if shape.skewed and shape.requests >= 16:
        assert sum(lengths) / len(lengths) == pytest.approx(shape.longest / 4, rel=0.1)


def test_without_the_reference_nothing_is_measured_against_it_and_each_line_is_kept(tmp_path, monkeypatch):
    kept = []

    def measured(arguments, preset_name, shape, number):
        kept.append(json.loads(file.read_text())["rows"] if file.exists() else [])
        return {"step_s": 2.0 / (number + 1), "first_s": 3.0, "peak": 1e9}

    file = tmp_path / "figures.json"
    monkeypatch.setattr(benchmarks.model, "_in_own_process", measured)
    options = ["--quick", "--device", "cpu", "--json", str(file)]
    assert main([*options, "--lines", "2", "5"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert not [row for row in rows if "reference" in row["figure"]]
    assert {row["case"] for row in kept[1]} == {rows[0]["case"]}  # the first line was written before the second ran
    main([*options, "--lines", "1", "5"])
    speeds = [row["value"] for row in json.loads(file.read_text())["rows"] if row["figure"] == "speed, reference"]
    assert speeds == [1.0, 5.0]
