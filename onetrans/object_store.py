"""How S3 is reached: one set of values for Arrow, PyIceberg, MLflow and Spark, and a check that a place can be used.

The address and the style come from the section ``store`` of the settings, or from
the variables that every client of S3 knows (``AWS_ENDPOINT_URL``, ``AWS_REGION``).
Credentials have no setting: each client looks for them where AWS' own tools do
(``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, a profile, a web identity, the
machine's role), so none is ever held, passed on or written here.

A request that fails, or is not answered, is repeated by the client with growing
pauses; what still fails after about a minute ends the step, which can be run again.
Arrow's client gives up when a connection breaks in the middle of an answer, and an
object of many parts is read for minutes: :class:`Objects` reads that piece again.
The strategy that AWS calls standard is not used: it has a budget of repetitions, which
Arrow never fills again, so the hundred-first failure in the life of a process is final.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from onetrans.errors import BadConfigError, without_login
from onetrans.settings import load_settings

ATTEMPTS = 8
"""Tries of one request by boto3 and by Spark; with the pauses between them they reach over most of a minute."""

ARROW_ATTEMPTS = 11
"""The same by Arrow, whose pauses double from 50 ms."""

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
"""Time without a byte after which a request counts as lost."""

_QUICK_ATTEMPTS = 2
_READS = 5
_READ_PAUSE_S = 0.1
_PATIENCE_S = 45.0
_STREAM_BYTES = 1 << 20
_LASTING = re.compile("ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|HTTP status 40[0134]")
_SCHEMES = ("s3", "s3a")
_PROBE = "_onetrans_check"

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """Where S3 is, for all clients of this process; nothing in it is secret."""

    endpoint: str
    """Address of the service; empty: AWS."""
    region: str
    """Region; empty: each client finds out."""
    path_style: bool
    """Whether the bucket stands in the path, not in the host's name; at AWS it never does."""

    def filesystem(self, bucket: str) -> fs.PyFileSystem:
        """Return Arrow's client, which reads broken pieces again."""
        return _filesystem(self, bucket if not (self.endpoint or self.region) else "")

    def spark(self) -> dict[str, str]:
        """Return the properties of a Spark session that reads and writes by s3a."""
        properties = {
            "fs.s3.impl": "org.apache.hadoop.fs.s3a.S3AFileSystem",
            "fs.s3a.attempts.maximum": str(ATTEMPTS),
            "fs.s3a.connection.establish.timeout": f"{CONNECT_TIMEOUT_S:g}s",
            "fs.s3a.connection.timeout": f"{REQUEST_TIMEOUT_S:g}s",
        }
        if self.region:
            properties["fs.s3a.endpoint.region"] = self.region
        if self.endpoint:
            properties["fs.s3a.endpoint"] = self.endpoint
            properties["fs.s3a.path.style.access"] = str(self.path_style).lower()
            properties["fs.s3a.connection.ssl.enabled"] = str(self.endpoint.startswith("https")).lower()
        return {f"spark.hadoop.{name}": value for name, value in properties.items()}

    def boto(self) -> dict[str, str]:
        """Return the variables by which boto3, and MLflow through it, reach the same service."""
        variables = {"AWS_MAX_ATTEMPTS": str(ATTEMPTS), "AWS_RETRY_MODE": "standard"}
        if self.region:
            variables["AWS_DEFAULT_REGION"] = self.region
        if self.endpoint:
            variables["MLFLOW_S3_ENDPOINT_URL"] = self.endpoint
            variables["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] = "path" if self.path_style else "virtual"
        return variables


def access(environ: Mapping[str, str] | None = None) -> Access:
    """Return how this process reaches S3, by its settings and environment."""
    environ = os.environ if environ is None else environ
    return _access(tuple(sorted((name, value) for name, value in environ.items() if _decides(name))))


def _decides(name: str) -> bool:
    return name.startswith(("ONETRANS_CONFIG", "ONETRANS_STORE_")) or name in (
        "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
    )  # fmt: skip


@functools.cache
def _access(variables: tuple[tuple[str, str], ...]) -> Access:
    environ = dict(variables)
    store = load_settings(environ).store
    endpoint = store.endpoint or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or ""
    region = store.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""
    # Arrow asks a service of one's own for no region, and signs with this one.
    return Access(endpoint.rstrip("/"), region or ("us-east-1" if endpoint else ""), store.path_style)


@functools.cache
def _filesystem(found: Access, bucket: str) -> fs.PyFileSystem:
    return fs.PyFileSystem(Objects(_client(found, bucket, ARROW_ATTEMPTS)))


def _client(found: Access, bucket: str, attempts: int) -> fs.S3FileSystem:
    # A bucket at AWS lies in one region, and is asked for it where nobody says.
    region = found.region or (fs.resolve_s3_region(bucket) if bucket else None)
    return fs.S3FileSystem(
        endpoint_override=found.endpoint or None,
        region=region,
        force_virtual_addressing=bool(found.endpoint) and not found.path_style,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=attempts),
        allow_delayed_open=True,  # a small file is one request, not three
    )


