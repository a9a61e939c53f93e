"""A trial: one model trained in one pass on either log and scored on days after it; comparisons of trials, in pairs.

The simulated shop comes straight from its generator (:mod:`benchmarks.learning`), a real log from the published days of
the lake in force (:mod:`benchmarks.fitting`).

A table of trials takes an hour.  ``Kept`` writes each finished trial's scores to a folder and reads them back, so that
a table is measured in parts and put together by running it once more.  A trial is known by its log, configuration,
optimizers and seed, not by the code: empty the folder when the model's code changes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from statistics import mean
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.fitting import LabelledDay, PublishedDays, figures, probabilities, train_pass
from benchmarks.learning import pack, train
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE
from onetrans.bootstrap import Lift, Part, Replicates, ResampledAuc, UserSums, resample
from onetrans.days import day_range
from onetrans.metrics import user_auc
from onetrans.models import ModelConfig, RankingModel, build_model
from onetrans.models.config import config_to_dict
from onetrans.optim import build_optimizers
from onetrans.optim_config import OptimizerConfig
from onetrans.schema import FeatureSchema

FIGURES = ("CTR AUC", "CTR UAUC", "CVR AUC", "CVR UAUC")
REPLICATES = 500
CONFIDENCE = 0.9

Floats = npt.NDArray[np.float64]
Scores = tuple[Floats, Floats]
"""CTR and CVR of every impression of a day."""
Alter = Callable[[RankingModel], None]
"""Takes something from a model that no field of its configuration takes; called before its optimizers are built."""
Key = TypeVar("Key", bound=str)


@dataclass(frozen=True)
class Trial:
    """What a trained model gave."""

    scores: tuple[Scores, ...]
    """Of each scored day."""
    seconds: float
    """Processor time of training."""
    parameters: int
    """Weights outside the embedding tables."""


class Kept:
    """Finished trials in a folder; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def trial(self, identity: Mapping[str, Any], run: Callable[[], Trial]) -> Trial:
        """Return the kept trial of this identity, or run and keep it."""
        if self._folder is None:
            return run()
        text = json.dumps(identity, sort_keys=True, default=str)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["identity"]) != text:
                    raise ValueError(f"{path} holds another trial: {stored['identity']}, wanted {text}")
                ctr, cvr = ([stored[f"{task}_{day}"] for day in range(int(stored["days"]))] for task in ("ctr", "cvr"))
                return Trial(tuple(zip(ctr, cvr, strict=True)), float(stored["seconds"]), int(stored["parameters"]))
        found = run()
        self._folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, npt.ArrayLike] = {
            f"{task}_{day}": values
            for day, both in enumerate(found.scores)
            for task, values in zip(("ctr", "cvr"), both, strict=True)
        }
        arrays |= {"seconds": found.seconds, "parameters": found.parameters}
        arrays |= {"days": len(found.scores), "identity": text}
        # Written aside first: a stopped run leaves no half of a trial behind.
        whole = path.with_suffix(".part.npz")
        np.savez(whole, allow_pickle=False, **arrays)
        whole.replace(path)
        return found


class Log(Protocol):
    """A log to train on and days after it."""

    name: str
    """With all that decides its rows."""
    schema: FeatureSchema
    """Of its requests."""
    days: list[LabelledDay]
    """The scored days, one after the other; none of them is trained on."""

    def run(self, config: ModelConfig, optimizer: OptimizerConfig, seed: int, alter: Alter | None = None) -> Trial:
        """Train a fresh model in one pass, altered first if so asked, and score the days."""
        ...


class Shop:
    """Days of the simulated shop; the day after them is scored."""

    def __init__(self, training_days: int, requests: int = 24) -> None:
        """Play the world; ``requests`` make a batch."""
        self.name = f"shop, {training_days} days, batches of {requests} requests"
        self.schema = FeatureSchema.load(SCHEMA_FILE)
        self._requests = requests
        world = WorldConfig()
        packed = pack(world, self.schema, world.epoch + timedelta(days=training_days))
        *self._before, day = packed.values()
        whole = np.arange(day.batch.num_requests)
        batches = [day.take(whole[at : at + 256]) for at in range(0, len(whole), 256)]
        self.days = [LabelledDay(batches, day.user_N)]

    def run(self, config: ModelConfig, optimizer: OptimizerConfig, seed: int, alter: Alter | None = None) -> Trial:
        """Train a fresh model in one pass, requests shuffled within a day by seed, and score the day."""
        model = _built(config, self.schema, seed, alter)
        start = time.process_time()
        train(model, self._before, self._requests, seed, optimizer)
        return _trial(model, self.days, time.process_time() - start)


