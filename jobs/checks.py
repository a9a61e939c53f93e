"""Typing raw rows and refusing bad ones: a row is good, an exact repeat, or refused with a reason.

A *checked* frame has the typed columns, ``raw`` (the row as it came) and
``reason``: null for a good row, ``REPEAT`` for a further copy of a good row,
and otherwise text of the form ``<column>: <what is wrong>``.  The first reason
found is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.contract import Column, contract
from jobs.sources.reading import AS_JSON, UNREADABLE
from onetrans.days import day_bounds
from onetrans.schema import FeatureSchema, InputTable

REPEAT = "repeat"
"""Reason of a row that says again, word for word, what another row says; it is dropped and counted."""

_ISO_TIME = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}([.,]\d{1,9})?)?\s?(Z|[+-]\d{2}(:?\d{2})?)?$"
_ISO_OFFSET = r"(Z|[+-]\d{2}(:?\d{2})?)$"
_FLOAT = r"^[+-]?\d+\.(0*|\d+[eE][+-]?\d+)$"  # how a whole number looks that passed through floating point
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
_LAST_SECOND = 253_402_300_799  # the end of the year 9999


def typed(raw: DataFrame, columns: Sequence[Column], schema: FeatureSchema) -> DataFrame:
    """Return a checked frame of a contract's columns; an optional column that is not in ``raw`` is left out.

    Ids and categories become text, numbers double (NaN is missing), vectors lists of float, labels and positions
    int, times timestamps.  A vector that is text is read as a JSON array.
    A time without an offset is in the schema's time zone.

    A number that is infinite, a position below 0, and an id that CSV or JSON writes as floating point are refused:
    nothing says whether ``7.0`` is the user ``7``.
    """
    kinds = {field.name: field.dataType for field in raw.schema}
    present = [column for column in columns if column.name in kinds]
    frame = raw.select(F.struct("*").alias("raw"))
    values = {column.name: _value(F.col("raw")[column.name], kinds[column.name], column, schema) for column in present}
    problems: list[SparkColumn] = []
    all_text = UNREADABLE in kinds
    if all_text:
        problems.append(F.when(F.col("raw")[UNREADABLE].isNotNull(), F.lit("row: cannot be parsed")))
    for column in present:
        empty = _is_empty(F.col("raw")[column.name], kinds[column.name])
        unread = values[column.name].isNull() & ~empty
        if column.kind == "vector":
            problems.append(_vector_problem(values[column.name], unread, column))
        else:
            problems.append(F.when(unread, F.lit(f"{column.name}: {_EXPECTED[column.kind]}")))
        if column.kind == "id" and all_text:
            floating = F.col("raw")[column.name].rlike(_FLOAT)
            problems.append(F.when(floating, F.lit(f"{column.name}: floating point; write a whole number or text")))
        if column.kind == "number":
            infinite = F.abs(values[column.name]) == float("inf")
            problems.append(F.when(infinite, F.lit(f"{column.name}: not finite")))
        if column.kind == "position":
            problems.append(F.when(values[column.name] < 0, F.lit(f"{column.name}: negative")))
        if not column.nullable:
            problems.append(F.when(empty, F.lit(f"{column.name}: missing")))
    return frame.select(
        F.to_json("raw", AS_JSON).alias("raw"),
        *(value.alias(name) for name, value in values.items()),
        F.coalesce(*problems).alias("reason"),
    )


def refuse(checked: DataFrame, *rules: tuple[SparkColumn, str]) -> DataFrame:
    """Give every row without a reason the text of the first rule whose condition it meets."""
    return checked.withColumn(
        "reason", F.coalesce(F.col("reason"), *(F.when(condition, F.lit(text)) for condition, text in rules))
    )


def refuse_duplicates(checked: DataFrame, key: Sequence[str]) -> DataFrame:
    """Mark rows that share a key: copies but the first as repeats; if they disagree, refuse them all.

    Rows that contradict each other under one key are all refused because nothing says which of them is true.
    """
    compared = [c for c in checked.columns if c not in ("raw", "reason")]
    good = F.col("reason").isNull()
    same_key = Window.partitionBy(*key, "_good")
    # The hash passes over nulls, so that (null, 'a') and ('a', null) would be one: where they stand counts too.
    said = F.xxhash64(*compared, *(F.col(column).isNull() for column in compared))
    frame = checked.withColumn("_good", good).withColumn("_hash", said)
    copies = F.row_number().over(same_key.orderBy("_hash"))
    differ = F.min("_hash").over(same_key) != F.max("_hash").over(same_key)
    frame = frame.withColumns({"_copy": copies, "_differ": differ})
    conflict = f"{', '.join(key)}: several rows of one key disagree"
    reason = F.when(good & F.col("_differ"), F.lit(conflict)).when(good & (F.col("_copy") > 1), F.lit(REPEAT))
    return frame.withColumn("reason", F.coalesce("reason", reason)).drop("_good", "_hash", "_copy", "_differ")


def attributes(raw: DataFrame, table: InputTable, schema: FeatureSchema) -> DataFrame:
    """Return the checked rows of ``users`` or ``items``: one per id, declared columns typed."""
    columns = contract(schema, table)
    return refuse_duplicates(typed(raw, columns, schema), (columns[0].name,))


def good_rows(checked: DataFrame) -> DataFrame:
    """Return the good rows of a checked frame, without its notes."""
    return checked.where(F.col("reason").isNull()).drop("raw", "reason")


def day_limits(ds: date, schema: FeatureSchema) -> tuple[SparkColumn, SparkColumn]:
    """Return the first instant a row of ``ds`` may have, and the first it may not, tolerance included."""
    start, end = day_bounds(ds, schema.timezone)
    tolerance = timedelta(minutes=schema.day_tolerance_minutes)
    return F.lit(start - tolerance), F.lit(end + tolerance)


_EXPECTED = {
    "id": "not text",
    "category": "not text",
    "number": "not a number",
    "time": "not a time",
    "label": "not 0 or 1",
    "position": "not a whole number",
}


def _is_empty(value: SparkColumn, kind: T.DataType) -> SparkColumn:
    if isinstance(kind, T.StringType):
        return value.isNull() | (F.trim(value) == "")
    if isinstance(kind, T.FloatType | T.DoubleType):
        return value.isNull() | F.isnan(value)
    return value.isNull()


def _vector_problem(vector: SparkColumn, unread: SparkColumn, column: Column) -> SparkColumn:
    """Return what is wrong with a vector, with the numbers expected and found; null if nothing is."""

    def reason(text: str) -> SparkColumn:
        return F.lit(f"{column.name}: {text}")

    needed = f"expected {column.dim} finite numbers"
    infinite = F.exists(vector, lambda x: F.isnan(x) | (F.abs(x) == float("inf")))
    return (
        F.when(unread, reason(f"not a list of numbers, {needed}"))
        .when(
            F.size(vector) != column.dim,
            F.concat(reason(""), F.size(vector).cast("string"), F.lit(f" numbers, {needed}")),
        )
        .when(F.exists(vector, lambda x: x.isNull()), reason(f"{column.dim} numbers with an empty one, {needed}"))
        .when(infinite, reason(f"{column.dim} numbers with NaN or an infinite one, {needed}"))
    )


def _value(value: SparkColumn, kind: T.DataType, column: Column, schema: FeatureSchema) -> SparkColumn:
    text = isinstance(kind, T.StringType)
    if column.kind in ("id", "category"):
        return F.when(~_is_empty(value, kind), value.cast("string"))
    if column.kind == "number":
        number = value.try_cast("double")
        return F.when(~F.isnan(number), number)
    if column.kind == "vector":
        return (F.from_json(value, "array<double>") if text else value).cast("array<float>")
    if column.kind == "label":
        if isinstance(kind, T.BooleanType):
            return value.cast("int")
        number = value.try_cast("double")
        if text:  # of a format that has nothing but text: truth values as JSON writes them
            said = F.lower(F.trim(value))
            number = F.when(said == "true", 1.0).when(said == "false", 0.0).otherwise(number)
        return F.when(number.isin(0.0, 1.0), number.cast("int"))
    if column.kind == "position":
        return value.try_cast("int")
    if isinstance(kind, T.TimestampType):
        return value
    if isinstance(kind, T.TimestampNTZType):
        return F.to_utc_timestamp(value.cast("timestamp"), schema.timezone)
    counted = _since_epoch(value, schema.epoch) if schema.epoch else None
    if not text:
        if counted is None:
            raise TypeError(f"column {column.name} of type {kind.simpleString()} cannot hold a time")
        return counted
    parsed = F.when(value.rlike(_ISO_TIME), F.regexp_replace(value, ",", ".").try_cast("timestamp"))
    iso = F.when(value.rlike(_ISO_OFFSET), parsed).otherwise(F.to_utc_timestamp(parsed, schema.timezone))
    return iso if counted is None else F.coalesce(counted, iso)


def _since_epoch(value: SparkColumn, unit: str) -> SparkColumn:
    whole = value.try_cast("bigint")
    whole = F.when(whole.between(0, _LAST_SECOND * _PER_SECOND[unit]), whole)
    if unit == "s":
        return F.timestamp_seconds(whole)
    return F.timestamp_millis(whole) if unit == "ms" else F.timestamp_micros(whole)
