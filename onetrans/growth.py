"""Hash tables that grow: a model of yesterday's schema goes on with today's, and no id loses what it learned.

A row of a hashed table is ``1 + hash mod hash_size``.  Where the new size is a
multiple of the old one, ``(hash mod new) mod old = hash mod old``: so row ``1 + r``
of the grown table begins as row ``1 + r mod old`` of the one before, with its
optimizer state and its counts, and every score stays what it was.  Ids that
collided begin alike and part from then on.  With any other size most ids would
find another id's row, so such a schema is trained afresh.

Stored rows hold whole hashes, so days published before need not be built again.

Shape suffixes: Y  rows of the table before     Z  rows of the grown one
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from onetrans.schema import FeatureSchema

if TYPE_CHECKING:  # a plan asks what grew, and does without torch
    from torch import Tensor

    from onetrans.checkpoint import Checkpoint
    from onetrans.models import RankingModel


def growth(before: FeatureSchema, now: FeatureSchema) -> tuple[Mapping[str, tuple[int, int]], str]:
    """Return the tables that grew, with their rows then and now, and an empty text; or none, and what differs."""
    then, here = ({f.name: f for f in schema.features} for schema in (before, now))
    for names, what in ((here.keys() - then.keys(), "is new"), (then.keys() - here.keys(), "is gone")):
        if names:
            return {}, f"feature {min(names)} {what}"
    grown: dict[str, tuple[int, int]] = {}
    for name, feature in here.items():
        old = then[name]
        if feature == old:
            continue
        if feature.kind != old.kind or replace(feature, hash_size=old.hash_size) != old:
            return {}, f"feature {name} changed"
        if feature.hash_size < old.hash_size or feature.hash_size % old.hash_size:
            return (
                {},
                f"feature {name}: hash_size = {old.hash_size}, now {feature.hash_size}, which is no multiple of it",
            )
        grown[feature.embedding] = old.rows, feature.rows
    if replace(before, features=now.features) != now or [f.name for f in before.features] != [*here]:
        return {}, "its sequences, times or order of features changed"
    return grown, ""


def describe(grown: Mapping[str, tuple[int, int]]) -> str:
    """Say which tables grow, for a person."""
    return ", ".join(f"table {name} grows from {old:,} to {new:,} rows" for name, (old, new) in grown.items())


def grown_checkpoint(checkpoint: Checkpoint, model: RankingModel) -> tuple[Checkpoint, dict[str, tuple[int, int]]]:
    """Return a checkpoint whose hashed tables have the model's sizes, and those that grew, with rows then and now."""
    from onetrans.models.embeddings import TABLE
    from onetrans.models.row_usage import COUNT, USED

    tensors = dict(checkpoint.tensors)
    grown: dict[str, tuple[int, int]] = {}
    for number, name in enumerate(model.embedding_parameters()):
        table = name.removeprefix(f"embeddings.{TABLE}")
        rows, found = model.embeddings.table(table).shape[0], tensors.get(f"model.{name}")
        if found is None or found.shape[0] == rows or (rows - 1) % (found.shape[0] - 1):
            continue
        grown[table] = found.shape[0], rows
        usage = (f"model.embeddings.usage.{prefix}{table}" for prefix in (COUNT, USED))
        for path in (f"model.{name}", f"optimizers.embedding.state.{number}.sum", *usage):
            if path in tensors:
                tensors[path] = grown_rows(tensors[path], rows)
    return replace(checkpoint, tensors=tensors), grown


def grown_rows(table: Tensor, rows: int) -> Tensor:
    """Return a table (Z, ...) of so many rows that begins as ``table`` (Y, ...) was; row 0 stays row 0."""
    import torch

    before = table.shape[0] - 1
    source_Z = torch.arange(rows) - 1
    return table[torch.where(source_Z < 0, 0, source_Z % before + 1)]
