"""A saved model: weights in safetensors, everything else in readable JSON, no pickle.

A folder holds ``model.json`` (configuration, schema, sizes, whatever the caller
adds) and the weights file it names.  The weights' name holds their digest and
``model.json`` is written last, at once or not at all.  So a reader sees the old
model whole or the new one whole, also while a folder is being overwritten, and
damage is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

import onetrans
from onetrans import storage
from onetrans.errors import BadDataError
from onetrans.models import ModelConfig, RankingModel, build_model, config_from_dict, config_to_dict
from onetrans.schema import FeatureSchema

FORMAT = 1
"""Version of the folder's layout."""

_HEADER = "model.json"


def save_model(
    path: str, model: RankingModel, schema: FeatureSchema, config: ModelConfig, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model to the folder ``path`` (local or s3://), replacing one that is there.

    ``extra`` is kept under that name in ``model.json``; it must be plain JSON data.
    """
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    digest = hashlib.sha256(weights).hexdigest()
    file = f"weights-{digest[:16]}.safetensors"
    storage.write_bytes(storage.join(path, file), weights)
    header = {
        "format": FORMAT,
        "version": onetrans.__version__,
        "weights": {"file": file, "sha256": digest, "bytes": len(weights)},
        "parameters": {
            "dense": sum(p.numel() for p in model.dense_parameters().values()),
            "embedding": sum(p.numel() for p in model.embedding_parameters().values()),
        },
        "config": config_to_dict(config),
        "schema_fingerprint": schema.fingerprint,
        "schema": schema.to_dict(),
        "extra": dict(extra or {}),
    }
    storage.write_json(storage.join(path, _HEADER), header)
    for stale in storage.list_files(path, ".safetensors"):
        if stale.rsplit("/", 1)[-1] != file:
            storage.delete_file(stale)


def read_header(path: str) -> dict[str, Any]:
    """Return the content of a saved model's ``model.json``.

    Raises:
        BadDataError: if there is none, or it is of another format.
    """
    try:
        header = storage.read_json(storage.join(path, _HEADER))
    except FileNotFoundError as error:
        raise BadDataError(f"{path} holds no model: there is no {_HEADER}") from error
    if header.get("format") != FORMAT:
        raise BadDataError(f"{path}/{_HEADER}: format = {header.get('format')!r}, this version reads {FORMAT}")
    return header


def load_model(path: str) -> tuple[RankingModel, FeatureSchema, ModelConfig]:
    """Read a model that :func:`save_model` wrote, in evaluation mode on the CPU.

    Raises:
        BadDataError: if the folder holds no model or a damaged one.
        BadConfigError: if its configuration or schema is refused.
    """
    header = read_header(path)
    config = config_from_dict(header["config"])
    schema = FeatureSchema.from_dict(header["schema"])
    file = storage.join(path, header["weights"]["file"])
    try:
        weights = storage.read_bytes(file)
    except FileNotFoundError as error:
        raise BadDataError(f"{path}/{_HEADER} names {file}, which is not there") from error
    digest = hashlib.sha256(weights).hexdigest()
    if digest != header["weights"]["sha256"]:
        raise BadDataError(
            f"{file} is damaged: {len(weights)} bytes with SHA-256 {digest[:16]}..., "
            f"expected {header['weights']['bytes']} bytes with {header['weights']['sha256'][:16]}..."
        )
    # Weights are replaced at once, so the caller's random numbers must not be spent on them.  The meta device
    # would save the drawing too, but random functions on it import torch's compiler: over a second a process.
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, schema)
    try:
        model.load_state_dict(safetensors.torch.load(weights), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise BadDataError(f"{file} does not fit the model that {_HEADER} describes: {error}") from error
    return model.eval(), schema, config
