"""The one place a Spark session is made.

Every step of a day is a process of its own, so a session must start fast: on
two cores the JVM spends most of a short job loading and compiling classes.  The
flags below keep it to the quick compiler, and ``python -m jobs.spark`` writes a
class-data archive once per environment that nearly halves what is left.  With 4 GiB
of driver memory or more a job is taken for a long one, and Java's full compiler and
parallel collector are left on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

from pyspark import SparkContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from onetrans.errors import EXIT_OK
from onetrans.object_store import access
from onetrans.process import EXIT_CODES, Parser, exit_code_of
from onetrans.settings import SparkSettings, load_settings

_LOCAL_JVM = (
    "-XX:TieredStopAtLevel=1",
    "-XX:ReservedCodeCacheSize=240m",  # with the quick compiler alone the default of 48 MB is full after three days
    "-XX:+UseSerialGC",
    "-XX:-UsePerfData",
    "-Xss4m",
)
_LARGE_JVM = ("-XX:+UseParallelGC", "-XX:-UsePerfData", "-Xss4m")
_LARGE_FROM_MIB = 4096
_ARCHIVE_QUIET = ("-Xshare:auto", "-Xlog:disable", "-Xlog:all=error:stderr")  # an archive that does not fit is ignored

_LOG4J = """\
rootLogger.level = error
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{yyyy-MM-dd HH:mm:ss} %p %c{1}: %m%n
# Without a level of its own this one sets the root logger to "warn" and says so at every start.
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = error
# A task that fails reaches the job as an exception, which is told once; these four tell it in hundreds of lines.
logger.executor.name = org.apache.spark.executor.Executor
logger.executor.level = off
logger.tasks.name = org.apache.spark.scheduler.TaskSetManager
logger.tasks.level = off
logger.writer.name = org.apache.spark.sql.execution.datasources.FileFormatWriter
logger.writer.level = off
logger.utils.name = org.apache.spark.util.Utils
logger.utils.level = off
"""


def archive_path() -> Path:
    """Return where this environment keeps its class-data archive: beside the packages it speaks of."""
    return Path(sysconfig.get_paths()["purelib"]) / "pyspark" / "onetrans-classes.jsa"


def session(settings: SparkSettings | None = None, app: str = "onetrans") -> SparkSession:
    """Return the process's Spark session, started if there is none: UTC, microseconds, no UI, loopback only."""
    return _start(settings or load_settings().spark, app, write_archive=None)


def jvm_exit_code(wait_s: float = 0.0) -> int | None:
    """Return how this process's JVM ended, minus the signal's number when a signal did it; None: it runs, or never did.

    Args:
        wait_s: seconds to wait for its end: one that is killed refuses connections a moment before it is gone.
    """
    process = getattr(SparkContext._gateway, "proc", None)
    if process is None:
        return None
    with suppress(subprocess.TimeoutExpired):
        process.wait(wait_s)
    return process.returncode


def _start(settings: SparkSettings, app: str, write_archive: Path | None) -> SparkSession:
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    local = settings.master.startswith("local")
    properties = {
        "spark.driver.memory": settings.driver_memory,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.parquet.compression.codec": "zstd",
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        # Few files of moderate size: a shuffle's partitions are merged until they hold this much.
        "spark.sql.adaptive.coalescePartitions.parallelismFirst": "false",
        "spark.sql.adaptive.advisoryPartitionSizeInBytes": "64m",
        # Nothing reads a folder until its manifest is written, so the slower, atomic committer buys nothing.
        "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
        "spark.hadoop.mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
        "spark.sql.sources.parallelPartitionDiscovery.threshold": "10000",
        # To stay below a limit of bytes Spark would measure the whole batch after each row, lists and all.
        "spark.sql.execution.arrow.maxBytesPerBatch": str(2**31 - 1),
        "spark.sql.execution.arrow.maxRecordsPerBatch": "2000",
        **access().spark(),
    }
    if local:
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        os.environ.setdefault("SPARK_LAUNCHER_OPTS", " ".join(_LOCAL_JVM))
        properties |= {
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.extraJavaOptions": " ".join(_java_options(settings.driver_memory, write_archive)),
        }
    builder = SparkSession.builder.master(settings.master).appName(app)
    for name, value in (properties | dict(settings.conf)).items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def _local_jvm(driver_memory: str) -> tuple[str, ...]:
    """Return Java's options for a driver of so much memory, written as Spark writes it: ``900m``, ``4g``."""
    number, unit = driver_memory[:-1], driver_memory[-1:].lower()
    mib = {"m": 1, "g": 1024, "t": 1024**2}.get(unit, 0) * int(number) if number.isdigit() else 0
    return _LARGE_JVM if mib >= _LARGE_FROM_MIB else _LOCAL_JVM


