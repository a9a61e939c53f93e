"""Audits the staged day of a table: ``python -m expectations.audit TABLE --ds D``.

The audit reads exactly the files the manifest names, judges them by the table's
suite, writes a page of Data Docs, and leaves its verdict beside the files.  It
never touches what is published: that is left to ``onetrans publish``, which asks
for this verdict.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, Any

from onetrans.days import parse_day
from onetrans.errors import EXIT_OK, UNHARMED, BadDataError
from onetrans.lake import SCORES, TABLES, Lake
from onetrans.process import EXIT_CODES, Parser, exit_code_of, see
from onetrans.progress import long_steps
from onetrans.schema import FeatureSchema, load_schema
from onetrans.settings import AuditSettings, load_settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)


def audit_staged(
    lake: Lake,
    schema: FeatureSchema,
    table: str,
    ds: date,
    spark: SparkSession | None = None,
    settings: AuditSettings | None = None,
) -> dict[str, Any]:
    """Audit the staged files of one day and write the verdict beside them; return it.

    ``spark`` is a running session to use if the day is too large to be read here; without one, a session is
    started for such a day.  ``settings`` default to those of the process.  The verdict's ``passed`` is false if
    a critical expectation was not met.

    Raises:
        NotReadyError: if the day is not staged.
        BadDataError: if a staged file cannot be read; there is no verdict then, so the day cannot be published.
        BadConfigError: if there is no such table.
    """
    # Great Expectations takes seconds to import: a wrong argument should not cost them.
    from expectations import reading, rules
    from expectations.day import audit_day
    from expectations.docs import render_page
    from expectations.judge import CRITICAL, Judge, findings
    from expectations.site import Record, add_page, page_address, site_path
    from expectations.suites import suite_of
    from expectations.views import needed_columns, view_of

    began = time.monotonic()
    settings = settings or load_settings().audit
    suite = suite_of(table)
    day = audit_day(lake, schema, settings, lake.staged(table, ds))
    files = reading.open_staged(day.staged)
    declared = suite.columns(schema)

    # A row rule cannot be judged on a column that is not there; the rules of the columns say so.
    readable = files.has(needed_columns(table, schema), declared)
    view = view_of(table, schema, day.settled_before, day.known) if readable else None
    watched = day.watched
    in_memory = files.rows <= settings.max_rows_in_memory
    not_judged = []
    if in_memory and day.too_many:
        not_judged = [_too_many(key, settings) for key in day.too_many]
        day = replace(day, too_many={})
    if in_memory:
        profiles, rows = reading.read_here(files, view, watched)
    else:
        spark = spark or _start_spark()
        profiles, rows = reading.read_with_spark(files, view, watched, spark)
        if rows is not None and day.too_many:
            rows = reading.with_unknown(files, rows, day.too_many, spark)

    judge = Judge()
    columns = reading.column_table(
        files, declared, profiles, settings.max_missing_share, day.before, settings.max_shift
    )
    results = [judge.judge(f"{table} columns", columns, rules.columns_as_declared(), rules.COLUMN_KEY)]
    if rows is not None:
        results.append(judge.judge(f"{table} rows", rows, suite.expectations(day), suite.key))

    found = findings(results)
    critical = sum(finding.severity == CRITICAL for finding in found)
    outcome = "failed" if critical else "warning" if found else "passed"
    site = site_path(lake.settings, settings)
    verdict = {
        "table": table,
        "ds": str(ds),
        "passed": critical == 0,
        "critical": critical,
        "warnings": len(found) - critical,
        "evaluated": sum(len(result.results) for result in results),
        "rows": files.rows,
        "quarantined": day.staged.quarantined,
        "rows_judged": rows is not None,
        "not_judged": not_judged,
        "findings": [finding.to_dict() for finding in found],
        "distributions": {path: list(profiles[path].bins) for path in watched if path in profiles},
        "data_docs": page_address(site, settings.address, table, ds),
        "engine": "pandas" if in_memory else "spark",
        "seconds": round(time.monotonic() - began, 3),
    }
    verdict["failure"] = "" if verdict["passed"] else _failure(verdict)
    summary = _summary(verdict)
    record = Record(table, str(ds), outcome, files.rows, critical, len(found) - critical)
    add_page(site, record, render_page(f"{table} {ds}", outcome, summary, found, results))
    lake.write_verdict(day.staged, verdict)
    return verdict


def tell_warnings(verdict: dict[str, Any]) -> None:
    """Log what an audit found that does not stop the day, and what it could not judge."""
    for text in verdict["not_judged"]:
        logger.warning("%s %s: not judged: %s", verdict["table"], verdict["ds"], text)
    for finding in verdict["findings"]:
        if finding["severity"] != "critical":
            logger.warning("%s %s: %s", verdict["table"], verdict["ds"], _told(finding))


def _failure(verdict: dict[str, Any]) -> str:
    """Return the paragraph the on-call engineer reads when a day failed its audit."""
    broken = [_told(finding) for finding in verdict["findings"] if finding["severity"] == "critical"]
    return (
        f"{verdict['table']} {verdict['ds']}: {len(broken)} critical expectation{'s' * (len(broken) > 1)} not met. "
        f"{' | '.join(broken)}. {UNHARMED} Data Docs: {verdict['data_docs']} (the job that builds it, by hand: "
        f"python -m jobs.{verdict['table']} --ds {verdict['ds']})"
    )


def _told(finding: dict[str, Any]) -> str:
    from expectations.judge import Finding

    return str(Finding(**finding))


def _too_many(key: str, settings: AuditSettings) -> str:
    """Say that a rule is not in force: the ids are too many for memory, the day too small for a Spark session."""
    from expectations.day import FEATURES_OF

    return (
        f"whether each {key} has a row in {FEATURES_OF[key]}, which holds more rows than audit.max_rows_in_memory = "
        f"{settings.max_rows_in_memory:,}"
    )


def _summary(verdict: dict[str, Any]) -> str:
    unjudged = "" if verdict["rows_judged"] else "; the rows were not judged, because columns are not as declared"
    refused = (
        f"; {verdict['quarantined']:,} raw rows refused, see `onetrans quarantine list --table {verdict['table']} "
        f"--ds {verdict['ds']}`"
    )
    return (
        f"{verdict['rows']:,} rows, {verdict['evaluated']} expectations: {verdict['critical']} critical not met, "
        f"{verdict['warnings']} warnings{unjudged}{''.join(f'; not judged: {text}' for text in verdict['not_judged'])}"
        f"{refused if verdict['quarantined'] else ''}"
    )


def _start_spark() -> SparkSession:
    from jobs.spark import session

    return session(load_settings().spark, app="audit")


def main(argv: list[str] | None = None) -> int:
    """Audit one table's day; return the process's exit code (``onetrans/errors.py``)."""
    parser = Parser(
        prog="python -m expectations.audit",
        description=__doc__,
        epilog="example: python -m expectations.audit impressions --ds 2026-01-10\n"
        f"next:    onetrans publish impressions --ds 2026-01-10\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tables = (*TABLES, SCORES)
    parser.add_argument("table", metavar="TABLE", help=f"table whose staged day is audited: {', '.join(tables)}")
    parser.add_argument("--ds", required=True, metavar="DAY", help="the day, YYYY-MM-DD")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("onetrans.progress").setLevel(logging.INFO)
    return exit_code_of(lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> int:
    settings = load_settings()
    lake = Lake(settings.lake)
    ds = parse_day(arguments.ds)
    lake.staged(arguments.table, ds)
    with long_steps(None, f"audit of {arguments.table} {ds}"):
        verdict = audit_staged(lake, load_schema(settings.source), arguments.table, ds, settings=settings.audit)
    tell_warnings(verdict)
    see(verdict["data_docs"])
    if not verdict["passed"]:
        raise BadDataError(verdict["failure"])
    print(f"{arguments.table} {ds}: passed; {_summary(verdict)}; Data Docs: {verdict['data_docs']}")
    return EXIT_OK


if __name__ == "__main__":
    # The imports make a million objects that live until the end: looking for garbage among them costs a second.
    gc.disable()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()
    sys.exit(code)
