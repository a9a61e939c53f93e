"""What the tables of a day cost by its size, and what a skewed day costs more; against windows in Spark, and DuckDB.

    python -m benchmarks.tables [--quick] [--json FILE] [--rows N,N,...] [--skewed-rows N] [--driver-memory 4g]
                                [--history-days N] [--sequences-only] [--costs FILE]

For each size (rows of a day's log, impressions and behaviours together; default: 100,000, a million and ten million)
a simulated log is written, its first day is built, and the jobs of the second are measured, in a process of
their own.  Processor time stands beside time on the clock: other work on the machine disturbs it less, so promises
about growth and about comparisons are made of it.  Ten million rows take an hour: ``--costs`` keeps each figure
as soon as it is known.

*Request sequences* are the costly part of ``training_requests``: for each request the last events of each kind that
were known before it, from yesterday's tails and today's events.  Three programs make the same table of the same
files: the jobs; a plain build with Spark's window functions, in which each request is joined with its user's events
and ``row_number`` keeps the last; and DuckDB, as one would write it on one machine (``pip install '.[bench]'``;
without it that part is left out).  Their tables are compared.

The skewed days have twice the impressions and four times the events of the day they are made from (at a million rows,
a million events more).  In the even one the added rows are spread over all users and items; in the others one user made
all added events, three quarters of the day's, and a hundredth of the added requests, or one item is in all added
impressions, half of the day's.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from benchmarks.common import Report, commit, parser
from infra.local.watch import MemoryWatch, ProcessorWatch
from jobs.arrow_files import write_partitions
from jobs.encoding import stored_all
from jobs.past_events import DECIDING
from jobs.sources.files import Files
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE, write_days
from jobs.spark import session
from jobs.training_requests import of_those_who_ask, with_past
from jobs.workspace import Workspace
from onetrans import storage
from onetrans.lake import TABLES, Lake
from onetrans.schema import FeatureSchema
from onetrans.settings import LakeSettings, Settings, SourceSettings, SparkSettings

SIZES = (100_000, 1_000_000, 10_000_000)
QUICK_SIZES = (20_000,)
FIRST = date(2026, 1, 1)
DAY = FIRST + timedelta(days=1)
HISTORY_DAYS = 2
"""Days of events before the log's first day, unless asked for others."""
LENGTHS = (64, 32, 32)
SKEWED_ROWS = 1_000_000
"""Size whose day is skewed."""

_REQUESTS_PER_USER = 2.0
_ROWS_PER_USER = 31
_GIB = 2**30
_GROWTH = "<= 1.1"
_AGAINST_WINDOWS = ">= 4"
_SKEW = "<= 1.5"


@dataclass(frozen=True)
class Cost:
    """What some work cost."""

    rows: int
    """Rows that it read."""
    seconds: float
    """Time on the clock."""
    processor_s: float
    """Processor time of this process and all under it."""
    peak: int
    """Largest memory of them, in bytes."""
    stored: int = 0
    """Bytes of what it wrote, where that is a day of a table."""


@dataclass(frozen=True)
class Measured:
    """Everything measured of one size."""

    rows: int
    """Rows of the day's log."""
    jobs: dict[str, Cost]
    """Table -> its job."""
    sequences: dict[str, Cost]
    """Program -> what the same request sequences cost it."""
    skewed: dict[str, dict[str, Cost]]
    """Kind of day -> table -> its job."""


