"""What each model learns of the simulated shop, beside the true probabilities: AUC and UAUC of both tasks.

Both models of the tiny preset read the same requests in the same order, one pass
over the days before the evaluation day, with the optimizers of that preset.  A third
row shows the baseline with each event's rank among all sequences given to it: how
much of OneTrans's lead is knowing which event came last, whatever its type.  The
requests come straight from the generator, without Spark: sequences strictly
before the request, rates of the seven days before its day.

Options: ``--days`` training days, ``--seeds`` how many seeds, ``--batch`` requests of a batch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from benchmarks.common import Report, parser
from jobs.sources.simulated.truth import OFFERS, SURFACES
from jobs.sources.simulated.world import (
    DEVICES,
    HOUR,
    SEGMENTS,
    Catalog,
    Day,
    WorldConfig,
    build_catalog,
    microseconds,
    play,
    stream,
)
from jobs.sources.simulated.write import SCHEMA_FILE
from onetrans.batch import RequestBatch
from onetrans.metrics import auc, uauc
from onetrans.models import DCNv2DINConfig, ModelConfig, RankingModel, build_model, preset
from onetrans.optim import build_optimizers
from onetrans.optim_config import OptimizerConfig, optimizer_preset
from onetrans.schema import FeatureSchema, Side, hash64

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_WINDOW_DAYS = 7
_LATE_EVENTS = 12  # events looked at beyond a sequence's length, because some are not known yet
_SPAN = np.int64(1) << 42  # microseconds that keep (user, type, time) apart in one number


@dataclass(frozen=True)
class PackedDay:
    """All requests of one day, packed as in :mod:`onetrans.batch`."""

    batch: RequestBatch
    user_N: Ints
    true_ctr_N: Floats
    true_cvr_N: Floats

    def take(self, rows: Ints) -> RequestBatch:
        """Return the batch of some of the requests."""
        return self.batch.select(torch.from_numpy(rows))


def pack(config: WorldConfig, schema: FeatureSchema, last: date) -> dict[date, PackedDay]:
    """Play the world to ``last`` and return every day from the epoch on."""
    days, catalog = list(play(config, last)), build_catalog(config)
    history = _History(config, days)
    packed: dict[date, PackedDay] = {}
    counts: list[dict[str, Floats]] = []
    for day in (d for d in days if d.ds >= config.epoch):
        packed[day.ds] = _pack_day(config, catalog, schema, history, counts[-_WINDOW_DAYS:], day)
        counts.append(_counts(config, catalog, day))
    return packed


class _History:
    """All events of the world, ordered by (user, type, time)."""

    def __init__(self, config: WorldConfig, days: list[Day]) -> None:
        self.start = microseconds(config.first_day)
        user = np.concatenate([d.user_R[d.event_request_E] for d in days])
        kind = np.concatenate([d.event_type_E for d in days]) - 1
        time_ = np.concatenate([d.event_ts_E for d in days])
        order = np.lexsort((time_, kind, user))
        self.key = ((user * 4 + kind) * _SPAN + time_ - self.start)[order]
        self.time = time_[order]
        self.known = np.concatenate([d.event_available_E for d in days])[order]
        self.item = np.concatenate([d.item_RK[d.event_request_E, d.event_place_E] for d in days])[order]
        self.surface = np.concatenate([d.surface_R[d.event_request_E] for d in days])[order]

    def before(self, user_R: Ints, ts_R: Ints, kind: int, length: int) -> tuple[Ints, Ints]:
        """Return request and event of the last ``length`` events of a type known strictly before each request."""
        first = np.searchsorted(self.key, (user_R * 4 + kind) * _SPAN)
        end = np.searchsorted(self.key, (user_R * 4 + kind) * _SPAN + ts_R - self.start)
        event = end[:, None] - 1 - np.arange(length + _LATE_EVENTS)
        seen = event >= first[:, None]
        event = np.maximum(event, 0)
        seen &= self.known[event] < ts_R[:, None]
        seen &= np.cumsum(seen, axis=1) <= length
        request, column = np.nonzero(seen)
        return request, event[request, column]


def _counts(config: WorldConfig, catalog: Catalog, day: Day) -> dict[str, Floats]:
    r, k = np.nonzero(day.item_RK >= 0)
    item = day.item_RK[r, k]
    keys = {
        "user": (day.user_R[r], config.users),
        "item": (item, config.items),
        "category": (catalog.category_M[item], config.categories),
    }
    weights = (np.ones(len(r)), day.click_RK[r, k], day.conversion_RK[r, k])
    return {
        name: np.stack([np.bincount(index, weights=w, minlength=size) for w in weights])
        for name, (index, size) in keys.items()
    }


def _rates(window: list[dict[str, Floats]], key: str, index: Ints, smoothing: float) -> dict[str, Floats]:
    if not window:
        missing = np.full(len(index), np.nan)
        return {f"{key}_{figure}_7d": missing for figure in ("impressions", "ctr", "cvr")}
    impressions, clicks, conversions = np.sum([counts[key] for counts in window], axis=0)
    ctr, cvr = clicks.sum() / impressions.sum(), conversions.sum() / clicks.sum()
    return {
        f"{key}_impressions_7d": impressions[index],
        f"{key}_ctr_7d": ((clicks + smoothing * ctr) / (impressions + smoothing))[index],
        f"{key}_cvr_7d": ((conversions + smoothing * cvr) / (clicks + smoothing))[index],
    }


def _pack_day(
    config: WorldConfig,
    catalog: Catalog,
    schema: FeatureSchema,
    history: _History,
    window: list[dict[str, Floats]],
    day: Day,
) -> PackedDay:
    r, k = np.nonzero(day.item_RK >= 0)
    user, item = day.user_R, day.item_RK[r, k]
    pairs = [
        history.before(user, day.ts_R, kind, sequence.max_length) for kind, sequence in enumerate(schema.sequences)
    ]
    owner = np.concatenate([request for request, _ in pairs])
    event = np.concatenate([index for _, index in pairs])
    kind = np.repeat(np.arange(len(pairs)), [len(index) for _, index in pairs])
    order = np.lexsort((kind, history.time[event], owner))
    owner, event, kind = owner[order], event[order], kind[order]
    smoothing = schema.aggregates.smoothing
    columns: dict[Side, dict[str, npt.NDArray[np.generic]]] = {
        "user": {
            "user_id": _hashes("u", config.users)[user],
            "segment": _hashes("segment-", SEGMENTS)[catalog.segment_U[user]],
            "age_band": _hashes("age-", 6)[catalog.age_band_U[user]],
            **_rates(window, "user", user, smoothing),
        },
        "context": {
            "surface": _texts(SURFACES)[day.surface_R],
            "device": _texts(DEVICES)[day.device_R],
            "hour_of_day": (day.ts_R - microseconds(day.ds)) // HOUR,
        },
        "item": {
            **_item_columns(config, catalog, item),
            **_rates(window, "item", item, smoothing),
            **_rates(window, "category", catalog.category_M[item], smoothing),
            **({"picture": pictures(config, catalog)[item]} if schema.vectors("item") else {}),
        },
        "event": {
            **_item_columns(config, catalog, history.item[event]),
            "surface": _texts(SURFACES)[history.surface[event]],
        },
    }

    def rows(side: Side) -> torch.Tensor:
        features = schema.of_side(side)
        return torch.from_numpy(np.stack([f.encode(columns[side][f.column]) for f in features], axis=1))

    shown = [f.normalize(pictures(config, catalog)[item]) for f in schema.vectors("item")]
    requests = len(user)
    batch = RequestBatch(
        user_RU=rows("user"),
        context_RK=rows("context"),
        item_NI=rows("item"),
        candidate_offsets_O=torch.from_numpy(np.r_[0, np.cumsum(np.bincount(r, minlength=requests))]),
        event_EV=rows("event"),
        event_sequence_E=torch.from_numpy(kind),
        event_time_E=torch.from_numpy(history.time[event]),
        event_offsets_O=torch.from_numpy(np.r_[0, np.cumsum(np.bincount(owner, minlength=requests))]),
        request_time_R=torch.from_numpy(day.ts_R),
        click_N=torch.from_numpy(day.click_RK[r, k].astype(np.float32)),
        conversion_N=torch.from_numpy(day.conversion_RK[r, k].astype(np.float32)),
        item_vector_NX=torch.from_numpy(np.concatenate(shown, axis=1)) if shown else None,
    )
    batch.check()
    return PackedDay(batch, user[r], day.true_ctr_RK[r, k], day.true_cvr_RK[r, k])


def _item_columns(config: WorldConfig, catalog: Catalog, item: Ints) -> dict[str, npt.NDArray[np.generic]]:
    return {
        "item_id": _hashes("i", config.items)[item],
        "category": _hashes("category-", config.categories)[catalog.category_M[item]],
        "brand": _hashes("brand-", config.brands)[catalog.brand_M[item]],
        "offer": _texts(OFFERS)[catalog.offer_M[item]],
        "price": catalog.price_M[item],
    }


PICTURE_DIM = 32
"""Numbers of an item's picture."""


