"""Next-batch evaluation: every batch is scored first and trained on afterwards, in order of time.

This is how the paper measures (arXiv 2510.26104, section 4.1): one pass over the
days, each batch predicted by the model that has seen all batches before it and
nothing else; AUC and UAUC of both tasks per day, averaged over the days with equal
weight.  It answers "which model would have been better all along", from fresh
weights; the daily chain (:mod:`onetrans.evaluate`) answers "is tonight's model good
enough to serve".

The run is pinned by a plan and resumes exactly, as a training does.  Predictions
belong to its state: those made since the last checkpoint are written to a file of
their own before the next one is, and files from after the checkpoint that a killed
run left are removed, because the resumed run makes them again.

What is evaluated is also what is trained, so the folder of the plan holds the days'
figures (``next_batch.json``), one row per impression under ``predictions/ds=DAY/``,
and the weights at the end, which have seen every row and are never promoted.
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from onetrans import storage
from onetrans.days import day_range, describe_days, parse_day
from onetrans.errors import BadConfigError, NotReadyError
from onetrans.evaluate import compute_metrics
from onetrans.lake import Lake
from onetrans.loader import Loaded
from onetrans.plan import (
    CHECKPOINT_FOLDER,
    FINISHED_FILE,
    NEXT_BATCH_FOLDER,
    TABLE,
    TRUTH,
    Plan,
    configured_recipe,
    plan_of_no_day,
)
from onetrans.process import print_json
from onetrans.schema import FeatureSchema, load_schema
from onetrans.settings import Settings
from onetrans.time_order import DayStream
from onetrans.train import SilentTracker, Tracker, Training, alone, stop_on_sigterm

logger = logging.getLogger(__name__)

FIGURES_FILE = "next_batch.json"
"""In a model's folder: figures of each day and their mean."""

PREDICTIONS = "predictions"
"""In a model's folder: a row per impression, by day, in the order in which they were scored."""

AVERAGED = ("ctr_auc", "ctr_uauc", "cvr_auc", "cvr_uauc", "ctr_log_loss", "cvr_log_loss")
"""Figures that are averaged over days."""


def plan_next_batch(settings: Settings, schema: FeatureSchema, first: date, last: date) -> Plan:
    """Return the plan of a run over the days from ``first`` to ``last``; the same inputs find the plan made before.

    Days in ``source.absent_days`` are left out unless they are published.

    Raises:
        BadConfigError: if the range is empty, or holds absent days only.
        NotReadyError: if a day is not published; the text names all of them.
    """
    lake, training = Lake(settings.lake), settings.training
    snapshot_id = lake.snapshot_id(TABLE)
    if snapshot_id is None:
        raise NotReadyError(f"table {TABLE} has no published day; needed: {describe_days(day_range(first, last))}")
    absent = set(settings.source.absent_days) - set(lake.days(TABLE, snapshot_id))
    days = [day for day in day_range(first, last) if day not in absent]
    if not days:
        raise BadConfigError(f"source.absent_days names every day from {first} to {last}: nothing is left to score")
    if training.epochs != 1:
        logger.info("training.epochs = %d does not apply: next-batch evaluation is one pass", training.epochs)
    files = lake.files(TABLE, days, snapshot_id)
    return plan_of_no_day(
        settings,
        NEXT_BATCH_FOLDER,
        schema,
        replace(configured_recipe(training), epochs=1),
        {"next_batch": files},
        ds=days[-1],
        decision=f"next-batch evaluation from fresh weights over {describe_days(days)}",
        files=files,
        train_days=days,
        snapshot_id=snapshot_id,
    )


