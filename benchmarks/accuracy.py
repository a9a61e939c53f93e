"""Accuracy of a day's finished training, with and without the events of that very day.

    python -m benchmarks.accuracy --plan FOLDER

FOLDER is what ``onetrans plan`` printed, once both models are trained.  Each
model scores the day twice: as it ranks in production, with every event known
before a request, and with events up to the day's beginning only.  The second
shows how much of a UAUC is the metric's own: UAUC compares a user's impressions
of one day with each other, and what was clicked earlier that day is then evidence
about what remains.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import torch
from torch import nn

from benchmarks.common import Report, parser
from onetrans.batch import RequestBatch
from onetrans.days import day_bounds
from onetrans.evaluate import compute_metrics, load_trained, score_day
from onetrans.models.ranking import RankingModel, Scores
from onetrans.plan import Plan
from onetrans.settings import load_settings

FIGURES = ("ctr_auc", "ctr_uauc", "cvr_auc", "cvr_uauc")
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


def main(argv: list[str] | None = None) -> int:
    """Measure one plan, print the table, and return 1 if a figure missed what is expected of it."""
    options = parser(__doc__)
    options.add_argument("--plan", metavar="FOLDER", help="folder printed by `onetrans plan`, both models trained")
    arguments = options.parse_args(argv)
    if not arguments.plan:
        print("benchmarks.accuracy: nothing measured; give --plan FOLDER of a day whose models are trained")
        return 0
    settings = load_settings()
    plan = Plan.load(arguments.plan)
    midnight_us = int(day_bounds(plan.ds, plan.schema.timezone)[0].timestamp()) * 1_000_000
    models = {name: load_trained(plan, name) for name in plan.models}
    expected = REFERENCE.get((plan.schema.name, plan.ds), {})
    report = Report("accuracy", arguments)
    views: dict[str, dict[str, nn.Module]] = {
        "all events": dict(models),
        "events before the day": {name: UpTo(model, midnight_us) for name, model in models.items()},
    }
    for view, scored in views.items():
        like_for_like = view == "events before the day"
        metrics = compute_metrics(score_day(plan, scored, settings), list(models))  # type: ignore[arg-type]
        for name in models:
            for figure in FIGURES:
                value = getattr(metrics[name], figure)
                if value is not None:
                    wanted = expected.get(figure, "") if like_for_like or not figure.endswith("_uauc") else ""
                    report.add(f"{name}, {view}", figure, value, "", expected=wanted)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
