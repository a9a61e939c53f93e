"""The gate's policy: what promotes, what declines, what is an error, and that the verdict says why."""

import dataclasses
import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest

from onetrans.errors import BadDataError
from onetrans.gate import Scores, judge
from onetrans.settings import GateSettings

SETTINGS = GateSettings(replicates=200, min_rows=500, min_positives=50, min_users=50)


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _table(seed=3, rows=3000, users=300, candidate_noise=0.3, baseline_noise=1.2, conversion_noise=None):
    """Scores of a day: the truth blurred by each model's noise, then calibrated by construction of the labels."""
    rng = np.random.default_rng(seed)
    appeal, need = rng.normal(size=rows), rng.normal(size=rows)
    click = (rng.random(rows) < _sigmoid(1.5 * appeal)).astype(np.int64)
    conversion = click * (rng.random(rows) < _sigmoid(1.5 * need)).astype(np.int64)
    cvr_noise = candidate_noise if conversion_noise is None else conversion_noise

    def blurred(signal, noise):
        return _sigmoid(1.5 * (signal + noise * rng.normal(size=rows)) / (1.0 + noise**2))

    return pa.table(
        {
            "request_id": [f"r{i // 4}" for i in range(rows)],
            "item_id": [f"i{i}" for i in range(rows)],
            "user_id": [f"u{u}" for u in rng.integers(users, size=rows)],
            "click": click,
            "conversion": conversion,
            "onetrans_ctr": blurred(appeal, candidate_noise),
            "onetrans_cvr": blurred(need, cvr_noise),
            "dcnv2_din_ctr": blurred(appeal, baseline_noise),
            "dcnv2_din_cvr": blurred(need, baseline_noise),
            "popularity_ctr": blurred(appeal, 5.0),
            "popularity_cvr": blurred(need, 5.0),
        }
    )


def _with(table, column, values):
    return table.set_column(table.column_names.index(column), column, pa.array(values))


def _judge(table, **changes):
    return judge(Scores.from_table(table), dataclasses.replace(SETTINGS, **changes))


def _failed(verdict):
    return {criterion.name for criterion in verdict.criteria if not criterion.passed}


def test_a_clear_winner_is_promoted_and_every_figure_is_in_the_verdict():
    verdict = _judge(_table())
    assert (verdict.verdict, verdict.passed, _failed(verdict)) == ("promoted", True, set())
    written = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    lift = written["lifts"]["ctr_auc"]
    assert lift["low"] > 0
    assert lift["low"] < lift["lift"] < lift["high"]
    assert lift["half_width"] == pytest.approx((lift["high"] - lift["low"]) / 2)
    assert lift["candidate"] == pytest.approx(written["models"]["onetrans"]["ctr_auc"])
    assert lift["baseline"] == pytest.approx(written["models"]["dcnv2_din"]["ctr_auc"])
    assert written["rows"] == 3000
    assert written["settings"]["replicates"] == 200
    assert {c["name"] for c in written["criteria"]} >= {"ctr_auc_lift", "cvr_auc_lift", "min_rows", "cvr_uauc_loss"}
    assert "onetrans beats dcnv2_din" in verdict.reason
    assert "90%" in verdict.reason


def test_equal_scores_are_declined_with_a_lift_of_nothing():
    table = _table()
    for task in ("ctr", "cvr"):
        table = _with(table, f"onetrans_{task}", table[f"dcnv2_din_{task}"].to_pylist())
    verdict = _judge(table)
    assert verdict.verdict == "declined"
    assert _failed(verdict) == {"ctr_auc_lift", "cvr_auc_lift"}
    assert verdict.lifts["ctr"].low == verdict.lifts["ctr"].high == 0.0


def test_better_clicks_do_not_buy_worse_conversions():
    verdict = _judge(_table(conversion_noise=1.2))
    assert verdict.verdict == "declined"
    assert "cvr_auc_lift" in _failed(verdict)
    assert "ctr_auc_lift" not in _failed(verdict)
    assert verdict.reason.startswith("Not promoted: CVR AUC")
    assert f"would show, each by itself, in 4 of 5 cases: CTR {verdict.lifts['ctr'].detectable:.4f}" in verdict.reason