class NextBatchTraining(Training):
    """A training that scores every batch before it trains on it, and measures every day when it ends."""

    def __init__(self, plan: Plan, model_name: str, settings: Settings) -> None:
        """Put model, optimizers and predictions where the checkpoint left off."""
        self.days: list[dict[str, Any]] = []
        self._waiting: list[pa.Table] = []
        super().__init__(plan, model_name, settings)
        for file in storage.list_files(storage.join(self.folder, PREDICTIONS), ".parquet"):
            if _last_step(file) > self.step:
                storage.delete_file(file)

    def _open_data(self) -> DayStream:
        files: dict[date, list[str]] = {day: [] for day in self.plan.train_days}
        for file in self.plan.train_files:
            files[_day_of(file)].append(file)
        return DayStream(files, self.plan.schema, self._loader_config)

    @property
    def passes(self) -> int:
        """Days: each is a pass of its own (:class:`onetrans.time_order.DayStream`)."""
        return len(self.plan.train_days)

    @property
    def shuffle_seed(self) -> None:
        """Rows are never shuffled."""
        return None

    @property
    def total_samples(self) -> int:
        """Impressions of all days."""
        return self.data.impressions

    def _take_progress(self, progress: Mapping[str, Any]) -> None:
        super()._take_progress(progress)
        self.days = list(progress["days"])

    def _progress(self) -> dict[str, Any]:
        return {**super()._progress(), "days": self.days}

    def _before_step(self, loaded: Loaded) -> None:
        """Score a batch with the weights as they are."""
        keys = loaded.keys
        if keys is None:
            raise AssertionError("a stream of days is read with keys")
        self.model.eval()
        batch = loaded.batch.to(self.device)
        with torch.no_grad(), self.model.autocast():
            scores = self.model(batch)
        self.model.train()
        for task, logit_N in (("ctr", scores.ctr_logit_N), ("cvr", scores.cvr_logit_N)):
            probability_N = torch.sigmoid(logit_N.double()).cpu()
            if not probability_N.isfinite().all():
                raise self._diverged(f"a {task.upper()} score is not finite", loaded.cursor, batch, scores)
            keys = keys.append_column(f"{self.model_name}_{task}", pa.array(probability_N.numpy()))
        self._waiting.append(keys)

    def save(self) -> None:
        """Write the predictions that wait, then the checkpoint they belong to."""
        self._write_predictions()
        super().save()

    def _write_predictions(self) -> None:
        if self._waiting:
            table, self._waiting = pa.concat_tables(self._waiting, promote_options="default"), []
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            name = f"step-{self.step:09}.parquet"
            storage.write_bytes(storage.join(self._predictions, name), sink.getvalue().to_pybytes())

    @property
    def _day(self) -> date:
        """The day that is scored: the first whose figures are not known."""
        return self.plan.train_days[len(self.days)]

    @property
    def _predictions(self) -> str:
        return storage.join(self.folder, PREDICTIONS, f"ds={self._day}")

    def _after_pass(self, tracker: Tracker) -> None:
        """Measure the day that ended; its figures are saved with the first checkpoint after it."""
        self._write_predictions()
        day, files = self._day, storage.list_files(self._predictions, ".parquet")
        scores = pa.concat_tables([_read(file) for file in files], promote_options="default")
        figures = compute_metrics(scores, [self.model_name])
        entry = {"ds": str(day), **{name: values.to_dict() for name, values in figures.items()}}
        self.days.append(entry)
        tracker.log_metrics(
            {
                f"{'day' if name == self.model_name else TRUTH}.{figure}": value
                for name, values in figures.items()
                for figure, value in values.figures().items()
            },
            int(f"{day:%Y%m%d}"),
        )
        told = ", ".join(f"{n} {v:.4f}" for n, v in figures[self.model_name].figures().items() if n in AVERAGED)
        logger.info("%s: day %d of %d, %s: %s", self.model_name, len(self.days), self.passes, day, told)
        if len(self.days) < self.passes:
            self.evict_idle_rows(self._day)
        self.save()

    def finish(self, tracker: Tracker) -> dict[str, Any]:
        """Save weights and figures and return the record."""
        mean = macro_average(self.days, self.model_name)
        figures: dict[str, Any] = {"model": self.model_name, "days": self.days, "mean": mean}
        path = storage.join(self.folder, FIGURES_FILE)
        storage.write_json(path, figures)
        tracker.log_metrics({f"mean.{name}": value for name, value in mean.items() if value is not None}, 0)
        tracker.log_artifact(path)
        return {**super().finish(tracker), **figures}


