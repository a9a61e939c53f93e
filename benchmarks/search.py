"""Hyperparameters of a model, searched at random around its preset: ``python -m benchmarks.search --model dcnv2_din``.

Each model is tuned on its own, on the same data and with the same number of
trials.  A trial trains in one pass on the days before a validation day and is
scored on that day, by the mean of CTR AUC and CVR AUC.  The first trial is the preset (with the learning rates of the
settings, where a lake is read); every other draws half of the fields anew.  Beside each stand size and training time.

Without ``--ds`` the simulated shop is the data (as in ``benchmarks.learning``); with
it the published days of the lake in force, DAY being the validation day.  Choose a
validation day before the days whose figures are reported.

The best of many trials is lucky as well as good.  So ``--confirm N`` trains it and the preset again with N seeds on
days that end with the validation day, and scores the day after it (in a lake: those up to ``--to``).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import Report, parser
from benchmarks.trials import FIGURES, Kept, Log, Published, Shop, Trial, drawn, lift, measured, run_kept
from onetrans.days import parse_day
from onetrans.models import ModelConfig
from onetrans.models.config import model_name
from onetrans.optim_config import OptimizerConfig
from onetrans.plan import ModelPlan, configured_models, preset_models
from onetrans.settings import load_settings

Choices = Mapping[str, tuple[Any, ...]]

LENGTHS = (16, 32, 64, 112)
"""Most recent events that a model reads; 112 is all of a KuaiRand request."""

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
        "max_seq_len": LENGTHS,
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

SHARE_DRAWN = 0.5
"""Share of the fields that a trial draws anew; the others stay as they were."""


def draws(
    model: ModelConfig, optimizer: OptimizerConfig, count: int, seed: int
) -> Iterator[tuple[dict[str, Any], ModelConfig, OptimizerConfig]]:
    """Yield (what differs, model, optimizers): first what was given, then ``count - 1`` random draws around it."""
    yield {}, model, optimizer
    name = model_name(model)
    rng = random.Random(f"{name} {seed}")
    seen = [(model, optimizer)]
    while len(seen) < count:
        of_model, of_optimizer = (
            {field: rng.choice(choices) for field, choices in space.items() if rng.random() < SHARE_DRAWN}
            for space in (SPACES[name], OPTIMIZER_SPACE)
        )
        drawn = replace(model, **of_model), replace(optimizer, **of_optimizer)
        if drawn in seen:
            continue
        seen.append(drawn)
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
    options.add_argument(
        "--batch", type=int, help="requests of a batch of the shop (24), impressions of the lake (256)"
    )
    options.add_argument("--days", type=int, help="training days (default: 8 of the shop, quick: 2; all of the lake)")
    options.add_argument("--ds", type=parse_day, metavar="DAY", help="validation day in the lake (default: simulate)")
    options.add_argument(
        "--confirm", type=int, default=0, metavar="N", help="seeds of the confirmation (default: none)"
    )
    options.add_argument("--to", type=parse_day, metavar="DAY", help="last day of the confirmation in the lake")
    options.add_argument("--keep", type=Path, metavar="DIR", help="folder of finished trials, read before one is run")
    arguments = options.parse_args(argv)
    count = arguments.trials or (2 if arguments.quick else 16)
    torch.set_num_threads(1)
    kept, days = Kept(arguments.keep), arguments.days or (2 if arguments.quick else 8)
    after: Callable[[], Log]
    log: Log
    if arguments.ds:
        longest, batch = max(LENGTHS), arguments.batch or 256
        log = Published(arguments.ds, arguments.ds, batch, longest, arguments.days)
        following = arguments.ds + timedelta(days=1)
        after = partial(Published, following, arguments.to or following, batch, longest, arguments.days)
        starts = configured_models(replace(load_settings().training, preset="tiny"))
    else:
        log = Shop(days, arguments.batch or 24)
        after = partial(Shop, days + 1, arguments.batch or 24)
        starts = preset_models("tiny")
    report = Report("search", arguments)
    best: dict[str, tuple[str, ModelConfig, OptimizerConfig]] = {}
    for name in [arguments.model] if arguments.model else sorted(SPACES):
        found: list[tuple[float, str, dict[str, float], Trial]] = []
        for number, (changed, config, optimizer) in enumerate(
            draws(starts[name].config, starts[name].optimizer, count, arguments.seed), 1
        ):
            trial = run_kept(kept, log, config, optimizer, arguments.seed)
            values = measured(log.days, trial.scores)
            both = (values["CTR AUC"] + values["CVR AUC"]) / 2
            case = f"{name}, {', '.join(f'{key} = {value}' for key, value in changed.items()) or 'preset'}"
            print(f"trial {number} of {count}: mean AUC {both:.4f}, {trial.seconds:.0f} s  {case}", file=sys.stderr)
            if not found or both > max(entry[0] for entry in found):
                best[name] = (case, config, optimizer)
            found.append((both, case, values, trial))
        for both, case, values, trial in sorted(found, key=lambda entry: -entry[0]):
            report.add(case, "mean of CTR and CVR AUC", both)
            for figure, value in values.items():
                report.add(case, figure, value)
            report.add(case, "training time (processor)", trial.seconds, "s")
            report.add(case, "weights outside the tables", trial.parameters)
    if arguments.confirm:
        _confirm(report, kept, after(), best, starts, arguments.confirm)
    return report.finish()


def _confirm(
    report: Report,
    kept: Kept,
    log: Log,
    best: Mapping[str, tuple[str, ModelConfig, OptimizerConfig]],
    starts: Mapping[str, ModelPlan],
    seeds: int,
) -> None:
    """Train the best and the preset of each model on several seeds and report both, and what lies between.

    Where the preset itself was best there is nothing to confirm.
    """
    for name, (case, config, optimizer) in best.items():
        if (config, optimizer) == (starts[name].config, starts[name].optimizer):
            continue
        chosen = {"preset": (starts[name].config, starts[name].optimizer), case: (config, optimizer)}
        runs = {which: [run_kept(kept, log, *both, seed) for seed in range(seeds)] for which, both in chosen.items()}
        for which, trials in runs.items():
            shown = f"confirmed over {seeds} seeds: {name}, preset" if which == "preset" else f"confirmed: {which}"
            found = [measured(log.days, trial.scores) for trial in trials]
            for figure in FIGURES:
                report.add(shown, figure, mean(run[figure] for run in found))
                if seeds > 1:
                    report.add(shown, f"{figure}, spread", stdev(run[figure] for run in found))
            report.add(shown, "training time (processor)", mean(trial.seconds for trial in trials), "s")
        draws_of = drawn(log.days, {which: [trial.scores for trial in trials] for which, trials in runs.items()})
        for figure, over in lift(draws_of[case], draws_of["preset"]).items():
            report.add(f"{case}: lift over the preset", figure, over.lift)
            report.add(f"{case}: lift over the preset", f"{figure}, lower end at 90 %", over.low)
            report.add(f"{case}: lift over the preset", f"{figure}, upper end at 90 %", over.high)


if __name__ == "__main__":
    sys.exit(main())
