"""How a feature is stored: a 64-bit hash of the value's text, the raw number, or the list; null when missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyspark.sql import Column as SparkColumn
from pyspark.sql import functions as F

from onetrans.schema import Feature


def stored(feature: Feature, value: SparkColumn) -> SparkColumn:
    """Return a feature's stored value under its name; equal to ``onetrans.schema.hash64`` of the text."""
    if feature.kind == "hashed":
        text = value.cast("string")
        return F.when(text.isNotNull(), F.xxhash64(text)).alias(feature.name)
    if feature.kind == "vector":
        return value.cast("array<float>").alias(feature.name)
    return value.cast("double").alias(feature.name)


def stored_all(features: Iterable[Feature], column: Callable[[str], SparkColumn]) -> list[SparkColumn]:
    """Return the stored values of several features; ``column`` finds a source column by name."""
    return [stored(feature, column(feature.column)) for feature in features]
