"""The gate: is the candidate better than the baseline, no worse than the champion, and without harm?

All scorers' probabilities of the same impressions go in, a verdict with every
figure comes out.  A candidate is promoted when *all* of these hold:

* the window is large enough: rows, clicks, conversions and users;
* no model gives every row the same score (a broken baseline proves nothing);
* the lower bound of the CTR AUC lift over the baseline, and that of the CVR AUC
  lift, exceed their thresholds.  Both lifts have to be shown, so a candidate that is
  not better in one task passes at most as often as that task's bound errs, which
  is (1 - confidence) / 2: no correction for two tests is needed (an
  intersection-union test), nor for the criteria below, which only decline more;
* the candidate ranks at all: the lower bound of each AUC is above 0.5, and that of
  its lift over a popularity ranker is above 0;
* it is not worse than the champion by a margin that matters: the lower bound of
  each AUC difference is above ``-max_loss_to_champion``;
* the last days agree, each by itself;
* the guardrails hold for both tasks on the evaluation day: UAUC, log loss,
  calibration.  The estimate has to be within the margin; its interval is told.

Intervals come from a paired bootstrap over users (:mod:`onetrans.bootstrap`).
``docs/gate.md`` gives the reasons for each rule, and its measured error rates.

Two kinds of trouble are kept apart.  Scores that cannot be right (a null or NaN,
a probability outside [0, 1], an impression twice or not at all) are an error of
the step that wrote them: :class:`~onetrans.errors.BadDataError`, and no verdict.
A day that is sound but cannot show anything (too few rows, one class, constant
scores) is declined, and the verdict says why.  Neither ever promotes.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from typing import Any, Literal

import numpy as np

from onetrans import storage
from onetrans.bootstrap import Floats, Interval, Lift, Part, Replicates, ResampledAuc, UserSums, resample
from onetrans.errors import BadDataError, NotReadyError
from onetrans.forced import add_force_argument, forced_reason
from onetrans.history import earlier_plans
from onetrans.metrics import Metrics, cross_entropies, user_auc
from onetrans.plan import GATE_FILE, METRICS_FILE, PAGE_FILE, PROMOTION_FILE, SCORES_FILE, Plan
from onetrans.process import add_json, print_json
from onetrans.scores import (
    BASELINE,
    CANDIDATE,
    CHAMPION,
    POPULARITY,
    TASKS,
    ChampionRecord,
    Scores,
    common_users,
    read_scores,
)
from onetrans.settings import GateSettings, Settings, load_settings
from onetrans.slices import Slice, slices
from onetrans.tracking import MODEL_FOLDER, audit_verdicts, folder_digest, log_gate
from onetrans.trial import is_trial, log_trial, results_folder, step_of_day
from onetrans.verdict_page import Page

logger = logging.getLogger(__name__)

TRAILING_DAYS = 7
"""Earlier days of the chain whose figures make the band that the baseline is expected in."""
SHOWN_DAYS = 13
"""Earlier days whose lift the page shows."""
FEWEST_TRAILING = 3
"""Fewer earlier days than this make no band."""
BAND = 3.0
"""Half the width of that band, in robust standard deviations of the days, or standard errors of this day if more."""
MOST_SLICES_TOLD = 5
"""Losing slices that the warning names."""

EXAMPLES = """examples:
  onetrans gate --plan var/runs/ds=2022-05-06/1a2b3c4d5e6f
  ONETRANS_GATE_MODE=dry_run onetrans gate --plan var/runs/ds=2022-05-06/1a2b3c4d5e6f"""

Decision = Literal["promoted", "declined"]
Comparison = Literal[">=", ">", "<=", "within"]
"""How a figure must stand to its threshold; ``within``: no further from 1 than that."""
Figure = Literal["auc", "uauc", "log_loss", "calibration"]
Key = tuple[str, str, Figure, tuple[int, ...]]
"""A figure: scorer, task, kind, and the days it is taken over."""


@dataclass(frozen=True)
class Criterion:
    """One thing that must hold for a promotion."""

    name: str
    """For example ``ctr_auc_lift``."""
    passed: bool
    """Whether it holds."""
    figure: float | None
    """What was measured; None where it does not exist on these rows."""
    comparison: Comparison
    """How the figure must stand to the threshold."""
    threshold: float
    """The setting it is held against."""
    text: str
    """The outcome in words."""
    interval: tuple[float, float] | None = None
    """Bootstrap interval of the figure, where it has one."""
    held: Literal["figure", "lower bound"] = "figure"
    """What is held against the threshold."""


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, and every figure it rests on."""

    verdict: Decision
    """``promoted`` only if every criterion holds and the gate is enabled."""
    passed: bool | None
    """Whether every criterion holds, whatever the mode; None if the gate is off."""
    reason: str
    """One sentence for a person."""
    mode: str
    """``gate.mode`` at the time."""
    days: tuple[str, ...]
    """The window: days that were pooled, the evaluation day last."""
    rows: int
    """Impressions of the window."""
    users: int
    """Distinct users among them."""
    clicks: int
    """Clicked impressions."""
    conversions: int
    """Converted clicks."""
    lifts: dict[str, Lift]
    """Per task, the AUC lift over the baseline; empty if the gate is off or an AUC is undefined."""
    comparisons: dict[str, dict[str, Lift]]
    """Per pair ("onetrans over champion", ...) and task, the AUC lift on the days on which both scored."""
    aucs: dict[str, dict[str, Interval]]
    """Per scorer and task, the AUC over the window."""
    champion: ChampionRecord
    """Which champion it was compared with, or why with none."""
    criteria: tuple[Criterion, ...]
    """Everything that had to hold, in the order it is listed."""
    warnings: tuple[str, ...]
    """What a person should look at, though it decides nothing."""
    notes: tuple[str, ...]
    """What was not looked at, and why."""
    models: dict[str, Metrics]
    """Figures of every scorer on the evaluation day."""
    settings: GateSettings
    """The thresholds used."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``gate.json``."""
        return {
            "verdict": self.verdict,
            "passed": self.passed,
            "reason": self.reason,
            "mode": self.mode,
            "days": list(self.days),
            "rows": self.rows,
            "users": self.users,
            "clicks": self.clicks,
            "conversions": self.conversions,
            "lifts": {f"{task}_auc": _plain(lift) for task, lift in self.lifts.items()},
            "comparisons": {
                pair: {f"{task}_auc": _plain(lift) for task, lift in lifts.items()}
                for pair, lifts in self.comparisons.items()
            },
            "aucs": {
                scorer: {f"{task}_auc": _plain(interval) for task, interval in intervals.items()}
                for scorer, intervals in self.aucs.items()
            },
            "champion": asdict(self.champion),
            "criteria": [{**asdict(c), "interval": c.interval and list(c.interval)} for c in self.criteria],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "models": {name: metrics.to_dict() for name, metrics in self.models.items()},
            "settings": asdict(self.settings),
        }


