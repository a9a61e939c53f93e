"""The simulated world: items, shoppers, and what happens on each day, always the same for one seed.

A day is played in rounds: round k handles the k-th request of every shopper at
once, because shoppers do not influence each other.  What a shopper clicks,
carts and buys becomes the history that decides the next request, so day k needs
the days before it: :func:`play` always starts at the first day of the world and
yields from there.  Every subject (arrivals, candidates, outcomes, ...) draws from
its own random stream per day, so no day depends on how many days are asked for.

A large world is divided into *blocks* of shoppers.  A block draws what its shoppers
do from streams of its own and shares items, tastes of segments and demand with the
others, so blocks can be played apart, in any order, and memory is that of one block.
A world of one block is what it is without blocks.

Shape suffixes: U shoppers, M items, C categories, S surfaces, R requests (of a
round or a day, as said), K places of a request's list.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

import numpy as np
import numpy.typing as npt

from jobs.sources.simulated.truth import BOUGHT, CARTED, CLICKED, NOTHING, OFFERS, WANTED, Truth
from onetrans.errors import BadConfigError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

DEVICES = ("phone", "tablet", "desktop")
EVENT_TYPES = ("click", "cart", "purchase")
SEGMENTS = 8
PRICE_TIERS = 5

SECOND = 1_000_000
HOUR = 3_600 * SECOND
DAY = 24 * HOUR
NEVER = np.int64(-1)

_HOURLY_VISITS = (2, 1, 1, 1, 1, 2, 4, 7, 8, 7, 7, 8, 10, 9, 7, 7, 8, 9, 11, 14, 16, 15, 10, 5)
_PLACES = 12
_STAYS = 0.2  # probability that a request is on the surface of the one before it, whatever the hour
_CARTS = (0.4, 0.25, 0.55, 0.3)  # probability that a click leads to a cart, by what was done last
_DRAWN_PER_REQUEST = 16  # more than are shown, because repeated items are dropped


@dataclass(frozen=True)
class WorldConfig:
    """The size and character of the world."""

    users: int = 3000
    """Shoppers."""
    items: int = 800
    """Items on sale."""
    seed: int = 7
    """Seed of everything random."""
    epoch: date = date(2026, 1, 1)
    """First day that has impressions."""
    history_days: int = 14
    """Days played before ``epoch``, of which only the behaviours are kept."""
    categories: int = 12
    """Item categories."""
    brands: int = 30
    """Brands, spread over the categories."""
    requests_per_user: float = 0.85
    """Mean requests of a shopper per day."""
    activity_spread: float = 1.0
    """Standard deviation of the logarithm of a shopper's activity."""
    block_requests: int = 40_000
    """Mean requests of a day that are played together: so many shoppers make a block.  Another value, another world."""
    truth: Truth = field(default_factory=Truth)
    """What shoppers want."""

    def __post_init__(self) -> None:
        for name, least in (("users", 1), ("items", 50), ("history_days", 0), ("categories", 2), ("brands", 1)):
            if getattr(self, name) < least:
                raise BadConfigError(f"simulated world: {name} = {getattr(self, name)} must be at least {least}")
        if self.items < 4 * self.categories:
            raise BadConfigError(
                f"simulated world: items = {self.items} must be at least 4 per category, {4 * self.categories}"
            )
        if not 0 < self.requests_per_user <= 50:
            raise BadConfigError(f"simulated world: requests_per_user = {self.requests_per_user} must be in 0..50")
        if self.block_requests < 1:
            raise BadConfigError(f"simulated world: block_requests = {self.block_requests} must be at least 1")

    @property
    def first_day(self) -> date:
        """First day that is played."""
        return self.epoch - timedelta(days=self.history_days)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.users // self._block_users)

    def block_range(self, block: int) -> range:
        """Return the numbers of a block's shoppers."""
        return range(self.users)[block * self._block_users : (block + 1) * self._block_users]

    @property
    def _block_users(self) -> int:
        return max(int(self.block_requests / self.requests_per_user), 1)


