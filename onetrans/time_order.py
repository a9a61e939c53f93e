"""Requests of several days in order of time: what next-batch evaluation reads, in the loader's bounded memory.

Spark sorts each file of a day by time, and a large day has several files.  Here
they are merged: a window is a span of time, read from every file of the day.  A
day is a pass of its own, so no batch holds requests of two days, and a cursor
names day, window and batch.

Shape suffixes beyond those of :mod:`onetrans.loader`:

    F  files of a day     W  windows + 1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onetrans import storage
from onetrans.errors import BadDataError
from onetrans.loader import (
    Cursor,
    Ints,
    Loaded,
    LoaderConfig,
    Place,
    RequestData,
    Share,
    _concatenate,
    _edges,
    _Rows,
    _take,
)
from onetrans.schema import FeatureSchema


class TimeOrderedData(RequestData):
    """The requests of one day by (time, file, row); a file whose own rows are not in that order is refused."""

    def _lay_out_windows(self) -> Ints:
        """Cut the day into spans of time of about equal cost, and note how far each of them reaches into each file."""
        self._paths = list(dict.fromkeys(group.file for group in self._groups))
        times_F = [_request_times(file) for file in self._paths]
        lengths_F = np.array([times.shape[0] for times in times_F])
        order_R = np.argsort(np.concatenate(times_F), kind="stable")
        cost_R = np.repeat(self._request_costs(), [group.requests for group in self._groups])[order_R]
        reached_R = np.concatenate([[0.0], np.cumsum(cost_R)])
        windows = int(np.ceil(reached_R[-1] - 1e-9)) or 1
        starts_W = np.unique(np.searchsorted(reached_R, np.linspace(0.0, reached_R[-1], windows + 1)[:-1]))
        starts_W = np.append(starts_W, order_R.shape[0])
        file_R = np.repeat(np.arange(lengths_F.shape[0]), lengths_F)[order_R]
        self._file_start_F = np.cumsum(lengths_F) - lengths_F
        self._reached_FW = np.stack(
            [np.searchsorted(np.flatnonzero(file_R == f), starts_W) for f in range(lengths_F.shape[0])]
        )
        self._first_file_W = file_R[starts_W[:-1]]
        return starts_W

    def place(self, window: int) -> Place:
        """Return the earliest row of a window."""
        file = int(self._first_file_W[window])
        row = int(self._file_start_F[file] + self._reached_FW[file, window])
        group = int(np.searchsorted(self._first_row_G, row, side="right")) - 1
        return Place(self._groups[group].file, self._groups[group].index, row - int(self._first_row_G[group]))

    def _windows(self, first: int, seed: list[int] | None, share: Share) -> Iterator[tuple[int, _Rows, list[int]]]:
        """Yield each window from ``first`` on, its rows in order of time; they are neither shuffled nor shared."""
        if seed is not None or share.of > 1:
            raise ValueError("requests in order of time are read by one reader, unshuffled")
        readers = [self._reader() for _ in self._paths]
        for window in range(first, self.num_windows):
            edges_F2 = self._file_start_F[:, None] + self._reached_FW[:, window : window + 2]
            pieces = [
                piece
                for reader, (start, stop) in zip(readers, edges_F2.tolist(), strict=True)
                for piece in self._pieces(reader, start, stop)
            ]
            rows = _concatenate(pieces)
            rows = _take(rows, np.argsort(rows.request_time_R, kind="stable"))
            yield window, rows, _edges(self._batch_parts(np.diff(rows.candidate_offsets_O), None))
            del rows


class DayStream:
    """Some days in order of time; the number of a day, from 0, is the pass of its cursors."""

    def __init__(self, files: Mapping[date, Sequence[str]], schema: FeatureSchema, config: LoaderConfig) -> None:
        """Read the footers and times of all files, by day.

        Raises:
            BadDataError: as :class:`onetrans.loader.RequestData`, or if the rows of a file are not in order of time.
        """
        self.days = sorted(files)
        self._data = [TimeOrderedData(files[day], schema, config, with_keys=True) for day in self.days]
        self.impressions = sum(data.impressions for data in self._data)
        self.requests = sum(data.requests for data in self._data)

    def batches(
        self, *, shuffle_seed: int | None, start: Cursor | None = None, epochs: int = 1, share: Share | None = None
    ) -> Iterator[Loaded]:
        """Yield every batch of the first ``epochs`` days from ``start`` on, with its keys.

        Raises:
            ValueError: if rows are to be shuffled, or shared among several readers.
            BadConfigError, BadDataError: as :meth:`onetrans.loader.RequestData.batches`.
        """
        start = start or Cursor()
        for number in range(start.epoch, epochs):
            first = start if number == start.epoch else Cursor(epoch=number)
            for loaded in self._data[number].batches(
                shuffle_seed=shuffle_seed, start=first, epochs=number + 1, share=share
            ):
                # What follows the last batch of a day is the first of the next, which lies in other files.
                last = loaded.following.epoch > number
                yield replace(loaded, following=Cursor(epoch=number + 1)) if last else loaded


def _request_times(file: str) -> Ints:
    """Return the times of a file's requests.

    Raises:
        BadDataError: if they are not in order.
    """
    filesystem, inner = storage.open_filesystem(file)
    table = pq.read_table(inner, filesystem=filesystem, columns=["ts"], partitioning=None)
    times_R: Ints = table["ts"].combine_chunks().cast(pa.int64()).to_numpy(zero_copy_only=False)
    earlier = np.flatnonzero(times_R[1:] < times_R[:-1])
    if earlier.shape[0]:
        raise BadDataError(
            f"training_requests: {file}: row {int(earlier[0]) + 1} is earlier than the row before it, so batches are "
            "not in order of time; build the day again"
        )
    return times_R
