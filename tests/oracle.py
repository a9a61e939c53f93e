"""What the tables should hold, worked out the slow way: plain Python over plain rows, one loop per rule.

Nothing here is incremental, nothing is capped before it must be, and no code is
shared with the jobs but the hash.  A world is a log of several days with what
real logs have: ties, late and repeated deliveries, events at the very instant
of a request and at midnight, outcomes known later, unknown users and items.
"""

from __future__ import annotations

import random
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from onetrans.schema import Aggregates, Feature, FeatureSchema, Sequence, hash64

Row = dict[str, Any]

SCHEMA = FeatureSchema(
    name="oracle",
    timezone="America/New_York",
    day_tolerance_minutes=30,
    features=(
        Feature("user", "user", "hashed", "user_id", hash_size=50),
        Feature("age", "user", "bucketized", "age", boundaries=(20.0, 40.0)),
        Feature("taste", "user", "vector", "taste", dim=2),
        Feature("user_ctr", "user", "bucketized", "user_ctr_2d", boundaries=(0.1, 0.5)),
        Feature("hour", "context", "bucketized", "hour_of_day", boundaries=(6.0, 12.0, 18.0)),
        Feature("weekday", "context", "hashed", "day_of_week", hash_size=10),
        Feature("device", "context", "hashed", "device", hash_size=10),
        Feature("item", "item", "hashed", "item_id", hash_size=50),
        Feature("brand", "item", "hashed", "brand", hash_size=10),
        Feature("price", "item", "bucketized", "price", boundaries=(1.0, 10.0)),
        Feature("picture", "item", "vector", "image", dim=3),
        Feature("brand_cvr", "item", "bucketized", "brand_cvr_1d", boundaries=(0.1, 0.5)),
        Feature("event_item", "event", "hashed", "item_id", hash_size=50, embedding="item"),
        Feature("event_price", "event", "bucketized", "price", boundaries=(1.0, 10.0), embedding="price"),
        Feature("event_place", "event", "hashed", "place", hash_size=10),
    ),
    sequences=(Sequence("click", "click", max_length=3), Sequence("buy", "purchase", max_length=2)),
    aggregates=Aggregates(windows=(1, 2), item_keys=("brand",), smoothing=3.0),
    attribution_hours=30,
)
"""Short sequences, so that most of them overflow, and a time zone whose clock changes within the days."""

DERIVED: dict[str, Any] = {
    "features": (
        *(feature for feature in SCHEMA.features if feature.name != "event_place"),
        Feature("event_place", "event", "hashed", "device", hash_size=10),
    ),
    "sequences": (Sequence("click", "click", max_length=3), Sequence("buy", "conversion", max_length=2)),
    "derived_behaviors": ("impression", "click", "conversion"),
    "outcome_delay_minutes": 120,
}
"""What differs of a log without behaviours of its own; outcomes become known at instants of the grid."""

FIRST_DAY = date(2024, 3, 9)  # the 10th has 23 hours in New York


@dataclass
class World:
    """A raw log: rows with the contract's columns, times as aware datetimes."""

    impressions: dict[date, list[Row]] = field(default_factory=lambda: defaultdict(list))
    behaviors: dict[date, list[Row]] = field(default_factory=lambda: defaultdict(list))
    history: list[Row] = field(default_factory=list)
    users: list[Row] = field(default_factory=list)
    items: list[Row] = field(default_factory=list)
    schema: FeatureSchema = SCHEMA
    conversion_times: bool = True
    """Whether the log has the column ``conversion_at``."""
    users_by_day: dict[date, list[Row]] = field(default_factory=dict)
    """Users of each day, where the log has a folder per day; else ``users`` hold on all days."""
    items_by_day: dict[date, list[Row]] = field(default_factory=dict)
    """Items, likewise."""
    taken: set[tuple[Any, ...]] = field(default_factory=set)
    """Identities of the events drawn so far: what an event says never changes."""

    @property
    def days(self) -> list[date]:
        return sorted(self.impressions)

    @property
    def first_day(self) -> date:
        return self.days[0]

    def users_of(self, ds: date) -> dict[str, Row]:
        return {user["user_id"]: user for user in self.users_by_day.get(ds, self.users)}

    def items_of(self, ds: date) -> dict[str, Row]:
        return {item["item_id"]: item for item in self.items_by_day.get(ds, self.items)}

    def start(self, ds: date) -> datetime:
        """The first instant of a day; on some days of some zones local midnight does not exist."""
        return datetime(ds.year, ds.month, ds.day, tzinfo=ZoneInfo(self.schema.timezone)).astimezone(UTC)

    def grid(self, ds: date) -> list[datetime]:
        """Every second hour of a day, and its last microsecond."""
        start, end = self.start(ds), self.start(ds + timedelta(days=1))
        hours = round((end - start) / timedelta(hours=1))
        return [*(start + timedelta(hours=h) for h in range(0, hours, 2)), end - timedelta(microseconds=1)]


