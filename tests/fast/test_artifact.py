"""Saved models: the loaded one scores as the saved one, bit by bit; damage is named; overwriting is safe."""

import json
from pathlib import Path

import pytest
import torch

from onetrans import storage
from onetrans.artifact import load_model, read_header, save_model
from onetrans.errors import BadDataError
from onetrans.models import build_model, preset
from tests.batches import random_batch, vector_schema

SCHEMA = vector_schema()
BATCH = random_batch(SCHEMA, [4, 1, 3], [9, 0, 20], seed=1)


def trained(name, seed=0):
    """A model that has seen data: its batch normalisation has running statistics."""
    torch.manual_seed(seed)
    config = preset(name, "tiny")
    model = build_model(config, SCHEMA)
    model.train()(BATCH)
    return model.eval(), config


def scores(model):
    with torch.no_grad():
        return torch.stack(model(BATCH))


@pytest.mark.parametrize("name", ["onetrans", "dcnv2_din"])
def test_round_trip_gives_equal_scores(name, tmp_path):
    model, config = trained(name)
    path = str(tmp_path / "model")
    save_model(path, model, SCHEMA, config, {"day": "2022-05-06"})
    random_state = torch.get_rng_state()
    loaded, schema, loaded_config = load_model(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(scores(loaded), scores(model))
    assert not loaded.training
    assert (schema, loaded_config) == (SCHEMA, config)
    assert schema.fingerprint == SCHEMA.fingerprint
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


def test_a_loaded_model_trains_on(tmp_path):
    model, config = trained("onetrans")
    save_model(str(tmp_path / "m"), model, SCHEMA, config)
    loaded, _, _ = load_model(str(tmp_path / "m"))
    ctr, cvr = loaded.train()(BATCH)
    (ctr.sum() + cvr.sum()).backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_nothing_in_the_folder_is_a_pickle_and_the_header_is_readable(tmp_path):
    model, config = trained("dcnv2_din")
    save_model(str(tmp_path), model, SCHEMA, config, {"metrics": {"ctr_auc": 0.75}})
    names = sorted(p.name for p in tmp_path.iterdir())
    header = json.loads((tmp_path / "model.json").read_text())
    assert names == ["model.json", header["weights"]["file"]]
    assert header["weights"]["file"].endswith(".safetensors")
    assert header["config"]["model"] == "dcnv2_din"
    assert header["extra"] == {"metrics": {"ctr_auc": 0.75}}
    total = sum(p.numel() for p in model.parameters())
    assert header["parameters"]["dense"] + header["parameters"]["embedding"] == total
    assert read_header(str(tmp_path)) == header


def test_overwriting_leaves_one_model(tmp_path):
    path = str(tmp_path)
    for seed in (0, 1):
        model, config = trained("onetrans", seed)
        save_model(path, model, SCHEMA, config)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert torch.equal(scores(load_model(path)[0]), scores(model))


def test_a_crash_before_the_header_leaves_the_old_model(tmp_path, monkeypatch):
    old, config = trained("onetrans", 0)
    path = str(tmp_path)
    save_model(path, old, SCHEMA, config)
    new, _ = trained("onetrans", 1)

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(storage, "write_json", crash)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, new, SCHEMA, config)
    assert torch.equal(scores(load_model(path)[0]), scores(old))


def test_damage_is_named(tmp_path):
    model, config = trained("onetrans")
    save_model(str(tmp_path), model, SCHEMA, config)
    weights = next(tmp_path.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BadDataError, match=f"{weights.name} is damaged"):
        load_model(str(tmp_path))
    weights.unlink()
    with pytest.raises(BadDataError, match="which is not there"):
        load_model(str(tmp_path))


def test_an_empty_folder_and_another_format_are_refused(tmp_path):
    with pytest.raises(BadDataError, match="holds no model"):
        load_model(str(tmp_path / "nothing"))
    (tmp_path / "model.json").write_text('{"format": 99}')
    with pytest.raises(BadDataError, match="format = 99, this version reads 1"):
        load_model(str(tmp_path))


def test_weights_of_another_configuration_are_refused(tmp_path):
    model, config = trained("onetrans")
    save_model(str(tmp_path), model, SCHEMA, config)
    header = Path(tmp_path / "model.json")
    data = json.loads(header.read_text())
    data["config"]["num_layers"] = 5
    header.write_text(json.dumps(data))
    with pytest.raises(BadDataError, match="does not fit the model"):
        load_model(str(tmp_path))
