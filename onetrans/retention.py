"""What may be removed: replaced versions of tables, files nobody names, old checkpoints; and what must stay.

Kept, whatever its age:

* what is published now, and the latest staged attempt of every day;
* every file and snapshot that a plan pins, if it belongs to the champion, the
  previous champion or the challenger, or to a training these went on from; and
  their own checkpoints and those they started from;
* the checkpoints of the best evaluated training: the candidate with the highest
  mean of CTR AUC and CVR AUC on its day, of all that are in the folder of runs;
* the same for every plan in whose folder something was written lately
  (``retention.reading_days``): a run is reading what it pins;
* a version of a table that readers could still find a short while ago: its age
  counts from the moment it was replaced, not from when it was made.

Removed is the rest, in an order that can be interrupted anywhere: first
snapshots are expired, then files that no remaining snapshot, plan or staged day
names are deleted, so a second run finds what the first one left.  If it cannot be
told what the champion was trained on, nothing is removed: nor where trainings were
tracked or judged, and the registry that would name it is not found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any, Literal

from pyarrow import fs
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.table import Table

from onetrans import storage
from onetrans.days import parse_day
from onetrans.errors import BadConfigError
from onetrans.lake import QUARANTINE, SCORES, TABLES, Lake
from onetrans.plan import CHECKPOINT_FOLDER, GATE_FILE, METRICS_FILE, PLAN_FILE, PROMOTION_FILE
from onetrans.scores import CANDIDATE
from onetrans.settings import Settings

logger = logging.getLogger(__name__)

Kind = Literal["snapshot", "data", "metadata", "checkpoint"]


@dataclass(frozen=True)
class Removal:
    """One thing that is, or would be, removed."""

    kind: Kind
    """``snapshot``, ``data`` (a folder of a day's files), ``metadata`` (a file of Iceberg's) or ``checkpoint``."""
    table: str
    """Table it belongs to; for a checkpoint the model."""
    what: str
    """Snapshot id, folder or file."""
    bytes: int
    """Size of the files."""
    why: str
    """Why it may go."""


@dataclass
class Held:
    """What plans hold, each with the reason."""

    snapshots: dict[int, str] = field(default_factory=dict)
    """Snapshot of ``training_requests`` -> who holds it."""
    folders: dict[str, str] = field(default_factory=dict)
    """Folder of data files -> who holds it."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """Folder of a training that keeps its checkpoints -> who holds it."""


@dataclass(frozen=True)
class _Folder:
    """The files under a folder."""

    bytes: int
    newest: datetime


def held_by_plans(settings: Settings, now: datetime) -> Held:
    """Return what may not be removed because a model was trained on it, or a run is reading it.

    Raises:
        BadConfigError: if the plan of a model with an alias is not found, or the registry of trainings that were
            tracked is not, so that nobody knows what the champion was trained on.
    """
    runs = storage.resolve(settings.training.runs)
    found = (path for path in storage.list_files(runs, PLAN_FILE) if path.endswith(f"/{PLAN_FILE}"))
    plans = {path.rsplit("/", 1)[0]: storage.read_json(path) for path in found}
    held = Held()
    for alias, folder in _champions(settings, runs, plans):
        if folder not in plans:
            raise BadConfigError(
                f"the registry's {alias} was trained by the plan in {folder}, where there is no {PLAN_FILE}: what "
                "it was trained on is not known, so nothing is removed. training.runs must be the folder of its runs"
            )
        starts = {start.rsplit("/", 1)[0] for start in _warm_starts(plans[folder])}
        for training in (folder, *starts):
            held.checkpoints.setdefault(training, f"{alias} was trained from it")
        _hold(held, plans, folder, alias, recursive=True)
    since = now - timedelta(days=settings.retention.reading_days)
    for folder in plans:
        if _folder(folder).newest >= since:
            _hold(held, plans, folder, f"the run in {folder}", recursive=False)
            for training in (folder, *(start.rsplit("/", 1)[0] for start in _warm_starts(plans[folder]))):
                held.checkpoints.setdefault(training, f"the run in {folder}")
    best = _best(plans)
    if best:
        held.checkpoints.setdefault(best, "the best figures of all")
    return held


def _best(plans: Iterable[str]) -> str | None:
    """Return the plan folder whose candidate has the best figures on its day; None if nothing was evaluated."""
    means: dict[str, float] = {}
    for folder in plans:
        path = storage.join(folder, METRICS_FILE)
        figures = storage.read_json(path).get(CANDIDATE, {}) if storage.exists(path) else {}
        ctr, cvr = figures.get("ctr_auc"), figures.get("cvr_auc")
        if ctr is not None and cvr is not None:
            means[folder] = (ctr + cvr) / 2
    return max(means, key=lambda folder: means[folder]) if means else None


def _hold(held: Held, plans: Mapping[str, Any], first: str, who: str, *, recursive: bool) -> None:
    """Hold what a plan reads and, if asked, what the trainings it went on from read, back to the fresh weights."""
    waiting, seen = [first], set()
    while waiting:
        folder = waiting.pop()
        if folder in seen:
            continue
        seen.add(folder)
        plan = plans.get(folder)
        if plan is None:
            raise BadConfigError(
                f"{who} went on from the training in {folder}, where there is no {PLAN_FILE}: what it was "
                "trained on is not known, so nothing is removed"
            )
        held.snapshots.setdefault(plan["snapshot_id"], who)
        for file in (*plan["train_files"], *plan["evaluation_files"]):
            held.folders.setdefault(file.rsplit("/", 1)[0], who)
        if recursive:
            waiting += [start.rsplit("/", 1)[0] for start in _warm_starts(plan)]


def _warm_starts(plan: Mapping[str, Any]) -> Iterator[str]:
    return (model["warm_start"] for model in plan["models"].values() if model["warm_start"])


def _champions(settings: Settings, runs: str, plans: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the registry's aliases and the plan folder of the version each names.

    Raises:
        BadConfigError: if there is no such registry, though plans are there of which it would know.
    """
    tracked = [folder for folder, plan in plans.items() if plan.get("mlflow_run_id")]
    file = storage.sqlite_file(settings.mlflow.tracking_uri)
    if file is not None and not file.exists():
        if tracked:
            lost = f"MLflow's store {file.absolute()} is not there (mlflow.tracking_uri)"
            raise _registry_lost(lost, tracked, "tracked in it")
        return
    from onetrans.registry import CHAMPION, Registry
    from onetrans.tracking import TAG_DAY, TAG_PLAN

    registry = Registry(settings.mlflow)
    if not registry.exists():
        # Before the first verdict there is no model yet.
        judged = [
            folder
            for folder in tracked
            if any(storage.exists(storage.join(folder, name)) for name in (GATE_FILE, PROMOTION_FILE))
        ]
        if judged:
            lost = f"MLflow (mlflow.tracking_uri) has no registered model {registry.name!r} (mlflow.registered_model)"
            raise _registry_lost(lost, judged, "judged, and a judged candidate is registered")
        return
    # The champion first: what several hold is told of the first.
    for alias, number in sorted(registry.aliases().items(), key=lambda entry: (entry[0] != CHAMPION, entry[0])):
        tags = registry.version(number).tags
        if TAG_PLAN in tags and TAG_DAY in tags:
            yield f"{alias} (version {number})", storage.join(runs, f"ds={tags[TAG_DAY]}", tags[TAG_PLAN])
        else:
            logger.info("%s is version %s, which this pipeline did not train; it holds nothing", alias, number)


