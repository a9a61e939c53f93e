"""MLflow: one parent run per day's plan, a child run per model, and the models themselves.

A step that is repeated finds its run again by tag, so a retry adds nothing twice.
MLflow is imported only when something is recorded: its import costs more than a
second.

The default store is a SQLite file that both training processes write at the same
time.  MLflow waits for the other's lock; what it leaves open is closed here: one
process at a time creates the database and looks for or creates a run, curves are
sent in batches, and a store that is busy or away for a moment is tried again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from onetrans import __version__, storage
from onetrans.audit_summary import audit_summary
from onetrans.errors import BadConfigError, BadDataError, NotReadyError, PipelineError, without_login
from onetrans.lake import AUDIT_FILE, Lake
from onetrans.object_store import export_for_boto
from onetrans.plan import GATE_FILE, METRICS_FILE, PAGE_FILE, PLAN_FILE, PROMOTION_FILE, Plan
from onetrans.process import see
from onetrans.schema import Feature, FeatureSchema, Kind
from onetrans.settings import MlflowSettings, Settings

if TYPE_CHECKING:
    import pyarrow as pa
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.models import ModelSignature

    from onetrans.models.ranking import RankingModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

TAG_KIND = "onetrans.kind"
TAG_DAY = "ds"
TAG_PLAN = "plan_id"
TAG_MODEL = "model"
TAG_DECISION = "decision"
TAG_FORCED = "forced_promotion"
TAG_ERROR = "error"
TAG_MODEL_ID = "logged_model_id"
TAG_MODEL_DIGEST = "model_digest"

MODEL_FOLDER = "model"
CHECK_FOLDER = "check"
CHECK_REQUESTS = "requests.json"
CHECK_SCORES = "scores.json"
AUDIT_SUMMARY_FILE = "audit.csv"

EXAMPLE_REQUESTS = 8
"""Requests of the fixed batch that is kept with every model, and scored again after loading."""

SCORE_TOLERANCE = 1e-4
"""Largest difference of a probability between the trained model and the loaded one: float32, GPU against CPU."""

SYSTEM_METRICS_S = 10.0
"""Seconds between two looks at the machine's load while a run is open."""

_ANSWERS_WITHIN_S = 10
_ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_ANSWERS_WITHIN_S)}
"""Variables by which MLflow's client asks a server once; it reads them with each question."""

_METRICS_PER_CALL = 500
_SECONDS_BETWEEN_CALLS = 10.0
_TRIES = 5


def connect(settings: MlflowSettings) -> MlflowClient:
    """Return a client of the tracking store and registry; the first call makes a missing SQLite store."""
    client = _connect(settings.tracking_uri)
    import mlflow

    # `models:/` addresses and the flavours go by the process-wide address, not by the client's.
    if mlflow.get_tracking_uri() != settings.tracking_uri:
        mlflow.set_tracking_uri(settings.tracking_uri)
        mlflow.set_registry_uri(settings.tracking_uri)
    return client


@functools.cache
def _connect(tracking_uri: str) -> MlflowClient:
    _be_quiet()
    export_for_boto()  # artifacts may lie in an object store
    import mlflow

    with one_at_a_time(tracking_uri):  # both stores make their missing tables, the registry's at its first question
        client = mlflow.MlflowClient(tracking_uri, tracking_uri)
        _again(lambda: client.search_registered_models(max_results=1))
    return client


def _be_quiet() -> None:
    """No telemetry, no network but the store's, and nothing in a task's log that its reader cannot act upon."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    logging.getLogger("alembic").setLevel(logging.WARNING)


_turn = threading.local()


@contextmanager
def one_at_a_time(tracking_uri: str) -> Iterator[None]:
    """Let one process of this machine at a time create runs and move aliases: MLflow has no compare-and-swap.

    A thread that has its turn may ask for it again.
    """
    if getattr(_turn, "mine", "") == tracking_uri:
        yield
        return
    lock = _lock_file(tracking_uri)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _turn.mine = tracking_uri
        try:
            yield
        finally:
            _turn.mine = ""


def store_is_there(settings: MlflowSettings) -> bool:
    """Tell whether a SQLite store was made yet, which a look must not make; a server's always is."""
    file = storage.sqlite_file(settings.tracking_uri)
    return file is None or file.exists()


