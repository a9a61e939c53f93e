"""The plan: which days, what to start from, what makes two plans the same, and what is refused."""

import argparse
import json
import logging
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from onetrans import progress, storage
from onetrans.checkpoint import Checkpoint
from onetrans.cli import main as cli
from onetrans.errors import EXIT_NOT_READY, BadConfigError, NotReadyError
from onetrans.lake import Lake
from onetrans.loader import Cursor
from onetrans.models.config import ARCHITECTURES
from onetrans.plan import (
    CHECKPOINT_FILE,
    CHECKPOINT_FOLDER,
    FINISHED_FILE,
    Plan,
    configured_models,
    git_revision,
    make_plan,
    plan_of,
    preset_models,
)
from onetrans.schema import Feature
from onetrans.settings import TrainingSettings, as_environment
from tests.worlds import FIRST_DAY, World, publish_day, publish_days, settings_in, small_schema, write_schema

SCHEMA = small_schema()
WORLD = World(requests=6, users=4)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A lake with six days that no test changes, and the days."""
    settings = settings_in(tmp_path_factory.mktemp("shared"))
    return settings.lake, publish_days(Lake(settings.lake), 6, SCHEMA, WORLD)


@pytest.fixture
def settings(tmp_path, shared):
    """The shared lake, and runs of the test's own."""
    return replace(settings_in(tmp_path, lookback_days=3), lake=shared[0])


@pytest.fixture
def days(shared):
    return shared[1]


@pytest.fixture
def own(tmp_path):
    """An empty lake of the test's own."""
    return settings_in(tmp_path, lookback_days=3)


def plan_for(settings, ds, **options):
    return make_plan(settings, ds, options.pop("schema", SCHEMA), track=False, **options)


def finish(plan, names=("onetrans", "dcnv2_din"), at="2024-03-10T00:00:00"):
    """Leave the records that trainings leave; tests/component/test_training.py chains real ones."""
    for name in names:
        record = {
            **plan.models[name].decides(),
            "schema_fingerprint": plan.schema.fingerprint,
            "finished_at": at,
        }
        storage.write_json(storage.join(plan.model_path(name), FINISHED_FILE), record)
        _leave_checkpoint(storage.join(plan.model_path(name), CHECKPOINT_FOLDER))
    return plan


def _leave_checkpoint(folder):
    Checkpoint(1, Cursor(), {}, {"model.weight": torch.zeros(3)}, {}).save(folder)


def test_a_training_without_its_checkpoint_is_not_gone_on_from(own):
    """Retention removes old checkpoints; the record that the training is finished stays."""
    days = publish_days(Lake(own.lake), 5, SCHEMA, World(requests=6))
    finish(plan_for(own, days[2]))
    newest = finish(plan_for(own, days[3]))
    assert plan_for(own, days[4]).warm_start_ds == days[3]
    storage.delete_tree(storage.join(newest.model_path("onetrans"), CHECKPOINT_FOLDER))
    assert plan_for(own, days[4]).warm_start_ds == days[2]


def test_a_damaged_checkpoint_is_left_aside_and_named(settings, days, caplog):
    finish(plan_for(settings, days[2]))
    newest = finish(plan_for(settings, days[3]))
    (tensors,) = storage.list_files(newest.model_path("dcnv2_din"), ".safetensors")
    content = storage.read_bytes(tensors)
    storage.write_bytes(tensors, content[:-1] + bytes([content[-1] ^ 1]))
    plan = plan_for(settings, days[4])
    assert plan.warm_start_ds == days[2]
    assert list(plan.train_days) == days[2:4]
    assert plan.decision == (
        f"goes on from the training of {days[2]}, as that of {days[3]} has a damaged checkpoint, "
        "and reads 2024-02-28..2024-02-29"
    )
    assert "its content is not what was written" in caplog.text
    storage.write_bytes(storage.join(newest.model_path("onetrans"), CHECKPOINT_FOLDER, CHECKPOINT_FILE), b"{")
    assert plan_for(settings, days[4]) == plan
    assert "checkpoint.json is damaged" in caplog.text
    caplog.clear()
    _leave_checkpoint(storage.join(newest.model_path("onetrans"), CHECKPOINT_FOLDER))
    index = storage.join(newest.model_path("onetrans"), CHECKPOINT_FOLDER, CHECKPOINT_FILE)
    storage.write_bytes(index, storage.read_bytes(index).replace(b'"step": 1', b'"step": 3'))
    assert plan_for(settings, days[4]) == plan
    assert "checkpoint.json is damaged: its content is not what was written" in caplog.text
    storage.delete_tree(plan_for(settings, days[2]).path)
    last = plan_for(settings, days[4])
    assert last.warm_start_ds is None
    assert last.decision.startswith(f"fresh weights for every model, as the training of {days[3]} has a damaged ")


