"""Classes of a change of the feature schema: compatible, needs a rebuild, refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from worlds import small_schema

from onetrans.growth import growth
from onetrans.plan import NEXT_BATCH_FOLDER, PLAIN_FOLDER
from onetrans.schema import Feature, FeatureSchema, Sequence
from onetrans.schema_change import COMPATIBLE, REBUILD, REFUSED, planned_schema, schema_changes

BEFORE = small_schema()


def _with(schema: FeatureSchema, name: str, **changes: object) -> FeatureSchema:
    features = tuple(replace(f, **changes) if f.name == name else f for f in schema.features)
    return replace(schema, features=features)


def _more(schema: FeatureSchema, *features: Feature) -> FeatureSchema:
    return replace(schema, features=(*schema.features, *features))


def _without(schema: FeatureSchema, name: str) -> FeatureSchema:
    return replace(schema, features=tuple(f for f in schema.features if f.name != name))


def _longer(schema: FeatureSchema, length: int) -> FeatureSchema:
    first, *rest = schema.sequences
    return replace(schema, sequences=(replace(first, max_length=length), *rest))


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        (lambda s: small_schema(hash_size=194), COMPATIBLE, "grow by a multiple"),
        (lambda s: small_schema(hash_size=100), COMPATIBLE, "fresh weights"),
        (lambda s: _with(s, "user_ctr", boundaries=(0.5,)), COMPATIBLE, "fresh weights"),
        (lambda s: _without(s, "author"), COMPATIBLE, "feature author is gone"),
        (lambda s: _longer(s, 3), COMPATIBLE, "keeps 3 events, kept 12"),
        (lambda s: replace(s, sequences=s.sequences[:1]), COMPATIBLE, "sequence purchase is gone"),
        (lambda s: replace(s, name="renamed"), COMPATIBLE, "its name is renamed"),
        (lambda s: _more(s, Feature("brand", "item", "hashed", "brand", hash_size=5)), REBUILD, "feature brand is new"),
        (lambda s: _with(s, "user_ctr", column="user_ctr_1d"), REBUILD, "user_ctr reads something else"),
        (lambda s: _longer(s, 50), REBUILD, "keeps 50 events, kept 12"),
        (lambda s: replace(s, sequences=(*s.sequences, Sequence("cart", "cart", 5))), REBUILD, "sequence cart is new"),
        (lambda s: replace(s, attribution_hours=24.0), REBUILD, "attribution_hours differs"),
        (lambda s: replace(s, day_tolerance_minutes=5), REBUILD, "day_tolerance_minutes differs"),
        (lambda s: replace(s, timezone="Asia/Tokyo"), REFUSED, "days begin at another hour"),
        (
            lambda s: _with(s, "user_ctr", kind="hashed", boundaries=(), hash_size=9),
            REFUSED,
            "column user_ctr_7d (user) is hashed, was bucketized",
        ),
        (
            lambda s: _with(s, "user_ctr", kind="hashed", boundaries=(), hash_size=9, column="segment"),
            REFUSED,
            "feature user_ctr is hashed, was bucketized",
        ),
    ],
)
def test_a_change_has_its_class(change: Callable[[FeatureSchema], FeatureSchema], kind: str, told: str) -> None:
    first, *_ = schema_changes(BEFORE, change(BEFORE))
    assert first.kind == kind, first
    assert any(told in str(found) for found in schema_changes(BEFORE, change(BEFORE)))


def test_every_part_of_a_schema_has_a_class() -> None:
    """By its own line: that models begin afresh is said of any difference beside it."""
    others = {
        "name": "another",
        "timezone": "Asia/Tokyo",
        "day_tolerance_minutes": 7,
        "aggregates": replace(BEFORE.aggregates, smoothing=77.0),
        "epoch": "ms",
        "derived_behaviors": ("click",),
        "outcome_delay_minutes": 7,
        "attribution_hours": 7.0,
        "columns": {"impressions": {"user_id": "u"}},
        "request_from": ("user_id", "ts"),
    }
    assert {*others, "features", "sequences"} == {field.name for field in fields(FeatureSchema)}
    for name, value in others.items():
        changed = replace(BEFORE)
        object.__setattr__(changed, name, value)  # some make sense with others alone
        told = schema_changes(BEFORE, changed)
        assert [change for change in told if name in change.what], name


def test_the_gravest_is_told_first_and_nothing_of_the_same() -> None:
    assert schema_changes(BEFORE, small_schema()) == []
    now = replace(_longer(_more(BEFORE, Feature("x", "item", "hashed", "x", hash_size=5)), 3), timezone="Asia/Tokyo")
    assert [change.kind for change in schema_changes(BEFORE, now)][:3] == [REFUSED, REBUILD, COMPATIBLE]


def test_what_is_said_of_the_models_is_what_planning_does() -> None:
    grown = small_schema(hash_size=194)
    assert growth(BEFORE, grown)[0]
    assert [str(change) for change in schema_changes(BEFORE, grown)] == [
        "compatible: hash tables grow by a multiple; both models go on with what they learned"
    ]


def test_the_newest_planned_schema_is_found(tmp_path: Path) -> None:
    import json

    assert planned_schema(str(tmp_path)) is None
    for day, size in (("2026-01-09", 10), ("2026-01-10", 20), ("2026-01-08", 30)):
        folder = tmp_path / f"ds={day}" / "abc"
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps({"schema": small_schema(hash_size=size).to_dict()}))
    for folder, size in ((PLAIN_FOLDER, 40), (NEXT_BATCH_FOLDER, 50)):
        (tmp_path / folder / "abc").mkdir(parents=True)
        (tmp_path / folder / "abc" / "plan.json").write_text(
            json.dumps({"schema": small_schema(hash_size=size).to_dict()})
        )
    assert planned_schema(str(tmp_path)) == small_schema(hash_size=20), "a training of no day is of no day"
    for name, hour, size in (("aaa", "12", 60), ("zzz", "11", 70)):
        (tmp_path / "ds=2026-01-10" / name).mkdir()
        plan = {"created_at": f"2026-01-11T{hour}:00:00+00:00", "schema": small_schema(hash_size=size).to_dict()}
        (tmp_path / "ds=2026-01-10" / name / "plan.json").write_text(json.dumps(plan))
    assert planned_schema(str(tmp_path)) == small_schema(hash_size=60), "the newest plan of the day"
