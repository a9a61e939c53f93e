"""What requests see of the past, against the rule written plainly, on random partitions; also in blocks of requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import past_events
from jobs.past_events import EVENT, HAPPENED, REQUEST, ROW, TAIL, TYPE, RequestsOfPartition, Seen

TIME = pa.timestamp("us", tz="UTC")
KIND = pa.struct([("ts", TIME), ("event_id", pa.int64()), ("available_at", TIME), ("item", pa.int64())])
SHOWN = pa.list_(pa.struct([("ts", TIME), ("item", pa.int64())]))
SEQUENCES = (Seen("seq_click", "click", 3), Seen("seq_buy", "buy", 2))
MADE = RequestsOfPartition(
    SEQUENCES,
    ("request_id", "user_id", "ts"),
    pa.schema([("request_id", pa.string()), ("ts", TIME), *((s.column, SHOWN) for s in SEQUENCES)]),
)
ROWS = pa.schema(
    [
        (ROW, pa.int32()),
        ("user_id", pa.string()),
        ("request_id", pa.string()),
        ("ts", TIME),
        (HAPPENED, KIND),
        (TYPE, pa.string()),
        *((s.tail, pa.list_(KIND)) for s in SEQUENCES),
    ]
)
Event = dict[str, int]


def key(event: Event) -> tuple[int, int]:
    return event["ts"], event["event_id"]


class World:
    """Few users and times, so that everything is met: ties, late events, repeats, users who have nothing."""

    def __init__(self, seed: int, users: int, requests: int, events: int) -> None:
        self.random = np.random.default_rng(seed)
        self.users = [f"u{n}" for n in range(users)]
        self.requests = [(f"r{n}", self.user(), self.number(100)) for n in range(requests)]
        self.tails: dict[str, dict[str, list[Event]]] = {}
        self.today: list[tuple[str, str, Event]] = []
        for user in self.users[1:]:
            self.tails[user] = {
                s.column: sorted((self.event(60) for _ in range(self.number(6))), key=key) for s in SEQUENCES
            }
        told = [(user, s.event, e) for user, tail in self.tails.items() for s in SEQUENCES for e in tail[s.column]]
        for _ in range(events):
            self.today.append((self.user(), ["view", "click", "buy"][self.number(3)], self.event(100)))
        for place in self.random.permutation(len(told))[: len(told) // 4]:
            user, kind, event = told[place]
            self.today.append((user, kind, {**event, "available_at": event["available_at"] + 40, "item": -1}))
        # An event of another user, or of another sequence, may have the number of one that is known.
        self.today += [(self.user(), kind, {**event, "item": -2}) for _, kind, event in told[::5]]
        self.today = list({(user, kind, e["event_id"]): (user, kind, e) for user, kind, e in self.today}.values())

    def number(self, below: int) -> int:
        return int(self.random.integers(below))

    def user(self) -> str:
        # Most requests and events are of one user.
        return self.users[self.number(len(self.users)) if self.number(2) else -1]

    def event(self, latest: int) -> Event:
        ts = self.number(latest)
        late = self.number(30) if self.number(3) == 0 else 0
        return {"ts": ts, "event_id": self.number(2**60) - 2**59, "available_at": ts + late, "item": self.number(1000)}

    def expected(self) -> dict[str, dict[str, list[dict[str, int]]]]:
        found: dict[str, dict[str, list[dict[str, int]]]] = {}
        for request, user, ts in self.requests:
            found[request] = {}
            for s in SEQUENCES:
                known = list(self.tails.get(user, {}).get(s.column, []))
                before = {event["event_id"] for event in known}
                known += [e for u, k, e in self.today if u == user and k == s.event and e["event_id"] not in before]
                seen = sorted((event for event in known if event["available_at"] < ts), key=key)[-s.max_length :]
                found[request][s.column] = [{"ts": event["ts"], "item": event["item"]} for event in seen]
        return found

    def batches(self) -> list[pa.RecordBatch]:
        rows: list[dict[str, object]] = [
            {ROW: REQUEST, "request_id": request, "user_id": user, "ts": ts} for request, user, ts in self.requests
        ]
        rows += [{ROW: EVENT, "user_id": user, TYPE: kind, HAPPENED: event} for user, kind, event in self.today]
        for user, tail in self.tails.items():
            rows.append({ROW: TAIL, "user_id": user, **{s.tail: tail[s.column] for s in SEQUENCES}})
        mixed = [rows[place] for place in self.random.permutation(len(rows))]
        return pa.Table.from_pylist(mixed, ROWS).to_batches(max_chunksize=37)


def seen(world: World) -> dict[str, dict[str, list[dict[str, int]]]]:
    table = MADE.table(world.batches())
    assert table is not None
    table.validate(full=True)
    kinds = pa.list_(pa.struct([("ts", pa.int64()), ("item", pa.int64())]))
    for s in SEQUENCES:
        table = table.set_column(table.column_names.index(s.column), s.column, table[s.column].cast(kinds))
    rows = table.drop_columns("ts").to_pylist()
    assert [row["request_id"] for row in rows] == [
        request for request, _, ts in sorted(world.requests, key=lambda one: (one[2], one[0]))
    ]
    return {row.pop("request_id"): row for row in rows}


@pytest.mark.parametrize("heavy", [1 << 20, 40, -1], ids=["whole", "some in blocks", "all in blocks"])
@pytest.mark.parametrize("seed", range(12))
def test_requests_see_the_last_events_known_to_them(seed: int, heavy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past_events, "_HEAVY", heavy)
    monkeypatch.setattr(past_events, "_AT_ONCE", 50)
    world = World(seed, users=1 + seed, requests=60, events=seed * 25)
    assert seen(world) == world.expected()


def test_the_worlds_hold_what_can_go_wrong() -> None:
    worlds = [World(seed, users=1 + seed, requests=60, events=seed * 25) for seed in range(12)]
    assert any(not world.today for world in worlds)
    assert any(not world.tails for world in worlds)
    lengths = {len(events) for world in worlds for row in world.expected().values() for events in row.values()}
    assert lengths == {0, 1, 2, 3}
    repeats = sum(event["item"] == -1 for world in worlds for _, _, event in world.today)
    assert repeats > 10


def test_a_partition_without_requests_makes_nothing() -> None:
    world = World(3, users=4, requests=0, events=20)
    assert MADE.table(world.batches()) is None
    assert list(MADE([])) == []


def test_a_user_with_a_million_events_and_thousands_of_requests_is_no_more_work_than_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each request looking at each event would be 6.4 thousand million pairs."""
    known_of, pairs = past_events._known, []

    def counting(available: Any, start: Any, stop: Any, *others: Any) -> Any:
        pairs.append(int((stop - start).sum()))
        return known_of(available, start, stop, *others)

    monkeypatch.setattr(past_events, "_known", counting)
    events, requests = 1_000_000, 6_400
    random = np.random.default_rng(0)
    known = np.sort(random.integers(0, 10**9, events))
    lists = past_events._Lists(np.arange(events), known, np.array([0]), np.array([events]))
    asked = random.integers(0, 10**9, requests)
    places, offsets = lists.last_known(np.zeros(requests, np.int64), asked, 64)
    assert sum(pairs) < 200_000_000
    stops = np.searchsorted(known, asked)
    assert np.array_equal(np.diff(offsets), np.minimum(stops, 64))
    for request in (0, 1, requests - 1):
        expected = np.arange(max(stops[request] - 64, 0), stops[request])
        assert np.array_equal(places[offsets[request] : offsets[request + 1]], expected)
