"""The verdict as one HTML page: why a model was or was not promoted, in a minute.

The page needs nothing but itself: drawings are inline SVG (:mod:`onetrans.svg`),
there is no script and nothing is fetched.  Its first line is the verdict and its
reason; then the five questions the gate asks, each with its answer; then what the
answers rest on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from onetrans.bootstrap import Floats
from onetrans.plan import Plan
from onetrans.scores import BASELINE, CANDIDATE, CHAMPION, POPULARITY, TASKS, Scores
from onetrans.slices import Slice
from onetrans.svg import Chart, ticks

COLOURS = {CANDIDATE: "#1f5fbf", BASELINE: "#c2571a", CHAMPION: "#2b8a3e", POPULARITY: "#7b8794"}
ROLES = {CANDIDATE: "candidate", BASELINE: "baseline", CHAMPION: "champion", POPULARITY: "popularity ranker"}
TASK_NAMES = {"ctr": "CTR (click)", "cvr": "CVR (conversion given click)"}
GOOD, BAD, QUIET = "#2b8a3e", "#b42318", "#52606d"

_HEAD_BEGINS, _HEAD_ENDS = "<!--outcome-->", "<!--/outcome-->"
_OUTCOMES = {"held": "passed, not promoted", "declined": "not promoted", "promoted": "promoted"}
_CURVE_POINTS = 120
_MOST_TOLD = 5
_BINS = 10

QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Is there enough data?", ("min_", "_varies")),
    (f"Is it better than the baseline, {BASELINE}?", ("_auc_lift", "days_agree")),
    ("Is it no worse than the champion?", ("champion",)),
    ("Does it rank at all?", ("above_chance", "over_popularity")),
    ("Does it do no harm?", ("_uauc_loss", "_log_loss_increase", "_calibration_error")),
)
"""What the gate asks, and the criteria that answer each: their names begin with, end in or hold these words."""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: #1c2733;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 16px; }
header, section { background: #fff; border: 1px solid #d5dbe1; border-radius: 8px; padding: 16px 20px;
  margin: 0 0 16px; }
h1 { font-size: 20px; margin: 0 0 8px; display: flex; gap: 12px; flex-wrap: wrap; align-items: center; }
h2 { font-size: 16px; margin: 0 0 10px; }
p { margin: 6px 0; max-width: 85ch; }
.pill { color: #fff; border-radius: 999px; padding: 2px 12px; font-size: 15px; white-space: nowrap; }
.quiet { color: #52606d; }
.warn { background: #fff6e5; border-left: 4px solid #b76e00; padding: 8px 12px; margin: 8px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 12px; }
.charts svg { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 8px; }
.legend i { display: inline-block; width: 18px; height: 3px; vertical-align: middle; margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid #e7ebef; vertical-align: top; }
th { font-weight: 600; color: #52606d; font-size: 13px; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.bar { min-width: 160px; width: 32%; padding: 3px 0; }
td.bar svg { width: 100%; height: 18px; display: block; }
.answers { list-style: none; margin: 0; padding: 0; }
.answers li { display: grid; grid-template-columns: 28px 1fr; padding: 8px 0; border-bottom: 1px solid #e7ebef; }
.answers li:last-child { border: 0; }
.mark { font-weight: 700; font-size: 17px; line-height: 1.3; }
.answers ul { margin: 2px 0 0; padding: 0; list-style: none; }
.answers ul li { display: block; border: 0; padding: 0; color: #52606d; }
.answers ul li.failed { color: #b42318; }
details summary { cursor: pointer; color: #52606d; }
code { font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 8px; } header, section { padding: 12px; } body { font-size: 14px; } }
"""


