"""Training of one model on the days a plan names: resumable, watched, and finished once.

The loss is the binary cross-entropy of click over all impressions plus that of
conversion over clicked impressions (``docs/architecture.md``, "One training run";
paper section 3.1 has one head per task).  Both models of a plan read the same
batches in the same order.

A training that is killed goes on from its last checkpoint and, on a CPU, ends
with exactly the weights of an unbroken one.  A training that is finished says so
and exits.  A loss or gradient that is not finite stops it with the step and the
batch's place in the data.

Shape suffixes are those of :mod:`onetrans.batch`.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import logging
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, fields, replace
from datetime import UTC, date, datetime
from types import FrameType
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onetrans import sharding, storage
from onetrans.artifact import load_model, save_model
from onetrans.batch import RequestBatch
from onetrans.checkpoint import Checkpoint, DamagedCheckpointError
from onetrans.cores import usable_cores
from onetrans.distributed import Ranks, is_rank, launch, open_ranks
from onetrans.errors import EXIT_BAD_CONFIG, BadConfigError, PipelineError
from onetrans.freed_memory import keep_freed_memory
from onetrans.growth import describe, grown_checkpoint
from onetrans.guards import UnmovedWeights, blame, largest_embedding, looked_up_in
from onetrans.loader import Cursor, Loaded, LoaderConfig, RequestData, Share, prefetch
from onetrans.metrics import Metrics
from onetrans.models import RankingModel, Scores, build_model
from onetrans.models.batch_norm import share_batches
from onetrans.models.compute import Compute, Precision, choose_device
from onetrans.models.config import CONFIGS
from onetrans.optim import GradientNorms, Optimizers, build_optimizers
from onetrans.plan import FINISHED_FILE, LOCK_FILE, Plan, Recipe, add_day_arguments, plan_of
from onetrans.process import add_json, print_json
from onetrans.progress import Progress
from onetrans.recent_auc import RecentAuc
from onetrans.scores import CANDIDATE
from onetrans.settings import Settings, TrainingSettings, load_settings
from onetrans.step_profile import BACKWARD, EXCHANGE, OPTIMIZER, StepProfile

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
"""Folder of the saved model, within the folder of a model's training."""

PROFILE_FILE = "profile.json"
"""In a model's folder: where the time of its training went (:mod:`onetrans.step_profile`), since it last began."""

_EPOCH = date(1970, 1, 1)

_LOCK_POLL_S = 0.5
"""Seconds between two looks at the lock of a training that another process does."""

BEST_FOLDER, PASSES_FILE = "best", "passes.json"
"""Weights of the pass that was best on held-out rows, and the figures of every pass; only where rows are held out."""

CURVE_POINTS = 100
"""Points of a loss curve sent to a tracker; ``losses.csv`` holds every step."""

WINDOW_BYTES, WINDOW_SAMPLES = 256 << 20, 2048
"""Bytes of a window of the loader for so many impressions of a batch.  Processes that share a large batch hold a part
of the window each; how many they are must not change the order of rows."""

EXAMPLES = """examples:
  onetrans train --plan var/runs/ds=2022-05-06/0123456789ab --model onetrans
  onetrans train --model dcnv2_din --config tiny --ds 2022-05-06 --no-mlflow
  onetrans train --model onetrans --config tiny --epochs 5 --batch-size 2048 --data-dir data/mine
  onetrans train --model onetrans --next-batch --from 2022-04-25 --to 2022-05-06
  torchrun --nproc-per-node 8 -m onetrans.train --model onetrans --ds 2022-05-06   (or training.processes = 8)

settings of [training], in onetrans.toml or as ONETRANS_TRAINING_<NAME> (docs/configuration.md), with their defaults:
{settings}"""

Validate = Callable[[RankingModel], Metrics]
"""Scores held-out rows with a model in evaluation mode."""


class DivergedError(PipelineError):
    """The training left the numbers: running it again gives the same; the learning rate or the data must change."""

    exit_code = EXIT_BAD_CONFIG