def _registry_lost(lost: str, plans: list[str], known: str) -> BadConfigError:
    example = max(plans)
    return BadConfigError(
        f"{lost}, but {len(plans):,} plans were {known}, for example {example}: what the champion was trained on is "
        "not known, so nothing is removed. Check these settings, the working directory and the environment; where the "
        "registry is gone for good, the next promotion makes one"
    )


def retain(settings: Settings, now: datetime, *, dry_run: bool = False) -> list[Removal]:
    """Remove what is old and held by nobody; return what was, or with ``dry_run`` would be, removed.

    Raises:
        BadConfigError: if it is not known what the champion was trained on, or checkpoints would be kept for fewer
            days than a training looks back for one.
    """
    limits = settings.retention
    if limits.checkpoint_days < settings.training.lookback_days:
        raise BadConfigError(
            f"retention.checkpoint_days = {limits.checkpoint_days} is less than training.lookback_days = "
            f"{settings.training.lookback_days}: a training goes on from a checkpoint as old as that"
        )
    lake = Lake(settings.lake)
    if not lake.exists():
        return []
    held = held_by_plans(settings, now)
    removed: list[Removal] = []
    for table in (*TABLES, SCORES, QUARANTINE):
        expired = _expired(lake, table, held, now - timedelta(days=limits.snapshot_days))
        if expired and not dry_run:
            lake.expire(table, [int(removal.what) for removal in expired])
        gone = {int(removal.what) for removal in expired}
        before = now - timedelta(days=limits.staging_days)
        files = [*_data(lake, table, held, gone, before), *_metadata(lake, table, gone, before)]
        for removal in files if not dry_run else ():
            storage.delete_tree(removal.what) if removal.kind == "data" else storage.delete_file(removal.what)
        removed += [*expired, *files]
    for removal in _checkpoints(settings, held):
        if not dry_run:
            storage.delete_tree(removal.what)
        removed.append(removal)
    return removed


