"""Embedding tables: one per table the schema names, shared by the features that name it; and maps of vectors.

A vector feature fills one embedding's place as any other does: its numbers, scaled
to a mean square of 1, times a learned matrix, plus row 1 of its table, the bias.
A missing one is row 0, which is learned: zeros alone would say that it is there
and has no direction.

Shape suffixes: those of :mod:`onetrans.batch`, and

    M  rows looked up (requests, candidates or events)     F  features of one side
    D  embedding width                                     Q  F * D
    Y  distinct rows of a table
    X  numbers of all vector features of the side
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetrans.batch import RequestBatch
from onetrans.models.row_usage import RowUsage
from onetrans.models.rowwise import lookup, written_out
from onetrans.schema import FeatureSchema, Side

SPARSE_FROM_NUMBERS = 1 << 20
"""Tables of at least so many numbers get sparse gradients.  Below, passing over the table is cheaper than sorting the
rows that were looked up; Adagrad treats both alike, since a zero gradient moves nothing."""

INITIAL_STD = 0.05
"""Standard deviation of a table's initial values."""

TABLE, MAP = "table_", "map_"
"""What the parameters' names begin with: a table may bear any name, also one that nn.Module uses itself."""


class Fetched(NamedTuple):
    """The rows of a table that a batch needs, where the table itself is elsewhere (:mod:`onetrans.sharding`)."""

    row_Y: Tensor
    """Their numbers, ascending."""
    values_YD: Tensor
    """The rows."""


class Embeddings(nn.Module):
    """All embedding tables of a model; row 0 of each stands for "missing" and is learned too."""

    def __init__(self, schema: FeatureSchema, width: int, *, admit_after: int = 0, evict_after_days: int = 0) -> None:
        super().__init__()
        self.schema = schema
        self.width = width
        self.fetched: dict[str, Fetched] = {}
        self.usage = RowUsage(schema, admit_after, evict_after_days) if admit_after > 1 or evict_after_days else None
        for name, rows in schema.embedding_tables().items():
            self.register_parameter(TABLE + name, nn.Parameter(torch.randn(rows, width).mul_(INITIAL_STD)))
        for feature in schema.features:
            if feature.kind == "vector":
                # A vector's numbers have a mean square of 1, so a fresh map's output is as large as a fresh row.
                start_DX = torch.randn(width, feature.dim) * (INITIAL_STD / math.sqrt(feature.dim))
                self.register_parameter(MAP + feature.embedding, nn.Parameter(start_DX))

    def table(self, name: str) -> nn.Parameter:
        """Return a table (rows, D) by the schema's name for it."""
        return self.get_parameter(TABLE + name)

    def map(self, name: str) -> nn.Parameter:
        """Return the map (D, dim) of a vector feature by the schema's name for its table."""
        return self.get_parameter(MAP + name)

    def output_dim(self, side: Side) -> int:
        """Return Q, the width of all embeddings of one side together."""
        return len(self.schema.of_side(side)) * self.width

    def forward(self, side: Side, rows_MF: Tensor, vectors_MX: Tensor | None = None) -> Tensor:
        """Return the embeddings of all features of one side, concatenated in schema order: (M, Q).

        ``vectors_MX`` are the numbers of the side's vector features; None if it has none.
        """
        features = self.schema.of_side(side)
        if rows_MF.shape[1] != len(features):
            raise ValueError(f"{side} rows have {rows_MF.shape[1]} columns, the schema has {len(features)} features")
        if not features:
            return rows_MF.new_zeros((rows_MF.shape[0], 0), dtype=torch.get_default_dtype())
        rows_FM = rows_MF.t().contiguous()
        slots = [self.rows(f.embedding, rows_M) for rows_M, f in zip(rows_FM, features, strict=True)]
        dims = [f.dim for f in features if f.kind == "vector"]
        given = 0 if vectors_MX is None else vectors_MX.shape[1]
        if given != sum(dims):
            raise ValueError(f"{side} vectors have {given} numbers, the schema's vector features have {sum(dims)}")
        if vectors_MX is not None:
            parts = iter(vectors_MX.to(slots[0].dtype).split(dims, dim=1))
            slots = [
                slot + F.linear(next(parts), self.map(f.embedding)) if f.kind == "vector" else slot
                for slot, f in zip(slots, features, strict=True)
            ]
        return torch.cat(slots, dim=1)

    def rows(self, name: str, rows_M: Tensor) -> Tensor:
        """Return some rows of a table by the schema's name for it, wherever the table is: (M, D).

        Of a row that is not admitted yet, row 0.
        """
        if self.usage is not None:
            rows_M = self.usage.admitted(name, rows_M)
        if name not in self.fetched:
            return self._look_up(rows_M, self.table(name))
        row_Y, values_YD = self.fetched[name]
        place_M = torch.searchsorted(row_Y, rows_M)
        return lookup(place_M, values_YD) if written_out(values_YD) else F.embedding(place_M, values_YD)

    def observe(self, batch: RequestBatch) -> None:
        """Take note of the rows that a batch is about to train, where rows are admitted or evicted."""
        if self.usage is not None:
            self.usage.observe(batch)

    def evict(self, today: int) -> dict[str, Tensor]:
        """Reset the rows that have been idle too long on a day (days since 1970); return them by table's name."""
        if self.usage is None or not self.usage.evict_after_days:
            return {}
        return {name: self.usage.evict(name, self.table(name), today, INITIAL_STD) for name in self.usage.tables}

    @staticmethod
    def _look_up(rows_M: Tensor, table: nn.Parameter) -> Tensor:
        sparse = table.numel() >= SPARSE_FROM_NUMBERS
        if sparse or not written_out(table):
            return F.embedding(rows_M, table, sparse=sparse)
        return lookup(rows_M, table)
