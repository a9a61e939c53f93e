"""The simulated shop: reproducible days, a log that obeys the input contract, and a truth that explains the labels."""

from collections import Counter
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.sources.simulated.defects import DEFECTS, Faults, parse_rates
from jobs.sources.simulated.truth import OFFERS, SURFACES
from jobs.sources.simulated.world import DEVICES, SEGMENTS, Day, WorldConfig, build_catalog, play
from jobs.sources.simulated.write import SCHEMA_FILE, write_days
from onetrans.errors import BadConfigError
from onetrans.metrics import auc
from onetrans.schema import FeatureSchema, hash64

CONFIG = WorldConfig(users=400, items=120, history_days=4)
FIRST = CONFIG.epoch


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("log")
    write_days(CONFIG, str(out), FIRST, 3)
    return out


@pytest.fixture(scope="module")
def days() -> list[Day]:
    return list(play(CONFIG, FIRST + timedelta(days=2)))


def _read(log: Path, *parts: str) -> pa.Table:
    return pq.ParquetFile(log.joinpath(*parts, "part-0.parquet")).read()


def test_a_day_is_the_same_whatever_range_is_asked_for(log: Path, tmp_path: Path) -> None:
    write_days(CONFIG, str(tmp_path), FIRST + timedelta(days=1), 1)
    for table in ("impressions", "behaviors"):
        part = Path(table, f"ds={FIRST + timedelta(days=1)}", "part-0.parquet")
        assert (tmp_path / part).read_bytes() == (log / part).read_bytes()


def test_another_seed_is_another_world(log: Path, tmp_path: Path) -> None:
    write_days(WorldConfig(users=400, items=120, history_days=4, seed=8), str(tmp_path), FIRST, 1)
    part = Path("impressions", f"ds={FIRST}", "part-0.parquet")
    assert (tmp_path / part).read_bytes() != (log / part).read_bytes()


def test_the_next_day_continues_a_log_without_repeating_its_history(tmp_path: Path) -> None:
    write_days(CONFIG, str(tmp_path), FIRST, 1)
    history = tmp_path / "behaviors" / "history" / "part-0.parquet"
    before = history.read_bytes()
    write_days(CONFIG, str(tmp_path), FIRST + timedelta(days=1), 1)
    assert history.read_bytes() == before
    ids = [_read(tmp_path, "behaviors", f"ds={FIRST + timedelta(days=n)}")["event_id"].to_pylist() for n in (0, 1)]
    assert not set(ids[0]) & set(ids[1])


def test_impressions_obey_the_contract(log: Path) -> None:
    rows = _read(log, "impressions", f"ds={FIRST}").to_pandas()
    assert not rows.duplicated(["request_id", "item_id"]).any()
    assert (rows.ts.dt.date == FIRST).all()
    assert set(rows.click) == {0, 1}
    assert not ((rows.conversion == 1) & (rows.click == 0)).any()
    per_request = rows.groupby("request_id")
    for column in ("user_id", "ts", "surface", "device"):
        assert (per_request[column].nunique() == 1).all()
    assert per_request.size().between(1, 12).all()


def test_events_are_delivered_on_the_day_they_became_known(log: Path) -> None:
    for ds in (FIRST, FIRST + timedelta(days=1)):
        rows = _read(log, "behaviors", f"ds={ds}").to_pandas()
        assert (rows.available_at.dt.date == ds).all()
        assert (rows.available_at >= rows.ts).all()
    history = _read(log, "behaviors", "history").to_pandas()
    assert (history.available_at.dt.date < FIRST).all()


def test_every_purchase_and_cart_follows_a_click_on_the_same_item(days: list[Day]) -> None:
    for day in days:
        at = list(zip(day.event_request_E, day.event_place_E, strict=True))
        clicked = {key for key, kind in zip(at, day.event_type_E, strict=True) if kind == 1}
        assert set(at) == clicked
        assert len(clicked) == day.click_RK.sum()
        assert (day.event_type_E == 3).sum() == day.conversion_RK.sum()


