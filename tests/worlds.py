"""A small random world for tests: valid ``training_requests`` with a signal to learn, published to a lake.

Users and items have a point on a circle; a click is likely when the two are
near, a conversion when the item is also good.  Past events are drawn the same
way, so a model that reads the sequence knows the user better.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onetrans import storage
from onetrans.lake import Lake, Staged
from onetrans.schema import Feature, FeatureSchema, Sequence, hash64
from onetrans.settings import LakeSettings, MlflowSettings, Settings, TrainingSettings

FIRST_DAY = date(2024, 2, 26)  # a leap year's February, so that day arithmetic is exercised
MICROSECOND = pa.timestamp("us", tz="UTC")


VECTORS = (
    Feature("taste", "user", "vector", "taste", dim=3),
    Feature("scene", "context", "vector", "scene", dim=2),
    Feature("image", "item", "vector", "image", dim=4),
    Feature("title", "item", "vector", "title", dim=1),
)


def small_schema(hash_size: int = 97, max_length: int = 12, vectors: bool = False) -> FeatureSchema:
    """A schema with ids, categories and numbers, a shared table and two sequences; with vectors if wanted."""
    return FeatureSchema(
        name="small",
        features=(
            *(VECTORS if vectors else ()),
            Feature("user", "user", "hashed", "user_id", hash_size=hash_size),
            Feature("user_ctr", "user", "bucketized", "user_ctr_7d", boundaries=(0.1, 0.2, 0.4)),
            Feature("hour", "context", "hashed", "hour_of_day", hash_size=24),
            Feature("item", "item", "hashed", "item_id", hash_size=hash_size),
            Feature("author", "item", "hashed", "author_id", hash_size=13),
            Feature("item_ctr", "item", "bucketized", "item_ctr_7d", boundaries=(0.1, 0.2, 0.4, 0.6)),
            Feature("event_item", "event", "hashed", "item_id", hash_size=hash_size, embedding="item"),
            Feature("event_author", "event", "hashed", "author_id", hash_size=13, embedding="author"),
        ),
        sequences=(
            Sequence("click", "click", max_length=max_length),
            Sequence("purchase", "purchase", max_length=max_length),
        ),
    )


@dataclass(frozen=True)
class World:
    """What a world is made of."""

    users: int = 40
    """Distinct users."""
    items: int = 60
    """Distinct items."""
    requests: int = 60
    """Requests of one day."""
    candidates: int = 8
    """Most candidates of a request; each has 1 to this many."""
    events: int = 10
    """Most events of one sequence of a request; each has 0 to this many."""
    null_share: float = 0.05
    """Share of feature values, and of whole sequences, that are null."""
    truth: bool = True
    """Whether the simulator's ``true_ctr`` and ``true_cvr`` are written."""
    seed: int = 0
    """Seed of the whole world; each day and file has its own stream."""


def write_requests(
    path: Path, ds: date, schema: FeatureSchema, world: World, *, part: int = 0, row_group_size: int = 16
) -> pa.Table:
    """Write one Parquet file, the ``part``-th of one day's requests, ordered by time; return its rows."""
    rng = np.random.default_rng([world.seed, ds.toordinal(), part])
    geometry = np.random.default_rng(world.seed)
    user_angle = geometry.uniform(0, 2 * np.pi, world.users)
    item_angle = geometry.uniform(0, 2 * np.pi, world.items)
    item_quality = geometry.normal(0, 1, world.items)

    requests = world.requests
    midnight = datetime.combine(ds, time(), tzinfo=UTC)
    start = int(midnight.timestamp()) * 1_000_000
    # Whole seconds, few of them, so that requests and events tie.
    request_ts = np.sort(start + rng.integers(0, 86_400, requests) * 1_000_000)
    user = rng.integers(0, world.users, requests)

    sizes = rng.integers(1, world.candidates + 1, requests)
    owner = np.repeat(np.arange(requests), sizes)
    item = np.concatenate([rng.permutation(world.items)[:size] for size in sizes])  # an item once per request
    near = np.cos(user_angle[user[owner]] - item_angle[item])
    true_ctr = _sigmoid(-0.3 + 2.5 * near)
    true_cvr = _sigmoid(-0.3 + 1.5 * item_quality[item] + near)
    click = (rng.random(owner.shape[0]) < true_ctr).astype(np.int32)
    conversion = click * (rng.random(owner.shape[0]) < true_cvr).astype(np.int32)

    columns: dict[str, pa.Array] = {
        "ds": pa.array([ds] * requests),
        "request_id": pa.array([f"{ds}-{part}-{r}" for r in range(requests)]),
        "user_id": pa.array([f"u{u}" for u in user]),
        "ts": pa.array(request_ts, MICROSECOND),
    }
    hours = (request_ts - start) // 3_600_000_000
    sources = {
        "user_id": np.array([hash64(f"u{u}") for u in range(world.users)])[user],
        "user_ctr_7d": rng.random(requests),
        "hour_of_day": np.array([hash64(str(h)) for h in range(24)])[hours],
    }
    for feature in (*schema.of_side("user"), *schema.of_side("context")):
        columns[feature.name] = _with_nulls(sources.get(feature.column), feature, requests, rng, world)
    for sequence in schema.sequences:
        columns[sequence.column] = _events(schema, world, rng, user_angle[user], item_angle, request_ts)

    item_sources = {**_item_sources(item), "item_ctr_7d": rng.random(item.shape[0])}
    fields: dict[str, pa.Array] = {"item_id": pa.array([f"i{i}" for i in item])}
    fields["position"] = pa.array(np.concatenate([np.arange(n) for n in sizes]).astype(np.int32))
    for feature in schema.of_side("item"):
        fields[feature.name] = _with_nulls(item_sources.get(feature.column), feature, item.shape[0], rng, world)
    fields["click"] = pa.array(click)
    fields["conversion"] = pa.array(conversion)
    if world.truth:
        fields["true_ctr"] = pa.array(true_ctr)
        fields["true_cvr"] = pa.array(true_cvr)
    columns["candidates"] = _list_of_structs(np.concatenate([[0], np.cumsum(sizes)]), fields)

    table = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return table


