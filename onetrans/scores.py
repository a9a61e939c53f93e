"""The scores of an evaluation day: who scored, of what kind, and that they can be right.

``scores.parquet`` of a plan holds one row per impression of day D: its keys and
labels, a probability per scorer and task, and what the report's slices need.  The
scorers are the plan's two models, the popularity ranker and, where there is one to
compare with, the registry's champion.  Which version the champion's columns are of
is written into the same file, so the two cannot be told apart by accident.

Shape suffixes:

    N  rows (impressions)     U  distinct users
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onetrans import storage
from onetrans.errors import BadDataError, NotReadyError
from onetrans.metrics import Metrics
from onetrans.plan import SCORES_FILE, Plan

CANDIDATE = "onetrans"
"""The model that may be promoted."""
BASELINE = "dcnv2_din"
"""The model it has to beat."""
CHAMPION = "champion"
"""Name, in scores and figures, of the version that serves."""
POPULARITY = "popularity"
"""Name of the ranker that knows nothing but how often each item was clicked."""
TASKS = ("ctr", "cvr")

KEYS = ("request_id", "item_id")
LABELS = ("click", "conversion")
CONTEXT_PREFIX = "context."
"""Columns of the scores that hold a context feature, for the report's slices."""

_METADATA = b"onetrans.champion"

ChampionState = Literal["scored", "none", "candidate", "later", "incomparable", "untracked", "off", "unknown"]


@dataclass(frozen=True)
class ChampionRecord:
    """Which champion a day's scores know, and how it was compared."""

    state: ChampionState
    """``scored``: its columns are there; ``none``: there is no champion; ``candidate``: the candidate is it;
    ``later``: it was trained for a later day, so it has seen these rows; ``incomparable``: it cannot score these rows;
    ``untracked``: the plan records nothing; ``off``: the gate is off; ``unknown``: the registry was not asked."""
    note: str
    """The state in a sentence, with its reason."""
    version: str | None = None
    """Version in the registry; None if there was none, or nobody asked."""
    ds: str | None = None
    """Day it was evaluated on; it was trained on days before."""
    digest: str | None = None
    """Hash of its files: the same version number may name another model in another registry."""


UNKNOWN = ChampionRecord("unknown", "no champion was compared: the registry was not asked when the day was scored")