def test_labels_are_drawn_from_the_true_probabilities(days: list[Day]) -> None:
    shown = [day.item_RK >= 0 for day in days]
    click = np.concatenate([d.click_RK[m] for d, m in zip(days, shown, strict=True)])
    ctr = np.concatenate([d.true_ctr_RK[m] for d, m in zip(days, shown, strict=True)])
    bought = np.concatenate([d.conversion_RK[m] for d, m in zip(days, shown, strict=True)])[click]
    cvr = np.concatenate([d.true_cvr_RK[m] for d, m in zip(days, shown, strict=True)])[click]
    for label, probability in ((click, ctr), (bought, cvr)):
        error = np.sqrt((probability * (1 - probability)).sum()) / len(label)
        assert abs(label.mean() - probability.mean()) < 4 * error
        assert auc(label, probability) > 0.7


def test_the_last_event_and_the_surface_decide_which_offer_is_clicked(days: list[Day]) -> None:
    """Replays every event in order, apart from the world's own memory, and finds the wanted offer in the labels."""
    offer_M = build_catalog(CONFIG).offer_M
    last: dict[int, int] = {}
    shape = (len(SURFACES), 4, len(OFFERS))
    clicks, shown = np.zeros(shape), np.zeros(shape)
    for day in days:
        events = iter(sorted(zip(day.event_ts_E, day.event_type_E, day.event_request_E, strict=True)))
        event = next(events, None)
        for r in range(len(day.user_R)):
            while event is not None and event[0] < day.ts_R[r]:
                last[day.user_R[event[2]]] = event[1]
                event = next(events, None)
            real = day.item_RK[r] >= 0
            place = (day.surface_R[r], last.get(day.user_R[r], 0), offer_M[day.item_RK[r][real]])
            np.add.at(shown, place, 1)
            np.add.at(clicks, place, day.click_RK[r][real])
        while event is not None:
            last[day.user_R[event[2]]] = event[1]
            event = next(events, None)
    rate = clicks / shown
    wanted = {"feed": ("new", "bargain", "add_on"), "search": ("bargain", "add_on", "new")}
    for surface, offers in wanted.items():
        for did_last, offer in enumerate(offers, start=1):
            rates = dict(zip(OFFERS, rate[SURFACES.index(surface), did_last], strict=True))
            assert rates[offer] > 2 * max(r for name, r in rates.items() if name not in (offer, "regular"))