def test_without_an_earlier_training_the_look_back_window_is_read(settings, days):
    plan = plan_for(settings, days[5])
    assert list(plan.train_days) == days[2:5]
    assert plan.warm_start_ds is None
    assert all(model.warm_start is None for model in plan.models.values())
    assert plan.decision == (
        "fresh weights, as no training of the last 3 days is finished; reads 2024-02-28..2024-03-01"
    )
    lake = Lake(settings.lake)
    assert list(plan.train_files) == lake.files("training_requests", days[2:5])
    assert list(plan.evaluation_files) == lake.files("training_requests", [days[5]])
    assert plan.snapshot_id == lake.snapshot_id("training_requests")


def test_a_young_log_is_read_from_its_first_day(settings, days):
    assert list(plan_for(settings, days[1]).train_days) == days[:1]


def test_the_same_inputs_find_the_same_plan(own):
    days = publish_days(Lake(own.lake), 6, SCHEMA, WORLD)
    first = plan_for(own, days[4])
    publish_day(Lake(own.lake), days[5] + timedelta(days=1), SCHEMA, WORLD)
    assert plan_for(own, days[4]) == first
    assert Plan.load(first.path) == Plan.load(f"{first.path}/plan.json") == first


def test_other_data_configuration_or_seed_make_another_plan(own):
    days = publish_days(Lake(own.lake), 6, SCHEMA, WORLD)
    plans = [plan_for(own, days[5])]
    plans.append(plan_for(replace(own, training=replace(own.training, preset="small")), days[5]))
    plans.append(plan_for(replace(own, training=replace(own.training, seed=18)), days[5]))
    plans.append(plan_for(replace(own, training=replace(own.training, conversion_weight=2.0)), days[5]))
    publish_day(Lake(own.lake), days[3], SCHEMA, replace(WORLD, seed=1))
    plans.append(plan_for(own, days[5]))
    publish_day(Lake(own.lake), days[5], SCHEMA, replace(WORLD, seed=1))
    plans.append(plan_for(own, days[5]))
    assert len({plan.plan_id for plan in plans}) == len(plans)


def test_a_plan_keeps_naming_the_files_it_was_made_for(own):
    days = publish_days(Lake(own.lake), 6, SCHEMA, WORLD)
    plan = plan_for(own, days[5])
    publish_day(Lake(own.lake), days[4], SCHEMA, replace(WORLD, seed=1))
    again = Plan.load(plan.path)
    assert again.train_files == plan.train_files
    assert all(storage.exists(file) for file in again.train_files)


def test_the_newest_finished_day_is_continued(settings, days):
    finish(plan_for(settings, days[2]))
    finish(plan_for(settings, days[3]))
    plan = plan_for(settings, days[4])
    assert plan.warm_start_ds == days[3]
    assert list(plan.train_days) == [days[3]]
    assert plan.decision == "goes on from the training of 2024-02-29 and reads 2024-02-29"
    later = plan_for(settings, days[5])
    assert list(later.train_days) == days[3:5]
    assert later.models["onetrans"].warm_start == f"{Plan.load(plan_for(settings, days[3]).path).path}/onetrans"


def test_of_several_finished_plans_of_a_day_the_last_one_is_continued(settings, days):
    finish(plan_for(settings, days[3]), at="2024-03-10T08:00:00")
    other = finish(
        plan_for(replace(settings, training=replace(settings.training, seed=5)), days[3]), at="2024-03-10T09:00:00"
    )
    assert plan_for(settings, days[4]).models["onetrans"].warm_start == other.model_path("onetrans")


def test_of_several_finished_plans_of_a_day_the_one_it_was_decided_by_is_continued(settings, days):
    """A dry run with other choices trains too, and may be the last."""
    decided = finish(plan_for(settings, days[3]), at="2024-03-10T08:00:00")
    trial = plan_for(replace(settings, training=replace(settings.training, seed=5)), days[3])
    finish(trial, at="2024-03-10T09:00:00")
    for plan, mode in ((trial, "dry_run"), (decided, "enabled")):
        storage.write_json(storage.join(plan.path, "promotion.json"), {"mode": mode, "finished_at": "2024-03-10"})
    assert plan_for(settings, days[4]).models["onetrans"].warm_start == decided.model_path("onetrans")


