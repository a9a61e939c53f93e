"""The thin main every table's module shares: which days, which settings, and what an error looks like."""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

from py4j.protocol import Py4JError, Py4JNetworkError
from pyspark.errors import PySparkException

from jobs.progress import watched
from jobs.spark import jvm_exit_code
from jobs.workspace import Workspace
from onetrans.days import day_range, describe_days, parse_day
from onetrans.errors import EXIT_OK, UNHARMED, BadConfigError, BadDataError, NotReadyError, PipelineError
from onetrans.lake import Staged
from onetrans.lineage import describe_stale, stale_days
from onetrans.process import EXIT_CODES, Parser, exit_code_of, quiet_libraries
from onetrans.settings import load_settings

Build = Callable[[Workspace, date], Staged]

_JVM_ENDS_WITHIN_S = 5.0
"""How long a JVM may take to end that does not answer any more."""

_LOST = re.compile(
    r"^Caused by: (?:java\.net\.|javax\.net\.ssl\.|org\.apache\.http\.|org\.apache\.hadoop\.net\."
    r"|org\.apache\.hadoop\.fs\.s3a\.AWS|software\.amazon\.awssdk\.|\S+: (?:Input/output error|Stale file handle))",
    re.MULTILINE,
)
"""What Java says where a file could not be read because a connection or a disk failed."""

EXAMPLES = """examples:
  python -m jobs.{table} --ds 2026-01-10
  python -m jobs.{table} --from 2026-01-01 --to 2026-01-14 --publish
next, where days are not published here:
  python -m expectations.audit {table} --ds 2026-01-10
  onetrans publish {table} --ds 2026-01-10
"""
"""End of the help of a table's job."""

logger = logging.getLogger(__name__)


