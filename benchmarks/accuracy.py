"""Accuracy of both models on the last days of a lake, over seeds, with paired intervals.

Each model is trained as the pipeline does it: one pass over the days before the
first scored day, then each scored day is scored first and trained on afterwards.
Both models read the same batches in the same order.  The lake is the one in force
(``onetrans config``); without a published day nothing is measured.

Beside them stand gradient-boosted trees (LightGBM, 300 trees, otherwise as it comes)
on the numbers of the same tables: counts, rates, attributes and the request's context,
without past events.

Learning rates are those of the settings (``training.dense_lr``, ``training.embedding_lr``), else the preset's.

Every day is scored twice: as in production, with every event known before a
request, and with events up to the day's beginning only.  The second shows how much
of a UAUC is the metric's own: UAUC compares a user's impressions of one day with
each other, and what was clicked earlier that day is then evidence about what
remains.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from typing import cast

import lightgbm
import numpy as np
import torch
from torch import nn

from benchmarks.common import Report, parser
from benchmarks.fitting import LabelledDay, PublishedDays, figures, probabilities, train_pass
from onetrans.batch import RequestBatch
from onetrans.bootstrap import Lift, ResampledAuc, paired_lifts
from onetrans.days import day_bounds, day_range, parse_day
from onetrans.errors import NotReadyError
from onetrans.metrics import user_auc
from onetrans.models import build_model, preset
from onetrans.models.ranking import RankingModel, Scores
from onetrans.optim import build_optimizers
from onetrans.plan import configured_models
from onetrans.settings import Preset, load_settings

MODELS = ("onetrans", "dcnv2_din")
FIGURES = ("ctr_auc", "ctr_uauc", "cvr_auc", "cvr_uauc")
ALL, EARLIER = "all events", "events before the day"
REFERENCE = {
    ("kuairand", date(2022, 5, 6)): {"ctr_auc": ">= 0.740", "ctr_uauc": ">= 0.625", "cvr_auc": ">= 0.654"},
}
"""What a model should reach on a public log: within 0.01 of untuned gradient-boosted trees on the same split.

The trees saw day-lagged rates only, so the view without the day's own events is the like for like.
"""


class UpTo(nn.Module):
    """A model that is not shown events at or after an instant."""

    def __init__(self, model: RankingModel, instant_us: int) -> None:
        super().__init__()
        self.model = model
        self.instant_us = instant_us

    def forward(self, batch: RequestBatch) -> Scores:
        """Score the batch without its later events."""
        kept_E = batch.event_time_E < self.instant_us
        before_O = torch.cat((kept_E.new_zeros(1, dtype=torch.int64), kept_E.long().cumsum(0)))
        return self.model(
            replace(
                batch,
                event_EV=batch.event_EV[kept_E],
                event_sequence_E=batch.event_sequence_E[kept_E],
                event_time_E=batch.event_time_E[kept_E],
                event_offsets_O=before_O[batch.event_offsets_O],
            )
        )


@dataclass(frozen=True)
class Scored:
    """Both probabilities of a day's impressions under one view."""

    ds: date
    view: str
    ctr_N: np.ndarray
    cvr_N: np.ndarray


def chain(model_name: str, lake: PublishedDays, days: list[date], scored: dict[date, LabelledDay], seed: int,
          preset_name: str) -> Iterator[Scored]:  # fmt: skip
    """Train through the days, yielding each scored day's probabilities before it is trained on."""
    torch.manual_seed(seed)
    model = build_model(preset(model_name, preset_name), lake.schema)
    training = replace(load_settings().training, preset=cast(Preset, preset_name))
    optimizers = build_optimizers(model, configured_models(training)[model_name].optimizer)
    train_pass(model, optimizers, lake.training(lake.before(days[0]), seed))
    for ds in days:
        midnight_us = int(day_bounds(ds, lake.schema.timezone)[0].timestamp()) * 1_000_000
        for view, scorer in ((ALL, model), (EARLIER, UpTo(model, midnight_us))):
            yield Scored(ds, view, *probabilities(scorer, scored[ds].batches))
        if ds != days[-1]:
            train_pass(model, optimizers, lake.training([ds], seed))


def trees(lake: PublishedDays, ds: date) -> Scored:
    """Return the probabilities of gradient-boosted trees that were trained on the published days before ``ds``."""
    x_NF, click_N, conversion_N = lake.numbers(lake.before(ds))
    at_NF, _, _ = lake.numbers([ds])
    clicked = click_N > 0
    ctr_N, cvr_N = (
        np.asarray(_grown(x, label).predict_proba(at_NF))[:, 1]
        for x, label in ((x_NF, click_N), (x_NF[clicked], conversion_N[clicked]))
    )
    return Scored(ds, EARLIER, ctr_N, cvr_N)


def _grown(x_NF: np.ndarray, label_N: np.ndarray) -> lightgbm.LGBMClassifier:
    trees = lightgbm.LGBMClassifier(n_estimators=300, n_jobs=torch.get_num_threads(), verbose=-1, random_state=0)
    return trees.fit(x_NF, label_N)


