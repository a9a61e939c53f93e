"""How often the gate errs, in a world whose truth is known: python -m benchmarks.gate_errors [--plot docs/gate.svg].

Days of scored impressions are made up (``tests/gate_world.py``): users whose activity differs by orders of magnitude,
two models that misread users in ways of their own.  Each day is judged as a real one is, with the default settings but
200 replicates, and counted:

* two equal models: how often one lift is taken for real, how often the candidate is promoted, and how often the
  interval holds the truth, which is 0;
* a candidate that is better by a known lift: how often it is found on a day of 200,000 impressions, and on small days;
* a candidate whose clicks alone are better: how often it is promoted all the same;
* a champion as good as the candidate, and one that is better by 0.01: how often the candidate passes beside it.

The truth of a lift is measured on 2 M impressions of as many users; a share is told with its interval (Wilson, 95 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Report, parser
from onetrans.gate import judge
from onetrans.metrics import auc
from onetrans.progress import Progress
from onetrans.scores import BASELINE, CANDIDATE, TASKS
from onetrans.settings import GateSettings
from onetrans.svg import Chart
from tests.gate_world import World, day_of

SETTINGS = GateSettings(replicates=200)
STATED = (1.0 - SETTINGS.confidence) / 2.0
"""Share of days on which one lift may be taken for real when there is none."""

EQUAL = World().own
BETTER = 0.16
"""Own noise of a candidate whose lift is about 0.005; the baseline's is ``World.own``."""
SOMEWHAT = 0.25
"""Likewise for about 0.003."""

WORSE = 0.562
"""Likewise for about -0.01."""

SMALL, MIDDLE, LARGE = (5_000, 500), (13_500, 7_700), (200_000, 20_000)
"""Impressions and users of a day; the middle one is a day of KuaiRand."""


@dataclass(frozen=True)
class Counted:
    """What some judged days came to."""

    days: int
    """Days."""
    shown: dict[str, int]
    """Per task: days on which the lower end of the lift was above 0."""
    covered: dict[str, int]
    """Per task: days whose interval holds the true lift."""
    promoted: int
    """Days on which every criterion held."""
    beside_champion: int = 0
    """Days on which the candidate was shown to be no worse than the champion, in both tasks."""

    def share(self, count: int) -> tuple[float, float, float]:
        """Return a share of the days and its Wilson interval at 95 %."""
        z, n, p = 1.96, self.days, count / self.days
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def true_lift(own: float, rows: int = 2_000_000) -> dict[str, float]:
    """Return the lift of a candidate with so much noise of its own, per task, on many users of one impression each."""
    if own == EQUAL:
        return dict.fromkeys(TASKS, 0.0)
    day = day_of(99, rows, rows, World(activity=0.0), own, own)
    found = {}
    for task in TASKS:
        counted = day.counted(task)
        label = day.label_N[task][counted]
        ours, theirs = (auc(label, day.score_N[model, task][counted]) for model in (CANDIDATE, BASELINE))
        found[task] = ours - theirs
    return found


def count_days(
    days: int,
    size: tuple[int, int],
    own: float,
    truth: dict[str, float],
    seed: int = 0,
    cvr_own: float | None = None,
    champion_own: float | None = None,
) -> Counted:
    """Judge so many days and count; ``cvr_own``: the candidate's own noise in conversions, if it is another."""
    shown, covered, promoted, beside = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0), 0, 0
    with Progress(days, "days", f"{size[0]:,} rows, own noise {own:g}") as progress:
        for number in range(days):
            cvr = own if cvr_own is None else cvr_own
            scores = day_of(seed + number, *size, ctr_own=own, cvr_own=cvr, champion_own=champion_own)
            verdict = judge(scores, SETTINGS)
            promoted += verdict.passed is True
            beside += all(c.passed for c in verdict.criteria if c.name.endswith("not_below_champion"))
            for task, lift in verdict.lifts.items():
                shown[task] += lift.low > 0
                covered[task] += lift.low <= truth[task] <= lift.high
            progress.advance(1)
    return Counted(days, shown, covered, promoted, beside)


