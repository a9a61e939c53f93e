"""Which rows of the hashed tables are in use: admission of ids that were met often, eviction of idle ones.

There is no dictionary of ids: an id *is* its row (``hash mod hash_size``), and ids
that collide count together.  So

*admission*
    a row that was looked up fewer than ``admit_after`` times in training reads and
    trains row 0 instead, which all such rows share, and which also stands for
    "missing".  Every lookup of a training batch counts: user, context, candidate
    and past event; a batch counts before it is trained on.  Scoring counts
    nothing, and reads row 0 for the same rows as training did.
*eviction*
    a row that no training batch has looked up for ``evict_after_days`` days gets
    fresh initial values, its optimizer state is cleared, and it has to be admitted
    again: the id forgets what was learned, and an id that collides with it later
    starts afresh.  The table does not shrink.

Both are off by default; the values belong to the model's configuration, and the
counts to its state, so they are in checkpoints and in the saved model.

Shape suffixes: those of :mod:`onetrans.batch`, and

    M  rows looked up     Y  rows of a table
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from onetrans.batch import RequestBatch
from onetrans.schema import FeatureSchema, Side

COUNT, USED = "count_", "used_"
"""What the buffers' names begin with, before the table's."""

_DAY_US = 86_400_000_000


class RowUsage(nn.Module):
    """How often each row was looked up, and on which day last."""

    def __init__(self, schema: FeatureSchema, admit_after: int, evict_after_days: int) -> None:
        super().__init__()
        self.schema = schema
        self.admit_after = admit_after
        self.evict_after_days = evict_after_days
        self.tables = {f.embedding: f.rows for f in schema.features if f.kind == "hashed"}
        for name, rows in self.tables.items():
            if admit_after > 1:
                self.register_buffer(COUNT + name, torch.zeros(rows, dtype=torch.int32))
            if evict_after_days:
                self.register_buffer(USED + name, torch.zeros(rows, dtype=torch.int32))

    def count(self, table: str) -> Tensor:
        """Return how often each row of a table was looked up, (Y,); there is none without admission."""
        return self.get_buffer(COUNT + table)

    def used(self, table: str) -> Tensor:
        """Return the day of each row's last lookup, (Y,), in days since 1970; 0: never; none without eviction."""
        return self.get_buffer(USED + table)

    def admitted(self, table: str, rows_M: Tensor) -> Tensor:
        """Return the rows to read: 0 for those that are not admitted yet."""
        if self.admit_after <= 1 or table not in self.tables:
            return rows_M
        return rows_M * (self.count(table)[rows_M] >= self.admit_after)

    @torch.no_grad()
    def observe(self, batch: RequestBatch) -> None:
        """Count the lookups of a training batch; its day is that of its latest request."""
        day = int(batch.request_time_R.max()) // _DAY_US if batch.num_requests else 0
        sides: tuple[tuple[Side, Tensor], ...] = (
            ("user", batch.user_RU), ("context", batch.context_RK), ("item", batch.item_NI), ("event", batch.event_EV),
        )  # fmt: skip
        for side, rows_MF in sides:
            for feature, rows_M in zip(self.schema.of_side(side), rows_MF.unbind(1), strict=True):
                if feature.embedding not in self.tables:
                    continue
                if self.admit_after > 1:
                    counts = self.count(feature.embedding)
                    # Not beyond the threshold, so that no count ever overflows.
                    met, times = rows_M.unique(return_counts=True)
                    counts[met] = (counts[met] + times).clamp(max=self.admit_after).int()
                if self.evict_after_days:
                    used = self.used(feature.embedding)
                    used[rows_M] = used[rows_M].clamp(min=day)

    @torch.no_grad()
    def idle(self, table: str, today: int) -> Tensor:
        """Return the rows, without row 0, that were looked up once but not in the days before ``today``."""
        used = self.used(table)
        stale = (used > 0) & (used < today - self.evict_after_days)
        stale[0] = False
        return stale.nonzero().squeeze(1)

    @torch.no_grad()
    def evict(self, table: str, weights: nn.Parameter, today: int, std: float) -> Tensor:
        """Give the idle rows of a table fresh values and forget their counts; return them.

        The values depend on the table's name and the day alone: a training that is killed and begins again draws the
        same.
        """
        rows = self.idle(table, today)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{table} {today}".encode()))
        fresh = torch.randn(rows.shape[0], weights.shape[1], generator=generator).mul_(std)
        weights[rows] = fresh.to(weights)
        self.used(table)[rows] = 0
        if self.admit_after > 1:
            self.count(table)[rows] = 0
        return rows