def _expired(lake: Lake, table: str, held: Held, before: datetime) -> list[Removal]:
    """Return the snapshots that were replaced before an instant and are held by nobody."""
    target = _table(lake, table)
    if target is None:
        return []
    log = sorted(target.metadata.snapshot_log, key=lambda entry: entry.timestamp_ms)
    replaced = {entry.snapshot_id: following.timestamp_ms for entry, following in pairwise(log)}
    current = target.metadata.current_snapshot_id
    named = {reference.snapshot_id for reference in target.metadata.refs.values()}
    found = []
    for snapshot in target.snapshots():
        # One that was never current is half of a commit.
        at = datetime.fromtimestamp(replaced.get(snapshot.snapshot_id, snapshot.timestamp_ms) / 1000, UTC)
        kept = {current, *named, *(held.snapshots if table == "training_requests" else ())}
        if snapshot.snapshot_id not in kept and at < before:
            why = f"replaced on {at:%Y-%m-%d}"
            found.append(Removal("snapshot", table, str(snapshot.snapshot_id), 0, why))
    return found


def _data(lake: Lake, table: str, held: Held, gone: set[int], before: datetime) -> list[Removal]:
    """Return the folders of a table's days that no remaining snapshot, plan or staged day names.

    They are compared by day and attempt: the warehouse may have had another address when a file was written.
    """
    target = _table(lake, table)
    path = storage.join(lake.warehouse, "data", table)
    files_named = _data_files(target, gone) if target is not None else set()
    folders = [*(file.rsplit("/", 1)[0] for file in files_named), *lake.staged_paths(table), *held.folders]
    kept = {_day_and_attempt(folder) for folder in folders}
    found = []
    for folder, files in _attempts(path).items():
        if _day_and_attempt(folder) not in kept and files.newest < before:
            found.append(Removal("data", table, folder, files.bytes, f"named by nothing, of {files.newest:%Y-%m-%d}"))
    return found


def _data_files(target: Table, gone: set[int]) -> set[str]:
    """Return the data files of all snapshots but those that go; each manifest is read once."""
    manifests = {
        manifest.manifest_path: manifest
        for snapshot in target.snapshots()
        if snapshot.snapshot_id not in gone
        for manifest in snapshot.manifests(target.io)
    }
    return {
        entry.data_file.file_path
        for manifest in manifests.values()
        for entry in manifest.fetch_manifest_entry(target.io, discard_deleted=True)
    }


