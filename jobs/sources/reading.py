"""Reading raw files safely: every file is opened by its own format's rules before Spark sees a row.

Spark names neither the table nor the day when a file is broken, reads an empty
CSV file as no rows, and takes the schema of one file for all.  So the driver
looks at every file's footer or first lines, and says what is wrong with which.
Only the columns somebody asks for are read: what else a file holds stops no day.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.contract import Column, ValueKind
from jobs.objects import original, readable
from onetrans import storage
from onetrans.errors import BadDataError
from onetrans.schema import FeatureSchema

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
}
"""File name ending -> format."""

UNREADABLE = "_unreadable"
"""Column that holds the text of a CSV or JSON line that does not parse; null otherwise."""

ROW = "_row"
"""Column that holds a row as it came, as JSON under the files' own names."""

FILE = "_file"
"""Column that holds the file of a row."""

AS_JSON = {
    "ignoreNullFields": "false",
    "timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX",
    "timestampNTZFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSS",
}
"""How a row is written, so that nothing of it is lost and it can be read again."""

_UNREAD = "_unread_"
_JSON_SAMPLE_LINES = 1000
_WHOLE = T.ByteType | T.ShortType | T.IntegerType | T.LongType


@dataclass(frozen=True)
class Where:
    """What is being read, for messages."""

    table: str
    """Input table."""
    ds: str
    """Day, or what stands for it ("history", "snapshot")."""

    def __str__(self) -> str:
        return f"{self.table} {self.ds}"


def data_files(path: str) -> list[str]:
    """Return the files under ``path`` in a format that is read, sorted."""
    return [file for file in storage.list_files(path) if _format(file)]


def files_stamp(path: str, begin: str = "") -> str:
    """Return a hash of the files under ``path``: names, sizes, times of the last change; empty if there is none.

    With ``begin``, of those directly in it whose names begin so.
    """
    filesystem, inner = storage.open_filesystem(path)
    found = filesystem.get_file_info(fs.FileSelector(inner, recursive=not begin, allow_not_found=True))
    listed = sorted(
        (info.path.removeprefix(inner), info.size, info.mtime_ns)
        for info in found
        if info.type == fs.FileType.File
        and _format(info.base_name)
        and not info.base_name.startswith((".", "_"))
        and info.base_name.startswith(begin)
    )
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16] if listed else ""


def folders(path: str) -> list[str]:
    """Return the names of the folders directly under ``path``, sorted; none if ``path`` is not there."""
    filesystem, inner = storage.open_filesystem(path)
    found = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)


def read_files(
    spark: SparkSession,
    files: Sequence[str],
    where: Where,
    columns: Sequence[Column] | None = None,
    renames: Mapping[str, str] | None = None,
    whole: bool = False,
) -> DataFrame:
    """Return the rows of raw files: the contract's ``columns`` that are there, under its names; by default all.

    Parquet keeps its types; CSV and JSON columns are text, and their unparsable lines are in ``_unreadable``.
    ``renames`` maps a name of the contract to the name in the files.  With ``whole``, ``_row`` holds the row as it
    came, as JSON of all columns under the files' own names, and ``_file`` the file.

    Raises:
        BadDataError: if a file is empty or broken, if files differ in a column that is read, or if a column is missing
            that is required or renamed.
    """
    kinds = {_format(file) for file in files}
    if len(kinds) > 1:
        raise BadDataError(
            f"{where}: files of several formats lie together: {', '.join(sorted(map(str, kinds)))}, "
            f"for example {' and '.join(next(f for f in files if _format(f) == kind) for kind in kinds)}"
        )
    with ThreadPoolExecutor(max_workers=16) as pool:
        looked = list(pool.map(lambda file: _look(file, where), files))
    heads = [schema for schema, _ in looked]
    found = list(dict.fromkeys(name for schema in heads for name in schema.names))
    own = {c.name: (renames or {}).get(c.name, c.name) for c in columns or ()} or {name: name for name in found}
    wanted = list(dict.fromkeys(own.values()))
    kind = kinds.pop()
    needed = [c.name for c in columns or () if c.required or c.name in (renames or {})]

    def require(there: Sequence[str]) -> None:
        missing = [name for name in needed if own[name] not in there]
        if missing:
            told = [name if own[name] == name else f"{own[name]} (read as {name})" for name in missing]
            raise BadDataError(f"{where}: {are_missing(told, found, files[0])}")

    if kind != "json" and found:  # before the rows: a file that is something else altogether may have none
        require(found)
    if not sum(rows for _, rows in looked):
        raise BadDataError(f"{where} is empty: no rows in {_number(files)}, for example {files[0]}")
    read = [*wanted, *(_others(heads, wanted) if whole else ())]
    if kind == "parquet":
        frame = _read_parquet(spark, files, heads, where, read)
    elif kind == "csv":
        frame = _read_csv(spark, files, heads, where, read)
    else:
        frame = _read_json(spark, files, found, read)
    require(frame.columns)
    there = [(name, _quoted(text)) for name, text in own.items() if text in frame.columns]
    notes = [F.col(UNREADABLE)] if UNREADABLE in frame.columns else []
    if whole:
        own_columns = [F.col(_quoted(name)) for name in frame.columns if not name.startswith(_UNREAD)]
        notes += [F.to_json(F.struct(*own_columns), AS_JSON).alias(ROW), _address().alias(FILE)]
    return frame.select(*(F.col(text).alias(name) for name, text in there), *notes)


