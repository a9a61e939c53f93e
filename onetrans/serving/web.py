"""The web server: uvicorn, with bounds on the head of a request, which it has none for.

A client that has begun to send a head has ``serving.body_timeout_s`` to end it, and 128 KiB; a connection on which
nothing is under way is closed after 75 seconds, also one that never said anything.  What is no HTTP is refused in the
words of every other error.
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from onetrans.serving.app import RankingService, error_body

KEEP_ALIVE_S = 75
LARGEST_HEAD = 128 << 10


def server_config(service: RankingService, **options: Any) -> uvicorn.Config:
    """Return the configuration of a server that answers for a service."""

    class Bounded(_BoundedProtocol):
        head_timeout_s = service.settings.body_timeout_s

    return uvicorn.Config(
        service.app,
        http=Bounded,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        **options,
    )


class _BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    head_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._close_if_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_ends()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > LARGEST_HEAD:
                self._refuse(431, f"the head of the request is larger than {LARGEST_HEAD} bytes")
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)
        elif self.cycle is None or self.cycle.response_complete:
            self._close_if_idle()  # The rest of a body whose call was answered before it was read.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._head_ends()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _head_ends(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._refuse(408, f"the head of the request did not arrive within {self.head_timeout_s:g} s")

    def _close_if_idle(self) -> None:
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _refuse(self, status: int, message: str) -> None:
        body = error_body("http", message)
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
