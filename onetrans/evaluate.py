"""Evaluation: both models of a plan score the same rows of day D, which neither has trained on.

So do two others they are compared with: the registry's champion, with the schema
it was trained with, and a ranker by popularity.  One pass over the day feeds every
batch to each saved model, so the rows are the same by construction; a champion of
another schema has a pass of its own over the same rows.

``scores.parquet`` (:mod:`onetrans.scores`) holds one row per impression,
``metrics.json`` the figures of each scorer under its name and, where the log is
simulated, those of the true probabilities under ``truth``: no model can be
expected to do better.

Before anything is scored the evaluation rows are checked to be new: their day and
times lie after those of the training rows, and no request stands in both.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.champion import Opponent, current_champion
from onetrans.days import day_bounds, describe_days
from onetrans.distributed import Ranks
from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.history import History
from onetrans.lake import Lake
from onetrans.loader import LoaderConfig, RequestData, prefetch
from onetrans.metrics import Metrics
from onetrans.models import RankingModel
from onetrans.models.compute import Compute, choose_device
from onetrans.plan import FINISHED_FILE, METRICS_FILE, TRUTH, Plan, add_day_arguments, plan_of
from onetrans.process import add_json, print_json
from onetrans.progress import Progress
from onetrans.schema import Feature, FeatureSchema, hash64
from onetrans.scores import (
    CHAMPION,
    CONTEXT_PREFIX,
    KEYS,
    POPULARITY,
    TASKS,
    champion_of,
    read_leaves,
    read_scores,
    with_champion,
    write_scores,
)
from onetrans.settings import Settings, load_settings
from onetrans.tracking import log_evaluation
from onetrans.train import MODEL_FOLDER, choose_compute
from onetrans.trial import forget_trials, is_trial, log_trial, results_folder, step_of_day

logger = logging.getLogger(__name__)

IMPRESSIONS = "impressions"
"""Table in which context columns are still text."""

EXAMPLES = """examples:
  onetrans evaluate --plan var/runs/ds=2022-05-06/0123456789ab
  onetrans evaluate --config tiny --ds 2022-05-06 --no-mlflow
  onetrans evaluate --model-path var/runs/plain/0123456789ab/onetrans --data-dir data/mine"""


def evaluate(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Score day D with every model of a plan and what they are compared with; write and return the metrics.

    Raises:
        NotReadyError: if a model is not trained, or the registry does not answer.
        BadDataError: if an evaluation row is not new, a score is not finite, or the champion's files are gone.
    """
    with step_of_day(settings, plan, "evaluate"):
        models = {name: load_trained(plan, name) for name in plan.models}
        check_rows_are_new(plan)
        champion = current_champion(settings, plan)
        began = time.monotonic()
        if champion.model is not None and _reads_alike(champion, plan):
            models[CHAMPION] = champion.model
            scores = with_champion(score_day(plan, models, settings), champion.record)
        else:
            scores = _against_champion(score_day(plan, models, settings), plan, champion, settings)
        scores = with_history(scores, plan, settings)
        return _keep(scores, plan, settings, round(time.monotonic() - began, 3))