def _address() -> SparkColumn:
    """Return the file of a row; Spark writes local ones as file:/path."""
    return original(F.regexp_replace("_metadata.file_path", "^file:/(?!/)", "file:///"))


def _others(heads: Sequence[pa.Schema], wanted: Sequence[str]) -> list[str]:
    """Return the columns beyond those wanted that can be read as well: what stops no day must not stop a look at it."""
    common = [name for name in heads[0].names if all(name in head.names for head in heads)]
    count = Counter(name.lower() for name in common)
    return [
        name
        for name in common
        if name not in wanted
        and count[name.lower()] == 1
        and len({str(head.field(name).type) for head in heads}) == 1
        and not (pa.types.is_timestamp(heads[0].field(name).type) and heads[0].field(name).type.unit == "ns")
    ]


def require_columns(
    frame: DataFrame, columns: Iterable[Column], where: Where, schema: FeatureSchema, file: str
) -> DataFrame:
    """Return ``frame`` if it has every required column, each of a type its kind can be read from.

    ``file`` is one of those that were read, as an example.

    Raises:
        BadDataError: naming the column, what is there, and what was expected.
    """
    present = {field.name: field.dataType for field in frame.schema}
    for column in columns:
        if column.name not in present:
            if not column.required:
                continue
            there = [name for name in present if name != UNREADABLE]
            raise BadDataError(f"{where}: {are_missing([_named(column, where, schema)], there, file)}")
        problem = _mismatch(column.kind, present[column.name], schema)
        if problem:
            found = present[column.name].simpleString()
            raise BadDataError(
                f"{where}: column {_named(column, where, schema)} is {found}; expected {problem}; for example in {file}"
            )
    return frame


def _named(column: Column, where: Where, schema: FeatureSchema) -> str:
    own = schema.columns.get(where.table, {}).get(column.name, column.name)
    return column.name if own == column.name else f"{own} (read as {column.name})"


def _mismatch(kind: ValueKind, found: T.DataType, schema: FeatureSchema) -> str:
    """Return what would have been right, or an empty text if ``found`` is."""
    whole = isinstance(found, _WHOLE)
    number = _is_number(found)
    if isinstance(found, T.NullType | T.StringType):
        # Text says what it is row by row.
        return ""
    if kind in ("id", "category"):
        fits = whole or isinstance(found, T.BooleanType | T.DateType)
        return "" if fits else "text or whole numbers (a float has no one spelling, so it cannot be hashed)"
    if kind == "time":
        if whole:
            return "" if schema.epoch else "a timestamp; for numbers the schema file must say epoch = 's', 'ms' or 'us'"
        return "" if isinstance(found, T.TimestampType | T.TimestampNTZType) else "a timestamp"
    if kind == "label":
        return "" if number or isinstance(found, T.BooleanType) else "0 or 1"
    if kind == "vector":
        return "" if isinstance(found, T.ArrayType) and _is_number(found.elementType) else "a list of numbers"
    if kind == "position":
        return "" if whole else "a whole number"
    return "" if number or isinstance(found, T.BooleanType) else "a number"


def _is_number(found: T.DataType) -> bool:
    return isinstance(found, _WHOLE | T.FloatType | T.DoubleType | T.DecimalType)


def _format(file: str) -> str | None:
    return next((kind for ending, kind in FORMATS.items() if file.endswith(ending)), None)


def _look(file: str, where: Where) -> tuple[pa.Schema, int]:
    """Return a file's columns, and its rows (for text: 1 if there are any)."""
    filesystem, inner = storage.open_filesystem(file)
    size = filesystem.get_file_info(inner).size
    if size == 0:
        raise BadDataError(f"{where}: file {file} is empty (0 bytes)")
    if _format(file) == "parquet":
        try:
            with filesystem.open_input_file(inner) as opened:
                parquet = pq.ParquetFile(opened)
                return parquet.schema_arrow, parquet.metadata.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            if storage.is_lost(error):
                raise
            raise BadDataError(f"{where}: file {file} ({size:,} bytes) is not whole Parquet: {error}") from error
    try:
        lines = _first_lines(file, 2 if _format(file) == "csv" else _JSON_SAMPLE_LINES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadDataError(f"{where}: file {file} ({size:,} bytes) is not whole gzip: {error}") from error
    if _format(file) == "csv":
        names = _csv_names(lines[0]) if lines else []
        return pa.schema([(name, pa.string()) for name in names]), max(len(lines) - 1, 0)
    names = list(dict.fromkeys(name for line in lines for name in _json_names(line)))
    return pa.schema([(name, pa.string()) for name in names]), len(lines)


def _first_lines(file: str, count: int) -> list[str]:
    """Return the first lines that are not empty.

    Raises:
        EOFError: if the file is gzip that ends too early; other kinds of damage raise BadGzipFile or zlib.error.
    """
    filesystem, inner = storage.open_filesystem(file)
    lines: list[str] = []
    with filesystem.open_input_file(inner) as raw:
        # gzip's own reader tells a damaged file from a file that cannot be reached; Arrow's raises OSError for both.
        with gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else raw as stream:
            rest = b""
            while len(lines) < count:
                block = stream.read(1 << 20)
                whole, _, rest = (rest + block).rpartition(b"\n") if block else (rest, b"", b"")
                lines += [line for line in whole.decode("utf-8", errors="replace").splitlines() if line.strip()]
                if not block:
                    break
    return lines[:count]


def _csv_names(line: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line.removeprefix("\ufeff")]))]


