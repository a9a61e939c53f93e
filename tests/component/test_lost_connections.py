"""A connection that is lost while a file is read is not taken for a damaged file: the step is tried again."""

from __future__ import annotations

import errno
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs.runner import SparkFailedError, telling
from jobs.sources import reading
from onetrans import object_store as s3
from onetrans import plain_rows, storage
from onetrans.errors import EXIT_FAILED, BadDataError
from onetrans.loader import LoaderConfig, RequestData
from tests.component.test_score_candidates import SCHEMA
from tests.faulty_s3 import Faults, before
from tests.s3 import ObjectStore


def _content() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": list(range(1000))}), sink)
    return sink.getvalue()


def _to_train_on(file: str) -> None:
    RequestData([file], SCHEMA, LoaderConfig(batch_size=8, max_seq_len=8))


def _of_the_log(file: str) -> None:
    reading._look(file, "impressions 2024-02-29")


def _by_itself(file: str) -> None:
    plain_rows.opened(file, pq.ParquetFile)


READERS = (_to_train_on, _of_the_log, _by_itself)


@pytest.mark.parametrize("read", READERS)
def test_a_store_that_is_gone_is_no_damaged_file(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], None]
) -> None:
    monkeypatch.setattr(s3, "ARROW_ATTEMPTS", 1)
    monkeypatch.setattr(s3, "_READS", 2)
    bucket = object_store.create_bucket(read.__name__.strip("_").replace("_", "-"))
    file = f"{bucket}/part-0.parquet"
    storage.write_bytes(file, _content())
    faults = Faults({})
    with before(object_store.endpoint, faults) as endpoint:
        monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", endpoint)
        storage.read_bytes(file)
        faults.down = True
        with pytest.raises(ConnectionError, match=r"part-0\.parquet"):
            read(file)
        faults.down = False
        storage.write_bytes(file, _content()[:-100])
        with pytest.raises(BadDataError, match=r"part-0\.parquet"):
            read(file)


def test_what_the_system_says_is_told_from_what_a_file_says() -> None:
    lost = (
        ConnectionResetError(),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
    )
    damaged = (OSError("Couldn't deserialize thrift"), FileNotFoundError(errno.ENOENT, "gone"), pa.ArrowInvalid("x"))
    assert [storage.is_lost(error) for error in (*lost, *damaged)] == [True] * 3 + [False] * 3


class _Breaking(BaseHTTPRequestHandler):
    """The little of WebHDFS that Spark asks for before it reads a file; then the connection breaks."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if "op=OPEN" in self.path:
            self.close_connection = True
            return
        status = {"type": "FILE", "length": 5000, "blockSize": 1 << 20, "replication": 1, "permission": "644"}
        status |= {"owner": "o", "group": "g", "accessTime": 0, "modificationTime": 1, "pathSuffix": ""}
        answer: dict[str, Any] = {"FileStatus": status}
        if "op=LISTSTATUS" in self.path:
            answer = {"FileStatuses": {"FileStatus": [status]}}
        elif "op=GETFILEBLOCKLOCATIONS" in self.path:
            answer = {"BlockLocations": {"BlockLocation": []}}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def breaking() -> Iterator[str]:
    """The address of a file whose reading breaks off."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Breaking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"webhdfs://127.0.0.1:{server.server_port}/part-0.parquet"
    server.shutdown()
    server.server_close()


def test_spark_that_loses_a_connection_has_not_read_bad_data(spark: SparkSession, breaking: str) -> None:
    """Spark calls whatever happens while it reads FAILED_READ_FILE; what it comes from tells which it is."""
    with pytest.raises(SparkFailedError, match=r"impressions 2024-02-29: Spark failed: .*java\.net\.") as raised:
        with telling("impressions 2024-02-29"):
            spark.read.schema("a long").parquet(breaking).collect()
    assert raised.value.exit_code == EXIT_FAILED
    assert breaking in str(raised.value)
