"""The plan of one day's training: which days, from which data, starting from what; decided once and pinned.

Both models of a day read the same rows and start from the same earlier day:

* *warm start*: the newest earlier day, at most ``lookback_days`` back, on which
  both models finished with the same configuration, feature schema and model code
  (:data:`~onetrans.models.config.ARCHITECTURES`) as now.
  They go on from its checkpoints and read the days from that day to D-1 (its own
  training ended the day before it).  A checkpoint that cannot be read as it was
  written is left aside, with its day, and named in the decision.  A schema whose
  hash tables only grew is not another one (:mod:`onetrans.growth`);
* *look-back*: without such a day both start from fresh weights and read the
  ``lookback_days`` before D, or as many as were ever published.

Days that ``source.absent_days`` names are left out of both, unless they were
published after all; the window does not reach further back for them.

A plan's id is a hash of everything that decides the outcome: data files,
configurations, schema and warm start.  Planning again with nothing changed finds
the same folder, and each step finds its finished work in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

from onetrans import storage
from onetrans.days import day_range, days_before, describe_days, parse_day
from onetrans.errors import BadConfigError, NotReadyError
from onetrans.forced import add_force_argument, forced_reason
from onetrans.growth import describe, growth
from onetrans.lake import Lake
from onetrans.models.config import ARCHITECTURES, CONFIGS, ModelConfig, config_from_dict, config_to_dict, preset
from onetrans.optim_config import OptimizerConfig, optimizer_preset
from onetrans.process import add_json, print_json
from onetrans.progress import long_steps
from onetrans.schema import FeatureSchema, load_schema
from onetrans.settings import Preset, Settings, TrainingSettings, load_settings

logger = logging.getLogger(__name__)

TABLE = "training_requests"
PLAN_FILE = "plan.json"
"""Files of a plan's folder; this one is the plan itself."""
SCORES_FILE = "scores.parquet"
"""A row per impression of the day, with every model's scores."""
METRICS_FILE = "metrics.json"
"""Figures by model name."""
GATE_FILE = "gate.json"
"""The verdict."""
PAGE_FILE = "gate.html"
"""The verdict as a page for a person."""
PROMOTION_FILE = "promotion.json"
"""What was done in the registry."""
LOCK_FILE = ".lock"
"""In a model's folder, where that is local: its training has begun, and runs while the file is locked."""
FINISHED_FILE = "finished.json"
"""In a model's folder: its training is done."""
PLAIN_FOLDER = "plain"
"""Beside the days' runs: trainings on plain files, which belong to no day."""
NEXT_BATCH_FOLDER = "next-batch"
"""Beside the days' runs: next-batch evaluations, which belong to several."""
CHECKPOINT_FOLDER = "checkpoint"
"""In a model's folder: what a later training goes on from; retention removes old ones."""
CHECKPOINT_FILE = "checkpoint.json"
"""In that folder: there is a checkpoint, and it is whole."""
TRUTH = "truth"
"""Name in the metrics of a simulator's true probabilities."""

EXAMPLES = """examples:
  onetrans plan --ds 2022-05-06
  onetrans plan --ds 2022-05-06 --config tiny --from-scratch --no-mlflow"""


