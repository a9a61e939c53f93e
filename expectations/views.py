"""Row views: the few flat columns of each table on which the suites' row rules are judged.

A view is a function of one Arrow batch, so the same code serves a laptop (batch
after batch from Parquet) and a cluster (Spark's ``mapInArrow``).  It keeps the
columns that name a row and the ones a rule reads, and replaces every list by
counts of what is wrong in it.

Shape suffixes: R rows of the batch, E elements of all lists of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from onetrans.schema import Aggregates, FeatureSchema

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
View = Callable[[pa.RecordBatch], pa.RecordBatch]

_MISSING = int(np.iinfo(np.int64).min)


def view_of(
    table: str, schema: FeatureSchema, settled_before: datetime, known: Mapping[str, pa.Array] | None = None
) -> View:
    """Return the view of ``table``.

    ``settled_before`` is the day's end less the tolerance; ``known``, the ids that have features, is used by
    ``training_requests`` alone.
    """
    end = settled_before + timedelta(minutes=schema.day_tolerance_minutes)
    if table == "impressions":
        return lambda batch: impressions(batch, end)
    if table == "behaviors":
        return lambda batch: behaviors(batch, end)
    if table == "user_features":
        return lambda batch: features(batch, "user_id", ("user",), schema.aggregates)
    if table == "item_features":
        prefixes = ("item", *schema.aggregates.item_keys)
        return lambda batch: features(batch, "item_id", prefixes, schema.aggregates)
    names = tuple(sequence.column for sequence in schema.sequences)
    if table == "behavior_sequences":
        return lambda batch: behavior_sequences(batch, names, settled_before)
    if table == "training_requests":
        return lambda batch: training_requests(batch, names, known or {}, end)
    if table == "candidate_scores":
        return candidate_scores
    raise KeyError(table)


def needed_columns(table: str, schema: FeatureSchema) -> list[str]:
    """Return the top-level columns the view of ``table`` reads."""
    sequences = [sequence.column for sequence in schema.sequences]
    if table in ("user_features", "item_features"):
        prefixes = ("user",) if table == "user_features" else ("item", *schema.aggregates.item_keys)
        counts = [
            name
            for prefix in prefixes
            for name in schema.aggregates.columns(prefix)
            if name.split("_")[-2] in ("impressions", "clicks", "conversions")
        ]
        return ["ds", "user_id" if table == "user_features" else "item_id", *counts]
    return {
        "impressions": ["ds", "request_id", "item_id", "ts", "click", "conversion"],
        "behaviors": ["ds", "event_id", "type", "ts", "available_at"],
        "behavior_sequences": ["ds", "user_id", *sequences],
        "training_requests": ["ds", "request_id", "user_id", "ts", *sequences, "candidates"],
        "candidate_scores": ["ds", "user_id", "item_id", "rank", "ctr", "cvr", "ctcvr", "model_version"],
    }[table]


def impressions(batch: pa.RecordBatch, end: datetime) -> pa.RecordBatch:
    """Impressions as they are, the day as text, and ``hours_to_end`` of the day."""
    kept = ("request_id", "item_id", "ts", "click", "conversion")
    columns = {name: batch.column(name) for name in kept}
    return _view({"ds": _day(batch), **columns, "hours_to_end": _hours_to(end, batch.column("ts"))})


def behaviors(batch: pa.RecordBatch, end: datetime) -> pa.RecordBatch:
    """Events as they are; ``delay_s``: seconds until one became known; ``hours_to_end`` of the day from then."""
    known, happened = (batch.column(name).cast(pa.int64()) for name in ("available_at", "ts"))
    delay_s = pc.divide(pc.cast(pc.subtract(known, happened), pa.float64()), 1e6)
    kept = ("event_id", "type", "ts", "available_at")
    return _view({"ds": _day(batch), **{name: batch.column(name) for name in kept}, "delay_s": delay_s,
                  "hours_to_end": _hours_to(end, batch.column("available_at"))})  # fmt: skip


def features(batch: pa.RecordBatch, key: str, prefixes: tuple[str, ...], declared: Aggregates) -> pa.RecordBatch:
    """The key, how many pairs of counts contradict each other, and the impressions of the longest window.

    ``impossible_counts``: windows with more clicks than impressions, or more conversions than clicks.
    ``shrinking_windows``: counts that are larger in a shorter window than in a longer one.
    """
    impossible_R = np.zeros(batch.num_rows, np.int64)
    shrinking_R = np.zeros(batch.num_rows, np.int64)
    for prefix in prefixes:
        for figure, part in (("impressions", "clicks"), ("clicks", "conversions")):
            for window in declared.windows:
                impossible_R += _exceeds(batch, f"{prefix}_{part}_{window}d", f"{prefix}_{figure}_{window}d")
        for figure in ("impressions", "clicks", "conversions"):
            for short, long in zip(declared.windows, declared.windows[1:], strict=False):
                shrinking_R += _exceeds(batch, f"{prefix}_{figure}_{short}d", f"{prefix}_{figure}_{long}d")
    return _view(
        {
            "ds": _day(batch),
            key: batch.column(key),
            "impossible_counts": impossible_R,
            "shrinking_windows": shrinking_R,
            "counted": pc.fill_null(batch.column(f"{prefixes[0]}_impressions_{max(declared.windows)}d"), 0.0),
        }
    )


def candidate_scores(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Scores as they are, and ``not_the_product``: whether CTCVR differs from CTR times CVR."""
    ctr_R, cvr_R, ctcvr_R = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("ctr", "cvr", "ctcvr"))
    kept = ("user_id", "item_id", "rank", "model_version")
    return _view(
        {
            "ds": _day(batch),
            **{name: batch.column(name) for name in kept},
            "not_the_product": (~np.isclose(ctcvr_R, ctr_R * cvr_R)).astype(np.int64),
        }
    )


