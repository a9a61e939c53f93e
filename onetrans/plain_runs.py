"""Training and evaluation on plain files (:mod:`onetrans.plain_files`): the way in without a lake or Airflow.

A run is pinned by a plan as a day's is, so a killed one goes on from its
checkpoint, and the same command on the same files finds its finished work.  With
a ``val`` split the model is scored on it after every pass, and the weights of the
best pass are the ones kept.
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onetrans import plain_files, storage
from onetrans.artifact import load_model
from onetrans.distributed import Ranks
from onetrans.errors import BadConfigError, BadDataError
from onetrans.evaluate import compute_metrics, figures_table, score_day, score_share
from onetrans.metrics import Metrics
from onetrans.models import RankingModel, model_name
from onetrans.optim_config import optimizer_preset
from onetrans.plain_files import Split
from onetrans.plan import (
    METRICS_FILE,
    PLAIN_FOLDER,
    PLAN_FILE,
    SCORES_FILE,
    ModelPlan,
    Plan,
    Recipe,
    configured_recipe,
    plan_of_no_day,
)
from onetrans.process import print_json
from onetrans.schema import FeatureSchema
from onetrans.settings import Settings
from onetrans.train import MODEL_FOLDER, train

logger = logging.getLogger(__name__)

_BEFORE: Mapping[Split, tuple[Split, ...]] = {"train": (), "val": ("train",), "test": ("train", "val")}
"""Per split those that a model may have seen."""


def train_on_files(
    arguments: argparse.Namespace, settings: Settings, stop: threading.Event, ranks: Ranks | None = None
) -> int:
    """Train one model on ``--data-dir``, print its figures on ``val`` and where it lies.

    Several ``ranks`` share the rows to score as they share those to train on; the leading one prints.

    Raises:
        BadConfigError: if the folder, its schema or the split ``train`` is missing.
        BadDataError: if a row cannot be read.
    """
    training = settings.training
    if arguments.config:
        training = replace(training, preset=arguments.config)
    if arguments.epochs is not None:
        training = replace(training, epochs=arguments.epochs)
    if arguments.batch_size is not None:
        training = replace(training, batch_size=arguments.batch_size)
    settings, ranks = replace(settings, training=training), ranks or Ranks()
    plan = Plan.load(ranks.decide(lambda: plan_files(arguments.data_dir, settings).path))
    validate = None
    held_out = ranks.decide(lambda: _held_out(arguments, plan, settings))
    if held_out:
        measured = replace(plan, evaluation_files=tuple(held_out))

        def validate(model: RankingModel) -> Metrics:
            scores = score_share(measured, {arguments.model: model}, settings, ranks, "val")

            def figures() -> dict[str, Any]:
                assert scores is not None, "the leading process has the rows of all"
                return compute_metrics(scores, [arguments.model])[arguments.model].to_dict()

            return Metrics.from_dict(ranks.decide(figures))

    record = train(plan, arguments.model, settings, stop, validate, ranks)
    if not ranks.leads:
        return 0
    path = storage.join(plan.model_path(arguments.model), MODEL_FOLDER)
    if arguments.json:
        print_json({"path": path, **record})
        return 0
    for number, figures in enumerate(record.get("passes", ()), 1):
        kept = "  <- kept" if number == record["best_pass"] else ""
        print(f"pass {number}: val {_told(figures)}{kept}")
    print(path)
    return 0


def _held_out(arguments: argparse.Namespace, plan: Plan, settings: Settings) -> list[str]:
    """Return the files to measure every pass on; none without a ``val`` split."""
    directory = arguments.data_dir
    if not plain_files.split_files(directory, "val"):
        return []
    files = plain_files.prepare(directory, "val", plan.schema, _out(settings))
    _require_new(plan.train_files, files, "train", "val", bool(arguments.overlapping_times))
    return list(files)


def plan_files(directory: str, settings: Settings) -> Plan:
    """Return the plan of a training on ``directory``; the same files and settings find the plan made before."""
    schema = plain_files.read_schema(directory)
    sources = plain_files.split_files(directory, "train")
    files = plain_files.prepare(directory, "train", schema, _out(settings))
    return plan_of_no_day(
        settings,
        PLAIN_FOLDER,
        schema,
        configured_recipe(settings.training),
        {"train": plain_files.digest(sources), "conversion": plain_files.CONVERSION},
        ds=_last_day(files),
        decision=f"reads the files of {directory}, without a lake",
        files=files,
    )


def evaluate_files(arguments: argparse.Namespace, settings: Settings) -> int:
    """Score a split of ``--data-dir`` with the model at ``--model-path`` and print its figures.

    Raises:
        BadDataError: if there is no model, its schema is not the folder's, or the split has rows that the model was
            trained on, or of the folder's ``train``, or from before their end.
        BadConfigError: if the split is not there.
    """
    folder = storage.resolve(arguments.model_path)
    if not storage.exists(storage.join(folder, "model.json")):
        folder = storage.join(folder, MODEL_FOLDER)
    model, schema, config = load_model(folder)
    found = plain_files.read_schema(arguments.data_dir)
    if found.fingerprint != schema.fingerprint:
        raise BadDataError(
            f"{arguments.model_path} was trained with feature schema {schema.fingerprint}, "
            f"{arguments.data_dir} has {found.fingerprint}; use the folder it was trained on, or train again"
        )
    split: Split = arguments.split
    files = plain_files.prepare(arguments.data_dir, split, schema, _out(settings))
    trained_on = _trained_on(folder)
    for earlier in _BEFORE[split]:
        if plain_files.split_files(arguments.data_dir, earlier):
            known = plain_files.prepare(arguments.data_dir, earlier, schema, _out(settings))
            trained_on = [file for file in trained_on if file not in known]
            # Choosing the best pass learns from val too, but no weights.
            _require_new(known, files, earlier, split, bool(arguments.overlapping_times) or earlier == "val")
    if trained_on and split != "train":
        # The model is of another folder, or of other files that lay in this one.
        _require_new(trained_on, files, "the model's training", split, bool(arguments.overlapping_times))
    name = model_name(config)
    plan = _evaluation_plan(name, ModelPlan(config, optimizer_preset("tiny"), None), schema, files, settings)
    scores, metrics = measure({name: model}, plan, settings, split)
    told = {key: figures.to_dict() for key, figures in metrics.items()}
    print_json(told) if arguments.json else print(figures_table(told))
    if arguments.out:
        out = storage.resolve(arguments.out)
        sink = pa.BufferOutputStream()
        pq.write_table(scores, sink)
        storage.write_bytes(storage.join(out, SCORES_FILE), sink.getvalue().to_pybytes())
        storage.write_json(storage.join(out, METRICS_FILE), told)
        if not arguments.json:
            print(storage.join(out, METRICS_FILE))
    return 0


def measure(
    models: Mapping[str, RankingModel], plan: Plan, settings: Settings, split: Split
) -> tuple[pa.Table, dict[str, Metrics]]:
    """Return the scores of a plan's evaluation files, which are those of ``split``, and each model's figures."""
    scores = score_day(plan, models, settings, split)
    return scores, compute_metrics(scores, list(models))


def _evaluation_plan(
    name: str, model: ModelPlan, schema: FeatureSchema, files: Sequence[str], settings: Settings
) -> Plan:
    training = settings.training
    return Plan(
        plan_id="",
        path="",
        ds=_last_day(files),
        preset=training.preset,
        decision="",
        train_days=(),
        warm_start_ds=None,
        snapshot_id=0,
        train_files=(),
        evaluation_files=tuple(files),
        schema=schema,
        recipe=Recipe(training.batch_size, 1, training.seed, 1.0, 1.0),
        models={name: model},
        git_revision="",
        created_at="",
    )


def _trained_on(folder: str) -> list[str]:
    """Return the files that a saved model was trained on, where they and the plan of its training still lie."""
    plan = folder.rsplit("/", 2)[0]
    if plan.endswith(":/") or not storage.exists(storage.join(plan, PLAN_FILE)):
        return []
    try:
        files = Plan.load(plan).train_files
    except BadConfigError as error:
        logger.warning("what the model was trained on is not known, so it is not compared: %s", error)
        return []
    return [file for file in files if storage.exists(file)]


def _require_new(known: Sequence[str], files: Sequence[str], first: str, second: Split, overlapping: bool) -> None:
    """Refuse to measure on rows that were trained on, or on some that are not later: such a figure says too much.

    Raises:
        BadDataError: if the splits share requests, or, unless ``overlapping`` is allowed, ``second`` begins before
            ``first`` ends.
    """
    seen = pa.concat_arrays([_column(file, "request_id") for file in known])
    shared = pa.concat_arrays([ids.filter(pc.is_in(ids, seen)) for ids in (_column(f, "request_id") for f in files)])
    if len(shared):
        raise BadDataError(
            f"{len(shared):,} requests stand both in {first} and in {second}, for example {shared[0].as_py()!r}"
        )
    end = max(pc.max(_column(file, "ts")).as_py() for file in known)
    times = pa.chunked_array([_column(file, "ts") for file in files])
    early = pc.sum(pc.less_equal(times, pa.scalar(end, times.type))).as_py()
    if early and not overlapping:
        raise BadDataError(
            f"{early:,} of {len(times):,} requests of {second} are not later than the last of {first} ({end}), the "
            f"first is of {pc.min(times).as_py()}: a model that knows what came after looks better than it will be "
            "tomorrow. Divide the log by time; if it was divided at random on purpose, give --overlapping-times"
        )


def _last_day(files: Sequence[str]) -> date:
    latest = max(pc.max(_column(file, "ts")).as_py() for file in files)
    return latest.date()


def _column(file: str, name: str) -> pa.Array:
    filesystem, inner = storage.open_filesystem(file)
    return pq.read_table(inner, filesystem=filesystem, columns=[name], partitioning=None)[name].combine_chunks()


def _out(settings: Settings) -> str:
    return storage.join(storage.resolve(settings.training.runs), PLAIN_FOLDER)


def _told(figures: Mapping[str, Any]) -> str:
    names = ("ctr_auc", "ctr_uauc", "cvr_auc", "ctr_log_loss")
    return ", ".join(f"{name} {figures[name]:.4f}" for name in names if figures.get(name) is not None)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a training on plain files."""
    group = parser.add_argument_group("plain files, without a lake")
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with schema.toml and train.csv (.jsonl, .parquet, or a folder of such files); if you like, val, "
        "which is measured after every pass, and test",
    )
    group.add_argument("--epochs", type=int, metavar="N", help="number of passes over train (default: training.epochs)")
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="impressions (rows) of one optimizer step, about: requests stay whole (default: training.batch_size)",
    )
    _add_overlapping(group, "val")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of an evaluation on plain files."""
    group = parser.add_argument_group("plain files, without a lake")
    group.add_argument("--model-path", metavar="PATH", help="folder that `onetrans train --data-dir` printed")
    group.add_argument("--data-dir", metavar="DIR", help="folder with schema.toml and the split")
    group.add_argument("--split", choices=get_args(Split), default="test", help="what to score (default: test)")
    group.add_argument("--out", metavar="DIR", help="also write scores.parquet and metrics.json there")
    _add_overlapping(group, "the split")


def _add_overlapping(group: argparse._ArgumentGroup, what: str) -> None:
    group.add_argument(
        "--overlapping-times",
        action="store_true",
        default=None,
        help=f"accept that {what} begins before train ends, as in a log that was divided at random; else it is refused",
    )


def chosen(arguments: argparse.Namespace, needed: Sequence[str], excluded: Sequence[str]) -> bool:
    """Tell whether the options ask for plain files.

    Raises:
        BadConfigError: if some of ``needed`` are given and others not, or beside one of ``excluded``.
    """
    given = [name for name in needed if getattr(arguments, name) is not None]
    if not given:
        return False
    absent = [f"--{name.replace('_', '-')}" for name in needed if name not in given]
    if absent:
        raise BadConfigError(f"{absent[0]} is needed beside --{given[0].replace('_', '-')}")
    beside = [f"--{name.replace('_', '-')}" for name in excluded if getattr(arguments, name)]
    if beside:
        raise BadConfigError(f"{beside[0]} belongs to a day of the lake, --data-dir to plain files: give one of them")
    return True