@dataclass(frozen=True)
class ModelPlan:
    """What one model starts as."""

    config: ModelConfig
    """The model's configuration."""
    optimizer: OptimizerConfig
    """How its weights are updated."""
    warm_start: str | None
    """Folder of the finished training it goes on from; None: fresh weights."""
    architecture: int = 1
    """Revision of the model's code (:data:`~onetrans.models.config.ARCHITECTURES`)."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**self.decides(), "warm_start": self.warm_start}

    def decides(self) -> dict[str, dict[str, Any]]:
        """Return what a later training must have in common with this one to go on from it."""
        return {
            "config": config_to_dict(self.config),
            "optimizer": asdict(self.optimizer),
            "architecture": {"revision": self.architecture},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelPlan:
        """Read what :meth:`to_dict` wrote."""
        # A record without a revision is older than they are.
        revision = data.get("architecture", {"revision": 1})["revision"]
        return cls(config_from_dict(data["config"]), OptimizerConfig(**data["optimizer"]), data["warm_start"], revision)


def preset_models(preset_name: str) -> dict[str, ModelPlan]:
    """Return both models in a named size, with fresh weights."""
    optimizer = optimizer_preset(preset_name)
    return {name: ModelPlan(preset(name, preset_name), optimizer, None, ARCHITECTURES[name]) for name in CONFIGS}


def configured_models(training: TrainingSettings) -> dict[str, ModelPlan]:
    """Return both models as the settings want them: size, learning rates, use of table rows, fields; fresh weights.

    Raises:
        BadConfigError: if ``training.onetrans`` or ``training.dcnv2_din`` is not a list of fields, or one is refused.
    """
    rates = {name: rate for name in ("dense_lr", "embedding_lr") if (rate := getattr(training, name))}
    models = {
        name: replace(
            model,
            optimizer=replace(model.optimizer, **rates),
            config=replace(model.config, admit_after=training.admit_after, evict_after_days=training.evict_after_days),
        )
        for name, model in preset_models(training.preset).items()
    }
    return {name: _with_fields(model, name, getattr(training, name)) for name, model in models.items()}


def configured_recipe(training: TrainingSettings) -> Recipe:
    """Return how the settings want models to be trained."""
    return Recipe(
        training.batch_size, training.epochs, training.seed, training.click_weight, training.conversion_weight
    )


def _with_fields(model: ModelPlan, name: str, text: str) -> ModelPlan:
    """Return a model with fields of its configuration or optimizers replaced, given as ``name = value, ...``."""
    if not text.strip():
        return model
    where = f"training.{name} = {text!r}"
    try:
        given = tomllib.loads(f"fields = {{{' '.join(text.splitlines())}}}")["fields"]
    except tomllib.TOMLDecodeError as error:
        raise BadConfigError(
            f'{where} is not a list of fields such as: dropout = 0.1, position = "rotary" (texts are quoted): {error}'
        ) from error
    config, optimizer = config_to_dict(model.config), asdict(model.optimizer)
    of_model = {field: value for field, value in given.items() if field in config and field != "model"}
    of_optimizer = {field: value for field, value in given.items() if field in optimizer}
    if unknown := sorted(set(given) - set(of_model) - set(of_optimizer)):
        known = sorted({*config, *optimizer} - {"model"})
        raise BadConfigError(f"{where}: there is no field {unknown[0]!r}; fields are {', '.join(known)}")
    for field, value in of_optimizer.items():
        numbers = (int, float) if isinstance(optimizer[field], float) else (type(optimizer[field]),)
        if type(value) not in numbers:
            raise BadConfigError(f"{where}: {field} must be of the type of {optimizer[field]!r}")
    try:
        return replace(
            model,
            config=config_from_dict({**config, **of_model}),
            optimizer=OptimizerConfig(**{**optimizer, **of_optimizer}),
        )
    except BadConfigError as error:
        raise BadConfigError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Recipe:
    """How both models are trained."""

    batch_size: int
    """Impressions per optimizer step, about."""
    epochs: int
    """Passes over the training days."""
    seed: int
    """Seed of initial weights and of the order of rows."""
    click_weight: float
    """Weight of the click loss."""
    conversion_weight: float
    """Weight of the conversion loss, which is a mean over clicked impressions."""


@dataclass(frozen=True)
class Plan:
    """One day's training, pinned."""

    plan_id: str
    """Hash of what decides the outcome."""
    path: str
    """Folder of everything this training writes."""
    ds: date
    """The day both models are evaluated on; training days lie before it."""
    preset: str
    """Named size of both models."""
    decision: str
    """Why these days and this start, in words."""
    train_days: tuple[date, ...]
    """Days read for training, oldest first."""
    warm_start_ds: date | None
    """Day whose finished training is continued; None: fresh weights."""
    snapshot_id: int
    """Snapshot of ``training_requests`` at the time of planning."""
    train_files: tuple[str, ...]
    """Data files of the training days in that snapshot, in reading order."""
    evaluation_files: tuple[str, ...]
    """Data files of ``ds`` in that snapshot."""
    schema: FeatureSchema
    """The feature schema."""
    recipe: Recipe
    """How both models are trained."""
    models: Mapping[str, ModelPlan]
    """Per model name, what it starts as."""
    git_revision: str
    """Revision of the code that planned, ``+changes`` when it was edited since, or ``unknown``."""
    created_at: str
    """When the plan was made, UTC."""
    mlflow_run_id: str = ""
    """Parent run of the day; empty: nothing is tracked."""

    def model_path(self, model_name: str) -> str:
        """Return the folder of one model's training.

        Raises:
            BadConfigError: if the plan has no such model.
        """
        if model_name not in self.models:
            raise BadConfigError(f"the plan has no model {model_name!r}; its models are {', '.join(self.models)}")
        return storage.join(self.path, model_name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``plan.json``."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "ds": str(self.ds),
            "train_days": [str(day) for day in self.train_days],
            "warm_start_ds": str(self.warm_start_ds) if self.warm_start_ds else None,
            "schema": self.schema.to_dict(),
            "recipe": asdict(self.recipe),
            "models": {name: model.to_dict() for name, model in self.models.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read what :meth:`to_dict` wrote."""
        return cls(
            **{
                **data,
                "ds": parse_day(data["ds"]),
                "train_days": tuple(parse_day(day) for day in data["train_days"]),
                "warm_start_ds": parse_day(data["warm_start_ds"]) if data["warm_start_ds"] else None,
                "train_files": tuple(data["train_files"]),
                "evaluation_files": tuple(data["evaluation_files"]),
                "schema": FeatureSchema.from_dict(data["schema"]),
                "recipe": Recipe(**data["recipe"]),
                "models": {name: ModelPlan.from_dict(model) for name, model in data["models"].items()},
            }
        )

    def save(self) -> Plan:
        """Write ``plan.json`` and return the plan."""
        storage.write_json(storage.join(self.path, PLAN_FILE), self.to_dict())
        return self

    @classmethod
    def load(cls, path: str) -> Plan:
        """Read a plan from its folder, or from its ``plan.json``.

        Raises:
            BadConfigError: if there is none, or it was written by another version.
        """
        folder = path.rstrip("/").removesuffix(f"/{PLAN_FILE}")
        try:
            data = storage.read_json(storage.join(folder, PLAN_FILE))
            # The folder as it is found now: a run may have been copied.
            return replace(cls.from_dict(data), path=storage.resolve(folder))
        except FileNotFoundError as error:
            raise BadConfigError(f"there is no plan at {path}; run: onetrans plan --ds DAY") from error
        except (KeyError, TypeError) as error:
            raise BadConfigError(f"{path} was written by another version of onetrans ({error}); plan again") from error


def plans_of_days(runs: str) -> dict[date, list[str]]:
    """Return the plan files of every day that has one, oldest day first; those of no day lie beside them.

    Args:
        runs: ``training.runs``.
    """
    runs, found = storage.resolve(runs), dict[date, list[str]]()
    for file in storage.list_files(runs, PLAN_FILE):
        folder, _, inner = file.removeprefix(runs).lstrip("/").partition("/")
        if folder.startswith("ds=") and f"/{inner}".endswith(f"/{PLAN_FILE}"):
            found.setdefault(parse_day(folder.removeprefix("ds=")), []).append(file)
    return dict(sorted(found.items()))


def plan_of_no_day(
    settings: Settings,
    folder: str,
    schema: FeatureSchema,
    recipe: Recipe,
    decides: Mapping[str, Any],
    *,
    ds: date,
    decision: str,
    files: Sequence[str],
    train_days: Sequence[date] = (),
    snapshot_id: int = 0,
) -> Plan:
    """Return the plan of a training beside those of the days, from fresh weights; the same inputs find it again.

    Args:
        settings: where runs are, and both models.
        folder: name of the folder of its kind beside the days' runs.
        schema: the feature schema.
        recipe: how it is trained.
        decides: what decides the outcome beside schema, recipe and models.
        ds: its last day.
        decision: what it reads, in words.
        files: files to train on.
        train_days: days of the lake that these are of.
        snapshot_id: state of the table that they are of.
    """
    models = configured_models(settings.training)
    plan_id = _plan_id(schema, recipe, models, decides)
    path = storage.join(storage.resolve(settings.training.runs), folder, plan_id)
    if storage.exists(storage.join(path, PLAN_FILE)):
        return Plan.load(path)
    return Plan(
        plan_id=plan_id,
        path=path,
        ds=ds,
        preset=settings.training.preset,
        decision=decision,
        train_days=tuple(train_days),
        warm_start_ds=None,
        snapshot_id=snapshot_id,
        train_files=tuple(files),
        evaluation_files=(),
        schema=schema,
        recipe=recipe,
        models=models,
        git_revision=git_revision(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    ).save()


def _plan_id(schema: FeatureSchema, recipe: Recipe, models: Mapping[str, ModelPlan], decides: Mapping[str, Any]) -> str:
    whole = {
        **decides,
        "schema": schema.fingerprint,
        "recipe": asdict(recipe),
        "models": {name: model.decides() for name, model in models.items()},
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Start:
    """Where training begins: the days to read and what to go on from."""

    days: list[date]
    decision: str
    ds: date | None = None
    folder: str | None = None


def make_plan(
    settings: Settings,
    ds: date,
    schema: FeatureSchema,
    *,
    models: Mapping[str, ModelPlan] | None = None,
    from_scratch: bool = False,
    track: bool = True,
) -> Plan:
    """Decide one day's training and write it down; the same inputs find the plan made before.

    Args:
        settings: where lake and runs are, and how to train.
        ds: the day to evaluate on.
        schema: the feature schema.
        models: configurations of each model; default: those of the settings.
        from_scratch: leave earlier trainings aside.
        track: open the day's parent run in MLflow.

    Raises:
        NotReadyError: if ``ds``, or one of the days to train on, is not published, or MLflow does not answer.
        BadConfigError: if the settings say that ``ds``, or every day to train on, is absent.
    """
    lake = Lake(settings.lake)
    training = settings.training
    models = models or configured_models(training)
    snapshot_id = lake.snapshot_id(TABLE)
    if snapshot_id is None:
        raise NotReadyError(f"table {TABLE} has no published day; needed: {ds} and the days before it")
    start = _decide(lake, snapshot_id, settings, ds, schema, models, from_scratch)
    recipe = configured_recipe(training)
    train_files = lake.files(TABLE, start.days, snapshot_id)
    evaluation_files = lake.files(TABLE, [ds], snapshot_id)
    decides = {
        "train": train_files,
        "evaluation": evaluation_files,
        "warm_start": start.folder and start.folder.rsplit("/", 1)[-1],
    }
    plan_id = _plan_id(schema, recipe, models, decides)
    path = storage.join(storage.resolve(training.runs), f"ds={ds}", plan_id)
    if storage.exists(storage.join(path, PLAN_FILE)):
        plan = Plan.load(path)
        logger.info("plan %s of %s was made before, on %s, and stands as decided then", plan_id, ds, plan.created_at)
    else:
        plan = Plan(
            plan_id=plan_id,
            path=path,
            ds=ds,
            preset=training.preset,
            decision=start.decision,
            train_days=tuple(start.days),
            warm_start_ds=start.ds,
            snapshot_id=snapshot_id,
            train_files=tuple(train_files),
            evaluation_files=tuple(evaluation_files),
            schema=schema,
            recipe=recipe,
            models={
                name: replace(model, warm_start=start.folder and storage.join(start.folder, name))
                for name, model in models.items()
            },
            git_revision=git_revision(),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ).save()
    if track and not plan.mlflow_run_id:
        from onetrans.tracking import answering, start_day

        with answering(settings.mlflow):
            plan = replace(plan, mlflow_run_id=start_day(settings, plan)).save()
    # Whoever asks for no tracking gets none, also where an earlier command opened a run for this plan.
    return plan if track else replace(plan, mlflow_run_id="")


def _decide(
    lake: Lake,
    snapshot_id: int,
    settings: Settings,
    ds: date,
    schema: FeatureSchema,
    models: Mapping[str, ModelPlan],
    from_scratch: bool,
) -> _Start:
    published = lake.days(TABLE, snapshot_id)
    absent = set(settings.source.absent_days) - set(published)
    if ds in absent:
        raise BadConfigError(f"{ds} is named in source.absent_days, so no model can be evaluated on it")
    window = days_before(ds, settings.training.lookback_days)
    if from_scratch:
        reason = "fresh weights, as asked"
    else:
        found, reason = _newest_finished(settings, window, schema, models)
        if found is not None:
            since = day_range(found.ds, window[-1])
            days = [day for day in since if day not in absent]
            _require_published(published, [*days, ds])
            text = f"goes on from the training of {found.ds}{reason} and reads {describe_days(days)}"
            return _Start(days, text + _told_absent(since, absent), found.ds, found.folder)
    earlier = [day for day in published if day < ds]
    if ds in published and not earlier:
        # Tables are built in order, so no day before the first is still to come: waiting would not help.
        raise BadConfigError(
            f"{ds} is the first published day of table {TABLE}; there is nothing to train on: begin with "
            f"{ds + timedelta(days=1)}"
        )
    reach = [day for day in window if not earlier or day >= earlier[0]]
    days = [day for day in reach if day not in absent]
    if not days:
        raise BadConfigError(
            f"source.absent_days names every day that training.lookback_days = {len(window)} reach back from {ds}, "
            "so there is nothing to train on"
        )
    # Without any earlier day the day before is named as missing, not the whole window.
    _require_published(published, [*(days if earlier else window[-1:]), ds])
    return _Start(days, f"{reason}; reads {describe_days(days)}" + _told_absent(reach, absent))


def _told_absent(days: list[date], absent: set[date]) -> str:
    lost = [day for day in days if day in absent]
    return f", without {describe_days(lost)}, which source.absent_days names" if lost else ""


def _require_published(published: list[date], needed: list[date]) -> None:
    missing = sorted(set(needed) - set(published))
    if missing:
        raise NotReadyError(
            f"table {TABLE} has no published {describe_days(missing)}, needed to train for {needed[-1]}; "
            f"published are {describe_days(published)}. Days that the log lost for good go into source.absent_days"
        )


@dataclass(frozen=True)
class _Finished:
    """An earlier day on which every model finished."""

    ds: date
    folder: str


def decision_in(folder: str) -> dict[str, Any] | None:
    """Return what a day was decided by the plan in a folder, its ``promotion.json``; what a dry run came to is none."""
    path, judged = (storage.join(folder, name) for name in (PROMOTION_FILE, GATE_FILE))
    if not storage.exists(path):
        return None
    promotion: dict[str, Any] = storage.read_json(path)
    if "mode" not in promotion and storage.exists(judged):  # by version 0.1.0
        promotion["mode"] = storage.read_json(judged).get("mode")
    return promotion if promotion.get("mode", "enabled") == "enabled" else None


def decided_at(folder: str) -> str:
    """Return when a day was decided by the plan in a folder, to be compared; empty: it was not."""
    return str((decision_in(folder) or {"finished_at": ""})["finished_at"])


def _newest_finished(
    settings: Settings, window: list[date], schema: FeatureSchema, models: Mapping[str, ModelPlan]
) -> tuple[_Finished | None, str]:
    """Return the newest training in ``window`` that all of ``models`` can go on from, or None, and why it is that."""
    left_aside: list[str] = []
    damaged = ""
    for day in reversed(window):
        folder = storage.join(storage.resolve(settings.training.runs), f"ds={day}")
        records: dict[str, dict[str, dict[str, Any]]] = {}
        for file in storage.list_files(folder, FINISHED_FILE):
            run, model_name, _ = file.rsplit("/", 2)
            if model_name in models:
                records.setdefault(run, {})[model_name] = storage.read_json(file)
        # Several plans of one day may be finished: the one that the day was decided by last, not a trial's; of
        # none the one finished last.
        whole = sorted(
            (decided_at(path), max(str(r["finished_at"]) for r in run.values()), path)
            for path, run in records.items()
            if set(run) == set(models)
        )
        for *_, path in reversed(whole):
            if not all(storage.exists(storage.join(path, name, CHECKPOINT_FOLDER, CHECKPOINT_FILE)) for name in models):
                continue  # Retention has removed it: there is nothing to go on from.
            grown, difference = _schema_difference(path, records[path], schema)
            difference = difference or _difference(records[path], models)
            if difference is not None:
                left_aside.append(f"the training of {day} had {difference}")
                continue
            unreadable = _damage(path, models)
            if unreadable is None:
                told = (f", whose {describe(grown)}" if grown else "") + damaged
                return _Finished(day, path), f"{told}," if told else ""
            logger.warning("plan: the training of %s is left aside: %s", day, unreadable)
            left_aside.append(f"the training of {day} has a damaged checkpoint")
            damaged += f", as that of {day} has a damaged checkpoint"
    if left_aside:
        return None, f"fresh weights for every model, as {left_aside[0]}"
    return None, f"fresh weights, as no training of the last {len(window)} days is finished"


def _damage(path: str, models: Mapping[str, ModelPlan]) -> str | None:
    """Say what is wrong with the checkpoints of a finished training; None if they are as they were written."""
    from onetrans.checkpoint import Checkpoint, DamagedCheckpointError  # with torch, which takes a second or more

    for name in models:
        try:
            Checkpoint.check(storage.join(path, name, CHECKPOINT_FOLDER))
        except DamagedCheckpointError as error:
            return str(error)
    return None


def _schema_difference(
    path: str, records: Mapping[str, Mapping[str, Any]], schema: FeatureSchema
) -> tuple[Mapping[str, tuple[int, int]], str | None]:
    """Return the tables that grew since a finished training, and what else keeps its schema from being today's."""
    if all(record["schema_fingerprint"] == schema.fingerprint for record in records.values()):
        return {}, None
    try:
        before = FeatureSchema.from_dict(storage.read_json(storage.join(path, PLAN_FILE))["schema"])
    except (FileNotFoundError, KeyError, BadConfigError):
        return {}, "another feature schema, which cannot be read any more"
    grown, difference = growth(before, schema)
    return grown, f"another feature schema: {difference}" if difference else None


def _difference(records: Mapping[str, Mapping[str, Any]], models: Mapping[str, ModelPlan]) -> str | None:
    """Say what of the models keeps a finished training from being continued; None if nothing does."""
    for name, record in records.items():
        before = _decided(record)
        for part, now in models[name].decides().items():
            then = before[part]
            changed = sorted(field for field in {*now, *then} if now.get(field) != then.get(field))
            if changed:
                field = changed[0]
                return f"{name} {part}: {field} = {then.get(field)!r}, now {now.get(field)!r}"
    return None


def _decided(record: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
    """Return what an earlier training decided, fields that did not exist then at their defaults."""
    try:
        return ModelPlan.from_dict({**record, "warm_start": None}).decides()
    except (BadConfigError, TypeError):
        return record  # It had a field or value that is gone: the comparison names it.


def git_revision() -> str:
    """Return the code's git revision, with ``+changes`` if files were edited, or ``unknown`` outside a checkout."""
    here = Path(__file__).parent
    try:
        revision, edited = (
            subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{revision}+changes" if edited else revision


def add_day_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that decide a plan, shared by the commands that can make one themselves."""
    parser.add_argument(
        "--ds", type=parse_day, metavar="DAY", help="day to evaluate on, YYYY-MM-DD; training reads days before it"
    )
    parser.add_argument(
        "--config",
        choices=get_args(Preset),
        help="size of both models: tiny for trials, base and large as in the paper (default: training.preset)",
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="fresh weights, trained on the last training.lookback_days days (default: go on from an earlier day's)",
    )
    parser.add_argument("--no-mlflow", action="store_true", help="record nothing in MLflow")


def plan_of(arguments: argparse.Namespace, settings: Settings) -> Plan:
    """Return the plan the options name, or make the one they describe.

    Raises:
        BadConfigError: if neither is given, or both are.
    """
    if getattr(arguments, "plan", None):
        for name in ("ds", "config", "from_scratch"):
            if getattr(arguments, name):
                raise BadConfigError(
                    f"--plan names a plan that is made, --{name.replace('_', '-')} decides another: give one of them"
                )
        plan = Plan.load(arguments.plan)
        return replace(plan, mlflow_run_id="") if arguments.no_mlflow else plan
    if arguments.ds is None:
        raise BadConfigError("either --plan PATH or --ds DAY is needed")
    if arguments.config:
        settings = replace(settings, training=replace(settings.training, preset=arguments.config))
    with long_steps(None, f"planning {arguments.ds}"):
        return make_plan(
            settings,
            arguments.ds,
            load_schema(settings.source),
            from_scratch=arguments.from_scratch,
            track=not arguments.no_mlflow,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_day_arguments(parser)
    add_force_argument(parser, "what `onetrans promote` will be given, to refuse it here if it would be refused there")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the plan and print its folder, the value of ``--plan`` for the steps that follow."""
    settings = load_settings()
    forced_reason(arguments.force, settings.gate)
    plan = plan_of(arguments, settings)
    logger.info("plan %s of %s (%s): %s", plan.plan_id, plan.ds, plan.preset, plan.decision)
    if arguments.json:
        print_json({"path": plan.path, **plan.to_dict()})
    else:
        print(plan.path)
    return 0
