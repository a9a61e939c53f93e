"""What each choice of OneTrans is worth on the simulated shop: the paper's ablation table, and what goes beyond it.

Every variant changes one thing of its base and is trained as in
:mod:`benchmarks.learning`: same days, same order, one pass.  A difference is
taken seed by seed against the base, so that what a seed does to both cancels;
its mean and its standard deviation over the seeds are shown.  Beside it stands
the sign of the paper's table (arXiv 2510.26104, table 3, CTR AUC of OneTrans_S).

The base is the tiny preset.  It has two blocks, of which the top one has no
S-queries: there the pyramid has nothing to prune.  So what concerns the pyramid is
measured on a second base, with four blocks and a pyramid that begins at the
length of the shop's sequences.

Training time is that of the processor, on one thread.

Options: ``--days`` training days, ``--seeds`` how many seeds, ``--batch`` requests of a batch, ``--only`` variants.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field, replace
from datetime import timedelta
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import Report, parser
from benchmarks.learning import learn, pack
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE
from onetrans.models import OneTransConfig, preset
from onetrans.schema import FeatureSchema

logger = logging.getLogger(__name__)

FIGURES = ("CTR AUC", "CTR UAUC", "CVR AUC", "CVR UAUC")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    """What is changed, in words."""
    change: dict[str, Any] = field(default_factory=dict)
    """Fields of the base's configuration that are replaced."""
    base: str = "default"
    """Variant it is compared with; its own name for a base."""
    paper: float | None = None
    """The paper's change of CTR AUC, in per cent, where it has one."""


_DEEP = {"num_layers": 4, "max_seq_len": 32}

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
)
"""Rows of the table; the paper's first, then what goes beyond it.  A base stands before its variants."""

QUICK = ["group-wise tokenizer", "all parameters shared"]
"""Rows of the quick table."""

Figures = dict[str, float]


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


def markdown(variants: list[Variant], found: dict[str, list[Figures]], seconds: dict[str, list[float]]) -> str:
    """Return the table of means, spreads and differences."""
    heading = ("variant", "CTR AUC", "to its base", "paper", "CTR UAUC", "CVR AUC", "to its base", "CVR UAUC", "time")
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for variant in variants:
        runs, bases = found[variant.name], found[variant.base]
        cells = [variant.name]
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            cells.append(_with_spread(values, ".4f"))
            if figure.endswith(" AUC"):
                differences = [run[figure] - base[figure] for run, base in zip(runs, bases, strict=True)]
                is_base = variant.name == variant.base
                cells.append("" if is_base else _with_spread(differences, "+.4f"))
            if figure == "CTR AUC":
                cells.append("" if variant.paper is None else f"{variant.paper:+.2f} %")
        cells.append(f"{mean(seconds[variant.name]):.0f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--days", type=int, help="training days (default: 8, quick: 1)")
    options.add_argument("--seeds", type=int, help="seeds (default: 3, quick: 1)")
    options.add_argument("--batch", type=int, default=24, help="requests of a batch (default: %(default)s)")
    options.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        default=[],
        help="these variants, and their bases (default: all; quick: two)",
    )
    arguments = options.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    training_days = arguments.days or (1 if arguments.quick else 8)
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    variants = with_bases(arguments.only or (QUICK if arguments.quick else []))
    torch.set_num_threads(1)
    report = Report("ablation", arguments)
    schema, world = FeatureSchema.load(SCHEMA_FILE), WorldConfig()
    days = list(pack(world, schema, world.epoch + timedelta(days=training_days)).values())
    default = preset("onetrans", "tiny")
    assert isinstance(default, OneTransConfig)
    found: dict[str, list[Figures]] = {variant.name: [] for variant in variants}
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for seed in range(seeds):
        for number, variant in enumerate(variants, 1):
            run, took = learn(replace(default, **variant.change), schema, days, arguments.batch, seed)
            found[variant.name].append(run)
            seconds[variant.name].append(took)
            logger.info(
                "seed %d of %d, variant %d of %d, %s: %s, %.0f s", seed + 1, seeds, number, len(variants),
                variant.name, ", ".join(f"{name} {value:.4f}" for name, value in run.items()), took,
            )  # fmt: skip
    for variant in variants:
        for figure in FIGURES:
            values = [run[figure] for run in found[variant.name]]
            bases = [run[figure] for run in found[variant.base]]
            report.add(variant.name, figure, mean(values))
            if seeds > 1:
                report.add(variant.name, f"{figure}, spread", stdev(values))
            if variant.name != variant.base:
                differences = [value - base for value, base in zip(values, bases, strict=True)]
                report.add(variant.name, f"{figure}, against {variant.base}", mean(differences))
                if seeds > 1:
                    report.add(variant.name, f"{figure}, against {variant.base}, spread", stdev(differences))
        report.add(variant.name, "training, processor time", mean(seconds[variant.name]), "s")
    code = report.finish()
    print(f"\n{markdown(variants, found, seconds)}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
