"""What the benchmarks that train share: published days as batches, one pass of training, the scores of a day."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn

from onetrans import storage
from onetrans.batch import RequestBatch
from onetrans.days import describe_days
from onetrans.errors import NotReadyError
from onetrans.lake import Lake
from onetrans.loader import Loaded, LoaderConfig, RequestData
from onetrans.metrics import Metrics
from onetrans.models import RankingModel
from onetrans.optim import Optimizers
from onetrans.plan import TABLE
from onetrans.schema import FeatureSchema, load_schema
from onetrans.settings import load_settings


@dataclass(frozen=True)
class LabelledDay:
    """A day to score: its batches in stored order, and who saw each impression."""

    batches: list[RequestBatch]
    """Whole requests."""
    user_N: npt.NDArray[Any]
    """User of each impression."""

    @property
    def click_N(self) -> npt.NDArray[np.float32]:
        """Click of each impression."""
        return torch.cat([batch.click_N for batch in self.batches]).numpy()

    @property
    def conversion_N(self) -> npt.NDArray[np.float32]:
        """Conversion of each impression."""
        return torch.cat([batch.conversion_N for batch in self.batches]).numpy()


class PublishedDays:
    """The published days of ``training_requests`` in the lake in force."""

    def __init__(self, batch_size: int, max_seq_len: int, conversion_event: str = "") -> None:
        """Open the lake.

        Args:
            batch_size: impressions of a batch.
            max_seq_len: most recent events of a request that are read.
            conversion_event: a type of past event, such as ``like``: a clicked impression then converts if this event
                of its user and item was logged with the impression's own time.  Rates and past events stay as they
                are.  Empty: the conversion of the tables.

        Raises:
            NotReadyError: if nothing is published.
        """
        settings = load_settings()
        self.schema: FeatureSchema = load_schema(settings.source)
        self._lake = Lake(settings.lake)
        self._config = LoaderConfig(batch_size, max_seq_len)
        self._conversion_event = conversion_event
        self._snapshot_id = self._lake.snapshot_id(TABLE)
        if self._snapshot_id is None:
            raise NotReadyError(f"table {TABLE} has no published day; build some (python -m jobs.backfill)")
        self.days = self._lake.days(TABLE, self._snapshot_id)

    def before(self, ds: date) -> list[date]:
        """Return the published days before ``ds``.

        Raises:
            NotReadyError: if there is none, or ``ds`` itself is not published.
        """
        days = [day for day in self.days if day < ds]
        if not days or ds not in self.days:
            raise NotReadyError(
                f"table {TABLE}: {ds} and a day before it are needed, published are {describe_days(self.days)}"
            )
        return days

    def training(self, days: list[date], seed: int) -> list[RequestBatch]:
        """Return some days as batches, shuffled as ``onetrans train`` does, in memory."""
        return [loaded.batch for loaded in self._loaded(days, seed)]

    def _loaded(self, days: list[date], seed: int | None, with_keys: bool = False) -> list[Loaded]:
        files = self._lake.files(TABLE, days, self._snapshot_id)
        wanted = with_keys or bool(self._conversion_event)
        data = RequestData(files, self.schema, self._config, with_keys=wanted)
        loaded = list(data.batches(shuffle_seed=seed))
        if not self._conversion_event:
            return loaded
        converted = self._converted(days)
        return [replace(part, batch=_with_conversions(part, converted)) for part in loaded]

    def _converted(self, days: list[date]) -> pa.Array:
        """Return the keys of the impressions of some days that have the event of :attr:`_conversion_event`.

        Raises:
            NotReadyError: if there is none: conversions would all be 0.
        """
        shown = self._rows("impressions", days, ["user_id", "item_id", "ts", "request_id"])
        events = self._rows("behaviors", days, ["user_id", "item_id", "ts", "type"])
        events = events.filter(pc.equal(events["type"], self._conversion_event)).drop(["type"])
        found = shown.join(events, keys=["user_id", "item_id", "ts"], join_type="left semi")
        if not found.num_rows:
            raise NotReadyError(
                f"{describe_days(days)}: no impression has an event {self._conversion_event!r} at its own time"
            )
        return _keys(found)

    def _rows(self, table: str, days: list[date], columns: list[str]) -> pa.Table:
        parts = []
        for file in self._lake.files(table, days, self._lake.snapshot_id(table)):
            filesystem, inner = storage.open_filesystem(file)
            parts.append(pq.read_table(inner, filesystem=filesystem, partitioning=None, columns=columns))
        return pa.concat_tables(parts)

    def numbers(self, days: list[date]) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any], npt.NDArray[Any]]:
        """Return, per impression of some days, every bucketized feature's number and the labels: for models of trees.

        Past events are left out: what is known are the day-lagged counts and rates, and attributes.  Of categories
        only the request's context is given, as hashes: trees learn those of users and items by heart.
        """
        parts, clicks, conversions = [], [], []
        numeric = [
            f
            for f in self.schema.features
            if (f.kind == "bucketized" and f.side != "event") or (f.kind == "hashed" and f.side == "context")
        ]
        for file in self._lake.files(TABLE, days, self._snapshot_id):
            filesystem, inner = storage.open_filesystem(file)
            rows = pq.read_table(inner, filesystem=filesystem, partitioning=None)
            shown = rows["candidates"].combine_chunks()
            owner_N = np.repeat(np.arange(len(shown)), shown.value_lengths().to_numpy())
            items = shown.flatten()
            columns = [
                items.field(f.name).to_numpy(zero_copy_only=False)
                if f.side == "item"
                else rows[f.name].combine_chunks().to_numpy(zero_copy_only=False)[owner_N]
                for f in numeric
            ]
            parts.append(np.stack(columns, axis=1).astype(np.float64))
            clicks.append(items.field("click").to_numpy(zero_copy_only=False))
            conversions.append(items.field("conversion").to_numpy(zero_copy_only=False))
        return np.concatenate(parts), np.concatenate(clicks), np.concatenate(conversions)

    def labelled(self, ds: date) -> LabelledDay:
        """Return a day to score, in memory."""
        loaded = self._loaded([ds], None, with_keys=True)
        users = np.concatenate([part.keys["user_id"].to_numpy() for part in loaded if part.keys is not None])
        return LabelledDay([part.batch for part in loaded], users)


def _keys(rows: pa.Table) -> pa.Array:
    joined = pc.binary_join_element_wise(rows["request_id"], rows["item_id"], "/")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def _with_conversions(part: Loaded, converted: pa.Array) -> RequestBatch:
    assert part.keys is not None
    has_N = pc.is_in(_keys(part.keys), value_set=converted).to_numpy(zero_copy_only=False)
    return replace(part.batch, conversion_N=part.batch.click_N * torch.from_numpy(has_N.astype(np.float32)))


def train_pass(model: RankingModel, optimizers: Optimizers, batches: Iterable[RequestBatch]) -> None:
    """Train one pass with the losses of ``onetrans train``, both tasks with weight 1."""
    model.train()
    for batch in batches:
        optimizers.zero_grad()
        scores = model(batch)
        click = F.binary_cross_entropy_with_logits(scores.ctr_logit_N, batch.click_N)
        per_row_N = F.binary_cross_entropy_with_logits(scores.cvr_logit_N, batch.conversion_N, reduction="none")
        conversion = (per_row_N * batch.click_N).sum() / batch.click_N.sum().clamp(min=1.0)
        (click + conversion).backward()
        optimizers.step()


@torch.no_grad()
def probabilities(
    model: nn.Module, batches: Iterable[RequestBatch]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return CTR and CVR of every impression."""
    model.eval()
    scores = [model(batch) for batch in batches]
    ctr_N, cvr_N = (torch.sigmoid(torch.cat([s[task] for s in scores]).double()).numpy() for task in (0, 1))
    return ctr_N, cvr_N


def figures(day: LabelledDay, ctr_N: npt.NDArray[np.float64], cvr_N: npt.NDArray[np.float64]) -> Metrics:
    """Return the figures of a day's scores."""
    return Metrics.compute(
        click_N=day.click_N, conversion_N=day.conversion_N, ctr_N=ctr_N, cvr_N=cvr_N, user_N=day.user_N
    )