def test_a_lift_inside_the_noise_is_declined_though_it_is_positive():
    verdict = _judge(_table(rows=800, candidate_noise=1.1, seed=10), min_positives=1)
    assert verdict.lifts["ctr"].lift > 0 > verdict.lifts["ctr"].low
    assert "ctr_auc_lift" in _failed(verdict)


def test_the_threshold_is_held_against_the_lower_bound():
    sure = _judge(_table())
    between = (sure.lifts["ctr"].low + sure.lifts["ctr"].lift) / 2
    assert _failed(_judge(_table(), min_lift_ctr_auc=between)) == {"ctr_auc_lift"}
    assert _failed(_judge(_table(), min_lift_cvr_auc=sure.lifts["cvr"].low)) == {"cvr_auc_lift"}, "exceed, not reach"


@pytest.mark.parametrize(
    ("changes", "criterion"),
    [
        ({"min_rows": 3001}, "min_rows"),
        ({"min_positives": 1000}, "min_conversions"),
        ({"min_users": 301}, "min_users"),
    ],
)
def test_a_day_too_small_is_declined(changes, criterion):
    verdict = _judge(_table(), **changes)
    assert (verdict.verdict, criterion in _failed(verdict)) == ("declined", True)
    assert "needed" in verdict.reason


@pytest.mark.parametrize("task", ["ctr", "cvr"])
def test_each_guardrail_declines_a_candidate_that_ranks_better(task):
    table = _table()
    score = np.array(table[f"onetrans_{task}"])
    boasting = _judge(_with(table, f"onetrans_{task}", score**0.2))  # same order, far too sure
    assert boasting.lifts == _judge(table).lifts
    assert _failed(boasting) == {f"{task}_log_loss_increase", f"{task}_calibration_error"}
    assert _failed(_judge(_with(table, f"onetrans_{task}", score**0.2), max_calibration_error=9.0)) == {
        f"{task}_log_loss_increase"
    }


def test_the_uauc_guardrail_catches_what_a_global_auc_hides():
    """A candidate that knows users but not items: its AUC rises, its per-user AUC falls to a coin's."""
    rng = np.random.default_rng(2)
    user = np.repeat(np.arange(300), 10)
    liking = rng.normal(scale=3.0, size=300)[user]
    taste = rng.normal(size=user.shape[0])
    click = (rng.random(user.shape[0]) < _sigmoid(liking + taste)).astype(np.int64)
    table = _table(rows=3000)
    table = _with(table, "user_id", [f"u{u}" for u in user])
    table = _with(_with(table, "click", click), "conversion", click * np.array(table["conversion"]))
    table = _with(table, "onetrans_ctr", _sigmoid(liking + rng.normal(scale=0.1, size=user.shape[0])))
    table = _with(table, "dcnv2_din_ctr", _sigmoid(0.3 * liking + taste))
    verdict = _judge(table, max_log_loss_increase=9.0)
    assert verdict.lifts["ctr"].low > 0
    assert "ctr_uauc_loss" in _failed(verdict)


@pytest.mark.parametrize("model", ["onetrans", "dcnv2_din"])
def test_constant_scores_never_promote(model):
    verdict = _judge(_with(_table(), f"{model}_cvr", np.full(3000, 0.3)))
    assert verdict.verdict == "declined"
    assert f"{model}_cvr_varies" in _failed(verdict)
    assert re.search(rf"{model} gives 1 different CVR score\b", verdict.reason)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_never_promotes(label):
    table = _with(_table(), "click", np.full(3000, label))
    table = _with(table, "conversion", np.zeros(3000, dtype=np.int64))
    verdict = _judge(table, min_positives=1)
    assert verdict.verdict == "declined"
    assert verdict.lifts == {}
    assert {"ctr_auc_lift", "cvr_auc_lift", "ctr_uauc_loss", "cvr_uauc_loss"} <= _failed(verdict)
    assert "every label is the same" in json.dumps(verdict.to_dict(), allow_nan=False)