def require_store(settings: MlflowSettings) -> None:
    """Return if there is a store to look into.

    Raises:
        NotReadyError: if a SQLite store was not made yet.
    """
    if not store_is_there(settings):
        raise NotReadyError(
            f"there is no registry yet: MLflow's store {settings.tracking_uri} (mlflow.tracking_uri) is not there; "
            "the first training of a day makes it"
        )


def _lock_file(tracking_uri: str) -> Path:
    """Return the file whose lock is a turn: beside a SQLite store, in the temporary folder for a server's."""
    if (file := storage.sqlite_file(tracking_uri)) is not None:
        return Path(f"{file}.lock")
    name = hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"onetrans-{os.getuid()}" / f"mlflow-{name}.lock"


@contextmanager
def answering(settings: MlflowSettings, *, look: bool = False) -> Iterator[None]:
    """Say in one sentence that MLflow does not answer, in place of its own long error.

    Args:
        settings: where it is.
        look: nothing was to be changed, so there is no word on what is unharmed.

    Raises:
        NotReadyError: if a call inside was not answered; it may be tried again later.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        code = getattr(error, "error_code", "INTERNAL_ERROR")
        if code not in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
            raise
        unharmed = "" if look else "; nothing was promoted"
        raise NotReadyError(
            f"MLflow at {without_login(settings.tracking_uri)} does not answer ({_cause(error)}){unharmed}"
        ) from error


def _cause(error: BaseException) -> str:
    """Return what the system said of a connection, which MLflow's error names behind a long address, or that error."""
    deepest = error
    while (deeper := deepest.__cause__ or deepest.__context__) is not None:
        deepest = deeper
    return _first_line(deepest if isinstance(deepest, OSError) else error)[:300]


def require_answer(settings: MlflowSettings) -> None:
    """Return if MLflow answers: asked once, for seconds, where its own client would ask again for minutes.

    For a person who waits; a step of the night goes on asking (:func:`_again`).

    Raises:
        NotReadyError: if it does not answer.
    """
    uri = settings.tracking_uri
    with answering(settings, look=True):
        if uri.startswith("postgresql"):
            _require_database(uri)
        before = {name: os.environ.get(name) for name in _ONCE}
        os.environ.update(_ONCE)
        try:
            connect(settings)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _require_database(uri: str) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError

    engine = create_engine(uri, connect_args={"connect_timeout": _ANSWERS_WITHIN_S})
    try:
        engine.connect().close()
    except OperationalError as error:
        raise NotReadyError(
            f"MLflow's database {without_login(uri)} does not answer ({_first_line(error)[:300]})"
        ) from error
    finally:
        engine.dispose()


def _again(call: Callable[[], T]) -> T:
    """Return what ``call`` returns; repeat it when the store is busy or away, for about half a minute."""
    from mlflow.exceptions import MlflowException

    for attempt in range(_TRIES):
        try:
            return call()
        except MlflowException as error:
            if error.error_code not in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
                raise
            if attempt == _TRIES - 1:
                raise
            wait = 2.0**attempt
            logger.warning("MLflow is not reachable, trying again in %.0f s: %s", wait, _first_line(error))
            time.sleep(wait)
    raise AssertionError("unreachable")


def experiment_id(settings: MlflowSettings) -> str:
    """Return the experiment's id; it is created, with its artifact root, on first use.

    Raises:
        BadConfigError: if the experiment was deleted.
    """
    client = connect(settings)
    experiment = _again(lambda: client.get_experiment_by_name(settings.experiment))
    if experiment is None:
        with one_at_a_time(settings.tracking_uri):
            experiment = _again(lambda: client.get_experiment_by_name(settings.experiment))
            if experiment is None:
                root = None if settings.tracking_uri.startswith("http") else storage.address(settings.artifacts)
                return _again(lambda: client.create_experiment(settings.experiment, artifact_location=root))
    if experiment.lifecycle_stage != "active":
        raise BadConfigError(
            f"MLflow experiment {settings.experiment!r} was deleted; restore it with "
            f"`mlflow experiments restore -x {experiment.experiment_id}` or name another in mlflow.experiment"
        )
    return str(experiment.experiment_id)


