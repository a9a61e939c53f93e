"""Embedding tables: one per table the schema names, shared by the features that name it.

Shape suffixes: those of :mod:`onetrans.batch`, and

    M  rows looked up (requests, candidates or events)     F  features of one side
    D  embedding width                                     Q  F * D
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onetrans.schema import FeatureSchema, Side

SPARSE_FROM_ROWS = 4096
"""Tables of at least so many rows get sparse gradients.  Below, a dense gradient is cheaper than sorting rows;
Adagrad treats both alike, since a zero gradient moves nothing."""

INITIAL_STD = 0.05
"""Standard deviation of a table's initial values."""

_PREFIX = "table_"  # A table may bear any name, also one that nn.Module uses itself.


class Embeddings(nn.Module):
    """All embedding tables of a model; row 0 of each stands for "missing" and is learned too."""

    def __init__(self, schema: FeatureSchema, width: int) -> None:
        super().__init__()
        self.schema = schema
        self.width = width
        for name, rows in schema.embedding_tables().items():
            self.register_parameter(_PREFIX + name, nn.Parameter(torch.randn(rows, width) * INITIAL_STD))

    def table(self, name: str) -> nn.Parameter:
        """Return a table (rows, D) by the schema's name for it."""
        return self.get_parameter(_PREFIX + name)

    def output_dim(self, side: Side) -> int:
        """Return Q, the width of all embeddings of one side together."""
        return len(self.schema.of_side(side)) * self.width

    def forward(self, side: Side, rows_MF: Tensor) -> Tensor:
        """Return the embeddings of all features of one side, concatenated in schema order: (M, Q)."""
        features = self.schema.of_side(side)
        if rows_MF.shape[1] != len(features):
            raise ValueError(f"{side} rows have {rows_MF.shape[1]} columns, the schema has {len(features)} features")
        if not features:
            return next(self.parameters()).new_zeros((rows_MF.shape[0], 0))
        return torch.cat(
            [
                F.embedding(rows_MF[:, i], self.table(f.embedding), sparse=f.rows >= SPARSE_FROM_ROWS)
                for i, f in enumerate(features)
            ],
            dim=1,
        )