def uauc_error(day: LabelledDay, ctr_N: np.ndarray) -> float:
    """Return the standard error of a day's click UAUC, from the spread between users."""
    users = user_auc(day.click_N, ctr_N, day.user_N)
    weight_U = users.impressions_U / users.impressions_U.sum()
    return float(np.sqrt((weight_U**2 * (users.auc_U - users.mean()) ** 2).sum()))


def pooled_lifts(scored: dict[date, LabelledDay], candidate: list[Scored], baseline: list[Scored]) -> dict[str, Lift]:
    """Return the paired lift of both tasks over all scored days together, drawn by user."""
    days = [entry.ds for entry in candidate]
    users = np.concatenate([scored[ds].user_N for ds in days])
    found, user_N = np.unique(users, return_inverse=True)
    click_N = np.concatenate([scored[ds].click_N for ds in days])
    conversion_N = np.concatenate([scored[ds].conversion_N for ds in days])
    clicked = click_N > 0

    def prepared(entries: list[Scored]) -> tuple[ResampledAuc, ResampledAuc]:
        ctr_N, cvr_N = (np.concatenate([getattr(e, task) for e in entries]) for task in ("ctr_N", "cvr_N"))
        return (
            ResampledAuc(click_N, ctr_N, user_N),
            ResampledAuc(conversion_N[clicked], cvr_N[clicked], user_N[clicked]),
        )

    (ctr, cvr), (ctr_0, cvr_0) = prepared(candidate), prepared(baseline)
    return paired_lifts({"CTR": (ctr, ctr_0), "CVR": (cvr, cvr_0)}, len(found), 1000, 0.9, seed=0)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a figure missed what is expected of it."""
    options = parser(__doc__)
    options.add_argument("--from", dest="first", type=parse_day, help="first scored day (default: the last but two)")
    options.add_argument("--to", dest="last", type=parse_day, help="last scored day (default: the last published)")
    options.add_argument("--seeds", type=int, default=3, help="seeds (default: %(default)s)")
    options.add_argument("--batch", type=int, default=256, help="impressions of a batch (default: %(default)s)")
    options.add_argument("--preset", default="tiny", help="size of both models (default: %(default)s)")
    options.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    arguments = options.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    longest = max(preset(name, arguments.preset).max_seq_len for name in MODELS)
    report = Report("accuracy", arguments)
    try:
        lake = PublishedDays(arguments.batch, longest)
    except NotReadyError as error:
        print(f"benchmarks.accuracy: nothing measured; {error}")
        return 0
    if arguments.quick:
        print("benchmarks.accuracy: nothing measured; it has no quick form, a lake's last days take minutes")
        return 0
    last = arguments.last or lake.days[-1]
    first = arguments.first or lake.days[max(len(lake.days) - 3, 1)]
    days = day_range(first, last)
    scored = {ds: lake.labelled(ds) for ds in days}
    values: dict[tuple[str, str, date, str], list[float]] = {}
    lifts: dict[str, list[Lift]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        runs: dict[str, list[Scored]] = {}
        for name in MODELS:
            begun = time.process_time()
            runs[name] = list(chain(name, lake, days, scored, seed, arguments.preset))
            seconds.setdefault(name, []).append(time.process_time() - begun)
            for entry in runs[name]:
                metrics = figures(scored[entry.ds], entry.ctr_N, entry.cvr_N)
                for figure in FIGURES:
                    if (value := getattr(metrics, figure)) is not None:
                        values.setdefault((name, entry.view, entry.ds, figure), []).append(value)
            print(f"seed {seed + 1} of {arguments.seeds}: {name} in {seconds[name][-1]:.0f} s", file=sys.stderr)
        produced = [[e for e in runs[name] if e.view == ALL] for name in MODELS]
        for task, lift in pooled_lifts(scored, *produced).items():
            lifts.setdefault(task, []).append(lift)
    for ds in days:
        entry = trees(lake, ds)
        metrics = figures(scored[ds], entry.ctr_N, entry.cvr_N)
        for figure in FIGURES:
            if (value := getattr(metrics, figure)) is not None:
                report.add(f"trees, {ds}, counts and rates alone", figure, value)
        report.add(
            f"trees, {ds}, counts and rates alone", "ctr_uauc, standard error", uauc_error(scored[ds], entry.ctr_N)
        )
    for (name, view, ds, figure), found in values.items():
        like_for_like = view == EARLIER or not figure.endswith("_uauc")
        expected = REFERENCE.get((lake.schema.name, ds), {}).get(figure, "") if like_for_like else ""
        case = f"{name}, {ds}, {view}"
        report.add(case, f"{figure}, mean of seeds", float(np.mean(found)), "", expected)
        if len(found) > 1:
            report.add(case, f"{figure}, standard deviation", float(np.std(found, ddof=1)))
    for task, per_seed in lifts.items():
        for seed, lift in enumerate(per_seed):
            case = f"lift, {first} to {last} pooled, seed {seed}"
            report.add(case, f"{task} AUC", lift.lift)
            report.add(case, f"{task} AUC, lower end at 90 %", lift.low)
            report.add(case, f"{task} AUC, upper end at 90 %", lift.high)
    for name, found in seconds.items():
        report.add(name, "training and scoring, processor time per seed", float(np.mean(found)), "s")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
