"""Upgrades: databases and tables brought to what this code expects, forward only, after a copy of what they hold.

Four things have a schema of their own: Airflow's database, MLflow's, the Iceberg
catalog and the tables in it.  First all are looked at, and if one was written by
newer code nothing is touched: there is no way back but the copy.  Then every
database that will change is copied, and only then changed.  A table's data files
and metadata are never changed but followed by new ones, so the catalog's copy
leads back to them until ``onetrans retain`` removes what was replaced.

What a change of the feature schema means is said by :mod:`onetrans.schema_change`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from sqlalchemy import create_engine, inspect, text
from sqlalchemy.engine import URL, make_url

from onetrans import __version__, storage
from onetrans.errors import BadConfigError, PipelineError
from onetrans.lake import LAYOUT, LAYOUT_PROPERTY, QUARANTINE, SCORES, TABLE_PROPERTIES, TABLES, Lake
from onetrans.progress import long_steps
from onetrans.settings import Settings

logger = logging.getLogger(__name__)

State = Literal["absent", "current", "older", "newer"]

_CATALOG_VERSION = "v1"
_RECORD = "upgrade.json"


class UpgradeFailedError(PipelineError):
    """A migration or a copy ended with an error; the text says which, and where the copies are."""


@dataclass(frozen=True)
class Part:
    """Something with a schema of its own."""

    name: str
    """What a person calls it."""
    state: State
    """How it stands to this code; ``absent`` is made on first use."""
    found: str
    """Version that is there."""
    wanted: str
    """Version of this code."""
    database: str = ""
    """Address of the database that holds it, without a password; empty: the catalog holds it."""


def parts(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[Part]:
    """Look at everything that can be upgraded from here.

    Airflow's database is looked at where ``AIRFLOW__DATABASE__SQL_ALCHEMY_CONN`` names it, MLflow's where
    ``mlflow.tracking_uri`` is a database or ``MLFLOW_BACKEND_STORE_URI`` names that of its server.
    """
    found = []
    if address := environ.get("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", ""):
        found.append(_by_alembic("Airflow", address, "airflow", "migrations"))
    if address := mlflow_database(settings, environ):
        found.append(_by_alembic("MLflow", address, "mlflow", "store", "db_migrations"))
    if settings.lake.catalog_type == "sql":
        found.append(catalog := _catalog(settings))
        if catalog.state == "absent":
            return found  # whoever opens it would make it
    return [*found, *_tables(settings)]


def mlflow_database(settings: Settings, environ: Mapping[str, str] = os.environ) -> str:
    """Return the address of MLflow's database; empty if only its server knows it."""
    uri = settings.mlflow.tracking_uri
    return environ.get("MLFLOW_BACKEND_STORE_URI", "") if uri.startswith(("http://", "https://")) else uri


def _by_alembic(name: str, address: str, package: str, *folders: str) -> Part:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadConfigError(f"{name}'s database is named, but the package {package} is not installed here")
    known, head = _revisions(Path(spec.submodule_search_locations[0], *folders, "versions"))
    found = _revision(address)
    state: State = "absent" if not found else "current" if found == head else "older" if found in known else "newer"
    return Part(name, state, found, head, _shown(address))


def _revisions(folder: Path) -> tuple[set[str], str]:
    """Return all revisions of a folder of Alembic's, and the last one; the files are read, not run."""
    known, before = set(), set()
    for file in folder.glob("*.py"):
        content = file.read_text(encoding="utf-8")
        if own := re.search(r"^revision(?:: str)?\s*=\s*[\"']([^\"']+)[\"']", content, re.M):
            known.add(own[1])
        if down := re.search(r"^down_revision(?:: [^=]+)?\s*=\s*(.+)$", content, re.M):
            before |= set(re.findall(r"[\"']([^\"']+)[\"']", down[1]))
    (head,) = known - before
    return known, head


def _revision(address: str) -> str:
    """Return the revision a database is at; empty if it has no schema yet."""
    if (file := storage.sqlite_file(address)) is not None and not file.exists():
        return ""
    engine = create_engine(_driver(address))
    try:
        if not inspect(engine).has_table("alembic_version"):
            return ""
        with engine.connect() as connection:
            return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar() or "")
    finally:
        engine.dispose()


def _catalog(settings: Settings) -> Part:
    address = Lake(settings.lake).catalog_address
    found = ""
    if (file := storage.sqlite_file(address)) is None or file.exists():
        engine = create_engine(_driver(address))
        try:
            looked = inspect(engine)
            if looked.has_table("iceberg_tables"):
                columns = {column["name"] for column in looked.get_columns("iceberg_tables")}
                found = _CATALOG_VERSION if "iceberg_type" in columns else "v0"
        finally:
            engine.dispose()
    state: State = "absent" if not found else "current" if found == _CATALOG_VERSION else "older"
    return Part("Iceberg catalog", state, found, _CATALOG_VERSION, _shown(address))


def _tables(settings: Settings) -> list[Part]:
    lake = Lake(settings.lake)
    if not lake.exists():
        return []
    listed = {name for _, name in lake.catalog.list_tables(settings.lake.namespace)}
    found = []
    for name in (*TABLES, SCORES, QUARANTINE):
        if name not in listed:
            continue
        properties = lake.table(name).properties
        layout = properties.get(LAYOUT_PROPERTY, "0")
        whole = all(properties.get(key) == value for key, value in TABLE_PROPERTIES.items())
        state: State = "newer" if int(layout) > LAYOUT else "current" if whole else "older"
        found.append(Part(f"table {name}", state, f"layout {layout}", f"layout {LAYOUT}"))
    return found