@dataclass(frozen=True)
class Costs:
    """Where costs are told as soon as they are known: a long run that is ended early is not lost."""

    rows: int
    """Rows of a day."""
    file: Path | None
    """File that gets a line of JSON for each."""

    def tell(self, case: str, cost: Cost) -> None:
        """Tell what something cost."""
        said(f"{case}: {cost.seconds:.1f} s, processor time {cost.processor_s:.1f} s, {cost.peak / _GIB:.2f} GiB")
        if self.file:
            line = {"commit": commit(), "day_rows": self.rows, "case": case, **asdict(cost)}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--rows", help="sizes, separated by commas")
    options.add_argument("--driver-memory", default="4g", help="heap of Spark (default: %(default)s)")
    options.add_argument(
        "--skewed-rows", type=int, default=SKEWED_ROWS, help="size whose day is skewed; 0: none (default: %(default)s)"
    )
    options.add_argument("--costs", metavar="FILE", type=Path, help="append every cost to FILE once it is measured")
    options.add_argument(
        "--history-days",
        type=int,
        default=HISTORY_DAYS,
        help="days of events before the first day, which fill the tails (default: %(default)s)",
    )
    options.add_argument(
        "--sequences-only",
        action="store_true",
        help="measure the request sequences and the two tables they are made of, not the other four jobs",
    )
    options.add_argument("--one", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    sizes: tuple[int, ...] = QUICK_SIZES if arguments.quick else SIZES
    if arguments.rows:
        sizes = tuple(int(text) for text in arguments.rows.split(","))
    if arguments.one:
        costs = Costs(sizes[0], arguments.costs)
        skewed = arguments.skewed_rows == sizes[0]
        tables = TABLES[:2] if arguments.sequences_only else TABLES
        one = measure(arguments.one, costs, arguments.driver_memory, arguments.history_days, tables, skewed=skewed)
        (arguments.one / "measured.json").write_text(json.dumps(asdict(one)), encoding="utf-8")
        return 0
    report = Report("tables", arguments)
    found = []
    for rows in sizes:
        memory = "1g" if arguments.quick else arguments.driver_memory
        more = ["--sequences-only"] if arguments.sequences_only else []
        found.append(apart(rows, memory, arguments.skewed_rows, arguments.history_days, arguments.costs, more))
        tell(report, found[-1])
    for smaller, larger in itertools.pairwise(found):
        grown = math.log(larger.rows / smaller.rows)
        for figure, expected in (("processor_s", _GROWTH), ("seconds", "")):
            ratio = total(larger.jobs, figure) / total(smaller.jobs, figure)
            name = "growth exponent, " + ("processor time" if expected else "time")
            report.add(f"{smaller.rows:,} to {larger.rows:,} rows", name, math.log(ratio) / grown, "", expected)
    return report.finish()


def apart(
    rows: int, driver_memory: str, skewed_rows: int, history_days: int, costs: Path | None, more: list[str]
) -> Measured:
    """Measure one size in a process of its own, so that a peak of memory is that size's."""
    with tempfile.TemporaryDirectory(prefix="onetrans-tables-") as folder:
        command = [sys.executable, "-m", "benchmarks.tables", "--one", folder, "--rows", str(rows)]
        command += ["--driver-memory", driver_memory, "--skewed-rows", str(skewed_rows)]
        command += ["--history-days", str(history_days)]
        command += ["--costs", str(costs)] if costs else []
        command += more
        subprocess.run(command, check=True)
        read = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
    return Measured(
        read["rows"],
        {name: Cost(**cost) for name, cost in read["jobs"].items()},
        {name: Cost(**cost) for name, cost in read["sequences"].items()},
        {kind: {name: Cost(**cost) for name, cost in jobs.items()} for kind, jobs in read["skewed"].items()},
    )


def tell(report: Report, one: Measured) -> None:
    """Report one size."""
    size = f"{one.rows:,} rows"
    for name, cost in one.jobs.items():
        case = f"{size}: {name}"
        report.add(case, "rows read", cost.rows)
        report.add(case, "time", cost.seconds, "s")
        report.add(case, "processor time", cost.processor_s, "s")
        report.add(case, "rows/s", cost.rows / cost.seconds)
        report.add(case, "rows per second of processor time", cost.rows / cost.processor_s)
        report.add(case, "peak memory, JVM and Python", cost.peak / _GIB, "GiB")
        report.add(case, "stored", cost.stored / 2**20, "MiB")
    for figure, name in (("seconds", "time"), ("processor_s", "processor time")):
        report.add(f"{size}: all jobs", name, total(one.jobs, figure), "s")
    ours = one.sequences["jobs"]
    for name, cost in one.sequences.items():
        report.add(f"{size}: request sequences by {name}", "time", cost.seconds, "s")
        report.add(f"{size}: request sequences by {name}", "processor time", cost.processor_s, "s")
        report.add(f"{size}: request sequences by {name}", "peak memory, JVM and Python", cost.peak / _GIB, "GiB")
        if name != "jobs":
            expected = _AGAINST_WINDOWS if name == "windows" and one.rows >= SIZES[-1] else ""
            report.add(size, f"{name} / jobs, processor time", cost.processor_s / ours.processor_s, "", expected)
            report.add(size, f"{name} / jobs, time", cost.seconds / ours.seconds)
    even = one.skewed.get("even")
    for kind, jobs in one.skewed.items():
        for name, cost in jobs.items():
            report.add(f"{size}, {kind}: {name}", "time", cost.seconds, "s")
        if even and kind != "even":
            for figure, name in (("seconds", "time"), ("processor_s", "processor time")):
                ratio = total(jobs, figure) / total(even, figure)
                expected = _SKEW if one.rows >= SKEWED_ROWS else ""
                report.add(f"{size}, {kind}", f"{name}, over that of the even day", ratio, "", expected)


def total(jobs: dict[str, Cost], figure: str) -> float:
    """Return the sum of a figure of all jobs."""
    return float(sum(getattr(cost, figure) for cost in jobs.values()))


def measure(
    folder: Path, costs: Costs, driver_memory: str, history_days: int, tables: tuple[str, ...], *, skewed: bool
) -> Measured:
    """Write a log, build it, and measure its second day."""
    rows = costs.rows
    logging.basicConfig(level=logging.WARNING)
    schema = FeatureSchema.load(SCHEMA_FILE)
    longer = [replace(s, max_length=n) for s, n in zip(schema.sequences, LENGTHS, strict=True)]
    schema = replace(schema, sequences=tuple(longer))
    settings = Settings(
        source=SourceSettings(path=str(folder / "raw")),
        lake=LakeSettings(warehouse=str(folder / "lake")),
        # So many partitions that each holds some hundred thousand rows.
        spark=SparkSettings(driver_memory=driver_memory, shuffle_partitions=max(4, rows // 500_000)),
    )
    spark = session(settings.spark)
    users = max(rows // _ROWS_PER_USER, 50)
    world = WorldConfig(
        users=users,
        items=max(users // 10, 300),
        requests_per_user=_REQUESTS_PER_USER,
        epoch=FIRST,
        history_days=history_days,
    )
    said(f"{rows:,} rows a day")
    costs.tell("simulate", measured(lambda: write_days(world, settings.source.path, FIRST, 2)))
    work = Workspace(settings, spark, Lake(settings.lake), schema, Files(settings.source.path, schema))
    for table in ("impressions", "behaviors", "behavior_sequences"):
        costs.tell(f"{FIRST} {table}", measured(lambda table=table: build(work, table, FIRST)))  # type: ignore[misc]
    jobs = measure_jobs(work, DAY, costs, tables)
    programs: dict[str, Callable[[Workspace, Path], None]] = {"jobs": by_jobs}
    if importlib.util.find_spec("duckdb"):
        programs["duckdb"] = by_duckdb
    else:
        said("DuckDB is not installed: nothing is compared with it")
    programs["windows"] = by_windows
    found: dict[str, Cost] = {}
    for name, program in programs.items():
        found[name] = measured(lambda program=program, name=name: program(work, folder / name))  # type: ignore[misc]
        costs.tell(f"request sequences by {name}", found[name])
    told = {name: summary(spark, folder / name) for name in found}
    if len(set(told.values())) != 1:
        raise AssertionError(f"the programs made different tables: {told}")
    kinds = {}
    if skewed:
        for place, kind in enumerate(("even", "one user", "one item"), start=1):
            ds = DAY + timedelta(days=place)
            write_skewed(spark, Path(settings.source.path), ds, kind)
            kinds[kind] = measure_jobs(work, ds, costs, tables, kind)
    spark.stop()
    return Measured(rows=jobs["impressions"].rows + jobs["behaviors"].rows, jobs=jobs, sequences=found, skewed=kinds)


def build(work: Workspace, table: str, ds: date) -> int:
    """Build and publish a day of a table; return its rows."""
    staged = importlib.import_module(f"jobs.{table}").build(work, ds)
    work.lake.write_verdict(staged, {"passed": True})
    work.lake.publish(table, ds)
    return int(staged.rows)


def measure_jobs(
    work: Workspace, ds: date, telling: Costs, tables: tuple[str, ...], kind: str = "measured"
) -> dict[str, Cost]:
    """Build, publish and measure a day of the tables."""
    costs = {}
    built = {}
    for table in tables:
        holder: list[int] = []

        def run(table: str = table, holder: list[int] = holder) -> None:
            holder.append(build(work, table, ds))

        cost = measured(run)
        built[table] = holder[0]
        events, shown = built.get("behaviors", 0), built["impressions"]
        read = {"impressions": shown, "behaviors": events, "behavior_sequences": events}.get(table, shown + events)
        if table.endswith("features"):
            read = shown
        stored = sum(storage.local_path(file).stat().st_size for file in work.lake.files(table, [ds]))
        costs[table] = replace(cost, rows=read, stored=stored)
        telling.tell(f"{kind} day, {table}", costs[table])
    return costs


def measured(work: Callable[[], object], rows: int = 0) -> Cost:
    """Return what something costs; ``rows`` is what it reads, where that is known."""
    began = time.monotonic()
    with MemoryWatch() as memory, ProcessorWatch() as processor:
        work()
    memory.sample()
    return Cost(rows, time.monotonic() - began, processor.seconds, memory.peak)


def said(text: str) -> None:
    """Show how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# The same table by three programs


def inputs(work: Workspace) -> tuple[DataFrame, DataFrame, DataFrame]:
    """Return requests, yesterday's tails and today's events."""
    requests = work.read("impressions", [DAY]).select("request_id", "user_id", "ts").distinct()
    return requests, work.read("behavior_sequences", [FIRST]), work.read("behaviors", [DAY])


def by_jobs(work: Workspace, out: Path) -> None:
    """Write the request sequences as ``training_requests`` makes them."""
    requests, tails, events = inputs(work)
    schema = work.schema
    tails, events = of_those_who_ask(tails, requests), of_those_who_ask(events, requests)
    rows, made = with_past(requests, None, tails, events, schema, ["request_id"])
    out.mkdir()
    write_partitions(rows, made.table, str(out))


def by_windows(work: Workspace, out: Path) -> None:
    """Write them by joining every request with its user's events and numbering these."""
    requests, tails, events = inputs(work)
    schema = work.schema
    rows = collected_rows(events, schema)
    for sequence in schema.sequences:
        told = tails.select("user_id", F.explode(sequence.column).alias("event"))
        told = told.withColumn("of", F.lit(sequence.column))
        rows = rows.unionByName(told)
    asked = requests.withColumnRenamed("ts", "asked_at")
    joined = asked.join(rows, "user_id").where(F.col("event.available_at") < F.col("asked_at"))
    latest = Window.partitionBy("request_id", "of").orderBy(F.desc("event.ts"), F.desc("event.event_id"))
    ranked = joined.withColumn("rank", F.row_number().over(latest))
    lengths = F.create_map(*(F.lit(x) for s in schema.sequences for x in (s.column, s.max_length)))
    kept = ranked.where(F.col("rank") <= lengths[F.col("of")])
    lists = [
        F.transform(
            F.sort_array(F.collect_list(F.when(F.col("of") == s.column, F.col("event")))),
            lambda event: event.dropFields(*DECIDING),
        ).alias(s.column)
        for s in schema.sequences
    ]
    grouped = kept.groupBy("request_id").agg(*lists)
    requests.select("request_id").join(grouped, "request_id", "left").write.mode("overwrite").parquet(str(out))


def collected_rows(events: DataFrame, schema: FeatureSchema) -> DataFrame:
    """Return a row per event of a sequence, with what the jobs keep of it."""
    event = F.struct("ts", "event_id", "available_at", *stored_all(schema.of_side("event"), F.col)).alias("event")
    of = F.create_map(*(F.lit(x) for s in schema.sequences for x in (s.event, s.column)))
    return events.select("user_id", event, of[F.col("type")].alias("of"))


def by_duckdb(work: Workspace, out: Path) -> None:
    """Write them with DuckDB on two threads and as much memory as Spark has."""
    import duckdb

    def files(table: str, ds: date) -> str:
        names = [name.removeprefix("file://") for name in work.lake.files(table, [ds])]
        return "read_parquet([" + ", ".join(f"'{name}'" for name in names) + "])"

    out.mkdir()
    sequences = work.schema.sequences
    told = " UNION ALL ".join(
        f"SELECT user_id, '{s.column}' AS of, struct_pack(ts := e.ts, event_id := e.event_id, "
        f"available_at := e.available_at, {_features(work.schema, 'e.')}) AS event "
        f"FROM (SELECT user_id, unnest({s.column}) AS e FROM {files('behavior_sequences', FIRST)})"
        for s in sequences
    )
    of = "CASE type " + " ".join(f"WHEN '{s.event}' THEN '{s.column}'" for s in sequences) + " END"
    lists = ", ".join(
        f"list(event ORDER BY event.ts, event.event_id) FILTER (of = '{s.column}') AS {s.column}" for s in sequences
    )
    shown = f"struct_pack(ts := e.ts, {_features(work.schema, 'e.')})"
    seen = ", ".join(
        f"coalesce(list_transform(list_filter({s.column}, lambda e: e.available_at < r.ts)[-{s.max_length}:], "
        f"lambda e: {shown}), []) AS {s.column}"
        for s in sequences
    )
    connection = duckdb.connect()
    connection.execute(f"SET threads = 2; SET memory_limit = '4GB'; SET temp_directory = '{out}.tmp'")
    connection.execute(
        f"""COPY (
        WITH events AS (
            SELECT user_id, {of} AS of, struct_pack(ts := ts, event_id := event_id, available_at := available_at,
                {_hashed(work.schema)}) AS event FROM {files("behaviors", DAY)}
            UNION ALL {told}
        ),
        past AS (SELECT user_id, {lists} FROM events GROUP BY user_id),
        requests AS (SELECT DISTINCT request_id, user_id, ts FROM {files("impressions", DAY)})
        SELECT request_id, {seen} FROM requests r LEFT JOIN past USING (user_id)
        ) TO '{out}/part-0.parquet' (FORMAT parquet, COMPRESSION zstd)"""
    )
    connection.close()


def _features(schema: FeatureSchema, of: str) -> str:
    return ", ".join(f"{f.name} := {of}{f.name}" for f in schema.of_side("event"))


def _hashed(schema: FeatureSchema) -> str:
    """Return the event features of a row; DuckDB's hash is another one, and as much work."""

    def value(name: str, kind: str) -> str:
        return f'"{name}"' if kind != "hashed" else f'(hash("{name}") >> 1)::BIGINT'

    return ", ".join(f"{f.name} := {value(f.column, f.kind)}" for f in schema.of_side("event"))


def summary(spark: SparkSession, folder: Path) -> tuple[int, int, str]:
    """Return the rows of a table of request sequences, a sum over the times of its events and where they stand, and
    the fields of its events."""
    rows = spark.read.parquet(str(folder))
    columns = [name for name in rows.columns if name != "request_id"]
    times = [F.coalesce(F.col(name)["ts"].cast("array<bigint>"), F.array()) for name in columns]
    found = rows.agg(F.count("*"), F.sum(F.xxhash64("request_id", *times).cast("decimal(38,0)"))).first()
    assert found is not None  # an aggregate without keys has one row
    fields = [(name, rows.select(F.explode(name).alias("event")).select("event.*").columns) for name in columns]
    return int(found[0]), int(found[1]), str(fields)


# Skewed days


def write_skewed(spark: SparkSession, raw: Path, ds: date, kind: str) -> None:
    """Write a day made from the measured one, with added rows that are spread evenly or not."""
    later = F.expr(f"INTERVAL {(ds - DAY).days} DAYS")
    users, items = (spark.read.parquet(str(raw / name)).count() for name in ("users", "items"))

    def spread(seed: int, count: int, letter: str) -> Column:
        return F.concat(F.lit(letter), F.pmod(F.xxhash64(F.monotonically_increasing_id(), F.lit(seed)), F.lit(count)))

    shown = spark.read.parquet(str(raw / f"impressions/ds={DAY}"))
    shown = shown.withColumns({"ts": F.col("ts") + later, "request_id": F.concat(F.lit(f"{ds}-"), "request_id")})
    one_in_100 = F.pmod(F.xxhash64("request_id", "item_id"), F.lit(100)) == 0
    user, item = spread(1, users, "u"), spread(2, items, "i")
    if kind == "one user":
        user = F.when(one_in_100, F.lit("u0")).otherwise(user)
    if kind == "one item":
        item = F.lit("i0")
    added = shown.withColumns(
        {"request_id": F.concat(F.lit("added-"), "request_id", F.lit("-"), "item_id"), "user_id": user, "item_id": item}
    )
    shown.unionByName(added).write.parquet(str(raw / f"impressions/ds={ds}"))
    happened = spark.read.parquet(str(raw / f"behaviors/ds={DAY}"))
    happened = happened.withColumns(
        {
            "ts": F.col("ts") + later,
            "available_at": F.col("available_at") + later,
            "event_id": F.concat(F.lit(f"{ds}-"), "event_id"),
        }
    )
    more = happened.withColumn("copy", F.explode(F.array(*(F.lit(n) for n in range(3)))))
    more = more.withColumns(
        {
            "event_id": F.concat(F.lit("added-"), "event_id", F.lit("-"), F.col("copy")),
            "user_id": F.lit("u0") if kind == "one user" else spread(3, users, "u"),
        }
    ).drop("copy")
    happened.unionByName(more).write.parquet(str(raw / f"behaviors/ds={ds}"))


if __name__ == "__main__":
    sys.exit(main())
