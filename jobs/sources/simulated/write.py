"""``onetrans simulate``: write days of the simulated world in the input contract of ``docs/input.md``.

An event is delivered on the day it became known, so a purchase just before
midnight may stand in the next day's file.  ``behaviors/history`` holds what was
delivered before the first day written, unless that earlier day is there already.

Each block of the world is written to files of its own, ``part-<block>.parquet``, by
whoever plays it: this process if there is one block, else the tasks of a Spark job.
A task that is tried again writes the same bytes, so neither the number of tasks nor a
lost executor can be seen in the log.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.sources.simulated.defects import Faults, described, parse_rates
from jobs.sources.simulated.truth import OFFERS, SURFACES
from jobs.sources.simulated.world import (
    BOUGHT,
    CLICKED,
    DAY,
    DEVICES,
    EVENT_TYPES,
    Catalog,
    Day,
    Integers,
    WorldConfig,
    build_catalog,
    microseconds,
    play,
)
from onetrans import storage
from onetrans.days import parse_day
from onetrans.errors import BadConfigError
from onetrans.progress import Progress
from onetrans.settings import SourceSettings

SCHEMA_FILE = Path(__file__).with_name("schema.toml")
"""Feature schema of the simulated log."""

EXAMPLES = """examples:
  onetrans simulate --out var/raw --from 2026-01-01 --days 10
  onetrans simulate --out var/raw --from 2026-01-11 --days 1    # the next day of the same world
  onetrans simulate --users 1200000 --items 100000 --seed 1       # ten million impressions a day, with Spark
  onetrans simulate --days 5 --defects 0.001 late=0.02            # with all faults of a real log, mostly late events"""

if TYPE_CHECKING:  # a small world needs no Spark
    pass

