"""Every column and nested field of every table: a missing value, one out of range, one that is no number, is noticed.

What may be missing, and what has bounds, is written down here a second time: a suite that forgets one is found.  One
value of a valid day is broken at a time, its columns are profiled, and Great Expectations judges all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from expectations.judge import Judge
from expectations.profile import leaves, profile_batch
from expectations.reading import StagedFiles, column_table
from expectations.rules import COLUMN_KEY, columns_as_declared
from expectations.suites import SUITES
from onetrans.lake import Staged
from onetrans.settings import AuditSettings
from tests.audit_tables import DS, FACTORIES, ROWS, Row, audit_schema, valid_table

TRUTH = {"true_ctr", "true_cvr"}
EVENT = {f"seq_{name}{field}" for name in ("click", "purchase") for field in ("", ".event_item", ".event_price")}
MAY_BE_MISSING: dict[str, set[str]] = {
    "impressions": {"position", "surface", *TRUTH},
    "behaviors": {"price"},
    "user_features": {"segment"},
    "item_features": {"author_id", "price", "image"},
    "behavior_sequences": EVENT,
    "training_requests": {
        *("user", "segment", "user_ctr", "surface"),
        *EVENT,
        *(f"candidates.{name}" for name in ("position", "item", "author", "price", "image", *TRUTH)),
    },
    "candidate_scores": set(),
}
"""Features, and what a log need not know; all else names, orders or labels a row.  Counts and rates besides."""

COUNT = r"\w+_(impressions|clicks|conversions)_\d+d"
RATE = r"\w+_(ctr|cvr)_\d+d"
BOUNDS: tuple[tuple[str, float | None, float | None], ...] = (
    (rf"(item|user)_features\.{COUNT}", 0, None),
    (rf"(item|user)_features\.{RATE}", 0, 1),
    (r".*\bposition", 0, None),
    (r".*\btrue_(ctr|cvr)", 0, 1),
    (r".*\bimage\.length", 3, 3),
    (r"candidate_scores\.rank", 1, None),
    (r"candidate_scores\.(ctr|cvr|ctcvr)", 0, 1),
)
"""Column (a pattern), its smallest value and its largest."""

LEAVES = [
    (table, path, array.type)
    for table in FACTORIES
    for path, array in leaves(valid_table(table).combine_chunks().to_batches()[0])
]


def bounds(table: str, path: str) -> tuple[float | None, float | None]:
    found = [(low, high) for pattern, low, high in BOUNDS if re.fullmatch(pattern, f"{table}.{path}")]
    assert len(found) <= 1
    return found[0] if found else (None, None)


def missing() -> Iterator[tuple[str, str, Any]]:
    for table, path, _ in LEAVES:
        figure = table.endswith("_features") and re.fullmatch(f"{COUNT}|{RATE}", path)
        if path not in MAY_BE_MISSING[table] and not figure and not path.endswith(".length"):
            yield table, path, None


def empty() -> Iterator[tuple[str, str, Any]]:
    kinds = {(table, path): kind for table, path, kind in LEAVES}
    return ((table, path, "") for table, path, _ in missing() if pa.types.is_string(kinds[table, path]))


def too_small() -> Iterator[tuple[str, str, Any]]:
    return ((table, path, low - 1) for table, path, _ in LEAVES if (low := bounds(table, path)[0]) is not None)


def too_large() -> Iterator[tuple[str, str, Any]]:
    return ((table, path, high + 1) for table, path, _ in LEAVES if (high := bounds(table, path)[1]) is not None)


def not_finite() -> Iterator[tuple[str, str, Any]]:
    return ((table, path, np.nan) for table, path, kind in LEAVES if pa.types.is_floating(kind))


@pytest.mark.parametrize(
    ("broken", "fires"),
    [
        (missing, "keys, times, labels and the numbers of a list are never missing or empty"),
        (empty, "keys, times, labels and the numbers of a list are never missing or empty"),
        (too_small, "no number is below the smallest one its column allows"),
        (too_large, "no number is above the largest one its column allows"),
        (not_finite, "numbers are finite: neither NaN nor infinite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_value_is_noticed_in_every_column(broken: Any, fires: str) -> None:
    cases = list(broken())
    assert {table for table, _, _ in cases} >= {"item_features", "training_requests", "candidate_scores"}
    told = pd.concat([_told(*case) for case in cases], ignore_index=True)
    assert len(told) == len(cases)
    result = Judge().judge("columns", told, columns_as_declared(), COLUMN_KEY)
    fired = {
        str(outcome.expectation_config.description): outcome.result["unexpected_count"]
        for outcome in result.results
        if outcome.expectation_config is not None and not outcome.success
    }
    assert fired == {fires: len(cases)}, f"not all of these fired:\n{told.dropna(axis='columns').to_string()}"


def test_no_column_is_written_down_that_is_none() -> None:
    known = {f"{table}.{path}" for table, path, _ in LEAVES}
    assert {f"{table}.{path}" for table, paths in MAY_BE_MISSING.items() for path in paths} <= known
    assert all(any(re.fullmatch(pattern, path) for path in known) for pattern, _, _ in BOUNDS)


def _told(table: str, path: str, value: Any) -> pd.DataFrame:
    """Return what the audit's table of columns says of a column with one such value in it."""
    kinds, rows = FACTORIES[table]()
    _put(rows, path, value)
    (batch,) = pa.Table.from_pylist(rows, schema=kinds).combine_chunks().to_batches()
    files = StagedFiles(Staged(table, DS, "", ROWS), ("part-0.parquet",), (kinds,), ROWS, 0)
    settings = AuditSettings()
    columns = column_table(
        files,
        SUITES[table].columns(audit_schema()),
        profile_batch(batch),
        settings.max_missing_share,
        {},
        settings.max_shift,
    )
    return columns[columns["column"] == path].assign(column=f"{table}.{path}")


def _put(rows: list[Row], path: str, value: Any) -> None:
    """Put a value where the first one is."""
    name, _, inner = path.partition(".")
    row = next(row for row in rows if row[name] is not None and row[name] != [])
    if not inner:
        row[name] = value
    elif inner == "element":
        row[name] = [value, *row[name][1:]]
    elif inner == "length":
        row[name] = [1.0] * int(value)
    else:
        _put(row[name], inner, value)