def test_what_one_model_alone_finished_is_not_continued(settings, days):
    finish(plan_for(settings, days[3]), names=["onetrans"])
    plan = plan_for(settings, days[4])
    assert plan.warm_start_ds is None
    assert list(plan.train_days) == days[1:4]


def test_a_changed_model_sends_both_back_to_the_look_back_window(settings, days):
    finish(plan_for(settings, days[3]))
    models = preset_models("tiny")
    models["onetrans"] = replace(models["onetrans"], config=replace(models["onetrans"].config, num_layers=3))
    plan = plan_for(settings, days[4], models=models)
    assert [model.warm_start for model in plan.models.values()] == [None, None]
    assert list(plan.train_days) == days[1:4]
    assert plan.decision == (
        "fresh weights for every model, as the training of 2024-02-29 had onetrans config: num_layers = 2, now 3; "
        "reads 2024-02-27..2024-02-29"
    )


def test_an_upgrade_that_adds_an_option_at_its_default_keeps_the_chain(settings, days):
    plan = finish(plan_for(settings, days[3]))
    for name, option in (("onetrans", "gated_attention"), ("dcnv2_din", "event_rank")):
        file = storage.join(plan.model_path(name), FINISHED_FILE)
        record = storage.read_json(file)
        del record["config"][option]
        storage.write_json(file, record)
    assert plan_for(settings, days[4]).warm_start_ds == days[3]


def test_changed_model_code_sends_both_back_to_the_look_back_window(settings, days, monkeypatch):
    finish(plan_for(settings, days[3]))
    monkeypatch.setitem(ARCHITECTURES, "onetrans", ARCHITECTURES["onetrans"] + 1)
    plan = plan_for(settings, days[4])
    assert plan.warm_start_ds is None
    assert "had onetrans architecture: revision = 1, now 2" in plan.decision


def test_a_training_from_before_revisions_is_continued(settings, days):
    plan = finish(plan_for(settings, days[3]))
    for name in plan.models:
        file = storage.join(plan.model_path(name), FINISHED_FILE)
        record = storage.read_json(file)
        del record["architecture"]
        storage.write_json(file, record)
    assert plan_for(settings, days[4]).warm_start_ds == days[3]


def test_an_option_that_is_gone_breaks_the_chain(settings, days):
    plan = finish(plan_for(settings, days[3]))
    file = storage.join(plan.model_path("onetrans"), FINISHED_FILE)
    record = storage.read_json(file)
    record["config"]["spiral"] = 3
    storage.write_json(file, record)
    assert "had onetrans config: spiral = 3, now None" in plan_for(settings, days[4]).decision


def test_a_changed_optimizer_or_schema_breaks_the_chain_too(settings, days):
    finish(plan_for(settings, days[3]))
    models = preset_models("tiny")
    models["dcnv2_din"] = replace(
        models["dcnv2_din"], optimizer=replace(models["dcnv2_din"].optimizer, embedding_lr=0.5)
    )
    changed = plan_for(settings, days[4], models=models)
    before = preset_models("tiny")["dcnv2_din"].optimizer.embedding_lr
    assert changed.warm_start_ds is None
    assert f"dcnv2_din optimizer: embedding_lr = {before}, now 0.5" in changed.decision
    wider = replace(SCHEMA, features=(*SCHEMA.features, Feature("extra", "context", "hashed", "extra", hash_size=3)))
    told = (
        f"fresh weights for every model, as the training of {days[3]} had another feature schema: feature extra is new"
    )
    assert plan_for(settings, days[4], schema=wider).decision.startswith(told)


