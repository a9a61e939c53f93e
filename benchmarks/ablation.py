"""What each choice of OneTrans is worth, on the simulated shop or a real log: the paper's ablation and beyond it.

Every variant changes one thing of its base and is trained on the same days, in the same
order, in one pass.  A difference is taken seed by seed against the base, so that what a
seed does to both cancels; its mean and its standard deviation over the seeds are shown, then
its interval at 90 % over users (a paired bootstrap of the mean over the seeds).  Beside it stands
the sign of the paper's table (arXiv 2510.26104, table 3, CTR AUC of OneTrans_S).

Without ``--ds`` the simulated shop is the log, as in :mod:`benchmarks.learning`.  With ``--ds DAY`` it is the lake in
force: trained on the published days before DAY, scored on the days from there to ``--to``, without training on any of
them.  Learning rates are then those of the settings (``training.dense_lr``), else the preset's.

The last rows of the table ask what [SEP] could tell here: models that see no event, or the latest alone, or whose three
sequences are embedded alike, so that nothing but [SEP] tells them apart.

The base is the tiny preset.  It has two blocks, of which the top one has no
S-queries: on the shop the pyramid has nothing to prune there.  So what concerns the pyramid is
measured on a second base, with four blocks and a pyramid that begins at the
length of the shop's sequences.

Training time is that of the processor, on one thread.

Options: ``--days`` training days of the shop, ``--seeds`` how many seeds, ``--batch``, ``--only`` variants, ``--keep``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from benchmarks.common import Report, parser
from benchmarks.fitting import LabelledDay
from benchmarks.trials import FIGURES, Alter, Kept, Log, Published, Shop, Trial, drawn, lift, measured, run_kept
from onetrans.batch import RequestBatch
from onetrans.bootstrap import Lift
from onetrans.days import parse_day
from onetrans.models import OneTrans, OneTransConfig, RankingModel, preset
from onetrans.optim_config import optimizer_preset
from onetrans.plan import configured_models
from onetrans.settings import load_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    """What is changed, in words."""
    change: dict[str, Any] = field(default_factory=dict)
    """Fields of the base's configuration that are replaced."""
    alter: Alter | None = None
    """What is taken from the model that no field takes."""
    base: str = "default"
    """Variant it is compared with; its own name for a base."""
    paper: float | None = None
    """The paper's change of CTR AUC, in per cent, where it has one."""


def no_events(model: RankingModel) -> None:
    """Hide all past events."""

    def hidden(_: nn.Module, inputs: tuple[RequestBatch]) -> tuple[RequestBatch]:
        (batch,) = inputs
        return (
            replace(
                batch,
                event_EV=batch.event_EV[:0],
                event_sequence_E=batch.event_sequence_E[:0],
                event_time_E=batch.event_time_E[:0],
                event_offsets_O=torch.zeros_like(batch.event_offsets_O),
            ),
        )

    model.register_forward_pre_hook(hidden)


def sequences_alike(model: RankingModel) -> None:
    """Embed the events of all behaviour sequences alike: one MLP, and no vector of the sequence."""
    assert isinstance(model, OneTrans)
    tokenizer = model.s_tokenizer
    tokenizer.mlps = nn.ModuleList([tokenizer.mlps[0]] * len(tokenizer.mlps))
    none_SD = torch.zeros_like(tokenizer.type_SD)
    del tokenizer.type_SD
    tokenizer.register_buffer("type_SD", none_SD)


_DEEP = {"num_layers": 4, "max_seq_len": 32}
_INTENT: dict[str, Any] = {"merge": "intent_ordered"}
_LATEST = {**_INTENT, "max_seq_len": 1}
_SEP = {"separators": True}

VARIANTS = (
    Variant("default"),
    Variant("group-wise tokenizer", {"tokenizer": "group_wise"}, paper=-0.10),
    Variant("intent-ordered merge, [SEP]", {"merge": "intent_ordered", "separators": True}, paper=-0.09),
    Variant("intent-ordered merge, no [SEP]", {"merge": "intent_ordered"}, paper=-0.13),
    Variant("all parameters shared", {"ns_parameters": "shared"}, paper=-0.15),
    Variant("full attention", {"attention": "full"}, paper=0.0),
    Variant("4 blocks", _DEEP, base="4 blocks"),
    Variant("4 blocks, no pyramid", {**_DEEP, "pyramid": False}, base="4 blocks", paper=-0.05),
    Variant("4 blocks, first block pruned", {**_DEEP, "first_block": "pruned"}, base="4 blocks"),
    Variant("4 blocks, S-queries in the top block", {**_DEEP, "top_block": "s_tail"}, base="4 blocks"),
    Variant("without QK-norm", {"qk_norm": False}),
    Variant("position: rotary, index alone", {"position": "rotary"}),
    Variant("position: learned", {"position": "learned"}),
    Variant("position: none", {"position": "none"}),
    Variant("gated attention", {"gated_attention": True}),
    Variant("grouped queries, 1 head of keys", {"num_kv_heads": 1}),
    Variant("sliding window of 8", {"sliding_window": 8}),
    Variant("relative bias", {"relative_bias": True}),
    Variant("relative bias, position: none", {"relative_bias": True, "position": "none"}),
    Variant("no events", alter=no_events),
    Variant("intent, alike", _INTENT, sequences_alike, base="intent, alike"),
    Variant("intent, alike, [SEP]", _INTENT | _SEP, sequences_alike, base="intent, alike"),
    Variant("intent, latest event", _LATEST, base="intent, latest event"),
    Variant("intent, latest event, [SEP]", _LATEST | _SEP, base="intent, latest event"),
    Variant("intent, latest event, alike", _LATEST, sequences_alike, base="intent, latest event, alike"),
    Variant("intent, latest event, alike, [SEP]", _LATEST | _SEP, sequences_alike, base="intent, latest event, alike"),
)
"""Rows of the table: the paper's, what goes beyond it, what explains [SEP].  A base stands before its variants."""