def plot(points: dict[str, list[tuple[float, Counted]]]) -> str:
    """Return the chart: share of days that promote, by the true lift, a line per size of the day."""
    chart = Chart((-0.0004, 0.0058), (0.0, 1.0), "Days on which the candidate is promoted", "true lift in CTR AUC",
                  "share of days", width=560, height=360)  # fmt: skip
    chart.line([-0.0004, 0.0058], [STATED, STATED], "#b42318", dashed=True, width=1.2)
    chart.line([-0.0004, 0.0058], [0.8, 0.8], "#2b8a3e", dashed=True, width=1.2)
    chart.text(0.0057, STATED + 0.02, f"stated error {STATED:g}", "#b42318", "end")
    chart.text(-0.0003, 0.82, "asked for at 0.005: 0.8", "#2b8a3e", "start")
    for (name, line), colour in zip(points.items(), ("#1f5fbf", "#c2571a"), strict=True):
        shares = [counted.share(counted.promoted) for _, counted in line]
        chart.line([lift for lift, _ in line], [share for share, _, _ in shares], colour)
        for (lift, _), (share, low, high) in zip(line, shares, strict=True):
            chart.interval(lift, low, high, colour)
            chart.point(lift, share, colour)
        chart.text(line[-1][0] - 0.0003, shares[-1][0] - 0.07, name, colour, "end")
    marks = [(n / 1000, f"{n / 1000:g}") for n in range(6)]
    return chart.render(marks, [(n / 5, f"{n / 5:g}") for n in range(6)], standalone=True)


def main(argv: list[str] | None = None) -> int:
    """Simulate, print the table, and return 1 if a figure missed what is expected of it."""
    options = parser(__doc__)
    options.add_argument("--plot", metavar="FILE", type=Path, help="write the chart to FILE (SVG)")
    arguments = options.parse_args(argv)
    report = Report("gate_errors", arguments)
    quick = arguments.quick
    points: dict[str, list[tuple[float, Counted]]] = {}
    plan = [
        ("5,000 impressions a day", SMALL, [(EQUAL, 60 if quick else 1000), (BETTER, 0 if quick else 200)]),
        ("200,000 impressions a day", LARGE, [(SOMEWHAT, 0 if quick else 10), (BETTER, 4 if quick else 40)]),
    ]
    truths = {own: true_lift(own, 400_000 if quick else 2_000_000) for own in (EQUAL, SOMEWHAT, BETTER)}
    for name, size, series in plan:
        for own, days in series:
            if not days:
                continue
            truth = truths[own]
            counted = count_days(days, size, own, truth)
            points.setdefault(name, []).append((truth["ctr"], counted))
            case = f"{name}, true lift {truth['ctr']:.4f} (CTR), {truth['cvr']:.4f} (CVR), {days:,} days"
            _add(report, case, counted, equal=own == EQUAL, found=size == LARGE and own == BETTER, quick=quick)
    days = 60 if quick else 400
    clicks = truths[BETTER] | {"cvr": 0.0}
    counted = count_days(days, SMALL, BETTER, clicks, cvr_own=EQUAL)
    case = f"5,000 impressions a day, true lift {clicks['ctr']:.4f} (CTR), 0.0000 (CVR), {days} days"
    report.add(case, "promoted", counted.promoted / days, "", f"<= {STATED:g}")
    for own, told, expected in ((EQUAL, "as good", ""), (WORSE, "better by 0.01", "<= 0.05")):
        days = 20 if quick else 200
        counted = count_days(days, MIDDLE, own, truths[EQUAL], champion_own=EQUAL)
        case = f"13,500 impressions a day, a champion {told}, {days} days"
        report.add(case, "passes beside it", counted.beside_champion / days, "", expected)
    if arguments.plot:
        arguments.plot.write_text(plot(points) + "\n", encoding="utf-8")
        print(f"chart written to {arguments.plot}")
    return report.finish()


def _add(report: Report, case: str, counted: Counted, *, equal: bool, found: bool, quick: bool) -> None:
    """Add shares; what is expected holds for the whole measurement, up to three standard errors of its own count."""
    room = 3.0 * math.sqrt(STATED * (1.0 - STATED) / counted.days)
    level = 1.0 - 2.0 * STATED
    low = level - 3.0 * math.sqrt(level * (1.0 - level) / counted.days)
    share = counted.promoted / counted.days
    report.add(case, "promoted", share, "", f"<= {STATED:g}" if equal else ">= 0.8" if found else "")
    for task in TASKS:
        shown = counted.shown[task] / counted.days
        report.add(case, f"{task.upper()} lift taken for real", shown, "", f"<= {STATED + room:.4f}" if equal else "")
        covered = counted.covered[task] / counted.days
        expected = f">= {low:.4f}" if equal and not quick else ""
        report.add(case, f"{task.upper()} interval holds the truth", covered, "", expected)


if __name__ == "__main__":
    raise SystemExit(main())