def random_world(
    seed: int,
    days: int = 3,
    users: int = 60,
    items: int = 12,
    first_day: date = FIRST_DAY,
    schema: FeatureSchema = SCHEMA,
    conversion_times: bool = True,
    daily: bool = False,
    absent: int | None = None,
) -> World:
    """Draw a world whose times lie on a grid of two hours, so that nearly everything ties with something.

    ``daily`` gives each day users and items of its own; ``absent`` is the number of a day that the log lost.
    """
    draw = random.Random(seed)
    world = World(schema=schema, conversion_times=conversion_times)
    world.users = [
        {"user_id": f"u{u}", "age": draw.choice([None, draw.uniform(10, 60)]), "taste": [0.5, -u] if u % 3 else None}
        for u in range(users)
        if u % 5
    ]
    world.items = [
        {
            "item_id": f"i{i}",
            "brand": draw.choice(["a", "b", None]),
            "price": draw.choice([None, draw.uniform(0, 20)]),
            "image": [0.25, i, -1.5] if i % 4 else None,
        }
        for i in range(items)
        if i % 6
    ]
    dates = [first_day + timedelta(days=d) for d in range(days)]
    for number, ds in enumerate(dates):
        for u in range(users):
            if u % 7 == 0 or schema.derived_behaviors:
                continue  # shown things now and then, but never acts
            for _ in range(draw.choice([0, 1, 2, 5])):
                _add_event(world, draw, dates, number, f"u{u}", f"i{draw.randrange(items)}")
        for u in range(users):
            for r in range(draw.choice([0, 0, 1, 2])):
                _add_request(world, draw, ds, f"u{u}", f"{ds}-{u}-{r}", items)
    if absent is not None:
        lost = dates.pop(absent)
        world.impressions.pop(lost, None)
        world.behaviors.pop(lost, None)
    _fill(world, draw, dates, items)
    for ds in world.days if daily else ():
        world.users_by_day[ds], world.items_by_day[ds] = world.users, world.items
        _change_attributes(world, draw, ds)
    return world


def _change_attributes(world: World, draw: random.Random, ds: date) -> None:
    """Give some users and items of a day other values, and take some out."""
    world.users_by_day[ds] = [
        {**user, "age": draw.uniform(10, 60)} if draw.random() < 0.3 else user
        for user in world.users_by_day[ds]
        if user is world.users_by_day[ds][0] or draw.random() < 0.9
    ]
    world.items_by_day[ds] = [
        {**item, "price": draw.uniform(0, 20)} if draw.random() < 0.5 else item
        for item in world.items_by_day[ds]
        if item is world.items_by_day[ds][0] or draw.random() < 0.9
    ]


def with_other_history(world: World, seed: int) -> World:
    """Return the world with another history: events gone, told otherwise, and new."""
    draw = random.Random(seed)
    after = deepcopy(world)
    after.history = [
        {**event, "place": "other"} if draw.random() < 0.3 else event for event in world.history if draw.random() < 0.7
    ]
    for n in range(20):
        ts = draw.choice(world.grid(world.first_day)) - timedelta(days=2)
        event = {"event_id": f"new-{seed}-{n}", "user_id": f"u{n}", "item_id": f"i{n % 5}", "type": "click", "ts": ts}
        after.history.append({**event, "available_at": None, "place": "home"})
    return after


def corrected(world: World, ds: date, seed: int, items: int = 12) -> World:
    """Return the world as a correction of one day tells it: rows of the day gone, changed and new, its items too.

    New events of the day are late: they happened on any day up to then.  An event that is gone may still come with a
    later delivery, which is then its first.
    """
    draw = random.Random(seed)
    after = deepcopy(world)
    dates = world.days[: world.days.index(ds) + 1]
    rows = [row for row in world.impressions[ds] if hash64(row["request_id"]) % 4]
    after.impressions[ds] = [{**row, "click": 1} if hash64(row["item_id"]) % 3 == 0 else dict(row) for row in rows]
    after.behaviors[ds] = [event for event in world.behaviors[ds] if draw.random() < 0.7 or event["type"] == "other"]
    for number in range(0 if world.schema.derived_behaviors else len(dates)):
        for u in range(1, 30):
            _add_event(after, draw, dates, number, f"u{u}", f"i{draw.randrange(items)}", delivered=ds)
    for u in range(0, 30, 3):
        _add_request(after, draw, ds, f"u{u}", f"{ds}-{u}-new-{seed}", items)
    _fill(after, draw, [ds], items)
    if world.items_by_day:
        _change_attributes(after, draw, ds)
    return after


