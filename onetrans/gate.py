"""The gate: does the candidate beat the baseline on the evaluation day, beyond noise and without doing harm?

Both models' scores of the same impressions go in, a verdict with every figure
comes out.  A candidate is promoted when *all* of these hold:

* the day is large enough: rows, clicks, conversions and users;
* no model gives every row the same score (a broken baseline proves nothing);
* the lower bound of the CTR AUC lift, and that of the CVR AUC lift, exceed their
  thresholds.  The interval comes from a paired bootstrap over users
  (:mod:`onetrans.bootstrap`).  Both lifts have to be shown, so a candidate that is
  not better in one task passes at most as often as that task's bound errs, which
  is (1 - confidence) / 2: no correction for two tests is needed (an
  intersection-union test);
* the guardrails hold for both tasks: UAUC, log loss, calibration.

Two kinds of trouble are kept apart.  Scores that cannot be right (a null or NaN,
a probability outside [0, 1], an impression twice or not at all) are an error of
the step that wrote them: :class:`~onetrans.errors.BadDataError`, and no verdict.
A day that is sound but cannot show anything (too few rows, one class, constant
scores) is declined, and the verdict says why.  Neither ever promotes.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onetrans import storage
from onetrans.bootstrap import Lift, ResampledAuc, paired_lifts
from onetrans.errors import BadDataError, NotReadyError
from onetrans.metrics import Metrics
from onetrans.plan import GATE_FILE, SCORES_FILE, Plan
from onetrans.settings import GateSettings, Settings, load_settings
from onetrans.tracking import log_gate, recorded_step

logger = logging.getLogger(__name__)

CANDIDATE = "onetrans"
BASELINE = "dcnv2_din"
TASKS = ("ctr", "cvr")

EXAMPLES = """examples:
  onetrans gate --plan var/runs/ds=2022-05-06/1a2b3c4d5e6f
  ONETRANS_GATE_MODE=dry_run onetrans gate --plan var/runs/ds=2022-05-06/1a2b3c4d5e6f"""

Decision = Literal["promoted", "declined"]
Comparison = Literal[">=", ">", "<="]


@dataclass(frozen=True)
class Scores:
    """Both models' scores of the evaluation day, one entry per impression; checked when it is built."""

    user_N: npt.NDArray[np.int64]
    """Each row's user, ``0..users-1``."""
    users: int
    """Distinct users."""
    label_N: dict[str, npt.NDArray[np.int64]]
    """Per task ("ctr", "cvr"): click, and conversion; 0 or 1."""
    score_N: dict[tuple[str, str], npt.NDArray[np.float64]]
    """Per (model, task): the predicted probability."""

    @classmethod
    def from_table(cls, table: pa.Table, where: str = "scores") -> Scores:
        """Check a table of scores and take what the gate needs.

        Args:
            table: columns ``request_id, item_id, user_id, click, conversion`` and ``<model>_ctr``, ``<model>_cvr``
                of both models.
            where: what to call the table in a message.

        Raises:
            BadDataError: naming the column, the number of rows and an example.
        """
        names = [f"{model}_{task}" for model in (CANDIDATE, BASELINE) for task in TASKS]
        _require_columns(table, ["request_id", "item_id", "user_id", "click", "conversion", *names], where)
        if table.num_rows == 0:
            raise BadDataError(f"{where}: there are no rows")
        _refuse_repeated_keys(table, where)
        _refuse_where(table, "user_id", pc.is_null(table["user_id"]), "no user", where)
        for column in ("click", "conversion"):
            sound = pc.fill_null(pc.is_in(table[column], pa.array([0, 1], type=table[column].type)), False)
            _refuse_where(table, column, pc.invert(sound), "a label other than 0 or 1", where)
        unearned = pc.and_(pc.equal(table["conversion"], 1), pc.equal(table["click"], 0))
        _refuse_where(table, "conversion", unearned, "a conversion without a click", where)
        for column in names:
            value = table[column].cast(pa.float64())
            sound = pc.and_(pc.greater_equal(value, 0.0), pc.less_equal(value, 1.0))  # false for NaN
            _refuse_where(table, column, pc.invert(pc.fill_null(sound, False)), "no probability", where)
        users = table["user_id"].combine_chunks().dictionary_encode()
        return cls(
            user_N=users.indices.to_numpy().astype(np.int64),
            users=len(users.dictionary),
            label_N={
                "ctr": table["click"].to_numpy().astype(np.int64),
                "cvr": table["conversion"].to_numpy().astype(np.int64),
            },
            score_N={
                (model, task): table[f"{model}_{task}"].to_numpy().astype(np.float64)
                for model in (CANDIDATE, BASELINE)
                for task in TASKS
            },
        )

    def counted(self, task: str) -> npt.NDArray[np.bool_]:
        """Return the rows a task is measured on: all impressions for CTR, clicked ones for CVR."""
        return np.ones(self.user_N.shape[0], dtype=bool) if task == "ctr" else self.label_N["ctr"] > 0

    def metrics(self, model: str) -> Metrics:
        """Return one model's figures."""
        return Metrics.compute(
            click_N=self.label_N["ctr"],
            conversion_N=self.label_N["cvr"],
            ctr_N=self.score_N[model, "ctr"],
            cvr_N=self.score_N[model, "cvr"],
            user_N=self.user_N,
        )


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
    """Bootstrap interval of the figure, for a lift; its lower end is what is held against the threshold."""


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
    rows: int
    """Impressions judged."""
    users: int
    """Distinct users among them."""
    clicks: int
    """Clicked impressions."""
    conversions: int
    """Converted clicks."""
    lifts: dict[str, Lift]
    """Per task, the AUC lift with its interval; empty if the gate is off or an AUC is undefined."""
    criteria: tuple[Criterion, ...]
    """Everything that had to hold, in the order it is listed."""
    models: dict[str, Metrics]
    """Figures of both models."""
    settings: GateSettings
    """The thresholds used."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``gate.json``."""
        return {
            "verdict": self.verdict,
            "passed": self.passed,
            "reason": self.reason,
            "mode": self.mode,
            "rows": self.rows,
            "users": self.users,
            "clicks": self.clicks,
            "conversions": self.conversions,
            "lifts": {f"{task}_auc": _without_nan(asdict(lift)) for task, lift in self.lifts.items()},
            "criteria": [{**asdict(c), "interval": c.interval and list(c.interval)} for c in self.criteria],
            "models": {name: metrics.to_dict() for name, metrics in self.models.items()},
            "settings": asdict(self.settings),
        }