def test_activity_and_popularity_are_uneven(days: list[Day]) -> None:
    requests = np.sort(np.bincount(np.concatenate([d.user_R for d in days]), minlength=CONFIG.users))[::-1]
    assert requests[: CONFIG.users // 10].sum() > 0.3 * requests.sum()
    items = np.concatenate([d.item_RK[d.item_RK >= 0] for d in days])
    shown = np.sort(np.bincount(items, minlength=CONFIG.items))[::-1]
    assert shown[: CONFIG.items // 10].sum() > 0.2 * shown.sum()


def test_the_schema_reads_columns_that_are_written_and_no_small_vocabulary_collides(log: Path) -> None:
    schema = FeatureSchema.load(SCHEMA_FILE)
    written = {
        "user": set(_read(log, "users").column_names),
        "item": set(_read(log, "items").column_names),
        "context": {*_read(log, "impressions", f"ds={FIRST}").column_names, "hour_of_day"},
        "event": set(_read(log, "behaviors", f"ds={FIRST}").column_names),
    }
    for feature in schema.features:
        assert feature.column in written[feature.side] or feature.column.endswith("_7d"), feature.name
    small = {
        "surface": SURFACES,
        "device": DEVICES,
        "offer": OFFERS,
        "segment": [f"segment-{n}" for n in range(SEGMENTS)],
        "category": [f"category-{n}" for n in range(CONFIG.categories)],
    }
    for name, texts in small.items():
        assert len({hash64(text) % schema.feature(name).hash_size for text in texts}) == len(texts), name


def test_blocks_of_shoppers_are_one_world_with_shoppers_of_their_own() -> None:
    config = replace(CONFIG, block_requests=100)
    assert [config.block_range(block) for block in range(config.blocks)] == [
        range(first, min(first + 117, 400)) for first in range(0, 400, 117)
    ]
    catalogs = [build_catalog(config, block) for block in range(config.blocks)]
    whole = build_catalog(CONFIG)
    for block, catalog in enumerate(catalogs):
        assert catalog.first_user == 117 * block
        for shared in ("category_M", "brand_M", "price_M", "offer_M", "click_appeal_M", "popularity_M"):
            assert (getattr(catalog, shared) == getattr(whole, shared)).all()
    first, second = (next(iter(play(config, FIRST, block))) for block in (0, 1))
    assert len(first.ts_R) != len(second.ts_R) or (first.ts_R != second.ts_R).any(), "a block has streams of its own"


def test_visits_follow_the_hour_and_the_week() -> None:
    requests = [day.ts_R for day in play(replace(CONFIG, users=1500, history_days=0), FIRST + timedelta(days=13))]
    hours = np.bincount(np.concatenate(requests) // 3_600_000_000 % 24, minlength=24)
    assert hours[18:22].mean() > 4 * hours[1:5].mean()
    weekend = [(FIRST + timedelta(days=n)).weekday() >= 5 for n in range(len(requests))]
    sizes = np.array([len(ts) for ts in requests])
    assert sizes[weekend].mean() > 1.05 * sizes[~np.array(weekend)].mean()


def test_requests_of_a_user_come_in_visits_a_few_minutes_apart() -> None:
    config = replace(CONFIG, users=1500, history_days=0)
    *_, day = play(config, FIRST)

    def close(ts_R: np.ndarray) -> float:
        order = np.lexsort((ts_R, day.user_R))
        same = np.diff(day.user_R[order]) == 0
        gaps = np.diff(ts_R[order])[same]
        assert len(gaps) > 500
        return float(np.mean(gaps < 15 * 60 * 1_000_000))

    assert close(day.ts_R) > 0.6
    assert close(np.random.default_rng(0).permutation(day.ts_R)) < 0.2, "of users who ask whenever it may be"


def test_histories_are_long_and_demand_drifts() -> None:
    config = replace(CONFIG, history_days=60)
    days = list(play(config, FIRST))
    users = np.concatenate([day.user_R[day.event_request_E] for day in days])
    events = np.sort(np.bincount(users, minlength=config.users))
    assert events[-config.users // 20] > 200, "one shopper of twenty has hundreds of past events"
    category_M = build_catalog(config).category_M
    shown_DC = np.array(
        [np.bincount(category_M[day.item_RK[day.item_RK >= 0]], minlength=config.categories) for day in days]
    )
    share_DC = shown_DC / shown_DC.sum(1, keepdims=True)
    step_C = np.abs(np.diff(share_DC, axis=0)).mean(0)
    apart_C = np.abs(share_DC[30:] - share_DC[:-30]).mean(0)
    assert apart_C.mean() > 1.3 * step_C.mean(), "a category is wanted as much as yesterday, not as a month ago"


def test_faults_are_as_frequent_as_asked_and_do_not_move_each_other() -> None:
    one = Faults(7, parse_rates(["late=0.05"]))
    all_kinds = Faults(7, parse_rates(["0.01", "late=0.05"]))
    assert set(all_kinds.rates) == {name for name, defect in DEFECTS.items() if defect.of == "rows"}
    alone = one.chosen("behaviors", 20_000, FIRST, 0)["behaviors.late"]
    beside = all_kinds.chosen("behaviors", 20_000, FIRST, 0)
    assert abs(alone.mean() - 0.05) < 0.01
    assert not (beside["behaviors.late"] & ~alone).any()
    assert np.sum(list(beside.values()), axis=0).max() == 1, "no row has two faults"
    assert (one.chosen("behaviors", 20_000, FIRST, 1)["behaviors.late"] != alone).any()


def test_late_events_stand_in_later_files_and_those_that_become_known_at_a_request_say_so(tmp_path: Path) -> None:
    write_days(CONFIG, str(tmp_path), FIRST, 3, parse_rates(["late=0.2", "at_request=0.2", "repeat_next_day=0.2"]))
    rows = [_read(tmp_path, "behaviors", f"ds={FIRST + timedelta(days=n)}").to_pandas() for n in range(3)]
    known = [(FIRST + timedelta(days=n) - row.available_at.dt.date).map(lambda d: d.days) for n, row in enumerate(rows)]
    assert all(set(days) == {0, 1, 2, 3} for days in known)
    assert set(rows[0].event_id) & set(rows[1].event_id), "some are delivered twice"
    asked = {(r.user_id, r.ts) for n in range(3) for r in _requests(tmp_path, n)}
    assert sum((r.user_id, r.available_at) in asked for row in rows for r in row.itertuples()) > 50


def test_events_and_requests_tie_where_both_are_cut_to_the_minute(tmp_path: Path) -> None:
    write_days(CONFIG, str(tmp_path), FIRST, 1, parse_rates(["tie=0.5"]))
    shown, happened = (_read(tmp_path, table, f"ds={FIRST}").to_pandas() for table in ("impressions", "behaviors"))
    requests = shown.groupby("request_id").agg({"user_id": "first", "ts": "min"})  # a request's time is its earliest
    asked = {(r.user_id, r.ts) for r in requests.itertuples()}
    assert sum((r.user_id, r.ts) in asked for r in happened.itertuples()) > 20


def test_one_user_and_one_item_can_have_a_share_of_everything(tmp_path: Path) -> None:
    write_days(CONFIG, str(tmp_path), FIRST, 1, parse_rates(["one_item=0.5", "one_user=0.25"]))
    shown = _read(tmp_path, "impressions", f"ds={FIRST}").to_pandas()
    assert 0.45 < (shown.item_id == "i0").mean() < 0.55
    assert not shown.duplicated(["request_id", "item_id"]).any(), "no row contradicts another"
    happened = _read(tmp_path, "behaviors", f"ds={FIRST}").to_pandas()
    assert 0.2 < (happened.user_id == "u0").mean() < 0.3


def test_a_fault_of_the_day_and_one_of_a_file_take_their_share(tmp_path: Path) -> None:
    write_days(CONFIG, str(tmp_path / "cut"), FIRST, 1, parse_rates(["cut_off=0.25"]))
    write_days(CONFIG, str(tmp_path / "whole"), FIRST, 1)
    cut, whole = (_read(tmp_path / name, "impressions", f"ds={FIRST}").to_pandas() for name in ("cut", "whole"))
    evening = whole.ts.dt.hour >= 18
    assert evening.any()
    assert cut.equals(whole[~evening].reset_index(drop=True)), "the rest is as it was"
    faults = Faults(CONFIG.seed, parse_rates(["missing_column=0.3", "wrong_type=0.3"]))
    rows = pa.table({"ts": pa.array([0, 1], pa.timestamp("us")), "click": pa.array([0, 1])})
    shapes = Counter(str(faults.spoiled("impressions", rows, FIRST, block).schema.types) for block in range(1000))
    time = "TimestampType(timestamp[us])"
    without, number, as_it_was = (
        shapes[f"[{kinds}]"] for kinds in (time, "DataType(int64), DataType(int64)", f"{time}, DataType(int64)")
    )
    assert without + number + as_it_was == 1000
    assert 250 < without < 350
    assert 160 < number < 260, "a file has one fault: 0.3 of the files that are left"


def test_lost_events_are_never_delivered(log: Path, tmp_path: Path) -> None:
    write_days(CONFIG, str(tmp_path), FIRST, 2, parse_rates(["behaviors.lost=0.5"]))
    for folder in ("history", f"ds={FIRST}", f"ds={FIRST + timedelta(days=1)}"):
        left, whole = (_read(path, "behaviors", folder)["event_id"].to_pylist() for path in (tmp_path, log))
        assert 0.4 < len(left) / len(whole) < 0.6
        assert set(left) < set(whole)


def _requests(log: Path, day: int) -> list[Any]:
    rows = _read(log, "impressions", f"ds={FIRST + timedelta(days=day)}").to_pandas()
    return list(rows.drop_duplicates("request_id").itertuples())


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lat=0.1"], "there is no fault 'lat'; did you mean late"),
        (["late=often"], "'often' is no share"),
        (["1.5"], r"1.5 must be in 0..1"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(BadConfigError, match=message):
        parse_rates(texts)


def test_a_smaller_world_is_not_written_over_a_larger_one(tmp_path: Path) -> None:
    for block in range(3):
        (tmp_path / "users").mkdir(exist_ok=True)
        (tmp_path / "users" / f"part-{block}.parquet").write_bytes(b"")
    with pytest.raises(BadConfigError, match="holds a larger world"):
        write_days(CONFIG, str(tmp_path), FIRST, 1)


def test_days_before_the_world_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfigError, match="begins on 2026-01-01"):
        write_days(CONFIG, str(tmp_path), date(2025, 12, 31), 1)
    with pytest.raises(BadConfigError, match="must be at least 1"):
        write_days(CONFIG, str(tmp_path), FIRST, 0)
    with pytest.raises(BadConfigError, match="items = 10"):
        WorldConfig(items=10)
