"""A column's profile: how many values, how many missing, the smallest, the largest, counts per bin; one pass.

Batches are profiled one at a time and merged, so memory stays that of a batch,
and the parts of a large table can be profiled wherever they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from expectations.columns import is_vector
from expectations.distribution import Bins, count


@dataclass(frozen=True)
class Profile:
    """Figures of one column, or nested field, over some rows."""

    values: int = 0
    """Values looked at; of a nested field, the elements of all lists."""
    missing: int = 0
    """Nulls and, in text, empty strings."""
    not_finite: int = 0
    """NaN or infinite numbers."""
    smallest: float = math.inf
    """Smallest finite number; infinity if there is none."""
    largest: float = -math.inf
    """Largest finite number; minus infinity if there is none."""
    bins: tuple[int, ...] = ()
    """Values per bin (:mod:`expectations.distribution`); empty where the spread is not watched."""

    def merge(self, other: Profile) -> Profile:
        """Return the figures over both sets of rows."""
        return Profile(
            self.values + other.values,
            self.missing + other.missing,
            self.not_finite + other.not_finite,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
            tuple(map(sum, zip(self.bins, other.bins, strict=True))) if self.bins else other.bins,
        )

    def to_list(self) -> list[float]:
        """Return the figures as numbers, the bins last."""
        return [self.values, self.missing, self.not_finite, self.smallest, self.largest, *self.bins]

    @classmethod
    def from_list(cls, figures: list[float]) -> Profile:
        """Read what :meth:`to_list` wrote."""
        values, missing, not_finite, smallest, largest, *bins = figures
        return cls(int(values), int(missing), int(not_finite), smallest, largest, tuple(int(n) for n in bins))


def profile_batch(batch: pa.RecordBatch, watched: Mapping[str, Bins] | None = None) -> dict[str, Profile]:
    """Profile every column and nested field of one batch, by path; those ``watched`` with counts per bin."""
    watched = watched or {}
    return {
        path: replace(_profile(array), bins=tuple(count(array, watched[path]).tolist()))
        if path in watched and _countable(array.type)
        else _profile(array)
        for path, array in leaves(batch)
    }


def _countable(kind: pa.DataType) -> bool:
    """Tell whether a column of this type can be counted; one that is not as declared is told by another rule."""
    return pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def merge_profiles(parts: Iterable[dict[str, Profile]]) -> dict[str, Profile]:
    """Merge the profiles of the parts of a table."""
    merged: dict[str, Profile] = {}
    for part in parts:
        for path, profile in part.items():
            merged[path] = merged.get(path, Profile()).merge(profile)
    return merged


def leaves(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.Array]]:
    """Yield every column, every field of a list of structs, and numbers and lengths of lists of numbers, by path."""
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        yield from _parts(name, array)


def _parts(path: str, array: pa.Array) -> Iterator[tuple[str, pa.Array]]:
    yield path, array
    if is_vector(array.type):
        yield f"{path}.element", array.flatten()
        yield f"{path}.length", array.value_lengths().drop_null()
    elif pa.types.is_list(array.type) and pa.types.is_struct(array.type.value_type):
        elements = array.flatten()
        for index, child in enumerate(elements.flatten()):
            yield from _parts(f"{path}.{elements.type.field(index).name}", child)


def _profile(array: pa.Array) -> Profile:
    missing = array.null_count
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        missing += pc.sum(pc.equal(pc.binary_length(array), 0), min_count=0).as_py()
    if not (pa.types.is_floating(array.type) or pa.types.is_integer(array.type)):
        return Profile(len(array), missing)
    not_finite = 0
    if pa.types.is_floating(array.type):
        finite = pc.is_finite(array)
        not_finite = pc.sum(pc.invert(finite), min_count=0).as_py()
        array = array.filter(finite) if not_finite else array
        bounds = pc.min_max(array)
        return Profile(len(finite), missing, not_finite, *_floats(bounds))
    return Profile(len(array), missing, 0, *_floats(pc.min_max(array)))


def _floats(bounds: pa.StructScalar) -> tuple[float, float]:
    low, high = bounds["min"].as_py(), bounds["max"].as_py()
    return (math.inf if low is None else float(low), -math.inf if high is None else float(high))
