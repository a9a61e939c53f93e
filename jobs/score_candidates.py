"""Table ``candidate_scores``: what the champion expects of each user's candidates once a day is over.

Reads the day's published features and the tails of behaviours at its end, puts them together as the rows of
``training_requests`` are (:func:`jobs.training_requests.training_requests`), with one request per user at the first
instant after the day, and scores these on the executors, Arrow batch by Arrow batch.  A worker process loads the model
once.

Users are scored in ``scoring.parts`` parts, each finished by a file of its own.  Run again after a failure, the job
goes on with the parts that are missing, as long as the champion, what was read and the candidates are the same; a day
that is finished is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyspark import Broadcast
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs import objects
from jobs.contract import context_columns
from jobs.impressions import from_clock
from jobs.runner import EXIT_CODES, Opened, add_days, audit_and_publish, chosen_days, guarded, present, telling
from jobs.training_requests import training_requests
from jobs.workspace import Workspace, count_rows, write
from onetrans import storage
from onetrans.artifact import load_model
from onetrans.days import day_bounds
from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.lake import SCORES, Staged
from onetrans.loader import batch_of
from onetrans.models import RankingModel
from onetrans.process import Parser
from onetrans.schema import CONTEXT_FROM_CLOCK, FeatureSchema
from onetrans.serving.source import ModelSource, opened

TABLE = SCORES
POPULAR = "popular"
"""Value of ``scoring.candidates`` for the items shown most."""

COLUMNS = "user_id string, item_id string, rank int, ctr double, cvr double, ctcvr double, model_version string"

_CANDIDATES_AT_ONCE = 4096

logger = logging.getLogger(__name__)


# Candidates


def candidates_of(work: Workspace, ds: date) -> DataFrame:
    """Return the pairs of user and item to score, each once, with the context columns that were given.

    Raises:
        NotReadyError: if the day's folder of candidates is not there.
        BadDataError: if a column is missing or a key is empty.
    """
    place = work.settings.scoring.candidates
    if place == POPULAR:
        return _popular(work, ds)
    folder = storage.join(storage.resolve(place), f"ds={ds}")
    files = storage.list_files(folder, ".parquet")
    if not files:
        raise NotReadyError(f"there are no candidates to score for {ds}: {folder} holds no .parquet file")
    given = work.spark.read.parquet(*objects.readable(work.spark, files))
    for name in ("user_id", "item_id"):
        if name not in given.columns:
            raise BadDataError(f"{folder} has no column {name}; it has {', '.join(given.columns)}")
    context = [name for name in context_columns(work.schema) if name in given.columns]
    keys = [F.col(name).cast("string").alias(name) for name in ("user_id", "item_id")]
    pairs = given.select(*keys, *context).dropDuplicates(["user_id", "item_id"])
    empty = pairs.where("user_id is null or item_id is null or user_id = '' or item_id = ''").count()
    if empty:
        raise BadDataError(f"{folder}: {empty:,} rows have no user_id or item_id")
    return pairs


def _popular(work: Workspace, ds: date) -> DataFrame:
    """Return, for each user with a request on the day, the items shown most in the longest window before it."""
    window = max(work.schema.aggregates.windows)
    items = (
        work.read("item_features", [ds])
        .orderBy(F.desc_nulls_last(f"item_impressions_{window}d"), "item_id")
        .limit(work.settings.scoring.popular_items)
        .select("item_id")
    )
    users = work.read("impressions", [ds]).select("user_id").distinct()
    return users.crossJoin(F.broadcast(items))


def requests_of(work: Workspace, ds: date, pairs: DataFrame) -> DataFrame:
    """Return one request per user with its candidates, as at the first instant after the day."""
    after = day_bounds(ds, work.schema.timezone)[1]
    asked = pairs.withColumns(
        {
            "request_id": F.col("user_id"),
            "ts": F.lit(after),
            "position": F.lit(None).cast("int"),
            "click": F.lit(0),
            "conversion": F.lit(0),
        }
    )
    for name, kind in context_columns(work.schema).items():
        if name in CONTEXT_FROM_CLOCK:
            asked = asked.withColumn(name, from_clock(name, work.schema))
        elif name not in asked.columns:
            stored = {"hashed": "string", "bucketized": "double", "vector": "array<float>"}[kind]
            asked = asked.withColumn(name, F.lit(None).cast(stored))
    return training_requests(
        asked,
        work.read("user_features", [ds]),
        work.read("item_features", [ds]),
        work.read("behavior_sequences", [ds]) if work.schema.sequences else None,
        work.read("behaviors", [ds]).where(F.lit(False)),
        work.schema,
    )


# Scoring


def score_with(
    model: Broadcast[dict[str, bytes]], digest: str, version: str
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Return the function that Spark's ``mapInArrow`` calls in its workers."""

    def scored(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        loaded, schema = _loaded(digest, model)
        for batch in batches:
            for rows in _slices(batch):
                yield score_rows(loaded, schema, rows, version)

    return scored


def score_rows(model: RankingModel, schema: FeatureSchema, rows: pa.RecordBatch, version: str) -> pa.RecordBatch:
    """Return a row per candidate: keys, its rank by CTCVR among the user's, scores and the model's version.

    Raises:
        BadDataError: if a score is not finite.
    """
    batch = batch_of(rows, schema, model.config.max_seq_len)
    with torch.inference_mode():
        logits = model(batch)
    ctr_N = torch.sigmoid(logits.ctr_logit_N.double()).numpy()
    cvr_N = torch.sigmoid(logits.cvr_logit_N.double()).numpy()
    ctcvr_N = ctr_N * cvr_N
    owner_N = batch.candidate_request_N.numpy()
    candidates = rows.column("candidates")
    items = candidates.flatten().field("item_id")
    if not np.isfinite(ctcvr_N).all():
        user = rows.column("user_id")[int(owner_N[np.argmin(np.isfinite(ctcvr_N))])]
        raise BadDataError(f"model version {version} gave a score that is not finite, for example to user {user}")
    order = np.lexsort((-ctcvr_N, owner_N))
    rank_N = np.empty(order.shape[0], dtype=np.int32)
    rank_N[order] = np.arange(order.shape[0]) - batch.candidate_offsets_O.numpy()[owner_N[order]] + 1
    return pa.RecordBatch.from_pydict(
        {
            "user_id": rows.column("user_id").take(pa.array(owner_N)),
            "item_id": items,
            "rank": rank_N,
            "ctr": ctr_N,
            "cvr": cvr_N,
            "ctcvr": ctcvr_N,
            "model_version": pa.array([version] * order.shape[0]),
        }
    )


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Cut a batch of requests so that a forward pass has a bounded number of candidates."""
    mean = max(len(batch.column("candidates").flatten()) / max(batch.num_rows, 1), 1)
    rows = max(int(_CANDIDATES_AT_ONCE / mean), 1)
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


_models: dict[str, tuple[RankingModel, FeatureSchema]] = {}


def _loaded(digest: str, files: Broadcast[dict[str, bytes]]) -> tuple[RankingModel, FeatureSchema]:
    """Return the model of this worker process, loaded when it is first asked for."""
    if digest not in _models:
        torch.set_num_threads(1)  # Spark runs a worker per core
        with tempfile.TemporaryDirectory(prefix="onetrans-worker-") as scratch:
            for name, content in files.value.items():
                (Path(scratch) / name).write_bytes(content)
            model, schema, _ = load_model(scratch)
        _models.clear()
        _models[digest] = (model, schema)
    return _models[digest]


# The day


def build(work: Workspace, ds: date) -> Staged:
    """Score one day and stage the scores.

    Raises:
        NotReadyError: if there is no champion, no candidates, or a table is not published.
        BadConfigError: if the champion reads a feature or a sequence that the log no longer has.
        BadDataError: if the champion's files are gone or damaged.
    """
    with opened(f"models:/{work.settings.mlflow.registered_model}@champion", work.settings.mlflow) as source:
        files = model_files(source)
    digest = hashlib.sha256(files["model.json"]).hexdigest()
    gone = lacking(FeatureSchema.from_dict(json.loads(files["model.json"])["schema"]), work.schema)
    if gone:
        raise BadConfigError(
            f"the champion, version {source.version}, reads what the log's schema {work.schema.name} no longer has as "
            f"it was: {', '.join(gone)}. Train and promote a model on it first"
        )
    tables = ("impressions", "behaviors", "user_features", "item_features")
    reads = dict.fromkeys((*tables, "behavior_sequences") if work.schema.sequences else tables, (ds, ds))
    inputs = {table: snapshot for table in reads if (snapshot := work.lake.snapshot_id(table)) is not None}
    key = _key(work, ds, source.version, digest, inputs)
    path = storage.join(work.lake.warehouse, "data", TABLE, f"ds={ds}", key)
    finished = work.lake.built(path)
    if finished is not None and work.lake.staged(TABLE, ds).path == path:
        logger.info("%s %s: scored before by version %s, %s rows", TABLE, ds, source.version, f"{finished.rows:,}")
        return finished
    candidates = candidates_of(work, ds)
    scored = score_with(work.spark.sparkContext.broadcast(files), digest, source.version)
    parts, rows, began, done = work.settings.scoring.parts, 0, time.monotonic(), 0
    for part in range(parts):
        mark = storage.join(path, f"_part-{part}-of-{parts}.json")
        if not storage.exists(mark):
            # Of the pairs, not of the requests: Spark cannot look behind the workers that make these.
            mine = candidates.where(F.pmod(F.xxhash64("user_id"), F.lit(parts)) == part)
            scores = requests_of(work, ds, mine).mapInArrow(scored, COLUMNS).withColumn("ds", F.lit(ds))
            folder = storage.join(path, f"part-{part}-of-{parts}")
            for left in storage.list_files(folder, ".parquet"):  # of an attempt that did not end
                storage.delete_file(left)
            write(scores.select("ds", *(c for c in scores.columns if c != "ds")), folder)
            found = count_rows(folder)
            if not found:  # a file without rows has no day in its footer, and cannot be published
                for empty in storage.list_files(folder, ".parquet"):
                    storage.delete_file(empty)
            storage.write_json(mark, {"rows": found})
            done += storage.read_json(mark)["rows"]
        rows += storage.read_json(mark)["rows"]
        logger.info("%s %s: part %d of %d, %s rows so far", TABLE, ds, part + 1, parts, f"{rows:,}")
    if not rows:
        raise BadDataError(f"{TABLE} {ds}: there was nothing to score")
    seconds = time.monotonic() - began
    logger.info(
        "%s %s: %s rows by version %s; %s scored in %.1f s, %.0f per second and core",
        TABLE, ds, f"{rows:,}", source.version, f"{done:,}", seconds,
        done / seconds / work.spark.sparkContext.defaultParallelism,
    )  # fmt: skip
    return work.lake.mark_staged(Staged(TABLE, ds, path, rows, 0, inputs, reads))


def lacking(champion: FeatureSchema, log: FeatureSchema) -> list[str]:
    """Return the features and sequences of a champion that rows built by the log's schema do not hold as it reads them.

    A schema may have grown since, or forget: a champion reads the features it knows, by name, and of each sequence as
    many events as it was trained on.  Hash sizes and boundaries are its own.
    """
    have = {(f.name, f.side, f.kind, f.column, f.dim) for f in log.features}
    kept = {s.name: s for s in log.sequences}
    gone = [f"feature {f.name}" for f in champion.features if (f.name, f.side, f.kind, f.column, f.dim) not in have]
    for sequence in champion.sequences:
        now = kept.get(sequence.name)
        if now is None or now.event != sequence.event or now.max_length < sequence.max_length:
            gone.append(f"sequence {sequence.name} (the last {sequence.max_length} events of type {sequence.event})")
    return gone


def _key(work: Workspace, ds: date, version: str, digest: str, inputs: dict[str, int]) -> str:
    """Return what the scores rest on, as the name of their folder.

    Args:
        work: the deployment.
        ds: the day.
        version: the champion's, which stands in every row.
        digest: of its files, wherever they lie.
        inputs: snapshot of every table that is read.
    """
    scoring = work.settings.scoring
    candidates: object = (scoring.candidates, scoring.popular_items)
    if scoring.candidates != POPULAR:
        folder = storage.join(storage.resolve(scoring.candidates), f"ds={ds}")
        candidates = [(file, len(storage.read_bytes(file))) for file in storage.list_files(folder, ".parquet")]
    rests = json.dumps([version, digest, inputs, candidates, scoring.parts])
    return hashlib.sha256(rests.encode()).hexdigest()[:16]


def model_files(source: ModelSource) -> dict[str, bytes]:
    """Return the files of a champion by name, once they were found to be whole.

    Raises:
        BadDataError: if they are gone, damaged, or no model; a worker that finds it out is tried again, for nothing.
    """
    try:
        load_model(source.folder)
        header = storage.read_bytes(storage.join(source.folder, "model.json"))
        weights = json.loads(header)["weights"]["file"]
        return {"model.json": header, weights: storage.read_bytes(storage.join(source.folder, weights))}
    except (OSError, ValueError, KeyError, TypeError, BadDataError, BadConfigError) as error:
        if storage.is_lost(error):
            raise
        raise BadDataError(
            f"the champion, version {source.version}, cannot be loaded: {error!s:.500}. Nothing was scored; "
            "published scores stay. Restore its files, or make a sound version champion: onetrans registry rollback "
            "--reason TEXT, or onetrans registry promote --version N --reason TEXT; then run this step again"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Score one day or a range; without ``scoring.candidates``, or before the first champion, do nothing."""
    parser = Parser(
        prog=f"python -m jobs.{Path(__file__).stem}",
        description=__doc__,
        epilog=f"examples:\n  python -m jobs.{Path(__file__).stem} --ds 2026-01-10 --publish\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_days(parser)
    parser.add_argument("--publish", action="store_true", help="audit and publish each day once it is scored")

    def run() -> None:
        from onetrans.registry import CHAMPION, Registry
        from onetrans.settings import load_settings

        arguments = parser.parse_args(argv)
        days = chosen_days(arguments)
        settings = load_settings()
        if not settings.scoring.candidates:
            print("nothing is scored: scoring.candidates is not set")
            return
        if Registry(settings.mlflow).by_alias(CHAMPION) is None:
            print(f"nothing is scored: {settings.mlflow.registered_model} has no champion yet")
            return
        with telling(TABLE), Opened() as work:
            for ds in present(work, days):
                with telling(f"{TABLE} {ds}"):
                    staged = build(work, ds)
                if arguments.publish:
                    audit_and_publish(work, TABLE, ds)
                print(f"{TABLE} {ds}: {staged.rows:,} rows")

    return guarded(run)


if __name__ == "__main__":
    raise SystemExit(main())