def judge(
    scores: Scores,
    settings: GateSettings,
    earlier: Sequence[Scores | None] = (),
    baseline_before: Mapping[str, Sequence[float]] | None = None,
) -> Verdict:
    """Hold the candidate against every criterion; the same scores and settings give the same verdict.

    Args:
        scores: of the evaluation day.
        settings: the thresholds.
        earlier: of the days before it, one entry for each, oldest first; None for a day that this chain of trainings
            did not evaluate.  Those the settings do not ask for are not used.
        baseline_before: per task the baseline's AUC on earlier days of the chain.
    """
    every_day = [*earlier, scores]
    measured = _Measured([day for day in every_day[-settings.window_days :] if day is not None], settings)
    models = {scorer: scores.metrics(scorer) for scorer in scores.scorers}
    lifts: dict[str, Lift] = {}
    criteria: list[Criterion] = []
    warnings: list[str] = []
    notes: list[str] = []
    if settings.mode != "off":
        lifts = measured.lifts(CANDIDATE, BASELINE)
        criteria += _enough_data(measured, settings)
        criteria += [_varies(scores, model, task) for task in TASKS for model in (CANDIDATE, BASELINE)]
        criteria += [_lift_shown(task, lifts.get(task), settings) for task in TASKS]
        criteria += _days_agree(every_day, settings)
        criteria += _ranks_at_all(measured)
        criteria += _not_below_champion(measured, scores.champion, settings)
        criteria += _guardrails(measured, settings)
        for task in TASKS:
            collapsed, note = _baseline_collapsed(measured, task, (baseline_before or {}).get(task, ()))
            warnings += filter(None, [collapsed])
            notes += filter(None, [note])
    passed = all(criterion.passed for criterion in criteria) if criteria else None
    pairs = [(of, over) for over in (CHAMPION, POPULARITY) for of in (CANDIDATE, BASELINE) if over in scores.scorers]
    return Verdict(
        verdict="promoted" if passed and settings.mode == "enabled" else "declined",
        passed=passed,
        reason=_reason(passed, criteria, lifts, len(measured.days), settings),
        mode=settings.mode,
        days=tuple(day.ds for day in measured.days),
        rows=measured.rows,
        users=measured.users,
        clicks=measured.positives("ctr"),
        conversions=measured.positives("cvr"),
        lifts=lifts,
        comparisons={f"{of} over {over}": measured.lifts(of, over) for of, over in pairs} if passed is not None else {},
        aucs={s: measured.aucs(s) for s in scores.scorers} if passed is not None else {},
        champion=scores.champion,
        criteria=tuple(criteria),
        warnings=tuple(warnings),
        notes=tuple(notes),
        models=models,
        settings=settings,
    )