def upgrade(settings: Settings, backup: str, environ: Mapping[str, str] = os.environ) -> list[Part]:
    """Bring everything that is older to this code's version; return what was changed.

    Args:
        settings: of the deployment.
        backup: folder that does not exist yet, for the copies; may be empty if there is nothing to copy.
        environ: environment, as for :func:`parts`.

    Raises:
        BadConfigError: if something is newer than this code, a copy is needed and no folder is named, or it is there.
        UpgradeFailedError: if a copy or a migration fails.
    """
    found = parts(settings, environ)
    newer = [part for part in found if part.state == "newer"]
    if newer:
        told = "; ".join(f"{part.name} is at {part.found}, this code knows up to {part.wanted}" for part in newer)
        raise BadConfigError(
            f"{told}. Newer code wrote it, and there is no way back but a copy of it: install that code again, or "
            "restore the copy that was taken before. Nothing was changed"
        )
    changed = [part for part in found if part.state == "older" or (part.state == "absent" and part.name == "Airflow")]
    addresses = _to_copy(settings, changed, environ)
    if addresses:
        copy_databases(addresses, backup)
    for part in changed:
        logger.info("%s: from %s to %s", part.name, part.found or "nothing", part.wanted)
        with long_steps(None, f"{part.name}: migration"):
            _apply(settings, part, environ)
    if addresses:
        record = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": __version__}
        parts_changed = [asdict(part) for part in changed]
        Path(backup, _RECORD).write_text(json.dumps({**record, "changed": parts_changed}, indent=2), encoding="utf-8")
    return changed


def _to_copy(settings: Settings, changed: list[Part], environ: Mapping[str, str]) -> dict[str, str]:
    """Return name -> address of every database that holds something and will change."""
    every: dict[str, Callable[[], str]] = {
        "airflow": lambda: environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"],
        "mlflow": lambda: mlflow_database(settings, environ),
        "catalog": lambda: Lake(settings.lake).catalog_address,
    }
    names = {"Airflow": "airflow", "MLflow": "mlflow"}
    needed = {names.get(part.name, "catalog") for part in changed if part.state == "older"}
    if settings.lake.catalog_type != "sql":
        needed.discard("catalog")
    return {name: every[name]() for name in sorted(needed)}


def _apply(settings: Settings, part: Part, environ: Mapping[str, str]) -> None:
    if part.name == "Airflow":
        _run(part.name, [sys.executable, "-m", "airflow", "db", "migrate"], environ)
    elif part.name == "MLflow":
        _run(part.name, [sys.executable, "-m", "mlflow", "db", "upgrade", mlflow_database(settings, environ)], environ)
    elif part.name == "Iceberg catalog":
        Lake(settings.lake).migrate_catalog()
    else:
        table = Lake(settings.lake).table(part.name.removeprefix("table "))
        with table.transaction() as transaction:
            transaction.set_properties(dict(TABLE_PROPERTIES))


def _run(name: str, command: list[str], environ: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=dict(environ), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise UpgradeFailedError(f"{name}: its own migration ended with exit code {done.returncode}:\n{last}")


# Copies


def copy_databases(addresses: Mapping[str, str], folder: str) -> None:
    """Copy databases into a new folder: SQLite's by its own backup, PostgreSQL's by ``pg_dump``; each is checked.

    Raises:
        BadConfigError: if no folder is named, it is there already, or a database is of another kind.
        UpgradeFailedError: if a copy cannot be made or read.
    """
    if not folder:
        raise BadConfigError(
            f"this changes {', '.join(addresses)}: name a new folder for copies of them with --backup, on another disk "
            "if there is one"
        )
    place = Path(folder)
    if place.exists():
        raise BadConfigError(f"--backup {folder} is there already; each upgrade has copies of its own")
    place.mkdir(parents=True)
    for name, address in addresses.items():
        file = storage.sqlite_file(address)
        with long_steps(None, f"copying {_shown(address)}"):
            if file is not None:
                _copy_sqlite(file, place / f"{name}.db")
            elif address.startswith("postgresql"):
                _dump(address, place / f"{name}.dump")
            else:
                raise BadConfigError(f"{_shown(address)}: only SQLite and PostgreSQL can be copied from here")
        logger.info("copied %s to %s", _shown(address), place)


def _copy_sqlite(file: Path, copy: Path) -> None:
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        (said,) = target.execute("PRAGMA integrity_check").fetchone()
    if said != "ok":
        raise UpgradeFailedError(f"the copy of {file} is not whole: {said}; nothing was changed")


def _dump(address: str, copy: Path) -> None:
    for program in ("pg_dump", "pg_restore"):
        if shutil.which(program) is None:
            raise BadConfigError(f"{program} is not on PATH (Debian: postgresql-client), so no copy can be made")
    url = make_url(address)
    environment = {**os.environ, **({"PGPASSWORD": str(url.password)} if url.password else {})}
    # Not `url.set(password=None)`, which leaves the password: what is rendered then is "***", and libpq sends that.
    host, port, database = url.host, url.port, url.database
    plain = URL.create("postgresql", url.username, None, host, port, database, url.query).render_as_string()
    for command in (
        ["pg_dump", "--format=custom", f"--file={copy}", f"--dbname={plain}"],
        ["pg_restore", "--list", str(copy)],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UpgradeFailedError(f"{command[0]} of {plain}: {done.stderr.strip()[-500:]}; nothing was changed")


def _driver(address: str) -> str:
    """Return the address with the driver that is installed."""
    return re.sub(r"^postgres(?:ql)?(?:\+psycopg2)?://", "postgresql+psycopg://", address)


def _shown(address: str) -> str:
    file = storage.sqlite_file(address)
    return f"sqlite:///{file}" if file is not None else make_url(address).render_as_string(hide_password=True)