def _headline(label: str, colour: str, title: str, told: str = "") -> str:
    """Return the headline of a page; :func:`with_outcome` replaces it.

    Args:
        label: what was decided, in two or three words.
        colour: of the badge.
        title: what the page is about, escaped.
        told: a sentence that follows, or nothing.
    """
    note = f'<p class="warn">{escape(told)}</p>' if told else ""
    badge = f'<span class="pill" style="background:{colour}">{escape(label.upper())}</span>'
    return f"{_HEAD_BEGINS}<h1>{badge}{title}</h1>{note}{_HEAD_ENDS}"


def with_outcome(page: str, decision: str, reason: str) -> str:
    """Return a page whose headline says what became of the verdict, and why: known only after the promotion."""
    told = f"{_OUTCOMES[decision].capitalize()}: {reason.rstrip('.')}."
    pattern = re.compile(f"{_HEAD_BEGINS}<h1><span[^>]*>[^<]*</span>(?P<title>.*?)</h1>.*?{_HEAD_ENDS}", re.DOTALL)
    return pattern.sub(lambda found: _headline(_OUTCOMES[decision], QUIET, found["title"], told), page, count=1)


@dataclass(frozen=True)
class Page:
    """What a page shows."""

    plan: Plan
    """The day's plan."""
    verdict: Mapping[str, Any]
    """The content of ``gate.json``."""
    scores: Scores
    """Of the evaluation day."""
    slices: Sequence[Slice]
    """The day's slices."""
    before: Sequence[Mapping[str, Any]]
    """Verdicts of earlier days of the chain, oldest first."""
    audits: Mapping[str, Mapping[str, Any] | None]
    """The audit's verdict by folder of rows."""

    def render(self) -> str:
        """Return the page."""
        title = f"{self.verdict['ds']}: {_heading(self.verdict)}"
        sections = [
            _header(self.verdict),
            _answers(self.verdict),
            self._trend(),
            self._curves(),
            self._slices(),
            self._models(),
            self._data(),
            _settings(self.verdict),
        ]
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
            f"<body><main>{''.join(sections)}</main></body></html>\n"
        )

    # Sections

    def _trend(self) -> str:
        days = [*self.before, self.verdict]
        charts = [chart for task in TASKS if (chart := _lift_chart(days, task))]
        if not charts:
            return ""
        level = f"{100 * self.verdict['settings']['confidence']:g} %"
        return _section(
            "Lift over the baseline, last days",
            f'<p class="quiet">AUC of {CANDIDATE} less that of {BASELINE}, with {level} intervals over users. A full '
            "point: promoted. Above the line at 0 the candidate is better.</p>"
            f'<div class="charts">{"".join(charts)}</div>',
        )

    def _curves(self) -> str:
        shown = [s for s in (CANDIDATE, BASELINE, CHAMPION, POPULARITY) if s in self.scores.scorers]
        charts = []
        for task in TASKS:
            counted_N = self.scores.counted(task)
            label_N = self.scores.label_N[task][counted_N]
            if 0 < label_N.sum() < label_N.shape[0]:
                of = {s: self.scores.score_N[s, task][counted_N] for s in shown}
                charts += [_roc_chart(task, label_N, of), _calibration_chart(task, label_N, of)]
        if not charts:
            return _section("Curves", '<p class="quiet">Every label is the same, so there is no curve.</p>')
        legend = "".join(
            f'<span><i style="background:{COLOURS[s]}"></i>{escape(_name(s, self.verdict))}</span>' for s in shown
        )
        return _section(
            f"ROC and calibration on {self.scores.ds}",
            f'<div class="legend">{legend}</div><div class="charts">{"".join(charts)}</div>',
        )

    def _slices(self) -> str:
        rows, losing = [], [s for s in self.slices if s.loses]
        bound = _scale(self.slices)
        for cut in dict.fromkeys(s.cut for s in self.slices):
            inside = [s for s in self.slices if s.cut == cut]
            rows.append(f'<tr><th colspan="5">{escape(cut)}</th></tr>')
            for task in TASKS:
                rows += [_slice_row(s, bound) for s in inside if s.task == task]
        if not rows:
            return _section("Slices", '<p class="quiet">The scores hold nothing to cut by.</p>')
        warning = "".join(
            f'<p class="warn">The candidate loses among <b>{escape(s.cut)}: {escape(s.name)}</b>: {s.task.upper()} AUC '
            f"lift {s.lift:+.4f} [{s.low:+.4f}, {s.high:+.4f}], {s.rows:,} rows.</p>"
            for s in sorted(losing, key=lambda s: s.high or 0.0)[:_MOST_TOLD]
        )
        if len(losing) > _MOST_TOLD:
            warning += f'<p class="warn">And among {len(losing) - _MOST_TOLD} more, marked below.</p>'
        told = warning or "<p>No slice loses beyond chance.</p>"
        level = 100 * self.verdict["settings"]["confidence"]
        return _section(
            "Slices of the day",
            f'{told}<p class="quiet">Lift over the baseline. The intervals hold together at {level:g} %: the level is '
            "shared among all slices, so that one of them does not lose by chance alone. Without an interval: too few "
            "rows or users. A bar that reaches the edge goes on beyond it.</p>"
            '<div class="scroll"><table><tr><th>rows where</th><th>task</th><th class="n">rows</th>'
            f'<th class="n">lift</th><th>interval, from {-bound:.3f} to {bound:+.3f}</th></tr>'
            f"{''.join(rows)}</table></div>",
        )

    def _models(self) -> str:
        columns = [f"{task}_{kind}" for task in TASKS for kind in ("auc", "uauc", "log_loss", "calibration")]
        head = "".join(f'<th class="n">{c.replace("_", " ", 1).replace("_", " ").upper()}</th>' for c in columns)
        rows = []
        for scorer, figures in self.verdict["models"].items():
            cells = "".join(f'<td class="n">{_number(figures[column])}</td>' for column in columns)
            rows.append(f"<tr><td>{escape(_name(scorer, self.verdict))}</td>{cells}</tr>")
        pairs = []
        for pair, lifts in self.verdict["comparisons"].items():
            told = "; ".join(f"{task.split('_')[0].upper()} {_lift_text(lift)}" for task, lift in lifts.items())
            pairs.append(f"<li>{escape(pair)}: {told or 'undefined'}</li>")
        others = f"<p>AUC against others than the baseline:</p><ul>{''.join(pairs)}</ul>" if pairs else ""
        return _section(
            f"Figures on {self.scores.ds}",
            f'<div class="scroll"><table><tr><th>scorer</th>{head}</tr>{"".join(rows)}</table></div>{others}'
            + "".join(
                f'<p class="quiet">{escape(n)}.</p>' for n in [self.verdict["champion"]["note"], *self.verdict["notes"]]
            ),
        )

    def _data(self) -> str:
        plan, schema = self.plan, self.plan.schema
        features = []
        for side in ("user", "context", "item", "event"):
            of = schema.of_side(side)
            if of:
                names = ", ".join(f"{f.name} ({f.kind})" for f in of)
                features.append(f"<tr><td>{side}</td><td class='n'>{len(of)}</td><td>{escape(names)}</td></tr>")
        sequences = ", ".join(f"{s.name} (last {s.max_length})" for s in schema.sequences) or "none"
        features.append(
            f"<tr><td>sequences</td><td class='n'>{len(schema.sequences)}</td><td>{escape(sequences)}</td></tr>"
        )
        return _section(
            "Features and audit",
            f"<p>Training: {escape(plan.decision)}. Feature schema {escape(schema.name)} "
            f"<code>{schema.fingerprint}</code>, snapshot <code>{plan.snapshot_id}</code> of training_requests, code "
            f"<code>{escape(plan.git_revision[:20])}</code>.</p>{_audit(self.audits)}"
            f'<div class="scroll"><table><tr><th>side</th><th class="n">features</th><th>names and kinds</th></tr>'
            f"{''.join(features)}</table></div>",
        )


