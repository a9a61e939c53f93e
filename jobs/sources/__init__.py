"""Sources of raw events: one protocol, one module or package per kind of log.

A source hands out raw frames with the column names of the input contract
(``docs/input.md``); cleaning, typing and refusing rows is the jobs' work.
"""

from __future__ import annotations

import importlib
from datetime import date
from typing import Protocol

from pyspark.sql import DataFrame, SparkSession

from onetrans import storage
from onetrans.errors import BadConfigError
from onetrans.schema import FeatureSchema, InputTable
from onetrans.settings import SourceSettings


class Source(Protocol):
    """A raw log, one day at a time.

    Every method that reads raises NotReadyError for a day that is not there (the text names the place and the days that
    are), and BadDataError for files that cannot be read or lack a column.
    """

    def impressions(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the impressions of one day, with the contract's column names."""

    def behaviors(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the behaviours delivered on one day; not called if the schema derives them."""

    def history(self, spark: SparkSession) -> DataFrame | None:
        """Return behaviours from before the log's first day, or None if there are none."""

    def users(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the user attributes that hold on one day."""

    def items(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the item attributes that hold on one day."""

    def whole(self, spark: SparkSession, table: InputTable, ds: date | None) -> DataFrame | None:
        """Return the rows of a table's day, or of the history, with ``_row`` and ``_file`` beside them.

        None if a row of the contract is no row of a file, or there is no history.
        """

    def stamp(self, table: InputTable, ds: date | None) -> str:
        """Return a text that changes when the files of a table's day do, or of the history; empty if there are none.

        Opens no file: names, sizes and times of the last change decide.
        """

    def missing(self, ds: date) -> str:
        """Say what of one day's files is not there yet; empty if nothing is missing.  Opens no file."""


def open_source(settings: SourceSettings, schema: FeatureSchema) -> Source:
    """Return the source of the configured kind; only its module is imported.

    Raises:
        BadConfigError: if Spark cannot take the path by its name, or there is no such class.
    """
    storage.refuse_special("source.path", settings.path)
    if settings.kind == "kuairand":
        from jobs.sources.kuairand import KuaiRand

        return KuaiRand(settings.path, schema)
    if settings.kind == "files":
        from jobs.sources.files import Files

        return Files(settings.path, schema)
    module, _, name = settings.kind.partition(":")
    try:
        source = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise BadConfigError(f"source.kind = {settings.kind!r}: {error}; is it installed, or on PYTHONPATH?") from error
    if source is None:
        raise BadConfigError(f"source.kind = {settings.kind!r}: module {module} has no {name}")
    own: Source = source(settings.path, schema)
    return own
