"""KuaiRand (Gao et al., CIKM 2022): a short-video feed's log with its real non-click impressions.

Two layouts are read: the official release (``log_standard_*.csv``, ``user_features_*.csv``,
``video_features_basic_*.csv``, in the folder or its ``data/``), and the same log cut into days
(``daily/date=YYYYMMDD/*.parquet`` beside the same user and video files, with an optional
``user_history_to_*.parquet``).  What is decided here:

* A click is ``is_click``; a conversion is a click with ``long_view``, or with the feedback column that the schema names
  (``[columns.impressions] conversion = "is_like"``).
* The log has some rows twice, differing at most in ``hourmin`` and feedback.  One row per (user, video, time) is
  kept, the one with the most feedback, and none that the day before has already; or a label would meet its twin.
  What is dropped is counted in the log of ``jobs.impressions``.
* A row that holds text or a fraction where the log has a whole number is refused, with what it holds.
* A day is the log's own ``date``, in Shanghai's time; around midnight the two differ by up to an hour.
* The log has no request id.  A request is a run of impressions of one user in one tab, each at most ``SESSION_GAP``
  after the one before; a video shown again in it begins a request of its own.
* Feedback describes past events only: a play is known when it has ended, at its time plus ``play_time_ms``.
* Past events are ``watch`` (every impression, with its outcome), ``long_view`` and ``like``.
"""

from __future__ import annotations

import logging
import operator
import re
from datetime import date, datetime, timedelta
from functools import reduce

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from jobs.contract import Column, contract
from jobs.sources.reading import (
    UNREADABLE,
    Where,
    are_missing,
    data_files,
    files_stamp,
    folders,
    read_files,
    require_columns,
)
from onetrans import storage
from onetrans.days import day_bounds, describe_days
from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.schema import FeatureSchema, InputTable

SESSION_GAP = timedelta(seconds=60)
"""Longest pause within one request; nearly all of the log's gaps are either below it or far above."""

HISTORY_SPACING = timedelta(hours=1)
"""Time given to each watched video of the history file, which has an order but no times."""

CONVERSION = "long_view"
"""Feedback that makes a click a conversion, unless the schema says otherwise."""

FEEDBACK = ("long_view", "is_like")
"""Feedback a conversion can be."""

RELEASED = 2022
"""Year of the official release, whose file names say month and day: ``log_standard_4_08_to_4_21_pure.csv``."""

logger = logging.getLogger(__name__)

_HISTORY = "user_history_to_"
_KEY = ("user_id", "video_id", "time_ms")
_OUTCOMES = ("is_click", "long_view", "is_like", "play_time_ms")
_LOG = (
    Column("user_id", "id"),
    Column("video_id", "id"),
    *(Column(name, "number") for name in ("time_ms", "tab", "duration_ms", *_OUTCOMES)),
)
_MAY_HOLD_OTHERS = T.StringType | T.FloatType | T.DoubleType | T.DecimalType
_SPAN = re.compile(r"log_standard_(\d+)_(\d+)_to_(\d+)_(\d+)_")