# The top


def _heading(verdict: Mapping[str, Any]) -> str:
    if verdict["passed"] is None:
        return "not judged"
    if verdict["verdict"] == "promoted":
        return "promoted"
    return "passed, not promoted" if verdict["passed"] else "not promoted"


def _header(verdict: Mapping[str, Any]) -> str:
    colour = GOOD if verdict["verdict"] == "promoted" else BAD if verdict["passed"] is False else QUIET
    warnings = "".join(f'<p class="warn">{escape(w)}</p>' for w in verdict["warnings"])
    if verdict["force_reason"]:
        reason = escape(verdict["force_reason"])
        warnings += f'<p class="warn">A person forces the promotion, whatever the verdict: {reason}</p>'
    left_out = "".join(f'<p class="warn">Left out of the window: {escape(w)}</p>' for w in verdict["left_out"])
    days = verdict["days"]
    top = _headline(_heading(verdict), colour, f"{CANDIDATE}, {escape(verdict['ds'])}")
    window = days[-1] if len(days) == 1 else f"{days[0]} to {days[-1]} ({len(days)} days pooled)"
    return (
        f"<header>{top}<p>{escape(verdict['reason'])}</p>{warnings}{left_out}"
        f'<p class="quiet">{verdict["rows"]:,} impressions of {verdict["users"]:,} users, '
        f"{verdict['clicks']:,} clicks, "
        f"{verdict['conversions']:,} conversions; {escape(window)}. Plan <code>{escape(verdict['plan_id'])}</code>, "
        f"decided {escape(verdict['decided_at'])}.</p></header>"
    )


