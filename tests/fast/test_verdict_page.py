"""The verdict's page: it stands by itself, its first line says why, and it shows what the scores say."""

import dataclasses
import re
from html.parser import HTMLParser
from statistics import NormalDist
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from gate_world import paired_lifts
from sklearn.metrics import roc_auc_score
from test_gate import SETTINGS, _table, _with
from test_gate_opponents import _against, _column
from tracked_days import SCHEMA

from onetrans.bootstrap import ResampledAuc
from onetrans.gate import judge
from onetrans.plan import Plan, Recipe, preset_models
from onetrans.scores import Scores
from onetrans.slices import clustered_lift, slices
from onetrans.verdict_page import QUESTIONS, Page, _question_of, calibration_points, roc_points

DAY = "2024-03-01"


def _plan():
    from datetime import date

    return Plan(
        plan_id="abc", path="file:///nowhere", ds=date(2024, 3, 1), preset="tiny", decision="fresh <weights>",
        train_days=(date(2024, 2, 29),), warm_start_ds=None, snapshot_id=7, train_files=(), evaluation_files=(),
        schema=SCHEMA, recipe=Recipe(64, 1, 17, 1.0, 1.0), models=preset_models("tiny"), git_revision="0" * 40,
        created_at="2024-03-02T00:00:00+00:00",
    )  # fmt: skip


def _sliced(table):
    rng = np.random.default_rng(0)
    rows = table.num_rows
    surface = np.where(np.arange(rows) % 3 == 0, "feed", "search")
    return (
        table.append_column("user_impressions", pa.array(rng.choice([0.0, 5.0, 30.0], rows)))
        .append_column("item_impressions", pa.array(rng.choice([0.0, 50.0], rows)))
        .append_column("context.surface", pa.array(surface))
        .append_column("context.one", pa.array(["same"] * rows))
    )


def _page(table, before=(), audits=None, **changes):
    scores = Scores.from_table(table, ds=DAY)
    verdict = judge(scores, dataclasses.replace(SETTINGS, **changes)).to_dict()
    verdict |= {"ds": DAY, "plan_id": "abc", "decided_at": "now", "left_out": [], "force_reason": None}
    cut = slices(scores, table, SETTINGS.confidence)
    return Page(_plan(), verdict, scores, cut, before, audits or {"folder": {"passed": True, "warnings": 0}}).render()


class _Words(HTMLParser):
    def __init__(self):
        super().__init__()
        self.words, self.open = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "line", "polyline", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.words.append(data.strip())


def _words(page):
    parser = _Words()
    parser.feed(page)
    assert parser.open == []
    return parser.words


def test_the_first_line_is_the_verdict_and_its_reason():
    words = _words(_page(_sliced(_table())))
    assert words[:3] == [f"{DAY}: promoted", "PROMOTED", f"onetrans, {DAY}"]
    assert words[3].startswith("onetrans beats dcnv2_din: CTR AUC")
    declined = _words(_page(_sliced(_table()), min_rows=9999))
    assert declined[1] == "NOT PROMOTED"
    assert declined[3].startswith("Not promoted: 3,000 rows, at least 9,999 needed")
    assert _words(_page(_sliced(_table()), mode="dry_run"))[1] == "PASSED, NOT PROMOTED"
    assert _words(_page(_sliced(_table()), mode="off"))[1] == "NOT JUDGED"


def test_it_needs_nothing_but_itself():
    page = _page(_sliced(_table()), before=[{"ds": "2024-02-29", "lifts": {}, "verdict": "declined"}])
    assert not re.search(r"<script|https?:|src=|@import|url\(|<link", page)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) >= 6
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "fresh &lt;weights&gt;" in page


def test_every_criterion_answers_a_question():
    table = _table()
    against = _against(table, _column(table, "onetrans_ctr"), _column(table, "onetrans_cvr"))
    verdict = judge(Scores.from_table(against), dataclasses.replace(SETTINGS, agreeing_days=2))
    assert {_question_of(c.name) for c in verdict.criteria} == {question for question, _ in QUESTIONS}
    assert _question_of("ctr_auc_not_below_champion") == _question_of("champion_comparable") == QUESTIONS[2][0]
    assert _question_of("cvr_auc_over_popularity") == QUESTIONS[3][0]