def behavior_sequences(batch: pa.RecordBatch, names: tuple[str, ...], settled_before: datetime) -> pa.RecordBatch:
    """Per sequence: events out of order (or twice), known before they happened, and how many are settled."""
    view: dict[str, pa.Array | npt.NDArray[np.generic]] = {"ds": _day(batch), "user_id": batch.column("user_id")}
    for name in names:
        events = _Lists.of(batch.column(name))
        ts_E, known_E, id_E = (
            _microseconds(events.field("ts")),
            _microseconds(events.field("available_at")),
            events.integers("event_id"),
        )
        follows_E = (ts_E[1:] > ts_E[:-1]) | ((ts_E[1:] == ts_E[:-1]) & (id_E[1:] > id_E[:-1]))
        view[f"{name}_unordered"] = events.count_between(~follows_E)
        view[f"{name}_known_too_early"] = events.count(known_E < ts_E)
        view[f"{name}_settled"] = events.count(known_E < int(settled_before.timestamp() * 1_000_000))
    return _view(view)


def training_requests(
    batch: pa.RecordBatch,
    names: tuple[str, ...],
    known: Mapping[str, pa.Array] | None = None,
    end: datetime | None = None,
) -> pa.RecordBatch:
    """Per sequence: its length, events out of order and events not before the request; then the candidates.

    ``candidates_repeated`` counts items listed again, ``candidates_bad_labels`` labels that are not 0 or 1,
    ``candidates_unclicked_conversions`` conversions without a click, ``candidates_unknown`` the share of candidates
    without features; ``user_unknown`` is 1 where the user has none; ``hours_to_end`` of the day.
    """
    known = known or {}
    kept = ("request_id", "user_id", "ts")
    view: dict[str, pa.Array | npt.NDArray[np.generic]] = {
        "ds": _day(batch),
        **{name: batch.column(name) for name in kept},
    }
    request_R = _microseconds(batch.column("ts"))
    for name in names:
        events = _Lists.of(batch.column(name))
        ts_E = _microseconds(events.field("ts"))
        view[f"{name}_length"] = events.lengths_R
        view[f"{name}_unordered"] = events.count_between(ts_E[1:] < ts_E[:-1])
        view[f"{name}_not_before_request"] = events.count(ts_E >= request_R[events.owner_E])
    candidates = _Lists.of(batch.column("candidates"))
    click_E, conversion_E = candidates.integers("click"), candidates.integers("conversion")
    view["candidates_count"] = candidates.lengths_R
    view["candidates_repeated"] = candidates.count(candidates.repeats("item_id"))
    labels = (0, 1, _MISSING)
    view["candidates_bad_labels"] = candidates.count(~np.isin(click_E, labels) | ~np.isin(conversion_E, labels))
    view["candidates_unclicked_conversions"] = candidates.count((conversion_E == 1) & (click_E != 1))
    view["candidates_clicks"] = candidates.count(click_E == 1)
    view["candidates_conversions"] = candidates.count(conversion_E == 1)
    if end is not None:
        view["hours_to_end"] = _hours_to(end, batch.column("ts"))
    if "user_id" in known:
        view["user_unknown"] = _unknown(batch.column("user_id"), known["user_id"]).astype(np.float64)
    if "item_id" in known:
        unknown_R = candidates.count(_unknown(candidates.field("item_id"), known["item_id"]))
        view["candidates_unknown"] = unknown_R / np.maximum(candidates.lengths_R, 1)
    return _view(view)