class _Measured:
    """Every figure of a window, all of them on the same draws of users."""

    def __init__(self, days: Sequence[Scores], settings: GateSettings) -> None:
        self.days = list(days)
        self.confidence = settings.confidence
        self.users, self._user_N = common_users(self.days)
        self.today = (len(self.days) - 1,)
        self._drawn: dict[Key, Replicates] = {}
        if settings.mode != "off":
            wanted = {key: self._parts(key) for key in dict.fromkeys(self._wanted())}
            # A model that is not there on a day, or a task without positives, has no parts.
            self._drawn = resample(
                {key: parts for key, parts in wanted.items() if parts}, self.users, settings.replicates, settings.seed
            )

    @property
    def rows(self) -> int:
        """Impressions."""
        return sum(day.user_N.shape[0] for day in self.days)

    def positives(self, task: str) -> int:
        """Clicks, or conversions."""
        return int(sum(day.label_N[task].sum() for day in self.days))

    def shared(self, *scorers: str) -> tuple[int, ...]:
        """Return the days on which all of these scored; for the champion, only those of the same version."""
        version = self.days[-1].champion.version
        return tuple(
            i
            for i, day in enumerate(self.days)
            if set(scorers) <= set(day.scorers) and (CHAMPION not in scorers or day.champion.version == version)
        )

    def get(self, scorer: str, task: str, figure: Figure, days: tuple[int, ...]) -> Replicates | None:
        """Return a figure; None if it does not exist on these rows."""
        found = self._drawn.get((scorer, task, figure, days))
        return found if found is not None and np.isfinite(found.value) else None

    def lifts(self, of: str, over: str) -> dict[str, Lift]:
        """Return the AUC lift of one scorer over another, per task in which it is defined."""
        days, found = self.shared(of, over), {}
        for task in TASKS:
            ours, theirs = self.get(of, task, "auc", days), self.get(over, task, "auc", days)
            if ours is not None and theirs is not None:
                found[task] = Lift.between(ours, theirs, self.confidence)
        return found

    def aucs(self, scorer: str) -> dict[str, Interval]:
        """Return a scorer's AUC over the days on which it scored, per task in which it is defined."""
        days, found = self.shared(scorer), {}
        for task in TASKS:
            drawn = self.get(scorer, task, "auc", days)
            if drawn is not None:
                found[task] = Interval.of(drawn.value, drawn.value_B, self.confidence, drawn.effective_users)
        return found

    def _wanted(self) -> Iterable[Key]:
        today = self.days[-1]
        for task in TASKS:
            for scorer in today.scorers:
                yield scorer, task, "auc", self.shared(scorer)
                for other in today.scorers:
                    yield scorer, task, "auc", self.shared(scorer, other)
            for model in (CANDIDATE, BASELINE):
                for figure in ("uauc", "log_loss", "calibration"):
                    yield model, task, figure, self.today

    def _parts(self, key: Key) -> list[Part]:
        scorer, task, figure, days = key
        return [part for i in days if (part := self._part(i, scorer, task, figure)) is not None]

    def _part(self, i: int, scorer: str, task: str, figure: Figure) -> Part | None:
        day = self.days[i]
        counted_N = day.counted(task)
        if not counted_N.any():
            return None
        label_N, score_N = day.label_N[task][counted_N], day.score_N[scorer, task][counted_N]
        user_N = self._user_N[i][counted_N]
        if figure == "auc":
            return ResampledAuc(label_N, score_N, user_N)

        def per_user(value_N: Floats | None = None) -> Floats:
            return np.bincount(user_N, value_N, self.users).astype(np.float64)

        if figure == "log_loss":
            return UserSums(per_user(cross_entropies(label_N, score_N)), per_user())
        if figure == "calibration":
            return UserSums(per_user(score_N), per_user(label_N.astype(np.float64)))
        ranked = user_auc(label_N, score_N, user_N)
        numerator_U, denominator_U = np.zeros(self.users), np.zeros(self.users)
        numerator_U[ranked.user_U] = ranked.impressions_U * ranked.auc_U
        denominator_U[ranked.user_U] = ranked.impressions_U
        return UserSums(numerator_U, denominator_U)