class Published:
    """Published days of the lake in force before ``first``; the days from there to ``last`` are scored."""

    def __init__(self, first: date, last: date, batch_size: int, max_seq_len: int, training_days: int | None) -> None:
        """Open the lake; of the days before ``first`` the last ``training_days`` are read, or all.

        Raises:
            NotReadyError: if ``first``, or any day before it, is not published.
        """
        self._lake = PublishedDays(batch_size, max_seq_len)
        self._before = self._lake.before(first)[-training_days if training_days else None :]
        self.name = f"{self._lake.schema.name}, {self._before[0]} to {self._before[-1]}, batches of {batch_size}"
        if last != first:
            self.name += f", scored to {last}"
        self.schema = self._lake.schema
        self.days = [self._lake.labelled(ds) for ds in day_range(first, last)]

    def run(self, config: ModelConfig, optimizer: OptimizerConfig, seed: int, alter: Alter | None = None) -> Trial:
        """Train a fresh model in one pass, shuffled as ``onetrans train`` does, and score the days."""
        model = _built(config, self.schema, seed, alter)
        batches = self._lake.training(self._before, seed)
        start = time.process_time()
        train_pass(model, build_optimizers(model, optimizer), batches)
        return _trial(model, self.days, time.process_time() - start)


def _built(config: ModelConfig, schema: FeatureSchema, seed: int, alter: Alter | None) -> RankingModel:
    torch.manual_seed(seed)
    model = build_model(config, schema)
    if alter:
        alter(model)
    return model


def _trial(model: RankingModel, days: list[LabelledDay], seconds: float) -> Trial:
    scores = [probabilities(model, day.batches) for day in days]
    dense = sum(weight.numel() for weight in model.dense_parameters().values())
    return Trial(tuple(scores), seconds, dense)


def run_kept(
    kept: Kept, log: Log, config: ModelConfig, optimizer: OptimizerConfig, seed: int, alter: Alter | None = None
) -> Trial:
    """Return a trial of a log, from the folder if it is there; ``alter`` is known by its name."""
    identity = {"log": log.name, "model": config_to_dict(config), "optimizer": asdict(optimizer), "seed": seed}
    if alter:
        identity["alter"] = alter.__name__
    return kept.trial(identity, lambda: log.run(config, optimizer, seed, alter))


def measured(days: Sequence[LabelledDay], scores: Sequence[Scores]) -> dict[str, float]:
    """Return each figure's mean over the days; a figure that does not exist on a day is an error."""
    per_day = [figures(day, *both) for day, both in zip(days, scores, strict=True)]
    names = {"CTR AUC": "ctr_auc", "CTR UAUC": "ctr_uauc", "CVR AUC": "cvr_auc", "CVR UAUC": "cvr_uauc"}
    return {shown: mean(getattr(entry, name) for entry in per_day) for shown, name in names.items()}


def drawn(
    days: Sequence[LabelledDay], runs: Mapping[Key, Sequence[Sequence[Scores]]]
) -> dict[Key, dict[str, Replicates]]:
    """Return all figures of several models, each over its seeds, on the same draws of users.

    Args:
        days: D scored days.
        runs: per model its seeds, per seed the scores of the D days.

    A row is compared with rows of its own day only.  A replicate of a figure is its mean over the seeds.
    """
    users, code = np.unique(np.concatenate([day.user_N for day in days]), return_inverse=True)
    ends = np.cumsum([len(day.user_N) for day in days])[:-1]
    code_of = np.split(code, ends)
    parts: dict[tuple[str, int, str], list[Part]] = {}
    for name, seeds in runs.items():
        for seed, scores in enumerate(seeds):
            for day, user_N, (ctr_N, cvr_N) in zip(days, code_of, scores, strict=True):
                clicked = day.click_N > 0
                for task, label, score, user in (
                    ("CTR", day.click_N, ctr_N, user_N),
                    ("CVR", day.conversion_N[clicked], cvr_N[clicked], user_N[clicked]),
                ):
                    parts.setdefault((name, seed, f"{task} AUC"), []).append(ResampledAuc(label, score, user))
                    parts.setdefault((name, seed, f"{task} UAUC"), []).append(
                        _user_sums(label, score, user, len(users))
                    )
    found = resample(parts, len(users), REPLICATES, seed=0)
    return {
        name: {figure: _mean([found[name, seed, figure] for seed in range(len(seeds))]) for figure in FIGURES}
        for name, seeds in runs.items()
    }


def _user_sums(label: npt.NDArray[Any], score: Floats, user: npt.NDArray[Any], users: int) -> UserSums:
    each = user_auc(label, score, user)
    weight_U, won_U = np.zeros(users), np.zeros(users)
    weight_U[each.user_U] = each.impressions_U
    won_U[each.user_U] = each.impressions_U * each.auc_U
    return UserSums(won_U, weight_U)


def _mean(seeds: list[Replicates]) -> Replicates:
    return Replicates(
        mean(entry.value for entry in seeds),
        np.mean([entry.value_B for entry in seeds], axis=0),
        min(entry.effective_users for entry in seeds),
    )


def lift(candidate: Mapping[str, Replicates], baseline: Mapping[str, Replicates]) -> dict[str, Lift]:
    """Return the lift of every figure, with its interval over users."""
    return {figure: Lift.between(candidate[figure], baseline[figure], CONFIDENCE) for figure in FIGURES}