def _fill(world: World, draw: random.Random, dates: list[date], items: int) -> None:
    """Give every day a row: an empty day would be an error, and is tested as one."""
    for ds in dates:
        if not world.impressions[ds]:
            _add_request(world, draw, ds, "u1", f"{ds}-filled", items)
        if world.schema.derived_behaviors:
            if not any(row["click"] for row in world.impressions[ds]):
                world.impressions[ds] = [{**row, "click": 1} for row in world.impressions[ds]]
            continue
        while not any(event["type"] == "click" for event in world.behaviors[ds]):
            _add_event(world, draw, [ds], 0, "u1", f"i{draw.randrange(10**6)}", delivered=ds)


def _add_event(
    world: World,
    draw: random.Random,
    dates: list[date],
    number: int,
    user: str,
    item: str,
    delivered: date | None = None,
) -> None:
    """Add an event that happened on a day: to the history, to the delivery of that day or of a later one."""
    ds, taken = dates[number], world.taken
    old = delivered is None and number == 0 and draw.random() < 0.5
    ts = draw.choice(world.grid(ds)) - timedelta(days=3 if old else 0)
    kind = draw.choice(["click", "click", "purchase", "other"])
    if (user, item, kind, ts) in taken:
        return
    taken.add((user, item, kind, ts))
    wait = draw.choice([None, timedelta(0), timedelta(hours=2), timedelta(hours=6), timedelta(hours=26)])
    event = {
        "event_id": draw.choice([None, f"e{len(taken)}"]),
        "user_id": user,
        "item_id": item,
        "type": kind,
        "ts": ts,
        "available_at": None if wait is None else ts + wait,
        "place": draw.choice(["home", "search", None]),
    }
    if old:
        world.history.append({**event, "available_at": None})
        return
    if delivered is not None:
        world.behaviors[delivered].append(event)
        return
    first = min(number + draw.choice([0, 0, 0, 1, 2]), len(dates) - 1)
    world.behaviors[dates[first]] += [event] * draw.choice([1, 1, 1, 2])  # repeated word for word
    if draw.random() < 0.2 and first + 1 < len(dates):  # delivered again, with another opinion of when it was known
        world.behaviors[dates[first + 1]].append(
            {**event, "available_at": ts + timedelta(hours=draw.choice([0, 9, 40]))}
        )


def _add_request(world: World, draw: random.Random, ds: date, user: str, request: str, items: int) -> None:
    early = world.start(ds) - timedelta(minutes=world.schema.day_tolerance_minutes)
    start = draw.choice([early, *world.grid(ds)])
    own = [event["available_at"] or event["ts"] for event in world.behaviors[ds] if event["user_id"] == user]
    instants = [ts for ts in own if world.start(ds) <= ts <= world.grid(ds)[-1]]
    if instants and draw.random() < 0.4:
        start = draw.choice(instants)  # asks at the very instant at which an event becomes known
    device = draw.choice(["phone", "desktop", None])
    for position, item in enumerate(draw.sample(range(items), draw.choice([1, 2, 4]))):
        click = int(draw.random() < 0.5)
        conversion = click * int(draw.random() < 0.5)
        came = draw.choice([None, *(timedelta(hours=h) for h in (0, 2, 26, 30, 31))]) if conversion else None
        row = {
            "request_id": request,
            "user_id": user,
            "item_id": f"i{item}",
            "ts": min(start + timedelta(minutes=draw.choice([0, 0, 7])), world.grid(ds)[-1]),
            "position": position,
            "device": device,
            "click": click,
            "conversion": conversion,
        }
        if world.conversion_times:
            row["conversion_at"] = None if came is None else row["ts"] + came
        world.impressions[ds] += [row] * draw.choice([1, 1, 1, 2])


# The expected tables


def impressions(world: World, ds: date) -> list[Row]:
    """Each shown item once; a conversion counts within the window; the time of a request is its earliest row's."""
    rows = _distinct(world.impressions[ds])
    for row in rows:
        came = row.get("conversion_at")
        if came is not None and came - row["ts"] > timedelta(hours=world.schema.attribution_hours):
            row |= {"conversion": 0, "conversion_at": None}
    for row in rows:
        row["ts"] = min(other["ts"] for other in rows if other["request_id"] == row["request_id"])
    for row in rows:
        local = row["ts"].astimezone(ZoneInfo(world.schema.timezone))
        row |= {"ds": ds, "hour_of_day": float(local.hour), "day_of_week": str(local.isoweekday())}
    return rows