def compare_again(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Score day D with the champion of this moment, in place of the one that the scores know; return the metrics.

    Raises:
        NotReadyError: if the plan was not evaluated, or the registry does not answer.
        BadDataError: if the champion's files are gone.
    """
    scores, _ = read_scores(plan)
    old = [f"{CHAMPION}_{task}" for task in TASKS]
    scores = scores.drop_columns([column for column in old if column in scores.column_names])
    return _keep(_against_champion(scores, plan, current_champion(settings, plan), settings), plan, settings, None)


def _keep(scores: pa.Table, plan: Plan, settings: Settings, seconds: float | None) -> dict[str, Any]:
    champion = champion_of(scores)
    scorers = [*plan.models, *(name for name in (CHAMPION, POPULARITY) if f"{name}_ctr" in scores.column_names)]
    metrics = {
        "ds": str(plan.ds),
        "plan_id": plan.plan_id,
        "seconds": seconds,
        "champion_version": champion.version,
        **{name: figures.to_dict() for name, figures in compute_metrics(scores, scorers).items()},
    }
    folder, trial = results_folder(settings, plan), is_trial(settings, plan)
    if not trial:
        forget_trials(plan)
    write_scores(folder, scores)
    storage.write_json(storage.join(folder, METRICS_FILE), metrics)
    if trial:
        log_trial(settings, plan, {METRICS_FILE: metrics})
    elif plan.mlflow_run_id:
        log_evaluation(settings, plan, metrics)
    return metrics


def _reads_alike(champion: Opponent, plan: Plan) -> bool:
    return champion.schema is not None and champion.schema.fingerprint == plan.schema.fingerprint


def _against_champion(scores: pa.Table, plan: Plan, champion: Opponent, settings: Settings) -> pa.Table:
    """Add the champion's scores from a pass of its own, or say in the file why there are none."""
    if champion.model is None or champion.schema is None:
        return with_champion(scores, champion.record)
    try:
        own = score_files(
            plan.evaluation_files,
            champion.schema,
            plan.recipe.batch_size,
            {CHAMPION: champion.model},
            settings,
            f"champion on {plan.ds}",
        )
    except BadDataError as error:
        # The rows fit the plan's schema, or its own models could not have read them: it is the champion's that differs.
        note = f"champion version {champion.record.version} cannot score the rows of {plan.ds}: {error}"
        logger.warning("%s", note)
        return with_champion(scores, replace(champion.record, state="incomparable", note=note))
    if not all(own[key].equals(scores[key]) for key in KEYS):
        raise BadDataError(f"plan {plan.plan_id}: the champion's pass read other rows than those in the scores")
    for task in TASKS:
        scores = scores.append_column(f"{CHAMPION}_{task}", own[f"{CHAMPION}_{task}"])
    return with_champion(scores, champion.record)


def with_history(scores: pa.Table, plan: Plan, settings: Settings) -> pa.Table:
    """Add the popularity ranker's scores, and what the report slices by.

    The columns are ``popularity_ctr`` and ``popularity_cvr``; ``item_impressions`` and ``user_impressions`` in the
    training rows of the last days; ``context.<feature>`` of every context feature that is no vector, as text.
    """
    history = History.read(plan)
    item_ids, user_ids = scores["item_id"].combine_chunks(), scores["user_id"].combine_chunks()
    ctr, cvr = history.popularity(item_ids)
    columns: dict[str, Any] = {
        f"{POPULARITY}_ctr": ctr,
        f"{POPULARITY}_cvr": cvr,
        "item_impressions": history.item_impressions(item_ids),
        "user_impressions": history.user_impressions(user_ids),
    }
    context = [f for f in plan.schema.of_side("context") if f.kind != "vector"]
    if context:
        names = ["request_id", *(f.name for f in context)]
        requests = pa.concat_tables([read_leaves(file, names) for file in plan.evaluation_files])
        place = pc.index_in(scores["request_id"].combine_chunks(), requests["request_id"].combine_chunks())
        lake = Lake(settings.lake)
        for feature in context:
            told = context_texts(requests[feature.name].combine_chunks(), feature, lake, plan.ds)
            columns[f"{CONTEXT_PREFIX}{feature.name}"] = told.take(place)
    for name, values in columns.items():
        scores = scores.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    return scores


def context_texts(values: pa.Array, feature: Feature, lake: Lake, ds: date) -> pa.Array:
    """Return a context feature's stored values as a person knows them; null where missing.

    Hours become quarters of the day, a bucketized number its bucket.  A hash is looked up among the day's published
    impressions, where the column is still text; one that is not found there is written as a number.
    """
    distinct = values.dictionary_encode()
    if feature.kind == "bucketized":
        texts = [_bucket(value, feature.boundaries) for value in distinct.dictionary.to_pylist()]
    else:
        known = {hash64(str(hour)): f"{hour // 6 * 6:02}:00 to {hour // 6 * 6 + 5:02}:59" for hour in range(24)}
        if feature.column != "hour_of_day":
            known = {hash64(str(n)): str(n) for n in range(7)} if feature.column == "day_of_week" else {}
            known |= _published_texts(feature.column, lake, ds)
        texts = [known.get(value, f"#{value}") for value in distinct.dictionary.to_pylist()]
    return pa.array(texts, pa.string()).take(distinct.indices)


def _bucket(value: float, boundaries: Sequence[float]) -> str:
    at = int(np.searchsorted(boundaries, value, side="right"))
    if at == 0:
        return f"below {boundaries[0]:g}"
    return f"{boundaries[at - 1]:g} to {boundaries[at]:g}" if at < len(boundaries) else f"{boundaries[-1]:g} and more"


def _published_texts(column: str, lake: Lake, ds: date) -> dict[int, str]:
    if lake.snapshot_id(IMPRESSIONS) is None:
        return {}
    found: set[Any] = set()
    for file in lake.files(IMPRESSIONS, [ds]):
        part = read_leaves(file, [column])
        found.update(pc.unique(part[column]).to_pylist() if column in part.column_names else ())
    return {hash64(str(value)): str(value) for value in found if value is not None}


def load_trained(plan: Plan, model_name: str) -> RankingModel:
    """Return one model of a plan as it was saved, in evaluation mode.

    Raises:
        NotReadyError: if its training is not finished.
    """
    folder = plan.model_path(model_name)
    if not storage.exists(storage.join(folder, FINISHED_FILE)):
        raise NotReadyError(
            f"{model_name} of {plan.ds} is not trained; run: onetrans train --plan {plan.path} --model {model_name}"
        )
    model, schema, _ = load_model(storage.join(folder, MODEL_FOLDER))
    if schema.fingerprint != plan.schema.fingerprint:
        raise BadDataError(
            f"{folder} holds a model of feature schema {schema.fingerprint}, the plan has {plan.schema.fingerprint}"
        )
    return model.eval()


def score_day(plan: Plan, models: Mapping[str, RankingModel], settings: Settings, what: str = "") -> pa.Table:
    """Return a row per impression of day D: its keys and labels, and ``<model>_ctr``, ``<model>_cvr`` of each model.

    ``what`` names rows that are of no day (a split of plain files) where progress is shown.

    Raises:
        BadDataError: if a score is not finite; the text names the model and an impression.
    """
    return score_files(
        plan.evaluation_files, plan.schema, plan.recipe.batch_size, models, settings, f"evaluate {what or plan.ds}"
    )


def score_share(
    plan: Plan, models: Mapping[str, RankingModel], settings: Settings, ranks: Ranks, what: str = ""
) -> pa.Table | None:
    """Return what :func:`score_day` does where the process leads, None elsewhere; all ``ranks`` share the scoring.

    Raises:
        BadDataError: as :func:`score_day` does.
    """
    scored = _scored_batches(
        plan.evaluation_files,
        plan.schema,
        plan.recipe.batch_size,
        models,
        settings,
        f"evaluate {what or plan.ds}",
        ranks,
    )
    return ranks.gather(scored)


def score_files(
    files: Sequence[str],
    schema: FeatureSchema,
    batch_size: int,
    models: Mapping[str, RankingModel],
    settings: Settings,
    label: str,
) -> pa.Table:
    """Return a row per impression of some files, in stored order, with the scores of models of one schema.

    Raises:
        BadDataError: if a file lacks a feature of the schema, or a score is not finite.
    """
    return pa.concat_tables(_scored_batches(files, schema, batch_size, models, settings, label, Ranks()))


@torch.inference_mode()
def _scored_batches(
    files: Sequence[str],
    schema: FeatureSchema,
    batch_size: int,
    models: Mapping[str, RankingModel],
    settings: Settings,
    label: str,
    ranks: Ranks,
) -> list[pa.Table]:
    """Return a table per batch, or per this process's share of each."""
    if settings.training.threads:
        torch.set_num_threads(settings.training.threads)
    device = choose_device("training.device", settings.training.device)
    # Every model reads the same batches and keeps of the events what its own configuration says.
    longest = max(model.config.max_seq_len for model in models.values())
    data = RequestData(files, schema, LoaderConfig(batch_size, longest), with_keys=True)
    for model in models.values():
        model.to(device).use(Compute(choose_compute(settings.training, device).precision))
    parts: list[pa.Table] = []
    # The leading process shows how far it is with its own share.
    with Progress(data.impressions // ranks.count, "rows", label, shown=ranks.leads) as progress:
        for loaded in prefetch(data.batches(shuffle_seed=None, share=ranks.share)):
            if loaded.keys is None:
                raise AssertionError("the data was opened with keys")
            batch, part = loaded.batch.to(device), loaded.keys
            for name, model in models.items():
                with model.autocast():
                    scores = model(batch)
                for task, logit_N in (("ctr", scores.ctr_logit_N), ("cvr", scores.cvr_logit_N)):
                    probability_N = torch.sigmoid(logit_N.double()).cpu().numpy()
                    _refuse_not_finite(probability_N, part, name, task)
                    part = part.append_column(f"{name}_{task}", pa.array(probability_N))
            parts.append(part)
            progress.advance(part.num_rows)
    return parts


def compute_metrics(scores: pa.Table, model_names: list[str]) -> dict[str, Metrics]:
    """Return the figures of each model, and of the true probabilities where the table has them."""
    columns = {name: (f"{name}_ctr", f"{name}_cvr") for name in model_names}
    if {"true_ctr", "true_cvr"} <= set(scores.column_names):
        columns[TRUTH] = ("true_ctr", "true_cvr")
    user_N = scores["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return {
        name: Metrics.compute(
            click_N=scores["click"].to_numpy(),
            conversion_N=scores["conversion"].to_numpy(),
            ctr_N=scores[ctr].to_numpy(),
            cvr_N=scores[cvr].to_numpy(),
            user_N=user_N,
        )
        for name, (ctr, cvr) in columns.items()
    }


def check_rows_are_new(plan: Plan) -> None:
    """Refuse an evaluation on anything the training has seen, or could have seen from later.

    Raises:
        BadDataError: if a training day is not before D, a file or request stands on both sides, or a time lies on
            the wrong side of D's beginning by more than the schema's day tolerance.
    """
    late = [day for day in plan.train_days if day >= plan.ds]
    if late:
        raise BadDataError(f"plan {plan.plan_id}: trains on {describe_days(late)}, not before {plan.ds}")
    common = sorted(set(plan.train_files) & set(plan.evaluation_files))
    if common:
        raise BadDataError(f"plan {plan.plan_id}: trains and evaluates on {common[0]}")
    midnight = int(day_bounds(plan.ds, plan.schema.timezone)[0].timestamp()) * 1_000_000
    tolerance = plan.schema.day_tolerance_minutes * 60_000_000
    evaluated = pa.concat_tables([_requests(file) for file in plan.evaluation_files])
    early = int((_microseconds(evaluated) < midnight - tolerance).sum())
    if early:
        raise BadDataError(f"plan {plan.plan_id}: {early} requests to evaluate on are from before {plan.ds}")
    identities = evaluated["request_id"].combine_chunks()
    for file in plan.train_files:
        trained = _requests(file)
        late_rows = int((_microseconds(trained) >= midnight + tolerance).sum())
        if late_rows:
            raise BadDataError(
                f"plan {plan.plan_id}: {file}: {late_rows} training requests are from {plan.ds} or later"
            )
        both = trained.filter(pc.is_in(trained["request_id"], identities))
        if both.num_rows:
            raise BadDataError(
                f"plan {plan.plan_id}: {both.num_rows} requests stand both in {file} and among those to evaluate on, "
                f"for example {both['request_id'][0].as_py()!r}"
            )


def _requests(file: str) -> pa.Table:
    filesystem, inner = storage.open_filesystem(file)
    return pq.read_table(inner, filesystem=filesystem, columns=["request_id", "ts"], partitioning=None)


def _microseconds(table: pa.Table) -> npt.NDArray[np.int64]:
    return table["ts"].combine_chunks().cast(pa.int64()).to_numpy()


def _refuse_not_finite(probability_N: npt.NDArray[np.float64], keys: pa.Table, name: str, task: str) -> None:
    bad = ~np.isfinite(probability_N)
    if bad.any():
        row = int(np.argmax(bad))
        raise BadDataError(
            f"{name}: {int(bad.sum())} of {bad.shape[0]} {task.upper()} scores of a batch are not finite, for example "
            f"of request {keys['request_id'][row].as_py()!r}, item {keys['item_id'][row].as_py()!r}"
        )


# Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--plan", help="folder printed by `onetrans plan`; without it --ds finds the plan")
    add_day_arguments(parser)
    from onetrans.plain_runs import add_evaluation_arguments

    add_evaluation_arguments(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a plan, or a model on plain files, and print the figures."""
    from onetrans import plain_runs

    settings = load_settings()
    if plain_runs.chosen(arguments, ["data_dir", "model_path"], ["plan", "ds", "config", "from_scratch"]):
        return plain_runs.evaluate_files(arguments, settings)
    if arguments.overlapping_times:
        raise BadConfigError("--overlapping-times needs --data-dir; of a day of the lake only later rows are scored")
    plan = plan_of(arguments, settings)
    metrics = evaluate(plan, settings)
    if arguments.json:
        print_json(metrics)
        return 0
    print(figures_table(metrics))
    print(storage.join(results_folder(settings, plan), METRICS_FILE))
    return 0


def figures_table(metrics: Mapping[str, Any]) -> str:
    """Return the figures of ``metrics.json`` as text, a line per scorer."""
    names = [name for name, figures in metrics.items() if isinstance(figures, Mapping)]
    columns = ("ctr_auc", "ctr_uauc", "cvr_auc", "cvr_uauc", "ctr_log_loss", "cvr_log_loss")
    lines = [f"{'model':<12}" + "".join(f"{column:>14}" for column in columns)]
    for name in names:
        cells = (metrics[name][column] for column in columns)
        lines.append(f"{name:<12}" + "".join(f"{'-' if cell is None else f'{cell:.4f}':>14}" for cell in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command as ``python -m onetrans.evaluate``."""
    import sys

    from onetrans.cli import main as cli

    return cli(["evaluate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