def test_fields_of_a_model_come_from_the_settings_and_break_the_chain():
    plain = configured_models(TrainingSettings(preset="tiny"))
    given = {"onetrans": 'relative_bias = true, position = "none", dense_lr = 0.5', "dcnv2_din": "mlp_hidden = [16, 8]"}
    found = configured_models(TrainingSettings(preset="tiny", dense_lr=0.1, **given))
    config, optimizer = found["onetrans"].config, found["onetrans"].optimizer
    assert (config.relative_bias, config.position, optimizer.dense_lr) == (True, "none", 0.5)
    assert found["dcnv2_din"].config == replace(plain["dcnv2_din"].config, mlp_hidden=(16, 8))
    assert found["dcnv2_din"].optimizer.dense_lr == 0.1
    assert found["onetrans"].decides() != plain["onetrans"].decides()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "position = none",
            r"training.onetrans = 'position = none' is not a list of fields such as: .*texts are quoted",
        ),
        ("spiral = 3", r"training.onetrans = 'spiral = 3': there is no field 'spiral'; fields are admit_after, "),
        (
            "dropout = 2.0",
            r"training.onetrans = 'dropout = 2.0': onetrans.dropout = 2.0 must be at least 0 and below 1",
        ),
        ("dense_lr = true", r"dense_lr must be of the type of 0.002"),
        ("dense_lr = -1", r"optimizer.dense_lr = -1 must be above 0"),
        ("model = 'dcnv2_din'", r"there is no field 'model'"),
    ],
)
def test_a_wrong_field_of_a_model_is_named(text: str, told: str):
    with pytest.raises(BadConfigError, match=told):
        configured_models(TrainingSettings(preset="tiny", onetrans=text))


def test_a_schema_whose_tables_only_grew_is_gone_on_from_and_named(settings, days):
    finish(plan_for(settings, days[3]))
    plan = plan_for(settings, days[4], schema=small_schema(hash_size=194))
    assert plan.warm_start_ds == days[3]
    assert plan.decision == (
        f"goes on from the training of {days[3]}, whose table user grows from 98 to 195 rows, "
        "table item grows from 98 to 195 rows, and reads 2024-02-29"
    )


def test_a_training_older_than_the_look_back_window_is_left_aside(settings, days):
    finish(plan_for(settings, days[1]))
    assert plan_for(settings, days[4]).warm_start_ds == days[1]
    assert plan_for(settings, days[5]).warm_start_ds is None


def test_from_scratch_leaves_earlier_trainings_aside(settings, days):
    finish(plan_for(settings, days[3]))
    plan = plan_for(settings, days[4], from_scratch=True)
    assert plan.warm_start_ds is None
    assert plan.decision.startswith("fresh weights, as asked")
    assert plan.plan_id != plan_for(settings, days[4]).plan_id


@pytest.mark.parametrize(
    ("published", "wanted", "missing"),
    [
        ([0, 1, 2, 3], 4, "2024-03-01"),  # the day to evaluate on
        ([0, 1, 2, 4], 4, "2024-02-29"),  # the day before it
        ([0, 1, 3, 4], 4, "2024-02-28"),  # a hole in the window
        ([5], 4, "2024-02-29..2024-03-01"),  # nothing earlier, and not the day itself
    ],
)
def test_a_day_that_is_not_published_is_named(own, published, wanted, missing):
    for offset in published:
        publish_day(Lake(own.lake), FIRST_DAY + timedelta(days=offset), SCHEMA, WORLD)
    with pytest.raises(NotReadyError, match=f"has no published {missing}, needed to train for 2024-03-01"):
        plan_for(own, FIRST_DAY + timedelta(days=wanted))


def test_the_first_day_of_a_log_is_refused_at_once_with_the_day_to_begin_with(own):
    """Waiting brings no earlier day, and source.absent_days no rows to train on."""
    publish_day(Lake(own.lake), FIRST_DAY, SCHEMA, WORLD)
    told = f"{FIRST_DAY} is the first published day .*; there is nothing to train on: begin with 2024-02-27$"
    with pytest.raises(BadConfigError, match=told):
        plan_for(own, FIRST_DAY)
    with pytest.raises(BadConfigError, match=told):
        plan_for(own, FIRST_DAY, from_scratch=True)


def test_an_empty_lake_is_not_ready(own):
    with pytest.raises(NotReadyError, match="training_requests has no published day"):
        plan_for(own, FIRST_DAY)


def test_a_hole_in_a_continued_chain_is_named(own):
    days = publish_days(Lake(own.lake), 6, SCHEMA, WORLD)
    finish(plan_for(own, days[5]))
    publish_day(Lake(own.lake), days[5] + timedelta(days=2), SCHEMA, WORLD)
    with pytest.raises(NotReadyError, match="has no published 2024-03-03"):
        plan_for(own, days[5] + timedelta(days=2))


