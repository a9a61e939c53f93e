"""A candidate in an object store whose requests fail at times: recorded in MLflow, judged, promoted, and loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.plan import GATE_FILE, PROMOTION_FILE
from onetrans.registry import promote
from onetrans.serving.source import resolve
from tests.faulty_s3 import Faults, before
from tests.s3 import ObjectStore
from tests.tracked_days import Shop


def test_a_candidate_is_judged_promoted_and_loaded_from_an_object_store(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = object_store.create_bucket("promotion")
    here = Shop.open(tmp_path)
    settings = replace(
        here.settings,
        training=replace(here.settings.training, runs=f"{bucket}/runs"),
        mlflow=replace(here.settings.mlflow, artifacts=f"{bucket}/mlflow"),
    )
    shop = Shop(settings, here.days)
    faults = Faults({"error": 19, "late": 29, "cut answer": 17, "cut request": 13})
    with before(object_store.endpoint, faults) as endpoint:
        monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", endpoint)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", endpoint)
        plan = shop.candidate(shop.days[4])
        promotion = promote(settings, plan)
        source = resolve(f"models:/{settings.mlflow.registered_model}@champion", settings.mlflow)
        model, _, _ = load_model(source.folder)
        monkeypatch.delenv("ONETRANS_STORE_ENDPOINT")
    assert promotion["decision"] == "promoted"
    assert source.version == promotion["version"]
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert min(faults.done[fault] for fault in faults.every) > 0, faults.done
    for file in (GATE_FILE, PROMOTION_FILE):
        assert storage.exists(storage.join(plan.path, file))
    kept = object_store.keys(f"{bucket}/mlflow")
    assert any(key.endswith("gate.html") for key in kept)
    assert any("/models/" in key or key.startswith("models/") for key in kept)