# Criteria


def _enough_data(measured: _Measured, settings: GateSettings) -> list[Criterion]:
    counts = {
        "rows": (measured.rows, settings.min_rows),
        "clicks": (measured.positives("ctr"), settings.min_positives),
        "conversions": (measured.positives("cvr"), settings.min_positives),
        "users": (measured.users, settings.min_users),
    }
    return [
        Criterion(f"min_{name}", count >= least, count, ">=", least, f"{count:,} {name}, at least {least:,} needed")
        for name, (count, least) in counts.items()
    ]


def _varies(scores: Scores, model: str, task: str) -> Criterion:
    distinct = int(np.unique(scores.score_N[model, task][scores.counted(task)]).shape[0])
    text = f"{model} gives {distinct:,} different {task.upper()} score{'' if distinct == 1 else 's'}"
    return Criterion(f"{model}_{task}_varies", distinct >= 2, distinct, ">=", 2, text)


def _lift_shown(task: str, lift: Lift | None, settings: GateSettings) -> Criterion:
    threshold = float(getattr(settings, f"min_lift_{task}_auc"))
    return _above(f"{task}_auc_lift", f"{task.upper()} AUC", lift, threshold, f"{BASELINE}'s ")


def _above(name: str, label: str, lift: Lift | None, threshold: float, against: str = "") -> Criterion:
    """Hold the lower bound of a lift against a threshold."""
    if lift is None:
        return Criterion(name, False, None, ">", threshold, f"{label} is undefined: every label is the same")
    if not lift.bounded:
        text = f"{label} has no interval: the rows are those of {lift.effective_users:.1f} effective users"
        if not lift.undefined:
            return Criterion(name, False, lift.lift, ">", threshold, text)
        text = f"{label} has no interval: {lift.undefined} of {lift.replicates} draws of users hold one class only"
        return Criterion(name, False, lift.lift, ">", threshold, text)
    text = f"{label} {lift.candidate:.4f} against {against}{lift.baseline:.4f}: lift {told(lift)}"
    passed = lift.low > threshold
    if threshold or not passed:
        text += f", whose lower end must be above {threshold:g}"
    return Criterion(name, passed, lift.lift, ">", threshold, text, (lift.low, lift.high), "lower bound")


def told(lift: Lift) -> str:
    """Return a lift with its interval as text."""
    return f"{lift.lift:+.4f} [{lift.low:+.4f}, {lift.high:+.4f}]"