def main(table: str, build: Build, argv: list[str] | None = None) -> int:
    """Build one table for one day or a range of days in one session; return the exit code."""
    parser = Parser(
        prog=f"python -m jobs.{table}",
        description=f"{sys.modules[build.__module__].__doc__}\n\nStages one day or a range in one Spark session.",
        epilog=EXAMPLES.format(table=table) + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_days(parser)
    parser.add_argument(
        "--publish",
        action="store_true",
        help="audit and publish each day before the next is built; needed over a range of a table that reads "
        "its own previous day",
    )

    def run() -> None:
        arguments = parser.parse_args(argv)
        days = chosen_days(arguments)
        with telling(table), Opened() as work:
            try:
                for ds in present(work, days):
                    build_day(work, table, build, ds)
                    if arguments.publish:
                        audit_and_publish(work, table, ds)
            finally:
                if arguments.publish:
                    tell_stale(work, days[0])

    return guarded(run)


def add_days(parser: argparse.ArgumentParser) -> None:
    """Declare ``--ds`` and ``--from``/``--to``."""
    parser.add_argument("--ds", metavar="DAY", help="the day, YYYY-MM-DD")
    parser.add_argument("--from", dest="first", metavar="DAY", help="first day of a range")
    parser.add_argument("--to", dest="last", metavar="DAY", help="last day of the range, included")


def chosen_days(arguments: argparse.Namespace) -> list[date]:
    """Return the days asked for.

    Raises:
        BadConfigError: if it is neither one day nor one range.
    """
    if arguments.ds and not (arguments.first or arguments.last):
        return [parse_day(arguments.ds)]
    if arguments.first and arguments.last and not arguments.ds:
        return day_range(parse_day(arguments.first), parse_day(arguments.last))
    raise BadConfigError("give either --ds DAY, or --from DAY and --to DAY")


def present(work: Workspace, days: list[date]) -> list[date]:
    """Return the days of a range without those the log lost; one day asked for by itself is always tried."""
    absent = set(work.settings.source.absent_days) if len(days) > 1 else set()
    left_out = [ds for ds in days if ds in absent]
    if left_out:
        logger.info("%s left out, as source.absent_days says", describe_days(left_out))
    return [ds for ds in days if ds not in absent]


class Opened:
    """A workspace of this process's settings, its Spark session stopped at the end."""

    def __enter__(self) -> Workspace:
        self.work = Workspace.open(load_settings())
        return self.work

    def __exit__(self, *_: object) -> None:
        if jvm_exit_code() is None:
            self.work.spark.stop()


def build_day(work: Workspace, table: str, build: Build, ds: date) -> None:
    """Stage one day of a table.

    Raises:
        PipelineError: also where Spark failed, naming table and day.
    """
    with telling(f"{table} {ds}"), watched(work.spark.sparkContext, f"{table} {ds}"):
        build(work, ds)


def audit_and_publish(work: Workspace, table: str, ds: date) -> None:
    """Audit a staged day in this process, tell what it warns of, and publish the day.

    Raises:
        BadDataError: if the audit fails; the day stays unpublished.
    """
    audit = importlib.import_module("expectations.audit")
    with telling(f"{table} {ds}"):
        verdict = audit.audit_staged(work.lake, work.schema, table, ds, spark=work.spark, settings=work.settings.audit)
    audit.tell_warnings(verdict)
    work.lake.publish(table, ds)


def tell_stale(work: Workspace, first: date) -> None:
    """Log which published days after ``first`` rest on days that were replaced since."""
    told = describe_stale(stale_days(work.lake, after=first))
    if told:
        logger.warning("there are %s", told)


class SparkFailedError(PipelineError):
    """Spark gave up for a reason that is not in the data; running the step again can help."""


def guarded(run: Callable[[], None]) -> int:
    """Run a job and turn what goes wrong into one paragraph and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    quiet_libraries()

    def ran() -> int:
        with telling("the job"):
            run()
        return EXIT_OK

    return exit_code_of(ran)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Turn an error of Spark's into one of the pipeline that says ``what`` was being built.

    Raises:
        NotReadyError: if a file has vanished.
        BadDataError: if a file breaks only when its pages are read.
        SparkFailedError: for anything else, also a connection that is lost while a file is read, with the innermost
            reason in place of Java's stack.
    """
    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise _told(error, what) from error
    except ConnectionError as error:
        if jvm_exit_code(_JVM_ENDS_WITHIN_S) is None:
            raise  # It is another server's.
        raise _told(error, what) from error


def _told(error: Exception, what: str) -> PipelineError:
    code = jvm_exit_code(_JVM_ENDS_WITHIN_S if isinstance(error, Py4JNetworkError) else 0.0)
    if code is not None or "[JAVA_GATEWAY_EXITED]" in str(error):
        return SparkFailedError(f"{what}: {_jvm_gone(code)} {UNHARMED}")
    found = re.search(r"\[FAILED_READ_FILE[^\n]*", str(error))
    if found and "FILE_NOT_EXIST" in found[0]:
        return NotReadyError(f"{what}: a file vanished while it was read: {found[0]}")
    if found and not _LOST.search(str(error)):
        return BadDataError(f"{what}: a file is damaged: {found[0]}")
    return SparkFailedError(
        f"{what}: Spark failed: {_reason(error)}. {UNHARMED} Run the step again; if it fails "
        "with the same words, ONETRANS_TRACEBACK=1 shows Java's stack"
    )


def _jvm_gone(code: int | None) -> str:
    """Say that Spark's JVM has ended, how, and what to do; ``code`` is None if it ended before PySpark knew it."""
    memory = (
        "give the machine more memory, lower spark.driver_memory, or run fewer steps at once (airflow.spark_slots)."
    )
    if code is None:
        return (
            "Spark's JVM ended before it began to work. If the lines above do not say why (no Java 17, a wrong "
            f"option), the system has most likely killed it for want of memory: {memory}"
        )
    if code == -signal.SIGKILL:
        return f"Spark's JVM was killed, most likely by the system for want of memory: {memory}"
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"Spark's JVM ended {how} in the middle of its work; the lines above may say why."


def _reason(error: Exception) -> str:
    """Return Java's exception in a line: the first one, and the one it comes from; of Python's own the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    thrown = [line.lstrip(": ") for line in lines if re.match(r":? ?(?:[\w$]+\.)+[\w$]*(?:Error|Exception)\b", line)]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    found = list(dict.fromkeys([*(thrown[:1] or lines[:1]), *causes[-1:]])) or [type(error).__name__]
    return ", from ".join(text.rstrip(".") for text in found)