@dataclass(frozen=True)
class Catalog:
    """All items, and the shoppers of one block: all that does not change."""

    block: int
    """Number of the block."""
    first_user: int
    """Number of its first shopper."""

    category_M: Integers
    """Category of each item."""
    brand_M: Integers
    """Brand of each item."""
    price_tier_M: Integers
    """0 (cheap in its category) to 4."""
    price_M: Floats
    """Price in the shop's currency."""
    popularity_M: Floats
    """Probability of an item within its category (Zipf)."""
    cumulated_C: tuple[Floats, ...]
    """The same, per category, each item's together with those of the items before it."""
    click_appeal_M: Floats
    """What an item itself adds to the click logit."""
    purchase_appeal_M: Floats
    """What an item itself adds to the purchase logit."""
    offer_M: Integers
    """How each item is offered, an index into ``OFFERS``."""
    segment_U: Integers
    """Segment of each shopper; a segment shares tastes."""
    age_band_U: Integers
    """Age band; older shoppers mind the price less."""
    activity_U: Floats
    """Mean requests per day."""
    evening_U: Floats
    """Hours by which a shopper's day is shifted."""
    taste_UC: Floats
    """What a category adds to a shopper's click logit."""
    thrift_U: Floats
    """What a price tier takes from a shopper's purchase logit."""


@dataclass(frozen=True)
class Day:
    """What happened on one day; rows are in the order of time."""

    ds: date
    """The day."""
    user_R: Integers
    """Shopper of each request, counted from the first of the block."""
    ts_R: Integers
    """Time of each request, microseconds since 1970-01-01 UTC."""
    surface_R: Integers
    """Surface of each request."""
    device_R: Integers
    """Device of each request."""
    item_RK: Integers
    """Item at each place; -1 where the list is shorter."""
    click_RK: npt.NDArray[np.bool_]
    """Whether it was clicked."""
    conversion_RK: npt.NDArray[np.bool_]
    """Whether the click led to a purchase."""
    true_ctr_RK: Floats
    """Probability the click was drawn from."""
    true_cvr_RK: Floats
    """Probability the purchase is drawn from once clicked."""
    event_request_E: Integers
    """Request that each event came from."""
    event_place_E: Integers
    """Place of the list that each event came from."""
    event_type_E: Integers
    """``CLICKED``, ``CARTED`` or ``BOUGHT``."""
    event_ts_E: Integers
    """When it happened."""
    event_available_E: Integers
    """When it became known: a purchase waits for its payment."""


def stream(seed: int, subject: str, day: date | None = None, block: int = 0) -> np.random.Generator:
    """Return the random stream of a subject, for the world or for one day of it, for a block of shoppers."""
    entropy = [seed, zlib.crc32(subject.encode()), day.toordinal() if day else 0]
    return np.random.default_rng([*entropy, block] if block else entropy)


def microseconds(day: date) -> int:
    """Return the first instant of ``day``, microseconds since 1970-01-01 UTC."""
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * SECOND


