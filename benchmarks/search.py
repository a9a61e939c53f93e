"""Hyperparameters of a model, searched at random around its preset: ``python -m benchmarks.search --model dcnv2_din``.

Each model is tuned on its own, on the same data and with the same number of
trials.  A trial trains in one pass on the days before a validation day and is
scored on that day, by the mean of CTR AUC and CVR AUC.  Trial 0 is the preset.

Without ``--ds`` the simulated shop is the data (as in ``benchmarks.learning``); with
it the published days of the lake in force, DAY being the validation day.  Choose a
validation day before the days whose figures are reported.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import date, timedelta
from typing import Any

import numpy as np
import torch

from benchmarks.common import Report, parser
from benchmarks.fitting import LabelledDay, PublishedDays, figures, probabilities, train_pass
from benchmarks.learning import pack
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE
from onetrans.batch import RequestBatch
from onetrans.days import parse_day
from onetrans.metrics import Metrics
from onetrans.models import ModelConfig, build_model, preset
from onetrans.optim import build_optimizers
from onetrans.optim_config import OptimizerConfig, optimizer_preset
from onetrans.schema import FeatureSchema

Choices = Mapping[str, tuple[Any, ...]]

SPACES: dict[str, Choices] = {
    "dcnv2_din": {
        "embedding_dim": (8, 16),
        "attention_hidden": ((32, 16), (64, 32), (128, 64)),
        "cross_layers": (1, 2, 3),
        "cross_rank": (0, 16),
        "mlp_hidden": ((64, 32), (128, 64), (256, 128)),
        "normalization": ("batch", "layer", "none"),
        "dropout": (0.0, 0.1, 0.2),
    },
    "onetrans": {
        "embedding_dim": (8, 16),
        "hidden_dim": (32, 64),
        "num_layers": (1, 2, 3),
        "num_heads": (2, 4),
        "max_seq_len": (16, 32, 64),
        "dropout": (0.0, 0.1, 0.2),
        "qk_norm": (True, False),
        "gated_attention": (True, False),
        "relative_bias": (True, False),
    },
}
"""Model fields a trial draws."""

OPTIMIZER_SPACE: Choices = {
    "dense_lr": (0.0005, 0.001, 0.002, 0.004),
    "weight_decay": (0.0, 0.01, 0.1),
    "embedding_lr": (0.01, 0.02, 0.05, 0.1),
    "warmup_steps": (0, 50, 200),
}
"""Optimizer fields a trial draws, alike for both models."""


@dataclass(frozen=True)
class Data:
    """Batches to train on and a day to validate on."""

    schema: FeatureSchema
    """Their schema."""
    training: list[RequestBatch]
    """In the order of training."""
    validation: LabelledDay
    """The day after them."""


def simulated(days: int, batch_size: int) -> Data:
    """Return days of the simulated shop; the day after them validates."""
    schema, world = FeatureSchema.load(SCHEMA_FILE), WorldConfig()
    *before, day = pack(world, schema, world.epoch + timedelta(days=days)).values()
    rng = np.random.default_rng(0)
    training = []
    for packed in before:
        requests = packed.batch.num_requests
        per_batch = max(1, round(batch_size * requests / packed.batch.num_candidates))
        order = rng.permutation(requests)
        training += [packed.take(order[at : at + per_batch]) for at in range(0, requests, per_batch)]
    whole = np.arange(day.batch.num_requests)
    batches = [day.take(whole[at : at + 256]) for at in range(0, len(whole), 256)]
    return Data(schema, training, LabelledDay(batches, day.user_N))


def published(ds: date, batch_size: int) -> Data:
    """Return the published days before ``ds``, and ``ds``."""
    lake = PublishedDays(batch_size, max(preset(name, "tiny").max_seq_len for name in SPACES))
    return Data(lake.schema, lake.training(lake.before(ds), 0), lake.labelled(ds))


def trials(model_name: str, count: int, seed: int) -> Iterator[tuple[dict[str, Any], ModelConfig, OptimizerConfig]]:
    """Yield (what differs from the preset, model, optimizers): the preset itself, then ``count - 1`` random draws."""
    model, optimizer = preset(model_name, "tiny"), optimizer_preset("tiny")
    yield {}, model, optimizer
    rng = random.Random(seed)
    for _ in range(count - 1):
        of_model = {name: rng.choice(choices) for name, choices in SPACES[model_name].items()}
        of_optimizer = {name: rng.choice(choices) for name, choices in OPTIMIZER_SPACE.items()}
        drawn = replace(model, **of_model), replace(optimizer, **of_optimizer)
        changed = {
            field.name: getattr(now, field.name)
            for now, before in zip(drawn, (model, optimizer), strict=True)
            for field in fields(now)
            if getattr(now, field.name) != getattr(before, field.name)
        }
        yield changed, *drawn


def main(argv: list[str] | None = None) -> int:
    """Run the search, print each trial as it ends and all of them best first."""
    options = parser(__doc__)
    options.add_argument("--model", choices=sorted(SPACES), help="model to tune (default: both, one after the other)")
    options.add_argument("--trials", type=int, help="trials of a model (default: 16, quick: 2)")
    options.add_argument("--seed", type=int, default=0, help="seed of the draws and the weights (default: %(default)s)")
    options.add_argument("--batch", type=int, default=256, help="impressions of a batch (default: %(default)s)")
    options.add_argument("--ds", type=parse_day, metavar="DAY", help="validation day in the lake (default: simulate)")
    arguments = options.parse_args(argv)
    count = arguments.trials or (2 if arguments.quick else 16)
    torch.set_num_threads(1)
    if arguments.ds:
        data = published(arguments.ds, arguments.batch)
    else:
        data = simulated(2 if arguments.quick else 8, arguments.batch)
    report = Report("search", arguments)
    for name in [arguments.model] if arguments.model else sorted(SPACES):
        found: list[tuple[float, str, Metrics, float]] = []
        for number, (changed, config, optimizer) in enumerate(trials(name, count, arguments.seed)):
            torch.manual_seed(arguments.seed)
            model = build_model(config, data.schema)
            start = time.process_time()
            train_pass(model, build_optimizers(model, optimizer), data.training)
            seconds = time.process_time() - start
            metrics = figures(data.validation, *probabilities(model, data.validation.batches))
            both = ((metrics.ctr_auc or 0.0) + (metrics.cvr_auc or 0.0)) / 2
            case = f"{name} {', '.join(f'{key}={value}' for key, value in changed.items()) or 'preset'}"
            print(f"trial {number + 1} of {count}: mean AUC {both:.4f}, {seconds:.0f} s  {case}", file=sys.stderr)
            found.append((both, case, metrics, seconds))
        for both, case, metrics, seconds in sorted(found, key=lambda entry: -entry[0]):
            report.add(case, "mean of CTR and CVR AUC", both)
            for figure in ("ctr_auc", "cvr_auc", "ctr_uauc", "ctr_log_loss"):
                value = getattr(metrics, figure)
                if value is not None:
                    report.add(case, figure, value)
            report.add(case, "training time (processor)", seconds, "s")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