def _days_agree(days: Sequence[Scores | None], settings: GateSettings) -> list[Criterion]:
    if settings.agreeing_days == settings.window_days == 1:
        return []  # The lift's own bound says more.
    asked = settings.agreeing_days
    lifts = [(day.ds, _lifts_of_a_day(day)) for day in days[-asked:] if day is not None]
    agreeing = sum(all(lift is not None and lift > 0 for lift in found) for _, found in lifts)
    shown = "; ".join(f"{ds} {', '.join(map(_signed, found))}" for ds, found in lifts)
    if len(lifts) < asked:
        shown += f"; {asked - len(lifts)} of them not evaluated in this chain of trainings"
    if asked == 1:
        text = f"the evaluation day by itself {'agrees' if agreeing else 'does not agree'}"
    else:
        text = f"{agreeing} of the last {asked} days agree, each by itself"
    text += f" (lift in CTR and CVR AUC: {shown})"
    return [Criterion("days_agree", agreeing >= asked, agreeing, ">=", asked, text)]


def _lifts_of_a_day(day: Scores) -> list[float | None]:
    ours, theirs = day.metrics(CANDIDATE), day.metrics(BASELINE)
    pairs = ((ours.ctr_auc, theirs.ctr_auc), (ours.cvr_auc, theirs.cvr_auc))
    return [None if a is None or b is None else a - b for a, b in pairs]


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.4f}"


def _ranks_at_all(measured: _Measured) -> list[Criterion]:
    criteria, found, over = [], measured.aucs(CANDIDATE), measured.lifts(CANDIDATE, POPULARITY)
    for task in TASKS:
        name, label, auc = f"{task}_auc_above_chance", f"{task.upper()} AUC", found.get(task)
        if auc is None or not auc.bounded:
            text = f"{label} is undefined" if auc is None else f"{label} {auc.value:.4f} has no interval"
            criteria.append(Criterion(name, False, None, ">", 0.5, text, None, "lower bound"))
        else:
            text = f"{label} {auc.value:.4f} [{auc.low:.4f}, {auc.high:.4f}], a coin's is 0.5"
            criteria.append(
                Criterion(name, auc.low > 0.5, auc.value, ">", 0.5, text, (auc.low, auc.high), "lower bound")
            )
        criteria.append(_above(f"{task}_auc_over_popularity", label, over.get(task), 0.0, "a popularity ranker's "))
    return criteria


def _not_below_champion(measured: _Measured, champion: ChampionRecord, settings: GateSettings) -> list[Criterion]:
    if champion.state == "incomparable":
        return [Criterion("champion_comparable", False, None, ">=", 0.0, champion.note)]
    if champion.state != "scored":
        return []
    lifts = measured.lifts(CANDIDATE, CHAMPION)
    return [
        _above(
            f"{task}_auc_not_below_champion",
            f"{task.upper()} AUC",
            lifts.get(task),
            -settings.max_loss_to_champion,
            f"champion {champion.version}'s ",
        )
        for task in TASKS
    ]


def _guardrails(measured: _Measured, settings: GateSettings) -> list[Criterion]:
    def both(task: str, figure: Figure) -> tuple[Replicates | None, Replicates | None]:
        ours, theirs = (measured.get(model, task, figure, measured.today) for model in (CANDIDATE, BASELINE))
        return ours, theirs

    confidence = settings.confidence
    return [
        *(_uauc_kept(task, *both(task, "uauc"), settings.max_uauc_loss, confidence) for task in TASKS),
        *(_log_loss_kept(task, *both(task, "log_loss"), settings.max_log_loss_increase, confidence) for task in TASKS),
        *(
            _calibrated(task, both(task, "calibration")[0], settings.max_calibration_error, confidence)
            for task in TASKS
        ),
    ]


def _uauc_kept(
    task: str, ours: Replicates | None, theirs: Replicates | None, most: float, confidence: float
) -> Criterion:
    name, label = f"{task}_uauc_loss", f"{task.upper()} UAUC"
    if ours is None or theirs is None:
        return Criterion(name, False, None, "<=", most, f"{label} is undefined: no user has both classes")
    return _within(
        name,
        f"{label} {ours.value:.4f} against {theirs.value:.4f}: loss",
        Interval.of(theirs.value - ours.value, theirs.value_B - ours.value_B, confidence, ours.effective_users),
        most,
    )