def behaviors(world: World, ds: date) -> list[Row]:
    """Each event of a delivery once; the first day's delivery holds the history as well."""
    price = {item["item_id"]: item["price"] for item in world.items_of(ds).values()}
    if world.schema.derived_behaviors:
        return [{**event, "ds": ds, "price": price.get(event["item_id"])} for event in _derived(world, ds)]
    rows = _distinct(world.behaviors[ds] + (world.history if ds == world.first_day else []))
    for row in rows:
        micros = round(row["ts"].timestamp() * 1_000_000)
        row["event_id"] = hash64(row["event_id"] or f"{row['user_id']}|{row['item_id']}|{row['type']}|{micros}")
        row["available_at"] = max(row["available_at"] or row["ts"], row["ts"])
        row |= {"ds": ds, "price": price.get(row["item_id"])}
    return rows


def _derived(world: World, ds: date) -> list[Row]:
    """An event of each kind that a shown item was, known some time after; a conversion not before it came."""
    events = []
    for row in impressions(world, ds):
        soon = row["ts"] + timedelta(minutes=world.schema.outcome_delay_minutes)
        kinds = {"impression": soon} | ({"click": soon} if row["click"] else {})
        if row["conversion"]:
            kinds["conversion"] = max(soon, _conversion_known(world, row))
        events += [
            {
                "event_id": hash64(f"{row['request_id']}|{row['item_id']}|{kind}"),
                "type": kind,
                "available_at": known,
                **{name: row[name] for name in ("user_id", "item_id", "ts", "device")},
            }
            for kind, known in kinds.items()
        ]
    return events


def known_events(world: World, ds: date) -> list[Row]:
    """All events delivered up to ``ds``, each as its first delivery told it, by (ts, event_id)."""
    events: dict[int, Row] = {}
    for day in world.days:
        if day <= ds:
            for event in behaviors(world, day):
                events.setdefault(event["event_id"], event)
    return sorted(events.values(), key=_order)


def seen_by(known: list[Row], user: str, ts: datetime, sequence: Sequence) -> list[Row]:
    """What a request may know of the ``known_events``: the last of a sequence with ``available_at < ts``."""
    events = [
        event
        for event in known
        if event["user_id"] == user and event["type"] == sequence.event and event["available_at"] < ts
    ]
    return [_event_features(event) for event in events[-sequence.max_length :]]


def tails(world: World, ds: date) -> dict[str, dict[str, list[Row]]]:
    """Per user and sequence: the last ``max_length`` settled events, and all that are not older than these."""
    settled_before = world.start(ds + timedelta(days=1)) - timedelta(minutes=world.schema.day_tolerance_minutes)
    found: dict[str, dict[str, list[Row]]] = {}
    events = known_events(world, ds)
    for sequence in world.schema.sequences:
        for user in {event["user_id"] for event in events}:
            own = [e for e in events if e["user_id"] == user and e["type"] == sequence.event]
            settled = [e for e in own if e["available_at"] < settled_before][-sequence.max_length :]
            full = len(settled) == sequence.max_length
            kept = [e for e in own if not full or _order(e) >= _order(settled[0])]
            found.setdefault(user, {})[sequence.column] = [
                {"event_id": e["event_id"], "available_at": e["available_at"], **_event_features(e)} for e in kept
            ]
    used = {event["user_id"] for event in events if event["type"] in {s.event for s in world.schema.sequences}}
    return {user: lists for user, lists in found.items() if user in used}


def figures(world: World, ds: date, key_of: dict[str, str | None], name: str) -> dict[str, Row]:
    """Counts and rates per key over the windows before ``ds``; ``key_of`` maps what a row is counted by to its key."""
    by = "user_id" if name == "user" else "item_id"
    result: dict[str, Row] = defaultdict(dict)
    if not any(day < ds for day in world.days):
        return {key: {} for key in key_of.values() if key is not None}
    for window in world.schema.aggregates.windows:
        days = [day for day in world.days if ds - timedelta(days=window) <= day < ds]
        rows = [row for day in days for row in impressions(world, day)]
        known_before = world.start(ds) - timedelta(minutes=world.schema.day_tolerance_minutes)
        for row in rows:
            if row["conversion"] and _conversion_known(world, row) >= known_before:
                row["conversion"] = 0
        everything = _counts(rows)
        for key in {key for key in key_of.values() if key is not None}:
            counted = _counts([row for row in rows if key_of.get(row[by]) == key])
            prior = world.schema.aggregates.smoothing
            for rate, events, trials in (("ctr", "clicks", "impressions"), ("cvr", "conversions", "clicks")):
                if everything[trials]:
                    overall = everything[events] / everything[trials]
                    counted[rate] = (counted[events] + prior * overall) / (counted[trials] + prior)
            result[key] |= {f"{name}_{figure}_{window}d": value for figure, value in counted.items()}
    return result