def _metadata(lake: Lake, table: str, gone: set[int], before: datetime) -> list[Removal]:
    """Return Iceberg's own files of a table that its current metadata does not lead to."""
    target = _table(lake, table)
    if target is None:
        return []
    kept = {target.metadata_location, *(entry.metadata_file for entry in target.metadata.metadata_log)}
    for snapshot in target.snapshots():
        if snapshot.snapshot_id not in gone:
            kept.add(snapshot.manifest_list)
            kept.update(manifest.manifest_path for manifest in snapshot.manifests(target.io))
    names = {path.rsplit("/", 1)[1] for path in kept}
    found = []
    for path, size, changed in _files(storage.join(target.location(), "metadata")):
        if path.rsplit("/", 1)[1] not in names and changed < before:
            found.append(Removal("metadata", table, path, size, f"named by nothing, of {changed:%Y-%m-%d}"))
    return found


def _checkpoints(settings: Settings, held: Held) -> list[Removal]:
    """Return the checkpoints of days long before the newest one that was planned."""
    runs = storage.resolve(settings.training.runs)
    every: dict[str, tuple[date, int]] = {}
    for path, size, _ in _files(runs):
        parts = path.removeprefix(f"{runs}/").split("/")
        if len(parts) == 5 and parts[0].startswith("ds=") and parts[3] == CHECKPOINT_FOLDER:
            folder = path.rsplit("/", 1)[0]
            every[folder] = (parse_day(parts[0][3:]), every.get(folder, (date.min, 0))[1] + size)
    if not every:
        return []
    newest = max(ds for ds, _ in every.values())
    first = newest - timedelta(days=settings.retention.checkpoint_days)
    return [
        Removal("checkpoint", folder.split("/")[-2], folder, size, f"of {ds}, before {first}")
        for folder, (ds, size) in sorted(every.items())
        if ds < first and folder.rsplit("/", 2)[0] not in held.checkpoints
    ]


def _table(lake: Lake, table: str) -> Table | None:
    try:
        return lake.table(table)
    except NoSuchTableError:
        return None


def _attempts(path: str) -> dict[str, _Folder]:
    """Return the folders of a table's days, one per attempt to build one."""
    found: dict[str, _Folder] = {}
    for file, size, changed in _files(path):
        folder = _attempt(path, file)
        if folder:
            known = found.get(folder, _Folder(0, changed))
            found[folder] = _Folder(known.bytes + size, max(known.newest, changed))
    return found


def _attempt(path: str, file: str) -> str | None:
    """Return ``ds=DAY/ATTEMPT`` of a file of the table in ``path``, however deep it lies there; None if it has none."""
    parts = file.removeprefix(f"{path}/").split("/")
    return storage.join(path, parts[0], parts[1]) if len(parts) >= 3 and parts[0].startswith("ds=") else None


def _day_and_attempt(folder: str) -> tuple[str, ...]:
    """Return the last ``ds=DAY`` of an address and the attempt after it, whose name is drawn at random."""
    parts = folder.split("/")
    days = [place for place, part in enumerate(parts) if part.startswith("ds=")]
    return tuple(parts[days[-1] : days[-1] + 2]) if days else (folder,)


def _folder(path: str) -> _Folder:
    """Return size and newest change of what lies in a folder."""
    listed = list(_files(path))

    newest = max((changed for _, _, changed in listed), default=datetime.min.replace(tzinfo=UTC))
    return _Folder(sum(size for _, size, _ in listed), newest)


def _files(path: str) -> Iterator[tuple[str, int, datetime]]:
    """Yield address, size and time of the last change of every file in a folder, hidden ones too."""
    filesystem, inner = storage.open_filesystem(path)
    listed: Iterable[fs.FileInfo] = filesystem.get_file_info(
        fs.FileSelector(inner, recursive=True, allow_not_found=True)
    )
    for info in listed:
        if info.type == fs.FileType.File:
            changed = datetime.fromtimestamp(info.mtime_ns / 1e9, UTC)
            yield f"{path}/{info.path.removeprefix(inner).lstrip('/')}", info.size, changed
