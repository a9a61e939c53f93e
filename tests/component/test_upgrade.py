"""Upgrades of real older databases: copies first, forward only, and what was published stays readable."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onetrans import cli, upgrade
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_OK, BadConfigError
from onetrans.lake import LAYOUT_PROPERTY, TABLE_PROPERTIES, Lake
from onetrans.settings import LakeSettings, MlflowSettings, Settings, as_environment
from tests import postgres

DS = date(2024, 2, 29)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", raising=False)
    monkeypatch.chdir(tmp_path)
    return replace(
        Settings(),
        lake=LakeSettings(str(tmp_path / "lake")),
        mlflow=MlflowSettings(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}"),
    )


@pytest.fixture
def old(settings: Settings, tmp_path: Path, mlflow_behind: Path) -> Settings:
    """A lake whose catalog an older PyIceberg made, with a table of an older layout, and MLflow one revision behind."""
    lake = Lake(settings.lake)
    folder = Path(lake.new_stage_path("impressions", DS).removeprefix("file://"))
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"ds": [DS], "request_id": ["r"]}), folder / "part.parquet")
    lake.replace_partition("impressions", {"ds": DS}, [f"file://{folder}/part.parquet"])
    with lake.table("impressions").transaction() as transaction:
        transaction.remove_properties(*TABLE_PROPERTIES)
    with closing(sqlite3.connect(lake.catalog_file)) as connection, connection:
        connection.execute("ALTER TABLE iceberg_tables DROP COLUMN iceberg_type")
    shutil.copyfile(mlflow_behind, tmp_path / "mlflow.db")
    return settings


@pytest.fixture(scope="module")
def mlflow_behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow as the release before the last migration left it."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    _make_mlflow_behind(f"sqlite:///{file}")
    return file


def _make_mlflow_behind(uri: str) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    Base.metadata.create_all(engine)  # the tables that MLflow's first migration begins with
    engine.dispose()
    configuration = _get_alembic_config(uri)
    script = ScriptDirectory.from_config(configuration)
    head = script.get_revision("head")
    assert head is not None
    command.upgrade(configuration, str(head.down_revision))


def _states(settings: Settings) -> dict[str, str]:
    return {part.name: part.state for part in upgrade.parts(settings, {})}


def test_what_is_older_is_copied_and_then_upgraded(old: Settings, tmp_path: Path) -> None:
    assert _states(old) == {"MLflow": "older", "Iceberg catalog": "older", "table impressions": "older"}
    with pytest.raises(BadConfigError, match="catalog, mlflow: name a new folder"):
        upgrade.upgrade(old, "", {})
    assert _states(old)["Iceberg catalog"] == "older"

    changed = upgrade.upgrade(old, str(tmp_path / "copies"), dict(os.environ))
    assert {part.name for part in changed} == {"MLflow", "Iceberg catalog", "table impressions"}
    assert set(_states(old).values()) == {"current"}
    lake = Lake(old.lake)
    assert lake.table("impressions").properties[LAYOUT_PROPERTY] == "1"
    assert lake.read("impressions").num_rows == 1
    assert upgrade.upgrade(old, "", dict(os.environ)) == []

    # The copies are of before, and lead back to all that was published.
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == ["catalog.db", "mlflow.db", "upgrade.json"]
    before = replace(
        old,
        lake=replace(old.lake, catalog_uri=f"sqlite:///{tmp_path / 'copies' / 'catalog.db'}"),
        mlflow=MlflowSettings(tracking_uri=f"sqlite:///{tmp_path / 'copies' / 'mlflow.db'}"),
    )
    assert _states(before) == {"MLflow": "older", "Iceberg catalog": "older", "table impressions": "older"}
    assert Lake(before.lake).read("impressions").num_rows == 1
    with pytest.raises(BadConfigError, match="is there already"):
        upgrade.copy_databases({"catalog": before.lake.catalog_uri}, str(tmp_path / "copies"))


def test_what_newer_code_wrote_is_left_alone(old: Settings, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'fromtomorrow'")
    with pytest.raises(BadConfigError, match=r"MLflow is at fromtomorrow.*Nothing was changed"):
        upgrade.upgrade(old, str(tmp_path / "copies"), {})
    assert not (tmp_path / "copies").exists()
    assert _states(old) == {"MLflow": "newer", "Iceberg catalog": "older", "table impressions": "older"}


def test_a_table_of_a_newer_layout_is_refused(old: Settings, tmp_path: Path) -> None:
    with Lake(old.lake).table("impressions").transaction() as transaction:
        transaction.set_properties({LAYOUT_PROPERTY: "2"})
    with pytest.raises(BadConfigError, match="table impressions is at layout 2, this code knows up to layout 1"):
        upgrade.upgrade(old, str(tmp_path / "copies"), {})


def test_an_empty_place_has_nothing_to_upgrade(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ONETRANS_SOURCE_KIND", "kuairand")
    assert _states(settings) == {"MLflow": "absent", "Iceberg catalog": "absent"}
    assert cli.main(["upgrade"]) == EXIT_OK
    assert "nothing to upgrade" in capsys.readouterr().out


def test_a_look_makes_no_catalog(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its address is given, nothing but the database tells whether there is one."""
    named = replace(settings, lake=replace(settings.lake, catalog_uri=f"sqlite:///{tmp_path / 'named.db'}"))
    for name, value in as_environment(named).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["upgrade", "--dry-run"]) == EXIT_OK
    assert "Iceberg catalog" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_what_it_needs(
    old: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in as_environment(old).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["upgrade", "--dry-run"]) == EXIT_OK
    shown = capsys.readouterr().out
    assert "Iceberg catalog" in shown
    assert "v0 -> v1" in shown
    assert cli.main(["upgrade"]) == EXIT_BAD_CONFIG
    assert "--backup" in capsys.readouterr().err