def build_catalog(config: WorldConfig, block: int = 0) -> Catalog:
    """Return the items of a world and the shoppers of one of its blocks."""
    users = config.block_range(block)
    M, U, C = config.items, len(users), config.categories
    items = stream(config.seed, "items")
    category_M = np.arange(M) % C
    # Within a category the first item is the most popular: Zipf over its rank there.
    weight_M = 1.0 / (np.arange(M) // C + 2.0)
    totals_C = np.bincount(category_M, weights=weight_M, minlength=C)
    price_tier_M = items.integers(0, PRICE_TIERS, M)
    level_C = np.exp(items.normal(3.2, 0.7, C))
    shoppers = stream(config.seed, "users", block=block)
    segment_U = shoppers.integers(0, SEGMENTS, U)
    age_band_U = shoppers.integers(0, 6, U)
    activity_U = np.exp(config.activity_spread * shoppers.normal(size=U) - config.activity_spread**2 / 2)
    tastes = stream(config.seed, "tastes")
    taste_of_segment = tastes.normal(0.0, 0.45, (SEGMENTS, C))
    if block:
        tastes = stream(config.seed, "tastes", block=block)
    popularity_M = weight_M / totals_C[category_M]
    return Catalog(
        block=block,
        first_user=users.start,
        category_M=category_M,
        brand_M=(category_M * 3 + items.integers(0, max(config.brands // 3, 1), M)) % config.brands,
        price_tier_M=price_tier_M,
        price_M=np.round(level_C[category_M] * 1.45 ** (price_tier_M + items.uniform(-0.4, 0.4, M)), 2),
        popularity_M=popularity_M,
        cumulated_C=tuple(np.cumsum(popularity_M[c::C]) for c in range(C)),
        click_appeal_M=items.normal(0.0, 0.4, M),
        purchase_appeal_M=items.normal(0.0, 0.3, M),
        offer_M=items.choice(len(OFFERS), M, p=(0.1, 0.3, 0.3, 0.3)),
        segment_U=segment_U,
        age_band_U=age_band_U,
        activity_U=config.requests_per_user * activity_U,
        evening_U=shoppers.normal(0.0, 2.0, U),
        taste_UC=taste_of_segment[segment_U] + tastes.normal(0.0, 0.2, (U, C)),
        thrift_U=(0.25 - 0.05 * age_band_U).astype(np.float64),
    )


@dataclass
class Memory:
    """What shoppers did so far, as far as it decides what they do next."""

    last_type_U: Integers
    """What was done last."""
    last_category_U: Integers
    """The category of that event."""
    carted_UC: Integers
    """Time of the last cart in each category, or ``NEVER``."""
    bought_UC: Integers
    """Time of the last purchase in each category, or ``NEVER``."""

    @classmethod
    def empty(cls, users: int, categories: int) -> Memory:
        """Return the memory of shoppers who never did anything."""
        shape = (users, categories)
        return cls(
            last_type_U=np.full(users, NOTHING, dtype=np.int64),
            last_category_U=np.zeros(users, dtype=np.int64),
            carted_UC=np.full(shape, NEVER),
            bought_UC=np.full(shape, NEVER),
        )


def play(config: WorldConfig, last: date, block: int = 0) -> Iterator[Day]:
    """Yield every day of one block from the world's first to ``last``.

    Raises:
        BadConfigError: if ``last`` is before the first day.
    """
    if last < config.first_day:
        raise BadConfigError(f"simulated world: it begins on {config.first_day}, so there is no {last}")
    catalog = build_catalog(config, block)
    memory = Memory.empty(len(catalog.segment_U), config.categories)
    trend_C = np.zeros(config.categories)
    for offset in range((last - config.first_day).days + 1):
        ds = config.first_day + timedelta(days=offset)
        # Demand drifts: each category wanders, pulled back to its usual level.
        trend_C = 0.9 * trend_C + stream(config.seed, "trend", ds).normal(0.0, 0.12, config.categories)
        yield _play_day(config, catalog, memory, trend_C, ds)


def _play_day(config: WorldConfig, catalog: Catalog, memory: Memory, trend_C: Floats, ds: date) -> Day:
    """Play one day; ``memory`` is brought up to its end."""
    user_R, ts_R = _arrivals(config, catalog, ds)
    R = len(user_R)
    context = stream(config.seed, "context", ds, catalog.block)
    hour_R = (ts_R - microseconds(ds)) // HOUR
    surface_R = _surfaces(context, user_R, ts_R, hour_R)
    device_R = context.choice(len(DEVICES), R, p=(0.7, 0.1, 0.2))
    length_R = context.integers(8, _PLACES + 1, R)
    candidates = stream(config.seed, "candidates", ds, catalog.block)
    source_RK, category_RK, item_RK = (candidates.random((R, _DRAWN_PER_REQUEST)) for _ in range(3))
    outcomes = stream(config.seed, "outcomes", ds, catalog.block)
    click_draw_RK, purchase_draw_RK, cart_draw_RK = (outcomes.random((R, _PLACES)) for _ in range(3))
    timing = stream(config.seed, "timing", ds, catalog.block)
    moment_RK3 = timing.random((R, _PLACES, 3))
    latency_RK3 = timing.exponential(2 * SECOND, (R, _PLACES, 3))
    latency_RK3[:, :, 2] += 90 * SECOND * np.exp(1.2 * timing.normal(size=(R, _PLACES)))

    # Requests are in the order (user, time); the round of a request is its rank within its user.
    first_R = np.r_[True, user_R[1:] != user_R[:-1]] if R else np.zeros(0, dtype=bool)
    start_R = np.maximum.accumulate(np.where(first_R, np.arange(R), 0)) if R else np.zeros(0, dtype=np.int64)
    round_R = np.arange(R) - start_R
    next_ts_R = np.r_[np.where(first_R[1:], np.iinfo(np.int64).max, ts_R[1:]), np.iinfo(np.int64).max][:R]
    window_R = np.minimum(next_ts_R - ts_R, 10 * 60 * SECOND) * 0.9

    shape = (R, _PLACES)
    shown_RK = np.full(shape, -1)
    click_RK, conversion_RK = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    true_ctr_RK, true_cvr_RK = np.zeros(shape), np.zeros(shape)
    events: list[tuple[Integers, ...]] = []
    for turn in range(int(round_R.max(initial=-1)) + 1):
        rows = np.flatnonzero(round_R == turn)
        u, s = user_R[rows], surface_R[rows]
        shown = _candidates(catalog, memory, trend_C, u, source_RK[rows], category_RK[rows], item_RK[rows])
        shown[np.arange(_PLACES)[None, :] >= length_R[rows][:, None]] = -1
        ctr, cvr = _probabilities(config, catalog, memory, trend_C, u, s, device_R[rows], shown)
        click = (click_draw_RK[rows] < ctr) & (shown >= 0)
        bought = click & (purchase_draw_RK[rows] < cvr)
        carted = click & (
            cart_draw_RK[rows] < np.where(bought, 0.5, np.asarray(_CARTS)[memory.last_type_U[u]][:, None])
        )
        shown_RK[rows], click_RK[rows], conversion_RK[rows] = shown, click, bought
        true_ctr_RK[rows], true_cvr_RK[rows] = ctr, cvr

        # A shopper goes down the list: at each place a click, then perhaps a cart, then perhaps a purchase.
        places = np.arange(_PLACES)[None, :, None]
        within = (places + (np.arange(3) + 0.8 * moment_RK3[rows]) / 3 + 0.2) / (_PLACES + 0.2)
        when = (ts_R[rows][:, None, None] + SECOND + within * (window_R[rows][:, None, None] - SECOND)).astype(np.int64)
        happened = np.stack([click, carted, bought], axis=2)
        r, k, t = np.nonzero(happened)
        known = when[r, k, t] + latency_RK3[rows][r, k, t].astype(np.int64)
        events.append((rows[r], k, t + CLICKED, when[r, k, t], known))
        _remember(catalog, memory, u, s, shown, happened, when)

    joined = [np.concatenate(column) for column in zip(*events, strict=True)] if events else [np.zeros(0, int)] * 5
    in_time = np.lexsort((user_R, ts_R))
    new_number = np.empty(R, dtype=np.int64)
    new_number[in_time] = np.arange(R)
    event_request_E = new_number[joined[0]]
    by_time = np.lexsort((joined[2], joined[1], event_request_E, joined[3]))
    return Day(
        ds=ds,
        user_R=user_R[in_time],
        ts_R=ts_R[in_time],
        surface_R=surface_R[in_time],
        device_R=device_R[in_time],
        item_RK=shown_RK[in_time],
        click_RK=click_RK[in_time],
        conversion_RK=conversion_RK[in_time],
        true_ctr_RK=true_ctr_RK[in_time],
        true_cvr_RK=true_cvr_RK[in_time],
        event_request_E=event_request_E[by_time],
        event_place_E=joined[1][by_time],
        event_type_E=joined[2][by_time],
        event_ts_E=joined[3][by_time],
        event_available_E=joined[4][by_time],
    )


def _arrivals(config: WorldConfig, catalog: Catalog, ds: date) -> tuple[Integers, Integers]:
    """Return user and time of the day's requests, ordered by both; sessions of a few requests, busy evenings."""
    draw = stream(config.seed, "arrivals", ds, catalog.block)
    per_session = 2.0
    weekend = 1.15 if ds.weekday() >= 5 else 1.0
    sessions_U = draw.poisson(catalog.activity_U * weekend / per_session)
    user_Q = np.repeat(np.arange(len(sessions_U)), sessions_U)
    shares = np.asarray(_HOURLY_VISITS, dtype=np.float64)
    hour_Q = draw.choice(24, len(user_Q), p=shares / shares.sum()) + draw.random(len(user_Q))
    start_Q = ((hour_Q + catalog.evening_U[user_Q]) % 24 * HOUR).astype(np.int64)
    requests_Q = draw.geometric(1 / per_session, len(user_Q))
    user_R = np.repeat(user_Q, requests_Q)
    rank_R = np.arange(len(user_R)) - np.repeat(np.cumsum(requests_Q) - requests_Q, requests_Q)
    gap_R = np.where(rank_R == 0, 0, 30 * SECOND + draw.exponential(4 * 60 * SECOND, len(user_R))).astype(np.int64)
    elapsed_R = np.cumsum(gap_R)
    first_R = np.repeat(np.cumsum(requests_Q) - requests_Q, requests_Q)
    offset_R = np.repeat(start_Q, requests_Q) + elapsed_R - elapsed_R[first_R] if len(user_R) else elapsed_R
    order = np.lexsort((offset_R, user_R))
    user_R, offset_R = user_R[order], offset_R[order]
    # Sessions that overlap would put two requests into one instant; midnight ends a session.
    apart_R = np.r_[True, (user_R[1:] != user_R[:-1]) | (np.diff(offset_R) >= 20 * SECOND)][: len(user_R)]
    kept = apart_R & (offset_R < DAY)
    return user_R[kept], microseconds(ds) + offset_R[kept]


def _surfaces(draw: np.random.Generator, user_R: Integers, ts_R: Integers, hour_R: Integers) -> Integers:
    """Return the surface of each request: search by day, the feed in the evening, now and then the one before."""
    evening_R = (hour_R >= 18) | (hour_R < 2)
    chosen_R = (draw.random(len(hour_R)) > np.where(evening_R, 0.6, 0.45)).astype(np.int64)
    stays_R = draw.random(len(hour_R)) < _STAYS
    follows_R = np.r_[False, (user_R[1:] == user_R[:-1]) & (np.diff(ts_R) < HOUR)][: len(hour_R)]
    rows_R = np.arange(len(hour_R))
    return chosen_R[np.maximum.accumulate(np.where(stays_R & follows_R, 0, rows_R))]


def _candidates(
    catalog: Catalog,
    memory: Memory,
    trend_C: Floats,
    u: Integers,
    source_RK: Floats,
    category_RK: Floats,
    item_RK: Floats,
) -> Integers:
    """Return the list of each request, as a retrieval stage would make it: the last interest, taste, hits."""
    R, K = source_RK.shape
    C = len(trend_C)
    recent = memory.last_category_U[u][:, None]
    known = memory.last_type_U[u][:, None] != NOTHING
    liking = np.exp(1.5 * catalog.taste_UC[u] + trend_C)
    by_taste = _pick(np.cumsum(liking, axis=1), category_RK)
    by_trend = _pick(np.cumsum(np.exp(trend_C))[None, :].repeat(R, axis=0), category_RK)
    category = np.where(source_RK < 0.8, by_taste, by_trend)
    category = np.where((source_RK < 0.3) & known, recent, category)
    # Items of category c are c, c + C, c + 2C, ...; within a category the Zipf weights decide.
    ranks_C = catalog.cumulated_C
    item = np.empty((R, K), dtype=np.int64)
    for c in range(C):
        chosen = category == c
        item[chosen] = np.searchsorted(ranks_C[c], item_RK[chosen] * ranks_C[c][-1], side="right") * C + c
    repeated = np.zeros((R, K), dtype=bool)
    for k in range(1, K):
        repeated[:, k] = (item[:, :k] == item[:, k : k + 1]).any(axis=1)
    item[repeated] = -1
    order = np.argsort(repeated, axis=1, kind="stable")
    return np.take_along_axis(item, order, axis=1)[:, :_PLACES]


def _pick(cumulative_RC: Floats, draw_RK: Floats) -> Integers:
    """Return for each draw the category it falls into; rows of ``cumulative_RC`` are cumulated weights."""
    scaled = draw_RK * cumulative_RC[:, -1:]
    return (scaled[:, :, None] > cumulative_RC[:, None, :-1]).sum(axis=2)


def _probabilities(
    config: WorldConfig,
    catalog: Catalog,
    memory: Memory,
    trend_C: Floats,
    u: Integers,
    s: Integers,
    device_R: Integers,
    shown_RK: Integers,
) -> tuple[Floats, Floats]:
    """Return the probabilities of a click, and of a purchase once clicked, for every shown item."""
    item = np.maximum(shown_RK, 0)
    category, user = catalog.category_M[item], u[:, None]
    did_last = memory.last_type_U[u]
    category_last = memory.last_category_U[u][:, None]
    wanted = (did_last != NOTHING)[:, None]
    same = ((category == category_last) & wanted).astype(np.float64)
    open_cart = (memory.carted_UC[user, category] > memory.bought_UC[user, category]).astype(np.float64)
    surface_click = np.array([0.0, 0.2])[s][:, None]
    device_purchase = np.array([-0.1, 0.0, 0.25])[device_R][:, None]
    click_appeal = catalog.click_appeal_M[item] + catalog.taste_UC[user, category] + trend_C[category] + surface_click
    tier = catalog.price_tier_M[item] - (PRICE_TIERS - 1) / 2
    purchase_appeal = catalog.purchase_appeal_M[item] - catalog.thrift_U[user] * tier + device_purchase
    offer, truth = catalog.offer_M[item], config.truth
    offer_wanted = np.asarray(WANTED)[s, did_last]
    ctr = truth.click_probability(click_appeal, offer_wanted, offer, same, open_cart)
    cvr = truth.purchase_probability(purchase_appeal, offer_wanted, offer, open_cart)
    return ctr, cvr


def _remember(
    catalog: Catalog,
    memory: Memory,
    u: Integers,
    s: Integers,
    shown_RK: Integers,
    happened_RK3: npt.NDArray[np.bool_],
    when_RK3: Integers,
) -> None:
    """Take what happened in one round into memory; each shopper has at most one request in it."""
    flat = np.where(happened_RK3, when_RK3, NEVER).reshape(len(u), -1)
    latest = flat.argmax(axis=1)
    active = np.flatnonzero(flat[np.arange(len(u)), latest] != NEVER)
    place, kind = latest[active] // 3, latest[active] % 3
    memory.last_type_U[u[active]] = kind + CLICKED
    memory.last_category_U[u[active]] = catalog.category_M[shown_RK[active, place]]
    for kind_of, times_UC in ((CARTED, memory.carted_UC), (BOUGHT, memory.bought_UC)):
        r, k = np.nonzero(happened_RK3[:, :, kind_of - CLICKED])
        np.maximum.at(times_UC, (u[r], catalog.category_M[shown_RK[r, k]]), when_RK3[r, k, kind_of - CLICKED])