def judge(scores: Scores, settings: GateSettings) -> Verdict:
    """Hold the candidate against every criterion; the same scores and settings give the same verdict."""
    models = {model: scores.metrics(model) for model in (CANDIDATE, BASELINE)}
    candidate, baseline = models[CANDIDATE], models[BASELINE]
    lifts: dict[str, Lift] = {}
    criteria: list[Criterion] = []
    if settings.mode != "off":
        criteria += _enough_data(candidate, settings)
        criteria += [_varies(scores, model, task) for task in TASKS for model in (CANDIDATE, BASELINE)]
        lifts = _lifts(scores, settings)
        criteria += [_lift_shown(task, lifts.get(task), settings) for task in TASKS]
        criteria += [_uauc_kept(task, candidate, baseline, settings) for task in TASKS]
        criteria += [_log_loss_kept(task, candidate, baseline, settings) for task in TASKS]
        criteria += [_calibrated(task, candidate, settings) for task in TASKS]
    passed = all(criterion.passed for criterion in criteria) if criteria else None
    return Verdict(
        verdict="promoted" if passed and settings.mode == "enabled" else "declined",
        passed=passed,
        reason=_reason(passed, criteria, lifts, settings),
        mode=settings.mode,
        rows=candidate.rows,
        users=scores.users,
        clicks=candidate.clicks,
        conversions=candidate.conversions,
        lifts=lifts,
        criteria=tuple(criteria),
        models=models,
        settings=settings,
    )


# Criteria


def _enough_data(figures: Metrics, settings: GateSettings) -> list[Criterion]:
    counts = {
        "rows": (figures.rows, settings.min_rows),
        "clicks": (figures.clicks, settings.min_positives),
        "conversions": (figures.conversions, settings.min_positives),
        "users": (figures.users, settings.min_users),
    }
    return [
        Criterion(f"min_{name}", count >= least, count, ">=", least, f"{count:,} {name}, at least {least:,} needed")
        for name, (count, least) in counts.items()
    ]


def _varies(scores: Scores, model: str, task: str) -> Criterion:
    distinct = int(np.unique(scores.score_N[model, task][scores.counted(task)]).shape[0])
    text = f"{model} gives {distinct:,} different {task.upper()} scores"
    return Criterion(f"{model}_{task}_varies", distinct >= 2, distinct, ">=", 2, text)


