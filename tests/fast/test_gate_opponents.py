"""The gate against others than the baseline: champion, popularity, chance, days before, a collapsed baseline."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from gate_world import World, day_of
from test_gate import SETTINGS, _failed, _table, _with

from onetrans.bootstrap import widening
from onetrans.errors import BadDataError
from onetrans.gate import judge
from onetrans.scores import ChampionRecord, Scores, with_champion


def _against(table, ctr, cvr, version="3", state="scored"):
    """The same day with a champion's scores."""
    if ctr is not None:
        table = table.append_column("champion_ctr", pa.array(ctr)).append_column("champion_cvr", pa.array(cvr))
    return with_champion(table, ChampionRecord(state, f"champion version {version}", version, "2024-01-01"))


def _judge(table, earlier=(), before=None, **changes):
    days = [Scores.from_table(t, ds=f"day {i}") for i, t in enumerate([*earlier, table])]
    return judge(days[-1], dataclasses.replace(SETTINGS, **changes), days[:-1], before)


def _column(table, name):
    return table[name].to_numpy()


def test_a_candidate_as_good_as_the_champion_passes_and_the_reason_says_so():
    table = _table()
    verdict = _judge(_against(table, _column(table, "onetrans_ctr"), _column(table, "onetrans_cvr")))
    assert verdict.verdict == "promoted"
    assert verdict.comparisons["onetrans over champion"]["ctr"].lift == 0.0
    assert "no worse than the champion: CTR AUC" in verdict.reason
    assert "champion 3's" in verdict.reason


def test_a_candidate_that_beats_the_baseline_but_not_the_champion_is_refused():
    better = _table(candidate_noise=0.0)
    table = _table(candidate_noise=0.6)
    verdict = _judge(_against(table, _column(better, "onetrans_ctr"), _column(better, "onetrans_cvr")))
    assert {"ctr_auc_not_below_champion", "cvr_auc_not_below_champion"} <= _failed(verdict)
    assert not {"ctr_auc_lift", "cvr_auc_lift"} & _failed(verdict)
    assert verdict.comparisons["dcnv2_din over champion"]["ctr"].high < 0


def test_the_margin_is_held_against_the_lower_bound():
    """Not shown to be worse is not enough: the interval has to exclude a loss that matters."""
    table, other = _table(candidate_noise=0.32), _table(candidate_noise=0.3)
    against = _against(table, _column(other, "onetrans_ctr"), _column(other, "onetrans_cvr"))
    low = min(lift.low for lift in _judge(against).comparisons["onetrans over champion"].values())
    assert low < 0
    assert "not_below_champion" in str(_failed(_judge(against, max_loss_to_champion=-low)))
    assert _judge(against, max_loss_to_champion=-low + 1e-6).verdict == "promoted"


@pytest.mark.parametrize("state", ["none", "candidate", "later", "untracked"])
def test_without_a_fair_comparison_the_baseline_decides_and_the_verdict_says_why(state):
    verdict = _judge(_against(_table(), None, None, state=state))
    assert (verdict.verdict, verdict.champion.state) == ("promoted", state)
    assert not any("champion" in c.name for c in verdict.criteria)


def test_a_champion_that_cannot_score_the_rows_is_never_replaced_by_itself():
    verdict = _judge(_against(_table(), None, None, state="incomparable"))
    assert _failed(verdict) == {"champion_comparable"}
    assert verdict.reason.startswith("Not promoted: champion version 3")


def test_champion_columns_that_nobody_accounts_for_are_an_error():
    table = _table()
    with pytest.raises(BadDataError, match="champion's columns are there, but the file says 'none'"):
        Scores.from_table(_against(table, *[_column(table, "onetrans_ctr")] * 2, state="none"))
    with pytest.raises(BadDataError, match="champion's columns are missing, but the file says 'scored'"):
        Scores.from_table(_against(table, None, None))
    with pytest.raises(BadDataError, match="no probability in 'champion_ctr', for example nan"):
        Scores.from_table(_against(table, np.full(3000, np.nan), _column(table, "onetrans_cvr")))


def test_a_candidate_that_only_beats_a_broken_baseline_is_refused():
    table = _table(candidate_noise=6.0)
    rng = np.random.default_rng(0)
    for task in ("ctr", "cvr"):
        table = _with(table, f"dcnv2_din_{task}", 0.5 - 0.4 * (_column(table, f"onetrans_{task}") - 0.5))
        table = _with(table, f"popularity_{task}", _column(_table(candidate_noise=1.0), f"onetrans_{task}"))
    settings = {"max_log_loss_increase": 9.0, "max_uauc_loss": 1.0, "max_calibration_error": 9.0}
    verdict = _judge(table, **settings)
    assert _failed(verdict) == {"ctr_auc_over_popularity", "cvr_auc_over_popularity"}
    for task in ("ctr", "cvr"):
        table = _with(table, f"onetrans_{task}", rng.random(3000))
    assert {"ctr_auc_above_chance", "cvr_auc_above_chance"} <= _failed(_judge(table, **settings))