# Runs


def start_day(settings: Settings, plan: Plan) -> str:
    """Return the id of the plan's parent run; it is created on first use."""
    tags = {
        TAG_KIND: "day",
        TAG_DAY: str(plan.ds),
        TAG_PLAN: plan.plan_id,
        "git_revision": plan.git_revision,
        "snapshot.training_requests": str(plan.snapshot_id),
        "schema": f"{plan.schema.name} {plan.schema.fingerprint}",
    }
    run, created = _find_or_create(settings.mlflow, {TAG_KIND: "day", TAG_PLAN: plan.plan_id}, str(plan.ds), tags)
    if created:
        client, run_id = connect(settings.mlflow), run.info.run_id
        audits = audit_verdicts(plan)
        _log_params(
            client,
            run_id,
            {
                "ds": plan.ds,
                "preset": plan.preset,
                "decision": plan.decision,
                "train_days": f"{plan.train_days[0]}..{plan.train_days[-1]}" if plan.train_days else "none",
                "warm_start_ds": plan.warm_start_ds or "none",
                **asdict(plan.recipe),
            },
        )
        _again(lambda: client.set_tag(run_id, "audit", _audit_summary(audits)))
        _set_tags(client, run_id, _snapshots_read(settings, plan))
        _again(lambda: client.log_dict(run_id, plan.to_dict(), PLAN_FILE))
        _again(lambda: client.log_dict(run_id, audits, "audit.json"))
        summary = audit_summary(Lake(settings.lake), plan, audits)
        _again(lambda: client.log_text(run_id, summary, AUDIT_SUMMARY_FILE))
    return str(run.info.run_id)


def _snapshots_read(settings: Settings, plan: Plan) -> dict[str, str]:
    """Return a tag for each table that the evaluation day was built from: the snapshot it read."""
    folders = dict.fromkeys(file.rsplit("/", 1)[0] for file in plan.evaluation_files)
    manifests = [Lake(settings.lake).built(folder) for folder in folders]
    return {f"snapshot.{table}": str(read) for built in manifests if built for table, read in built.inputs.items()}


def see_run(settings: MlflowSettings, run_id: str) -> None:
    """Tell where a person sees a run."""
    server = settings.tracking_uri if settings.tracking_uri.startswith("http") else ""
    address = without_login(settings.address or server).rstrip("/")
    if address:
        see(f"{address}/#/experiments/{experiment_id(settings)}/runs/{run_id}")
    else:
        see(f"run {run_id} of experiment {settings.experiment} in MLflow")


def find_model_run(settings: Settings, plan: Plan, model_name: str) -> Run | None:
    """Return the child run of one model, or None if it was never started."""
    return _find(settings.mlflow, {TAG_KIND: "model", TAG_PLAN: plan.plan_id, TAG_MODEL: model_name})


@contextmanager
def recorded_step(settings: Settings, plan: Plan, step: str) -> Iterator[None]:
    """Do a step of the day: if it fails, the parent run ends FAILED with the reason as its tag ``error.<step>``.

    The next attempt takes the tag away, and opens the run again unless another step's failure still stands: the two
    models train side by side.  Nothing is recorded for a plan without a parent run.
    """
    if not plan.mlflow_run_id:
        yield
        return
    with answering(settings.mlflow):
        parent, client = start_day(settings, plan), connect(settings.mlflow)
        see_run(settings.mlflow, parent)
        _take_error_away(client, parent, step)
        try:
            yield
        except BaseException as error:
            _end_as_failed(client, parent, f"{TAG_ERROR}.{step}", error)
            raise


def _take_error_away(client: MlflowClient, parent: str, step: str) -> None:
    run = _again(lambda: client.get_run(parent))
    failed = {tag for tag in run.data.tags if tag.startswith(f"{TAG_ERROR}.")}
    if f"{TAG_ERROR}.{step}" in failed:
        _again(lambda: client.delete_tag(parent, f"{TAG_ERROR}.{step}"))
    if run.info.status == "FAILED" and failed <= {f"{TAG_ERROR}.{step}"}:
        _again(lambda: client.update_run(parent, status="RUNNING"))