def test_days_before_and_a_champion_are_drawn_and_warnings_shown():
    table = _sliced(_table())
    lift = {"lift": 0.01, "low": 0.005, "high": 0.015}
    before = [{"ds": "2024-02-29", "lifts": {"ctr_auc": lift}, "verdict": "promoted"}]
    findings = [{"column": "price", "expected": "no <null>", "observed": "7"}]
    audits = {"a": {"passed": True, "warnings": 1, "ds": "2024-02-29", "findings": findings}, "b": None}
    against = _against(table, _column(table, "onetrans_ctr"), _column(table, "onetrans_cvr"))
    page = _page(against, before, audits)
    assert "2024-02-29 +0.0100 [+0.0050, +0.0150]" in page
    assert "champion, version 3 of 2024-01-01" in page
    assert "price: expected no &lt;null&gt;, found 7" in page
    assert "1 without a verdict" in page


def test_a_slice_that_loses_is_warned_of_and_no_other():
    table = _sliced(_table(rows=6000, users=600))
    feed = np.array(table["context.surface"].to_pylist()) == "feed"
    rng = np.random.default_rng(1)
    broken = np.where(feed, rng.random(6000), table["onetrans_ctr"].to_numpy())
    lost = [s for s in slices(Scores.from_table(_with(table, "onetrans_ctr", broken)),
                              _with(table, "onetrans_ctr", broken), 0.9) if s.loses]  # fmt: skip
    assert ("context, surface", "feed", "ctr") in {(s.cut, s.name, s.task) for s in lost}
    assert not any(s.name == "search" for s in lost)
    page = _page(_with(table, "onetrans_ctr", broken))
    assert "The candidate loses among <b>context, surface: feed</b>" in page
    found = slices(Scores.from_table(table), table, 0.9)
    assert not any(s.loses for s in found)
    seen = "by impressions in the last 7 days of training"
    assert {s.cut for s in found} == {f"user, {seen}", f"item, {seen}", "context, surface"}, (
        "a feature of one value divides nothing"
    )
    whole = [s for s in found if s.cut == "context, surface" and s.task == "ctr"]
    assert sum(s.rows for s in whole) == 6000


def test_the_level_is_shared_among_all_slices():
    table = _sliced(_table(rows=6000, users=600))
    scores = Scores.from_table(table)
    found = slices(scores, table, 0.9)
    inside = np.array(table["context.surface"].to_pylist()) == "feed"
    _, _, error = clustered_lift(
        scores.label_N["ctr"][inside],
        *(scores.score_N[model, "ctr"][inside] for model in ("onetrans", "dcnv2_din")),
        scores.user_N[inside],
    )
    (one,) = [s for s in found if (s.name, s.task) == ("feed", "ctr")]
    width = NormalDist().inv_cdf(1.0 - 0.1 / len(found) / 2.0)
    assert (one.low, one.high) == pytest.approx((one.lift - width * error, one.lift + width * error))


def test_slices_too_small_for_an_interval_have_none():
    table = _sliced(_table(rows=60, users=20))
    assert all(s.low is None and not s.loses for s in slices(Scores.from_table(table), table, 0.9))


def test_the_error_of_a_slice_is_that_of_the_bootstrap():
    scores = Scores.from_table(_table(rows=4000, users=400))
    label, user = scores.label_N["ctr"], scores.user_N
    ours, theirs = (np.round(scores.score_N[m, "ctr"], 2) for m in ("onetrans", "dcnv2_din"))  # with ties
    a, b, error = clustered_lift(label, ours, theirs, user)
    assert (a, b) == pytest.approx((roc_auc_score(label, ours), roc_auc_score(label, theirs)), abs=1e-12)
    pair = (ResampledAuc(label, ours, user), ResampledAuc(label, theirs, user))
    drawn = paired_lifts({"ctr": pair}, scores.users, 1000, 0.9, seed=1)["ctr"]
    assert error == pytest.approx(drawn.standard_error, rel=0.08)


def test_curves_are_those_of_the_scores():
    rng = np.random.default_rng(2)
    score = np.round(rng.random(5000), 2)
    label = (rng.random(5000) < score).astype(np.int64)
    x, y = roc_points(label, score)
    assert (x[0], y[0], x[-1], y[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert len(x) <= 121
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(label, score), abs=0.002)
    xs, ys = calibration_points(label, score)
    assert np.mean(xs) == pytest.approx(score.mean())
    assert np.mean(ys) == pytest.approx(label.mean())
