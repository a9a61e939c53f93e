"""Accuracy of both models on the last days of a lake, over seeds, with paired intervals.

Each model is trained as the pipeline does it: one pass over the days before the
first scored day, then each scored day is scored first and trained on afterwards.
Both models read the same batches in the same order.  The lake is the one in force
(``onetrans config``); without a published day nothing is measured.

Beside them stand gradient-boosted trees (LightGBM, 300 trees, otherwise as it comes)
on the numbers of the same tables: counts, rates, attributes and the request's context,
without past events.

Learning rates are those of the settings (``training.dense_lr``, ``training.embedding_lr``), else the preset's.

A lift is that of OneTrans over the baseline on all scored days, a row being compared with rows of its own day only,
with its interval at 90 % over users (a paired bootstrap): for the mean over the seeds and for each seed.

Every day is scored twice: as in production, with every event known before a
request, and with events up to the day's beginning only.  The second shows how much
of a UAUC is the metric's own: UAUC compares a user's impressions of one day with
each other, and what was clicked earlier that day is then evidence about what
remains.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import cast

import lightgbm
import numpy as np
import torch
from torch import nn

from benchmarks.common import Report, parser
from benchmarks.fitting import LabelledDay, PublishedDays, probabilities, train_pass
from benchmarks.trials import FIGURES, Kept, Scores, Trial, drawn, lift, measured
from onetrans.batch import RequestBatch
from onetrans.days import day_bounds, day_range, parse_day
from onetrans.errors import NotReadyError
from onetrans.metrics import user_auc
from onetrans.models import build_model
from onetrans.models.ranking import RankingModel
from onetrans.models.ranking import Scores as Logits
from onetrans.optim import build_optimizers
from onetrans.plan import ModelPlan, configured_models
from onetrans.settings import Preset, load_settings

MODELS = ("onetrans", "dcnv2_din")
ALL, EARLIER = "all events", "events before the day"
REFERENCE = {
    ("kuairand", date(2022, 5, 6)): {"CTR AUC": ">= 0.740", "CTR UAUC": ">= 0.625", "CVR AUC": ">= 0.654"},
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

    def forward(self, batch: RequestBatch) -> Logits:
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


def chain(model: ModelPlan, lake: PublishedDays, days: list[date], scored: dict[date, LabelledDay], seed: int) -> Trial:
    """Train through the days; each is scored under both views before it is trained on.

    The scores are in the order day by day, ``ALL`` before ``EARLIER``.
    """
    torch.manual_seed(seed)
    network = build_model(model.config, lake.schema)
    optimizers = build_optimizers(network, model.optimizer)
    scores: list[Scores] = []
    seconds = 0.0

    def learn(of: list[date]) -> float:
        batches = lake.training(of, seed)
        begun = time.process_time()
        train_pass(network, optimizers, batches)
        return time.process_time() - begun

    seconds += learn(lake.before(days[0]))
    for ds in days:
        midnight_us = int(day_bounds(ds, lake.schema.timezone)[0].timestamp()) * 1_000_000
        scores += [probabilities(scorer, scored[ds].batches) for scorer in (network, UpTo(network, midnight_us))]
        if ds != days[-1]:
            seconds += learn([ds])
    return Trial(tuple(scores), seconds, sum(weight.numel() for weight in network.dense_parameters().values()))


def trees(lake: PublishedDays, ds: date) -> Scores:
    """Return the probabilities of gradient-boosted trees that were trained on the published days before ``ds``."""
    x_NF, click_N, conversion_N = lake.numbers(lake.before(ds))
    at_NF, _, _ = lake.numbers([ds])
    clicked = click_N > 0
    ctr_N, cvr_N = (
        np.asarray(_grown(x, label).predict_proba(at_NF))[:, 1]
        for x, label in ((x_NF, click_N), (x_NF[clicked], conversion_N[clicked]))
    )
    return ctr_N, cvr_N


def _grown(x_NF: np.ndarray, label_N: np.ndarray) -> lightgbm.LGBMClassifier:
    trees = lightgbm.LGBMClassifier(n_estimators=300, n_jobs=torch.get_num_threads(), verbose=-1, random_state=0)
    return trees.fit(x_NF, label_N)


def uauc_error(day: LabelledDay, ctr_N: np.ndarray) -> float:
    """Return the standard error of a day's click UAUC, from the spread between users."""
    users = user_auc(day.click_N, ctr_N, day.user_N)
    weight_U = users.impressions_U / users.impressions_U.sum()
    return float(np.sqrt((weight_U**2 * (users.auc_U - users.mean()) ** 2).sum()))


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a figure missed what is expected of it."""
    options = parser(__doc__)
    options.add_argument("--from", dest="first", type=parse_day, help="first scored day (default: the last but two)")
    options.add_argument("--to", dest="last", type=parse_day, help="last scored day (default: the last published)")
    options.add_argument("--seeds", type=int, default=3, help="seeds (default: %(default)s)")
    options.add_argument("--batch", type=int, default=256, help="impressions of a batch (default: %(default)s)")
    options.add_argument("--preset", default="tiny", help="size of both models (default: %(default)s)")
    options.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    options.add_argument(
        "--conversion-event",
        default="",
        metavar="TYPE",
        help="past event, such as like, that makes a click a conversion (default: the conversion of the tables)",
    )
    options.add_argument(
        "--keep", type=Path, metavar="DIR", help="folder of finished trainings, read before one is run"
    )
    arguments = options.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    models = configured_models(replace(load_settings().training, preset=cast(Preset, arguments.preset)))
    longest = max(models[name].config.max_seq_len for name in MODELS)
    report, kept = Report("accuracy", arguments), Kept(arguments.keep)
    try:
        lake = PublishedDays(arguments.batch, longest, arguments.conversion_event)
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
    about = {
        "lake": lake.schema.name, "before": lake.before(first), "days": days, "batch": arguments.batch,
        "longest": longest, "conversion": arguments.conversion_event,
    }  # fmt: skip
    trials: dict[str, list[Trial]] = {name: [] for name in MODELS}
    for seed in range(arguments.seeds):
        for name in MODELS:
            identity = {**about, "plan": models[name].to_dict(), "seed": seed}
            trials[name].append(kept.trial(identity, partial(chain, models[name], lake, days, scored, seed)))
            print(f"seed {seed + 1} of {arguments.seeds}: {name} in {trials[name][-1].seconds:.0f} s", file=sys.stderr)
    reference = {} if arguments.conversion_event else REFERENCE
    for ds in days:
        ctr_N, cvr_N = trees(lake, ds)
        case = f"trees, {ds}, counts and rates alone"
        for figure, value in measured([scored[ds]], [(ctr_N, cvr_N)]).items():
            report.add(case, figure, value)
        report.add(case, "CTR UAUC, standard error", uauc_error(scored[ds], ctr_N))
    for name in MODELS:
        for at, view in enumerate((ALL, EARLIER)):
            seeds = [trial.scores[at::2] for trial in trials[name]]
            for day, ds in enumerate(days):
                expected = reference.get((lake.schema.name, ds), {})
                found = [measured([scored[ds]], [scores[day]]) for scores in seeds]
                for figure in FIGURES:
                    like_for_like = view == EARLIER or not figure.endswith(" UAUC")
                    promise = expected.get(figure, "") if like_for_like else ""
                    _add(report, f"{name}, {ds}, {view}", figure, [entry[figure] for entry in found], promise)
            found = [measured(list(scored.values()), scores) for scores in seeds]
            for figure in FIGURES:
                _add(report, f"{name}, mean of the days, {view}", figure, [entry[figure] for entry in found])
    for at, view in enumerate((ALL, EARLIER)):
        draws = drawn(
            list(scored.values()),
            {
                f"{name} {which}": [trial.scores[at::2] for trial in chosen]
                for name in MODELS
                for which, chosen in [
                    ("mean of seeds", trials[name]),
                    *((f"seed {seed}", [trial]) for seed, trial in enumerate(trials[name])),
                ]
            },
        )
        for which in ("mean of seeds", *(f"seed {seed}" for seed in range(arguments.seeds))):
            for figure, over in lift(*(draws[f"{name} {which}"] for name in MODELS)).items():
                case = f"lift, {first} to {last}, {view}, {which}"
                report.add(case, figure, over.lift)
                report.add(case, f"{figure}, lower end at 90 %", over.low)
                report.add(case, f"{figure}, upper end at 90 %", over.high)
    for name, each in trials.items():
        report.add(name, "training, processor time per seed", float(np.mean([trial.seconds for trial in each])), "s")
        report.add(name, "weights outside the tables", each[0].parameters)
    return report.finish()


def _add(report: Report, case: str, figure: str, seeds: list[float], expected: str = "") -> None:
    report.add(case, f"{figure}, mean of seeds", float(np.mean(seeds)), "", expected)
    if len(seeds) > 1:
        report.add(case, f"{figure}, standard deviation", float(np.std(seeds, ddof=1)))


if __name__ == "__main__":
    raise SystemExit(main())
