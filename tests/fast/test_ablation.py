"""The ablation's variants: legal, each unlike its base, compared seed by seed."""

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ablation import VARIANTS, markdown, no_events, sequences_alike, with_bases
from benchmarks.fitting import LabelledDay
from benchmarks.trials import Alter, Kept, Trial, measured
from onetrans.batch import RequestBatch
from onetrans.models import build_model, preset
from tests.batches import model_schema, random_batch

EVENT_FIELDS = ("event_EV", "event_sequence_E", "event_time_E", "event_offsets_O")


def test_every_variant_is_a_model_unlike_its_base() -> None:
    by_name = {variant.name: variant for variant in VARIANTS}
    assert len(by_name) == len(VARIANTS)
    for place, variant in enumerate(VARIANTS):
        config = replace(preset("onetrans", "tiny"), **variant.change)
        build_model(config, model_schema())
        base = by_name[variant.base]
        assert VARIANTS.index(base) <= place
        same = replace(preset("onetrans", "tiny"), **base.change) == config and base.alter is variant.alter
        assert same == (base is variant)


def moved_by(alter: Alter | None, change: dict[str, Any], before: RequestBatch, after: RequestBatch) -> float:
    """Return how far a fresh model's click logits of two batches lie apart at most."""
    torch.manual_seed(0)
    model = build_model(replace(preset("onetrans", "tiny"), **change), model_schema()).eval()
    if alter:
        alter(model)
    with torch.no_grad():
        return float((model(before).ctr_logit_N - model(after).ctr_logit_N).abs().max())


def test_a_model_without_events_scores_alike_whatever_happened() -> None:
    some, other = (random_batch(model_schema(), [4] * 5, [lengths] * 5) for lengths in (3, 9))
    other = replace(some, **{name: getattr(other, name) for name in EVENT_FIELDS})
    assert moved_by(None, {}, some, other) > 0.01
    assert moved_by(no_events, {}, some, other) == 0


@pytest.mark.parametrize("separators", [False, True])
def test_sequences_embedded_alike_are_told_apart_by_sep_alone(separators: bool) -> None:
    """One event: moved to another sequence, it keeps all but its sequence."""
    change = {"merge": "intent_ordered", "max_seq_len": 1, "separators": separators}
    batch = random_batch(model_schema(), [4] * 5, [1] * 5)
    moved = replace(batch, event_sequence_E=1 - batch.event_sequence_E.clamp(max=1))
    assert moved_by(None, change, batch, moved) > 0.01
    # Rows of a product change places, so what is equal is so up to rounding.
    assert (moved_by(sequences_alike, change, batch, moved) > 1e-5) == separators


def test_bases_come_with_their_variants() -> None:
    assert [v.name for v in with_bases(["4 blocks, no pyramid"])] == ["4 blocks", "4 blocks, no pyramid"]
    assert with_bases([]) == list(VARIANTS)
    with pytest.raises(SystemExit, match="there is no variant 'dropout'"):
        with_bases(["dropout"])


@pytest.fixture
def day() -> LabelledDay:
    schema = model_schema()
    batch = random_batch(schema, [4] * 60, [3] * 60)
    return LabelledDay([batch], np.repeat(np.arange(30), 8))


def _trial(day: LabelledDay, noise: float, seed: int) -> Trial:
    rng = np.random.default_rng(seed)
    near = 0.5 + 0.1 * (day.click_N - 0.5) + noise * rng.normal(size=len(day.click_N))
    return Trial((((near - near.min()) / np.ptp(near), rng.random(len(near))),), 2.0 + seed, 10)


def test_differences_are_taken_seed_by_seed_and_over_the_same_users(day: LabelledDay) -> None:
    variants = with_bases(["full attention"])
    trials = {
        "default": [_trial(day, 0.3, 0), _trial(day, 0.3, 1)],
        "full attention": [_trial(day, 0.02, 2), _trial(day, 0.02, 3)],
    }
    *_, base, row = markdown(variants, trials, [day]).splitlines()
    assert base.endswith("| 2 s |")
    found = {name: [measured([day], trial.scores)["CTR AUC"] for trial in each] for name, each in trials.items()}
    differences = [a - b for a, b in zip(found["full attention"], found["default"], strict=True)]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2].startswith(f"{mean(found['full attention']):.4f} ± ")
    assert cells[3].startswith(f"{mean(differences):+.4f} ± {stdev(differences):.4f} [")
    low, high = (float(bound) for bound in cells[3].split("[")[1].rstrip("]").split(","))
    assert 0 < low < mean(differences) < high
    assert cells[4] == "+0.00 %"


def test_a_kept_trial_is_read_back_and_another_is_run(tmp_path: Path, day: LabelledDay) -> None:
    runs: list[int] = []

    def run(seed: int) -> Trial:
        runs.append(seed)
        return _trial(day, 0.1, seed)

    first = Kept(tmp_path).trial({"seed": 0}, lambda: run(0))
    again = Kept(tmp_path).trial({"seed": 0}, lambda: run(0))
    Kept(tmp_path).trial({"seed": 1}, lambda: run(1))
    assert runs == [0, 1]
    assert (again.seconds, again.parameters) == (first.seconds, first.parameters)
    for one, other in zip(first.scores[0], again.scores[0], strict=True):
        assert np.array_equal(one, other)
