"""A small log as plain rows, and the same as requests: for tests of files that come without a lake."""

from __future__ import annotations

import csv
import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = """
name = "plain"
timezone = "Europe/Berlin"
features = [
  {name = "user", side = "user", kind = "hashed", column = "user_id", hash_size = 64},
  {name = "age", side = "user", kind = "bucketized", column = "age_years", boundaries = [18.0, 30.0, 50.0]},
  {name = "page", side = "context", kind = "hashed", column = "page", hash_size = 8},
  {name = "item", side = "item", kind = "hashed", column = "item_id", hash_size = 64, embedding = "item"},
  {name = "price", side = "item", kind = "bucketized", column = "price", boundaries = [1.0, 5.0, 10.0]},
  {name = "event_item", side = "event", kind = "hashed", column = "item_id", hash_size = 64, embedding = "item"},
]
sequences = [{name = "click", event = "click", max_length = 8}, {name = "buy", event = "buy", max_length = 4}]
"""
START = datetime(2026, 3, 28, 20, 0, tzinfo=UTC)  # the night before Berlin's clocks go forward


def rows(requests: int, seed: int = 0, prefix: str = "r", after: int = 0) -> list[dict[str, Any]]:
    """Return impressions with raw values, later than so many requests; times are aware, sequences lists of events."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(requests):
        ts = START + timedelta(minutes=17 * (after + number), microseconds=int(rng.integers(1_000_000)))
        user = int(rng.integers(20))
        past = {
            name: [
                {"ts": ts - timedelta(minutes=int(back)), "item_id": f"i{rng.integers(30)}"}
                for back in rng.integers(1, 5000, int(rng.integers(0, most)))
            ]
            for name, most in (("seq_click", 6), ("seq_buy", 3))
        }
        for item in rng.choice(30, int(rng.integers(1, 4)), replace=False):
            click = int(rng.random() < 0.3 + 0.4 * (item % 2))
            found.append(
                {
                    "request_id": f"{prefix}{number:04d}",
                    "user_id": f"u{user}",
                    "item_id": f"i{item}",
                    "ts": ts,
                    "click": click,
                    "conversion": int(click and rng.random() < 0.3 + 0.4 * (item % 3 == 0)),
                    "age_years": 20 + user if user % 5 else None,
                    "page": ["home", "search", None][user % 3],
                    "price": float(item) / 2,
                    **past,
                }
            )
    return found


def write(file: Path, given: list[dict[str, Any]]) -> None:
    """Write rows in the format that the file's ending names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if ".csv" in file.name:
        with gzip.open(file, "wt") if file.name.endswith(".gz") else file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, given[0])
            writer.writeheader()
            writer.writerows({name: _text(value) for name, value in row.items()} for row in given)
    elif ".jsonl" in file.name:
        with gzip.open(file, "wt") if file.name.endswith(".gz") else file.open("w") as stream:
            stream.writelines(json.dumps(row, default=datetime.isoformat) + "\n" for row in given)
    else:
        pq.write_table(pa.Table.from_pylist(given), file)


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, default=datetime.isoformat)
    return value.isoformat() if isinstance(value, datetime) else value