def test_days_are_pooled_without_comparing_a_row_of_one_day_with_a_row_of_another():
    """Each day's scores are shifted by a constant: pooled as one heap the AUC would be another."""
    days = [_table(seed=seed, rows=1000) for seed in range(4)]
    shifted = [
        _with(t, "onetrans_ctr", 0.1 + 0.2 * (number % 2) + 0.5 * _column(t, "onetrans_ctr"))
        for number, t in enumerate(days)
    ]
    plain, moved = (_judge(d[-1], d[:-1], window_days=4, max_log_loss_increase=9.0) for d in (days, shifted))
    assert (plain.rows, plain.days) == (4000, ("day 0", "day 1", "day 2", "day 3"))
    assert moved.lifts["ctr"] == plain.lifts["ctr"]
    alone = _judge(days[-1])
    assert plain.lifts["ctr"].standard_error < 0.65 * alone.lifts["ctr"].standard_error
    assert plain.models == alone.models, "figures of the models are those of the evaluation day"


def test_the_window_takes_what_it_is_asked_for_and_what_there_is():
    days = [_table(seed=seed, rows=1000) for seed in range(3)]
    assert _judge(days[-1], days[:-1], window_days=2).days == ("day 1", "day 2")
    assert _judge(days[-1], days[:-1], window_days=9).days == ("day 0", "day 1", "day 2")


def test_a_user_of_several_days_is_drawn_once_for_all_of_them():
    table = _table(rows=1000)
    verdict = _judge(table, [table, table], window_days=3)
    assert verdict.users == Scores.from_table(table).users
    alone = _judge(table)
    assert verdict.lifts["ctr"].standard_error == pytest.approx(alone.lifts["ctr"].standard_error, rel=1e-9)


def test_a_broken_today_is_not_hidden_by_good_days_before():
    good = [_table(seed=seed) for seed in range(3)]
    today = _table(seed=9, candidate_noise=1.35, baseline_noise=1.2)
    verdict = _judge(today, good, window_days=4, max_log_loss_increase=9.0, max_uauc_loss=1.0)
    assert verdict.lifts["ctr"].low > 0
    assert _failed(verdict) == {"days_agree"}


def test_days_in_a_row_have_to_agree_and_to_be_there():
    good = [_table(seed=seed) for seed in range(3)]
    assert _judge(good[-1], good[:-1], agreeing_days=3).verdict == "promoted"
    verdict = _judge(good[-1], good[1:-1], agreeing_days=3)
    assert _failed(verdict) == {"days_agree"}
    assert "2 of the last 3 days agree" in verdict.reason
    bad = _table(seed=1, candidate_noise=1.2, baseline_noise=0.3)
    assert _failed(_judge(good[-1], [good[0], bad], agreeing_days=3)) == {"days_agree"}
    assert _judge(good[-1], [bad, good[0]], agreeing_days=2).verdict == "promoted"


def test_the_champion_is_compared_on_the_days_that_this_version_scored():
    def day(seed, version, noise):
        other = _table(seed=seed, candidate_noise=noise)
        return _against(_table(seed=seed), _column(other, "onetrans_ctr"), _column(other, "onetrans_cvr"), version)

    verdict = _judge(day(3, "2", 1.0), [day(1, "1", 0.0), day(2, "2", 1.0)], window_days=3)
    two = _judge(day(3, "2", 1.0), [day(2, "2", 1.0)], window_days=2)
    assert verdict.comparisons["onetrans over champion"]["ctr"].lift == pytest.approx(
        two.comparisons["onetrans over champion"]["ctr"].lift
    )
    assert verdict.verdict == "promoted"


def test_a_baseline_below_the_band_of_its_last_days_is_warned_of():
    now = _judge(_table()).models["dcnv2_din"].ctr_auc
    usual = {"ctr": [now + 0.1, now + 0.11, now + 0.1, now + 0.09], "cvr": []}
    (warning,) = _judge(_table(), before=usual).warnings
    assert "The baseline has collapsed: dcnv2_din's CTR AUC" in warning
    assert _judge(_table(), before={"ctr": usual["ctr"][:2]}).warnings == (), "two days make no band"
    assert _judge(_table(), before={"ctr": [now - 0.01, now + 0.01, now]}).warnings == ()
    assert _judge(_table(), before={"ctr": [now + 0.1, now - 0.02, now + 0.04]}).warnings == (), (
        "days that differ make it wide"
    )


@pytest.mark.parametrize("nights", [1, 2, 3])
def test_a_collapsed_baseline_is_warned_of_every_night_until_it_is_half_of_the_last_days(nights):
    now = _judge(_table()).models["dcnv2_din"].ctr_auc
    usual = [now + 0.1, now + 0.11, now + 0.1, now + 0.09, now + 0.1, now + 0.1, now + 0.11]
    (warning,) = _judge(_table(), before={"ctr": [*usual, *[now] * (nights - 1)]}).warnings
    assert warning.startswith("The baseline has collapsed")


