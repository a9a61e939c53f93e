"""What the days before say: earlier plans of the same chain, how often items and users were seen, who is popular.

A *chain* is a plan and the trainings it goes on from, one after the other.  Both
models of every plan in it were trained by the same recipe, and each day was
scored before either model had been trained on it.  So the days of a chain can be
pooled, and their figures are a band that the next day's can be held against.

The popularity ranker is the least a model must beat.  It scores an item by its
smoothed click rate (and conversion rate) over the training rows of the last
days, the same for every user.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from onetrans import storage
from onetrans.errors import BadConfigError, BadDataError
from onetrans.plan import Plan
from onetrans.scores import CANDIDATE, read_leaves

logger = logging.getLogger(__name__)

POPULARITY_DAYS = 7
"""Days of training rows that are counted, the latest ones; more where the chain begins with a longer look-back."""

PRIOR_WEIGHT = 20.0
"""Impressions (clicks, for a conversion rate) by which an item's rate is pulled to the rate of all."""


def earlier_plans(plan: Plan) -> Iterator[Plan]:
    """Yield the plans that a plan's candidate goes on from, newest first; it ends where the chain does."""
    while True:
        start = plan.models[CANDIDATE].warm_start if CANDIDATE in plan.models else None
        if start is None:
            return
        folder = start.rstrip("/").rsplit("/", 1)[0]
        try:
            before = Plan.load(folder)
        except BadConfigError as error:
            logger.warning("the chain of %s ends at %s: %s", plan.ds, folder, error)
            return
        if before.ds >= plan.ds:
            raise BadDataError(f"plan {plan.plan_id} of {plan.ds} goes on from {before.ds}, which is not before it")
        plan = before
        yield plan


@dataclass(frozen=True)
class History:
    """Counts over the training rows of the last days."""

    days: int
    """Days that were counted."""
    items: pa.Table
    """``item_id, impressions, clicks, conversions``, a row per item that was shown."""
    users: pa.Table
    """``user_id, impressions``, a row per user who was shown something."""

    @classmethod
    def read(cls, plan: Plan) -> History:
        """Count the rows a plan's models were trained on in the last :data:`POPULARITY_DAYS`.

        Files of earlier plans that are gone (a day was replaced since) are left out.
        """
        files, days = list(plan.train_files), len(plan.train_days)
        for before in earlier_plans(plan):
            if days >= POPULARITY_DAYS or not all(storage.exists(file) for file in before.train_files):
                break
            files += before.train_files
            days += len(before.train_days)
        return cls(days, *_counts(files))

    def popularity(self, item_ids: pa.Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the popularity ranker's click and conversion probability of some items; unknown ones get the mean."""
        impressions, clicks, conversions = (
            self._of(self.items, "item_id", column, item_ids) for column in ("impressions", "clicks", "conversions")
        )
        total = {c: float(pc.sum(self.items[c]).as_py() or 0) for c in ("impressions", "clicks", "conversions")}
        ctr = total["clicks"] / max(total["impressions"], 1.0)
        cvr = total["conversions"] / max(total["clicks"], 1.0)
        return (
            (clicks + PRIOR_WEIGHT * ctr) / (impressions + PRIOR_WEIGHT),
            (conversions + PRIOR_WEIGHT * cvr) / (clicks + PRIOR_WEIGHT),
        )

    def item_impressions(self, item_ids: pa.Array) -> npt.NDArray[np.float64]:
        """Return how often each item was shown."""
        return self._of(self.items, "item_id", "impressions", item_ids)

    def user_impressions(self, user_ids: pa.Array) -> npt.NDArray[np.float64]:
        """Return how much each user was shown; 0 for a new one."""
        return self._of(self.users, "user_id", "impressions", user_ids)

    @staticmethod
    def _of(counts: pa.Table, key: str, column: str, ids: pa.Array) -> npt.NDArray[np.float64]:
        place = pc.index_in(ids, counts[key].combine_chunks().cast(ids.type))
        return pc.fill_null(counts[column].combine_chunks().take(place), 0).to_numpy(zero_copy_only=False).astype(float)


def _counts(files: list[str]) -> tuple[pa.Table, pa.Table]:
    """Return the counts per item and per user; a file at a time, so that memory holds one and the counts."""
    items, users = [], []
    for file in files:
        names = ["user_id", "candidates.item_id", "candidates.click", "candidates.conversion"]
        rows = read_leaves(file, names)
        lists = rows["candidates"].combine_chunks()
        shown = pc.list_flatten(lists)
        impressions = pa.table({name: pc.struct_field(shown, name) for name in ("item_id", "click", "conversion")})
        items.append(
            impressions.group_by("item_id").aggregate([([], "count_all"), ("click", "sum"), ("conversion", "sum")])
        )
        seen = pa.table({"user_id": rows["user_id"], "shown": pc.fill_null(pc.list_value_length(lists), 0)})
        users.append(seen.group_by("user_id").aggregate([("shown", "sum")]))
    columns = {"count_all": "impressions", "click_sum": "clicks", "conversion_sum": "conversions"}
    return (
        _summed(pa.concat_tables(items), "item_id", columns),
        _summed(pa.concat_tables(users), "user_id", {"shown_sum": "impressions"}),
    )


def _summed(parts: pa.Table, key: str, columns: dict[str, str]) -> pa.Table:
    total = parts.group_by(key).aggregate([(column, "sum") for column in columns])
    return pa.table({key: total[key], **{name: total[f"{column}_sum"] for column, name in columns.items()}})