def publish_day(lake: Lake, ds: date, schema: FeatureSchema, world: World, *, files: int = 2) -> list[pa.Table]:
    """Stage, pass and publish one day of requests in ``files`` files; return their rows."""
    stage = lake.new_stage_path("training_requests", ds)
    share = replace(world, requests=max(world.requests // files, 1))
    tables = [
        write_requests(storage.local_path(stage) / f"part-{part}.parquet", ds, schema, share, part=part)
        for part in range(files)
    ]
    rows = sum(table.num_rows for table in tables)
    lake.write_verdict(lake.mark_staged(Staged("training_requests", ds, stage, rows)), {"passed": True})
    lake.publish("training_requests", ds)
    return tables


def publish_days(lake: Lake, count: int, schema: FeatureSchema, world: World, first: date = FIRST_DAY) -> list[date]:
    """Publish ``count`` days in a row and return them."""
    days = [first + timedelta(days=offset) for offset in range(count)]
    for ds in days:
        publish_day(lake, ds, schema, world)
    return days


def settings_in(folder: Path, **training: object) -> Settings:
    """Settings whose lake, runs and MLflow store all lie in ``folder``, for the tiny models."""
    values = {"preset": "tiny", "batch_size": 64, "threads": 1, "device": "cpu", "runs": str(folder / "runs")}
    return Settings(
        lake=LakeSettings(warehouse=str(folder / "lake")),
        training=TrainingSettings(**{**values, **training}),  # type: ignore[arg-type]
        mlflow=MlflowSettings(tracking_uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "mlflow-artifacts")),
    )


def write_schema(path: Path, schema: FeatureSchema) -> Path:
    """Write a schema file; JSON's texts, numbers and lists are TOML too."""

    def written(entry: dict[str, Any]) -> list[str]:
        return [f"{name} = {json.dumps(value)}" for name, value in entry.items()]

    data = schema.to_dict()
    tables = {"aggregates": data.pop("aggregates")}
    tables |= {f"columns.{table}": names for table, names in data.pop("columns").items()}
    lists = {section: data.pop(section) for section in ("features", "sequences")}
    lines = written(data)
    for section, entry in tables.items():
        lines += [f"[{section}]", *written(entry)]
    for section, entries in lists.items():
        for entry in entries:
            lines += [f"[[{section}]]", *written(entry)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def _item_sources(item: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "item_id": np.array([hash64(f"i{i}") for i in item], dtype=np.int64),
        "author_id": np.array([hash64(f"a{i % 7}") for i in item], dtype=np.int64),
    }


def _with_nulls(
    values: np.ndarray | None, feature: Feature, count: int, rng: np.random.Generator, world: World
) -> pa.Array:
    if feature.kind == "vector":
        numbers = rng.normal(0, 3, (count, feature.dim)).astype(np.float32)
        null = rng.random(count) < world.null_share
        return pa.array([None if n else list(v) for n, v in zip(null, numbers, strict=True)], pa.list_(pa.float32()))
    kind = pa.int64() if feature.kind == "hashed" else pa.float64()
    return pa.array(values, kind, mask=rng.random(count) < world.null_share)


def _list_of_structs(offsets: np.ndarray, fields: dict[str, pa.Array], null: np.ndarray | None = None) -> pa.Array:
    starts = pa.array(
        offsets.astype(np.int32), pa.int32(), mask=None if null is None else np.concatenate([null, [False]])
    )
    return pa.ListArray.from_arrays(starts, pa.StructArray.from_arrays(list(fields.values()), names=list(fields)))


def _events(
    schema: FeatureSchema,
    world: World,
    rng: np.random.Generator,
    angle: np.ndarray,
    item_angle: np.ndarray,
    request_ts: np.ndarray,
) -> pa.Array:
    """Past events of each request, oldest first, strictly before it, liked items more often."""
    requests = request_ts.shape[0]
    null = rng.random(requests) < world.null_share
    sizes = np.where(null, 0, rng.integers(0, world.events + 1, requests))
    owner = np.repeat(np.arange(requests), sizes)
    offered = rng.integers(0, world.items, (owner.shape[0], 4))
    nearest = np.argmax(np.cos(item_angle[offered] - angle[owner][:, None]), axis=1)
    item = offered[np.arange(owner.shape[0]), nearest]
    ts = request_ts[owner] - rng.integers(1, 3 * world.events + 2, owner.shape[0]) * 1_000_000
    order = np.lexsort((ts, owner))
    sources = _item_sources(item[order])
    fields = {"ts": pa.array(ts[order], MICROSECOND)}
    for feature in schema.of_side("event"):
        fields[feature.name] = _with_nulls(sources[feature.column], feature, owner.shape[0], rng, world)
    return _list_of_structs(np.concatenate([[0], np.cumsum(sizes)]), fields, null)
