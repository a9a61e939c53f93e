"""Days of a small world with models and scores but without a training: what gate, tracking and registry start from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from worlds import World, publish_days, settings_in, small_schema

from onetrans import storage
from onetrans.artifact import save_model
from onetrans.evaluate import compute_metrics
from onetrans.gate import run_gate
from onetrans.lake import Lake
from onetrans.models import RankingModel, build_model
from onetrans.plan import SCORES_FILE, Plan, make_plan
from onetrans.settings import GateSettings, MlflowSettings, Settings
from onetrans.tracking import fetched_folder, log_evaluation, start_model

GATE = GateSettings(replicates=100, min_rows=50, min_positives=5, min_users=10, max_uauc_loss=1.0,
                    max_log_loss_increase=9.0, max_calibration_error=9.0)  # fmt: skip

SCHEMA = small_schema(vectors=True)


def kept_folder(settings: MlflowSettings, model_id: str, folder: str) -> Path:
    """Return where MLflow keeps a folder of a logged model, on this disk."""
    with fetched_folder(settings, model_id, folder) as kept:
        return Path(kept)


@dataclass(frozen=True)
class Shop:
    """A lake with some published days, and where its runs and models go."""

    settings: Settings
    days: list[date]

    @classmethod
    def open(cls, folder: Path, days: int = 5) -> Shop:
        """Publish the first days of the world in ``folder``."""
        settings = replace(settings_in(folder), gate=GATE)
        return cls(settings, publish_days(Lake(settings.lake), days, SCHEMA, World(requests=80)))

    def plan(self, ds: date, *, track: bool = True, seed: int = 17) -> Plan:
        """Plan a day; another seed makes another plan of the same day."""
        settings = replace(self.settings, training=replace(self.settings.training, seed=seed))
        return make_plan(settings, ds, SCHEMA, from_scratch=True, track=track)

    def save_models(
        self, plan: Plan, *, seed: int = 0, recorded: tuple[str, ...] = ("onetrans", "dcnv2_din")
    ) -> dict[str, RankingModel]:
        """Save both models with fresh weights and record them, or some, in MLflow as a training would."""
        torch.manual_seed(seed)
        models = {name: build_model(planned.config, plan.schema).eval() for name, planned in plan.models.items()}
        for name, model in models.items():
            folder = storage.join(plan.model_path(name), "model")
            save_model(folder, model, plan.schema, plan.models[name].config)
            if name not in recorded:
                continue
            with start_model(self.settings, plan, name) as run:
                run.log_params({"seed": seed})
                run.log_metrics({"loss": 0.5}, step=1)
                run.log_model(model, folder)
        return models

    def write_scores(self, plan: Plan, *, better: bool) -> pa.Table:
        """Write scores of the evaluation day: the candidate knows the truth, or knows nothing; the baseline half."""
        rows = pa.concat_tables(
            [pq.read_table(storage.local_path(f), partitioning=None) for f in plan.evaluation_files]
        )
        flat = [
            {"request_id": row["request_id"], "user_id": row["user_id"], "ts": row["ts"], **candidate}
            for row in rows.to_pylist()
            for candidate in row["candidates"]
        ]
        rng = np.random.default_rng(plan.ds.toordinal())
        scores = pa.Table.from_pylist(flat).select(
            ["request_id", "user_id", "item_id", "ts", "click", "conversion", "true_ctr", "true_cvr"]
        )
        for task in ("ctr", "cvr"):
            noise, truth = rng.random(scores.num_rows), np.array(scores[f"true_{task}"])
            scores = scores.append_column(f"onetrans_{task}", pa.array(truth if better else noise))
            for scorer, known in (("dcnv2_din", 0.2), ("popularity", 0.1)):
                blurred = known * truth + (1.0 - known) * rng.random(truth.shape[0])
                scores = scores.append_column(f"{scorer}_{task}", pa.array(blurred))
        with storage.writing(storage.join(plan.path, SCORES_FILE)) as file:
            pq.write_table(scores, file)
        metrics = {name: m.to_dict() for name, m in compute_metrics(scores, list(plan.models)).items()}
        storage.write_json(storage.join(plan.path, "metrics.json"), {"ds": str(plan.ds), **metrics})
        if plan.mlflow_run_id:
            log_evaluation(self.settings, plan, metrics)
        return scores

    def candidate(self, ds: date, *, better: bool = True, seed: int = 17) -> Plan:
        """Bring a day to where `onetrans promote` takes over."""
        plan = self.plan(ds, seed=seed)
        self.save_models(plan, seed=seed + ds.toordinal(), recorded=("onetrans",))
        self.write_scores(plan, better=better)
        run_gate(self.settings, plan)
        return plan