def train_next_batch(
    plan: Plan, model_name: str, settings: Settings, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Run one model of a plan to the end and return its record, with the figures of each day; a finished one at once.

    Raises:
        BadConfigError, BadDataError, DivergedError, InterruptedTrainingError: as :func:`onetrans.train.train`.
    """
    finished = storage.join(plan.model_path(model_name), FINISHED_FILE)
    record: dict[str, Any]
    stop = stop or threading.Event()
    with alone(plan.model_path(model_name), f"next-batch evaluation of {model_name}", stop):
        if storage.exists(finished):
            record = storage.read_json(finished)
            logger.info("%s is finished since %s; nothing to do", model_name, record["finished_at"])
            return record
        if settings.training.threads:
            torch.set_num_threads(settings.training.threads)
        with _open_tracker(settings, plan, model_name) as tracker:
            training = NextBatchTraining(plan, model_name, settings)
            if not training.finished:
                training.run(tracker, stop)
            record = training.finish(tracker)
        storage.write_json(finished, record)
        # Nobody goes on from it, and it is as large as tables and optimizer together.
        storage.delete_tree(storage.join(plan.model_path(model_name), CHECKPOINT_FOLDER))
    return record


def _open_tracker(settings: Settings, plan: Plan, model_name: str) -> AbstractContextManager[Tracker]:
    if not plan.mlflow_run_id:
        return nullcontext(SilentTracker())
    from onetrans.tracking import start_next_batch

    return start_next_batch(settings, plan, model_name)


def macro_average(days: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    """Return the mean over days of each figure, every day with equal weight; None where no day has it."""
    means: dict[str, float | None] = {}
    for figure in AVERAGED:
        values = [day[name][figure] for day in days if day[name][figure] is not None]
        means[figure] = sum(values) / len(values) if values else None
    return means


def figures_table(record: Mapping[str, Any]) -> str:
    """Return the figures of each day and their mean as text; a mean of fewer days says of how many."""
    name, days = record["model"], record["days"]
    rows = [(day["ds"], f"{day[name]['rows']:,}", *(_cell(day[name][figure]) for figure in AVERAGED)) for day in days]
    means: list[str] = []
    for figure in AVERAGED:
        known = sum(day[name][figure] is not None for day in days)
        of = f" ({known} d)" if 0 < known < len(days) else ""
        means.append(_cell(record["mean"][figure]) + of)
    lines = [("day", "rows", *AVERAGED), *rows, ("mean", "", *means)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _day_of(file: str) -> date:
    """Return the day of a file; a file of the table holds one day."""
    filesystem, inner = storage.open_filesystem(file)
    first = next(pq.ParquetFile(inner, filesystem=filesystem).iter_batches(batch_size=1, columns=["ds"]))
    return parse_day(first["ds"][0].as_py())


def _last_step(file: str) -> int:
    return int(file.rsplit("/step-", 1)[1].removesuffix(".parquet"))


def _read(file: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read_bytes(file)))


# Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a next-batch evaluation."""
    group = parser.add_argument_group(
        "next-batch evaluation",
        "score each batch of a range of published days, then train on it, in order of time;\n"
        "it does not work with --data-dir",
    )
    group.add_argument("--next-batch", action="store_true", help="do that, from fresh weights, and print AUC per day")
    group.add_argument("--from", dest="first", type=parse_day, metavar="DAY", help="first day, YYYY-MM-DD")
    group.add_argument("--to", dest="last", type=parse_day, metavar="DAY", help="last day, included")


def chosen(arguments: argparse.Namespace) -> bool:
    """Tell whether the options ask for a next-batch evaluation.

    Raises:
        BadConfigError: if some of its options are missing, or others contradict it.
    """
    named = {"--next-batch": arguments.next_batch, "--from": arguments.first, "--to": arguments.last}
    given = [name for name, value in named.items() if value]
    if not given:
        return False
    if arguments.data_dir is not None:
        raise BadConfigError(f"{given[0]} needs published days; it does not work with --data-dir")
    absent = [name for name in named if name not in given]
    if absent:
        raise BadConfigError(f"{absent[0]} is needed beside {given[0]}")
    for name in ("plan", "ds", "epochs", "batch_size", "overlapping_times"):
        if getattr(arguments, name) is not None:
            hint = "; the size of a batch is training.batch_size" if name == "batch_size" else ""
            raise BadConfigError(f"--{name.replace('_', '-')} does not go with --next-batch{hint}")
    if arguments.from_scratch:
        raise BadConfigError("--from-scratch does not go with --next-batch, which always begins with fresh weights")
    return True


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Evaluate one model next-batch and print the table and the folder of its files."""
    if arguments.config:
        settings = replace(settings, training=replace(settings.training, preset=arguments.config))
    plan = plan_next_batch(settings, load_schema(settings.source), arguments.first, arguments.last)
    if not arguments.no_mlflow:
        # The run itself is found by its tags; the plan only says that it is tracked.
        plan = replace(plan, mlflow_run_id=NEXT_BATCH_FOLDER)
    with stop_on_sigterm() as stop:
        record = train_next_batch(plan, arguments.model, settings, stop)
    path = plan.model_path(arguments.model)
    if arguments.json:
        print_json({"path": path, **record})
        return 0
    print(figures_table(record))
    print(path)
    return 0
