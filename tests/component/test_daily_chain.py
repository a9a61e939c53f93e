"""The chain of nights: days backfilled in a row are the days trained nightly, and every start says what it decided."""

from __future__ import annotations

import logging
from datetime import timedelta

import pyarrow.parquet as pq
import pytest
import torch

from onetrans import storage
from onetrans.checkpoint import Checkpoint
from onetrans.cli import main as cli
from onetrans.errors import EXIT_NOT_READY, EXIT_OK
from onetrans.evaluate import evaluate
from onetrans.lake import Lake
from onetrans.plan import Plan, make_plan
from onetrans.settings import as_environment
from onetrans.tracking import connect, find_model_run
from onetrans.train import InterruptedTrainingError, train
from tests.ranks import stopping
from tests.worlds import FIRST_DAY, World, publish_day, publish_days, settings_in, small_schema, write_schema

SCHEMA = small_schema()
WORLD = World(requests=60)
MODELS = ("onetrans", "dcnv2_din")
DAY = timedelta(days=1)
DAYS = [FIRST_DAY + n * DAY for n in range(6)]
NIGHTS = DAYS[2:5]


def night(settings, ds):
    """Do what the steps of a night do: plan, train both models, score the day."""
    plan = make_plan(settings, ds, SCHEMA, track=False)
    for name in MODELS:
        train(plan, name, settings)
    return plan, evaluate(plan, settings)


def test_three_days_backfilled_in_a_row_are_three_nights(tmp_path):
    """Rows of rare ids are withheld and rows of idle ones start afresh, which depends on the days before too."""
    options = {"admit_after": 2, "evict_after_days": 1, "lookback_days": 3}
    nightly, backfilled = (settings_in(tmp_path / name, **options) for name in ("nightly", "backfilled"))
    publish_days(Lake(nightly.lake), 2, SCHEMA, WORLD)
    nights = []
    for ds in NIGHTS:
        publish_day(Lake(nightly.lake), ds, SCHEMA, WORLD)
        nights.append(night(nightly, ds))

    publish_days(Lake(backfilled.lake), len(DAYS), SCHEMA, WORLD)  # all are there, and a later one
    for (theirs, figures), ds in zip(nights, NIGHTS, strict=True):
        mine, measured = night(backfilled, ds)
        assert (mine.decision, mine.train_days) == (theirs.decision, theirs.train_days)
        assert (mine.warm_start_ds, len(mine.train_days)) == ((None, 2) if ds == NIGHTS[0] else (ds - DAY, 1))
        for name in MODELS:
            found, expected = (Checkpoint.load(storage.join(p.model_path(name), "checkpoint")) for p in (mine, theirs))
            assert found.tensors.keys() == expected.tensors.keys()
            for path, tensor in expected.tensors.items():
                assert torch.equal(found.tensors[path], tensor), (ds, name, path)
            assert found.trees == expected.trees
        scored, wanted = (pq.read_table(storage.local_path(p.path) / "scores.parquet") for p in (mine, theirs))
        assert scored.equals(wanted)
        assert {name: measured[name] for name in MODELS} == {name: figures[name] for name in MODELS}


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Settings of a lake without the fourth day, and the first trainings of a chain; the environment names them."""
    settings = settings_in(tmp_path, lookback_days=3)
    lake = Lake(settings.lake)
    for ds in (*DAYS[:3], *DAYS[4:]):
        publish_day(lake, ds, SCHEMA, WORLD)
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ONETRANS_SOURCE_SCHEMA", str(write_schema(tmp_path / "schema.toml", SCHEMA)))
    return settings


def planned(settings, ds, capsys, caplog):
    """Return the plan that the command made, once the log and MLflow were found to tell what it decided."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert cli(["plan", "--ds", str(ds)]) == EXIT_OK
    plan = Plan.load(capsys.readouterr().out.strip())
    assert plan.decision in caplog.text
    assert connect(settings.mlflow).get_run(plan.mlflow_run_id).data.params["decision"] == plan.decision
    return plan


def test_whatever_is_decided_stands_in_the_log_and_in_mlflow(chain, capsys, caplog, monkeypatch, tmp_path):
    settings = chain
    first = planned(settings, DAYS[2], capsys, caplog)
    assert (
        first.decision == "fresh weights, as no training of the last 3 days is finished; reads 2024-02-26..2024-02-27"
    )
    with pytest.raises(InterruptedTrainingError):
        train(first, "dcnv2_din", settings, stopping())
    _damage(first, "dcnv2_din")
    for name in MODELS:
        train(first, name, settings)
        assert f"{name} of {DAYS[2]}: the plan: {first.decision}" in caplog.text
    told = find_model_run(settings, first, "dcnv2_din").data.tags["restarted"]
    assert "is damaged: its content is not what was written" in told
    assert f"dcnv2_din: {told}; the training begins again at its start" in caplog.text

    # A gap: the fourth day is not there.
    assert cli(["plan", "--ds", str(DAYS[4])]) == EXIT_NOT_READY
    assert f"has no published {DAYS[3]}" in capsys.readouterr().err
    monkeypatch.setenv("ONETRANS_SOURCE_ABSENT_DAYS", str(DAYS[3]))
    second = planned(settings, DAYS[4], capsys, caplog)
    assert second.decision == (
        f"goes on from the training of {DAYS[2]} and reads {DAYS[2]}, without {DAYS[3]}, which source.absent_days names"
    )
    for name in MODELS:
        train(second, name, settings)

    # A corrupt checkpoint: the one before it.
    _damage(second, "onetrans")
    third = planned(settings, DAYS[5], capsys, caplog)
    assert third.decision == (
        f"goes on from the training of {DAYS[2]}, as that of {DAYS[4]} has a damaged checkpoint, and reads {DAYS[2]}, "
        f"{DAYS[4]}, without {DAYS[3]}, which source.absent_days names"
    )
    # A changed schema: larger tables grow, anything else is trained afresh.
    write_schema(tmp_path / "schema.toml", small_schema(hash_size=2 * 97))
    grown = planned(settings, DAYS[5], capsys, caplog)
    start = f"goes on from the training of {DAYS[2]}, whose table user grows from 98 to 195 rows, "
    assert grown.decision.startswith(start)
    told = f"table item grows from 98 to 195 rows, as that of {DAYS[4]} has a damaged checkpoint, and reads {DAYS[2]}"
    assert told in grown.decision
    write_schema(tmp_path / "schema.toml", small_schema(hash_size=98))
    afresh = planned(settings, DAYS[5], capsys, caplog)
    assert afresh.decision.startswith(
        f"fresh weights for every model, as the training of {DAYS[4]} had another feature schema: feature "
    )
    assert "hash_size = 97, now 98, which is no multiple of it" in afresh.decision


def _damage(plan, model_name):
    (file,) = storage.list_files(storage.join(plan.model_path(model_name), "checkpoint"), ".safetensors")
    content = storage.read_bytes(file)
    storage.write_bytes(file, content[:-1] + bytes([content[-1] ^ 1]))