def test_days_the_log_lost_are_trained_without(own):
    lake, days = Lake(own.lake), [FIRST_DAY + timedelta(days=n) for n in range(6)]
    for ds in (days[0], days[1], days[3]):
        publish_day(lake, ds, SCHEMA, WORLD)
    lost = replace(own, source=replace(own.source, absent_days=(days[2], days[4])))
    plan = plan_for(lost, days[3])
    assert list(plan.train_days) == days[:2]
    assert plan.decision.endswith("reads 2024-02-26..2024-02-27, without 2024-02-28, which source.absent_days names")
    finish(plan)
    publish_day(lake, days[5], SCHEMA, WORLD)
    later = plan_for(lost, days[5])
    assert (later.warm_start_ds, list(later.train_days)) == (days[3], [days[3]])
    assert later.decision == (
        "goes on from the training of 2024-02-29 and reads 2024-02-29, without 2024-03-01, which source.absent_days "
        "names"
    )
    assert list(plan_for(lost, days[5], from_scratch=True).train_days) == [days[3]], "three days back, two of them lost"
    with pytest.raises(BadConfigError, match=r"2024-03-01 is named in source.absent_days"):
        plan_for(lost, days[4])
    narrow = replace(lost, training=replace(lost.training, lookback_days=1))
    with pytest.raises(BadConfigError, match="so there is nothing to train on"):
        plan_for(narrow, days[5], from_scratch=True)


def test_a_lost_day_that_came_after_all_is_trained_on(own):
    days = publish_days(Lake(own.lake), 4, SCHEMA, WORLD)
    named = replace(own, source=replace(own.source, absent_days=(days[2],)))
    assert list(plan_for(named, days[3]).train_days) == days[:3]


def test_a_plan_that_is_not_there_or_of_another_version_is_refused(settings, days, tmp_path):
    with pytest.raises(BadConfigError, match="there is no plan at"):
        Plan.load(str(tmp_path / "nowhere"))
    plan = plan_for(settings, days[5])
    data = plan.to_dict()
    del data["recipe"]
    storage.write_json(storage.join(plan.path, "plan.json"), data)
    with pytest.raises(BadConfigError, match=r"written by another version of onetrans \('recipe'\)"):
        Plan.load(plan.path)


@pytest.mark.parametrize("given", [{"ds": FIRST_DAY}, {"config": "base"}, {"from_scratch": True}])
def test_a_plan_is_named_or_decided_and_tracked_only_if_that_is_wanted(settings, days, given):
    plan = replace(plan_for(settings, days[5]), mlflow_run_id="opened by another command").save()
    none = {"plan": plan.path, "ds": None, "config": None, "from_scratch": False, "no_mlflow": False}
    assert plan_of(argparse.Namespace(**none), settings) == plan
    assert plan_of(argparse.Namespace(**none | {"no_mlflow": True}), settings) == replace(plan, mlflow_run_id="")
    option = f"--{next(iter(given)).replace('_', '-')}"
    with pytest.raises(BadConfigError, match=f"--plan names a plan that is made, {option} decides another"):
        plan_of(argparse.Namespace(**none | given), settings)


def test_the_command_prints_the_folder_and_exits_75_when_not_ready(
    settings, days, tmp_path, monkeypatch, capsys, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SAID_AFTER_S", 0.0)
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ONETRANS_SOURCE_SCHEMA", str(write_schema(tmp_path / "schema.toml", SCHEMA)))
    assert cli(["plan", "--ds", str(days[5]), "--no-mlflow"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == plan_for(settings, days[5]).path
    assert any(text.startswith(f"planning {days[5]}: done in ") for text in caplog.messages)
    assert json.loads(storage.read_bytes(f"{printed}/plan.json"))["schema"] == SCHEMA.to_dict()
    assert cli(["plan", "--ds", "2024-05-01", "--no-mlflow"]) == EXIT_NOT_READY
    assert "no published 2024-04-28..2024-05-01" in capsys.readouterr().err


def test_the_revision_is_a_git_commit_or_says_unknown():
    revision = git_revision().removesuffix("+changes")
    assert revision == "unknown" or (len(revision) == 40 and int(revision, 16) >= 0)


def test_learning_rates_of_the_settings_are_those_of_both_models(own):
    settings = replace(own, training=replace(own.training, dense_lr=0.0005, embedding_lr=0.01))
    models = configured_models(settings.training)
    assert [(m.optimizer.dense_lr, m.optimizer.embedding_lr) for m in models.values()] == [(0.0005, 0.01)] * 2
    kept = configured_models(own.training)
    assert {name: model.optimizer for name, model in kept.items()} == {
        name: model.optimizer for name, model in preset_models(own.training.preset).items()
    }