def _end_as_failed(client: MlflowClient, run_id: str, tag: str, error: BaseException) -> None:
    try:
        client.set_tag(run_id, tag, f"{type(error).__name__}: {_first_line(error)}"[:500])
        client.set_terminated(run_id, "FAILED")
    except Exception as second:  # the first error is the one that matters
        logger.warning("MLflow did not take the failure: %s", _first_line(second))


@contextmanager
def start_model(settings: Settings, plan: Plan, model_name: str) -> Iterator[ModelRun]:
    """Open the child run of one model; it ends FINISHED, or FAILED with the error's text as a tag, as its parent."""
    parent = start_day(settings, plan)
    _take_error_away(connect(settings.mlflow), parent, model_name)
    wanted = {TAG_KIND: "model", TAG_PLAN: plan.plan_id, TAG_MODEL: model_name}
    tags = {
        **wanted,
        TAG_DAY: str(plan.ds),
        "git_revision": plan.git_revision,
        "snapshot.training_requests": str(plan.snapshot_id),
        "mlflow.parentRunId": parent,
    }
    run, created = _find_or_create(settings.mlflow, wanted, f"{plan.ds} {model_name}", tags)
    client = connect(settings.mlflow)
    if not created:
        _open_again(client, run)
    see_run(settings.mlflow, str(run.info.run_id))
    model_run = ModelRun(settings, plan, model_name, client, str(run.info.run_id))
    try:
        with system_metrics(settings.mlflow, model_run.run_id):
            yield model_run
        model_run.flush()
    except BaseException as error:
        logger.error("%s of %s failed; its MLflow run is %s", model_name, plan.ds, model_run.run_id)
        _end_as_failed(client, model_run.run_id, TAG_ERROR, error)
        _end_as_failed(client, parent, f"{TAG_ERROR}.{model_name}", error)
        raise
    _again(lambda: client.set_terminated(model_run.run_id, "FINISHED"))


def _open_again(client: MlflowClient, run: Run) -> None:
    """Make a run that ended one that runs, without the error it ended with."""
    _again(lambda: client.update_run(run.info.run_id, status="RUNNING"))
    if TAG_ERROR in run.data.tags:
        _again(lambda: client.delete_tag(run.info.run_id, TAG_ERROR))


