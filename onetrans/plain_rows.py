"""Rows of one plain file as they stand (:mod:`onetrans.plain_files` gives them meaning), and the line of a row.

Text stays text.  Arrow's JSON reader takes a string that looks like a time for
one, applies its offset and forgets it, so that a time with an offset is no longer
told from one without, and an id that looks like a date changes its spelling.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq

from onetrans import storage
from onetrans.errors import BadDataError


def read_rows(file: str) -> pa.Table:
    """Return a file's rows; every column of a CSV file is text, and so is every string of JSON lines.

    Raises:
        BadDataError: if it cannot be read, or holds no row.
    """
    if file.endswith(".parquet"):
        rows = opened(file, lambda stream: pq.read_table(stream))
    elif ".jsonl" in file:
        rows = opened(file, lambda stream: _read_json(_plain(stream, file)))
    else:
        rows = opened(file, lambda stream: _read_csv(_plain(stream, file)))
    if not rows.num_rows:
        raise BadDataError(f"{file} holds no row")
    return rows


def opened(file: str, read: Callable[[pa.NativeFile], Any]) -> Any:
    """Return what ``read`` makes of an open file.

    Raises:
        BadDataError: if it cannot be read.
    """
    filesystem, inner = storage.open_filesystem(file)
    try:
        with filesystem.open_input_file(inner) as stream:
            return read(stream)
    except (OSError, pa.ArrowInvalid) as error:
        if storage.is_lost(error):
            raise
        raise BadDataError(f"{file} cannot be read: {error}") from error


def place(file: str, row: int) -> str:
    """Return how to find a row, counted from 0: its number from 1 and, where the file is text, its first line."""
    if file.endswith(".parquet"):
        return f"row {row + 1}"
    content = storage.read_bytes(file)
    text = io.StringIO((gzip.decompress(content) if file.endswith(".gz") else content).decode("utf-8"), newline="")
    starts = _json_lines(text) if ".jsonl" in file else _csv_lines(text)
    try:
        line = next((start for number, start in enumerate(starts) if number == row), None)
    except csv.Error:  # a field longer than the reader of lines takes
        line = None
    return f"row {row + 1}" if line is None else f"row {row + 1} (line {line})"


def _json_lines(text: io.StringIO) -> Iterator[int]:
    return (number for number, line in enumerate(text, 1) if line.strip())


def _csv_lines(text: io.StringIO) -> Iterator[int]:
    """Yield the first line of every row after the header; a quoted field may go over several."""
    reader, before, header = csv.reader(text), 0, True
    for fields in reader:
        if fields and not header:
            yield before + 1
        header, before = header and not fields, reader.line_num


def _plain(stream: pa.NativeFile, file: str) -> pa.NativeFile:
    return pa.CompressedInputStream(stream, "gzip") if file.endswith(".gz") else stream


def _read_json(stream: pa.NativeFile) -> pa.Table:
    content = pa.py_buffer(stream.read())
    rows = pjson.read_json(pa.BufferReader(content))
    text = pa.schema([field.with_type(_without_times(field.type)) for field in rows.schema])
    if text.equals(rows.schema):
        return rows
    return pjson.read_json(pa.BufferReader(content), parse_options=pjson.ParseOptions(explicit_schema=text))


def _without_times(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    return kind


def _read_csv(stream: pa.NativeFile) -> pa.Table:
    content = pa.py_buffer(stream.read())
    names = pcsv.open_csv(pa.BufferReader(content)).schema.names
    text = pcsv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    parse = pcsv.ParseOptions(newlines_in_values=True)
    return pcsv.read_csv(pa.BufferReader(content), parse_options=parse, convert_options=text)