def pictures(config: WorldConfig, catalog: Catalog) -> npt.NDArray[np.float32]:
    """Return what an encoder would give for each item's picture, shape (items, PICTURE_DIM).

    A picture shows the category, the brand, the price tier, the offer and how appealing the item is, all mixed by a
    fixed random matrix, with noise of a tenth of their size.
    """
    seen = (
        np.eye(config.categories)[catalog.category_M],
        np.eye(config.brands)[catalog.brand_M],
        np.eye(len(OFFERS))[catalog.offer_M],
        catalog.price_tier_M[:, None] / 4,
        catalog.click_appeal_M[:, None],
        catalog.purchase_appeal_M[:, None],
    )
    rng = stream(config.seed, "pictures")
    facts = np.concatenate(seen, axis=1)
    clear = facts @ rng.normal(size=(facts.shape[1], PICTURE_DIM))
    return (clear + 0.1 * clear.std() * rng.normal(size=clear.shape)).astype(np.float32)


def _hashes(prefix: str, count: int) -> Ints:
    return _texts([f"{prefix}{number}" for number in range(count)])


def _texts(texts: tuple[str, ...] | list[str]) -> Ints:
    return np.array([hash64(text) for text in texts], dtype=np.int64)


def train(
    model: RankingModel, days: list[PackedDay], requests: int, seed: int, optimizer: OptimizerConfig | None = None
) -> None:
    """Train one pass over the days in order, requests shuffled within a day; optimizers default to ``tiny``'s."""
    optimizers = build_optimizers(model, optimizer or optimizer_preset("tiny"))
    rng = np.random.default_rng(seed)
    model.train()
    for day in days:
        for batch in _batches(day, rng.permutation(day.batch.num_requests), requests):
            scores = model(batch)
            clicked = batch.click_N > 0
            loss = F.binary_cross_entropy_with_logits(scores.ctr_logit_N, batch.click_N)
            if clicked.any():
                loss = loss + F.binary_cross_entropy_with_logits(
                    scores.cvr_logit_N[clicked], batch.conversion_N[clicked]
                )
            optimizers.zero_grad()
            loss.backward()
            optimizers.step()


