"""A team's own log in the input contract of ``docs/input.md``: folders per table and day, any of three formats."""

from __future__ import annotations

from datetime import date
from typing import get_args

from pyspark.sql import DataFrame, SparkSession

from jobs.contract import contract
from jobs.sources.reading import Where, data_files, files_stamp, folders, read_files, require_columns
from onetrans import storage
from onetrans.days import describe_days, parse_day
from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.schema import FeatureSchema, InputTable


class Files:
    """Reads ``<path>/impressions/ds=D``, ``behaviors/ds=D``, ``behaviors/history``, ``users`` and ``items``."""

    def __init__(self, path: str, schema: FeatureSchema) -> None:
        self.path = path
        self.schema = schema

    def impressions(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the impressions of one day."""
        return self._day(spark, "impressions", ds)

    def behaviors(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the behaviours delivered on one day."""
        return self._day(spark, "behaviors", ds)

    def history(self, spark: SparkSession) -> DataFrame | None:
        """Return ``behaviors/history``, or None if there is no such folder."""
        folder = storage.join(self.path, "behaviors", "history")
        if not storage.exists(folder):
            return None
        return self._read(spark, "behaviors", "history", folder)

    def users(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the users of one day, or the one snapshot."""
        return self._snapshot(spark, "users", ds)

    def items(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the items of one day, or the one snapshot."""
        return self._snapshot(spark, "items", ds)

    def whole(self, spark: SparkSession, table: InputTable, ds: date | None) -> DataFrame | None:
        """Return the rows of a table's day, or of the history, with ``_row`` and ``_file`` beside them."""
        if ds is None:
            folder, day = storage.join(self.path, table, "history"), "history"
        elif self.days(table):
            folder, day = storage.join(self.path, table, f"ds={ds}"), str(ds)
        else:
            folder, day = storage.join(self.path, table), "snapshot"
        return self._read(spark, table, day, folder, whole=True) if storage.exists(folder) else None

    def stamp(self, table: InputTable, ds: date | None) -> str:
        """Return a text that changes when the files of a table's day do, or of the history; empty for a snapshot."""
        return files_stamp(storage.join(self.path, table, "history" if ds is None else f"ds={ds}"))

    def missing(self, ds: date) -> str:
        """Say which table has no file of the day yet; empty if every one has.

        Raises:
            BadConfigError: if the path is no folder.
        """
        per_day: list[InputTable] = ["impressions"]
        if not self.schema.derived_behaviors:
            per_day.append("behaviors")
        snapshots: tuple[InputTable, ...] = ("users", "items")
        per_day += [table for table in snapshots if self.days(table)]
        for table in per_day:
            folder = storage.join(self.path, table, f"ds={ds}")
            if not data_files(folder):
                self._require_path()
                filled = [day for day in self.days(table) if data_files(storage.join(self.path, table, f"ds={day}"))]
                return f"{table} {ds}: there is no file in {folder}; days that are there: {describe_days(filled)}"
        return ""

    def days(self, table: InputTable) -> list[date]:
        """Return the days a table has a folder for.

        Raises:
            BadDataError: if a folder ``ds=...`` is not named after a day.
        """
        place = storage.join(self.path, table)
        days = []
        for name in folders(place):
            if name.startswith("ds="):
                try:
                    days.append(parse_day(name[3:]))
                except BadConfigError as error:
                    raise BadDataError(
                        f"{table}: folder {place}/{name} is not named after a day, as ds=2024-02-29 is"
                    ) from error
        return days

    def _day(self, spark: SparkSession, table: InputTable, ds: date) -> DataFrame:
        folder = storage.join(self.path, table, f"ds={ds}")
        if not storage.exists(folder):
            self._require_log()
            days = self.days(table)
            hint = ""
            if table == "behaviors" and not days:
                hint = "; a log without behaviours of its own says derived_behaviors in its schema file"
            raise NotReadyError(f"{table} {ds}: there is no {folder}; days that are there: {describe_days(days)}{hint}")
        return self._read(spark, table, str(ds), folder)

    def _require_path(self) -> None:
        if not storage.exists(self.path):
            raise BadConfigError(f"source.path = {self.path!r} is no folder")

    def _require_log(self) -> None:
        """Tell a place that holds no log from a log that lacks a day: only the second is worth waiting for."""
        self._require_path()
        tables = get_args(InputTable)
        if not any(storage.exists(storage.join(self.path, table)) for table in tables):
            raise BadConfigError(f"source.path = {self.path!r} holds none of the folders {', '.join(tables)}")

    def _snapshot(self, spark: SparkSession, table: InputTable, ds: date) -> DataFrame:
        folder = storage.join(self.path, table)
        if not storage.exists(folder):
            raise BadConfigError(f"{table}: there is no folder {folder}; the input contract needs it")
        if self.days(table):
            return self._day(spark, table, ds)
        return self._read(spark, table, "snapshot", folder)

    def _read(self, spark: SparkSession, table: InputTable, day: str, folder: str, whole: bool = False) -> DataFrame:
        where = Where(table, day)
        files = data_files(folder)
        if not files:
            raise NotReadyError(f"{where}: {folder} holds no .parquet, .csv, .json or .jsonl file")
        columns = contract(self.schema, table)
        frame = read_files(spark, files, where, columns, self.schema.columns.get(table), whole)
        return require_columns(frame, columns, where, self.schema, files[0])