def _answers(verdict: Mapping[str, Any]) -> str:
    items = []
    for question, words in QUESTIONS:
        criteria = [c for c in verdict["criteria"] if _question_of(c["name"]) == question]
        if not criteria:
            note = verdict["champion"]["note"] if words == ("champion",) else "not asked"
            items.append(_answer("–", QUIET, question, [f"<li>{escape(note)}</li>"]))
            continue
        passed = all(c["passed"] for c in criteria)
        criteria = [c for c in criteria if not (c["passed"] and c["name"].endswith("_varies"))]
        told = [
            f"<li>{escape(c['text'])}</li>"
            if c["passed"]
            else f'<li class="failed"><b>No.</b> {escape(c["text"])}</li>'
            for c in sorted(criteria, key=lambda c: c["passed"])
        ]
        items.append(_answer("✓" if passed else "✗", GOOD if passed else BAD, question, told))
    return _section("Five questions", f'<ul class="answers">{"".join(items)}</ul>')


def _question_of(name: str) -> str:
    """Return the question a criterion answers; the champion's words come first, as its names hold others too."""
    for question, words in sorted(QUESTIONS, key=lambda entry: entry[1] != ("champion",)):
        if any(word in name for word in words):
            return question
    raise AssertionError(f"criterion {name!r} answers none of the questions")


def _answer(mark: str, colour: str, question: str, told: Iterable[str]) -> str:
    return (
        f'<li><span class="mark" style="color:{colour}">{mark}</span><div><b>{escape(question)}</b>'
        f"<ul>{''.join(told)}</ul></div></li>"
    )


# Charts


