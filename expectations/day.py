"""What a suite may know besides the staged rows: the day, its bounds on the clock, and what is published already."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from statistics import median

from onetrans.days import day_bounds
from onetrans.lake import Lake, PublishedDay, Staged
from onetrans.schema import FeatureSchema
from onetrans.settings import AuditSettings


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
    def usual_rows(self) -> float | None:
        """Median row count of the earlier days; None if there is none."""
        return median(day.rows for day in self.earlier) if self.earlier else None

    @property
    def rows_the_day_before(self) -> int | None:
        """Published rows of the previous calendar day; None if it is not published."""
        return next((day.rows for day in self.earlier if day.ds == self.ds - timedelta(days=1)), None)

    @property
    def _tolerance(self) -> timedelta:
        return timedelta(minutes=self.schema.day_tolerance_minutes)


def audit_day(lake: Lake, schema: FeatureSchema, settings: AuditSettings, staged: Staged) -> AuditDay:
    """Collect what the suites of ``staged`` need from the lake; file metadata only, no rows are read.

    A table's first day has nothing to be compared with.
    """
    published_days = lake.published(staged.table)
    if staged.table == "behaviors":
        # The first day carries the log's whole history, so it says nothing about the size of a day.
        published_days = published_days[1:]
    earlier = [day for day in published_days if day.ds < staged.ds][-settings.trailing_days :]
    impressions = None
    if staged.table == "training_requests" and "impressions" in staged.inputs:
        published = lake.published("impressions", snapshot_id=staged.inputs["impressions"])
        impressions = sum(day.rows for day in published if day.ds == staged.ds)
    return AuditDay(staged, schema, settings, tuple(earlier), impressions)