def _json_names(line: str) -> list[str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return []
    return list(row) if isinstance(row, dict) else []


def _read_parquet(
    spark: SparkSession, files: Sequence[str], heads: list[pa.Schema], where: Where, wanted: Sequence[str]
) -> DataFrame:
    heads = [pa.schema([_undictionaried(field) for field in head if field.name in wanted]) for head in heads]
    common = heads[0]
    for file, head in zip(files[1:], heads[1:], strict=True):
        try:
            common = pa.unify_schemas([common, head])
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise BadDataError(f"{where}: {file} differs from {files[0]} in a column's type: {error}") from error
    for field in common:
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            raise BadDataError(
                f"{where}: column {field.name} has nanosecond times, which Spark does not read; "
                "write microseconds (pandas: coerce_timestamps='us')"
            )
    for file, head in zip(files, heads, strict=True):
        absent = set(common.names) - set(head.names)
        if absent:
            raise BadDataError(f"{where}: file {file} lacks column {min(absent)}, which {files[0]} or another has")
    known = pa.schema([field for field in common if not _is_opaque(field.type)])
    columns = from_arrow_schema(known, prefer_timestamp_ntz=True)
    return spark.read.schema(columns).parquet(*readable(spark, files))


def _undictionaried(field: pa.Field) -> pa.Field:
    """Return the field as the file's pages hold it: pandas' categories are a note for pandas alone."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, kind, field.nullable)


def _is_opaque(kind: pa.DataType) -> bool:
    """Tell whether Spark has no type for a column; such a column is left out and shows up as missing if needed."""
    try:
        from_arrow_schema(pa.schema([("x", kind)]))
    except Exception as error:
        if type(error).__name__ != "PySparkTypeError":
            raise
        return True
    return False


def _read_csv(
    spark: SparkSession, files: Sequence[str], heads: list[pa.Schema], where: Where, wanted: Sequence[str]
) -> DataFrame:
    header = heads[0].names
    for file, head in zip(files, heads, strict=True):
        if head.names != header:
            raise BadDataError(
                f"{where}: the header of {file} differs from that of {files[0]}: "
                f"{', '.join(head.names)} against {', '.join(header)}"
            )
    for name in wanted:
        if header.count(name) > 1:
            raise BadDataError(f"{where}: the header of {files[0]} repeats column {name}: {', '.join(header)}")
    # A column nobody reads keeps its place only: its name may clash with another's in Spark's eyes.
    names = [name if name in wanted else f"{_UNREAD}{place}" for place, name in enumerate(header)]
    return (
        spark.read.schema(_text((*names, UNREADABLE)))
        .options(header=True, enforceSchema=True, columnNameOfCorruptRecord=UNREADABLE, quote='"', escape='"')
        # With pruning a line is not held against the header: one with too many fields would pass, shifted.
        .option("columnPruning", False)
        .csv(readable(spark, files))
    )


def _read_json(spark: SparkSession, files: Sequence[str], seen: Sequence[str], wanted: Sequence[str]) -> DataFrame:
    """Return those of the wanted columns that any line has; ``seen`` are the columns of the first lines.

    A line leaves out what it does not know, so only all lines together say that a column is not there.
    """

    def lines(names: Sequence[str]) -> DataFrame:
        return (
            spark.read.schema(_text((*names, UNREADABLE)))
            .option("columnNameOfCorruptRecord", UNREADABLE)
            .json(readable(spark, files))
        )

    later = [name for name in wanted if name not in seen]
    if later:
        found = lines(later).agg(*(F.max(F.col(_quoted(name)).isNotNull()) for name in later)).first()
        later = [name for name, there in zip(later, found or (), strict=True) if there]
    return lines([name for name in wanted if name in seen or name in later])


def _text(names: Iterable[str]) -> T.StructType:
    return T.StructType([T.StructField(name, T.StringType()) for name in names])


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def are_missing(missing: Sequence[str], found: Sequence[str], file: str) -> str:
    """Say which columns are missing, which are there, and in which file."""
    columns = f"column {missing[0]} is" if len(missing) == 1 else f"columns {', '.join(missing)} are"
    return f"{columns} missing; there are {', '.join(found) or 'none'}; for example in {file}"


def _number(files: Sequence[str]) -> str:
    return "its 1 file" if len(files) == 1 else f"its {len(files)} files"