@contextmanager
def system_metrics(settings: MlflowSettings, run_id: str) -> Iterator[None]:
    """Record processors, memory, disk, network and GPUs of this machine beside a run, every few seconds.

    By MLflow's own monitor, so the figures stand in the run's page "System metrics"; a run that is opened again goes
    on with them.  A run shorter than :data:`SYSTEM_METRICS_S` has none.  A store that does not take them is no reason
    for a training to end.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=SYSTEM_METRICS_S, resume_logging=True, tracking_uri=settings.tracking_uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


@contextmanager
def start_next_batch(settings: Settings, plan: Plan, model_name: str) -> Iterator[ModelRun]:
    """Open the run of a next-batch evaluation, which belongs to no day; it ends FINISHED, or FAILED with the error.

    The figures ``day.*`` have the day as their step, written as a number: 20260131.
    """
    wanted = {TAG_KIND: "next-batch", TAG_PLAN: plan.plan_id, TAG_MODEL: model_name}
    tags = {
        **wanted,
        "git_revision": plan.git_revision,
        "snapshot.training_requests": str(plan.snapshot_id),
        TAG_DECISION: plan.decision,
    }
    days = f"{plan.train_days[0]}..{plan.train_days[-1]}"
    run, created = _find_or_create(settings.mlflow, wanted, f"next-batch {days} {model_name}", tags)
    client = connect(settings.mlflow)
    if created:
        _again(lambda: client.log_dict(run.info.run_id, plan.to_dict(), PLAN_FILE))
    else:
        _open_again(client, run)
    opened = NextBatchRun(settings, plan, model_name, client, str(run.info.run_id))
    try:
        with system_metrics(settings.mlflow, opened.run_id):
            yield opened
        opened.flush()
    except BaseException as error:
        _end_as_failed(client, opened.run_id, TAG_ERROR, error)
        raise
    _again(lambda: client.set_terminated(opened.run_id, "FINISHED"))


class ModelRun:
    """The child run of one model."""

    def __init__(self, settings: Settings, plan: Plan, model_name: str, client: MlflowClient, run_id: str) -> None:
        self.settings = settings
        self.plan = plan
        self.model_name = model_name
        self.run_id = run_id
        self._client = client
        self._waiting: list[tuple[str, float, int, int]] = []
        self._sent_at = time.monotonic()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; nested mappings become dotted names."""
        _log_params(self._client, self.run_id, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record figures at a step; they are sent in batches, the last ones when the run ends."""
        now = int(time.time() * 1000)
        self._waiting += [(name, float(value), now, step) for name, value in metrics.items()]
        overdue = time.monotonic() - self._sent_at > _SECONDS_BETWEEN_CALLS
        if overdue or len(self._waiting) >= _METRICS_PER_CALL:
            self.flush()

    def flush(self) -> None:
        """Send what is waiting."""
        from mlflow.entities import Metric

        while self._waiting:
            batch = [Metric(*entry) for entry in self._waiting[:_METRICS_PER_CALL]]
            _again(functools.partial(self._client.log_batch, self.run_id, metrics=batch))
            del self._waiting[: len(batch)]
        self._sent_at = time.monotonic()

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        _set_tags(self._client, self.run_id, {name: value[:500] for name, value in tags.items()})

    def log_artifact(self, path: str, folder: str | None = None) -> None:
        """Keep a file beside the run; ``path`` may lie on the local disk or in an object store."""
        with _on_disk(path) as local:
            _again(lambda: self._client.log_artifact(self.run_id, str(local), folder))

    def log_model(self, model: RankingModel, folder: str) -> str:
        """Record a saved model and return its id in MLflow.

        The fixed batch (the first requests of the last training file) and the scores that ``model`` gives it are
        kept with it, and the logged model is loaded again and has to give the same scores.

        Args:
            model: the trained model, in memory.
            folder: the same model as :func:`onetrans.artifact.save_model` wrote it.

        Raises:
            PipelineError: if the logged model scores differently.
        """
        from onetrans.requests import from_rows, score

        digest = folder_digest(folder)
        tags = _again(lambda: self._client.get_run(self.run_id)).data.tags
        if tags.get(TAG_MODEL_DIGEST) == digest:
            return str(tags[TAG_MODEL_ID])
        requests = from_rows(_first_rows(self.plan.train_files[-1], EXAMPLE_REQUESTS), self.plan.schema)
        scores = score(model, requests)
        with tempfile.TemporaryDirectory(prefix="onetrans-model-") as scratch:
            model_id = _log_model(self, folder, requests, scores, Path(scratch), digest)
        difference = compare_scores(self.settings.mlflow, model_id, model_id_uri(model_id), requests, scores)
        if difference > SCORE_TOLERANCE:
            raise PipelineError(
                f"{self.model_name} of {self.plan.ds}: the model logged to MLflow ({model_id}) differs from the "
                f"trained one by {difference:.2g} on {len(requests)} requests; nothing may be promoted from it"
            )
        _again(lambda: self._client.finalize_logged_model(model_id, "READY"))
        _set_tags(self._client, self.run_id, {TAG_MODEL_ID: model_id, TAG_MODEL_DIGEST: digest})
        return model_id


class NextBatchRun(ModelRun):
    """The run of a next-batch evaluation."""

    def log_model(self, model: RankingModel, folder: str) -> str:
        """Keep nothing: the weights at the end have seen every row that was scored, and nothing may be promoted."""
        return ""


def log_evaluation(settings: Settings, plan: Plan, metrics: Mapping[str, Any]) -> None:
    """Record the figures of the evaluation day: each model's on its own run, all on the parent run.

    Args:
        settings: where MLflow is.
        plan: the day's plan.
        metrics: the content of ``metrics.json``; figures by model name (a simulator's under ``truth``).
    """
    client, parent = connect(settings.mlflow), start_day(settings, plan)
    figures = {
        name: {figure: float(value) for figure, value in values.items() if _is_number(value)}
        for name, values in metrics.items()
        if isinstance(values, Mapping)
    }
    for model_name, values in figures.items():
        _log_metrics(client, parent, {f"{model_name}.{figure}": value for figure, value in values.items()})
        child = find_model_run(settings, plan, model_name) if model_name in plan.models else None
        if child is not None:
            _log_metrics(client, child.info.run_id, {f"eval.{figure}": value for figure, value in values.items()})
    _again(lambda: client.log_dict(parent, dict(metrics), METRICS_FILE))


def log_gate(settings: Settings, plan: Plan, verdict: Mapping[str, Any], page: str) -> None:
    """Record the gate's verdict (the content of ``gate.json``, and its page) on the parent run, and end the run."""
    client, parent = connect(settings.mlflow), start_day(settings, plan)
    figures = {
        f"gate.{task}.{figure}": float(lift[figure])
        for task, lift in verdict["lifts"].items()
        for figure in ("lift", "low", "high", "half_width")
        if _is_number(lift[figure])
    }
    _log_metrics(client, parent, figures)
    note = f"**{plan.ds}**: {verdict['reason']}"
    if verdict["force_reason"]:
        note += f" A person forces the promotion: {verdict['force_reason']}"
    note += "".join(f"\n\nWarning: {warning}" for warning in verdict["warnings"])
    _set_tags(client, parent, {TAG_DECISION: verdict["verdict"], "mlflow.note.content": note})
    _again(lambda: client.log_dict(parent, dict(verdict), GATE_FILE))
    _again(lambda: client.log_text(parent, page, PAGE_FILE))
    _again(lambda: client.set_terminated(parent, "FINISHED"))


def log_promotion(settings: Settings, plan: Plan, promotion: Mapping[str, Any], page: str | None) -> None:
    """Record what was done in the registry (the content of ``promotion.json``) on the parent run.

    Args:
        settings: where MLflow is.
        plan: the day's plan.
        promotion: what was done.
        page: the verdict's page, if what was done is not what the gate decided.
    """
    client, parent = connect(settings.mlflow), start_day(settings, plan)
    tags = {
        "registered_version": promotion["version"],
        "aliases": ", ".join(promotion["aliases"]),
        TAG_DECISION: promotion["decision"],
    }
    if page is not None:
        tags["mlflow.note.content"] = f"**{plan.ds}**: {promotion['decision']}: {promotion['reason']}"
        _again(lambda: client.log_text(parent, page, PAGE_FILE))
    _set_tags(client, parent, tags | ({TAG_FORCED: promotion["forced"]} if promotion["forced"] else {}))
    _again(lambda: client.log_dict(parent, dict(promotion), PROMOTION_FILE))


def log_beside(settings: Settings, plan: Plan, folder: str, files: Mapping[str, Mapping[str, Any] | str]) -> None:
    """Keep files, data or text, in a folder of the parent run's artifacts; nothing else of the run changes."""
    client = connect(settings.mlflow)
    with answering(settings.mlflow):
        see_run(settings.mlflow, plan.mlflow_run_id)
        for name, content in files.items():
            where = f"{folder}/{name}"
            if isinstance(content, str):
                _again(functools.partial(client.log_text, plan.mlflow_run_id, content, where))
            else:
                _again(functools.partial(client.log_dict, plan.mlflow_run_id, dict(content), where))


# The model


def _log_model(
    run: ModelRun, folder: str, requests: Sequence[Mapping[str, Any]], scores: pa.Table, scratch: Path, digest: str
) -> str:
    """Write the model as MLflow keeps it and send it; it stays PENDING until it has been loaded again."""
    import mlflow
    import pandas as pd
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    client = run._client
    logged = _again(
        lambda: client.create_logged_model(
            experiment_id(run.settings.mlflow),
            name=run.model_name,
            source_run_id=run.run_id,
            tags={TAG_DAY: str(run.plan.ds), TAG_PLAN: run.plan.plan_id, TAG_MODEL_DIGEST: digest},
            model_type=run.model_name,
        )
    )
    check = scratch / CHECK_FOLDER
    check.mkdir()
    (check / CHECK_REQUESTS).write_text(json.dumps(requests), encoding="utf-8")
    (check / CHECK_SCORES).write_text(json.dumps(scores.to_pylist()), encoding="utf-8")
    with _on_disk(folder) as local:
        mlflow.pyfunc.save_model(
            path=scratch / "logged",
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                run_id=run.run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            ),
            python_model=Path(__file__).with_name("mlflow_model.py"),
            artifacts={MODEL_FOLDER: str(local), CHECK_FOLDER: str(check)},
            signature=signature(run.plan.schema),
            input_example=pd.DataFrame(list(requests[:1])),
            pip_requirements=requirements(),
        )
    _again(lambda: client.log_model_artifacts(logged.model_id, str(scratch / "logged")))
    _again(lambda: client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, step=0)]))
    return str(logged.model_id)


