"""An S3-compatible object store on loopback: moto's server in a process of its own, and the environment to reach it.

The server keeps objects in its memory and checks no signatures.  It outlives the
clients that a test kills, and is gone at the end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REGION = "us-east-1"

_LISTENING = re.compile(r"Running on http://127\.0\.0\.1:(\d+)")
_START_S = 60


@dataclass(frozen=True)
class ObjectStore:
    """A running server."""

    endpoint: str
    """Address of the server, ``http://127.0.0.1:PORT``."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that boto3, Arrow and whatever else follows AWS' names read; the credentials are no secret."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": "loopback",
            "AWS_SECRET_ACCESS_KEY": "loopback",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            # What the person who runs the tests has set for a real account has no say.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def client(self) -> Any:
        """Return boto3's client of this server."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id="loopback",
            aws_secret_access_key="loopback",
        )

    def create_bucket(self, name: str) -> str:
        """Create a bucket and return its address."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def keys(self, address: str) -> list[str]:
        """Return the names of all objects under ``s3://bucket/prefix``, without the prefix, sorted."""
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(found["Key"][len(prefix) :].lstrip("/") for page in pages for found in page.get("Contents", ()))


@contextmanager
def running() -> Iterator[ObjectStore]:
    """Start a server on a free port of loopback, with its variables in this process' environment; end it after."""
    with TemporaryDirectory(prefix="onetrans-s3-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
            )
        try:
            store = ObjectStore(f"http://127.0.0.1:{_port(process, log)}")
            before = {name: os.environ.get(name) for name in store.environment}
            os.environ.update(store.environment)
            try:
                yield store
            finally:
                for name, value in before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value
        finally:
            process.kill()
            process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        told = log.read_text(errors="replace")
        if found := _LISTENING.search(told):
            return int(found[1])
        assert process.poll() is None, f"the S3 server ended: {told}"
        time.sleep(0.05)
    raise AssertionError(f"the S3 server does not listen after {_START_S} s: {log.read_text(errors='replace')}")