def _lift_chart(days: Sequence[Mapping[str, Any]], task: str) -> str:
    shown = [(day, day["lifts"].get(f"{task}_auc")) for day in days]
    begin = date.fromisoformat(str(days[0]["ds"])).toordinal()
    last = date.fromisoformat(str(days[-1]["ds"])).toordinal() - begin
    drawn = [
        (date.fromisoformat(str(day["ds"])).toordinal() - begin, day, lift)
        for day, lift in shown
        if lift is not None and lift["low"] is not None
    ]
    if not drawn:
        return ""
    low, high = min(0.0, *(lift["low"] for _, _, lift in drawn)), max(0.0, *(lift["high"] for _, _, lift in drawn))
    room = 0.08 * (high - low) or 0.001
    chart = Chart((-0.5, last + 0.5), (low - room, high + room), f"{TASK_NAMES[task]}, AUC lift", height=280)
    chart.line([-0.5, last + 0.5], [0.0, 0.0], QUIET, width=1.2)
    for i, day, lift in drawn:
        colour = COLOURS[CANDIDATE]
        chart.interval(i, lift["low"], lift["high"], colour)
        chart.point(
            i,
            lift["lift"],
            colour,
            filled=(day.get("decision") or day["verdict"]) == "promoted",
            says=f"{day['ds']} {_lift_text(lift)}",
        )
    step = max(1, (last + 1) // 7)
    x_ticks = [(float(i), date.fromordinal(begin + i).isoformat()[5:]) for i in range(last, -1, -step)]
    return chart.render(x_ticks, [(t, f"{t:+g}" if t else "0") for t in ticks(low - room, high + room)])


def _roc_chart(task: str, label_N: npt.NDArray[np.int64], of: Mapping[str, Floats]) -> str:
    chart = Chart((0.0, 1.0), (0.0, 1.0), f"{TASK_NAMES[task]}, ROC", "share of negatives passed", "share of positives")
    chart.line([0, 1], [0, 1], "#9aa5b1", dashed=True, width=1)
    for scorer in reversed(list(of)):
        chart.line(*roc_points(label_N, of[scorer]), COLOURS[scorer])
    fifths = [(n / 5, f"{n / 5:g}") for n in range(6)]
    return chart.render(fifths, fifths)


def roc_points(label_N: npt.NDArray[np.int64], score_N: Floats) -> tuple[list[float], list[float]]:
    """Return a curve through at most so many points that none can be told from its neighbours on a screen."""
    order_N = np.argsort(-score_N, kind="stable")
    last_N = np.flatnonzero(np.diff(score_N[order_N], append=np.nan) != 0)  # a tie is one step, taken whole
    won, lost = np.cumsum(label_N[order_N])[last_N], np.cumsum(1 - label_N[order_N])[last_N]
    x, y = np.concatenate([[0.0], lost / lost[-1]]), np.concatenate([[0.0], won / won[-1]])
    if x.shape[0] > _CURVE_POINTS:
        along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        kept = np.unique(np.searchsorted(along, np.linspace(0.0, along[-1], _CURVE_POINTS)).clip(0, x.shape[0] - 1))
        x, y = x[kept], y[kept]
    return x.tolist(), y.tolist()


def _calibration_chart(task: str, label_N: npt.NDArray[np.int64], of: Mapping[str, Floats]) -> str:
    curves = {s: calibration_points(label_N, score) for s, score in of.items() if s != POPULARITY}
    most = min(1.0, 1.08 * max(max(*x, *y) for x, y in curves.values()))
    title = f"{TASK_NAMES[task]}, calibration"
    chart = Chart((0.0, most), (0.0, most), title, "mean prediction, tenths of the rows", "share that happened")
    chart.line([0, most], [0, most], "#9aa5b1", dashed=True, width=1)
    for scorer in reversed(list(curves)):
        xs, ys = curves[scorer]
        chart.line(xs, ys, COLOURS[scorer], width=1.5)
        for x, y in zip(xs, ys, strict=True):
            chart.point(x, y, COLOURS[scorer], says=f"{ROLES[scorer]}: predicted {x:.3f}, happened {y:.3f}")
    marks = [(t, f"{t:g}") for t in ticks(0.0, most)]
    return chart.render(marks, marks)


def calibration_points(label_N: npt.NDArray[np.int64], score_N: Floats) -> tuple[list[float], list[float]]:
    """Return mean prediction and mean label of tenths of the rows, by rising prediction."""
    order_N = np.argsort(score_N, kind="stable")
    tenths = [part for part in np.array_split(order_N, _BINS) if part.shape[0]]
    return [float(score_N[part].mean()) for part in tenths], [float(label_N[part].mean()) for part in tenths]


def _scale(slices: Sequence[Slice]) -> float:
    """Return half the width of the bars: one wide interval of a small slice must not make all others points."""
    ends = sorted(max(abs(s.low), abs(s.high)) for s in slices if s.low is not None and s.high is not None)
    return 1.1 * ends[(3 * (len(ends) - 1)) // 4] if ends else 0.0


def _slice_row(s: Slice, bound: float) -> str:
    colour = BAD if s.loses else GOOD if s.low is not None and s.low > 0 else QUIET
    bar = ""
    if s.low is not None and s.high is not None and s.lift is not None and bound:

        def place(value: float) -> float:
            return 150 + 150 * min(max(value / bound, -1.0), 1.0)

        bar = (
            '<svg viewBox="0 0 300 18" preserveAspectRatio="none" role="img" '
            f'aria-label="{s.low:+.4f} to {s.high:+.4f}"><title>{s.low:+.4f} to {s.high:+.4f}</title>'
            '<line x1="150" y1="0" x2="150" y2="18" stroke="#9aa5b1" stroke-width="1"/>'
            f'<line x1="{place(s.low):.1f}" y1="9" x2="{place(s.high):.1f}" y2="9" stroke="{colour}" stroke-width="3"/>'
            f'<rect x="{place(s.lift) - 2:.1f}" y="4" width="4" height="10" fill="{colour}"/></svg>'
        )
    lift = "–" if s.lift is None else f"{s.lift:+.4f}"
    mark = "<b>loses</b> " if s.loses else ""
    return (
        f'<tr><td>{mark}{escape(s.name)}</td><td>{s.task.upper()}</td><td class="n">{s.rows:,}</td>'
        f'<td class="n" style="color:{colour}">{lift}</td><td class="bar">{bar}</td></tr>'
    )


# Small parts


def _audit(audits: Mapping[str, Mapping[str, Any] | None]) -> str:
    judged = [verdict for verdict in audits.values() if verdict]
    passed = sum(1 for verdict in judged if verdict.get("passed"))
    warned = [verdict for verdict in judged if verdict.get("warnings")]
    text = f"<p>Audit of the rows: {passed} of {len(audits)} days passed"
    if len(judged) < len(audits):
        text += f", {len(audits) - len(judged)} without a verdict"
    text += f", {len(warned)} with warnings.</p>"
    for verdict in warned:
        findings = verdict.get("findings") or []
        first = "; ".join(map(_finding, findings[:3]))
        text += f'<p class="warn">Audit of {escape(str(verdict.get("ds", "")))}: {escape(first)}</p>'
    return text


def _finding(finding: Mapping[str, Any]) -> str:
    return f"{finding['column']}: expected {finding['expected']}, found {finding['observed']}"


def _settings(verdict: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>gate.{escape(name)}</code></td><td class='n'>{escape(str(value))}</td></tr>"
        for name, value in verdict["settings"].items()
    )
    return (
        f"<section><details><summary>Settings in force</summary><table>{rows}</table></details>"
        '<p class="quiet">All of it as data: <code>gate.json</code>. The rules and their reasons: '
        "<code>docs/gate.md</code>.</p></section>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _name(scorer: str, verdict: Mapping[str, Any]) -> str:
    if scorer == CHAMPION:
        return f"champion, version {verdict['champion']['version']} of {verdict['champion']['ds']}"
    return f"{scorer} ({ROLES[scorer]})" if scorer in (CANDIDATE, BASELINE) else ROLES.get(scorer, scorer)


def _lift_text(lift: Mapping[str, Any]) -> str:
    if lift["low"] is None:
        return f"{lift['lift']:+.4f}"
    return f"{lift['lift']:+.4f} [{lift['low']:+.4f}, {lift['high']:+.4f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