@dataclass(frozen=True)
class Scores:
    """All scorers' probabilities of one day, one entry per impression; checked when it is built."""

    ds: str
    """The day, or another name for these rows."""
    user_ids: pa.Array
    """The distinct users, (U,)."""
    user_N: npt.NDArray[np.int64]
    """Each row's user, its place in ``user_ids``."""
    label_N: dict[str, npt.NDArray[np.int64]]
    """Per task ("ctr", "cvr"): click, and conversion; 0 or 1."""
    score_N: dict[tuple[str, str], npt.NDArray[np.float64]]
    """Per (scorer, task): the predicted probability."""
    champion: ChampionRecord = UNKNOWN
    """Which version the champion's scores are of."""

    @classmethod
    def from_table(cls, table: pa.Table, where: str = "scores", ds: str = "") -> Scores:
        """Check a table of scores and take what the gate needs.

        Args:
            table: columns ``request_id, item_id, user_id, click, conversion`` and ``<scorer>_ctr``, ``<scorer>_cvr``
                of both models; of champion and popularity where they are there.
            where: what to call the table in a message.
            ds: the day.

        Raises:
            BadDataError: naming the column, the number of rows and an example.
        """
        scorers = [CANDIDATE, BASELINE, *(s for s in (CHAMPION, POPULARITY) if _has(table, s))]
        names = [f"{scorer}_{task}" for scorer in scorers for task in TASKS]
        _require_columns(table, [*KEYS, "user_id", *LABELS, *names], where)
        if table.num_rows == 0:
            raise BadDataError(f"{where}: there are no rows")
        _refuse_repeated_keys(table, where)
        _refuse_where(table, "user_id", pc.is_null(table["user_id"]), "no user", where)
        for column in LABELS:
            sound = pc.fill_null(pc.is_in(table[column], pa.array([0, 1], type=table[column].type)), False)
            _refuse_where(table, column, pc.invert(sound), "a label other than 0 or 1", where)
        unearned = pc.and_(pc.equal(table["conversion"], 1), pc.equal(table["click"], 0))
        _refuse_where(table, "conversion", unearned, "a conversion without a click", where)
        for column in names:
            value = table[column].cast(pa.float64())
            sound = pc.and_(pc.greater_equal(value, 0.0), pc.less_equal(value, 1.0))  # false for NaN
            _refuse_where(table, column, pc.invert(pc.fill_null(sound, False)), "no probability", where)
        champion = champion_of(table)
        if (champion.state == "scored") != (CHAMPION in scorers):
            raise BadDataError(
                f"{where}: the champion's columns are {'there' if CHAMPION in scorers else 'missing'}, but the file "
                f"says {champion.state!r} ({champion.note}); evaluate again"
            )
        users = table["user_id"].combine_chunks().dictionary_encode()
        return cls(
            ds=ds,
            user_ids=users.dictionary,
            user_N=users.indices.to_numpy().astype(np.int64),
            label_N={
                "ctr": table["click"].to_numpy().astype(np.int64),
                "cvr": table["conversion"].to_numpy().astype(np.int64),
            },
            score_N={
                (scorer, task): table[f"{scorer}_{task}"].to_numpy().astype(np.float64)
                for scorer in scorers
                for task in TASKS
            },
            champion=champion,
        )

    @property
    def users(self) -> int:
        """U."""
        return len(self.user_ids)

    @property
    def scorers(self) -> list[str]:
        """Everyone who scored these rows."""
        return list(dict.fromkeys(scorer for scorer, _ in self.score_N))

    def counted(self, task: str) -> npt.NDArray[np.bool_]:
        """Return the rows a task is measured on: all impressions for CTR, clicked ones for CVR."""
        return np.ones(self.user_N.shape[0], dtype=bool) if task == "ctr" else self.label_N["ctr"] > 0

    def metrics(self, scorer: str) -> Metrics:
        """Return one scorer's figures."""
        return Metrics.compute(
            click_N=self.label_N["ctr"],
            conversion_N=self.label_N["cvr"],
            ctr_N=self.score_N[scorer, "ctr"],
            cvr_N=self.score_N[scorer, "cvr"],
            user_N=self.user_N,
        )


def common_users(days: Sequence[Scores]) -> tuple[int, list[npt.NDArray[np.int64]]]:
    """Return U, the distinct users of all days together, and each day's rows' users among them."""
    if len(days) == 1:
        return days[0].users, [days[0].user_N]
    together = pa.concat_arrays([day.user_ids.cast(pa.string()) for day in days]).dictionary_encode()
    codes = together.indices.to_numpy().astype(np.int64)
    ends = np.cumsum([0, *(day.users for day in days)])
    return len(together.dictionary), [codes[ends[i] : ends[i + 1]][day.user_N] for i, day in enumerate(days)]


# Files


def with_champion(table: pa.Table, record: ChampionRecord) -> pa.Table:
    """Return the table with the record of its champion written into it."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: json.dumps(asdict(record))})


def champion_of(table: pa.Table) -> ChampionRecord:
    """Return the record of the table's champion; ``unknown`` if nothing was written."""
    written = (table.schema.metadata or {}).get(_METADATA)
    return ChampionRecord(**json.loads(written)) if written else UNKNOWN