# Reading what broke off again


def _repeated(call: Callable[[], T], what: str) -> T:
    """Return what ``call`` returns; one that fails, but for good reason, is repeated.

    Arrow repeats most of what fails itself, but not an answer that breaks off.  What it has repeated for
    :data:`_PATIENCE_S` is given up.

    Raises:
        ConnectionError: if it fails for no lasting reason to the end, so that nobody takes it for a damaged file.
    """
    until = time.monotonic() + _PATIENCE_S
    for attempt in range(1, _READS + 1):
        try:
            return call()
        except OSError as error:
            lasting = isinstance(error, FileNotFoundError | PermissionError) or _LASTING.search(str(error))
            if lasting:
                raise
            if attempt == _READS or time.monotonic() > until:
                raise ConnectionError(f"{what}: {reason(error)}") from error
            logger.warning("%s again: %s", what, reason(error))
            time.sleep(_READ_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


class _Pieces(io.RawIOBase):
    """An object that is read piece by piece; a piece whose connection breaks is asked for again.

    Threads may read one object: Arrow looks for a place and reads there in one call, so each thread has its own place.
    """

    def __init__(self, name: str, file: pa.NativeFile, *, one_place: bool) -> None:
        self._name = name
        self._file = file
        self._size: int = file.size()
        self._shared = _Place()
        self._own = threading.local()
        self._one_place = one_place

    def _at(self) -> _Place:
        if self._one_place:
            return self._shared
        if not hasattr(self._own, "place"):
            self._own.place = _Place()
        place: _Place = self._own.place
        return place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at().offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = self._at()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: place.offset, io.SEEK_END: self._size}[whence]
        place.offset = base + offset
        return place.offset

    def read(self, size: int | None = -1) -> bytes:
        place = self._at()
        rest = max(self._size - place.offset, 0)
        wanted = rest if size is None or size < 0 else min(size, rest)
        content = self._read_at(wanted, place.offset) if wanted else b""
        place.offset += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _read_at(self, size: int, offset: int) -> bytes:
        def read() -> bytes:
            content: bytes = self._file.read_at(size, offset)
            if len(content) != size:
                raise OSError(f"{len(content):,} of {size:,} bytes came")
            return content

        return _repeated(read, f"s3://{self._name}: reading {size:,} bytes at {offset:,}")

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclass
class _Place:
    offset: int = 0


class Objects(fs.FileSystemHandler):
    """Arrow's S3 client, whose files read a broken piece again; everything else is passed on."""

    def __init__(self, client: fs.S3FileSystem) -> None:
        self.client = client

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Objects) and self.client == other.client

    def __ne__(self, other: object) -> bool:
        return not self == other

    def get_type_name(self) -> str:
        """Name the kind of file system."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """Return a path as the client writes it."""
        return str(self.client.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """Look at paths."""
        return _repeated(lambda: list(self.client.get_file_info(paths)), f"looking at {paths}")

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """List a folder."""
        return _repeated(lambda: list(self.client.get_file_info(selector)), f"listing {selector.base_dir}")

    def create_dir(self, path: str, recursive: bool) -> None:
        """Do nothing: a folder is there when an object is in it."""

    def delete_dir(self, path: str) -> None:
        """Delete all objects in a folder."""
        _repeated(lambda: self.client.delete_dir(path), f"deleting {path}")

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete all objects in a folder."""
        self.client.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        """Refuse to empty every bucket."""
        raise OSError("all buckets of a store are not deleted at once")

    def delete_file(self, path: str) -> None:
        """Delete an object."""
        _repeated(lambda: self.client.delete_file(path), f"deleting {path}")

    def move(self, src: str, dest: str) -> None:
        """Copy an object and delete the first."""
        self.client.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy an object within the store."""
        self.client.copy_file(src, dest)

    def _open(self, path: str) -> pa.NativeFile:
        return _repeated(lambda: self.client.open_input_file(path), f"opening {path}")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """Open an object to be read from its beginning."""
        pieces = _Pieces(path, self._open(path), one_place=True)
        return pa.PythonFile(io.BufferedReader(pieces, _STREAM_BYTES), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open an object to be read anywhere, by any thread."""
        return pa.PythonFile(_Pieces(path, self._open(path), one_place=False), mode="r")

    def open_output_stream(self, path: str, metadata: Mapping[str, str] | None) -> pa.NativeFile:
        """Open an object to be written; it is there when the stream is closed."""
        return self.client.open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Mapping[str, str] | None) -> pa.NativeFile:
        """Refuse: an object is written once."""
        raise OSError(f"s3://{path}: an object cannot be appended to")


