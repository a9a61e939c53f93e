"""How a feature's values are spread over bins, and how far a day's spread lies from that of the days before.

The bins are those a model sees: a bucketized feature's own buckets, and for an
id or category 32 classes of its hash; the first bin counts missing values.
Counts have a fixed size and add up, so they are taken batch by batch, anywhere.

The distance is the population stability index, sum of (p - q) ln(p / q) over the
bins: 0.1 is called a moderate and 0.25 a large shift in credit scoring, where it
comes from (Siddiqi, Credit Risk Scorecards, 2006).  By chance alone it is about
chi-square with B - 1 degrees of freedom times (1/n + 1/m) for samples of n and m
values in B bins (Yurdakul and Naranjo, 2020), so a small day is given more room.

Shape suffix: B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from onetrans.schema import CONTEXT_FROM_CLOCK, Feature, FeatureSchema, hash64

CLASSES = 32
"""Classes of a hash."""

LABEL_BOUNDARIES = (0.5,)
"""A label's bins: missing, 0, 1."""

Ints = npt.NDArray[np.int64]

_IDS = ("user_id", "item_id")
_STORED_SIDE = {
    "impressions": "context",
    "behaviors": "event",
    "user_features": "user",
    "item_features": "item",
}


@dataclass(frozen=True)
class Bins:
    """How the values of one column are counted."""

    boundaries: tuple[float, ...] = ()
    """Cut points of a number; empty: classes of a hash."""
    label: bool = False
    """A label: its rate is judged, not its shift."""
    computed: bool = False
    """A count or rate over a window, which is not steady until the log is as old as the window."""

    @property
    def size(self) -> int:
        """Number of bins, that of missing values included."""
        return len(self.boundaries) + 2 if self.boundaries else CLASSES + 1


def bins_of(table: str, schema: FeatureSchema) -> dict[str, Bins]:
    """Return the columns of a table whose spread is watched, by path: features and labels, no ids, clocks, vectors."""
    if table == "training_requests":
        watched = {f.name: _bins(f, schema) for f in (*schema.of_side("user"), *schema.of_side("context"))}
        watched |= {f"candidates.{f.name}": _bins(f, schema) for f in schema.of_side("item")}
        watched |= {f"candidates.{name}": Bins(LABEL_BOUNDARIES, label=True) for name in ("click", "conversion")}
        return {path: bins for path, bins in watched.items() if bins is not None}
    side = _STORED_SIDE.get(table)
    found = {f.column: _bins(f, schema) for f in schema.features if f.side == side}
    if table == "behaviors":
        found["type"] = Bins()
    if table == "impressions":
        found |= {name: Bins(LABEL_BOUNDARIES, label=True) for name in ("click", "conversion")}
    return {path: bins for path, bins in found.items() if bins is not None}


def _bins(feature: Feature, schema: FeatureSchema) -> Bins | None:
    # The clock goes round by itself, and an id's spread is that of the traffic.
    if feature.kind == "vector" or feature.column in (*_IDS, *CONTEXT_FROM_CLOCK):
        return None
    keys = ("user", "item", *schema.aggregates.item_keys)
    computed = any(feature.column in schema.aggregates.columns(key) for key in keys)
    return Bins(feature.boundaries, computed=computed)


def count(array: pa.Array, bins: Bins) -> Ints:
    """Return how many values of a column lie in each bin, those missing first."""
    missing = pc.is_null(array, nan_is_null=True).to_numpy(zero_copy_only=False)
    if bins.boundaries:
        numbers = pc.fill_null(array.cast(pa.float64()), math.nan).to_numpy(zero_copy_only=False)
        places = np.searchsorted(np.asarray(bins.boundaries), numbers, side="right") + 1
    elif pa.types.is_integer(array.type):
        places = pc.fill_null(array, 0).to_numpy(zero_copy_only=False) % CLASSES + 1
    else:
        text = array.cast(pa.string()).dictionary_encode()
        missing |= pc.equal(pc.fill_null(pc.binary_length(array.cast(pa.string())), 0), 0).to_numpy(
            zero_copy_only=False
        )
        classes = np.array([hash64(value) % CLASSES + 1 for value in text.dictionary.to_pylist()] or [0])
        places = classes[pc.fill_null(text.indices, 0).to_numpy(zero_copy_only=False)]
    return np.bincount(np.where(missing, 0, places), minlength=bins.size).astype(np.int64)


def shift(today_B: Ints, before_B: Ints) -> tuple[float, float]:
    """Return the population stability index of two samples, and what chance alone explains of it (four sigma)."""
    used_B = (today_B + before_B) > 0
    n, m, size = int(today_B.sum()), int(before_B.sum()), int(used_B.sum())
    if not (n and m and size > 1):
        return 0.0, 0.0
    # Half a value in every bin: an empty bin would make the index infinite.
    p_B, q_B = ((counts[used_B] + 0.5) / (counts.sum() + 0.5 * size) for counts in (today_B, before_B))
    index = float(((p_B - q_B) * np.log(p_B / q_B)).sum())
    return index, (size - 1 + 4 * math.sqrt(2 * (size - 1))) * (1 / n + 1 / m)


def rate(distributions: Mapping[str, tuple[int, ...]], label: str) -> float | None:
    """Return the share of ones of a label; None if it was not counted, or there is nothing to count."""
    counted = distributions.get(label)
    return counted[2] / (counted[1] + counted[2]) if counted and counted[1] + counted[2] else None
