"""A saved model with its fixed batch, and the service on a port of its own: what tests of serving start from."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pyarrow as pa
import torch
import uvicorn
from worlds import FIRST_DAY, World, settings_in, small_schema, write_requests

from onetrans.artifact import save_model
from onetrans.models import RankingModel, build_model, preset
from onetrans.registry import Registry
from onetrans.requests import from_rows, score
from onetrans.schema import FeatureSchema
from onetrans.serving.app import RankingService
from onetrans.serving.watch import ServedModel
from onetrans.serving.web import server_config
from onetrans.settings import ServingSettings, Settings
from onetrans.tracking import connect, experiment_id

SCHEMA = small_schema(vectors=True)
SERVING = ServingSettings(port=0, deadline_ms=10_000, poll_s=3600)
WORLD = World(requests=60, candidates=12, events=12)


def rows_of(folder: Path, world: World = WORLD, schema: FeatureSchema = SCHEMA) -> pa.Table:
    """Return a day of requests as they are published."""
    return write_requests(folder / "rows.parquet", FIRST_DAY, schema, world)


def save(folder: Path, seed: int = 0, schema: FeatureSchema = SCHEMA, **changed: object) -> RankingModel:
    """Save an untrained tiny model and its fixed batch in ``folder``, as MLflow keeps them; return the model."""
    torch.manual_seed(seed)
    model = build_model(replace(preset("onetrans", "tiny"), **changed), schema).eval()  # type: ignore[arg-type]
    save_model(str(folder / "model"), model, schema, model.config)
    requests = from_rows(rows_of(folder, World(requests=8), schema), schema)
    (folder / "check").mkdir()
    (folder / "check" / "requests.json").write_text(json.dumps(requests))
    (folder / "check" / "scores.json").write_text(json.dumps(score(model, requests).to_pylist()))
    return model


def settings_of(folder: Path, **serving: object) -> Settings:
    """Return settings with which the service runs in ``folder``."""
    return replace(settings_in(folder), serving=replace(SERVING, **serving))  # type: ignore[arg-type]


@contextmanager
def running(service: RankingService) -> Iterator[httpx.Client]:
    """Run a service on a free port and give a client of it."""
    server = uvicorn.Server(server_config(service, port=0, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the service did not start"
        assert time.monotonic() < until, "the service did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def register(settings: Settings, folder: Path) -> str:
    """Log what :func:`save` wrote as a model of MLflow, make it the champion and return its version."""
    registry, where = Registry(settings.mlflow), experiment_id(settings.mlflow)
    client = connect(settings.mlflow)
    run = client.create_run(where)
    logged = client.create_logged_model(where, name="onetrans", source_run_id=run.info.run_id)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder, Path(scratch) / "artifacts")
        client.log_model_artifacts(logged.model_id, scratch)
    client.finalize_logged_model(logged.model_id, "READY")
    version = registry.register(logged.model_id, run.info.run_id, {}, "a test")
    registry.set_champion(version)
    return str(version.version)


def serve_folder(folder: Path, token: str = "", **serving: object) -> RankingService:
    """Return a service of the model saved in ``folder``."""
    return RankingService(ServedModel(str(folder), settings_of(folder, **serving)), token)