def _log_loss_kept(
    task: str, ours: Replicates | None, theirs: Replicates | None, most: float, confidence: float
) -> Criterion:
    name, label = f"{task}_log_loss_increase", f"{task.upper()} log loss"
    if ours is None or theirs is None:
        return Criterion(name, False, None, "<=", most, f"{label} is undefined: there are no clicks")
    return _within(
        name,
        f"{label} {ours.value:.4f} against {theirs.value:.4f}: increase, as a share,",
        Interval.of(
            ours.value / theirs.value - 1.0, ours.value_B / theirs.value_B - 1.0, confidence, ours.effective_users
        ),
        most,
    )


def _calibrated(task: str, ours: Replicates | None, most: float, confidence: float) -> Criterion:
    name, label = f"{task}_calibration_error", f"{task.upper()} calibration"
    if ours is None:
        return Criterion(name, False, None, "within", most, f"{label} is undefined: no label is positive")
    # The interval is that of the ratio: the distance from 1 has one that begins above 0 even for a perfect model.
    found = Interval.of(ours.value, ours.value_B, confidence, ours.effective_users)
    bounds = f" [{found.low:.3f}, {found.high:.3f}]" if found.bounded else ""
    text = f"{label}: mean prediction is {found.value:.3f}{bounds} of the mean label, at most {most:g} from 1"
    return Criterion(name, abs(found.value - 1.0) <= most, found.value, "within", most, text, found.bounds)


def _within(name: str, text: str, found: Interval, most: float) -> Criterion:
    bounds = f" [{found.low:+.4f}, {found.high:+.4f}]" if found.bounded else ""
    text += f" {found.value:+.4f}{bounds}, at most {most:g}"
    return Criterion(name, found.value <= most, found.value, "<=", most, text, found.bounds)


def _baseline_collapsed(measured: _Measured, task: str, before: Sequence[float]) -> tuple[str, str]:
    """Say whether the baseline lies below the band of its last days: then a lift over it means little.

    Middle and width of the band are a median and the median distance from it (times 1.4826, a normal distribution's
    standard deviation), which nights that have collapsed already do not move while they are fewer than half.

    Returns:
        A warning and a note, of which one or both are empty.
    """
    last = list(before)[-TRAILING_DAYS:]
    now = measured.get(BASELINE, task, "auc", measured.today)
    if now is None:
        return "", ""
    if len(last) < FEWEST_TRAILING:
        return "", (
            f"{BASELINE}'s {task.upper()} AUC was not held against its last days: {len(last)} before this one in the "
            f"chain of trainings, {FEWEST_TRAILING} make a band"
        )
    middle, error = statistics.median(last), float(np.nanstd(now.value_B, ddof=1))
    spread = 1.4826 * statistics.median(abs(value - middle) for value in last)
    least = middle - BAND * max(spread, error)
    if now.value >= least:
        return "", ""
    return (
        f"The baseline has collapsed: {BASELINE}'s {task.upper()} AUC is {now.value:.4f}, below the band of "
        f"its last {len(last)} days (median {middle:.4f}, band from {least:.4f}). A lift over it means little.",
        "",
    )


def _reason(
    passed: bool | None, criteria: Sequence[Criterion], lifts: dict[str, Lift], days: int, settings: GateSettings
) -> str:
    if passed is None:
        return "Not judged: gate.mode = off."
    level = f"{100 * settings.confidence:g}% intervals over users"
    if passed:
        shown = " and ".join(c.text for c in criteria if c.name in ("ctr_auc_lift", "cvr_auc_lift"))
        kept = [c.text for c in criteria if c.name.endswith("not_below_champion")]
        champion = f"; no worse than the champion: {' and '.join(kept)}" if kept else ""
        held = "" if settings.mode == "enabled" else f"; gate.mode = {settings.mode} leaves the champion as it is"
        return f"{CANDIDATE} beats {BASELINE}: {shown}{champion} ({level}){held}."
    failed = [c for c in criteria if not c.passed]
    first = "; ".join(c.text for c in failed[:2]) + (f"; and {len(failed) - 2} more" if len(failed) > 2 else "")
    # Above the threshold, as that is what a lift is held against.
    least = {task: lift.detectable + getattr(settings, f"min_lift_{task}_auc") for task, lift in lifts.items()}
    seen = ", ".join(f"{task.upper()} {least[task]:.4f}" for task, lift in lifts.items() if lift.bounded)
    which = "this day" if days == 1 else f"these {days} days"
    could = f"; lifts that {which} would show, each by itself, in 4 of 5 cases: {seen} ({level})" if seen else ""
    return f"Not promoted: {first}{could}."