@dataclass(frozen=True)
class _Lists:
    """A column of lists of structs, taken apart."""

    elements: pa.StructArray
    """The structs of all rows, one after the other."""
    lengths_R: Ints
    """Elements of each row; 0 where the list is null."""
    owner_E: Ints
    """The row each element belongs to."""

    @classmethod
    def of(cls, array: pa.ListArray) -> _Lists:
        lengths_R = pc.fill_null(array.value_lengths(), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(array.flatten(), lengths_R, np.repeat(np.arange(len(lengths_R)), lengths_R))

    def field(self, name: str) -> pa.Array:
        return pc.struct_field(self.elements, name)

    def integers(self, name: str) -> Ints:
        """Return an integer field; a missing value, which the rules of the columns report, reads as ``_MISSING``."""
        return _integers(self.field(name))

    def count(self, wrong_E: Bools) -> Ints:
        """Count marked elements per row."""
        return np.bincount(self.owner_E[wrong_E], minlength=len(self.lengths_R)).astype(np.int64)

    def count_between(self, wrong_E: Bools) -> Ints:
        """Count marked steps from one element to the next of the same row; E - 1 marks."""
        same_row_E = self.owner_E[1:] == self.owner_E[:-1]
        return np.bincount(self.owner_E[1:][wrong_E & same_row_E], minlength=len(self.lengths_R)).astype(np.int64)

    def repeats(self, name: str) -> Bools:
        """Mark elements whose text field stood in an earlier element of the same row."""
        codes = pc.fill_null(self.field(name).dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
        order_E = np.lexsort((codes, self.owner_E))
        again_E = (np.diff(codes[order_E]) == 0) & (np.diff(self.owner_E[order_E]) == 0)
        marked = np.zeros(len(codes), np.bool_)
        marked[order_E[1:]] = again_E
        return marked


def _view(columns: dict[str, pa.Array | npt.NDArray[np.generic]]) -> pa.RecordBatch:
    arrays = [column if isinstance(column, pa.Array) else pa.array(column) for column in columns.values()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _hours_to(end: datetime, times: pa.Array) -> pa.Array:
    """Return the hours from times to an instant; a number, as Great Expectations' engines disagree about zones."""
    left = pc.subtract(int(end.timestamp() * 1_000_000), times.cast(pa.int64()))
    return pc.divide(pc.cast(left, pa.float64()), 3.6e9)


def _unknown(ids: pa.Array, known: pa.Array) -> Bools:
    return pc.invert(pc.is_in(ids.cast(pa.string()), value_set=known)).to_numpy(zero_copy_only=False)


def _day(batch: pa.RecordBatch) -> pa.Array:
    return batch.column("ds").cast(pa.string())


def _microseconds(array: pa.Array) -> Ints:
    return _integers(array.cast(pa.int64()))


def _integers(array: pa.Array) -> Ints:
    return pc.fill_null(array.cast(pa.int64()), _MISSING).to_numpy(zero_copy_only=False)


def _exceeds(batch: pa.RecordBatch, part: str, whole: str) -> Ints:
    """Mark the rows where one count is larger than another; a missing count compares as no excess."""
    larger = pc.greater(batch.column(part), batch.column(whole))
    return pc.fill_null(larger, False).to_numpy(zero_copy_only=False).astype(np.int64)