class InterruptedTrainingError(PipelineError):
    """The process was asked to stop; its checkpoint is saved and running it again goes on from there."""


class Tracker(Protocol):
    """Where a training reports to; MLflow, unless it is left out."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Record the configuration."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record figures of one step."""

    def log_tags(self, tags: dict[str, str]) -> None:
        """Record remarks."""

    def log_artifact(self, path: str) -> None:
        """Keep a file."""

    def log_model(self, model: RankingModel, folder: str) -> object:
        """Keep a trained model, which is also saved in ``folder``."""


class SilentTracker:
    """A tracker that keeps nothing: for ``--no-mlflow``."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Keep nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Keep nothing."""

    def log_tags(self, tags: dict[str, str]) -> None:
        """Keep nothing."""

    def log_artifact(self, path: str) -> None:
        """Keep nothing."""

    def log_model(self, model: RankingModel, folder: str) -> None:
        """Keep nothing."""


@contextmanager
def open_tracker(settings: Settings, plan: Plan, model_name: str) -> Iterator[Tracker]:
    """Open the model's child run in MLflow, or a silent tracker if the plan has no parent run.

    Raises:
        NotReadyError: if MLflow does not answer; the training goes on from its checkpoint in the next try.
    """
    if not plan.mlflow_run_id:
        yield SilentTracker()
        return
    from onetrans.tracking import answering, start_model

    with answering(settings.mlflow), start_model(settings, plan, model_name) as run:
        yield run


class Losses(NamedTuple):
    """Losses of one batch; scalars."""

    total: Tensor
    """What is minimised: the weighted sum."""
    click: Tensor
    """Mean cross-entropy of click over all impressions."""
    conversion: Tensor
    """Mean cross-entropy of conversion over clicked impressions; 0 without any."""


def compute_losses(
    scores: Scores, batch: RequestBatch, recipe: Recipe, counts: tuple[float, float] | None = None
) -> Losses:
    """Return the losses of a batch; an impression without a click has no part in the conversion loss.

    For a share of a batch, ``counts`` are the impressions and clicks of the whole: the losses of the shares then add up
    to that of the batch.
    """
    impressions, clicks = counts or _counts(batch)
    click = F.binary_cross_entropy_with_logits(scores.ctr_logit_N, batch.click_N, reduction="sum") / impressions
    per_row_N = F.binary_cross_entropy_with_logits(scores.cvr_logit_N, batch.conversion_N, reduction="none")
    conversion = (per_row_N * batch.click_N).sum() / max(clicks, 1.0)
    return Losses(recipe.click_weight * click + recipe.conversion_weight * conversion, click, conversion)


def _counts(batch: RequestBatch) -> tuple[float, float]:
    return float(batch.num_candidates), float(batch.click_N.sum())


@dataclass(frozen=True)
class Step:
    """One optimizer step, a row of ``losses.csv``."""

    step: int
    """Number of the step, from 1."""
    samples: int
    """Impressions read so far."""
    loss: float
    """Weighted sum of the two losses below."""
    click_loss: float
    """Mean cross-entropy of click."""
    conversion_loss: float
    """Mean cross-entropy of conversion over clicks."""
    dense_norm: float
    """Global norm of the dense gradients before the clip."""
    embedding_norm: float
    """Global norm of the table gradients before the clip."""


class TrainingData(Protocol):
    """What a training reads: batches from any cursor."""

    @property
    def impressions(self) -> int:
        """Impressions of one pass."""

    @property
    def requests(self) -> int:
        """Requests of one pass."""

    def batches(
        self, *, shuffle_seed: int | None, start: Cursor | None = None, epochs: int = 1, share: Share | None = None
    ) -> Iterator[Loaded]:
        """Yield every batch, or a share of each, from ``start`` to the end of the last pass."""


