"""Retention: what is old and held by nobody goes; the champion's data and what a run reads stays, however old."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tracked_days import Shop
from worlds import World, publish_day, publish_days, settings_in, small_schema

from onetrans import storage
from onetrans.cli import main as cli
from onetrans.errors import EXIT_OK, BadConfigError
from onetrans.lake import QUARANTINE, SCORES, Lake, Staged
from onetrans.plan import Plan, make_plan
from onetrans.registry import CHAMPION, Registry, promote
from onetrans.retention import Removal, held_by_plans, retain
from onetrans.settings import RetentionSettings, Settings, TrainingSettings, as_environment

D1, D2 = date(2024, 2, 28), date(2024, 2, 29)
TABLE = "impressions"
SCHEMA = small_schema()
WORLD = World(requests=6)
NOW = datetime.now(UTC)
SOON = NOW + timedelta(days=8)
LATER = NOW + timedelta(days=100)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def lake(settings: Settings) -> Lake:
    return Lake(settings.lake)


def write(lake: Lake, ds: date, count: int, table: str = TABLE) -> str:
    folder = storage.local_path(lake.new_stage_path(table, ds))
    folder.mkdir(parents=True)
    names = {"table_name": pa.array(["impressions"] * count)} if table == QUARANTINE else {}
    pq.write_table(pa.table({"ds": pa.array([ds] * count), "id": range(count), **names}), folder / "part-0.parquet")
    return f"file://{folder}"


def publish(lake: Lake, ds: date, count: int) -> str:
    path = write(lake, ds, count)
    lake.write_verdict(lake.mark_staged(Staged(TABLE, ds, path, count)), {"passed": True})
    lake.publish(TABLE, ds)
    return path


def there(path: str) -> bool:
    return storage.local_path(path).exists()


def of_kind(removed: list[Removal], kind: str) -> list[str]:
    return [removal.what for removal in removed if removal.kind == kind]


def state(lake: Lake) -> Any:
    return sorted(map(repr, lake.read(TABLE).to_pylist()))


# Tables


def test_a_replaced_version_goes_when_it_was_replaced_long_ago(settings: Settings, lake: Lake) -> None:
    old, kept = publish(lake, D1, 5), publish(lake, D2, 3)
    old_snapshot = lake.snapshot_id(TABLE)
    new = publish(lake, D1, 7)
    before = state(lake)
    assert retain(settings, SOON) == [], "replaced a week ago"
    assert lake.read(TABLE, snapshot_id=old_snapshot).num_rows == 8

    listed = retain(settings, LATER, dry_run=True)
    assert there(old)
    assert lake.read(TABLE, snapshot_id=old_snapshot).num_rows == 8
    removed = retain(settings, LATER)
    assert removed == listed, "a dry run says just what is removed"
    assert of_kind(removed, "data") == [old]
    assert str(old_snapshot) in of_kind(removed, "snapshot")
    assert of_kind(removed, "metadata")
    assert all(not there(path) for kind in ("data", "metadata") for path in of_kind(removed, kind))
    assert (there(new), there(kept)) == (True, True)
    assert state(Lake(settings.lake)) == before
    assert [snapshot.snapshot_id for snapshot in lake.table(TABLE).snapshots()] == [lake.snapshot_id(TABLE)]
    assert retain(settings, LATER) == [], "nothing is left to remove"
    publish(lake, D1, 2)
    assert {day.ds: day.rows for day in lake.published(TABLE)} == {D1: 2, D2: 3}


def test_the_age_of_a_version_counts_from_its_replacement(settings: Settings, lake: Lake) -> None:
    """A version of long ago that was current until now may be under a reader's eyes."""
    old = publish(lake, D1, 5)
    old_snapshot = lake.snapshot_id(TABLE)
    for file in Path(old.removeprefix("file://")).iterdir():
        os.utime(file, (0, 0))
    publish(lake, D1, 7)
    table = lake.table(TABLE)
    log = [(entry.timestamp_ms, entry.snapshot_id) for entry in table.metadata.snapshot_log]
    at, _ = log[[snapshot for _, snapshot in log].index(old_snapshot) + 1]
    replaced = datetime.fromtimestamp(at / 1000, UTC)
    assert old not in of_kind(retain(settings, replaced + timedelta(days=30)), "data")
    assert lake.read(TABLE, snapshot_id=old_snapshot).num_rows == 5
    assert of_kind(retain(settings, replaced + timedelta(days=30, seconds=1)), "data") == [old]