def _conversion_known(world: World, row: Row) -> datetime:
    """When it came; if nobody says, it may have come as late as counts; without a window, at once."""
    if row.get("conversion_at") is not None:
        return row["conversion_at"]
    hours = world.schema.attribution_hours
    return row["ts"] + timedelta(hours=hours) if hours else datetime.min.replace(tzinfo=UTC)


def user_features(world: World, ds: date) -> dict[str, Row]:
    """Users of the snapshot and users shown something in the windows."""
    known = world.users_of(ds)
    everyone = set(known) | {row["user_id"] for row in _window_rows(world, ds)}
    computed = figures(world, ds, {user: user for user in everyone}, "user")
    return {
        user: {
            "age": known.get(user, {}).get("age"),
            "taste": known.get(user, {}).get("taste"),
            **_all_figures(world, "user"),
            **computed.get(user, {}),
        }
        for user in everyone
    }


def item_features(world: World, ds: date) -> dict[str, Row]:
    """Items of the snapshot and items shown in the windows; a brand's figures are null where the brand is."""
    known = world.items_of(ds)
    everything = set(known) | {row["item_id"] for row in _window_rows(world, ds)}
    brand_of = {item: known.get(item, {}).get("brand") for item in everything}
    own = figures(world, ds, {item: item for item in everything}, "item")
    by_brand = figures(world, ds, brand_of, "brand")
    return {
        item: {
            "brand": brand_of[item],
            "price": known.get(item, {}).get("price"),
            "image": known.get(item, {}).get("image"),
            **_all_figures(world, "item"),
            **own.get(item, {}),
            **_all_figures(world, "brand"),
            **by_brand.get(brand_of[item] or "", {}),
        }
        for item in everything
    }


def training_requests(world: World, ds: date) -> dict[str, Row]:
    """One row per request; stored values are hashes and raw numbers."""
    users, items = user_features(world, ds), item_features(world, ds)
    rows: dict[str, Row] = {}
    for shown in impressions(world, ds):
        row = rows.setdefault(shown["request_id"], {"user_id": shown["user_id"], "ts": shown["ts"], "candidates": {}})
        user = users.get(shown["user_id"], {})
        row |= {
            "user": hash64(shown["user_id"]),
            "age": user.get("age"),
            "taste": user.get("taste"),
            "user_ctr": user.get("user_ctr_2d"),
            "hour": shown["hour_of_day"],
            "weekday": hash64(shown["day_of_week"]),
            "device": _hashed(shown["device"]),
        }
        item = items.get(shown["item_id"], {})
        row["candidates"][shown["item_id"]] = {
            "position": shown["position"],
            "item": hash64(shown["item_id"]),
            "brand": _hashed(item.get("brand")),
            "price": item.get("price"),
            "picture": item.get("image"),
            "brand_cvr": item.get("brand_cvr_1d"),
            "click": shown["click"],
            "conversion": shown["conversion"],
        }
    known = known_events(world, ds)
    for row in rows.values():
        for sequence in world.schema.sequences:
            row[sequence.column] = seen_by(known, row["user_id"], row["ts"], sequence)
    return rows


def _distinct(rows: list[Row]) -> list[Row]:
    return [dict(row) for row in {tuple(row.items()): row for row in rows}.values()]


def _order(event: Row) -> tuple[datetime, int]:
    return event["ts"], event["event_id"]


def _event_features(event: Row) -> Row:
    return {
        "ts": event["ts"],
        "event_item": hash64(event["item_id"]),
        "event_price": event["price"],
        "event_place": _hashed(event["device"] if "device" in event else event["place"]),
    }


def _hashed(value: str | None) -> int | None:
    return None if value is None else hash64(value)


def _counts(rows: list[Row]) -> Row:
    return {
        "impressions": float(len(rows)),
        "clicks": float(sum(row["click"] for row in rows)),
        "conversions": float(sum(row["conversion"] for row in rows)),
    }


def _all_figures(world: World, name: str) -> Row:
    return dict.fromkeys(world.schema.aggregates.columns(name))


def _window_rows(world: World, ds: date) -> list[Row]:
    longest = max(world.schema.aggregates.windows)
    return [row for day in world.days if ds - timedelta(days=longest) <= day < ds for row in impressions(world, day)]