def _lifts(scores: Scores, settings: GateSettings) -> dict[str, Lift]:
    """Return the lifts, both tasks on the same draws; a task of one class has none."""
    tasks: dict[str, tuple[ResampledAuc, ResampledAuc]] = {}
    for task in TASKS:
        counted = scores.counted(task)
        label = scores.label_N[task][counted]
        if not 0 < label.sum() < label.shape[0]:
            continue
        candidate, baseline = (
            ResampledAuc(label, scores.score_N[model, task][counted], scores.user_N[counted])
            for model in (CANDIDATE, BASELINE)
        )
        tasks[task] = (candidate, baseline)
    if not tasks:
        return {}
    return paired_lifts(tasks, scores.users, settings.replicates, settings.confidence, settings.seed)


def _lift_shown(task: str, lift: Lift | None, settings: GateSettings) -> Criterion:
    name, threshold = f"{task}_auc_lift", float(getattr(settings, f"min_lift_{task}_auc"))
    label = f"{task.upper()} AUC"
    if lift is None:
        text = f"{label} is undefined: every label is the same"
        return Criterion(name, False, None, ">", threshold, text)
    if lift.undefined:
        text = f"{label} has no interval: {lift.undefined} of {lift.replicates} draws of users hold one class only"
        return Criterion(name, False, lift.lift, ">", threshold, text)
    text = (
        f"{label} {lift.candidate:.4f} against {lift.baseline:.4f}: "
        f"lift {lift.lift:+.4f} [{lift.low:+.4f}, {lift.high:+.4f}]"
    )
    return Criterion(name, lift.low > threshold, lift.lift, ">", threshold, text, (lift.low, lift.high))


def _uauc_kept(task: str, candidate: Metrics, baseline: Metrics, settings: GateSettings) -> Criterion:
    name, most, label = f"{task}_uauc_loss", settings.max_uauc_loss, f"{task.upper()} UAUC"
    ours, theirs = getattr(candidate, f"{task}_uauc"), getattr(baseline, f"{task}_uauc")
    if ours is None or theirs is None:
        return Criterion(name, False, None, "<=", most, f"{label} is undefined: no user has both classes")
    text = f"{label} {ours:.4f} against {theirs:.4f}"
    return Criterion(name, theirs - ours <= most, theirs - ours, "<=", most, text)


def _log_loss_kept(task: str, candidate: Metrics, baseline: Metrics, settings: GateSettings) -> Criterion:
    name, most, label = f"{task}_log_loss_increase", settings.max_log_loss_increase, f"{task.upper()} log loss"
    ours, theirs = getattr(candidate, f"{task}_log_loss"), getattr(baseline, f"{task}_log_loss")
    if ours is None or theirs is None:
        return Criterion(name, False, None, "<=", most, f"{label} is undefined: there are no clicks")
    text = f"{label} {ours:.4f} against {theirs:.4f}"
    return Criterion(name, ours / theirs - 1.0 <= most, ours / theirs - 1.0, "<=", most, text)


def _calibrated(task: str, candidate: Metrics, settings: GateSettings) -> Criterion:
    name, most, label = f"{task}_calibration_error", settings.max_calibration_error, f"{task.upper()} calibration"
    ratio = getattr(candidate, f"{task}_calibration")
    if ratio is None:
        return Criterion(name, False, None, "<=", most, f"{label} is undefined: no label is positive")
    text = f"{label}: mean prediction is {ratio:.3f} of the mean label"
    return Criterion(name, abs(ratio - 1.0) <= most, abs(ratio - 1.0), "<=", most, text)


def _reason(passed: bool | None, criteria: Sequence[Criterion], lifts: dict[str, Lift], settings: GateSettings) -> str:
    if passed is None:
        return "Not judged: gate.mode = off."
    level = f"{100 * settings.confidence:g}% intervals over users"
    if passed:
        shown = " and ".join(c.text for c in criteria if c.name in ("ctr_auc_lift", "cvr_auc_lift"))
        held = "" if settings.mode == "enabled" else f"; gate.mode = {settings.mode} leaves the champion as it is"
        return f"{CANDIDATE} beats {BASELINE}: {shown} ({level}){held}."
    failed = [c for c in criteria if not c.passed]
    first = "; ".join(c.text for c in failed[:2]) + (f"; and {len(failed) - 2} more" if len(failed) > 2 else "")
    seen = ", ".join(f"{task.upper()} {lift.half_width:.4f}" for task, lift in lifts.items() if not lift.undefined)
    could = f"; lifts this day could have found: {seen} ({level})" if seen else ""
    return f"Not promoted: {first}{could}."