def _java_options(driver_memory: str, write_archive: Path | None) -> list[str]:
    log4j = Path(tempfile.gettempdir()) / f"onetrans-log4j2-{os.getuid()}.properties"
    if not log4j.exists() or log4j.read_text(encoding="utf-8") != _LOG4J:
        partial = log4j.with_suffix(f".{os.getpid()}")
        partial.write_text(_LOG4J, encoding="utf-8")
        partial.replace(log4j)
    options = [*_local_jvm(driver_memory), f"-Dlog4j2.configurationFile={log4j.as_uri()}", *_ARCHIVE_QUIET]
    if write_archive is not None:
        options.append(f"-XX:ArchiveClassesAtExit={write_archive}")
    elif archive_path().exists():
        options.append(f"-XX:SharedArchiveFile={archive_path()}")
    return [_quoted(option) for option in options]


def _quoted(option: str) -> str:
    """Return an option as one word of Spark's option text: a folder's name may hold blanks."""
    if not any(letter in option for letter in " \t\"'\\"):
        return option
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_archive() -> Path:
    """Write the class-data archive of this environment: run typical work once, keep the classes it loaded.

    It takes about 20 seconds and 170 MB of disk, and saves 4 of the 11 seconds of a short job.
    """
    target = archive_path()
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    spark = _start(SparkSettings(), "class-data archive", write_archive=partial)
    with tempfile.TemporaryDirectory() as folder:
        _typical_work(spark, folder)
    gateway = spark.sparkContext._gateway
    assert gateway is not None  # a classic session always has one
    process = gateway.proc
    spark.stop()
    # The JVM writes the archive as it ends, and it ends when its input is closed.
    process.stdin.close()
    process.wait(timeout=300)
    partial.replace(target)
    return target


def _typical_work(spark: SparkSession, folder: str) -> None:
    events = spark.range(1000).select(
        (F.col("id") % 50).cast("string").alias("user_id"),
        F.timestamp_micros(F.col("id")).alias("ts"),
        F.xxhash64(F.col("id").cast("string")).alias("event_id"),
        (F.col("id") / 7).alias("price"),
        F.to_date(F.lit("2022-05-04")).alias("ds"),
    )
    events.write.parquet(f"{folder}/events")
    events.write.csv(f"{folder}/csv", header=True)
    events.write.json(f"{folder}/json")
    text = spark.read.csv(f"{folder}/csv", header=True).unionByName(
        spark.read.schema(spark.read.csv(f"{folder}/csv", header=True).schema).json(f"{folder}/json")
    )
    read = spark.read.schema(events.schema).parquet(f"{folder}/events")
    collected: DataFrame = read.groupBy("user_id").agg(
        F.sort_array(F.collect_list(F.struct("ts", "event_id", "price"))).alias("events"),
        F.min("ts").alias("first"),
        F.sum("price").alias("total"),
    )
    joined = collected.join(text.groupBy("user_id").agg(F.count("*").alias("n")), "user_id", "full_outer")
    past = F.filter("events", lambda e: e["ts"] < F.col("first"))
    joined = joined.withColumn("events", F.slice(past, 1, 5)).withColumn("raw", F.to_json(F.struct("user_id")))
    joined.sortWithinPartitions("first").write.parquet(f"{folder}/out")


def main(argv: list[str] | None = None) -> int:
    """Write the archive, and say where; return the exit code."""
    parser = Parser(
        prog="python -m jobs.spark",
        description="Write the archive of classes that lets Spark start in half the time: once per environment; "
        "`make env` and the image of Airflow do.",
        epilog=f"examples:\n  python -m jobs.spark\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def run() -> int:
        parser.parse_args(argv)
        print(f"wrote {write_archive()}")
        return EXIT_OK

    return exit_code_of(run)


if __name__ == "__main__":
    raise SystemExit(main())
