"""One page of Data Docs per audited day: what was not met, then every expectation as Great Expectations renders it.

Only the page of the day is rendered, so the time does not grow with the site.
The page carries its own style and no script: it can be read without a network,
and from any static file server.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from great_expectations.core.expectation_validation_result import (
    ExpectationSuiteValidationResult,
    expectationSuiteValidationResultSchema,
)
from great_expectations.render.renderer import ValidationResultsPageRenderer
from great_expectations.render.view import DefaultJinjaPageView

from expectations.judge import Finding
from expectations.site import TEMPLATES


class DayPageView(DefaultJinjaPageView):
    """Great Expectations' sections inside this project's page."""

    _template: ClassVar[str] = "day.j2"


def render_page(
    name: str,
    outcome: str,
    summary: str,
    findings: Sequence[Finding],
    results: Sequence[ExpectationSuiteValidationResult],
) -> str:
    """Return the page of an audited day; ``name`` is its title, ``results`` are shown as one."""
    content = ValidationResultsPageRenderer(run_info_at_end=True).render(_merge(name, results))
    # Its overview knows no severities: it would call a day failed that only has a warning.
    content.sections = [section for section in content.sections if section.section_name != "Overview"]
    view = DayPageView(custom_views_directory=str(TEMPLATES))
    return view.render(content, name=name, outcome=outcome, summary=summary, findings=findings)


def _merge(name: str, results: Sequence[ExpectationSuiteValidationResult]) -> ExpectationSuiteValidationResult:
    # Through JSON, as Great Expectations' own store does it: the renderers expect Python's numbers, not NumPy's.
    plain = [
        expectationSuiteValidationResultSchema.load(_readable(json.loads(json.dumps(result.to_json_dict()))))
        for result in results
    ]
    outcomes = [outcome for result in plain for outcome in result.results]
    met = sum(bool(outcome.success) for outcome in outcomes)
    return ExpectationSuiteValidationResult(
        success=met == len(outcomes),
        results=outcomes,
        suite_name=name,
        statistics={
            "evaluated_expectations": len(outcomes),
            "successful_expectations": met,
            "unsuccessful_expectations": len(outcomes) - met,
            "success_percent": 100.0 * met / len(outcomes),
        },
        meta=dict(plain[-1].meta),
    )


def _readable(result: dict[str, Any]) -> dict[str, Any]:
    """Join the values of rules of several columns, which Great Expectations writes without anything between them."""
    for outcome in result["results"]:
        for counted in outcome["result"].get("partial_unexpected_counts", ()):
            if isinstance(counted["value"], list):
                counted["value"] = ", ".join(map(str, counted["value"]))
    return result