QUICK = ["group-wise tokenizer", "all parameters shared"]
"""Rows of the quick table."""


def with_bases(names: list[str]) -> list[Variant]:
    """Return the named variants and the bases they are compared with; all for no names.

    Raises:
        SystemExit: naming a variant that does not exist.
    """
    known = {variant.name: variant for variant in VARIANTS}
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"there is no variant {unknown[0]!r}; variants are: {'; '.join(known)}")
    wanted = set(names) | {known[name].base for name in names}
    return [variant for variant in VARIANTS if not names or variant.name in wanted]


def _with_spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def markdown(variants: list[Variant], trials: Mapping[str, list[Trial]], days: Sequence[LabelledDay]) -> str:
    """Return the table of means, spreads and differences; differences with their interval over users."""
    draws = drawn(days, {variant.name: [trial.scores for trial in trials[variant.name]] for variant in variants})
    found = {name: [measured(days, trial.scores) for trial in each] for name, each in trials.items()}
    heading = ["variant"]
    for figure in FIGURES:
        heading += [figure, "to its base"] + (["paper"] if figure == "CTR AUC" else [])
    heading.append("time")
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for variant in variants:
        cells = [variant.name]
        lifts = lift(draws[variant.name], draws[variant.base])
        for figure in FIGURES:
            cells.append(_with_spread([run[figure] for run in found[variant.name]], ".4f"))
            cells.append("" if variant.name == variant.base else _difference(variant, found, figure, lifts[figure]))
            if figure == "CTR AUC":
                cells.append("" if variant.paper is None else f"{variant.paper:+.2f} %")
        cells.append(f"{mean(trial.seconds for trial in trials[variant.name]):.0f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(variant: Variant, found: Mapping[str, list[dict[str, float]]], figure: str) -> list[float]:
    runs, bases = found[variant.name], found[variant.base]
    return [run[figure] - base[figure] for run, base in zip(runs, bases, strict=True)]


def _difference(variant: Variant, found: Mapping[str, list[dict[str, float]]], figure: str, over_users: Lift) -> str:
    shown = _with_spread(_differences(variant, found, figure), "+.4f")
    return f"{shown} [{over_users.low:+.4f}, {over_users.high:+.4f}]"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--days", type=int, help="training days (default: 8 of the shop, quick: 1; all of the lake)")
    options.add_argument("--ds", type=parse_day, metavar="DAY", help="first scored day of the lake (default: simulate)")
    options.add_argument("--to", type=parse_day, metavar="DAY", help="last scored day of the lake (default: that one)")
    options.add_argument("--seeds", type=int, help="seeds (default: 3, quick: 1)")
    options.add_argument(
        "--batch", type=int, help="requests of a batch of the shop (24), impressions of the lake (256)"
    )
    options.add_argument("--keep", type=Path, metavar="DIR", help="folder of finished trials, read before one is run")
    options.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        default=[],
        help="these variants, and their bases (default: all; quick: two)",
    )
    arguments = options.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    variants = with_bases(arguments.only or (QUICK if arguments.quick else []))
    torch.set_num_threads(1)
    report, kept = Report("ablation", arguments), Kept(arguments.keep)
    default, optimizer = preset("onetrans", "tiny"), optimizer_preset("tiny")
    assert isinstance(default, OneTransConfig)
    log: Log
    if arguments.ds:
        last, longest = arguments.to or arguments.ds, default.max_seq_len
        log = Published(arguments.ds, last, arguments.batch or 256, longest, arguments.days)
        optimizer = configured_models(replace(load_settings().training, preset="tiny"))["onetrans"].optimizer
    else:
        log = Shop(arguments.days or (1 if arguments.quick else 8), arguments.batch or 24)
    trials: dict[str, list[Trial]] = {variant.name: [] for variant in variants}
    for seed in range(seeds):
        for number, variant in enumerate(variants, 1):
            trial = run_kept(kept, log, replace(default, **variant.change), optimizer, seed, variant.alter)
            trials[variant.name].append(trial)
            logger.info(
                "seed %d of %d, variant %d of %d, %s: %s, %.0f s", seed + 1, seeds, number, len(variants), variant.name,
                ", ".join(f"{name} {value:.4f}" for name, value in measured(log.days, trial.scores).items()),
                trial.seconds,
            )  # fmt: skip
    found = {name: [measured(log.days, trial.scores) for trial in each] for name, each in trials.items()}
    for variant in variants:
        for figure in FIGURES:
            values = [run[figure] for run in found[variant.name]]
            report.add(variant.name, figure, mean(values))
            if seeds > 1:
                report.add(variant.name, f"{figure}, spread", stdev(values))
            if variant.name != variant.base:
                differences = _differences(variant, found, figure)
                report.add(variant.name, f"{figure}, against {variant.base}", mean(differences))
                if seeds > 1:
                    report.add(variant.name, f"{figure}, against {variant.base}, spread", stdev(differences))
        seconds = mean(trial.seconds for trial in trials[variant.name])
        report.add(variant.name, "training, processor time", seconds, "s")
    code = report.finish()
    print(f"\n{markdown(variants, trials, log.days)}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