# The step


def run_gate(settings: Settings, plan: Plan, force: str = "") -> dict[str, Any]:
    """Judge the scores of a plan, keep the verdict as ``gate.json`` and ``gate.html``, there and in MLflow; return it.

    That of a trial (:mod:`onetrans.trial`) is kept beside the record of the day's decision.

    Args:
        settings: the thresholds, and where MLflow is.
        plan: the evaluated plan.
        force: why a person has the day promoted whatever the verdict is; kept beside it, and changes nothing in it.

    Raises:
        NotReadyError: if the plan was not evaluated.
        BadDataError: if the scores cannot be right; an earlier verdict is removed, so nothing can rest on it.
    """
    folder = results_folder(settings, plan)
    gate_path = storage.join(folder, GATE_FILE)
    with step_of_day(settings, plan, "gate"):
        if storage.exists(gate_path):
            storage.delete_file(gate_path)
        # A trial that nothing was scored for judges the scores of the decision.
        scored = storage.exists(storage.join(folder, SCORES_FILE))
        table, digest = read_scores(plan, folder if scored else plan.path)
        scores = Scores.from_table(table, f"scores of {plan.ds}", str(plan.ds))
        if POPULARITY not in scores.scorers:
            raise BadDataError(
                f"scores of {plan.ds} lack the popularity ranker's: they were written by an earlier version; "
                f"run: onetrans evaluate --plan {plan.path}"
            )
        asked = max(settings.gate.window_days, settings.gate.agreeing_days)
        chain = _chain(plan, asked, settings.source.absent_days)
        judged = judge(scores, settings.gate, chain.scores, chain.baseline).to_dict()
        parts = slices(scores, table, settings.gate.confidence)
        verdict = {
            "ds": str(plan.ds),
            "plan_id": plan.plan_id,
            **judged,
            "warnings": judged["warnings"] + _losing(parts),
            "slices": [asdict(part) | {"lift": part.lift, "loses": part.loses} for part in parts],
            "inputs": {
                "days": [*chain.inputs, {"ds": str(plan.ds), "plan_id": plan.plan_id, "scores_sha256": digest}],
                "snapshot_id": plan.snapshot_id,
                "schema_fingerprint": plan.schema.fingerprint,
                "git_revision": plan.git_revision,
                "models": {name: _model_digest(plan, name) for name in plan.models},
            },
            "left_out": chain.left_out,
            "force_reason": force or None,
            "scores_sha256": digest,
            "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        page = Page(
            plan=plan,
            verdict=verdict,
            scores=scores,
            slices=parts,
            before=chain.verdicts,
            audits=audit_verdicts(plan),
        ).render()
        storage.write_bytes(storage.join(folder, PAGE_FILE), page.encode())
        storage.write_json(gate_path, verdict)
        if is_trial(settings, plan):
            log_trial(settings, plan, {GATE_FILE: verdict, PAGE_FILE: page})
        elif plan.mlflow_run_id:
            log_gate(settings, plan, verdict, page)
    return verdict


def _losing(parts: Sequence[Slice]) -> list[str]:
    losing = [part for part in parts if part.loses]
    if not losing:
        return []
    told = [
        f"{part.cut}: {part.name}, {part.task.upper()} {part.lift:+.4f}"
        for part in sorted(losing, key=lambda part: part.high or 0.0)[:MOST_SLICES_TOLD]
    ]
    more = f"; and {len(losing) - len(told)} more" if len(losing) > len(told) else ""
    return [f"Worse than {BASELINE} beyond chance in {len(losing)} of {len(parts)} slices: {'; '.join(told)}{more}."]


def _model_digest(plan: Plan, name: str) -> str | None:
    """Return the SHA-256 of a model's files; None if they lie in MLflow alone."""
    folder = storage.join(plan.model_path(name), MODEL_FOLDER)
    return folder_digest(folder) if storage.list_files(folder) else None


