"""Lets Airflow's processes share one SQLite file.  Airflow imports this module from its path by its name.

A backfill is created inside savepoints, which first read and then write.
SQLite begins such a transaction as a reader, and when another process commits
before the first write, it cannot become a writer and fails at once: no timeout
applies, and Airflow answers 503.  Taking the write lock before the savepoint
makes it wait its turn instead.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event

from infra.airflow.priority import task_instance_mutation_hook

__all__ = ["create_metadata_engine", "task_instance_mutation_hook"]  # Airflow takes over every name it finds

_BUSY_S = 120
"""Seconds a writer waits for another one; the default is 5.  Two busy cores were seen to exceed 30: the page that
asked for a run then answers 500 and makes none."""


def create_metadata_engine(
    sql_alchemy_conn: str, *, engine_args: dict[str, Any], connect_args: dict[str, Any]
) -> Engine:
    """Return Airflow's engine; this function replaces the one in ``airflow.settings``."""
    engine = create_engine(
        sql_alchemy_conn, connect_args={"timeout": _BUSY_S, **connect_args}, **engine_args, future=True
    )
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "savepoint", _take_write_lock)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")  # readers do not wait for the writer
    cursor.execute("PRAGMA synchronous = NORMAL")  # in this mode no commit waits for the disk, and none is half done
    cursor.close()


def _take_write_lock(connection: Connection, _name: str) -> None:
    if not connection.connection.dbapi_connection.in_transaction:  # type: ignore[union-attr]
        connection.exec_driver_sql("BEGIN IMMEDIATE")
