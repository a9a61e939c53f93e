"""``onetrans report``: what each day of a range brought, read from the run folders.

A day shows the plan it was decided by last, or else its newest: the figures of
both models on that day, of the champion they were compared with, of a ranker by
popularity, and of the true probabilities where the log is simulated (the best any
model can do); the lift with its interval, the verdict and the champion after it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from onetrans import storage
from onetrans.days import day_range, parse_day
from onetrans.errors import NotReadyError
from onetrans.plan import (
    FINISHED_FILE,
    GATE_FILE,
    LOCK_FILE,
    METRICS_FILE,
    PLAN_FILE,
    PROMOTION_FILE,
    TRUTH,
    decided_at,
    plans_of_days,
)
from onetrans.process import add_json, print_json
from onetrans.scores import BASELINE, CANDIDATE, CHAMPION, POPULARITY
from onetrans.settings import Settings, load_settings

EXAMPLES = """examples:
  onetrans report
  onetrans report --from 2022-05-04 --to 2022-05-06
  onetrans report --from 2022-05-04 --to 2022-05-06 --json"""

_FIGURES = ("ctr_auc", "ctr_uauc", "cvr_auc", "cvr_uauc")


def report(settings: Settings, first: date, last: date) -> list[dict[str, Any]]:
    """Return one record per day: what its newest plan came to, as far as it got.

    Raises:
        BadConfigError: if ``last`` is before ``first``.
    """
    return [_day(settings.training.runs, ds) for ds in day_range(first, last)]


def last_day(settings: Settings) -> date:
    """Return the last day that has a run.

    Raises:
        NotReadyError: if no day has one.
    """
    days = planned_days(settings)
    if not days:
        raise NotReadyError(f"there is no run of any day in {settings.training.runs}; run: onetrans plan --ds DAY")
    return days[-1]


def planned_days(settings: Settings) -> list[date]:
    """Return the days that have a run, oldest first."""
    return list(plans_of_days(settings.training.runs))


def _day(runs: str, ds: date) -> dict[str, Any]:
    folder = storage.join(storage.resolve(runs), f"ds={ds}")
    plans = [(storage.read_json(path), path.rsplit("/", 1)[0]) for path in _plan_files(folder)]
    if not plans:
        return {"ds": str(ds), "state": "no run"}
    # What was decided stands for the day; a trial beside it, or a run that is under way, does not.
    plan, path = max(plans, key=lambda found: (decided_at(found[1]), str(found[0]["created_at"])))
    metrics, gate, promotion = (_read(path, name) for name in (METRICS_FILE, GATE_FILE, PROMOTION_FILE))
    return {
        "ds": str(ds),
        "plan_id": plan["plan_id"],
        "path": path,
        "state": "promotion done"
        if promotion
        else "judged"
        if gate
        else "evaluated"
        if metrics
        else _trained(plan, path),
        "preset": plan["preset"],
        "train_days": len(plan["train_days"]),
        "warm_start_ds": plan["warm_start_ds"],
        "models": {
            name: {figure: metrics[name][figure] for figure in _FIGURES}
            for name in (CANDIDATE, BASELINE, CHAMPION, POPULARITY, TRUTH)
            if metrics and name in metrics
        },
        "rows": gate["rows"] if gate else None,
        "lifts": gate["lifts"] if gate else {},
        "verdict": gate["verdict"] if gate else None,
        "failed": [criterion["name"] for criterion in gate["criteria"] if not criterion["passed"]] if gate else [],
        "reason": promotion["reason"] if promotion else gate["reason"] if gate else None,
        "version": promotion["version"] if promotion else None,
        "decision": promotion["decision"] if promotion else None,
        "champion": promotion["champion_after"] if promotion else None,
    }


def _trained(plan: Mapping[str, Any], path: str) -> str:
    """Return how far the trainings of a plan came that was not evaluated."""
    finished = [name for name in plan["models"] if storage.exists(storage.join(path, name, FINISHED_FILE))]
    if len(finished) == len(plan["models"]):
        return "trained"
    folders = [storage.join(path, name) for name in plan["models"]]
    if any(storage.exists(storage.join(folder, LOCK_FILE)) or storage.list_files(folder) for folder in folders):
        return f"training begun{f', {finished[0]} trained' if finished else ''}"
    return "planned"


def _plan_files(folder: str) -> list[str]:
    return [path for path in storage.list_files(folder, PLAN_FILE) if path.count("/") == folder.count("/") + 2]


def _read(folder: str, name: str) -> Any:
    path = storage.join(folder, name)
    return storage.read_json(path) if storage.exists(path) else None


def table(days: Sequence[Mapping[str, Any]]) -> str:
    """Return the days as text: a line per model, one for the lift, one for the outcome."""
    header = f"{'day':<12}{'':<12}{'CTR AUC':>9}{'UAUC':>9}{'CVR AUC':>12}{'UAUC':>9}"
    lines = [header, "-" * len(header)]
    for day in days:
        lines += _day_lines(day)
    return "\n".join(lines)


def _day_lines(day: Mapping[str, Any]) -> list[str]:
    if not day.get("models"):
        return [f"{day['ds']:<12}{day['state']}", ""]
    lines: list[str] = []
    for name, figures in day["models"].items():
        label = day["ds"] if not lines else ""
        cells = [_cell(figures[figure]) for figure in _FIGURES]
        lines.append(f"{label:<12}{name:<12}{cells[0]:>9}{cells[1]:>9}{cells[2]:>12}{cells[3]:>9}")
    for task in ("ctr", "cvr"):
        lift = day["lifts"].get(f"{task}_auc")
        if lift is not None and lift["low"] is not None:
            lines.append(
                f"{'':<12}{task.upper() + ' lift':<12}{lift['lift']:>+9.4f}  "
                f"[{lift['low']:+.4f}, {lift['high']:+.4f}] at {100 * lift['confidence']:g}%"
            )
    lines.append(f"{'':<12}{_outcome(day)}")
    return [*lines, ""]


def _outcome(day: Mapping[str, Any]) -> str:
    if day["verdict"] is None:
        return f"not judged yet ({day['state']})"
    why = f" ({', '.join(day['failed'])})" if day["failed"] else ""
    if day["version"] is None:
        return f"{day['verdict']}{why}; not registered yet"
    held = f", {day['reason']}" if day["decision"] == "held" else why
    champion = f"champion is version {day['champion']}" if day["champion"] else "there is no champion yet"
    return f"{day['decision']}{held}: version {day['version']}; {champion}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--from", dest="first", type=parse_day, help="first day (default: a week before --to)")
    parser.add_argument("--to", dest="last", type=parse_day, help="last day, included (default: the last with a run)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        NotReadyError: if no day of it has a run.
    """
    settings = load_settings()
    last = arguments.last or last_day(settings)
    first = arguments.first or last - timedelta(days=6)
    days = report(settings, first, last)
    if all(day["state"] == "no run" for day in days):
        raise NotReadyError(f"there is no run of any day from {first} to {last} in {settings.training.runs}")
    if arguments.first is None:
        days = days[next(number for number, day in enumerate(days) if day["state"] != "no run") :]
    print_json(days) if arguments.json else print(table(days))
    return 0