def test_positives_that_hang_on_two_users_have_no_interval():
    table = _table(candidate_noise=0.1)
    favoured = np.isin(table["user_id"].to_pylist(), ["u1", "u2"])
    table = _with(_with(table, "click", favoured.astype(np.int64)), "conversion", np.zeros(3000, dtype=np.int64))
    verdict = _judge(table, min_positives=1)
    assert verdict.lifts["ctr"].undefined > 0
    assert "ctr_auc_lift" in _failed(verdict)
    assert "hold one class only" in json.dumps(verdict.to_dict())


def test_dry_run_judges_but_does_not_promote():
    verdict = _judge(_table(), mode="dry_run")
    assert (verdict.verdict, verdict.passed) == ("declined", True)
    assert "dry_run leaves the champion as it is" in verdict.reason


def test_off_does_not_judge():
    verdict = _judge(_table(), mode="off")
    assert (verdict.verdict, verdict.passed, verdict.criteria) == ("declined", None, ())
    assert verdict.reason == "Not judged: gate.mode = off."


def test_the_same_scores_give_the_same_verdict_in_any_row_order():
    table = _table()
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    assert _judge(table) == _judge(table)
    ours, theirs = _judge(table), _judge(shuffled)
    assert ours.lifts["ctr"].lift == pytest.approx(theirs.lifts["ctr"].lift, abs=1e-12)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("onetrans_ctr", math.nan, r"1 of 3,000 rows have no probability in 'onetrans_ctr', for example nan"),
        ("dcnv2_din_cvr", math.inf, r"no probability in 'dcnv2_din_cvr', for example inf"),
        ("dcnv2_din_ctr", None, r"no probability in 'dcnv2_din_ctr', for example None"),
        ("onetrans_cvr", 1.01, r"no probability in 'onetrans_cvr', for example 1.01"),
        ("click", 2, r"a label other than 0 or 1 in 'click', for example 2 of request 'r1', item 'i7'"),
        ("conversion", None, r"a label other than 0 or 1 in 'conversion'"),
        ("user_id", None, r"no user in 'user_id'"),
        ("item_id", "i6", r"1 impressions occur more than once, for example request 'r1', item 'i6', 2 times"),
    ],
)
def test_scores_that_cannot_be_right_are_an_error_with_count_and_example(column, value, message):
    table = _table()
    values = table[column].to_pylist()
    values[7] = value
    with pytest.raises(BadDataError, match=message):
        Scores.from_table(_with(table, column, values), "scores.parquet of 2022-05-06")


def test_a_conversion_without_a_click_is_an_error():
    table = _table()
    with pytest.raises(BadDataError, match="a conversion without a click in 'conversion'"):
        Scores.from_table(_with(table, "click", np.zeros(3000, dtype=np.int64)))


def test_a_missing_column_and_an_empty_table_are_errors():
    with pytest.raises(BadDataError, match="column 'dcnv2_din_cvr' is missing"):
        Scores.from_table(_table().drop_columns(["dcnv2_din_cvr"]))
    with pytest.raises(BadDataError, match="there are no rows"):
        Scores.from_table(_table().slice(0, 0))


def test_conversion_is_judged_over_clicks_alone():
    """What a model says of a conversion where nobody clicked can never be right or wrong."""
    table = _table()
    unclicked = table["click"].to_numpy() == 0
    raised = np.where(unclicked, 0.999, table["onetrans_cvr"].to_numpy())
    before, after = _judge(table), _judge(_with(table, "onetrans_cvr", raised))
    assert after.lifts["cvr"] == before.lifts["cvr"]
    assert after.verdict == before.verdict == "promoted"
    assert after.models["onetrans"] == before.models["onetrans"]
