"""The gate as a step: what it reads, what it writes, and what it refuses to judge."""

import dataclasses
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tracked_days import Shop

from onetrans import storage
from onetrans.errors import BadDataError, NotReadyError
from onetrans.gate import run_gate


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop.open(tmp_path_factory.mktemp("shop"), days=3)


@pytest.fixture
def plan(shop, request):
    """A plan of its own for each test."""
    return shop.plan(shop.days[-1], track=False, seed=zlib.crc32(request.node.name.encode()) % 100_000)


def _file(plan, name):
    return storage.local_path(storage.join(plan.path, name))


def test_the_verdict_is_written_with_the_day_the_plan_and_the_scores_it_rests_on(shop, plan):
    scores = shop.write_scores(plan, better=True)
    verdict = run_gate(shop.settings, plan)
    assert verdict == json.loads(_file(plan, "gate.json").read_text())
    assert (verdict["verdict"], verdict["ds"], verdict["plan_id"]) == ("promoted", str(plan.ds), plan.plan_id)
    assert verdict["rows"] == scores.num_rows
    assert len(verdict["scores_sha256"]) == 64


def test_judging_again_gives_the_same_figures(shop, plan):
    shop.write_scores(plan, better=False)
    first, second = run_gate(shop.settings, plan), run_gate(shop.settings, plan)
    assert {**first, "decided_at": ""} == {**second, "decided_at": ""}
    assert first["verdict"] == "declined"


def test_off_leaves_a_verdict_that_promotes_nothing(shop, plan):
    shop.write_scores(plan, better=True)
    off = dataclasses.replace(shop.settings, gate=dataclasses.replace(shop.settings.gate, mode="off"))
    verdict = run_gate(off, plan)
    assert (verdict["verdict"], verdict["passed"], verdict["mode"]) == ("declined", None, "off")


def test_the_reason_of_a_forced_promotion_stands_beside_a_verdict_it_does_not_change(shop, plan):
    shop.write_scores(plan, better=False)
    plain, forced = run_gate(shop.settings, plan), run_gate(shop.settings, plan, "the baseline is <broken>")
    assert plain["force_reason"] is None
    assert "A person forces" in _file(plan, "gate.html").read_text()
    assert "the baseline is &lt;broken&gt;" in _file(plan, "gate.html").read_text()
    assert json.loads(_file(plan, "gate.json").read_text())["force_reason"] == "the baseline is <broken>"
    assert {**plain, "decided_at": "", "force_reason": ""} == {**forced, "decided_at": "", "force_reason": ""}


def test_a_plan_that_was_not_evaluated_is_not_ready(shop, plan):
    with pytest.raises(NotReadyError, match="onetrans evaluate --plan"):
        run_gate(shop.settings, plan)


@pytest.mark.parametrize("keep", [slice(1, None), slice(None, -7)])
def test_missing_rows_are_an_error_that_counts_them(shop, plan, keep):
    scores = shop.write_scores(plan, better=True)
    pq.write_table(scores.take(np.arange(scores.num_rows)[keep]), _file(plan, "scores.parquet"))
    with pytest.raises(BadDataError, match=rf"rows, but {plan.ds} has {scores.num_rows:,} impressions"):
        run_gate(shop.settings, plan)


@pytest.mark.parametrize("order", ["stored", "another"])
def test_labels_other_than_the_days_are_an_error_that_counts_them(shop, plan, order):
    scores = shop.write_scores(plan, better=True)
    flipped = scores["click"].to_numpy().copy()
    unconverted = np.flatnonzero(scores["conversion"].to_numpy() == 0)[:5]
    flipped[unconverted] = 1 - flipped[unconverted]
    broken = scores.set_column(scores.column_names.index("click"), "click", pa.array(flipped))
    rows = np.arange(scores.num_rows) if order == "stored" else np.random.default_rng(1).permutation(scores.num_rows)
    pq.write_table(broken.take(rows), _file(plan, "scores.parquet"))
    with pytest.raises(BadDataError, match=rf"5 rows are not labelled as on {plan.ds}, for example request "):
        run_gate(shop.settings, plan)
    pq.write_table(scores.take(rows), _file(plan, "scores.parquet"))
    assert run_gate(shop.settings, plan)["verdict"] == "promoted"


def test_an_error_leaves_no_verdict_of_earlier_scores_behind(shop, plan):
    scores = shop.write_scores(plan, better=True)
    assert run_gate(shop.settings, plan)["verdict"] == "promoted"
    broken = scores.set_column(
        scores.column_names.index("onetrans_ctr"), "onetrans_ctr", pa.array(np.full(scores.num_rows, np.nan))
    )
    pq.write_table(broken, _file(plan, "scores.parquet"))
    with pytest.raises(BadDataError, match="no probability in 'onetrans_ctr', for example nan"):
        run_gate(shop.settings, plan)
    assert not _file(plan, "gate.json").exists()


def test_a_truncated_file_is_an_error_that_names_it(shop, plan):
    shop.write_scores(plan, better=True)
    path = _file(plan, "scores.parquet")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadDataError, match=r"scores\.parquet cannot be read as Parquet"):
        run_gate(shop.settings, plan)
