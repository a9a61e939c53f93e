"""Small files beside the tables: read, write at once or not at all, list, delete; local or s3://.

Everything goes through :mod:`pyarrow.fs`, so one path string decides where a
file lives; how S3 is reached is said in :mod:`onetrans.object_store`.  Table data
itself is written by Spark or its Python workers and committed by :mod:`onetrans.lake`.
"""

from __future__ import annotations

import errno
import json
import mimetypes
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pyarrow import fs

from onetrans.errors import BadConfigError
from onetrans.object_store import is_s3, open_s3

# Spark globs, and both cut an address at '#' and '?'.
_SPECIAL = "#*?[\\]{}"


def is_local(path: str) -> bool:
    """Tell whether ``path`` is a local path or a ``file://`` address."""
    return "://" not in path or path.startswith("file://")


def resolve(path: str) -> str:
    """Return ``path`` with a scheme: absolute ``file://`` addresses for local paths, others unchanged."""
    if "://" not in path:
        return "file://" + os.path.abspath(path)
    return path.rstrip("/")


def address(path: str) -> str:
    """Return ``path`` as an address for a library that decodes addresses: a local path has its letters encoded."""
    return Path(os.path.abspath(local_path(path))).as_uri() if is_local(path) else path.rstrip("/")


def local_path(path: str) -> Path:
    """Return a local path for ``path``.

    Raises:
        BadConfigError: if it is not on the local disk.
    """
    if not is_local(path):
        raise BadConfigError(f"{path} is not on the local disk")
    return Path(path.removeprefix("file://"))


def open_filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Return the file system that holds ``path`` and the path within it.

    A local path is taken letter by letter: blanks, ``%`` and ``#`` have no meaning in it, as an address would give
    them.
    """
    if is_local(path):
        return fs.LocalFileSystem(), os.path.abspath(local_path(path))
    if is_s3(path):
        return open_s3(path)
    return fs.FileSystem.from_uri(path.rstrip("/"))


def refuse_special(setting: str, path: str) -> str:
    """Return ``path`` if Spark and Iceberg open the folder of that very name.

    Raises:
        BadConfigError: if it is local and its full name has a character that they take for a pattern or for the end
            of the path.
    """
    found = sorted(set(os.path.abspath(local_path(path))) & set(_SPECIAL)) if is_local(path) else []
    if found:
        raise BadConfigError(
            f"{setting} is the folder {os.path.abspath(local_path(path))}, whose name has {' '.join(found)}; Spark and "
            f"Iceberg do not take {' '.join(_SPECIAL)} for letters of a name, so choose a folder without them"
        )
    return path


def join(base: str, *parts: str) -> str:
    """Join path segments with '/'.

    Raises:
        BadConfigError: if a segment could leave ``base``.
    """
    for part in parts:
        if part in ("", ".", "..") or "/" in part or "\\" in part:
            raise BadConfigError(f"{part!r} is not a file or folder name")
    return "/".join([base.rstrip("/"), *parts])


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite database's address, ``sqlite:///FILE``; None if it is another database or server."""
    return Path(uri.removeprefix("sqlite:///").split("?")[0]) if uri.startswith("sqlite:///") else None


def is_lost(error: BaseException) -> bool:
    """Tell whether a connection or the system failed while a file was read, and not the file itself.

    Arrow raises ``OSError`` without a number for what is wrong in a file; a file that is not there, or may not be read,
    will not be on the next try either.
    """
    own = (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM)
    return isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno not in own)


def exists(path: str) -> bool:
    """Tell whether a file or folder is there."""
    filesystem, inner = open_filesystem(path)
    return filesystem.get_file_info(inner).type != fs.FileType.NotFound


def read_bytes(path: str) -> bytes:
    """Return a file's content.

    Raises:
        FileNotFoundError: if it is not there.
    """
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_stream(inner) as stream:
        return stream.readall()


@contextmanager
def writing(path: str) -> Iterator[IO[bytes]]:
    """Open a file to write: a reader sees the old content until the block ends, then the new, never a part.

    On an error nothing is replaced; in an object store, which shows an object when its stream is closed, the part
    that was written replaces the old one, so a file that is written in pieces has a name of its own there.
    """
    filesystem, inner = open_filesystem(path)
    if not isinstance(filesystem, fs.LocalFileSystem):
        # An object store makes the object visible when the stream is closed.
        with filesystem.open_output_stream(inner, metadata=_metadata(inner)) as stream:
            yield stream
        return
    filesystem.create_dir(inner.rsplit("/", 1)[0], recursive=True)
    temporary = f"{inner}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, inner)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _metadata(path: str) -> dict[str, str]:
    """Return what an object store is told of a file, so that a browser shows a page that it serves."""
    kind, _ = mimetypes.guess_type(path)
    return {"Content-Type": kind or "application/octet-stream"}


def write_bytes(path: str, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with writing(path) as file:
        file.write(data)


def read_json(path: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: if it is not there.
        BadConfigError: if it is not JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise BadConfigError(f"{path} is not JSON: {error}") from error


def write_json(path: str, data: Any) -> None:
    """Write readable JSON, at once or not at all.

    Raises:
        ValueError: if a number is not finite: JSON has none, and other readers than Python's refuse the file.
    """
    text = json.dumps(data, indent=2, sort_keys=False, default=str, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def list_files(path: str, suffix: str = "") -> list[str]:
    """Return the files under ``path`` whose name ends in ``suffix``, sorted, hidden and '_' files left out."""
    filesystem, inner = open_filesystem(path)
    found = filesystem.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True))
    if is_local(path):
        prefix = "file://"
    else:
        whole = resolve(path)
        prefix = whole[: -len(inner)] if whole.endswith(inner) else whole.split("://")[0] + "://"
    return sorted(
        prefix + info.path
        for info in found
        if info.type == fs.FileType.File
        and info.base_name.endswith(suffix)
        and not info.base_name.startswith((".", "_"))
    )


def delete_tree(path: str) -> None:
    """Delete a folder and all in it; nothing happens if it is not there."""
    filesystem, inner = open_filesystem(path)
    if filesystem.get_file_info(inner).type == fs.FileType.Directory:
        filesystem.delete_dir(inner)


def delete_file(path: str) -> None:
    """Delete a file; nothing happens if it is not there."""
    filesystem, inner = open_filesystem(path)
    if filesystem.get_file_info(inner).type == fs.FileType.File:
        filesystem.delete_file(inner)
