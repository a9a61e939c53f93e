"""A proxy on loopback before an S3 server that answers some requests with an error, late, or not to the end.

Which request suffers is decided by its number alone, so a run can be repeated.  A
request that follows a spoiled one closely may be another's: clients work in
threads, and each has to get through by itself.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>InternalError</Code><Message>We encountered an internal error. Please try again.</Message></Error>"""

REFUSED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"""

_LATE_S = 0.7


@dataclass
class Faults:
    """What is done to requests, and what was."""

    every: dict[str, int] = field(
        default_factory=lambda: {"error": 11, "late": 13, "cut answer": 17, "cut request": 19}
    )
    """Fault -> each how-many-th request suffers it."""
    done: Counter[str] = field(default_factory=Counter)
    """Fault -> requests that suffered it; ``passed`` for the others."""
    down: bool = False
    """Whether every request is answered with an error."""
    makes_buckets: bool = True
    """Whether the user may make a bucket."""
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, method: str) -> str:
        """Return what is done to the next request; empty: nothing."""
        with self._lock:
            self._count += 1
            if self.down:
                fault = "error"
            else:
                fault = next((name for name, each in self.every.items() if self._count % each == each - 1), "")
            # The end of an upload in parts, sent again after it was done, is refused by this server, not by AWS.
            if fault == "cut answer" and method in ("POST", "DELETE"):
                fault = "error"
            self.done[fault or "passed"] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    server_address: tuple[str, int]

    def _forward(self) -> None:
        fault = self.faults.next(self.command)
        if fault == "cut request" and self.command == "PUT":
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1000))
            self._cut()
            return
        body = self._body()
        if fault == "error":
            self._answer(500, ERROR)
            return
        if self.command == "PUT" and "/" not in self.path.strip("/") and not self.faults.makes_buckets:
            self._answer(403, REFUSED)
            return
        if fault == "late":
            time.sleep(_LATE_S)
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "transfer-encoding")}
            headers["Content-Length"] = str(len(body))
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault.startswith("cut"):
            self.wfile.write(content[: len(content) // 2])
            self._cut()
            return
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

    @property
    def upstream(self) -> tuple[str, int]:
        return self.server.upstream  # type: ignore[attr-defined]

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content) if self.command != "HEAD" else 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self) -> None:
        """Close at once, so that the client sees its connection reset."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def handle(self) -> None:
        with suppress(OSError, ValueError):
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; what was done is counted."""


@contextmanager
def before(endpoint: str, faults: Faults) -> Iterator[str]:
    """Put the proxy before a server while the block runs; give its address."""
    host, port = endpoint.removeprefix("http://").split(":")
    handler = type("Handler", (_Handler,), {"faults": faults})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.upstream = (host, int(port))  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