def test_a_baseline_without_a_band_is_said_not_to_be_checked():
    verdict = _judge(_table(), before={"ctr": [0.7], "cvr": [0.7, 0.7, 0.7]})
    (note,) = verdict.notes
    assert note.startswith("dcnv2_din's CTR AUC was not held against its last days: 1 before this one")


def test_the_lift_a_day_could_have_found_is_told_above_the_one_it_must_have():
    lift = _judge(_table()).lifts["ctr"]
    wider = widening(lift.effective_users, 0.9)
    assert lift.detectable == pytest.approx(wider * lift.standard_error * (1.6449 + 0.8416), rel=1e-3)
    refused = _judge(_table(), min_lift_ctr_auc=0.2, min_lift_cvr_auc=0.3)
    told = [0.2 + refused.lifts["ctr"].detectable, 0.3 + refused.lifts["cvr"].detectable]
    assert f"each by itself, in 4 of 5 cases: CTR {told[0]:.4f}, CVR {told[1]:.4f} (" in refused.reason


def test_a_lift_as_large_as_the_day_is_said_to_find_is_found_in_four_of_five_cases():
    """Counted: the candidate's advantage is set to what a day of this size is said to find, above a threshold too."""
    alike = [day_of(seed, 2500, 500, World(activity=0.5)) for seed in range(3)]
    said = float(np.mean([judge(day, SETTINGS).lifts["ctr"].detectable for day in alike]))
    own = 0.05
    # The true lift stands as far above the threshold as the days are said to find.
    settings = dataclasses.replace(SETTINGS, min_lift_ctr_auc=_true_lift(own) - said)
    found = 0
    for seed in range(120):
        verdict = judge(day_of(1000 + seed, 2500, 500, World(activity=0.5), ctr_own=own), settings)
        found += "ctr_auc_lift" not in _failed(verdict)
    assert 0.8 - 3 * 0.0365 < found / 120 < 0.8 + 3 * 0.0365


def _true_lift(own):
    """The candidate's lift with so much noise of its own, over many rows."""
    day = day_of(7, 400_000, 80_000, World(activity=0.5), ctr_own=own)
    return day.metrics("onetrans").ctr_auc - day.metrics("dcnv2_din").ctr_auc


def test_a_day_that_was_not_evaluated_agrees_with_nothing_and_is_not_jumped_over():
    good = [Scores.from_table(_table(seed=seed), ds=f"day {seed}") for seed in range(3)]
    settings = dataclasses.replace(SETTINGS, agreeing_days=2, window_days=3)
    verdict = judge(good[2], settings, [good[0], None])
    assert _failed(verdict) == {"days_agree"}
    assert "1 of the last 2 days agree" in verdict.reason
    assert "1 of them not evaluated in this chain of trainings" in verdict.reason
    assert verdict.days == ("day 0", "day 2")
    assert judge(good[2], settings, [None, good[1]]).verdict == "promoted"


def test_users_too_few_for_an_interval_are_said_to_be_and_the_verdict_stays_readable():
    """One user has nearly all rows: no interval, no infinite number, no promotion."""
    verdict = judge(day_of(3, 3000, 300, World(activity=6.0)), SETTINGS)
    assert verdict.verdict == "declined"
    text = json.dumps(verdict.to_dict(), allow_nan=False)
    assert "effective users" in verdict.reason
    assert "inf" not in text.replace("information", "")
    assert all(c.interval is None or np.isfinite(c.interval).all() for c in verdict.criteria)


def test_a_class_that_few_users_have_widens_the_interval():
    """All conversions are those of five users, though hundreds look."""
    table = _table()
    few = np.isin(table["user_id"].to_numpy(zero_copy_only=False), [f"u{n}" for n in range(5)])
    table = _with(table, "conversion", _column(table, "click") * few)
    verdict = _judge(table, min_positives=1)
    assert verdict.lifts["cvr"].effective_users < 6
    assert verdict.lifts["ctr"].effective_users > 200


def test_calibration_is_told_with_the_interval_of_the_ratio():
    verdict = _judge(_table())
    (calibration,) = [c for c in verdict.criteria if c.name == "ctr_calibration_error"]
    assert (calibration.comparison, calibration.threshold) == ("within", 0.25)
    assert calibration.interval[0] < calibration.figure < calibration.interval[1]
    assert calibration.figure == pytest.approx(verdict.models["onetrans"].ctr_calibration)
    assert f"{calibration.figure:.3f} [{calibration.interval[0]:.3f}" in calibration.text
    halved = _judge(_with(_table(), "onetrans_ctr", 0.5 * _column(_table(), "onetrans_ctr")))
    assert "ctr_calibration_error" in _failed(halved)