def test_attempts_that_were_never_published_go(settings: Settings, lake: Lake) -> None:
    published = publish(lake, D1, 5)
    killed = write(lake, D1, 6)  # a job that was killed before its manifest
    refused = write(lake, D2, 6)
    lake.write_verdict(lake.mark_staged(Staged(TABLE, D2, refused, 6)), {"passed": False})
    stray = write(lake, D1, 2, QUARANTINE)
    assert retain(settings, NOW + timedelta(days=2)) == [], "a job may still be writing"
    removed = retain(settings, SOON)
    assert of_kind(removed, "data") == [killed, stray]
    assert there(published)
    assert there(refused), "the latest attempt of a day is kept: it can be looked at, or audited again"


def test_what_was_published_under_another_address_of_the_warehouse_stays(
    settings: Settings, lake: Lake, tmp_path: Path
) -> None:
    """A link to the folder, or s3a:// in place of s3://: the files are the same, and are still named."""
    old, published = publish(lake, D1, 5), publish(lake, D1, 7)
    staged = write(lake, D2, 6)
    lake.mark_staged(Staged(TABLE, D2, staged, 6))
    link = tmp_path / "release"
    link.symlink_to(storage.local_path(lake.warehouse).parent)
    warehouse = str(link / storage.local_path(lake.warehouse).name)
    moved = replace(settings, lake=replace(settings.lake, warehouse=warehouse))
    assert Lake(moved.lake).read(TABLE).num_rows == 7
    removed = of_kind(retain(moved, LATER), "data")
    assert [path.rsplit("/", 1)[1] for path in removed] == [old.rsplit("/", 1)[1]]
    assert (there(published), there(staged)) == (True, True)


def test_a_table_of_quarantined_rows_is_kept_like_the_others(settings: Settings, lake: Lake) -> None:
    for count in (3, 4):
        lake.replace_partition(
            QUARANTINE,
            {"ds": D1, "table_name": "impressions"},
            storage.list_files(write(lake, D1, count, QUARANTINE), ".parquet"),
        )
    removed = retain(settings, LATER)
    assert len(of_kind(removed, "data")) == 1
    assert lake.read(QUARANTINE).num_rows == 4


def publish_scores(lake: Lake, ds: date, parts: int = 2) -> str:
    """Publish a day of scores as their job leaves it: the files of each part in a folder below that of the attempt."""
    folder = storage.local_path(lake.new_stage_path(SCORES, ds))
    for part in range(parts):
        (folder / f"part-{part}-of-{parts}").mkdir(parents=True)
        pq.write_table(pa.table({"ds": [ds], "rank": [part]}), folder / f"part-{part}-of-{parts}" / "part-0.parquet")
        (folder / f"_part-{part}-of-{parts}.json").write_text("{}")
    lake.write_verdict(lake.mark_staged(Staged(SCORES, ds, f"file://{folder}", parts)), {"passed": True})
    lake.publish(SCORES, ds)
    return f"file://{folder}"


def test_scores_are_kept_while_published_and_go_when_replaced(settings: Settings, lake: Lake) -> None:
    replaced, current = publish_scores(lake, D1), publish_scores(lake, D1)
    # Published, but not the day's latest attempt: only what is published names these files.
    published = publish_scores(lake, D2)
    killed = storage.local_path(lake.new_stage_path(SCORES, D2))
    shutil.copytree(storage.local_path(published), killed)
    lake.mark_staged(Staged(SCORES, D2, f"file://{killed}", 2))
    removed = retain(settings, LATER)
    assert {removal.table for removal in removed} == {SCORES}
    assert of_kind(removed, "data") == [replaced]
    assert not there(replaced)
    assert (there(current), there(published)) == (True, True)
    assert Lake(settings.lake).read(SCORES).num_rows == 4
    assert retain(settings, LATER) == []


def test_without_a_lake_nothing_is_made(settings: Settings) -> None:
    assert retain(settings, LATER) == []
    assert not there(settings.lake.warehouse)


# Readers


def touch(folder: str, at: datetime) -> None:
    for path in Path(folder.removeprefix("file://")).rglob("*"):
        os.utime(path, (at.timestamp(), at.timestamp()))


def planned(settings: Settings) -> Plan:
    """Plan a day, then replace all that the plan reads."""
    lake = Lake(settings.lake)
    days = publish_days(lake, 4, SCHEMA, WORLD)
    plan = make_plan(settings, days[-1], SCHEMA, track=False)
    for ds in days:
        publish_day(lake, ds, SCHEMA, replace(WORLD, seed=1))
    files = {*plan.train_files, *plan.evaluation_files}
    assert files.isdisjoint(lake.files("training_requests", days))
    return plan