@dataclass(frozen=True)
class _Chain:
    """What earlier days of a chain add to a verdict."""

    scores: list[Scores | None] = field(default_factory=list)
    """Of the days asked for, oldest first, one entry for each day of the log; None where the chain has no scores."""
    inputs: list[dict[str, str]] = field(default_factory=list)
    """Day, plan and SHA-256 of each of those scores."""
    baseline: dict[str, list[float]] = field(default_factory=dict)
    """Per task, the baseline's AUC on the days before, oldest first."""
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    """What the gate said on the days before, and what was done, oldest first."""
    left_out: list[str] = field(default_factory=list)
    """Days that could not be used, with the reason."""


def _chain(plan: Plan, days: int, absent: Collection[date]) -> _Chain:
    """Read the scores of the ``days - 1`` days before, and the baseline's figures of the trailing ones.

    Args:
        plan: of the evaluation day.
        days: days in a row, the evaluation day the last.
        absent: days that the log lost; they are stepped over.
    """
    chain = _Chain()
    plans = list(islice(earlier_plans(plan), max(TRAILING_DAYS, SHOWN_DAYS, days - 1)))
    for number, before in enumerate(plans, start=1):
        gate_path, promotion_path = (storage.join(before.path, name) for name in (GATE_FILE, PROMOTION_FILE))
        if number <= SHOWN_DAYS and storage.exists(gate_path):
            done = storage.read_json(promotion_path) if storage.exists(promotion_path) else {}
            chain.verdicts.insert(0, storage.read_json(gate_path) | {"decision": done.get("decision")})
        metrics_path = storage.join(before.path, METRICS_FILE)
        if number <= TRAILING_DAYS and storage.exists(metrics_path):
            figures = storage.read_json(metrics_path).get(BASELINE, {})
            for task in TASKS:
                if figures.get(f"{task}_auc") is not None:
                    chain.baseline.setdefault(task, []).insert(0, float(figures[f"{task}_auc"]))
    of_day, ds = {before.ds: before for before in plans}, plan.ds - timedelta(days=1)
    while of_day and ds >= min(of_day) and len(chain.scores) < days - 1:
        if ds in of_day or ds not in absent:
            chain.scores.insert(0, _scores_of(of_day.get(ds), ds, chain))
        ds -= timedelta(days=1)
    return chain


def _scores_of(before: Plan | None, ds: date, chain: _Chain) -> Scores | None:
    """Return a day's scores and note what they were; or None, and note why."""
    try:
        if before is None:
            raise NotReadyError("this chain of trainings did not evaluate it")
        table, digest = read_scores(before)
        scores = Scores.from_table(table, f"scores of {ds}", str(ds))
    except (BadDataError, NotReadyError, FileNotFoundError) as error:
        logger.warning("%s is left out of the window: %s", ds, error)
        chain.left_out.append(f"{ds}: {error}")
        return None
    chain.inputs.insert(0, {"ds": str(ds), "plan_id": before.plan_id, "scores_sha256": digest})
    return scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--plan", required=True, help="folder of the plan, or its plan.json")
    add_force_argument(parser, "why the day is promoted whatever the verdict is; kept beside the verdict")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Judge and print the verdict; a candidate that is not promoted is no failure."""
    plan = Plan.load(arguments.plan)
    settings = load_settings()
    verdict = run_gate(settings, plan, forced_reason(arguments.force, settings.gate))
    if arguments.json:
        print_json(verdict)
        return 0
    for criterion in verdict["criteria"]:
        print(f"{'ok  ' if criterion['passed'] else 'FAIL'} {criterion['name']:<30} {criterion['text']}")
    for note in verdict["notes"]:
        print(f"note {note}")
    if verdict["champion"]["state"] != "scored":
        print(f"note {verdict['champion']['note']}")
    for warning in verdict["warnings"]:
        print(f"WARN {warning}")
    if verdict["force_reason"]:
        print(f"note a person forces the promotion: {verdict['force_reason']}")
    print(f"page: {storage.join(results_folder(settings, plan), PAGE_FILE)}")
    print(f"{verdict['ds']} {verdict['verdict']}: {verdict['reason']}")
    return 0


def _plain(figures: Lift | Interval) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(figures).items()}
