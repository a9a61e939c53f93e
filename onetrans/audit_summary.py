"""What the audit said of all that a day's models rest on, as one table a person can read in the day's MLflow run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from onetrans.lake import Lake
from onetrans.plan import Plan

COLUMNS = ("table", "day", "outcome", "rows", "quarantined", "critical", "warnings", "not met", "data docs")


def audit_summary(lake: Lake, plan: Plan, verdicts: Mapping[str, Any]) -> str:
    """Return a line of CSV per audited day: what the plan reads, then the tables that its evaluation day was built of.

    ``verdicts`` are those on the folders the plan reads.  A version of a table that retention has removed since is left
    out, and a folder without a verdict is told as not audited.
    """
    found = {**verdicts, **_built_of(lake, plan)}
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(_line(lake, folder, verdict or {}) for folder, verdict in found.items())
    return lines.getvalue()


def _built_of(lake: Lake, plan: Plan) -> dict[str, Any]:
    """Return the verdicts on the versions of other tables that the evaluation day was built from, by folder."""
    found: dict[str, Any] = {}
    for folder in dict.fromkeys(file.rsplit("/", 1)[0] for file in plan.evaluation_files):
        built = lake.built(folder)
        if built is None:
            continue
        for table, snapshot in built.inputs.items():
            if lake.table(table).snapshot_by_id(snapshot) is None:
                continue
            read = lake.folders(table, built.reads.get(table, (built.ds,)), snapshot)
            found |= {inner: lake.verdict_in(inner) for inner in read.values()}
    return found


def _line(lake: Lake, folder: str, verdict: Mapping[str, Any]) -> list[Any]:
    built = lake.built(folder)
    findings = verdict.get("findings", ())
    if not verdict:
        outcome = "not audited"
    elif not verdict.get("passed"):
        outcome = "failed"
    else:
        outcome = "warning" if findings else "passed"
    told = [f"{finding['severity']}: {finding['expected']} ({finding['observed']})" for finding in findings]
    return [
        built.table if built else "",
        built.ds if built else folder,
        outcome,
        verdict.get("rows", ""),
        verdict.get("quarantined", ""),
        verdict.get("critical", ""),
        verdict.get("warnings", ""),
        "; ".join(told),
        verdict.get("data_docs", ""),
    ]
