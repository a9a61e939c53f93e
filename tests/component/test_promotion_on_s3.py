"""A candidate in an object store whose requests fail at times: recorded in MLflow, judged, promoted, and loaded."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from onetrans import storage
from onetrans.artifact import load_model
from onetrans.champion import current_champion
from onetrans.commands.registry import difference, verify
from onetrans.plan import GATE_FILE, PROMOTION_FILE
from onetrans.registry import Registry, promote
from onetrans.serving.source import opened
from onetrans.serving.watch import ServedModel
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
        with opened(f"models:/{settings.mlflow.registered_model}@champion", settings.mlflow) as source:
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


def test_what_is_fetched_of_a_model_is_gone_when_it_was_read(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service swaps every night for months: each model it left behind would stand in its ephemeral storage."""
    bucket = object_store.create_bucket("fetched")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", object_store.endpoint)
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    here = Shop.open(tmp_path)
    settings = replace(here.settings, mlflow=replace(here.settings.mlflow, artifacts=f"{bucket}/mlflow"))
    shop, registry = Shop(settings, here.days), Registry(settings.mlflow)
    champion = f"models:/{settings.mlflow.registered_model}@champion"

    def left() -> list[str]:
        return [path.name for path in copies.iterdir()]

    promote(settings, shop.candidate(shop.days[2]))
    assert left() == [], "recorded and promoted"
    served = ServedModel(champion, settings)
    assert left() == [], "served"
    assert served.engine.source.kept is not None
    later = shop.plan(shop.days[3])
    assert current_champion(settings, later).record.state == "scored"
    promote(settings, shop.candidate(shop.days[3]))
    assert served.look()
    assert served.engine.source.version == "2"
    assert served.engine.difference is not None
    version = registry.version("2")
    assert verify(registry, version)[0] < 1e-5
    assert difference(registry, registry.version("1"), version)["training"] is not None
    registry.check_files(version)
    with opened(champion, settings.mlflow) as source:
        assert left() != []
        assert storage.exists(storage.join(source.folder, "model.json"))
    assert left() == []
