"""Evaluation: both models of a plan score the same rows of day D, which neither has trained on.

One pass over the day feeds every batch to each saved model, so the rows are the
same by construction.  ``scores.parquet`` holds one row per impression,
``metrics.json`` the figures of each model under its name and, where the log is
simulated, those of the true probabilities under ``truth``: no model can be
expected to do better.

Before anything is scored the evaluation rows are checked to be new: their day and
times lie after those of the training rows, and no request stands in both.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.days import day_bounds, describe_days
from onetrans.errors import BadDataError, NotReadyError
from onetrans.loader import LoaderConfig, RequestData, prefetch
from onetrans.metrics import Metrics
from onetrans.models import RankingModel
from onetrans.models.compute import Compute
from onetrans.plan import FINISHED_FILE, METRICS_FILE, SCORES_FILE, TRUTH, Plan, add_day_arguments, plan_of
from onetrans.progress import Progress
from onetrans.settings import Settings, load_settings
from onetrans.tracking import log_evaluation, recorded_step
from onetrans.train import MODEL_FOLDER, choose_compute, choose_device

logger = logging.getLogger(__name__)


EXAMPLES = """examples:
  onetrans evaluate --plan var/runs/ds=2022-05-06/0123456789ab
  onetrans evaluate --config tiny --ds 2022-05-06 --no-mlflow"""


def evaluate(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Score day D with every model of a plan, write scores and metrics, and return the metrics.

    Raises:
        NotReadyError: if a model is not trained.
        BadDataError: if an evaluation row is not new, or a score is not finite.
    """
    with recorded_step(settings, plan, "evaluate"):
        models = {name: load_trained(plan, name) for name in plan.models}
        check_rows_are_new(plan)
        began = time.monotonic()
        scores = score_day(plan, models, settings)
        metrics = {
            "ds": str(plan.ds),
            "plan_id": plan.plan_id,
            "seconds": round(time.monotonic() - began, 3),
            **{name: figures.to_dict() for name, figures in compute_metrics(scores, list(models)).items()},
        }
        sink = pa.BufferOutputStream()
        pq.write_table(scores, sink)
        storage.write_bytes(storage.join(plan.path, SCORES_FILE), sink.getvalue().to_pybytes())
        storage.write_json(storage.join(plan.path, METRICS_FILE), metrics)
        if plan.mlflow_run_id:
            log_evaluation(settings, plan, metrics)
    return metrics


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


@torch.inference_mode()
def score_day(plan: Plan, models: Mapping[str, RankingModel], settings: Settings) -> pa.Table:
    """Return a row per impression of day D: its keys and labels, and ``<model>_ctr``, ``<model>_cvr`` of each model.

    Raises:
        BadDataError: if a score is not finite; the text names the model and an impression.
    """
    if settings.training.threads:
        torch.set_num_threads(settings.training.threads)
    device = choose_device(settings.training.device)
    # Every model reads the same batches and keeps of the events what its own configuration says.
    longest = max(model.config.max_seq_len for model in plan.models.values())
    data = RequestData(
        plan.evaluation_files, plan.schema, LoaderConfig(plan.recipe.batch_size, longest), with_keys=True
    )
    for model in models.values():
        model.to(device).use(Compute(choose_compute(settings.training, device).precision))
    parts: list[pa.Table] = []
    with Progress(data.impressions, "rows", f"evaluate {plan.ds}") as progress:
        for loaded in prefetch(data.batches(shuffle_seed=None)):
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
    return pa.concat_tables(parts)


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


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a plan and print its figures."""
    settings = load_settings()
    plan = plan_of(arguments, settings)
    metrics = evaluate(plan, settings)
    print(figures_table(metrics))
    print(storage.join(plan.path, METRICS_FILE))
    return 0


def figures_table(metrics: Mapping[str, Any]) -> str:
    """Return the figures of ``metrics.json`` as text, a line per model."""
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
