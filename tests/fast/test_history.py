"""Days before: the chain of plans, what is counted in their rows, and the ranker by popularity."""

import dataclasses
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tracked_days import Shop

from onetrans import storage
from onetrans.errors import BadDataError
from onetrans.evaluate import context_texts
from onetrans.gate import run_gate
from onetrans.history import PRIOR_WEIGHT, History, earlier_plans
from onetrans.lake import Lake
from onetrans.plan import Plan
from onetrans.schema import Feature, hash64


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop.open(tmp_path_factory.mktemp("shop"), days=6)


@pytest.fixture
def chain(shop):
    """Plans of three days, each going on from the one before, scored and judged."""
    plans: list[Plan] = []
    for day in (3, 4, 5):
        plan = shop.plan(shop.days[day], track=False, seed=day)
        start = plans[-1].path if plans else None
        models = {
            name: dataclasses.replace(model, warm_start=start and storage.join(start, name))
            for name, model in plan.models.items()
        }
        days = plan.train_days if start is None else plan.train_days[-1:]
        files = [f for f in plan.train_files if any(f"ds={d}/" in f for d in days)]
        plans.append(dataclasses.replace(plan, models=models, train_days=days, train_files=tuple(files)).save())
        shop.write_scores(plans[-1], better=True)
    return plans


def _with(settings, **gate):
    return dataclasses.replace(settings, gate=dataclasses.replace(settings.gate, **gate))


def test_a_chain_is_read_back_to_its_beginning(chain):
    assert [plan.plan_id for plan in earlier_plans(chain[2])] == [chain[1].plan_id, chain[0].plan_id]
    assert list(earlier_plans(chain[0])) == []
    storage.delete_file(storage.join(chain[0].path, "plan.json"))
    assert [plan.plan_id for plan in earlier_plans(chain[2])] == [chain[1].plan_id]


def test_rows_of_all_trained_days_are_counted_once(chain):
    history = History.read(chain[2])
    rows = pa.concat_tables([pq.read_table(storage.local_path(f), partitioning=None)
                             for f in dict.fromkeys([*chain[0].train_files, *chain[1].train_files,
                                                     *chain[2].train_files])]).to_pylist()  # fmt: skip
    shown = [c for row in rows for c in row["candidates"]]
    item = shown[0]["item_id"]
    of_item = [c for c in shown if c["item_id"] == item]
    clicks = sum(c["click"] for c in shown)
    ids = pa.array([item, "never seen"])
    assert history.item_impressions(ids).tolist() == [len(of_item), 0]
    user = rows[0]["user_id"]
    assert history.user_impressions(pa.array([user, "nobody"])).tolist() == [
        sum(len(row["candidates"]) for row in rows if row["user_id"] == user),
        0,
    ]
    ctr, _ = history.popularity(ids)
    rate = clicks / len(shown)
    assert ctr[1] == pytest.approx(rate)
    own = sum(c["click"] for c in of_item)
    assert ctr[0] == pytest.approx((own + PRIOR_WEIGHT * rate) / (len(of_item) + PRIOR_WEIGHT))


def test_the_window_pools_the_days_of_the_chain(shop, chain):
    alone = run_gate(shop.settings, chain[2])
    pooled = run_gate(_with(shop.settings, window_days=3, agreeing_days=2), chain[2])
    assert pooled["days"] == [str(plan.ds) for plan in chain]
    assert pooled["rows"] > alone["rows"]
    assert pooled["lifts"]["ctr_auc"]["standard_error"] < alone["lifts"]["ctr_auc"]["standard_error"]
    assert (pooled["verdict"], pooled["left_out"]) == ("promoted", [])
    page = storage.read_bytes(storage.join(chain[2].path, "gate.html")).decode()
    assert "3 days pooled" in page
    inputs = pooled["inputs"]
    assert [(day["ds"], day["plan_id"]) for day in inputs["days"]] == [(str(p.ds), p.plan_id) for p in chain]
    assert inputs["days"][2]["scores_sha256"] == pooled["scores_sha256"]
    for plan, day in zip(chain, inputs["days"], strict=True):
        scores = storage.read_bytes(storage.join(plan.path, "scores.parquet"))
        assert day["scores_sha256"] == hashlib.sha256(scores).hexdigest()
    assert (inputs["snapshot_id"], inputs["schema_fingerprint"]) == (
        chain[2].snapshot_id, chain[2].schema.fingerprint
    )  # fmt: skip
    assert (inputs["git_revision"], set(inputs["models"])) == (chain[2].git_revision, {"onetrans", "dcnv2_din"})


