"""Settings: every value a deployment chooses, read once from a TOML file and the environment.

Order of precedence: environment variable, configuration file, default.  The
file is ``$ONETRANS_CONFIG`` (or ``onetrans.toml`` in the working directory if it
exists); a variable is named ``ONETRANS_<SECTION>_<FIELD>``, for example
``ONETRANS_SPARK_MASTER``.  Secrets have no field here: they come from the
environment of the library that needs them (``AWS_*``, ``MLFLOW_TRACKING_PASSWORD``)
or from an Airflow connection.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from onetrans.days import parse_day
from onetrans.errors import BadConfigError, holds_password

SOURCE_KINDS = ("files", "kuairand")
"""Sources of the repository; any other is a class elsewhere."""

Preset = Literal["tiny", "small", "base", "large"]
TrainingPrecision = Literal["auto", "float32", "bfloat16"]
ServingPrecision = Literal["float32", "bfloat16"]
Place = Literal["worker", "kubernetes"]
GateMode = Literal["enabled", "dry_run", "off"]


OWN_FILE = "onetrans.toml"
"""Configuration file of the working directory."""

NOT_SETTINGS = frozenset({"ONETRANS_CONFIG", "ONETRANS_TRACEBACK", "ONETRANS_SERVING_TOKEN", "ONETRANS_DEMO_HOME"})
"""Variables of this name's family that are no field: file to read, whether to show tracebacks, a secret, the demo's."""


_UNDER_ROOT = {
    ("lake", "warehouse"): "lake",
    ("training", "runs"): "runs",
    ("mlflow", "artifacts"): "mlflow/artifacts",
}
"""Setting -> its place under ``store.root`` where nobody names it; ``audit.data_docs`` lies beside the warehouse."""

_ADDRESSES = (
    ("lake", "catalog_uri", "PGPASSWORD, or the whole address as ONETRANS_LAKE_CATALOG_URI"),
    ("mlflow", "tracking_uri", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ("airflow", "database", "PGPASSWORD"),
)
"""Section, field, and where a password goes that would stand in the address."""


@dataclass(frozen=True)
class SourceSettings:
    """Where raw events come from."""

    kind: str = "files"
    """``files``: the contract of docs/input.md; ``kuairand``: that public log; ``package.module:Class``: your own."""
    path: str = "var/raw"
    """Folder (or s3:// prefix) that holds the raw log."""
    schema: str = ""
    """Feature schema file; empty: ``schema.toml`` in ``path``, or the one that comes with the source."""
    absent_days: tuple[date, ...] = ()
    """Days the log lost for good, such as an outage; the days after them are built and trained on without them."""
    wait_hours: float = 12.0
    """Hours after the end of a day for which ``feature_tables`` waits for its files; then the day fails."""

    def __post_init__(self) -> None:
        _within("source.wait_hours", self.wait_hours, 0.0, 36.0)
        if self.kind not in SOURCE_KINDS and not re.fullmatch(r"\w+(\.\w+)*:\w+", self.kind):
            raise BadConfigError(
                f"source.kind = {self.kind!r} is none of {', '.join(SOURCE_KINDS)}, nor a class of your own, written "
                "package.module:Class"
            )


@dataclass(frozen=True)
class StoreSettings:
    """Where files are kept, and how an object store is reached; credentials come from ``AWS_*`` alone."""

    root: str = "var"
    """Folder or s3://bucket/prefix of tables, runs, reports and MLflow's artifacts, where none is named for them."""
    endpoint: str = ""
    """Address of a service that speaks S3; empty: ``AWS_ENDPOINT_URL``, else AWS itself."""
    region: str = ""
    """Region of the buckets; empty: ``AWS_REGION``, else the bucket's own."""
    path_style: bool = True
    """At an ``endpoint``: the bucket stands in the path of an address; false: in the host's name, as at AWS."""

    def __post_init__(self) -> None:
        if self.endpoint and not re.fullmatch(r"https?://[^/@\s]+/?", self.endpoint):
            raise BadConfigError(
                "store.endpoint must be http://HOST[:PORT] or https://..., without a path, name or key"
            )


@dataclass(frozen=True)
class LakeSettings:
    """Where tables are kept."""

    warehouse: str = "var/lake"
    """Folder (or s3:// prefix) of all table files, staged and published."""
    catalog_uri: str = ""
    """Address of the Iceberg catalog (SQLAlchemy or REST); empty: a SQLite file in ``warehouse``, or in ``var`` if that
    is in an object store."""
    catalog_type: Literal["sql", "rest"] = "sql"
    """Kind of Iceberg catalog: ``sql`` or ``rest``."""
    namespace: str = "ranking"
    """Iceberg namespace of the tables."""
    max_quarantine_share: float = 0.02
    """Share of a table's rows of one day that may be refused before the day stops."""

    def __post_init__(self) -> None:
        _within("lake.max_quarantine_share", self.max_quarantine_share, 0.0, 1.0)
        if self.catalog_type == "rest" and not self.catalog_uri:
            raise BadConfigError("lake.catalog_type = 'rest' needs the server's address in lake.catalog_uri")


@dataclass(frozen=True)
class AuditSettings:
    """What the audit of a staged day tolerates, and where its pages go."""

    data_docs: str = ""
    """Folder (or s3:// prefix) of the Data Docs site; empty: ``data_docs`` beside the warehouse."""
    address: str = ""
    """Where people open that site in a browser, for links in logs; empty: links name the files."""
    max_rows_in_memory: int = 5_000_000
    """Most rows the audit holds in its own memory (1.3 GB); a larger day is audited by Spark, with the same suite."""
    trailing_days: int = 7
    """Published days before the audited one; their median row count is what a day is compared with."""
    min_row_share: float = 0.5
    """The audit warns when a day has fewer rows than this share of that median; a fifth of it fails the day."""
    max_row_share: float = 2.0
    """The audit warns when a day has more rows than this multiple of that median; five times it fails the day."""
    min_click_rate: float = 0.0005
    """Least share of impressions that are clicked; below it the day fails."""
    max_click_rate: float = 0.95
    """Largest share of impressions that are clicked; above it the day fails."""
    max_missing_share: float = 0.95
    """The audit warns when a feature is missing from more than this share of the rows."""
    max_rate_change: float = 1.5
    """The audit warns when a label's rate is this many times its median of the trailing days; twice that fails it."""
    max_shift: float = 0.25
    """The audit warns when a feature's population stability index against the trailing days exceeds this."""
    max_quiet_hours: float = 6.0
    """The audit warns when nothing happened in the last hours of a day, more of them than this: a log cut off early."""
    max_unknown_share: float = 0.5
    """The audit warns when more than this share of requests or candidates has no row of user or item features."""

    def __post_init__(self) -> None:
        _at_least("audit.max_rows_in_memory", self.max_rows_in_memory, 1)
        _at_least("audit.trailing_days", self.trailing_days, 1)
        _within("audit.min_row_share", self.min_row_share, 0.0, 1.0)
        _at_least("audit.max_row_share", self.max_row_share, 1.0)
        _within("audit.max_click_rate", self.max_click_rate, 0.0, 1.0)
        _within("audit.min_click_rate", self.min_click_rate, 0.0, self.max_click_rate)
        _within("audit.max_missing_share", self.max_missing_share, 0.0, 1.0)
        _at_least("audit.max_rate_change", self.max_rate_change, 1.0)
        _at_least("audit.max_shift", self.max_shift, 0.0)
        _within("audit.max_quiet_hours", self.max_quiet_hours, 0.0, 24.0)
        _within("audit.max_unknown_share", self.max_unknown_share, 0.0, 1.0)


@dataclass(frozen=True)
class SparkSettings:
    """How Spark is started."""

    master: str = "local[2]"
    """Spark master: ``local[N]``, ``spark://...``, ``yarn`` or ``k8s://...``."""
    driver_memory: str = "1g"
    """Heap of the driver, which does all the work in local mode; from 4g on Java compiles fully, for long jobs."""
    shuffle_partitions: int = 4
    """Partitions of a shuffle, one per half a million rows of a day's log: a Python worker holds one whole."""
    conf: Mapping[str, str] = field(default_factory=dict)
    """Any further Spark properties, taken as they are."""

    def __post_init__(self) -> None:
        _at_least("spark.shuffle_partitions", self.shuffle_partitions, 1)


@dataclass(frozen=True)
class TrainingSettings:
    """What is trained each day, and on which days."""

    preset: Preset = "small"
    """Size of both models."""
    lookback_days: int = 14
    """Days read when there is no earlier checkpoint to continue from."""
    batch_size: int = 512
    """Impressions per optimizer step, reached by packing whole requests; 2048 where a day has millions."""
    epochs: int = 1
    """Passes over the training days; the published recipe is one."""
    click_weight: float = 1.0
    """Weight of the click loss."""
    conversion_weight: float = 1.0
    """Weight of the conversion loss, which is a mean over clicked impressions."""
    dense_lr: float = 0.0
    """Learning rate of everything but the embedding tables, for both models; 0: the preset's."""
    embedding_lr: float = 0.0
    """Learning rate of the embedding tables, for both models; 0: the preset's."""
    onetrans: str = ""
    """What OneTrans has other than its preset, as in ``relative_bias = true, weight_decay = 0.1`` (docs/model.md)."""
    dcnv2_din: str = ""
    """The same for the baseline, as in ``mlp_hidden = [256, 128], dropout = 0.1``."""
    admit_after: int = 0
    """Lookups in training before an id gets an embedding of its own; until then all such ids share one. 0: at once."""
    evict_after_days: int = 0
    """Days without a lookup in training after which an id's embedding starts afresh; 0: never."""
    seed: int = 17
    """Seed of initial weights and of the order of rows."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    precision: TrainingPrecision = "auto"
    """Of matrix products, in training and scoring: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on a GPU alone."""
    recompute: bool = False
    """Compute a block of OneTrans again in the backward pass instead of keeping it: less memory, more time."""
    processes: int = 1
    """Processes that train one model together on this machine, each on a GPU of its own where there are GPUs."""
    shard_rows: int = 0
    """Embedding tables of at least so many rows are divided over the processes by TorchRec, an extra; 0: none is."""
    rank_timeout_seconds: float = 600.0
    """A process that hears nothing from the others for so long ends the training; the next try goes on."""
    threads: int = 0
    """CPU threads of one training process; 0: all cores, shared evenly between its processes."""
    checkpoint_seconds: float = 120.0
    """Time between two checkpoints: what a killed training loses at most."""
    runs: str = "var/runs"
    """Folder (or s3:// prefix) of plans, checkpoints and scores."""

    def __post_init__(self) -> None:
        _one_of("training.preset", self.preset, get_args(Preset))
        _device("training.device", self.device)
        _one_of("training.precision", self.precision, get_args(TrainingPrecision))
        _at_least("training.lookback_days", self.lookback_days, 1)
        _at_least("training.batch_size", self.batch_size, 1)
        _at_least("training.epochs", self.epochs, 1)
        _at_least("training.click_weight", self.click_weight, 0)
        _at_least("training.conversion_weight", self.conversion_weight, 0)
        _at_least("training.dense_lr", self.dense_lr, 0)
        _at_least("training.embedding_lr", self.embedding_lr, 0)
        _at_least("training.admit_after", self.admit_after, 0)
        _at_least("training.evict_after_days", self.evict_after_days, 0)
        _at_least("training.checkpoint_seconds", self.checkpoint_seconds, 0)
        _at_least("training.processes", self.processes, 1)
        _at_least("training.shard_rows", self.shard_rows, 0)
        _at_least("training.rank_timeout_seconds", self.rank_timeout_seconds, 1)
        _at_least("training.threads", self.threads, 0)


@dataclass(frozen=True)
class GateSettings:
    """When a candidate replaces the champion."""

    mode: GateMode = "enabled"
    """``enabled``: promote a winner; ``dry_run``: judge but leave the alias; ``off``: do not judge."""
    min_lift_ctr_auc: float = 0.0
    """The lower bound of the CTR AUC lift over the baseline must exceed this."""
    min_lift_cvr_auc: float = 0.0
    """The lower bound of the CVR AUC lift over the baseline must exceed this."""
    max_loss_to_champion: float = 0.005
    """How much lower than the champion's either AUC might be; the lower bound of the difference must stay above."""
    confidence: float = 0.90
    """Two-sided level of the bootstrap intervals."""
    window_days: int = 1
    """Days that are pooled: the evaluation day and those before it in the same chain of trainings."""
    agreeing_days: int = 1
    """Days in a row, the evaluation day the last, on each of which both AUCs must be above the baseline's."""
    replicates: int = 1000
    """Bootstrap replicates, each a draw of users with replacement."""
    min_rows: int = 1000
    """Fewest impressions in the window on which a promotion may rest."""
    min_positives: int = 100
    """Fewest clicks, and fewest conversions, likewise."""
    min_users: int = 100
    """Fewest users, likewise."""
    max_uauc_loss: float = 0.01
    """UAUC of either task may fall behind the baseline's by at most this."""
    max_log_loss_increase: float = 0.02
    """Log loss of either task may exceed the baseline's by at most this share."""
    max_calibration_error: float = 0.25
    """Mean prediction over mean label may differ from 1 by at most this, for either task."""
    seed: int = 17
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        _one_of("gate.mode", self.mode, get_args(GateMode))
        if not 0.5 <= self.confidence < 1.0:
            raise BadConfigError(f"gate.confidence = {self.confidence} must be at least 0.5 and below 1")
        # Fewer draws beyond a bound than this, and the bound is one draw's chance.
        beyond = self.replicates * (1.0 - self.confidence) / 2.0
        if beyond < 5.0 - 1e-9:
            least = math.ceil(10.0 / (1.0 - self.confidence) - 1e-6)
            raise BadConfigError(
                f"gate.replicates = {self.replicates} must be at least {least} with gate.confidence = {self.confidence}"
            )
        for name in ("window_days", "agreeing_days", "min_rows", "min_positives", "min_users"):
            _at_least(f"gate.{name}", getattr(self, name), 1)
        for name in ("max_loss_to_champion", "max_uauc_loss", "max_log_loss_increase", "max_calibration_error"):
            _at_least(f"gate.{name}", getattr(self, name), 0)
        for name in ("min_lift_ctr_auc", "min_lift_cvr_auc"):
            _within(f"gate.{name}", getattr(self, name), -1.0, 1.0)


@dataclass(frozen=True)
class MlflowSettings:
    """Where runs and models are recorded."""

    tracking_uri: str = "sqlite:///var/mlflow/mlflow.db"
    """MLflow tracking store or server."""
    address: str = ""
    """Where people open MLflow in a browser, for links in logs; empty: ``tracking_uri``, if that is a server."""
    artifacts: str = "var/mlflow/artifacts"
    """Artifact root of a new experiment when the store is a database; a server chooses its own."""
    experiment: str = "onetrans"
    """Experiment that holds one parent run per day."""
    registered_model: str = "onetrans-ranker"
    """Name in the model registry."""


@dataclass(frozen=True)
class ScoringSettings:
    """What the champion scores at the end of each day."""

    candidates: str = ""
    """Folder (or s3:// prefix) of ``ds=DAY/*.parquet`` with user_id and item_id; ``popular``: the items shown most,
    for each user of the day; empty: nothing is scored."""
    popular_items: int = 100
    """Items of a user with ``popular``."""
    parts: int = 4
    """Parts in which the users of a day are scored; a job that is run again goes on with those that are missing."""

    def __post_init__(self) -> None:
        _at_least("scoring.popular_items", self.popular_items, 1)
        _at_least("scoring.parts", self.parts, 1)


@dataclass(frozen=True)
class ServingSettings:
    """How ranking requests are answered. A bearer token comes from ``ONETRANS_SERVING_TOKEN``."""

    host: str = "127.0.0.1"
    """Interface the service listens on; by default this machine alone."""
    port: int = 8765
    """Its port; 0 takes a free one."""
    device: str = "cpu"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    precision: ServingPrecision = "float32"
    """Of matrix products: ``float32``, or ``bfloat16``, whose scores differ in the third digit."""
    threads: int = 1
    """CPU threads of one forward pass; 0: all cores."""
    cache_mib: int = 256
    """Memory for keys and values of users, in MiB; 0 encodes every request afresh."""
    batch_candidates: int = 512
    """Most candidates scored together; a request is never divided."""
    batch_ms: float = 100.0
    """Time that scoring together may take, judged by how fast recent work went; a request alone may take longer."""
    batch_wait_ms: float = 2.0
    """Longest time a request waits for others to be scored with; 0 scores what is there."""
    deadline_ms: int = 1000
    """A request is answered within this time or not at all; a client may ask for less."""
    queue_requests: int = 256
    """Most requests that wait; those beyond are turned away with 429."""
    max_requests: int = 32
    """Most requests of one call."""
    max_candidates: int = 1000
    """Most candidates of one request."""
    max_events: int = 4000
    """Most past events of one request, all sequences together."""
    max_body_kib: int = 4096
    """Largest body of a call, in KiB."""
    body_timeout_s: float = 5.0
    """Time a client has to send the head of a call, and then its body."""
    poll_s: float = 30.0
    """Time between two looks at the alias the served model is named by."""

    def __post_init__(self) -> None:
        _device("serving.device", self.device)
        _one_of("serving.precision", self.precision, get_args(ServingPrecision))
        _within("serving.port", self.port, 0, 65535)
        for name in ("threads", "cache_mib", "batch_wait_ms"):
            _at_least(f"serving.{name}", getattr(self, name), 0)
        for name in (
            "batch_candidates", "deadline_ms", "queue_requests", "max_requests", "max_candidates", "max_events",
            "max_body_kib",
        ):  # fmt: skip
            _at_least(f"serving.{name}", getattr(self, name), 1)
        for name in ("body_timeout_s", "poll_s", "batch_ms"):
            _at_least(f"serving.{name}", getattr(self, name), 0.1)


@dataclass(frozen=True)
class RetentionSettings:
    """How long ``onetrans retain`` keeps what was replaced."""

    snapshot_days: float = 30.0
    """Days for which a replaced version of a table stays readable, counted from its replacement."""
    staging_days: float = 3.0
    """Days after which files that nothing names are removed; longer than the longest job."""
    checkpoint_days: int = 30
    """Days before the newest planned one for which checkpoints stay; at least ``training.lookback_days``."""
    reading_days: float = 7.0
    """Days since anything was written in a plan's folder for which its run counts as reading what it pins."""

    def __post_init__(self) -> None:
        _at_least("retention.snapshot_days", self.snapshot_days, 1.0)
        _at_least("retention.staging_days", self.staging_days, 1.0)
        _at_least("retention.checkpoint_days", self.checkpoint_days, 1)
        _at_least("retention.reading_days", self.reading_days, 1.0)


@dataclass(frozen=True)
class LaunchSettings:
    """Where Airflow runs trainings and evaluations."""

    place: Place = "worker"
    """``worker``: processes of the Airflow worker; ``kubernetes``: a pod of its own for each."""
    pod_template: str = ""
    """The pod, as a YAML file, for ``kubernetes``: your copy of ``infra/kubernetes/training_pod.yaml``, with image,
    GPUs, nodes, secrets and memory of your cluster."""

    def __post_init__(self) -> None:
        _one_of("launch.place", self.place, get_args(Place))


@dataclass(frozen=True)
class AirflowSettings:
    """What Airflow runs at once and whom it tells; the first two are of the local one (``make ui``) alone."""

    database: str = ""
    """PostgreSQL, ``postgresql://USER@HOST/NAME``, the password from ``PGPASSWORD``; empty: a SQLite file."""
    schedule: bool = False
    """Whether it starts each day by the clock; otherwise only runs that are asked for."""
    spark_slots: int = 3
    """Slots of the pool ``ranking_spark``: builds of tables, audits and candidate scores, all days together."""
    gpu_slots: int = 2
    """Slots of the pool ``ranking_gpu``: trainings and evaluations, all days together; the two models take one each."""
    notify: str = ""
    """Airflow connections, separated by commas, over which failures and missed deadlines are told besides the log."""
    deadline_hours: float = 36.0
    """Hours after the beginning of a day (UTC) by which its model has to be promoted or declined; 0: no deadline."""

    def __post_init__(self) -> None:
        _within("airflow.deadline_hours", self.deadline_hours, 0.0, 24.0 * 30)
        _at_least("airflow.spark_slots", self.spark_slots, 1)
        _at_least("airflow.gpu_slots", self.gpu_slots, 1)


@dataclass(frozen=True)
class Settings:
    """All settings of a deployment."""

    source: SourceSettings = field(default_factory=SourceSettings)
    """Where raw events come from."""
    store: StoreSettings = field(default_factory=StoreSettings)
    """Where files are kept, and how an object store is reached."""
    lake: LakeSettings = field(default_factory=LakeSettings)
    """Where tables are kept."""
    audit: AuditSettings = field(default_factory=AuditSettings)
    """What the audit of a staged day tolerates, and where its pages go."""
    spark: SparkSettings = field(default_factory=SparkSettings)
    """How Spark is started."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """What is trained each day."""
    gate: GateSettings = field(default_factory=GateSettings)
    """When a candidate replaces the champion."""
    mlflow: MlflowSettings = field(default_factory=MlflowSettings)
    """Where runs and models are recorded."""
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    """What the champion scores at the end of each day."""
    serving: ServingSettings = field(default_factory=ServingSettings)
    """How ranking requests are answered."""
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    """How long what was replaced is kept."""
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    """Where Airflow runs trainings and evaluations."""
    airflow: AirflowSettings = field(default_factory=AirflowSettings)
    """What Airflow runs at once, and whom it tells."""


def config_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the configuration file in force: ``$ONETRANS_CONFIG``, else ``onetrans.toml`` here if there is one.

    Raises:
        BadConfigError: if ``$ONETRANS_CONFIG`` names no file.
    """
    named = (os.environ if environ is None else environ).get("ONETRANS_CONFIG", "")
    if named and not Path(named).is_file():
        raise BadConfigError(f"ONETRANS_CONFIG names {named}, which is not a file")
    path = Path(named or OWN_FILE)
    return path if path.is_file() else None


def setting_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the environment variables that name settings, or mean to: they go before the file."""
    names = os.environ if environ is None else environ
    return sorted(name for name in names if name.startswith("ONETRANS_") and name not in NOT_SETTINGS)


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings of this process.

    Raises:
        BadConfigError: on an unknown section, field or variable, or a value of the wrong type or range.
    """
    environ = os.environ if environ is None else environ
    path = config_file(environ)
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise BadConfigError(f"configuration file {path} is not valid TOML: {error}") from error
    sections = {f.name: get_type_hints(Settings)[f.name] for f in fields(Settings)}
    unknown = sorted(set(data) - set(sections))
    if unknown:
        raise BadConfigError(f"{path}: unknown section [{unknown[0]}]; known are {', '.join(sections)}")
    _refuse_unknown_variables(environ, sections)
    _refuse_secrets(data, str(path))
    root = _section(StoreSettings, "store", data.get("store", {}), environ, str(path)).root
    for (section, name), folder in _UNDER_ROOT.items():
        if isinstance(data.get(section, {}), Mapping):
            data[section] = {name: f"{root.rstrip('/')}/{folder}", **data.get(section, {})}
    built = {name: _section(cls, name, data.get(name, {}), environ, str(path)) for name, cls in sections.items()}
    return Settings(**built)


def _refuse_secrets(data: Mapping[str, Any], path: str) -> None:
    """Refuse a password or key in the configuration file: it is copied, printed and kept in version control."""
    for section, name, instead in _ADDRESSES:
        value = data.get(section, {}).get(name, "") if isinstance(data.get(section), Mapping) else ""
        if holds_password(str(value)):
            raise BadConfigError(f"{path}: {section}.{name} holds a password; leave it out, and set {instead}")
    spark = data.get("spark", {})
    conf = spark.get("conf", {}) if isinstance(spark, Mapping) else {}
    for name in conf if isinstance(conf, Mapping) else ():
        if re.search(r"fs\.s3a?\..*(access\.key|secret\.key|session\.token)$", str(name)):
            raise BadConfigError(
                f"{path}: spark.conf names {name}; leave it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )


def as_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that make another process read exactly these settings (free-form maps excepted)."""
    return {
        f"ONETRANS_{section.name}_{f.name}".upper(): _as_text(getattr(getattr(settings, section.name), f.name))
        for section in fields(Settings)
        for f in fields(getattr(settings, section.name))
        if not isinstance(getattr(getattr(settings, section.name), f.name), Mapping)
    }


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _refuse_unknown_variables(environ: Mapping[str, str], sections: Mapping[str, type[Any]]) -> None:
    known = {f"ONETRANS_{s}_{f.name}".upper() for s, cls in sections.items() for f in fields(cls)}
    for name in setting_variables(environ):
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"did you mean {close[0]}?" if close else "see docs/configuration.md"
            raise BadConfigError(f"environment variable {name} names no setting; {hint}")


def _section(cls: type[Any], section: str, data: Any, environ: Mapping[str, str], path: str) -> Any:
    if not isinstance(data, Mapping):
        raise BadConfigError(f"{path}: {section} must be a section, written [{section}]")
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise BadConfigError(f"{path}: [{section}] has no field {unknown[0]!r}; it has {', '.join(hints)}")
    values: dict[str, Any] = {}
    for name, kind in hints.items():
        variable = f"ONETRANS_{section}_{name}".upper()
        if variable in environ:
            values[name] = _convert(environ[variable], kind, variable)
        elif name in data:
            values[name] = _convert(data[name], kind, f"{path}: {section}.{name}")
    return cls(**values)


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Return ``value`` as ``kind``; text from the environment is parsed, anything else must fit already."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise BadConfigError(f"{where} = {value!r} is none of {', '.join(map(str, choices))}")
        return value
    if get_origin(kind) in (Mapping, dict, typing.get_origin(Mapping[str, str])):
        if not isinstance(value, Mapping):
            raise BadConfigError(f"{where} must be a table of names and values, set in the configuration file")
        return types.MappingProxyType({str(k): str(v) for k, v in value.items()})
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise BadConfigError(f"{where} = {value!r} is neither true nor false")
        return value.lower() == "true"
    if get_origin(kind) is tuple:
        return _days(value, where)
    if kind in (int, float) and isinstance(value, str):
        try:
            return kind(value)
        except ValueError as error:
            raise BadConfigError(f"{where} = {value!r} is not a number") from error
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadConfigError(f"{where} = {value!r} is not of type {kind.__name__}")
    return value


def _days(value: Any, where: str) -> tuple[date, ...]:
    """Return a list of days in order; a variable separates them by commas."""
    parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str | date) for part in parts):
        raise BadConfigError(f"{where} = {value!r} is not a list of days, each written YYYY-MM-DD")
    try:
        return tuple(sorted({parse_day(part) for part in parts}))
    except BadConfigError as error:
        raise BadConfigError(f"{where}: {error}") from error


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadConfigError(f"{name} = {value} must be in {low}..{high}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:  # nor is NaN
        raise BadConfigError(f"{name} = {value} must be at least {low}")
    if value == math.inf:
        raise BadConfigError(f"{name} = {value} must be finite")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BadConfigError(f"{name} = {value!r} is none of {', '.join(choices)}")


def _device(name: str, value: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise BadConfigError(f"{name} = {value!r} must be auto, cpu, cuda or cuda:N")