class KuaiRand:
    """Reads either layout of the log; the feature schema is ``schema.toml`` beside this file."""

    def __init__(self, path: str, schema: FeatureSchema) -> None:
        self.schema = schema
        inner = storage.join(path, "data")
        self.path = inner if not self._holds_log(path) and self._holds_log(inner) else path

    def impressions(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the impressions of one day, grouped into requests."""
        named = self.schema.columns.get("impressions", {}).get("conversion", CONVERSION)
        if named not in FEEDBACK:
            raise BadConfigError(
                f"schema {self.schema.name!r}: conversion = {named!r} of [columns.impressions] is none of "
                f"{', '.join(FEEDBACK)}"
            )
        return as_impressions(self._log(spark, ds, tell=True), named)

    def behaviors(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the plays of one day as past events."""
        return as_behaviors(self._log(spark, ds))

    def history(self, spark: SparkSession) -> DataFrame | None:
        """Return the events of ``user_history_to_*.parquet``, or None if the layout has no such file."""
        files = self._matching(_HISTORY, ".parquet")
        if not files:
            return None
        lists = read_files(spark, files, Where("behaviors", "history"))
        for column in ("user_id", "last_time_ms", "watch_seq", "long_watch_seq", "like_seq"):
            if column not in lists.columns:
                raise BadDataError(f"behaviors history: {are_missing([column], lists.columns, files[0])}")
        return history_events(lists)

    def users(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the user file; it is one snapshot for all days."""
        files = self._needed("user_features_")
        where = Where("users", "snapshot")
        columns = contract(self.schema, "users")
        return require_columns(read_files(spark, files, where, columns), columns, where, self.schema, files[0])

    def items(self, spark: SparkSession, ds: date) -> DataFrame:
        """Return the video file, with the columns :func:`with_video_columns` adds; one snapshot for all days."""
        where = Where("items", "snapshot")
        files = self._needed("video_features_basic_")
        videos = read_files(spark, files, where)
        for column in ("video_id", "tag", "video_duration", "server_width", "server_height"):
            if column not in videos.columns:
                there = [name for name in videos.columns if name != UNREADABLE]
                raise BadDataError(f"{where}: {are_missing([column], there, files[0])}")
        videos = videos.withColumnRenamed("video_id", "item_id")
        return require_columns(with_video_columns(videos), contract(self.schema, "items"), where, self.schema, files[0])

    def whole(self, spark: SparkSession, table: InputTable, ds: date | None) -> DataFrame | None:
        """Return None: rows of the log are made into requests and events before they are checked."""
        return None

    def stamp(self, table: InputTable, ds: date | None) -> str:
        """Return a text that changes when the day's files do; empty for a snapshot, and for the release as one log."""
        if ds is None:
            return files_stamp(self.path, _HISTORY)
        return files_stamp(self._folder(ds)) if table in ("impressions", "behaviors") else ""

    def missing(self, ds: date) -> str:
        """Say that the day has no folder, or lies outside the days that the release's file names tell.

        Raises:
            BadConfigError: if the path holds no such log, or no user or video file.
            BadDataError: if a folder ``date=...`` is not named after a day.
        """
        log = self._require_log()
        for prefix in ("user_features_", "video_features_basic_"):
            self._needed(prefix)
        if not self._cut_days():
            spans = [_span(file) for file in log]
            if not all(spans) or any(first <= ds <= last for first, last in filter(None, spans)):
                return ""  # A file whose name says no days may hold any: reading it tells.
            told = ", ".join(sorted(f"{first}..{last}" for first, last in filter(None, spans)))
            return f"impressions {ds}: the log in {self.path} has the days {told}"
        folder = self._folder(ds)
        if data_files(folder):
            return ""
        return f"impressions {ds}: there is no file in {folder}; days that are there: {describe_days(self._cut_days())}"

    # Files

    def _holds_log(self, path: str) -> bool:
        return storage.exists(storage.join(path, "daily")) or any(
            _name(file).startswith("log_standard_") for file in data_files(path)
        )

    def _matching(self, prefix: str, ending: str) -> list[str]:
        return [f for f in data_files(self.path) if _name(f).startswith(prefix) and f.endswith(ending)]

    def _require_log(self) -> list[str]:
        """Return the files of the release's log; none where the log is cut into days."""
        log = self._matching("log_standard_", ".csv")
        if not log and not self._cut_days():
            raise BadConfigError(f"{self.path} holds neither daily/date=YYYYMMDD folders nor log_standard_*.csv")
        return log

    def _needed(self, prefix: str) -> list[str]:
        files = self._matching(prefix, ".csv")
        if not files:
            raise BadConfigError(f"there is no {prefix}*.csv in {self.path}; source.kind = 'kuairand' needs it")
        return files

    # The log

    def _log(self, spark: SparkSession, ds: date, tell: bool = False) -> DataFrame:
        """Return one day's rows without their copies, those in the day before included; with ``tell`` count these."""
        once = without_copies(self._rows(spark, ds))
        yesterday = ds - timedelta(days=1)
        if self._cut_days() and yesterday not in self._cut_days():
            once = once.withColumn("seen", F.lit(False))
        else:
            start, _ = day_bounds(yesterday, self.schema.timezone)
            late = start + timedelta(days=1) - timedelta(minutes=2 * self.schema.day_tolerance_minutes)
            before = self._rows(spark, yesterday, why=" (read for the copies around midnight)")
            before = before.where(F.col("time_ms") >= int(late.timestamp() * 1000)).select(*_KEY).distinct()
            once = once.join(F.broadcast(before.withColumn("seen", F.lit(True))), [*_KEY], "left")
        if tell:
            _tell_copies(once, ds, yesterday)
        return once.where(~F.coalesce("seen", F.lit(False))).drop("copies", "seen")

    def _folder(self, ds: date) -> str:
        return storage.join(self.path, "daily", f"date={ds:%Y%m%d}")

    def _cut_days(self) -> list[date]:
        place = storage.join(self.path, "daily")
        days = []
        for name in folders(place):
            if name.startswith("date="):
                try:
                    days.append(datetime.strptime(name[5:], "%Y%m%d").date())
                except ValueError as error:
                    raise BadDataError(
                        f"impressions: folder {place}/{name} is not named after a day, as date=20220504 is"
                    ) from error
        return sorted(days)

    def _rows(self, spark: SparkSession, ds: date, why: str = "") -> DataFrame:
        """Return one day's rows as whole numbers; ``why`` tells a day read for another, which may have no row."""
        where = Where("impressions", f"{ds}{why}")
        log = self._require_log()
        folder = self._folder(ds)
        if storage.exists(folder):
            files = data_files(folder)
            if not files:
                raise NotReadyError(f"{where}: {folder} holds no .parquet, .csv, .json or .jsonl file")
            rows = read_files(spark, files, where, _LOG)
        elif self._cut_days():
            raise NotReadyError(
                f"{where}: there is no {folder}; days that are there: {describe_days(self._cut_days())}"
            )
        else:
            files = log
            every = read_files(spark, log, where, (*_LOG, Column("date", "number")))
            rows = every.where(F.col("date").try_cast("int") == int(f"{ds:%Y%m%d}"))
            if not why and rows.isEmpty():
                found = every.select(F.min("date"), F.max("date")).first()
                told = " to ".join(map(str, found or ()))
                raise NotReadyError(f"{where}: the log has no row of this day; it has {told}; for example in {log[0]}")
        return as_numbers(require_columns(rows, _LOG, where, self.schema, files[0]))


def as_numbers(rows: DataFrame) -> DataFrame:
    """Return the log's columns as whole numbers, and in ``_unreadable`` what is none, as JSON.

    Files of nothing but whole numbers give no such column.
    """
    kinds = {field.name: field.dataType for field in rows.schema}
    numbers, others = [], []
    for column in _LOG:
        value = F.col(column.name)
        number = value.try_cast("bigint")
        if isinstance(kinds[column.name], _MAY_HOLD_OTHERS):
            text = isinstance(kinds[column.name], T.StringType)
            if not text:  # 0.5 would be cut to 0
                number = F.when(value.try_cast("double") == number, number)
            empty = F.trim(value) == "" if text else F.isnan(value.try_cast("double"))
            others.append(F.when(number.isNull() & ~empty, value).alias(column.name))
        numbers.append(number.alias(column.name))
    unread = [F.col(UNREADABLE)] if UNREADABLE in kinds else []
    if others:
        found = reduce(operator.or_, (other.isNotNull() for other in others))
        unread.append(F.when(found, F.to_json(F.struct(*others))))
    return rows.select(*numbers, *([F.coalesce(*unread).alias(UNREADABLE)] if unread else []))


def without_copies(rows: DataFrame) -> DataFrame:
    """Return one row per (user, video, time), the one with the most feedback, and ``copies``: how many more there were.

    Rows that will be refused, as they lack one of the three or cannot be read, are copies only word for word.
    """
    bad = reduce(operator.or_, (F.col(column).isNull() for column in _KEY), _unread(rows))
    rest = [c for c in (*_OUTCOMES, *rows.columns) if c not in _KEY]
    grouped = rows.groupBy(*_KEY, F.when(bad, F.xxhash64(*rows.columns)).alias("_word_for_word"))
    best = grouped.agg(F.max(F.struct(*dict.fromkeys(rest))).alias("best"), (F.count("*") - 1).alias("copies"))
    return best.select(*_KEY, "best.*", "copies")


def _tell_copies(once: DataFrame, ds: date, yesterday: date) -> None:
    seen = F.coalesce("seen", F.lit(False))
    dropped = F.col("copies") + seen.cast("int")
    counted = once.agg(
        F.sum(dropped),
        F.count_if(seen),
        F.max(F.when(dropped > 0, F.to_json(F.struct(*_KEY)))),
    ).first()
    if counted and counted[0]:
        also = f", {counted[1]:,} of them of rows of {yesterday}" if counted[1] else ""
        logger.info(
            "impressions %s: dropped %s copies of (%s)%s, for example %s",
            ds, f"{counted[0]:,}", ", ".join(_KEY), also, counted[2],
        )  # fmt: skip


def _unread(rows: DataFrame) -> SparkColumn:
    return F.col(UNREADABLE).isNotNull() if UNREADABLE in rows.columns else F.lit(False)


def as_impressions(log: DataFrame, conversion: str = CONVERSION) -> DataFrame:
    """Return impressions with the contract's columns; requests are runs of one user in one tab.

    Rows that cannot be read are kept out of the requests of the others.
    """
    log = log.withColumn("bad", _unread(log))
    stream = Window.partitionBy("bad", "user_id", "tab").orderBy("time_ms", "video_id")
    pause = F.col("time_ms") - F.lag("time_ms").over(stream)
    first = pause.isNull() | (pause > int(SESSION_GAP.total_seconds() * 1000))
    log = log.withColumn("start", F.max(F.when(first, F.col("time_ms"))).over(stream))
    showing = Window.partitionBy("bad", "user_id", "tab", "start", "video_id").orderBy("time_ms")
    log = log.withColumn("again", F.row_number().over(showing) - 1)
    within = Window.partitionBy("bad", "user_id", "tab", "start", "again").orderBy("time_ms", "video_id")
    return log.select(
        F.concat_ws("-", "user_id", "tab", "start", "again").alias("request_id"),
        "user_id",
        F.col("video_id").alias("item_id"),
        F.timestamp_millis("time_ms").alias("ts"),
        (F.row_number().over(within) - 1).alias("position"),
        F.col("is_click").alias("click"),
        (F.col("is_click") * F.col(conversion)).alias("conversion"),
        "tab",
        *(c for c in log.columns if c == UNREADABLE),
    )


def as_behaviors(log: DataFrame) -> DataFrame:
    """Return past events with the contract's columns: a watch each, a long view and a like where there was one."""
    kinds = F.array(
        F.lit("watch"),
        F.when(F.col("long_view") == 1, F.lit("long_view")),
        F.when(F.col("is_like") == 1, F.lit("like")),
    )
    return log.select(
        "user_id",
        F.col("video_id").alias("item_id"),
        F.explode(F.array_compact(kinds)).alias("type"),
        F.timestamp_millis("time_ms").alias("ts"),
        F.timestamp_millis(F.col("time_ms") + F.greatest("play_time_ms", F.lit(0))).alias("available_at"),
        "tab",
        *_outcome(F.col("is_click"), F.col("long_view"), F.col("is_like")),
        F.when(F.col("duration_ms") > 0, F.col("play_time_ms") / F.col("duration_ms")).alias("play_ratio"),
        *(c for c in log.columns if c == UNREADABLE),
    )


def history_events(lists: DataFrame) -> DataFrame:
    """Return the lists of the history file as past events with made-up times that keep each list's order.

    Each list ends at the user's last known time and reaches back ``HISTORY_SPACING`` per watched video, evenly.  A
    watch counts as a long view or a like if its video is in that list; whether it was clicked is not known.
    """
    spacing = int(HISTORY_SPACING.total_seconds() * 1000)

    def events(kind: str, column: str) -> DataFrame:
        size = F.size(column)
        step = F.greatest((F.size("watch_seq") * spacing / size).cast("bigint"), F.lit(1))
        listed = lists.select("*", F.posexplode(column).alias("index", "video"), size.alias("n"), step.alias("step"))
        time = F.timestamp_millis(F.col("last_time_ms") - (F.col("n") - 1 - F.col("index")) * F.col("step"))
        long_view = F.array_contains("long_watch_seq", F.col("video")).cast("int")
        like = F.array_contains("like_seq", F.col("video")).cast("int")
        return listed.select(
            "user_id",
            F.col("video").alias("item_id"),
            F.lit(kind).alias("type"),
            time.alias("ts"),
            time.alias("available_at"),
            F.lit(None).cast("bigint").alias("tab"),
            *_outcome(F.lit(None).cast("bigint"), long_view, like),
            F.lit(None).cast("double").alias("play_ratio"),
        )

    watched = events("watch", "watch_seq")
    return watched.unionByName(events("long_view", "long_watch_seq")).unionByName(events("like", "like_seq"))


def with_video_columns(videos: DataFrame) -> DataFrame:
    """Return videos with their first tag, their length in seconds, and width over height."""
    milliseconds = F.col("video_duration").try_cast("double")
    width, height = (F.col(f"server_{side}").try_cast("double") for side in ("width", "height"))
    return videos.withColumns(
        {
            "tag": F.substring_index("tag", ",", 1),
            "duration_s": milliseconds / 1000,
            "aspect": F.when(height > 0, width / height),
        }
    )


def _outcome(click: SparkColumn, long_view: SparkColumn, like: SparkColumn) -> list[SparkColumn]:
    return [click.alias("clicked"), long_view.alias("viewed_long"), like.alias("liked")]


def _name(file: str) -> str:
    return file.rsplit("/", 1)[1]


def _span(file: str) -> tuple[date, date] | None:
    """Return the first and last day that a file's name says it holds."""
    found = _SPAN.match(_name(file))
    if not found:
        return None
    months = [int(number) for number in found.groups()]
    return date(RELEASED, months[0], months[1]), date(RELEASED, months[2], months[3])
