"""Runs Great Expectations on the two tables of a day (its columns and its rows) and turns results into findings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import great_expectations as gx
import numpy as np
import pandas as pd
from great_expectations.core.expectation_validation_result import (
    ExpectationSuiteValidationResult,
    ExpectationValidationResult,
)
from great_expectations.data_context.types.base import (
    DataContextConfig,
    InMemoryStoreBackendDefaults,
    ProgressBarsConfig,
)
from great_expectations.expectations.expectation import Expectation
from great_expectations.expectations.metadata_types import FailureSeverity

from expectations.rules import COLUMN_KEY

if TYPE_CHECKING:
    from pyspark.sql import DataFrame as SparkDataFrame

CRITICAL = FailureSeverity.CRITICAL.value
"""Severity, as text, of what stops a day."""

EXAMPLES = 5
"""Examples kept of each failed expectation."""


@dataclass(frozen=True)
class Finding:
    """One expectation that was not met."""

    severity: str
    """``critical`` stops the day; ``warning`` does not."""
    column: str
    """Column, or columns, it speaks of."""
    expected: str
    """What should have been, as a sentence."""
    observed: str
    """What was seen instead."""
    examples: list[dict[str, Any]]
    """Rows (or columns) that break it, each with its key."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the verdict."""
        return asdict(self)

    @property
    def told_examples(self) -> list[str]:
        """The examples, each written for a person."""
        return [", ".join(f"{name} = {value}" for name, value in row.items()) for row in self.examples]

    def __str__(self) -> str:
        example = f", for example ({self.told_examples[0]})" if self.examples else ""
        return f"{self.column}: expected that {self.expected}; {self.observed}{example}"


class Judge:
    """A Great Expectations context of this process alone: nothing is written, nothing leaves the machine."""

    def __init__(self) -> None:
        # Its own log repeats what the findings say.
        logging.getLogger("great_expectations").setLevel(logging.ERROR)
        config = DataContextConfig(
            # Not even a temporary folder for pages: they are written by expectations/docs.py.
            store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
            progress_bars=ProgressBarsConfig(globally=False, metric_calculations=False),
            analytics_enabled=False,
        )
        self._context = gx.get_context(project_config=config, mode="ephemeral")

    def judge(
        self,
        name: str,
        data: pd.DataFrame | SparkDataFrame,
        rules: Sequence[Expectation],
        key: Sequence[str],
    ) -> ExpectationSuiteValidationResult:
        """Validate ``data`` against ``rules``; examples of a failure carry the columns of ``key``."""
        sources = self._context.data_sources
        here = isinstance(data, pd.DataFrame)
        source = sources.add_or_update_pandas("here") if here else sources.add_or_update_spark("spark")
        definition = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("day")
        result_format = {"result_format": "SUMMARY", "partial_unexpected_count": EXAMPLES}
        if not here:
            result_format["unexpected_index_column_names"] = list(key)
        result = definition.get_batch(batch_parameters={"dataframe": data}).validate(
            gx.ExpectationSuite(name=name, expectations=list(rules)), result_format=result_format
        )
        if here:
            _add_keys(result, data, key)
        return result


def _add_keys(result: ExpectationSuiteValidationResult, data: pd.DataFrame, key: Sequence[str]) -> None:
    """Turn the places of examples into rows with their key.

    Great Expectations can do so itself, but goes through every failing row: a minute for a day that is all wrong.
    """
    for outcome in result.results:
        places = outcome.result.get("partial_unexpected_index_list")
        if places:
            shown = list(dict.fromkeys([*_columns_of(outcome), *key]))
            outcome.result["partial_unexpected_index_list"] = data.loc[places, shown].to_dict("records")


def _columns_of(outcome: ExpectationValidationResult) -> list[str]:
    """Return the columns an outcome's expectation speaks of."""
    if outcome.expectation_config is None:
        raise RuntimeError("an outcome without its expectation")
    kwargs = outcome.expectation_config.kwargs
    columns = [kwargs[name] for name in ("column", "column_A", "column_B") if name in kwargs]
    return [*columns, *kwargs.get("column_list", [])]


def findings(results: Sequence[ExpectationSuiteValidationResult]) -> list[Finding]:
    """Return what was not met, the critical ones first.

    Raises:
        RuntimeError: if an expectation could not be evaluated at all, which is a defect of the suite.
    """
    found = [finding_of(outcome) for result in results for outcome in result.results if not outcome.success]
    return sorted(found, key=lambda finding: finding.severity != CRITICAL)


def finding_of(outcome: ExpectationValidationResult) -> Finding:
    """Return a failed expectation as a finding.

    Raises:
        RuntimeError: if it failed because it could not be evaluated.
    """
    config, seen = outcome.expectation_config, outcome.result
    if config is None or (outcome.exception_info or {}).get("raised_exception", True):
        raise RuntimeError(f"an expectation could not be evaluated: {config}: {outcome.exception_info}")
    columns = _columns_of(outcome)
    examples = [_plain(row) for row in (seen.get("partial_unexpected_index_list") or [])[:EXAMPLES]]
    unit = "rows"
    if any(COLUMN_KEY[0] in example for example in examples):
        # The rules of the table of columns: what is meant is the column an example names.
        unit = "columns"
        told = COLUMN_KEY if "found" in columns else (COLUMN_KEY[0], *columns)
        examples = [{name: example[name] for name in told if name in example} for example in examples]
        columns = sorted({str(example[COLUMN_KEY[0]]) for example in examples})
    if "unexpected_count" in seen:
        observed = f"not so in {seen['unexpected_count']:,} of {seen['element_count']:,} {unit}"
    else:
        observed = f"seen: {_in_unit(seen.get('observed_value'), config.description or '')}"
    return Finding(
        severity=severity_of(outcome),
        column=", ".join(columns) or "the table",
        expected=config.description or config.type,
        observed=observed,
        examples=examples,
    )


def severity_of(outcome: ExpectationValidationResult) -> str:
    """Return the severity of an outcome's expectation, ``critical`` or ``warning``."""
    if outcome.expectation_config is None:
        raise RuntimeError("an outcome without its expectation")
    return FailureSeverity(outcome.expectation_config.severity).value


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in row.items() if not pd.isna(value)}


def _in_unit(value: Any, expected: str) -> Any:
    """Return what was seen as the expectation's own sentence writes its bounds: a share of 1 is 100 %, not one."""
    share = "%" in expected and isinstance(value, int | float)
    return f"{value:.2%}" if share else _value(value)


def _value(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else round(float(value), 6)
    if value is pd.NaT:
        return "nothing"
    if isinstance(value, datetime):
        # Spark hands out local times without a zone, which is what astimezone takes them for.
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f} UTC"
    if isinstance(value, np.integer):
        return int(value)
    return value if isinstance(value, int | str | list) else str(value)