def test_a_day_that_the_chain_did_not_evaluate_is_named_and_not_jumped_over(shop, chain):
    """The last training took two days together, so the middle one has no scores."""
    last = chain[2]
    start = {name: storage.join(chain[0].path, name) for name in last.models}
    models = {name: dataclasses.replace(model, warm_start=start[name]) for name, model in last.models.items()}
    jumped = dataclasses.replace(last, models=models, plan_id="jumped").save()
    shop.write_scores(jumped, better=True)
    verdict = run_gate(_with(shop.settings, window_days=3, agreeing_days=2), jumped)
    assert verdict["days"] == [str(chain[0].ds), str(last.ds)]
    assert verdict["left_out"] == [f"{chain[1].ds}: this chain of trainings did not evaluate it"]
    (criterion,) = [c for c in verdict["criteria"] if c["name"] == "days_agree"]
    assert (criterion["passed"], criterion["figure"]) == (False, 1)
    # A day that the log lost is stepped over.
    lost = dataclasses.replace(shop.settings.source, absent_days=(chain[1].ds,))
    settings = dataclasses.replace(_with(shop.settings, window_days=2, agreeing_days=2), source=lost)
    assert run_gate(settings, jumped)["verdict"] == "promoted"


def test_a_day_of_the_chain_that_cannot_be_used_is_left_out_and_named(shop, chain):
    storage.delete_file(storage.join(chain[1].path, "scores.parquet"))
    broken = storage.local_path(storage.join(chain[0].path, "scores.parquet"))
    table = pq.read_table(broken)
    pq.write_table(table.slice(0, table.num_rows - 1), broken)
    verdict = run_gate(_with(shop.settings, window_days=3), chain[2])
    assert verdict["days"] == [str(chain[2].ds)]
    assert [entry[:10] for entry in verdict["left_out"]] == [str(chain[1].ds), str(chain[0].ds)]


def test_a_collapsed_baseline_is_warned_of_from_the_days_before(shop, chain):
    for plan in chain[:2]:
        path = storage.join(plan.path, "metrics.json")
        metrics = storage.read_json(path)
        metrics["dcnv2_din"]["ctr_auc"] = 0.99
        storage.write_json(path, metrics)
    assert run_gate(shop.settings, chain[2])["warnings"] == [], "two days make no band"


def test_rows_of_another_day_in_place_of_some_are_an_error(shop, chain):
    path = storage.local_path(storage.join(chain[2].path, "scores.parquet"))
    table = pq.read_table(path)
    ids = table["request_id"].to_pylist()
    ids[3] = "of another day"
    pq.write_table(table.set_column(0, "request_id", pa.array(ids)), path)
    with pytest.raises(BadDataError, match=r"1 rows are no impressions of .* for example request 'of another day'"):
        run_gate(shop.settings, chain[2])


def test_extra_rows_are_an_error_that_counts_them(shop, chain):
    path = storage.local_path(storage.join(chain[2].path, "scores.parquet"))
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(0, 2)]), path)
    with pytest.raises(BadDataError, match=rf"has {table.num_rows + 2:,} rows, but .* has {table.num_rows:,}"):
        run_gate(shop.settings, chain[2])


def test_scores_of_an_earlier_version_are_refused_with_the_command_that_makes_them_anew(shop, chain):
    path = storage.local_path(storage.join(chain[2].path, "scores.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["popularity_ctr", "popularity_cvr"]), path)
    with pytest.raises(BadDataError, match=r"lack the popularity ranker's: .* run: onetrans evaluate --plan"):
        run_gate(shop.settings, chain[2])


def test_context_values_are_told_as_a_person_knows_them(shop):
    lake, ds = Lake(shop.settings.lake), shop.days[0]
    hours = Feature("hour", "context", "hashed", "hour_of_day", hash_size=24)
    stored = pa.array([hash64("3"), None, hash64("23")])
    assert context_texts(stored, hours, lake, ds).to_pylist() == ["00:00 to 05:59", None, "18:00 to 23:59"]
    price = Feature("price", "context", "bucketized", "price", boundaries=(1.0, 2.5))
    told = context_texts(pa.array([0.5, 1.0, None, 9.0]), price, lake, ds).to_pylist()
    assert told == ["below 1", "1 to 2.5", None, "2.5 and more"]
    surface = Feature("surface", "context", "hashed", "surface", hash_size=9)
    assert context_texts(pa.array([np.int64(-7)]), surface, lake, ds).to_pylist() == ["#-7"]
