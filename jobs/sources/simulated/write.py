"""``onetrans simulate``: write days of the simulated world in the input contract of ``docs/input.md``.

An event is delivered on the day it became known, so a purchase just before
midnight may stand in the next day's file.  ``behaviors/history`` holds what was
delivered before the first day written, unless that earlier day is there already.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.sources.simulated.truth import OFFERS, SURFACES
from jobs.sources.simulated.world import (
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
from onetrans.errors import BadConfigError, PipelineError
from onetrans.progress import Progress

SCHEMA_FILE = Path(__file__).with_name("schema.toml")
"""Feature schema of the simulated log."""

EXAMPLES = """examples:
  onetrans simulate --out var/raw --from 2026-01-01 --days 10
  onetrans simulate --out var/raw --from 2026-01-11 --days 1    # the next day of the same world"""

_TIME = pa.timestamp("us", tz="UTC")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    usual = WorldConfig()
    parser.add_argument("--out", required=True, metavar="DIR", help="folder (or s3:// prefix) to write to")
    parser.add_argument("--from", dest="first", required=True, metavar="DAY", help="first day, YYYY-MM-DD")
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


def run(arguments: argparse.Namespace) -> int:
    """Write the days that were asked for."""
    config = WorldConfig(
        users=arguments.users,
        items=arguments.items,
        seed=arguments.seed,
        epoch=parse_day(arguments.epoch),
        history_days=arguments.history_days,
        requests_per_user=arguments.requests_per_user,
    )
    rows = write_days(config, arguments.out, parse_day(arguments.first), arguments.days)
    print(f"{arguments.out}: {arguments.days} days from {arguments.first}, {rows:,} impressions")
    return 0


def write_days(config: WorldConfig, out: str, first: date, days: int) -> int:
    """Write ``days`` days from ``first`` on, with users, items and the schema; return the impressions written.

    Raises:
        BadConfigError: if ``first`` is before the world's epoch, or ``days`` is not positive.
    """
    if days < 1:
        raise BadConfigError(f"--days = {days} must be at least 1")
    if first < config.epoch:
        raise BadConfigError(f"the simulated world begins on {config.epoch}, so {first} cannot be written (--epoch)")
    last = first + timedelta(days=days - 1)
    catalog = build_catalog(config)
    storage.write_bytes(storage.join(out, "schema.toml"), SCHEMA_FILE.read_bytes())
    _write(users_table(catalog), storage.join(out, "users", "part-0.parquet"))
    _write(items_table(catalog), storage.join(out, "items", "part-0.parquet"))
    continued = storage.exists(storage.join(out, "behaviors", f"ds={first - timedelta(days=1)}"))
    rows = 0
    earlier: list[pa.Table] = []
    pending: list[pa.Table] = []
    with Progress((last - config.first_day).days + 1, "days", "simulate") as progress:
        for day in play(config, last):
            events = pa.concat_tables([*pending, behaviors_table(catalog, day)])
            known = events["available_at"].cast(pa.int64()).to_numpy() < microseconds(day.ds) + DAY
            pending = [events.filter(pa.array(~known))]
            delivered = events.filter(pa.array(known))
            delivered = delivered.sort_by([("available_at", "ascending"), ("event_id", "ascending")])
            if day.ds < first:
                earlier.append(delivered)
            else:
                if day.ds == first and not continued:
                    history = pa.concat_tables([*earlier, delivered.slice(0, 0)])
                    _write(history, storage.join(out, "behaviors", "history", "part-0.parquet"))
                impressions = impressions_table(catalog, day)
                rows += impressions.num_rows
                _write(impressions, storage.join(out, "impressions", f"ds={day.ds}", "part-0.parquet"))
                _write(delivered, storage.join(out, "behaviors", f"ds={day.ds}", "part-0.parquet"))
            progress.advance(1)
    return rows


def users_table(catalog: Catalog) -> pa.Table:
    """Return one row per shopper."""
    return pa.table(
        {
            "user_id": _names("u", np.arange(len(catalog.segment_U))),
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


def impressions_table(catalog: Catalog, day: Day) -> pa.Table:
    """Return one row per shown item, in the order of time and place."""
    r, k = np.nonzero(day.item_RK >= 0)
    return pa.table(
        {
            "request_id": _request_ids(day, r),
            "user_id": _names("u", day.user_R[r]),
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


def behaviors_table(catalog: Catalog, day: Day) -> pa.Table:
    """Return one row per event that happened on a day."""
    r, k, kind = day.event_request_E, day.event_place_E, day.event_type_E
    item = day.item_RK[r, k]
    event_ids = [f"{day.ds:%Y%m%d}-{a}-{b}-{EVENT_TYPES[c - CLICKED]}" for a, b, c in zip(r, k, kind, strict=True)]
    return pa.table(
        {
            "event_id": pa.array(event_ids, pa.string()),
            "user_id": _names("u", day.user_R[r]),
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


def _request_ids(day: Day, request_N: Integers) -> pa.Array:
    return _names(f"{day.ds:%Y%m%d}-", request_N)


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


def main(argv: list[str] | None = None) -> int:
    """Run the command on its own and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
