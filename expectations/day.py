"""What a suite may know besides the staged rows: the day, its bounds on the clock, and what is published already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expectations.distribution import Bins, bins_of, rate
from onetrans import storage
from onetrans.days import day_bounds, days_before
from onetrans.lake import Lake, PublishedDay, Staged
from onetrans.schema import FeatureSchema
from onetrans.settings import AuditSettings

FEATURES_OF = {"user_id": "user_features", "item_id": "item_features"}
"""Key -> the table that holds its features."""

_FEWEST_DAYS = 3


@dataclass(frozen=True)
class AuditDay:
    """One table's day under audit."""

    staged: Staged
    """Manifest of the files that are audited."""
    schema: FeatureSchema
    """The feature schema the job built the table by."""
    settings: AuditSettings
    """What the audit tolerates."""
    earlier: tuple[PublishedDay, ...] = ()
    """The table's published days before this one, oldest first, at most ``settings.trailing_days``."""
    impressions: int | None = None
    """Rows of the published ``impressions`` day this table was built from; None: not built from it."""
    labels: tuple[int, int] | None = None
    """Clicks and conversions of that day, as its own audit counted them; None: not known."""
    window_impressions: int | None = None
    """Published impressions of the longest window this table counts; None: it counts none."""
    trailing: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    """Counts per bin of the watched columns of the earlier days, as their audits left them."""
    windows_filled: bool = False
    """Whether the log was older than its longest window on all of the earlier days."""
    known: Mapping[str, pa.Array] = field(default_factory=dict)
    """``user_id`` and ``item_id`` that have a row in the feature tables this table was built from."""
    too_many: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Where these are too many to be held: the files they stand in, which Spark joins."""

    @property
    def table(self) -> str:
        """Table name."""
        return self.staged.table

    @property
    def ds(self) -> date:
        """Logical date."""
        return self.staged.ds

    @property
    def first_instant(self) -> datetime:
        """Earliest time a row of this day may carry, the schema's tolerance included (UTC)."""
        return day_bounds(self.ds, self.schema.timezone)[0] - self._tolerance

    @property
    def end_instant(self) -> datetime:
        """First time that is too late for a row of this day, the schema's tolerance included (UTC)."""
        return day_bounds(self.ds, self.schema.timezone)[1] + self._tolerance

    @property
    def settled_before(self) -> datetime:
        """Events known before this instant are settled: no later delivery can come before them (UTC)."""
        return day_bounds(self.ds, self.schema.timezone)[1] - self._tolerance

    @property
    def labels_open(self) -> bool:
        """Whether conversions of this day could still come when it was built, or it is not known when it was."""
        if not self.schema.attribution_hours:
            return False
        if not self.staged.created_at:
            return True
        built = datetime.fromisoformat(self.staged.created_at).astimezone(UTC)
        return built < self.schema.labels_close(self.ds)

    @property
    def usual_rows(self) -> float | None:
        """Median row count of the earlier days; None if there is none."""
        return median(day.rows for day in self.earlier) if self.earlier else None

    @property
    def watched(self) -> dict[str, Bins]:
        """Columns whose values are counted per bin."""
        return bins_of(self.table, self.schema)

    @property
    def before(self) -> dict[str, tuple[int, ...]]:
        """Counts per bin over the earlier days, of the columns whose shift can be judged.

        At least ``_FEWEST_DAYS`` days are needed, as the first days of a log differ among themselves.
        """
        found: dict[str, tuple[int, ...]] = {}
        for path, bins in self.watched.items():
            days = [counted[path] for counted in self.trailing if len(counted.get(path, ())) == bins.size]
            if len(days) >= _FEWEST_DAYS and not bins.label and (self.windows_filled or not bins.computed):
                found[path] = tuple(map(sum, zip(*days, strict=True)))
        return found

    def usual_rate(self, label: str) -> float | None:
        """Median rate of a label over the earlier days; None if none is known."""
        known = [found for counted in self.trailing if (found := rate(counted, label)) is not None]
        return median(known) if known else None

    @property
    def rows_the_day_before(self) -> int | None:
        """Published rows of the previous calendar day; None if it is not published."""
        return next((day.rows for day in self.earlier if day.ds == self.ds - timedelta(days=1)), None)

    @property
    def _tolerance(self) -> timedelta:
        return timedelta(minutes=self.schema.day_tolerance_minutes)


