"""What a column must be: its type, how much of it may be missing, and the range of its values.

A nested column is named by its path: ``candidates.click`` is the field ``click``
of the structs listed in ``candidates``.  A list of numbers has two columns of its
own: ``image.element`` are its numbers, ``image.length`` is how many.  Types are named as in
``docs/architecture.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pyarrow as pa

from onetrans.schema import Aggregates, Feature, FeatureSchema, Kind, Side

LIST_OF_STRUCT = "list of struct"
VECTOR = "list of float"

_STORED: dict[Kind, str] = {"hashed": "text", "bucketized": "double", "vector": VECTOR}
_ENCODED: dict[Kind, str] = {"hashed": "bigint", "bucketized": "double", "vector": VECTOR}


@dataclass(frozen=True)
class Column:
    """The declaration of one column."""

    name: str
    """Column, or path of a nested one."""
    type: str
    """``text``, ``int``, ``bigint``, ``double``, ``timestamp``, ``date``, ``list of struct`` or ``list of float``."""
    required: bool = False
    """No value may be missing or, where it is text, empty; else the day fails."""
    smallest: float | None = None
    """Smallest value allowed; None: any finite one."""
    largest: float | None = None
    """Largest value allowed; None: any finite one."""
    optional: bool = False
    """The column itself may be absent."""
    may_be_missing: float | None = None
    """Share of values that may be missing before the audit warns; None: the setting ``audit.max_missing_share``."""


def key(name: str, kind: str = "text") -> Column:
    """Declare a column that names or orders rows: never missing, never empty."""
    return Column(name, kind, required=True)


def label(name: str) -> Column:
    """Declare a label, never missing; that it is 0 or 1 is a rule of the rows, which can name one."""
    return Column(name, "int", required=True)


def truth(prefix: str = "") -> list[Column]:
    """Declare the true probabilities, which only a simulator knows."""
    return [
        Column(f"{prefix}{name}", "double", smallest=0, largest=1, optional=True, may_be_missing=1.0)
        for name in ("true_ctr", "true_cvr")
    ]


def stored(schema: FeatureSchema, side: Side) -> list[Column]:
    """Declare the source columns of one side's features as the base tables hold them: text, or a raw number."""
    dims = schema.vector_columns(side)
    return [
        column
        for name, kind in schema.source_columns(side).items()
        for column in (_vector(name, dims[name]) if name in dims else [Column(name, _STORED[kind])])
    ]


def encoded(features: Iterable[Feature], prefix: str = "") -> list[Column]:
    """Declare features as ``training_requests`` holds them: a 64-bit hash, a raw number, or a vector."""
    return [
        column
        for feature in features
        for column in (
            _vector(f"{prefix}{feature.name}", feature.dim)
            if feature.kind == "vector"
            else [Column(f"{prefix}{feature.name}", _ENCODED[feature.kind])]
        )
    ]


def _vector(name: str, dim: int) -> list[Column]:
    """Declare a vector: where it is not missing, it has exactly so many numbers, all of them finite."""
    return [
        Column(name, VECTOR),
        Column(f"{name}.element", "float", required=True),
        Column(f"{name}.length", "int", smallest=dim, largest=dim),
    ]


def aggregates(declared: Aggregates, prefix: str) -> list[Column]:
    """Declare the day-lagged counts (not negative) and rates (between 0 and 1) of one key."""
    columns = [Column(name, "double", smallest=0) for name in declared.columns(prefix)]
    return [replace(c, largest=1) if c.name.split("_")[-2] in ("ctr", "cvr") else c for c in columns]


def distinct(columns: Iterable[Column]) -> list[Column]:
    """Keep the first declaration of each name: a feature may read a key, or an aggregate, of its own table."""
    first: dict[str, Column] = {}
    for column in columns:
        first.setdefault(column.name, column)
    return list(first.values())


def type_name(kind: pa.DataType) -> str:
    """Return the name ``docs/architecture.md`` gives an Arrow type, or Arrow's own where it gives none."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_int32(kind):
        return "int"
    if pa.types.is_int64(kind):
        return "bigint"
    if pa.types.is_float64(kind):
        return "double"
    if pa.types.is_date32(kind):
        return "date"
    if pa.types.is_timestamp(kind) and kind.unit == "us" and kind.tz is not None:
        return "timestamp"
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        return LIST_OF_STRUCT
    if is_vector(kind):
        return VECTOR
    return str(kind)


def is_vector(kind: pa.DataType) -> bool:
    """Tell whether a column holds lists of 32-bit numbers."""
    return pa.types.is_list(kind) and pa.types.is_float32(kind.value_type)


def found_types(schema: pa.Schema) -> dict[str, str]:
    """Return the type name of every column and nested field of a file, by path."""
    found: dict[str, str] = {}

    def add(path: str, kind: pa.DataType) -> None:
        found[path] = type_name(kind)
        if found[path] == LIST_OF_STRUCT:
            for index in range(kind.value_type.num_fields):
                field = kind.value_type.field(index)
                add(f"{path}.{field.name}", field.type)
        elif found[path] == VECTOR:
            found.update({f"{path}.element": "float", f"{path}.length": "int"})

    for column in schema:
        add(column.name, column.type)
    return found