class Training:
    """One model, its optimizers and how far they have come."""

    def __init__(
        self,
        plan: Plan,
        model_name: str,
        settings: Settings,
        validate: Validate | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Build the model and put it where its checkpoint, or the training it goes on from, left off.

        With ``validate`` every pass is measured on held-out rows, and the weights of the best one are kept.
        ``ranks`` are the processes that train it together; without, this one alone.
        """
        self.validate = validate
        self.ranks = ranks or Ranks()
        self.plan = plan
        self.model_name = model_name
        self.settings = settings
        self.model_plan = plan.models[model_name]
        self.folder = plan.model_path(model_name)
        self.device = self.ranks.device(choose_device("training.device", settings.training.device))
        self.data = self._open_data()
        sharded = sharding.tables_to_shard(plan.schema, settings.training.shard_rows, self.ranks)
        torch.manual_seed(plan.recipe.seed)
        model = build_model(self.model_plan.config, plan.schema)
        # Tables that are to be divided may be too large for the device.
        self.model: RankingModel = model if sharded else model.to(self.device)
        self.model.use(choose_compute(settings.training, self.device))
        share_batches(self.model, self.ranks.count)
        self.optimizers = build_optimizers(self.model, self.model_plan.optimizer)
        self.step, self.samples, self.seconds, self.peak_bytes = 0, 0, 0.0, 0
        self.cursor = Cursor()
        self.losses: list[Step] = []
        self.restarted = ""
        self.recent_auc = RecentAuc()
        if not self._resume():
            self._warm_start()
        self.profile = StepProfile(self.model, self.device)
        self.tables: sharding.ShardedTables | None = None
        if sharded:
            self.optimizers, self.tables = sharding.shard(self.model, self.optimizers, sharded, self.ranks, self.device)

    # What a training reads; onetrans/next_batch.py reads something else.

    def _open_data(self) -> TrainingData:
        return RequestData(self.plan.train_files, self.plan.schema, self._loader_config)

    @property
    def _loader_config(self) -> LoaderConfig:
        batch_size = self.plan.recipe.batch_size
        return LoaderConfig(
            batch_size, self.model_plan.config.max_seq_len, window_bytes=WINDOW_BYTES * -(-batch_size // WINDOW_SAMPLES)
        )

    @property
    def passes(self) -> int:
        """Passes over the data."""
        return self.plan.recipe.epochs

    @property
    def shuffle_seed(self) -> int | None:
        """Seed of the order of rows; None: the stored order."""
        return self.plan.recipe.seed

    @property
    def finished(self) -> bool:
        """Whether every pass over the data is done."""
        return self.cursor.epoch >= self.passes

    @property
    def checkpoint_folder(self) -> str:
        """Folder of the checkpoint."""
        return storage.join(self.folder, "checkpoint")

    @property
    def total_samples(self) -> int:
        """Impressions of all passes."""
        return self.data.impressions * self.plan.recipe.epochs

    def _resume(self) -> bool:
        try:
            checkpoint = Checkpoint.load(self.checkpoint_folder)
        except DamagedCheckpointError as error:
            # The next checkpoint replaces it; what is lost is time.
            self.restarted = str(error)
            logger.warning("%s: %s; the training begins again at its start", self.model_name, error)
            return False
        if checkpoint is None:
            return False
        checkpoint.restore(self.model, self.optimizers, generators=True)
        self.step, self.cursor = checkpoint.step, checkpoint.cursor
        self._take_progress(checkpoint.progress)
        self.losses = [row for row in self._read_losses() if row.step <= self.step]
        logger.info(
            "%s: goes on from its own checkpoint, after step %d (%s of %s samples)",
            *(self.model_name, self.step, f"{self.samples:,}", f"{self.total_samples:,}"),
        )
        return True

    def _take_progress(self, progress: Mapping[str, Any]) -> None:
        self.samples = progress["samples"]
        self.seconds = progress["seconds"]
        self.peak_bytes = progress["peak_bytes"]

    def _progress(self) -> dict[str, Any]:
        return {"samples": self.samples, "seconds": self.seconds, "peak_bytes": self.peak_bytes}

    def _warm_start(self) -> None:
        if self.model_plan.warm_start is None:
            return
        folder = storage.join(self.model_plan.warm_start, "checkpoint")
        try:
            checkpoint = Checkpoint.load(folder)
        except DamagedCheckpointError as error:
            raise BadConfigError(f"{error}: plan again, and an earlier training is gone on from") from error
        if checkpoint is None:
            raise BadConfigError(
                f"the plan goes on from {folder}, where there is no checkpoint; plan again with --from-scratch"
            )
        checkpoint, grown = grown_checkpoint(checkpoint, self.model)
        if grown:
            logger.info("%s: %s; every id keeps what it learned", self.model_name, describe(grown))
        # The order of rows and the dropout of a day come from its own seed, not from where yesterday's stopped.
        checkpoint.restore(self.model, self.optimizers, generators=False)
        logger.info("%s: starts from the training of %s", self.model_name, self.plan.warm_start_ds)

        if self.plan.train_days:
            self.evict_idle_rows(self.plan.train_days[0])

    def evict_idle_rows(self, today: date) -> None:
        """Reset the rows of embedding tables that were not looked up for long, counted back from a day."""
        embeddings = self.model.embeddings
        for name, rows in embeddings.evict((today - _EPOCH).days).items():
            self.optimizers.forget_rows(embeddings.table(name), rows)
            if rows.shape[0]:
                days = self.model.config.evict_after_days
                count = f"{rows.shape[0]:,}"
                logger.info("%s: %s rows of table %s idle for %d days start afresh", self.model_name, count, name, days)

    # The loop

    def run(self, tracker: Tracker, stop: threading.Event | None = None) -> None:
        """Train to the end of the last pass, saving a checkpoint now and then and at the end.

        Raises:
            DivergedError: on a loss or gradient that is not finite, or if most weights have not changed at the end.
            InterruptedTrainingError: if ``stop`` was set; the checkpoint is saved first.
        """
        stop = stop or threading.Event()
        if self.restarted:
            tracker.log_tags({"restarted": self.restarted})
        self.model.train()
        self.unmoved = UnmovedWeights(self.model)
        first: Cursor | None = None
        began, before = time.monotonic(), self.seconds
        saved, steps_before = began, self.step
        report_every = max(1, round(self.total_samples / self.plan.recipe.batch_size / CURVE_POINTS))
        batches = prefetch(
            self.data.batches(
                shuffle_seed=self.shuffle_seed, start=self.cursor, epochs=self.passes, share=self.ranks.share
            )
        )
        notes: dict[str, float] = {}
        with Progress(
            self.total_samples, "samples", self.model_name, shown=self.ranks.leads, before=self.samples
        ) as progress:
            for loaded in self.profile.steps_of(batches):
                due = self.ranks.leads and time.monotonic() - saved >= self.settings.training.checkpoint_seconds
                # Whatever depends on a clock or a signal is agreed on, in one exchange with the counts of the batch.
                *counts, stops, saves = self.ranks.total(*_counts(loaded.batch), stop.is_set(), due)
                first = first or loaded.cursor
                self._before_step(loaded)
                row = self._one_step(loaded.batch, loaded.cursor, (counts[0], counts[1]))
                self.cursor = loaded.following
                self.losses.append(row)
                progress.advance(int(counts[0]), loss=row.loss, **notes)
                if self.step % report_every == 0:
                    reached = self.recent_auc.value()
                    notes = {} if reached is None else {"AUC": reached}
                    curves = {} if reached is None else {"recent_ctr_auc": reached}
                    tracker.log_metrics(_mean(self.losses[-report_every:], progress.rate) | curves, self.step)
                self.seconds = before + time.monotonic() - began
                if self.cursor.epoch > loaded.cursor.epoch:
                    self._after_pass(tracker)
                if stops:
                    self.save()
                    raise InterruptedTrainingError(
                        f"{self.model_name}: asked to stop after step {self.step}; the checkpoint is saved, "
                        "run the same command to go on"
                    )
                if saves:
                    self.save()
                    saved = time.monotonic()
        if first is not None:
            self._check_moved(steps_before + 1, first)
        self.save()

    def _before_step(self, loaded: Loaded) -> None:
        """Do nothing; a subclass looks at a batch before it is trained on."""

    def _after_pass(self, tracker: Tracker) -> None:
        if self.validate is not None:
            self._measure_pass(self.validate, tracker)
            self.save()

    def _one_step(self, batch: RequestBatch, cursor: Cursor, counts: tuple[float, float]) -> Step:
        """Take one step on this process's share of a batch of so many impressions and clicks."""
        batch = batch.to(self.device)
        if self.ranks.count > 1:
            # Each share has dropout of its own, and a resumed run draws the same again.
            seed = np.random.SeedSequence([self.plan.recipe.seed, self.step, self.ranks.number])
            torch.manual_seed(int(seed.generate_state(1)[0]))
        if self.model.embeddings.usage is not None:
            self.model.embeddings.observe(self.ranks.looked_up_by_all(batch))
        self.optimizers.zero_grad()
        with self.model.autocast():
            scores = self.model(batch)
        losses = compute_losses(scores, batch, self.plan.recipe, counts)
        total, click, conversion = self.ranks.total(*(float(loss.detach()) for loss in losses))
        if not _finite(total):
            raise self._diverged(f"the loss is {total}", cursor, batch, scores)
        with self.profile.part(BACKWARD):
            losses.total.backward()
        with self.profile.part(EXCHANGE):
            self.ranks.add_up_gradients(list(self.model.parameters()))
        self.unmoved.before_step()
        with self.profile.part(OPTIMIZER):
            norms: GradientNorms = self.optimizers.step()
        if not _finite(sum(norms)):
            told = f"the gradients have norms {norms.dense} (dense) and {norms.embedding} (tables)"
            raise self._diverged(told, cursor, batch)
        self.unmoved.after_step()
        self.step += 1
        self.recent_auc.add(batch.click_N, scores.ctr_logit_N)
        self.samples += int(counts[0])
        return Step(self.step, self.samples, total, click, conversion, norms.dense, norms.embedding)

    def _measure_pass(self, validate: Validate, tracker: Tracker) -> None:
        """Measure the model on held-out rows after a pass; a pass that is done again replaces its own entry."""
        figures = validate(self.model.eval())
        self.model.train()
        state = self._whole()
        if state is None:
            return
        passes = [*self._passes()[: self.cursor.epoch - 1], figures.to_dict()]
        tracker.log_metrics({f"val_{name}": value for name, value in figures.figures().items()}, self.step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.figures().items() if "auc" in name)
        logger.info("%s: pass %d of %d, held out: %s", self.model_name, len(passes), self.plan.recipe.epochs, shown)
        if _best(passes) == len(passes):
            save_model(self._best_folder, state[0], self.plan.schema, self.model_plan.config, {"pass": len(passes)})
        storage.write_json(storage.join(self.folder, PASSES_FILE), passes)

    def _whole(self) -> tuple[RankingModel, Optimizers] | None:
        """Return the model and its optimizers with whole tables where the process leads; all must ask together."""
        if self.tables is not None:
            return sharding.whole(self.model, self.optimizers, self.tables)
        return (self.model, self.optimizers) if self.ranks.leads else None

    def _passes(self) -> list[dict[str, Any]]:
        path = storage.join(self.folder, PASSES_FILE)
        return storage.read_json(path) if storage.exists(path) else []

    @property
    def _best_folder(self) -> str:
        return storage.join(self.folder, BEST_FOLDER)

    def _diverged(self, what: str, cursor: Cursor, batch: RequestBatch, scores: Scores | None = None) -> DivergedError:
        """Return the error of a step that left the numbers, with what is to blame; every process must ask."""
        recent = ", ".join(f"{row.loss:.4g}" for row in self.losses[-5:]) or "none"
        found = [told for told in self.ranks.tell(blame(self.model, batch, scores)) if told]
        cause = found[0] if found else f"weights and input are finite; {largest_embedding(self.model, batch)}"
        return DivergedError(
            f"{self.model_name}, step {self.step + 1}: {what}; {cause}; the batch is {cursor}; "
            f"losses of the steps before: {recent}. The checkpoint on disk is the last sound one"
        )

    def _check_moved(self, first_step: int, first: Cursor) -> None:
        names, total = self.unmoved.names, self.unmoved.total
        if not names:
            return
        features = ", ".join(looked_up_in(self.model, names))
        of = f"; the features that are looked up there: {features}" if features else ""
        steps = f"{self.model_name}, steps {first_step} to {self.step}, which began with {first}"
        if 2 * len(names) > total:
            raise DivergedError(
                f"{steps}: {len(names)} of {total} weight tensors never changed, for example {names[0]}{of}. "
                "A learning rate is too small, or no gradient reaches them"
            )
        # Possible without a defect: a behaviour sequence that has no event in the data trains nothing.
        logger.warning("%s: weights that never changed: %s%s", steps, ", ".join(names), of)

    # Files

    def save(self) -> None:
        """Write ``losses.csv`` and the checkpoint, once all processes were found to hold the same weights."""
        self.peak_bytes = max(self.peak_bytes, peak_memory(self.device))
        self.ranks.check_same(self.model.state_dict())
        state = self._whole()
        if state is None:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(f.name for f in fields(Step))
        writer.writerows(astuple(row) for row in self.losses)
        storage.write_bytes(self._losses_file, text.getvalue().encode())
        checkpoint = Checkpoint.capture(*state, self.step, self.cursor, self._progress())
        checkpoint.save(self.checkpoint_folder)

    @property
    def _losses_file(self) -> str:
        return storage.join(self.folder, "losses.csv")

    def _read_losses(self) -> Iterator[Step]:
        rows = csv.DictReader(io.StringIO(storage.read_bytes(self._losses_file).decode()))
        for row in rows:
            losses = {f.name: float(row[f.name]) for f in fields(Step) if f.name not in ("step", "samples")}
            yield Step(int(row["step"]), int(row["samples"]), **losses)

    def finish(self, tracker: Tracker) -> dict[str, Any]:
        """Save the model and return the record of the training; only where the process leads, else an empty one."""
        self.peak_bytes = int(self.ranks.largest(self.peak_bytes))
        state = self._whole()
        if state is None:
            return {}
        model, _ = state
        model_folder = storage.join(self.folder, MODEL_FOLDER)
        passes = self._passes()
        if passes:
            model.load_state_dict(load_model(self._best_folder)[0].state_dict())
        trained_on = {"ds": str(self.plan.ds), "plan_id": self.plan.plan_id, "git_revision": self.plan.git_revision}
        save_model(model_folder, model, self.plan.schema, self.model_plan.config, trained_on)
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        record: dict[str, Any] = {
            "model": self.model_name,
            "ds": str(self.plan.ds),
            "plan_id": self.plan.plan_id,
            "preset": self.plan.preset,
            "train_days": [str(day) for day in self.plan.train_days],
            "warm_start": self.model_plan.warm_start,
            "schema_fingerprint": self.plan.schema.fingerprint,
            **self.model_plan.decides(),
            "rows": self.data.impressions,
            "requests": self.data.requests,
            "samples": self.samples,
            "steps": self.step,
            "seconds": round(self.seconds, 3),
            "samples_per_second": round(self.samples / max(self.seconds, 1e-9), 1),
            "peak_memory_bytes": self.peak_bytes,
            "device": str(self.device),
            "processes": self.ranks.count,
            **({"sharded_tables": self.tables.names} if self.tables else {}),
            "compute": asdict(model.compute),
            "dense_parameters": sum(p.numel() for p in model.dense_parameters().values()),
            "embedding_parameters": sum(p.numel() for p in model.embedding_parameters().values()),
            "final_loss": _mean(tail, 0.0)["loss"],
            **({"passes": passes, "best_pass": _best(passes)} if passes else {}),
            **({"restarted": self.restarted} if self.restarted else {}),
            "git_revision": self.plan.git_revision,
            "finished_at": datetime.now(UTC).isoformat(timespec="microseconds"),
        }
        tracker.log_params(_parameters(self.plan, self.model_name))
        tracker.log_metrics(
            {
                name: float(record[name])
                for name in ("samples", "seconds", "samples_per_second", "peak_memory_bytes", "final_loss")
            },
            self.step,
        )
        tracker.log_artifact(self._losses_file)
        if self.profile.steps:
            path = storage.join(self.folder, PROFILE_FILE)
            storage.write_json(path, self.profile.to_dict())
            tracker.log_metrics(
                {f"profile.{name.replace(' ', '_')}": share for name, share in self.profile.shares().items()}, self.step
            )
            tracker.log_artifact(path)
        tracker.log_model(model.eval(), model_folder)
        return record


def train(
    plan: Plan,
    model_name: str,
    settings: Settings,
    stop: threading.Event | None = None,
    validate: Validate | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Train one model of a plan to the end and return its record; a finished training returns at once.

    Of several ``ranks`` the leading one alone writes and reports; the others return an empty record.

    ``validate`` measures every pass on held-out rows; the weights of the best pass are then the model's.

    Raises:
        BadConfigError: if the plan has no such model, or a checkpoint does not fit.
        BadDataError: if the data cannot be read.
        NotReadyError: if MLflow does not answer.
        DivergedError: if the training leaves the numbers.
        InterruptedTrainingError: if ``stop`` was set on the way.
    """
    ranks = ranks or Ranks()
    record: dict[str, Any]
    finished = storage.join(plan.model_path(model_name), FINISHED_FILE)
    stop = stop or threading.Event()
    named = f"{model_name} of {plan.ds}" if plan.train_days else f"{model_name} on plain files"
    # One rank holds the lock for all; the others wait for what it finds.
    with alone(plan.model_path(model_name), named, stop) if ranks.leads else nullcontext():
        if ranks.decide(lambda: storage.exists(finished)):
            record = storage.read_json(finished)
            logger.info("%s is finished since %s; nothing to do", named, record["finished_at"])
            return record
        threads = settings.training.threads
        if threads or ranks.local_count > 1:
            torch.set_num_threads(threads or max(1, usable_cores() // ranks.local_count))
        with open_tracker(settings, plan, model_name) if ranks.leads else nullcontext(SilentTracker()) as tracker:
            if ranks.leads:
                logger.info("%s: the plan: %s", named, plan.decision)
            training = Training(plan, model_name, settings, validate, ranks)
            if not training.finished:
                training.run(tracker, stop)
            record = training.finish(tracker)
        if ranks.leads:
            # Last of all, after the tracker has taken everything: from now on the training is not done again.
            storage.write_json(finished, record)
    return record


@contextmanager
def alone(folder: str, what: str, stop: threading.Event) -> Iterator[None]:
    """Let one process of this machine at a time train in a folder; another one waits, and finds the work done.

    What a killed one was writing is removed first.

    Two runs of one day share a plan, and so do a task and its next try after the scheduler has died: side by side
    they would remove each other's checkpoints.  The system takes the lock from a process that ends, however it ends.
    An object store has no locks; there only Airflow keeps runs of one day apart.

    Raises:
        InterruptedTrainingError: if ``stop`` was set while waiting.
    """
    if not storage.is_local(folder):
        yield
        return
    lock = storage.local_path(folder) / LOCK_FILE
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        told = False
        while not _locked(file):
            if not told:
                logger.warning("%s is being trained by another process; waiting for its end", what)
                told = True
            if stop.wait(_LOCK_POLL_S):
                raise InterruptedTrainingError(f"{what}: asked to stop while another process trained it")
        for left in storage.list_files(folder, ".tmp"):
            storage.delete_file(left)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def choose_compute(training: TrainingSettings, device: torch.device) -> Compute:
    """Return how models are computed on a device; ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    by_device: Precision = "bfloat16" if device.type == "cuda" else "float32"
    precision = by_device if training.precision == "auto" else training.precision
    return Compute(precision, recompute=training.recompute)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: of GPU memory on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _finite(value: float) -> bool:
    return value - value == 0.0


def _mean(rows: list[Step], rate: float) -> dict[str, float]:
    names = ("loss", "click_loss", "conversion_loss", "dense_norm", "embedding_norm")
    means = {name: sum(getattr(row, name) for row in rows) / max(len(rows), 1) for name in names}
    return {**means, "samples_per_second": rate} if rate else means


def _best(passes: list[dict[str, Any]]) -> int:
    """Return the number of the pass, from 1, with the highest mean of CTR AUC and CVR AUC; the earlier of equals."""
    means = [sum(p[task] or 0.0 for task in ("ctr_auc", "cvr_auc")) for p in passes]
    return means.index(max(means)) + 1


def _parameters(plan: Plan, model_name: str) -> dict[str, Any]:
    """Return what a reader of the run filters by; only what the plan decides, so that a retry repeats it."""
    return {
        **plan.models[model_name].decides(),
        "recipe": asdict(plan.recipe),
        "schema_fingerprint": plan.schema.fingerprint,
        "warm_start_ds": str(plan.warm_start_ds or "none"),
    }


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Yield an event that is set when the process is asked to end, so that a checkpoint can be saved first."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


# Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--model", choices=tuple(CONFIGS), default=CANDIDATE, help="the model, or its baseline (default: %(default)s)"
    )
    parser.add_argument(
        "--plan", metavar="PATH", help="folder printed by `onetrans plan`; without it --ds makes the plan"
    )
    add_day_arguments(parser)
    from onetrans.plain_runs import add_training_arguments

    add_training_arguments(parser)
    from onetrans.next_batch import add_arguments as add_next_batch_arguments

    add_next_batch_arguments(parser)
    add_json(parser)
    from onetrans.commands.config import settings_help

    parser.epilog = EXAMPLES.replace("{settings}", settings_help(TrainingSettings))


def run(arguments: argparse.Namespace) -> int:
    """Train one model of a plan, on plain files, or batch by batch in order of time; as one process or several."""
    from onetrans import next_batch

    settings = load_settings()
    keep_freed_memory()
    if next_batch.chosen(arguments):
        if is_rank():
            raise BadConfigError(
                "--next-batch scores every batch in order of time, in one process: start it without torchrun"
            )
        return next_batch.run(arguments, settings)
    if settings.training.processes > 1 and not is_rank():
        return launch(settings.training.processes, "onetrans.train", arguments.given)
    device = choose_device("training.device", settings.training.device)
    with open_ranks(device, settings.training.rank_timeout_seconds) as ranks, stop_on_sigterm() as stop:
        return _run(arguments, settings, ranks, stop)


def _run(arguments: argparse.Namespace, settings: Settings, ranks: Ranks, stop: threading.Event) -> int:
    from onetrans import plain_runs

    if plain_runs.chosen(arguments, ["data_dir"], ["plan", "ds", "from_scratch"]):
        return plain_runs.train_on_files(arguments, settings, stop, ranks)
    if arguments.overlapping_times:
        raise BadConfigError("--overlapping-times needs --data-dir; a day of the lake is never trained on")
    for name in ("epochs", "batch_size"):
        if getattr(arguments, name) is not None:
            raise BadConfigError(f"--{name.replace('_', '-')} needs --data-dir; for days it is training.{name}")
    plan = Plan.load(ranks.decide(lambda: plan_of(arguments, settings).path))
    if arguments.no_mlflow:
        # An earlier command may have opened a run for this plan.
        plan = replace(plan, mlflow_run_id="")
    record = train(plan, arguments.model, settings, stop, ranks=ranks)
    if not ranks.leads:
        return 0
    logger.info(
        "%s of %s: %s samples in %.0f s (%.0f/s) on %s, loss %.4f, %d MiB at most",
        arguments.model,
        plan.ds,
        f"{record['samples']:,}",
        record["seconds"],
        record["samples_per_second"],
        record["device"],
        record["final_loss"],
        record["peak_memory_bytes"] >> 20,
    )
    path = plan.model_path(arguments.model)
    print_json({"path": path, **record}) if arguments.json else print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command as ``python -m onetrans.train``."""
    from onetrans.cli import main as cli

    return cli(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
