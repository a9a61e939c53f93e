"""What a change of the feature schema asks for: nothing, tables built again, or another lake.

Published rows hold the declared columns as text, hashes and raw numbers, and hash
sizes and boundaries are applied when a batch is made.  So much can change without
touching a table; the model then goes on or begins afresh, as
:func:`onetrans.growth.growth` decides.  What is counted, joined or cut to length is
in the rows, so days have to be built again.  And a column has one type in an
Iceberg table, whose days also have one meaning: what breaks that is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from onetrans import storage
from onetrans.growth import growth
from onetrans.plan import plans_of_days
from onetrans.schema import FeatureSchema

Class = Literal["compatible", "rebuild", "refused"]

COMPATIBLE: Class = "compatible"
REBUILD: Class = "rebuild"
REFUSED: Class = "refused"

_BUILD = "build the days again that are to be trained on: python -m jobs.backfill --from DAY --to DAY"
_FILLS = f"{_BUILD}; events of the days before the first of them have nothing of it"
_ANEW = "a lake of its own: another lake.namespace, and a backfill from the first day"


@dataclass(frozen=True)
class Change:
    """One difference between two schemas."""

    kind: Class
    """What it asks for."""
    what: str
    """What differs."""
    remedy: str
    """What to do, or what happens by itself."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}; {self.remedy}"


def planned_schema(runs: str) -> FeatureSchema | None:
    """Return the schema of the newest day that was planned; None if there is none that can be read.

    Of a day with several plans it is the newest plan's.  A training on plain files has a schema of its own, which says
    nothing of the tables.
    """
    for _, files in reversed(plans_of_days(runs).items()):
        plans = [storage.read_json(file) for file in files]
        for plan in sorted(plans, key=lambda data: str(data.get("created_at", "")), reverse=True):
            try:
                return FeatureSchema.from_dict(plan["schema"])
            except (KeyError, TypeError, ValueError):
                continue
    return None


def schema_changes(before: FeatureSchema, now: FeatureSchema) -> list[Change]:
    """Return every difference with its class, the gravest first; none if the schemas are the same."""
    if before == now:
        return []
    order = {REFUSED: 0, REBUILD: 1, COMPATIBLE: 2}
    return sorted(_changes(before, now), key=lambda change: order[change.kind])


def _changes(before: FeatureSchema, now: FeatureSchema) -> Iterator[Change]:
    yield from _columns(before, now)
    yield from _features(before, now)
    yield from _sequences(before, now)
    if before.timezone != now.timezone:
        yield Change(REFUSED, f"timezone is {now.timezone}, was {before.timezone}: days begin at another hour", _ANEW)
    for name in (
        "day_tolerance_minutes", "aggregates", "epoch", "derived_behaviors", "outcome_delay_minutes",
        "attribution_hours", "columns", "request_from",
    ):  # fmt: skip
        if getattr(before, name) != getattr(now, name):
            yield Change(REBUILD, f"{name} differs, by which rows are made", _BUILD)
    grown, difference = growth(before, now)
    if difference:
        yield Change(COMPATIBLE, difference, "both models begin with fresh weights, over training.lookback_days")
    elif grown:
        yield Change(COMPATIBLE, "hash tables grow by a multiple", "both models go on with what they learned")
    if before.name != now.name:
        yield Change(COMPATIBLE, f"its name is {now.name}, was {before.name}", "nothing rests on it")


def _columns(before: FeatureSchema, now: FeatureSchema) -> Iterator[Change]:
    """Yield columns whose type would change in a table that has them."""
    kinds = {(f.side, f.column): f.kind for f in before.features}
    told = set()
    for feature in now.features:
        key = feature.side, feature.column
        if kinds.get(key, feature.kind) != feature.kind and key not in told:
            told.add(key)
            yield Change(
                REFUSED,
                f"column {feature.column} ({feature.side}) is {feature.kind}, was {kinds[key]}: a column has one type",
                f"give it another name in the log ([columns] of the schema), or {_ANEW}",
            )
    then = {f.name: f for f in before.features}
    for feature in now.features:
        old = then.get(feature.name)
        if old and old.kind != feature.kind and (feature.side, feature.column) not in told:
            yield Change(
                REFUSED,
                f"feature {feature.name} is {feature.kind}, was {old.kind}: its column has one type",
                "give the feature another name",
            )


def _features(before: FeatureSchema, now: FeatureSchema) -> Iterator[Change]:
    then, here = ({f.name: f for f in schema.features} for schema in (before, now))
    for name in sorted(here.keys() - then.keys()):
        remedy = _FILLS if here[name].side == "event" else _BUILD
        yield Change(REBUILD, f"feature {name} is new: published days do not hold it", remedy)
    for name in sorted(then.keys() - here.keys()):
        yield Change(COMPATIBLE, f"feature {name} is gone", "published days keep its column, and nobody reads it")
    for name in sorted(then.keys() & here.keys()):
        old, new = then[name], here[name]
        if old.kind == new.kind and (old.side, old.column, old.dim) != (new.side, new.column, new.dim):
            yield Change(REBUILD, f"feature {name} reads something else than before", _BUILD)


def _sequences(before: FeatureSchema, now: FeatureSchema) -> Iterator[Change]:
    then, here = ({s.name: s for s in schema.sequences} for schema in (before, now))
    for name in sorted(here.keys() - then.keys()):
        yield Change(REBUILD, f"sequence {name} is new", _FILLS)
    for name in sorted(then.keys() - here.keys()):
        yield Change(COMPATIBLE, f"sequence {name} is gone", "published days keep its column, and nobody reads it")
    for name in sorted(then.keys() & here.keys()):
        old, new = then[name], here[name]
        if old.event != new.event:
            yield Change(REBUILD, f"sequence {name} holds {new.event} events, held {old.event}", _BUILD)
        elif new.max_length > old.max_length:
            yield Change(REBUILD, f"sequence {name} keeps {new.max_length} events, kept {old.max_length}", _FILLS)
        elif new.max_length < old.max_length:
            yield Change(
                COMPATIBLE, f"sequence {name} keeps {new.max_length} events, kept {old.max_length}",
                "published days hold more, of which the last are read",
            )  # fmt: skip