def model_id_uri(model_id: str) -> str:
    """Return the address of a logged model."""
    return f"models:/{model_id}"


@contextmanager
def fetched_folder(settings: MlflowSettings, model_id: str, folder: str) -> Iterator[str]:
    """Give the local path of a folder kept with a logged model, ``model`` or ``check``, for as long as the block lasts.

    Where MLflow's files are on this disk it is the folder itself; else a copy, which is removed at the end.
    """
    import mlflow

    location = _location(settings, model_id)
    with _room_for(location) as room:
        yield str(mlflow.artifacts.download_artifacts(f"{location}/artifacts/{folder}", dst_path=room))


def _location(settings: MlflowSettings, model_id: str) -> str:
    client = connect(settings)
    return str(_again(lambda: client.get_logged_model(model_id)).artifact_location)


@contextmanager
def _room_for(location: str) -> Iterator[str | None]:
    """Give a folder for what is downloaded from an address of MLflow's; None where that is read in place.

    Without one MLflow makes a folder for each download, and never removes it.
    """
    if urllib.parse.urlsplit(location).scheme in ("", "file"):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="onetrans-model-") as room:
        yield room


def compare_scores(
    settings: MlflowSettings, model_id: str, model_uri: str, requests: Sequence[Mapping[str, Any]], scores: pa.Table
) -> float:
    """Load a model from MLflow, score ``requests`` and return the largest difference from ``scores``.

    Args:
        settings: where MLflow is.
        model_id: the logged model.
        model_uri: by which it is loaded: its own address, or that of a version.
        requests: what it is asked.
        scores: what it should answer.

    Raises:
        BadDataError: if the loaded model answers for other candidates.
    """
    import mlflow
    import numpy as np
    import pandas as pd

    with _room_for(_location(settings, model_id)) as room:
        # Else it compares package versions for a second.
        model = mlflow.pyfunc.load_model(model_uri, suppress_warnings=True, dst_path=room)
        answer = model.predict(pd.DataFrame(list(requests)))
    if answer["item_id"].tolist() != scores["item_id"].to_pylist():
        raise BadDataError(f"{model_uri} answers for other candidates than it was asked about")
    return max(float(np.abs(answer[task].to_numpy() - scores[task].to_numpy()).max()) for task in ("ctr", "cvr"))