def _batches(day: PackedDay, order: Ints, requests: int) -> Iterator[RequestBatch]:
    for start in range(0, len(order), requests):
        yield day.take(order[start : start + requests])


@torch.no_grad()
def score(model: RankingModel, day: PackedDay) -> tuple[Floats, Floats]:
    """Return both probabilities of every impression of a day."""
    model.eval()
    scores = [model(batch) for batch in _batches(day, np.arange(day.batch.num_requests), 256)]
    return tuple(  # type: ignore[return-value]
        torch.sigmoid(torch.cat([s[task] for s in scores]).double()).numpy() for task in (0, 1)
    )


def figures(day: PackedDay, ctr_N: Floats, cvr_N: Floats) -> dict[str, float]:
    """Return AUC and UAUC of both tasks; those of conversion over clicked impressions."""
    click, conversion = day.batch.click_N.numpy(), day.batch.conversion_N.numpy()
    clicked = click > 0
    return {
        "CTR AUC": auc(click, ctr_N),
        "CTR UAUC": uauc(click, ctr_N, day.user_N),
        "CVR AUC": auc(conversion[clicked], cvr_N[clicked]),
        "CVR UAUC": uauc(conversion[clicked], cvr_N[clicked], day.user_N[clicked]),
    }


def learn(
    config: ModelConfig, schema: FeatureSchema, days: list[PackedDay], requests: int, seed: int
) -> tuple[dict[str, float], float]:
    """Train a fresh model on all days but the last; return its figures on the last, and seconds of training.

    The seconds are those of this process on the processor, so that a busy machine does not change them.
    """
    *before, day = days
    torch.manual_seed(seed)
    model = build_model(config, schema)
    start = time.process_time()
    train(model, before, requests, seed)
    seconds = time.process_time() - start
    return figures(day, *score(model, day)), seconds


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--days", type=int, help="training days (default: 9, quick: 2)")
    options.add_argument("--seeds", type=int, help="seeds (default: 3, quick: 1)")
    options.add_argument("--batch", type=int, default=24, help="requests of a batch (default: %(default)s)")
    arguments = options.parse_args(argv)
    training_days = arguments.days or (2 if arguments.quick else 9)
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    torch.set_num_threads(1)
    report = Report("learning", arguments)
    schema, world = FeatureSchema.load(SCHEMA_FILE), WorldConfig()
    packed = pack(world, schema, world.epoch + timedelta(days=training_days))
    days = list(packed.values())
    *before, day = days
    report.add("data", "training rows", sum(d.batch.num_candidates for d in before), "impressions")
    report.add("data", "evaluation rows", day.batch.num_candidates, "impressions")
    truth = figures(day, day.true_ctr_N, day.true_cvr_N)
    for figure, value in truth.items():
        report.add("truth", figure, value)
    baseline = preset("dcnv2_din", "tiny")
    assert isinstance(baseline, DCNv2DINConfig)
    models = {
        "dcnv2_din": baseline,
        # What a merged order of events alone is worth, without a transformer over it.
        "dcnv2_din, event_rank merged": replace(baseline, event_rank="merged"),
        "onetrans": preset("onetrans", "tiny"),
    }
    for seed in range(seeds):
        found: dict[str, dict[str, float]] = {}
        for name, config in models.items():
            found[name], seconds = learn(config, schema, days, arguments.batch, seed)
            report.add(f"{name}, seed {seed}", "training, processor time", seconds, "s")
            for figure, value in found[name].items():
                report.add(f"{name}, seed {seed}", figure, value)
        for figure in ("CTR AUC", "CVR AUC"):
            low, high = found["dcnv2_din"][figure], found["onetrans"][figure]
            # Two days teach neither model enough to tell them apart: a promise stands on the full run only.
            report.add(
                f"lift, seed {seed}",
                f"{figure}: share of the way from baseline to truth",
                (high - low) / (truth[figure] - low),
                expected="" if arguments.quick else ">= 0.5",
            )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