_TIME = pa.timestamp("us", tz="UTC")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    usual = WorldConfig()
    parser.add_argument(
        "--out",
        default=SourceSettings().path,
        metavar="DIR",
        help="folder (or s3:// prefix) to write to (default: %(default)s)",
    )
    parser.add_argument(
        "--from", dest="first", metavar="DAY", help="first day, YYYY-MM-DD (default: that of the world)"
    )
    parser.add_argument("--days", type=int, default=1, help="days to write (default: 1)")
    parser.add_argument("--users", type=int, default=usual.users, help="shoppers (default: %(default)s)")
    parser.add_argument("--items", type=int, default=usual.items, help="items on sale (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=usual.seed, help="seed of the world (default: %(default)s)")
    parser.add_argument(
        "--requests-per-user",
        type=float,
        default=usual.requests_per_user,
        metavar="X",
        help="mean requests of a shopper per day, each of 8 to 12 impressions (default: %(default)s)",
    )
    parser.add_argument(
        "--epoch", default=str(usual.epoch), metavar="DAY", help="first day of the world (default: %(default)s)"
    )
    parser.add_argument(
        "--history-days",
        type=int,
        default=usual.history_days,
        help="days of behaviours before the epoch (default: %(default)s)",
    )
    parser.add_argument(
        "--defects",
        nargs="+",
        default=[],
        metavar="RATE",
        help="faults: a share of rows for all kinds of rows, NAME=SHARE for one; `--defects list` names them "
        "(default: none)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the days that were asked for."""
    if arguments.defects == ["list"]:
        print(described())
        return 0
    config = WorldConfig(
        users=arguments.users,
        items=arguments.items,
        seed=arguments.seed,
        epoch=parse_day(arguments.epoch),
        history_days=arguments.history_days,
        requests_per_user=arguments.requests_per_user,
    )
    first = parse_day(arguments.first) if arguments.first else config.epoch
    rows = write_days(config, arguments.out, first, arguments.days, parse_rates(arguments.defects))
    print(f"{arguments.out}: {arguments.days} days from {first}, {rows:,} impressions")
    return 0


@dataclass(frozen=True)
class Log:
    """What is to be written."""

    config: WorldConfig
    """The world."""
    out: str
    """Folder of the log."""
    first: date
    """First day that is written."""
    last: date
    """Last day, included."""
    faults: Faults
    """What is wrong with some rows."""
    continued: bool
    """Whether the day before ``first`` is there already."""

    def path(self, table: str, folder: str, block: int) -> str:
        """Return the file of a block in a folder of a table; an empty name is the table's own folder."""
        return storage.join(self.out, *(part for part in (table, folder) if part), f"part-{block}.parquet")


def write_days(
    config: WorldConfig,
    out: str,
    first: date,
    days: int,
    defects: Mapping[str, float] | None = None,
    tasks: int | None = None,
) -> int:
    """Write ``days`` days from ``first`` on, with users, items and the schema; return the impressions written.

    ``defects`` maps faults to shares (``defects.py``).  A world of several blocks is written by a Spark job of
    ``tasks`` tasks, by default one for each block.

    Raises:
        BadConfigError: if ``first`` is before the world's epoch, ``days`` is not positive, or the folder holds a
            world of more blocks.
    """
    if days < 1:
        raise BadConfigError(f"--days = {days} must be at least 1")
    if first < config.epoch:
        raise BadConfigError(f"the simulated world begins on {config.epoch}, so {first} cannot be written (--epoch)")
    users = storage.join(out, "users")
    if storage.exists(users) and len(storage.list_files(users, ".parquet")) > config.blocks:
        raise BadConfigError(f"{out} holds a larger world; write this one to another folder, or remove that one")
    log = Log(
        config,
        storage.resolve(out),
        first,
        first + timedelta(days=days - 1),
        Faults(config.seed, defects or {}),
        storage.exists(storage.join(out, "behaviors", f"ds={first - timedelta(days=1)}")),
    )
    storage.write_bytes(storage.join(out, "schema.toml"), SCHEMA_FILE.read_bytes())
    items = items_table(build_catalog(config))
    _write(log.faults.spoiled("items", items, None, 0), log.path("items", "", 0))
    if config.blocks > 1:
        return _write_with_spark(log, tasks or config.blocks)
    with Progress((log.last - config.first_day).days + 1, "days", "simulate") as progress:
        return write_block(log, 0, lambda: progress.advance(1))


def _write_with_spark(log: Log, tasks: int) -> int:
    """Write all blocks, each task some of them; return the impressions written."""
    from jobs.progress import watched
    from jobs.runner import telling
    from jobs.spark import session

    context = session(app="simulate").sparkContext
    blocks = context.parallelize(range(log.config.blocks), min(tasks, log.config.blocks))
    written = blocks.map(lambda block: write_block(log, block))
    with watched(context, "simulate", blocks.getNumPartitions()), telling("simulate"):
        return int(written.sum())


def write_block(log: Log, block: int, day_done: Callable[[], None] = lambda: None) -> int:
    """Play one block of the world and write its files; return the impressions written."""
    config, faults = log.config, log.faults
    catalog = build_catalog(config, block)
    _write(faults.spoiled("users", users_table(catalog), None, block), log.path("users", "", block))
    rows = 0
    history = _Growing(log.path("behaviors", "history", block))
    events: pa.Table | None = None
    due_E: Integers = np.zeros(0, dtype=np.int64)
    for day in play(config, log.last, block):
        happened, when_E = faults.delivered(
            behaviors_table(catalog, day), day.event_available_E, _next_requests(day), day.ds, block
        )
        events = happened if events is None else pa.concat_tables([events, happened])
        due_E = np.concatenate([due_E, when_E])
        known = due_E < microseconds(day.ds) + DAY
        delivered = events.filter(pa.array(known))
        delivered = delivered.sort_by([("available_at", "ascending"), ("event_id", "ascending")])
        events, due_E = events.filter(pa.array(~known)), due_E[~known]
        if day.ds < log.first:
            history.add(delivered)
        else:
            if day.ds == log.first and not log.continued:
                history.add(delivered.slice(0, 0))
                history.close()
            shown = impressions_table(catalog, day, conversion_times=faults.conversion_times)
            shown = faults.spoiled("impressions", shown, day.ds, block)
            rows += shown.num_rows
            _write(shown, log.path("impressions", f"ds={day.ds}", block))
            _write(delivered, log.path("behaviors", f"ds={day.ds}", block))
        day_done()
    return rows


class _Growing:
    """A file that is written day by day, so that a long history is held in memory compressed only."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.buffer = io.BytesIO()
        self.writer: pq.ParquetWriter | None = None

    def add(self, rows: pa.Table) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.buffer, rows.schema, compression="zstd")
        self.writer.write_table(rows)

    def close(self) -> None:
        assert self.writer is not None  # rows were added, if none then without any
        self.writer.close()
        storage.write_bytes(self.path, self.buffer.getvalue())


def _next_requests(day: Day) -> Integers:
    """Return for each event of a day the time of its shopper's next request of that day, 0 if there is none."""
    order = np.lexsort((day.ts_R, day.user_R))
    next_R = np.zeros(len(order), dtype=np.int64)
    same = day.user_R[order[1:]] == day.user_R[order[:-1]]
    next_R[order[:-1][same]] = day.ts_R[order[1:][same]]
    return next_R[day.event_request_E]


def users_table(catalog: Catalog) -> pa.Table:
    """Return one row per shopper of the block."""
    return pa.table(
        {
            "user_id": _names("u", catalog.first_user + np.arange(len(catalog.segment_U))),
            "segment": _names("segment-", catalog.segment_U),
            "age_band": _names("age-", catalog.age_band_U),
        }
    )


def items_table(catalog: Catalog) -> pa.Table:
    """Return one row per item."""
    return pa.table(
        {
            "item_id": _names("i", np.arange(len(catalog.category_M))),
            "category": _names("category-", catalog.category_M),
            "brand": _names("brand-", catalog.brand_M),
            "offer": _labels(OFFERS, catalog.offer_M),
            "price": pa.array(catalog.price_M),
        }
    )


def impressions_table(catalog: Catalog, day: Day, *, conversion_times: bool = False) -> pa.Table:
    """Return one row per shown item, in the order of time and place; with ``conversion_at`` if wanted."""
    r, k = np.nonzero(day.item_RK >= 0)
    table = pa.table(
        {
            "request_id": _names(_prefix(catalog, day), r),
            "user_id": _names("u", catalog.first_user + day.user_R[r]),
            "item_id": _names("i", day.item_RK[r, k]),
            "ts": pa.array(day.ts_R[r]).cast(_TIME),
            "position": pa.array(k.astype(np.int32)),
            "surface": _labels(SURFACES, day.surface_R[r]),
            "device": _labels(DEVICES, day.device_R[r]),
            "click": pa.array(day.click_RK[r, k].astype(np.int32)),
            "conversion": pa.array(day.conversion_RK[r, k].astype(np.int32)),
            "true_ctr": pa.array(day.true_ctr_RK[r, k]),
            "true_cvr": pa.array(day.true_cvr_RK[r, k]),
        }
    )
    if not conversion_times:
        return table
    bought = day.event_type_E == BOUGHT
    came_RK = np.zeros(day.item_RK.shape, dtype=np.int64)
    came_RK[day.event_request_E[bought], day.event_place_E[bought]] = day.event_available_E[bought]
    came = pa.array(came_RK[r, k], mask=~day.conversion_RK[r, k])
    return table.append_column("conversion_at", came.cast(_TIME))


def behaviors_table(catalog: Catalog, day: Day) -> pa.Table:
    """Return one row per event that happened on a day."""
    r, k, kind = day.event_request_E, day.event_place_E, day.event_type_E
    item = day.item_RK[r, k]
    of_day = _prefix(catalog, day)
    event_ids = [f"{of_day}{a}-{b}-{EVENT_TYPES[c - CLICKED]}" for a, b, c in zip(r, k, kind, strict=True)]
    return pa.table(
        {
            "event_id": pa.array(event_ids, pa.string()),
            "user_id": _names("u", catalog.first_user + day.user_R[r]),
            "item_id": _names("i", item),
            "type": _labels(EVENT_TYPES, kind - CLICKED),
            "ts": pa.array(day.event_ts_E).cast(_TIME),
            "available_at": pa.array(day.event_available_E).cast(_TIME),
            "category": _names("category-", catalog.category_M[item]),
            "brand": _names("brand-", catalog.brand_M[item]),
            "price": pa.array(catalog.price_M[item]),
            "surface": _labels(SURFACES, day.surface_R[r]),
        }
    )


def _prefix(catalog: Catalog, day: Day) -> str:
    """Return how the ids of a day's requests begin: with its date, and with the block where it is not the first."""
    return f"{day.ds:%Y%m%d}-" + (f"{catalog.block}." if catalog.block else "")


def _names(prefix: str, numbers: Integers) -> pa.Array:
    """Return ``prefix`` + number as text, each distinct text made once."""
    distinct, index = np.unique(numbers, return_inverse=True)
    texts = pa.array([f"{prefix}{number}" for number in distinct], pa.string())
    return texts.take(pa.array(index))


def _labels(texts: Sequence[str], index: Integers) -> pa.Array:
    return pa.array(texts, pa.string()).take(pa.array(index))


def _write(table: pa.Table, path: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(path, buffer.getvalue())