def readable(settings: Settings, plan: Plan) -> bool:
    files = [*plan.train_files, *plan.evaluation_files]
    if not all(there(file) for file in files):
        return False
    days = [*plan.train_days, plan.ds]
    assert Lake(settings.lake).files("training_requests", days, plan.snapshot_id) == files
    return True


def test_what_a_run_is_reading_stays(settings: Settings) -> None:
    plan = planned(settings)
    touch(plan.path, LATER - timedelta(days=6))  # its training writes a checkpoint now and then
    retain(settings, LATER)
    assert readable(settings, plan)
    removed = retain(settings, LATER + timedelta(days=2))
    assert not readable(settings, plan), "nothing was written for longer than a run takes: it has ended"
    files = (*plan.train_files, *plan.evaluation_files)
    assert {file.rsplit("/", 1)[0] for file in files} <= set(of_kind(removed, "data"))


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Plan]:
    """A champion all of whose training data were replaced since."""
    shop = Shop.open(tmp_path_factory.mktemp("champion"), days=5)
    plan = shop.candidate(shop.days[-1])
    assert promote(shop.settings, plan)["decision"] == "promoted"
    for ds in shop.days:
        publish_day(Lake(shop.settings.lake), ds, plan.schema, replace(WORLD, seed=1))
    return shop.settings, plan


def test_what_the_champion_was_trained_on_stays(promoted: tuple[Settings, Plan]) -> None:
    settings, plan = promoted
    assert f"champion (version {promoted_version(settings)})" in held_by_plans(settings, LATER).snapshots.values()
    retain(settings, LATER)
    assert readable(settings, plan)


def test_so_does_what_it_went_on_from(promoted: tuple[Settings, Plan], tmp_path: Path) -> None:
    """The training before it read days that the champion's own plan does not name."""
    settings, plan = promoted
    earlier = replace(plan, plan_id="0" * 12, path=storage.join(plan.path.rsplit("/", 2)[0], "ds=2024-01-01", "0" * 12))
    earlier = replace(earlier, train_files=("file:///lake/ds=2023-12-31/a/part-0.parquet",), snapshot_id=17).save()
    warm = {name: replace(model, warm_start=earlier.model_path(name)) for name, model in plan.models.items()}
    replace(plan, models=warm).save()
    try:
        held = held_by_plans(settings, LATER)
        assert 17 in held.snapshots
        assert "file:///lake/ds=2023-12-31/a" in held.folders
        assert earlier.path in held.checkpoints
        shutil.rmtree(storage.local_path(earlier.path))
        with pytest.raises(BadConfigError, match=r"went on from the training in .*what it was trained on is not known"):
            retain(settings, LATER)
    finally:
        plan.save()


def test_a_champion_nobody_knows_the_plan_of_stops_it_all(promoted: tuple[Settings, Plan], tmp_path: Path) -> None:
    settings, _ = promoted
    elsewhere = replace(settings, training=replace(settings.training, runs=str(tmp_path / "other runs")))
    before = sorted(Path(settings.lake.warehouse).rglob("*"))
    with pytest.raises(BadConfigError, match=r"champion \(version 1\) was trained by the plan in .*nothing is removed"):
        retain(elsewhere, LATER)
    assert sorted(Path(settings.lake.warehouse).rglob("*")) == before


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tracking_uri": "sqlite:///elsewhere/mlflow.db"}, r"MLflow's store .*/elsewhere/mlflow\.db is not there"),
        ({"registered_model": "typo"}, r"has no registered model 'typo' \(mlflow\.registered_model\)"),
    ],
    ids=["another store", "another model"],
)
def test_a_registry_that_is_not_found_stops_it_all(
    promoted: tuple[Settings, Plan], changed: dict[str, str], told: str
) -> None:
    """A lost variable, another folder or a typo must not read like a deployment without a champion."""
    settings, plan = promoted
    elsewhere = replace(settings, mlflow=replace(settings.mlflow, **changed))
    before = sorted(Path(settings.lake.warehouse).rglob("*"))
    with pytest.raises(BadConfigError, match=rf"{told}.*1 plans were .*{plan.plan_id}.*nothing is removed"):
        retain(elsewhere, LATER)
    assert sorted(Path(settings.lake.warehouse).rglob("*")) == before
    assert readable(settings, plan)
    assert not Path("elsewhere").exists(), "looking for a store makes none"


def test_before_the_first_verdict_no_model_is_missed(tmp_path: Path) -> None:
    """The store is made with the first plan, the registered model with the first verdict."""
    shop = Shop.open(tmp_path, days=3)
    assert of_kind(retain(shop.settings, LATER), "data") == [], "nothing was ever planned, and there is no store"
    plan = shop.plan(shop.days[-1])
    assert plan.mlflow_run_id
    retain(shop.settings, LATER)
    assert readable(shop.settings, plan)