def is_s3(path: str) -> bool:
    """Tell whether a path is an address in S3."""
    return path.split("://", 1)[0] in _SCHEMES and "://" in path


def open_s3(path: str) -> tuple[fs.PyFileSystem, str]:
    """Return the client and the path within it, ``bucket/key``, of an address.

    Raises:
        BadConfigError: if the address has no bucket, or carries a name or a password.
    """
    bucket, inside = _inside(path)
    return access().filesystem(bucket), inside


def _inside(path: str) -> tuple[str, str]:
    """Return the bucket, and the path that begins with it."""
    inside = path.split("://", 1)[1].rstrip("/")
    bucket = inside.split("/", 1)[0]
    if "@" in bucket:
        raise BadConfigError(
            "an s3:// address carries a key (before its '@'): credentials belong into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, an address ends up in logs and tables"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,62}", bucket):
        raise BadConfigError(f"{path}: {bucket!r} is not the name of a bucket")
    return bucket, inside


def export_for_boto(environ: MutableMapping[str, str] | None = None) -> None:
    """Let boto3 and MLflow in this process reach the store; what the environment says already stays."""
    environ = os.environ if environ is None else environ
    for name, value in access().boto().items():
        environ.setdefault(name, value)


def problem_with(place: str) -> str:
    """Try a folder: write, read, list and delete one small object there; empty if all of it works.

    It waits for seconds, not for a minute as the steps do.  The text says what failed and what to look at; it is
    written for a person, and holds no credential.

    Args:
        place: ``s3://bucket/prefix``, or a folder that Arrow reaches otherwise.
    """
    from onetrans import storage  # which opens places by this module

    content = b"written by a check, and deleted by it"
    step = "open"
    try:
        client, folder = _quick(place) if is_s3(place) else storage.open_filesystem(place)
        path = f"{folder}/{_PROBE}-{uuid.uuid4().hex[:8]}"
        step = "write to"
        with client.open_output_stream(path) as stream:
            stream.write(content)
        step = "read from"
        with client.open_input_stream(path) as stream:
            if stream.readall() != content:
                return f"{place}: what is read is not what was written; is a cache in between?"
        step = "list"
        if all(info.path != path for info in client.get_file_info(fs.FileSelector(folder))):
            return f"{place}: an object that was just written is not listed; the store must be consistent"
        step = "delete from"
        client.delete_file(path)
    except (OSError, BadConfigError) as error:
        return f"cannot {step} {place}: {reason(error)}. {_advice(error)}"
    return ""


def _quick(place: str) -> tuple[fs.S3FileSystem, str]:
    bucket, inside = _inside(place)
    found = access()
    return _client(found, "" if found.endpoint or found.region else bucket, _QUICK_ATTEMPTS), inside


def reason(error: BaseException) -> str:
    """Return the first line of a client's error without keys and signatures."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return _without_secrets(line)[:400]


def _without_secrets(text: str) -> str:
    text = re.sub(r"(?i)(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s]+", r"\1...", text)
    text = re.sub(r"\b((?:AKIA|ASIA)[A-Z0-9]{4})[A-Z0-9]{8,}", r"\1...", text)
    return without_login(text)


def _advice(error: BaseException) -> str:
    text, found = str(error), access()
    if "ACCESS_DENIED" in text or "403" in text or "INVALID_ACCESS_KEY" in text or "SIGNATURE" in text:
        return "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the permissions (infra/s3/policy.json)"
    if "NO_SUCH_BUCKET" in text or "404" in text:
        return "The bucket is not there: create it, the pipeline never does"
    return (
        f"Asked was {found.endpoint or 'AWS'}, region {found.region or 'of the bucket'}; see store.endpoint, "
        "store.region and store.path_style"
    )
