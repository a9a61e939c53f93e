"""The suite of every table: its declared columns, its key and its rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from great_expectations.expectations.expectation import Expectation

from expectations import (
    behavior_sequences,
    behaviors,
    candidate_scores,
    impressions,
    item_features,
    training_requests,
    user_features,
)
from expectations.columns import Column
from expectations.day import AuditDay
from onetrans.errors import BadConfigError
from onetrans.schema import FeatureSchema


@dataclass(frozen=True)
class TableSuite:
    """What one table's module declares."""

    key: tuple[str, ...]
    """Columns that name a row; shown beside every example."""
    columns: Callable[[FeatureSchema], list[Column]]
    """Declared columns."""
    expectations: Callable[[AuditDay], list[Expectation]]
    """Rules of the rows."""

    @classmethod
    def of(cls, module: ModuleType) -> TableSuite:
        """Read a table's module."""
        return cls(module.KEY, module.columns, module.expectations)


SUITES: dict[str, TableSuite] = {
    "impressions": TableSuite.of(impressions),
    "behaviors": TableSuite.of(behaviors),
    "user_features": TableSuite.of(user_features),
    "item_features": TableSuite.of(item_features),
    "behavior_sequences": TableSuite.of(behavior_sequences),
    "training_requests": TableSuite.of(training_requests),
    "candidate_scores": TableSuite.of(candidate_scores),
}
"""Suites by table."""


def suite_of(table: str) -> TableSuite:
    """Return a table's suite.

    Raises:
        BadConfigError: if there is no such table.
    """
    if table not in SUITES:
        raise BadConfigError(f"there is no suite for {table!r}; audited tables are {', '.join(SUITES)}")
    return SUITES[table]
