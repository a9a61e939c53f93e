"""Nightly scoring: the champion's scores of each user's candidates, audited, published, and gone on with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from served import register, save

from jobs import behavior_sequences, behaviors, impressions, item_features, score_candidates, user_features
from jobs.runner import audit_and_publish
from jobs.score_candidates import candidates_of, model_files, requests_of
from jobs.workspace import Workspace
from onetrans import storage
from onetrans.artifact import load_model
from onetrans.errors import EXIT_BAD_DATA, BadConfigError, BadDataError, NotReadyError
from onetrans.registry import Registry
from onetrans.requests import from_rows, score
from onetrans.schema import Feature, FeatureSchema, Sequence
from onetrans.serving.source import ModelSource
from onetrans.settings import MlflowSettings, ScoringSettings
from tests.raw_log import open_workspace, publish, with_schema, write_rows

DS = date(2024, 2, 29)
NOON = datetime(DS.year, DS.month, DS.day, 12, tzinfo=UTC)
SCHEMA = FeatureSchema(
    name="nightly",
    features=(
        Feature("user", "user", "hashed", "user_id", hash_size=50),
        Feature("hour", "context", "hashed", "hour_of_day", hash_size=24),
        Feature("item", "item", "hashed", "item_id", hash_size=50),
        Feature("item_ctr", "item", "bucketized", "item_ctr_7d", boundaries=(0.1, 0.4)),
        Feature("event_item", "event", "hashed", "item_id", hash_size=50, embedding="item"),
    ),
    sequences=(Sequence("click", "click", max_length=3),),
)
TABLES = (impressions, behaviors, user_features, item_features, behavior_sequences)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("models") for _ in range(2)]
    for seed, folder in enumerate(folders):
        save(folder, seed, SCHEMA)
    return folders


@pytest.fixture(scope="module")
def work(spark: SparkSession, models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("nightly")
    shown = [
        {"request_id": f"r{n}", "user_id": f"u{n}", "item_id": f"i{n}", "ts": NOON, "click": 1, "conversion": 0}
        for n in range(12)
    ]
    happened = [
        {"user_id": f"u{n % 9}", "item_id": f"i{n}", "type": "click", "ts": NOON - timedelta(minutes=n + 1)}
        for n in range(20)
    ]
    write_rows(folder / "raw" / "impressions" / f"ds={DS}", shown)
    write_rows(folder / "raw" / "behaviors" / f"ds={DS}", happened)
    write_rows(folder / "raw" / "users", [{"user_id": f"u{n}"} for n in range(12)])
    write_rows(folder / "raw" / "items", [{"item_id": f"i{n}"} for n in range(20)])
    opened = open_workspace(spark, folder, SCHEMA)
    mlflow = MlflowSettings(tracking_uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "artifacts"))
    scoring = ScoringSettings(candidates="popular", popular_items=7, parts=3)
    opened = replace(opened, settings=replace(opened.settings, mlflow=mlflow, scoring=scoring))
    for job in TABLES:
        publish(opened, job, DS)
    with pytest.raises(NotReadyError, match="has no alias 'champion' yet"):
        score_candidates.build(opened, DS)
    register(opened.settings, models[0])
    return opened


def _scores(work: Workspace) -> dict[tuple[str, str], dict]:
    return {(row["user_id"], row["item_id"]): row for row in work.lake.read("candidate_scores", [DS]).to_pylist()}


def _published(work: Workspace) -> dict[tuple[str, str], dict]:
    score_candidates.build(work, DS)
    audit_and_publish(work, "candidate_scores", DS)
    return _scores(work)


def test_each_user_gets_the_champions_scores_and_a_finished_day_is_left_alone(
    work: Workspace, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first attempt dies in its second part; the next one goes on with that.
    written: list[str] = []

    def dies(frame, path):
        if len(written) == 1:
            raise OSError("the disk is full")
        written.append(path)
        score_candidates_write(frame, path)

    score_candidates_write = score_candidates.write
    monkeypatch.setattr(score_candidates, "write", dies)
    with pytest.raises(OSError, match="full"):
        score_candidates.build(work, DS)
    first_part = storage.list_files(written[0], ".parquet")
    assert first_part
    monkeypatch.setattr(score_candidates, "write", score_candidates_write)
    staged = score_candidates.build(work, DS)
    assert storage.list_files(written[0], ".parquet") == first_part, "a part that was finished is not made again"
    audit_and_publish(work, "candidate_scores", DS)

    found = _scores(work)
    assert len(found) == staged.rows == 12 * 7
    assert {row["model_version"] for row in found.values()} == {"1"}
    for user in {user for user, _ in found}:
        own = sorted((row for (u, _), row in found.items() if u == user), key=lambda row: row["rank"])
        assert [row["rank"] for row in own] == list(range(1, 8))
        assert [row["ctcvr"] for row in own] == sorted((row["ctcvr"] for row in own), reverse=True)

    requests = from_rows(requests_of(work, DS, candidates_of(work, DS)).toArrow(), SCHEMA)
    midnight = int((NOON + timedelta(hours=12)).timestamp()) * 1_000_000
    assert {request["ts"] for request in requests} == {midnight}
    assert sum(len(request["sequences"]["click"]) for request in requests) == 20, "the day's own events are known"
    expected = score(load_model(str(models[0] / "model"))[0], requests).to_pylist()
    for row in expected:
        scored = found[(row["request_id"], row["item_id"])]
        assert scored["ctr"] == pytest.approx(row["ctr"], abs=1e-5)
        assert scored["ctcvr"] == pytest.approx(row["ctr"] * row["cvr"], abs=1e-5)

    monkeypatch.setattr(score_candidates, "write", dies)
    assert score_candidates.build(work, DS).path == staged.path, "nothing is written again"
    monkeypatch.setattr(score_candidates, "write", score_candidates_write)
    assert register(work.settings, models[1]) == "2"
    score_candidates.build(work, DS)
    audit_and_publish(work, "candidate_scores", DS)
    again = _scores(work)
    assert again.keys() == found.keys()
    assert {row["model_version"] for row in again.values()} == {"2"}
    assert any(abs(again[key]["ctr"] - found[key]["ctr"]) > 1e-3 for key in found)


def test_a_folder_says_whom_to_score_for_what(work: Workspace, tmp_path: Path) -> None:
    scoring = replace(work.settings.scoring, candidates=str(tmp_path))
    given = replace(work, settings=replace(work.settings, scoring=scoring))
    with pytest.raises(NotReadyError, match="there are no candidates to score for 2024-02-29"):
        score_candidates.build(given, DS)
    folder = tmp_path / f"ds={DS}"
    folder.mkdir()
    pq.write_table(pa.table({"user": ["u1"], "item_id": ["i1"]}), folder / "a.parquet")
    with pytest.raises(BadDataError, match="has no column user_id; it has user, item_id"):
        score_candidates.build(given, DS)
    pairs = {"user_id": ["u1", "u1", "new", "u1"], "item_id": ["i1", "i2", "i1", "i1"]}
    pq.write_table(pa.table(pairs), folder / "a.parquet")
    score_candidates.build(given, DS)
    audit_and_publish(given, "candidate_scores", DS)
    assert set(_scores(given)) == {("u1", "i1"), ("u1", "i2"), ("new", "i1")}
    pq.write_table(pa.table({"user_id": ["u1", None], "item_id": ["i1", "i2"]}), folder / "a.parquet")
    with pytest.raises(BadDataError, match="1 rows have no user_id or item_id"):
        score_candidates.build(given, DS)


def test_a_rollback_takes_effect_also_over_a_schema_that_has_grown(work: Workspace) -> None:
    before = _published(work)
    shown = Feature("shown", "item", "bucketized", "item_impressions_7d", boundaries=(1.0, 5.0))
    grown = replace(SCHEMA, features=(*SCHEMA.features, shown), sequences=(Sequence("click", "click", max_length=4),))
    later = with_schema(work, grown)
    for job in TABLES:
        publish(later, job, DS)
    assert _published(later) == before, "the champion reads what it knows, and as many events as it was trained on"

    registry = Registry(work.settings.mlflow)
    left, now = registry.roll_back("conversions fell")
    rolled_back = _published(later)
    assert {row["model_version"] for row in rolled_back.values()} == {str(now.version)} != {str(left.version)}
    assert rolled_back.keys() == before.keys()
    assert any(abs(rolled_back[key]["ctr"] - before[key]["ctr"]) > 1e-3 for key in before)
    registry.promote_by_hand(str(left.version), "it was not the model")
    assert _published(later) == before
    for job in TABLES:
        publish(work, job, DS)


@pytest.mark.parametrize("damage", ["gone", "cut", "no JSON", "of another format", "no folder"])
def test_a_damaged_champion_is_told_and_not_tried_again(models: list[Path], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[0] / "model", folder)
    source = ModelSource("models:/x@champion", "7", str(folder), None, "")
    assert model_files(source).keys() == {file.name for file in folder.iterdir()}
    weights, header = next(folder.glob("*.safetensors")), folder / "model.json"
    if damage == "gone":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no JSON":
        header.write_bytes(header.read_bytes()[:-9])
    elif damage == "of another format":
        header.write_text('{"format": 0}')
    else:
        shutil.rmtree(folder)
    with pytest.raises(BadDataError, match=r"the champion, version 7, cannot be loaded: .*registry rollback") as told:
        model_files(source)
    assert told.value.exit_code == EXIT_BAD_DATA, "which Airflow does not retry"


def test_a_champion_that_reads_what_the_log_no_longer_has_scores_nothing(work: Workspace) -> None:
    shorter = replace(SCHEMA, sequences=(Sequence("click", "click", max_length=2),))
    with pytest.raises(
        BadConfigError, match=r"version \d, reads .* no longer has as it was: sequence click \(the last 3"
    ):
        score_candidates.build(with_schema(work, shorter), DS)
    renamed = [replace(f, column="item_cvr_7d") if f.name == "item_ctr" else f for f in SCHEMA.features]
    with pytest.raises(BadConfigError, match=r"feature item_ctr\. Train and promote"):
        score_candidates.build(with_schema(work, replace(SCHEMA, features=tuple(renamed))), DS)