def signature(schema: FeatureSchema) -> ModelSignature:
    """Return the model's signature: a request as :mod:`onetrans.requests` describes it, and its scores.

    A hashed value is declared ``any``: it may be text, or the whole number it hashes to.  So are a vector's numbers:
    MLflow refuses whole numbers where it is told ``double``, and JSON writes 3.0 as 3.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Object, Property, Schema, TensorSpec

    kinds: dict[Kind, Any] = {"hashed": AnyType(), "bucketized": DataType.double, "vector": Array(AnyType())}

    def properties(features: tuple[Feature, ...]) -> list[Property]:
        return [Property(f.name, kinds[f.kind], required=False) for f in features]

    event = Object([Property("ts", DataType.long), *properties(schema.of_side("event"))])
    candidate = Object([Property("item_id", DataType.string), *properties(schema.of_side("item"))])
    columns: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.string, "request_id", required=False),
        ColSpec(DataType.long, "ts"),
    ]
    columns.append(ColSpec(Object(properties(schema.of_side("user"))), "user"))
    if schema.of_side("context"):
        columns.append(ColSpec(Object(properties(schema.of_side("context"))), "context"))
    if schema.sequences:
        columns.append(ColSpec(Object([Property(s.name, Array(event)) for s in schema.sequences]), "sequences"))
    columns.append(ColSpec(Array(candidate), "candidates"))
    outputs = Schema(
        [
            ColSpec(DataType.string, "request_id", required=False),
            ColSpec(DataType.string, "item_id"),
            ColSpec(DataType.double, "ctr"),
            ColSpec(DataType.double, "cvr"),
        ]
    )
    return ModelSignature(inputs=Schema(columns), outputs=outputs)


def requirements() -> list[str]:
    """Return what a process needs to load the model, as installed here: nothing is inferred by running it."""
    from importlib.metadata import version

    needed = ("mlflow", "torch", "numpy", "pandas", "pyarrow", "safetensors", "xxhash")
    return [f"onetrans=={__version__}", *(f"{name}=={version(name)}" for name in needed)]


def folder_digest(folder: str) -> str:
    """Return a hash of all files of a folder, names and contents."""
    total = hashlib.sha256()
    base = storage.resolve(folder)
    for file in storage.list_files(base):
        total.update(file.removeprefix(base).encode())
        total.update(hashlib.sha256(storage.read_bytes(file)).digest())
    return total.hexdigest()


# Audits


def audit_verdicts(plan: Plan) -> dict[str, Any]:
    """Return the audit's verdict on exactly the files a plan reads, by folder; None where there is none."""
    folders = dict.fromkeys(file.rsplit("/", 1)[0] for file in (*plan.train_files, *plan.evaluation_files))
    return {folder: _read_verdict(storage.join(folder, AUDIT_FILE)) for folder in folders}


