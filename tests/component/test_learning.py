"""OneTrans learns what the baseline does not: both models trained on the simulated shop, beside the true probabilities.

``learning_tolerance.json`` holds the mean over the seeds of every figure and how
far a later mean may be from it: two standard deviations over the seeds of
``python -m benchmarks.learning``, rounded up, and at least 0.005; for the truth,
which no seed moves, its rounding.  A change that moves a figure further has changed
what a model learns: look at why, and if it is meant, write the new mean there.
"""

import json
from datetime import timedelta
from pathlib import Path
from statistics import mean

import pytest
import torch

from benchmarks.learning import figures, learn, pack
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE
from onetrans.models import preset
from onetrans.schema import FeatureSchema

TOLERANCE = json.loads(Path(__file__).with_name("learning_tolerance.json").read_text(encoding="utf-8"))
MODELS = ("dcnv2_din", "onetrans")
TASKS = ("CTR AUC", "CVR AUC")

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def measured():
    """Figures by name: the true probabilities' once, each model's per seed."""
    torch.set_num_threads(1)
    schema, world = FeatureSchema.load(SCHEMA_FILE), WorldConfig()
    days = list(pack(world, schema, world.epoch + timedelta(days=TOLERANCE["training_days"])).values())
    found = {"truth": [figures(days[-1], days[-1].true_ctr_N, days[-1].true_cvr_N)]}
    for name in MODELS:
        config = preset(name, "tiny")
        found[name] = [
            learn(config, schema, days, TOLERANCE["batch_requests"], seed)[0] for seed in range(TOLERANCE["seeds"])
        ]
    return found


@pytest.mark.parametrize("task", TASKS)
def test_onetrans_lies_between_the_baseline_and_the_truth(measured, task):
    truth = measured["truth"][0][task]
    for baseline, onetrans in zip(measured["dcnv2_din"], measured["onetrans"], strict=True):
        assert baseline[task] < onetrans[task] <= truth


@pytest.mark.parametrize("task", TASKS)
def test_onetrans_closes_half_of_the_gap(measured, task):
    truth = measured["truth"][0][task]
    low, high = (mean(run[task] for run in measured[name]) for name in MODELS)
    assert (high - low) / (truth - low) >= 0.5


@pytest.mark.parametrize("name", ["truth", *MODELS])
def test_figures_are_where_they_were(measured, name):
    outside = {}
    for figure, (expected, allowed) in TOLERANCE["figures"][name].items():
        found = mean(run[figure] for run in measured[name])
        if abs(found - expected) > allowed:
            outside[figure] = f"{found:.4f}, expected {expected} within {allowed}"
    assert not outside