@pytest.mark.skipif(bool(postgres.why_missing()), reason=postgres.why_missing())
def test_a_database_of_postgresql_is_dumped(tmp_path: Path) -> None:
    with postgres.running() as server:
        address = server.create("lake")
        lake = Lake(
            LakeSettings(str(tmp_path / "lake"), catalog_uri=address.replace("postgresql", "postgresql+psycopg"))
        )
        assert lake.catalog.list_tables("ranking") == []
        upgrade.copy_databases({"catalog": address}, str(tmp_path / "copies"))
        assert (tmp_path / "copies" / "catalog.dump").stat().st_size > 1000
        with pytest.raises(upgrade.UpgradeFailedError, match="pg_dump"):
            upgrade.copy_databases({"catalog": server.address("absent")}, str(tmp_path / "more"))


@pytest.mark.skipif(bool(postgres.why_missing()), reason=postgres.why_missing())
def test_a_dump_gives_the_password_of_the_address(tmp_path: Path) -> None:
    """Kubernetes' secrets hold whole addresses; no message tells the password."""
    with postgres.running() as server:
        server.create("airflow")
        server.require_password("s3cret")
        address = server.address("airflow").replace("@", ":{}@", 1)
        upgrade.copy_databases({"airflow": address.format("s3cret")}, str(tmp_path / "copies"))
        assert (tmp_path / "copies" / "airflow.dump").stat().st_size > 0
        with pytest.raises(upgrade.UpgradeFailedError, match="password authentication failed") as raised:
            upgrade.copy_databases({"airflow": address.format("wr0ng")}, str(tmp_path / "more"))
        assert "wr0ng" not in str(raised.value)


@pytest.mark.nightly
@pytest.mark.skipif(bool(postgres.why_missing()), reason=postgres.why_missing())
def test_older_databases_of_postgresql_are_dumped_and_migrated(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow's is made by its own way back, which no deployment takes: it has no other means to an older schema."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    with postgres.running() as server:
        airflow, mlflow = (server.create(name).replace("postgresql", "postgresql+psycopg") for name in ("af", "ml"))
        monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", airflow)
        monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC", airflow)
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", mlflow)
        behind = replace(settings, mlflow=MlflowSettings(tracking_uri="http://127.0.0.1:1"))
        _make_mlflow_behind(mlflow)
        _airflow("db", "migrate")
        _airflow("variables", "set", "kept", "yes")
        _airflow("db", "downgrade", "--to-version", "3.2.0", "--yes")
        before = {part.name: part.state for part in upgrade.parts(behind)}
        assert before == {"Airflow": "older", "MLflow": "older", "Iceberg catalog": "absent"}

        upgrade.upgrade(behind, str(tmp_path / "copies"))
        assert {part.name: part.state for part in upgrade.parts(behind)} == {
            "Airflow": "current", "MLflow": "current", "Iceberg catalog": "absent"
        }  # fmt: skip
        assert _airflow("variables", "get", "kept").strip() == "yes"
        copies = {path.name for path in (tmp_path / "copies").iterdir()}
        assert copies == {"airflow.dump", "mlflow.dump", "upgrade.json"}
        # The dump leads back: restored elsewhere, it is as old as it was.
        server.restore(tmp_path / "copies" / "airflow.dump", "back")
        monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", server.address("back"))
        assert {part.state for part in upgrade.parts(behind) if part.name == "Airflow"} == {"older"}


def _airflow(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "airflow", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
