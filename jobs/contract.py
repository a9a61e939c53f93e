"""The input contract as data: the columns of each input table, and what a value of each may be.

``docs/input.md`` says the same to the people who write the files.  Sources use
this to name a missing or mistyped column before Spark reads a row, and
``jobs.checks`` uses it to turn raw columns into typed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from onetrans.schema import CONTEXT_FROM_CLOCK, Feature, FeatureSchema, InputTable, Kind, Mistake, Side, refuse

ValueKind = Literal["id", "category", "number", "vector", "time", "label", "position"]

_KINDS: dict[Kind, ValueKind] = {"hashed": "category", "bucketized": "number", "vector": "vector"}

EVENT_OWN = ("item_id", "type")
"""Columns every behaviour has, whatever the source."""


@dataclass(frozen=True)
class Column:
    """One column of an input table."""

    name: str
    """Name in the contract."""
    kind: ValueKind
    """What a value may be."""
    required: bool = True
    """Whether the files must have the column."""
    nullable: bool = False
    """Whether a row may leave it empty."""
    dim: int = 0
    """Numbers of a vector."""


def contract(schema: FeatureSchema, table: InputTable) -> tuple[Column, ...]:
    """Return the columns the jobs read from an input table of this log.

    An event column that ``behaviors`` does not have is taken from the event's item, so there it is optional.

    Raises:
        BadConfigError: if the schema declares a feature that no table can provide, or renames a column that the
            contract does not have.
    """
    check_schema(schema)
    refuse(_unknown_columns(schema, table))
    return _columns(schema, table)


def contract_mistakes(schema: FeatureSchema) -> Iterator[Mistake]:
    """Yield what the input tables cannot provide, for a person who wants to see all of it at once."""
    yield from _wrong_kinds(schema)
    twofold = [mistake for side in get_args(Side) for mistake in schema.unlike_kinds(side)]
    yield from twofold
    if twofold:
        return  # which columns a table has is not decided
    for table in get_args(InputTable):
        yield from _unknown_columns(schema, table)


def _unknown_columns(schema: FeatureSchema, table: InputTable) -> Iterator[Mistake]:
    known = column_names(schema, table) if schema.columns.get(table) else []
    for name in schema.columns.get(table, {}):
        if name not in known:
            yield Mistake(
                ("columns", table, name),
                f"schema {schema.name!r}: [columns.{table}] {name} is no column of the contract, which has "
                f'{", ".join(known)}; write: column of the contract = "column of your files"',
            )


def column_names(schema: FeatureSchema, table: InputTable) -> list[str]:
    """Return the names of the columns that an input table of this log may have."""
    return [column.name for column in _columns(schema, table)]


def _columns(schema: FeatureSchema, table: InputTable) -> tuple[Column, ...]:
    if table == "impressions":
        clock = set(CONTEXT_FROM_CLOCK)
        return (
            *(Column(name, "id") for name in request_columns(schema)),
            Column("user_id", "id"),
            Column("item_id", "id"),
            Column("ts", "time"),
            Column("position", "position", required=False, nullable=True),
            Column("click", "label"),
            Column("conversion", "label"),
            Column("conversion_at", "time", required=False, nullable=True),
            *_declared(
                {c: k for c, k in schema.source_columns("context").items() if c not in clock},
                schema.vector_columns("context"),
            ),
            Column("true_ctr", "number", required=False, nullable=True),
            Column("true_cvr", "number", required=False, nullable=True),
        )
    if table == "behaviors":
        return (
            Column("user_id", "id"),
            Column("item_id", "id"),
            Column("type", "id"),
            Column("ts", "time"),
            Column("available_at", "time", required=False, nullable=True),
            Column("event_id", "id", required=False, nullable=True),
            *_declared(event_columns(schema), {}, required=False),
        )
    if table == "users":
        return (Column("user_id", "id"), *_declared(user_columns(schema), schema.vector_columns("user")))
    return (Column("item_id", "id"), *_declared(item_columns(schema), schema.vector_columns("item")))


def request_columns(schema: FeatureSchema) -> tuple[str, ...]:
    """Return the columns of impressions that tell requests apart beyond those every log has and those declared."""
    if not schema.request_from:
        return ("request_id",)
    known = {"user_id", "ts", *schema.source_columns("context")}
    return tuple(name for name in schema.request_from if name not in known)


def user_columns(schema: FeatureSchema) -> dict[str, Kind]:
    """Return the declared columns of ``users``: those of user features that are neither the id nor computed."""
    computed = {"user_id", *schema.aggregates.columns("user")}
    return {column: kind for column, kind in schema.source_columns("user").items() if column not in computed}


def item_columns(schema: FeatureSchema) -> dict[str, Kind]:
    """Return the declared columns of ``items``: those of item features, and the keys of item aggregates."""
    computed = {"item_id"}.union(*(schema.aggregates.columns(key) for key in ("item", *schema.aggregates.item_keys)))
    declared = {column: kind for column, kind in schema.source_columns("item").items() if column not in computed}
    return declared | dict.fromkeys(schema.aggregates.item_keys, "hashed")


def event_columns(schema: FeatureSchema) -> dict[str, Kind]:
    """Return the declared columns of events beyond those every behaviour has."""
    return {column: kind for column, kind in schema.source_columns("event").items() if column not in EVENT_OWN}


def context_columns(schema: FeatureSchema) -> dict[str, Kind]:
    """Return the declared context columns, the computed ones included."""
    return schema.source_columns("context")


def check_schema(schema: FeatureSchema) -> None:
    """Refuse features that read a computed column as what it is not.

    Raises:
        BadConfigError: naming the feature and its column.
    """
    refuse(_wrong_kinds(schema))


def _wrong_kinds(schema: FeatureSchema) -> Iterator[Mistake]:
    keys: dict[Side, tuple[str, ...]] = {"user": ("user",), "item": ("item", *schema.aggregates.item_keys)}
    ids = {"user": ("user_id",), "item": ("item_id", *schema.aggregates.item_keys), "event": EVENT_OWN}
    for number, feature in enumerate(schema.features):
        figures = [c for key in keys.get(feature.side, ()) for c in schema.aggregates.columns(key)]
        if feature.column in figures and feature.kind != "bucketized":
            yield _wrong_kind(number, feature, "a computed number", "bucketized")
        elif feature.column in ids.get(feature.side, ()) and feature.kind != "hashed":
            yield _wrong_kind(number, feature, "an id", "hashed")
        elif feature.side == "context" and feature.column in CONTEXT_FROM_CLOCK and feature.kind == "vector":
            yield _wrong_kind(number, feature, "computed from the clock", "hashed")


def _wrong_kind(number: int, feature: Feature, what: str, kind: Kind) -> Mistake:
    text = f"feature {feature.name!r}: column {feature.column!r} is {what}; its kind must be {kind!r}"
    return Mistake(("features", number, "kind"), text)


def _declared(columns: dict[str, Kind], dims: dict[str, int], required: bool = True) -> tuple[Column, ...]:
    return tuple(
        Column(name, _KINDS[kind], required=required, nullable=True, dim=dims.get(name, 0))
        for name, kind in columns.items()
    )