def _read_verdict(path: str) -> Any:
    return storage.read_json(path) if storage.exists(path) else None


def _audit_summary(audits: Mapping[str, Any]) -> str:
    passed = sum(1 for verdict in audits.values() if verdict and verdict.get("passed"))
    return f"{passed} of {len(audits)} days passed"


# Small parts


def _find(settings: MlflowSettings, tags: Mapping[str, str]) -> Run | None:
    client, where = connect(settings), " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found = _again(
        lambda: client.search_runs([experiment_id(settings)], where, order_by=["attributes.start_time"], max_results=1)
    )
    return found[0] if found else None


def _find_or_create(
    settings: MlflowSettings, wanted: Mapping[str, str], name: str, tags: Mapping[str, str]
) -> tuple[Run, bool]:
    """Return the oldest run with the wanted tags and whether it had to be created."""
    client, experiment = connect(settings), experiment_id(settings)
    with one_at_a_time(settings.tracking_uri):
        run = _find(settings, wanted)
        if run is not None:
            return run, False
        return _again(lambda: client.create_run(experiment, run_name=name, tags=dict(tags))), True


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(name, str(value)[:6000]) for name, value in _flat(params)]
    for start in range(0, len(entries), 100):
        _again(functools.partial(client.log_batch, run_id, params=entries[start : start + 100]))


def _log_metrics(client: MlflowClient, run_id: str, metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    entries = [Metric(name, value, now, 0) for name, value in metrics.items()]
    _again(lambda: client.log_batch(run_id, metrics=entries))


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, Any]) -> None:
    from mlflow.entities import RunTag

    entries = [RunTag(name, str(value)) for name, value in tags.items()]
    _again(lambda: client.log_batch(run_id, tags=entries))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _first_rows(file: str, count: int) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, inner = storage.open_filesystem(file)
    return pa.Table.from_batches([next(pq.ParquetFile(inner, filesystem=filesystem).iter_batches(batch_size=count))])


@contextmanager
def _on_disk(path: str) -> Iterator[Path]:
    """Give a file or folder as a local path; one in an object store is copied for the while."""
    if storage.is_local(path):
        yield storage.local_path(path)
        return
    with tempfile.TemporaryDirectory(prefix="onetrans-copy-") as scratch:
        target = Path(scratch) / path.rstrip("/").rsplit("/", 1)[-1]
        files = storage.list_files(path)
        for file in files or [path]:
            copy = target / file.removeprefix(path.rstrip("/") + "/") if files else target
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(storage.read_bytes(file))
        yield target


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error; MLflow's name the whole address, with a password that stands in it."""
    return without_login((str(error).splitlines() or [""])[0])