def test_without_its_aliases_its_data_goes(promoted: tuple[Settings, Plan]) -> None:
    """Runs last: what the tests before it protect is removed here, so they could have failed."""
    settings, plan = promoted
    registry = Registry(settings.mlflow)
    for alias in registry.aliases():
        registry.client.delete_registered_model_alias(registry.name, alias)
    retain(settings, LATER)
    assert not readable(settings, plan)


def promoted_version(settings: Settings) -> str:
    return Registry(settings.mlflow).aliases()[CHAMPION]


# Checkpoints


def checkpoint(settings: Settings, ds: date, plan: str = "a" * 12, model: str = "onetrans") -> str:
    folder = storage.join(storage.resolve(settings.training.runs), f"ds={ds}", plan, model, "checkpoint")
    storage.write_json(storage.join(folder, "checkpoint.json"), {})
    storage.write_bytes(storage.join(folder, "step-1.safetensors"), b"weights")
    storage.write_json(storage.join(folder.rsplit("/", 1)[0], "model", "config.json"), {})
    return folder


def test_checkpoints_of_long_ago_go_and_models_stay(settings: Settings, lake: Lake) -> None:
    publish(lake, D1, 1)
    days = [D2 - timedelta(days=back) for back in (0, 29, 30, 31, 200)]
    folders = [checkpoint(settings, ds) for ds in days]
    removed = retain(settings, NOW)
    assert of_kind(removed, "checkpoint") == sorted(folders[3:])
    assert [there(folder) for folder in folders] == [True, True, True, False, False]
    assert there(storage.join(folders[4].rsplit("/", 1)[0], "model", "config.json"))
    assert removed[0].bytes == len(b"weights") + len("{}\n")


def test_the_best_checkpoint_stays_however_old(settings: Settings, lake: Lake) -> None:
    publish(lake, D1, 1)
    aucs = {0: (0.7, 0.6), 100: (0.8, 0.5), 200: (0.75, 0.7), 300: (0.9, None)}
    folders = {}
    for back, (ctr, cvr) in aucs.items():
        folders[back] = checkpoint(settings, D2 - timedelta(days=back))
        run = folders[back].rsplit("/", 2)[0]
        storage.write_json(storage.join(run, "plan.json"), {"snapshot_id": 1, "models": {}})
        storage.write_json(storage.join(run, "metrics.json"), {"onetrans": {"ctr_auc": ctr, "cvr_auc": cvr}})
        touch(run, NOW - timedelta(days=30))
    assert of_kind(retain(settings, NOW), "checkpoint") == sorted([folders[100], folders[300]])
    assert there(folders[200])


def test_a_checkpoint_that_a_running_training_starts_from_stays(settings: Settings) -> None:
    plan = planned(settings)
    folders = {ds: checkpoint(settings, ds) for ds in (plan.ds, plan.ds - timedelta(days=300))}
    old = folders[plan.ds - timedelta(days=300)].rsplit("/", 1)[0]
    replace(plan, models={name: replace(model, warm_start=old) for name, model in plan.models.items()}).save()
    assert of_kind(retain(settings, NOW), "checkpoint") == []
    plan.save()
    assert len(of_kind(retain(settings, NOW), "checkpoint")) == 1


def test_checkpoints_are_kept_for_as_long_as_trainings_look_back(settings: Settings) -> None:
    short = replace(
        settings, retention=RetentionSettings(checkpoint_days=10), training=TrainingSettings(lookback_days=14)
    )
    with pytest.raises(BadConfigError, match=r"checkpoint_days = 10 is less than training\.lookback_days = 14"):
        retain(short, NOW)


# The command


def test_the_command_says_what_it_removed(
    settings: Settings, lake: Lake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    publish(lake, D1, 1)
    folder = checkpoint(settings, D1 - timedelta(days=40))
    checkpoint(settings, D1)
    assert cli(["retain", "--dry-run"]) == EXIT_OK
    listed, told = capsys.readouterr().out.splitlines()
    assert listed.startswith(f"checkpoint  onetrans             {folder}  (of 2024-01-19, before ")
    assert told == "would remove 1 checkpoints: 0.0 MB"
    assert there(folder)
    assert cli(["retain"]) == EXIT_OK
    assert capsys.readouterr().out == "removed 1 checkpoints: 0.0 MB\n"
    assert not there(folder)
    assert cli(["retain"]) == EXIT_OK
    assert capsys.readouterr().out == "nothing to remove\n"
