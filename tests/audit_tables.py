"""Small valid days of every table, as rows a test can break: a factory per table, and staging them in a lake."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expectations.distribution import bins_of
from expectations.profile import profile_batch
from onetrans import storage
from onetrans.lake import Lake, Staged
from onetrans.schema import Aggregates, Feature, FeatureSchema, Sequence, hash64

DS = date(2024, 2, 29)
NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
ROWS = 24
LABELS = ("click", "conversion")

Row = dict[str, Any]
SECOND = timedelta(seconds=1)


def audit_schema(**changes: Any) -> FeatureSchema:
    """A schema with every kind of feature, an aggregate key and two sequences."""
    values: dict[str, Any] = {
        "name": "audit",
        "features": (
            Feature("user", "user", "hashed", "user_id", hash_size=97),
            Feature("segment", "user", "hashed", "segment", hash_size=7),
            Feature("user_ctr", "user", "bucketized", "user_ctr_7d", boundaries=(0.1, 0.2)),
            Feature("surface", "context", "hashed", "surface", hash_size=5),
            Feature("item", "item", "hashed", "item_id", hash_size=97),
            Feature("author", "item", "hashed", "author_id", hash_size=13),
            Feature("price", "item", "bucketized", "price", boundaries=(1.0, 5.0)),
            Feature("image", "item", "vector", "image", dim=3),
            Feature("event_item", "event", "hashed", "item_id", hash_size=97, embedding="item"),
            Feature("event_price", "event", "bucketized", "price", boundaries=(1.0, 5.0), embedding="price"),
        ),
        "sequences": (Sequence("click", "click", 3), Sequence("purchase", "purchase", 2)),
        "aggregates": Aggregates(windows=(1, 7), item_keys=("author_id",)),
    }
    return FeatureSchema(**{**values, **changes})


_TIME = pa.timestamp("us", tz="UTC")
_COUNTS = ("impressions", "clicks", "conversions", "ctr", "cvr")


def _aggregates(prefix: str) -> list[tuple[str, pa.DataType]]:
    return [(f"{prefix}_{figure}_{window}d", pa.float64()) for window in (1, 7) for figure in _COUNTS]


def _aggregate_values(prefix: str) -> Row:
    day = {"impressions": 10.0, "clicks": 4.0, "conversions": 1.0, "ctr": 0.4, "cvr": 0.25}
    week = {"impressions": 50.0, "clicks": 10.0, "conversions": 3.0, "ctr": 0.2, "cvr": 0.3}
    return {f"{prefix}_{f}_{w}d": figures[f] for w, figures in ((1, day), (7, week)) for f in _COUNTS}


def _impressions() -> tuple[pa.Schema, list[Row]]:
    kinds = pa.schema(
        [
            ("ds", pa.date32()),
            ("request_id", pa.string()),
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("ts", _TIME),
            ("position", pa.int32()),
            ("click", pa.int32()),
            ("conversion", pa.int32()),
            ("surface", pa.string()),
            ("true_ctr", pa.float64()),
            ("true_cvr", pa.float64()),
        ]
    )
    rows = [
        {
            "ds": DS,
            "request_id": f"r{i // 4}",
            "user_id": f"u{i // 8}",
            "item_id": f"i{i % 4}",
            "ts": NOON + (i // 4) * SECOND,
            "position": i % 4,
            "click": int(i % 2 == 0),
            "conversion": int(i % 4 == 0),
            "surface": "home" if i % 3 else None,
            "true_ctr": 0.5,
            "true_cvr": 0.5,
        }
        for i in range(ROWS)
    ]
    return kinds, rows


def _behaviors() -> tuple[pa.Schema, list[Row]]:
    kinds = pa.schema(
        [
            ("ds", pa.date32()),
            ("event_id", pa.int64()),
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("type", pa.string()),
            ("ts", _TIME),
            ("available_at", _TIME),
            ("price", pa.float64()),
        ]
    )
    rows = [
        {
            "ds": DS,
            "event_id": hash64(f"event {i}"),
            "user_id": f"u{i % 5}",
            "item_id": f"i{i % 7}",
            "type": "purchase" if i % 4 == 0 else "click",
            "ts": NOON + i * SECOND,
            "available_at": NOON + (i + i % 3) * SECOND,
            "price": 2.5 if i % 3 else None,
        }
        for i in range(ROWS)
    ]
    return kinds, rows


def _user_features() -> tuple[pa.Schema, list[Row]]:
    kinds = pa.schema([("ds", pa.date32()), ("user_id", pa.string()), ("segment", pa.string()), *_aggregates("user")])
    return kinds, [{"ds": DS, "user_id": f"u{i}", "segment": "new", **_aggregate_values("user")} for i in range(ROWS)]


def _item_features() -> tuple[pa.Schema, list[Row]]:
    kinds = pa.schema(
        [
            ("ds", pa.date32()),
            ("item_id", pa.string()),
            ("author_id", pa.string()),
            ("price", pa.float64()),
            ("image", pa.list_(pa.float32())),
            *_aggregates("item"),
            *_aggregates("author_id"),
        ]
    )
    rows = [
        {
            "ds": DS,
            "item_id": f"i{i}",
            "author_id": f"a{i % 3}",
            "price": 2.5,
            "image": [0.5, -1.0, float(i)] if i else None,
            **_aggregate_values("item"),
            **_aggregate_values("author_id"),
        }
        for i in range(ROWS)
    ]
    return kinds, rows


def _events(newest: datetime, count: int, salt: str, **extra: bool) -> list[Row]:
    return [
        {
            "ts": newest - back * SECOND,
            **({"available_at": newest - back * SECOND, "event_id": hash64(f"{salt} {back}")} if extra else {}),
            "event_item": hash64(f"i{back}"),
            "event_price": 2.5,
        }
        for back in range(count, 0, -1)
    ]


def _behavior_sequences() -> tuple[pa.Schema, list[Row]]:
    event = pa.struct(
        [
            ("ts", _TIME),
            ("available_at", _TIME),
            ("event_id", pa.int64()),
            ("event_item", pa.int64()),
            ("event_price", pa.float64()),
        ]
    )
    kinds = pa.schema(
        [
            ("ds", pa.date32()),
            ("user_id", pa.string()),
            ("seq_click", pa.list_(event)),
            ("seq_purchase", pa.list_(event)),
        ]
    )
    rows = [
        {
            "ds": DS,
            "user_id": f"u{i}",
            "seq_click": _events(NOON, 1 + i % 3, f"u{i}", known=True),
            "seq_purchase": None if i % 2 else _events(NOON, 2, f"u{i}", known=True),
        }
        for i in range(ROWS)
    ]
    return kinds, rows


def _training_requests() -> tuple[pa.Schema, list[Row]]:
    event = pa.struct([("ts", _TIME), ("event_item", pa.int64()), ("event_price", pa.float64())])
    candidate = pa.struct(
        [
            ("item_id", pa.string()),
            ("position", pa.int32()),
            ("item", pa.int64()),
            ("author", pa.int64()),
            ("price", pa.float64()),
            ("image", pa.list_(pa.float32())),
            ("click", pa.int32()),
            ("conversion", pa.int32()),
            ("true_ctr", pa.float64()),
            ("true_cvr", pa.float64()),
        ]
    )
    kinds = pa.schema(
        [
            ("ds", pa.date32()),
            ("request_id", pa.string()),
            ("user_id", pa.string()),
            ("ts", _TIME),
            ("user", pa.int64()),
            ("segment", pa.int64()),
            ("user_ctr", pa.float64()),
            ("surface", pa.int64()),
            ("seq_click", pa.list_(event)),
            ("seq_purchase", pa.list_(event)),
            ("candidates", pa.list_(candidate)),
        ]
    )
    rows = [
        {
            "ds": DS,
            "request_id": f"r{i}",
            "user_id": f"u{i % 5}",
            "ts": NOON + i * SECOND,
            "user": hash64(f"u{i % 5}"),
            "segment": hash64("new"),
            "user_ctr": 0.2,
            "surface": hash64("home"),
            "seq_click": _events(NOON + i * SECOND, i % 4, ""),
            "seq_purchase": None if i % 2 else _events(NOON, 2, ""),
            "candidates": [
                {
                    "item_id": f"i{c}",
                    "position": c,
                    "item": hash64(f"i{c}"),
                    "author": hash64("a"),
                    "price": 2.5,
                    "image": [0.5, -1.0, float(c)] if i or c else None,
                    "click": int(c == 0),
                    "conversion": int(c == 0 and i % 2 == 0),
                    "true_ctr": 0.5,
                    "true_cvr": 0.5,
                }
                for c in range(3)
            ],
        }
        for i in range(ROWS)
    ]
    return kinds, rows


def _candidate_scores() -> tuple[pa.Schema, list[Row]]:
    rates = ("ctr", "cvr", "ctcvr")
    kinds = pa.schema(
        [
            ("ds", pa.date32()),
            ("user_id", pa.string()),
            ("item_id", pa.string()),
            ("rank", pa.int32()),
            *((rate, pa.float64()) for rate in rates),
            ("model_version", pa.string()),
        ]
    )
    rows = [
        {
            "ds": DS,
            "user_id": f"u{i // 4}",
            "item_id": f"i{i % 4}",
            "rank": i % 4 + 1,
            "ctr": 0.5,
            "cvr": 0.25,
            "ctcvr": 0.125,
            "model_version": "7",
        }
        for i in range(ROWS)
    ]
    return kinds, rows


FACTORIES: dict[str, Callable[[], tuple[pa.Schema, list[Row]]]] = {
    "impressions": _impressions,
    "behaviors": _behaviors,
    "user_features": _user_features,
    "item_features": _item_features,
    "behavior_sequences": _behavior_sequences,
    "training_requests": _training_requests,
    "candidate_scores": _candidate_scores,
}
"""Per table: its Arrow schema and the rows of a valid day, new ones at every call."""


def valid_table(table: str) -> pa.Table:
    """A valid day of a table."""
    kinds, rows = FACTORIES[table]()
    return pa.Table.from_pylist(rows, schema=kinds)


def stage(lake: Lake, table: str, data: pa.Table, ds: date = DS, files: int = 2, **manifest: Any) -> Staged:
    """Write a day as a job does: Parquet files in a folder of its own, then the manifest."""
    folder = storage.local_path(lake.new_stage_path(table, ds))
    folder.mkdir(parents=True)
    share = -(-data.num_rows // files)
    for part in range(files):
        pq.write_table(data.slice(part * share, share), folder / f"part-{part:05d}.parquet")
    values: dict[str, Any] = {"path": f"file://{folder}", "rows": data.num_rows, **manifest}
    return lake.mark_staged(Staged(table, ds, **values))


def publish(lake: Lake, table: str, data: pa.Table, ds: date = DS, **verdict: Any) -> int:
    """Stage a day, call it audited, and publish it."""
    lake.write_verdict(stage(lake, table, data, ds), {"passed": True, **verdict})
    return lake.publish(table, ds)


INPUTS: dict[str, dict[str, Any]] = {
    "user_features": {"window": ROWS * 50},
    "item_features": {"window": ROWS * 50},
    "training_requests": {
        "impressions": ROWS * 3,
        "labels": (24, 12),
        "user_features": ROWS,
        "item_features": ROWS,
    },
}
"""What the valid day of a table was built from, as :func:`publish_inputs` takes it."""


def repeated(table: str, rows: int, ds: date = DS) -> pa.Table:
    """So many rows of a valid table, as of a day."""
    data = valid_table(table)
    data = data.set_column(0, "ds", pa.array([ds] * data.num_rows))
    return data.take([i % data.num_rows for i in range(rows)])


def publish_inputs(lake: Lake, about: dict[str, Any]) -> dict[str, int]:
    """Publish what the day was built from: so many rows of impressions (with their labels), of users and items."""
    inputs = {}
    if "impressions" in about:
        counted = {label: [0, 0, ones] for label, ones in zip(LABELS, about.get("labels", ()), strict=False)}
        data = repeated("impressions", about["impressions"])
        inputs["impressions"] = publish(lake, "impressions", data, distributions=counted)
    if "window" in about:
        for back, rows in ((3, 1), (1, about["window"] - 1)):
            ds = DS - timedelta(days=back)
            inputs["impressions"] = publish(lake, "impressions", repeated("impressions", rows, ds), ds)
    for table in ("user_features", "item_features"):
        if table in about:
            # Where they are few, the last ids, so that hardly any is one of the requests.
            count = about[table]
            data = valid_table(table).slice(ROWS - count) if count < ROWS else repeated(table, count)
            inputs[table] = publish(lake, table, data)
    return inputs


def usual_distributions(table: str) -> dict[str, list[int]]:
    """What the audit of a valid day counts."""
    watched = bins_of(table, audit_schema())
    profiles = profile_batch(valid_table(table).combine_chunks().to_batches()[0], watched)
    return {path: list(profiles[path].bins) for path in watched}


def only_file(staged: Staged, part: int = 0) -> Path:
    """The path of one of a staged day's files."""
    return sorted(storage.local_path(staged.path).glob("*.parquet"))[part]