def write_scores(folder: str, table: pa.Table) -> None:
    """Write the scores of a plan into a folder, at once or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_bytes(storage.join(folder, SCORES_FILE), sink.getvalue().to_pybytes())


def read_scores(plan: Plan, folder: str = "") -> tuple[pa.Table, str]:
    """Return the scores of a plan and the SHA-256 of their file.

    Args:
        plan: whose impressions they are of.
        folder: where they lie; empty: in the plan's own.

    Raises:
        NotReadyError: if there is no such file.
        BadDataError: if it is damaged, is not exactly one row for each impression the plan evaluates on, or has
            other labels than those.
    """
    path = storage.join(folder or plan.path, SCORES_FILE)
    if not storage.exists(path):
        raise NotReadyError(f"{path} is not there; run: onetrans evaluate --plan {plan.path}")
    content = storage.read_bytes(path)
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowInvalid) as error:
        raise BadDataError(f"{path} cannot be read as Parquet ({error}); delete it and evaluate again") from error
    _require_columns(table, [*KEYS, *LABELS], path)
    _refuse_other_rows(table, plan, path)
    return table, hashlib.sha256(content).hexdigest()


def _impressions(file: str) -> pa.Table:
    """Return keys and labels of every impression in a file of ``training_requests``, in stored order."""
    rows = read_leaves(file, ["request_id", *(f"candidates.{name}" for name in ("item_id", *LABELS))])
    lists = rows["candidates"].combine_chunks()
    candidates = pc.list_flatten(lists)
    return pa.table(
        {
            "request_id": rows["request_id"].combine_chunks().take(pc.list_parent_indices(lists)),
            **{name: pc.struct_field(candidates, name) for name in ("item_id", *LABELS)},
        }
    )


def read_leaves(file: str, names: Sequence[str]) -> pa.Table:
    """Return some columns of a Parquet file; ``candidates.item_id`` names a field of the structs in a list."""
    filesystem, inner = storage.open_filesystem(file)
    parquet = pq.ParquetFile(inner, filesystem=filesystem)
    paths = [parquet.metadata.schema.column(c).path for c in range(parquet.metadata.num_columns)]
    wanted = []
    for name in names:
        first, _, last = name.partition(".")
        # A writer chooses how it calls what lies between a list and its elements' fields.
        wanted += [p for p in paths if p == name or (last and p.startswith(f"{first}.") and p.endswith(f".{last}"))]
    return parquet.read(columns=wanted)


def _refuse_other_rows(table: pa.Table, plan: Plan, path: str) -> None:
    columns = [*KEYS, *LABELS]
    given = table.select(columns)
    day = pa.concat_tables([_impressions(file) for file in plan.evaluation_files])
    if table.num_rows != day.num_rows:
        raise BadDataError(
            f"{path} has {table.num_rows:,} rows, but {plan.ds} has {day.num_rows:,} impressions in the "
            f"{len(plan.evaluation_files)} files of the plan; delete it and evaluate again"
        )
    expected = day.select(columns).cast(given.schema)
    if given.equals(expected):
        return  # the usual case: evaluation keeps the stored order
    for compared, are in ((list(KEYS), f"no impressions of {plan.ds}"), (columns, f"not labelled as on {plan.ds}")):
        strangers = given.join(expected.select(compared), keys=compared, join_type="left anti")
        if strangers.num_rows:
            example = strangers.slice(0, 1).to_pylist()[0]
            raise BadDataError(
                f"{path}: {strangers.num_rows:,} rows are {are}, for example request {example['request_id']!r}, item "
                f"{example['item_id']!r}; delete it and evaluate again"
            )


def _has(table: pa.Table, scorer: str) -> bool:
    return any(f"{scorer}_{task}" in table.column_names for task in TASKS)


def _require_columns(table: pa.Table, columns: list[str], where: str) -> None:
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise BadDataError(f"{where}: column {missing[0]!r} is missing; there are {', '.join(table.column_names)}")


def _refuse_repeated_keys(table: pa.Table, where: str) -> None:
    keys = list(KEYS)
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
        example: dict[str, Any] = table.filter(bad).slice(0, 1).to_pylist()[0]
        raise BadDataError(
            f"{where}: {count:,} of {table.num_rows:,} rows have {what} in {column!r}, for example {example[column]!r} "
            f"of request {example['request_id']!r}, item {example['item_id']!r}"
        )