# The step


def run_gate(settings: Settings, plan: Plan) -> dict[str, Any]:
    """Judge the scores of a plan, keep the verdict in ``gate.json`` and in MLflow, and return it.

    Raises:
        NotReadyError: if the plan was not evaluated.
        BadDataError: if the scores cannot be right; an earlier verdict is removed, so nothing can rest on it.
    """
    scores_path, gate_path = storage.join(plan.path, SCORES_FILE), storage.join(plan.path, GATE_FILE)
    with recorded_step(settings, plan, "gate"):
        if storage.exists(gate_path):
            storage.delete_file(gate_path)
        table, digest = read_scores(scores_path, plan)
        verdict = {
            "ds": str(plan.ds),
            "plan_id": plan.plan_id,
            **judge(Scores.from_table(table, f"scores of {plan.ds}"), settings.gate).to_dict(),
            "scores_sha256": digest,
            "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        storage.write_json(gate_path, verdict)
        if plan.mlflow_run_id:
            log_gate(settings, plan, verdict)
    return verdict


def read_scores(path: str, plan: Plan) -> tuple[pa.Table, str]:
    """Return the scores of a plan and the SHA-256 of their file.

    Raises:
        NotReadyError: if there is no such file.
        BadDataError: if it is damaged, or is not one row for each impression the plan evaluates on.
    """
    if not storage.exists(path):
        raise NotReadyError(f"{path} is not there; run: onetrans evaluate --plan {plan.path}")
    content = storage.read_bytes(path)
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowInvalid) as error:
        raise BadDataError(f"{path} cannot be read as Parquet ({error}); delete it and evaluate again") from error
    expected = sum(_impressions(file) for file in plan.evaluation_files)
    if table.num_rows != expected:
        raise BadDataError(
            f"{path} has {table.num_rows:,} rows, but {plan.ds} has {expected:,} impressions in the "
            f"{len(plan.evaluation_files)} files of the plan; delete it and evaluate again"
        )
    return table, hashlib.sha256(content).hexdigest()


def _impressions(file: str) -> int:
    """Return the candidates of all requests of a file, as its footer counts them."""
    filesystem, inner = storage.open_filesystem(file)
    metadata = pq.read_metadata(inner, filesystem=filesystem)
    paths = [metadata.schema.column(column).path for column in range(metadata.num_columns)]
    column = next(c for c, path in enumerate(paths) if path.startswith("candidates.") and path.endswith(".item_id"))
    return sum(metadata.row_group(group).column(column).num_values for group in range(metadata.num_row_groups))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--plan", required=True, help="folder of the plan, or its plan.json")


def run(arguments: argparse.Namespace) -> int:
    """Judge and print the verdict; a candidate that is not promoted is no failure."""
    verdict = run_gate(load_settings(), Plan.load(arguments.plan))
    for criterion in verdict["criteria"]:
        print(f"{'ok  ' if criterion['passed'] else 'FAIL'} {criterion['name']:<24} {criterion['text']}")
    print(f"{verdict['ds']} {verdict['verdict']}: {verdict['reason']}")
    return 0


# Reading scores


def _require_columns(table: pa.Table, columns: list[str], where: str) -> None:
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise BadDataError(f"{where}: column {missing[0]!r} is missing; there are {', '.join(table.column_names)}")


def _refuse_repeated_keys(table: pa.Table, where: str) -> None:
    keys = ["request_id", "item_id"]
    counted = table.select(keys).group_by(keys).aggregate([([], "count_all")])
    if counted.num_rows == table.num_rows:
        return
    repeated = counted.filter(pc.greater(counted["count_all"], 1))
    example = repeated.slice(0, 1).to_pylist()[0]
    raise BadDataError(
        f"{where}: {repeated.num_rows:,} impressions occur more than once, for example request "
        f"{example['request_id']!r}, item {example['item_id']!r}, {example['count_all']} times"
    )


def _refuse_where(table: pa.Table, column: str, bad: pa.ChunkedArray, what: str, where: str) -> None:
    count = pc.sum(bad).as_py() or 0
    if count:
        example = table.filter(bad).slice(0, 1).to_pylist()[0]
        raise BadDataError(
            f"{where}: {count:,} of {table.num_rows:,} rows have {what} in {column!r}, for example {example[column]!r} "
            f"of request {example['request_id']!r}, item {example['item_id']!r}"
        )


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}