def audit_day(lake: Lake, schema: FeatureSchema, settings: AuditSettings, staged: Staged) -> AuditDay:
    """Collect what the suites of ``staged`` need from the lake: file metadata, earlier verdicts, and ids.

    A table's first day has nothing to be compared with.
    """
    published_days = lake.published(staged.table)
    if staged.table == "behaviors":
        # The first day carries the log's whole history, so it says nothing about the size of a day.
        published_days = published_days[1:]
    earlier = [day for day in published_days if day.ds < staged.ds][-settings.trailing_days :]
    folders = lake.folders(staged.table, [day.ds for day in earlier])
    verdicts = [lake.verdict_in(folder) for folder in folders.values()]
    longest = max(schema.aggregates.windows)
    first = min((day.ds for day in published_days), default=staged.ds)
    found = AuditDay(
        staged,
        schema,
        settings,
        tuple(earlier),
        trailing=tuple(
            {path: tuple(counted) for path, counted in (verdict or {}).get("distributions", {}).items()}
            for verdict in verdicts
        ),
        windows_filled=bool(earlier) and earlier[0].ds - first >= timedelta(days=longest),
    )
    snapshot = staged.inputs.get("impressions")
    if staged.table == "training_requests":
        known, too_many = _known_ids(lake, settings, staged)
        return replace(
            found,
            known=known,
            too_many=too_many,
            **(_of_impressions(lake, staged, snapshot) if snapshot is not None else {}),
        )
    if snapshot is not None and staged.table in ("user_features", "item_features"):
        window = days_before(staged.ds, longest)
        rows = sum(day.rows for day in lake.published("impressions", snapshot) if day.ds in window)
        return replace(found, window_impressions=rows)
    return found


def _of_impressions(lake: Lake, staged: Staged, snapshot: int) -> dict[str, Any]:
    """Return rows and labels of the day's impressions, as ``training_requests`` read them."""
    rows = sum(day.rows for day in lake.published("impressions", snapshot) if day.ds == staged.ds)
    folder = lake.folders("impressions", [staged.ds], snapshot).get(staged.ds)
    counted = ((lake.verdict_in(folder) if folder else None) or {}).get("distributions", {})
    labels = [counted[label][2] for label in ("click", "conversion") if label in counted]
    return {"impressions": rows, "labels": (labels[0], labels[1]) if len(labels) == 2 else None}


def _known_ids(
    lake: Lake, settings: AuditSettings, staged: Staged
) -> tuple[dict[str, pa.Array], dict[str, tuple[str, ...]]]:
    """Return the ids that have a row in the feature tables ``training_requests`` joined, or files of too many ids."""
    known, too_many = {}, {}
    for key, table in FEATURES_OF.items():
        snapshot = staged.inputs.get(table)
        there = [] if snapshot is None else [d for d in lake.published(table, snapshot) if d.ds == staged.ds]
        files = lake.files(table, [staged.ds], snapshot) if there else []
        if there and there[0].rows <= settings.max_rows_in_memory:
            known[key] = _column(files, key)
        elif there:
            too_many[key] = tuple(files)
    return known, too_many


def _column(files: list[str], name: str) -> pa.Array:
    """Read one text column of some files."""
    parts = []
    for file in files:
        filesystem, inner = storage.open_filesystem(file)
        with filesystem.open_input_file(inner) as opened:
            parts.append(pq.ParquetFile(opened).read(columns=[name])[name].cast(pa.string()))
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string()).combine_chunks()
