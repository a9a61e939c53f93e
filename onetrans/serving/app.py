"""The HTTP interface: ``POST /v1/rank``, ``/healthz``, ``/readyz``, ``/metrics``, and of these ``/openapi.json``.

:data:`STATUSES` are what it answers besides 200.

A deadline counts from the head of a call and covers all of it: the body's arrival, reading and scoring.  A call that
cannot be answered in time is turned away before its body is read, as far as that can be told.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import psutil
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from onetrans import __version__
from onetrans.errors import BadDataError
from onetrans.serving.batcher import Batcher, DeadlineError, OverloadedError
from onetrans.serving.calls import (
    Call,
    answer,
    answer_schema,
    call_schema,
    error_schema,
    example_request,
    read_call,
    shortened,
)
from onetrans.serving.engine import OneTransInferenceEngine
from onetrans.serving.metrics import (
    CONTENT_TYPE,
    LATENCY_BOUNDS_S,
    SIZE_BOUNDS,
    Counter,
    Gauge,
    Histogram,
    Labels,
    render,
)
from onetrans.serving.pace import Pace
from onetrans.serving.watch import ServedModel

logger = logging.getLogger(__name__)

DEADLINE_HEADER = "x-deadline-ms"
DEADLINE_DIGITS = 9

STATUSES = {
    400: "a header cannot be read",
    401: "the bearer token is missing or wrong",
    404: "there is no such route",
    405: "the route is not for this method",
    408: "the head, or then the body, did not arrive within `serving.body_timeout_s`",
    413: "the body is larger than `serving.max_body_kib`",
    422: "what was sent does not fit the model; the message names request, feature and value",
    429: "too much waits; `Retry-After` says for how many seconds to stay away",
    431: "the head of the call is larger than 128 KiB",
    500: "the service failed; its log says why",
    504: "the deadline passed first; nothing was done",
}
"""Status of an error -> what it means, for the description and (a test holds it to this) docs/serving.md."""

_SMALL_BODY = 64 << 10
"""Bytes that are read where they arrive: about half a millisecond, which handing them to a thread costs nearly too."""

_REMEMBERED_BYTES, _FIRST_GUESS_S = 4 << 20, 1e-8
"""What the time to read larger bodies is judged by, and what a byte is taken for at first."""


class CallError(Exception):
    """A call that is answered with an error."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    @property
    def response(self) -> Response:
        """The answer."""
        headers = {name.replace("_", "-"): value for name, value in self.headers.items()}
        return Response(error_body(self.code, str(self)), self.status, headers, media_type="application/json")


def error_body(code: str, message: str) -> bytes:
    """Return the body of every answer that is an error."""
    return msgspec.json.encode({"error": {"code": code, "message": message}})


class RankingService:
    """One served model behind a batcher; ``app`` is what a web server runs."""

    def __init__(self, served: ServedModel, token: str = "") -> None:
        """Put a model behind HTTP; with a token, ``/v1/rank`` and ``/metrics`` ask for it."""
        self.served = served
        self.settings = served.settings.serving
        self.token = token.encode()
        self.batcher = Batcher(self.settings)
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._reading_pace = Pace(_REMEMBERED_BYTES, _FIRST_GUESS_S)
        self.calls = Counter("onetrans_calls_total", "Calls of /v1/rank by HTTP status; 499: the client went away.")
        self.seconds = Histogram("onetrans_call_seconds", "Time of answered calls of /v1/rank.", LATENCY_BOUNDS_S)
        self.candidates = Histogram("onetrans_call_candidates", "Candidates of answered calls.", SIZE_BOUNDS)
        self.app = self._build()

    def _build(self) -> FastAPI:
        # FastAPI's pages load scripts from a host of others: who looks at a service on loopback would call outside.
        app = FastAPI(
            title="OneTrans ranking", version=__version__, lifespan=self._lifespan, docs_url=None, redoc_url=None
        )
        app.add_route("/v1/rank", self.rank, methods=["POST"])  # Starlette's: nothing of it is FastAPI's to check
        app.add_api_route("/healthz", self.health, methods=["GET"], summary="Is the process alive?")
        app.add_api_route("/readyz", self.ready, methods=["GET"], summary="Which model answers?")
        app.add_api_route("/metrics", self.metrics, methods=["GET"], summary="Figures for Prometheus")
        app.add_exception_handler(HTTPException, _refused)
        plain = app.openapi

        def described() -> dict[str, Any]:
            if app.openapi_schema is None:
                app.openapi_schema = self._describe(plain())
            return app.openapi_schema

        app.openapi = described  # type: ignore[method-assign]

        def forget() -> None:
            app.openapi_schema = None

        self.served.on_swap = forget  # another version may have other features
        return app

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        await self.batcher.start()
        self.served.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, self.served.stop)
            await self.batcher.stop()
            self._reading.shutdown()

    # Routes

    async def rank(self, request: Request) -> Response:
        """Answer one call."""
        began = time.monotonic()
        try:
            response = await self._rank(request, began)
        except CallError as error:
            response = error.response
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            logger.exception("a call failed")
            response = CallError(500, "internal", "the service failed; its log says why").response
        self.calls.add(status=str(response.status_code))
        if response.status_code == 200:
            self.seconds.observe(time.monotonic() - began)
        return response

    async def _rank(self, request: Request, began: float) -> Response:
        self._authorize(request)
        deadline = began + self._deadline_s(request)
        announced = _announced_bytes(request)
        if announced > self._largest_body:
            raise self._too_large()
        self._turn_away_if_late(announced, deadline)
        body = await self._body(request, began, deadline)
        served = self.served.engine
        try:
            call = await self._read(body, served, deadline)
            scoring = asyncio.ensure_future(self.batcher.score(served, call, deadline))
            scores = await _unless_gone(scoring, request.receive)
        except BadDataError as error:
            raise CallError(422, "does_not_fit", str(error)) from error
        except OverloadedError as error:
            raise _overloaded(error) from error
        except DeadlineError as error:
            raise _late(began, deadline) from error
        self.candidates.observe(call.candidates)
        return Response(answer(call, scores, served.source.version), media_type="application/json")

    def _turn_away_if_late(self, size: int, deadline: float) -> None:
        """Turn a call with a body of ``size`` bytes away if what waits will take longer than it can wait."""
        pace = self._reading_pace
        wait_s = pace.expected_s(pace.ahead) + self.batcher.wait_s
        if self.batcher.waiting >= self.settings.queue_requests or (
            wait_s and time.monotonic() + wait_s + pace.expected_s(size) > deadline
        ):
            raise _overloaded(OverloadedError(wait_s))

    async def _read(self, body: bytes, engine: OneTransInferenceEngine, deadline: float) -> Call:
        """Read a body: a small one at once, others one after another in a thread, so none keeps the small ones waiting.

        Raises:
            DeadlineError: if its turn does not come before the deadline.
            BadDataError: if it does not fit.
        """
        if len(body) <= _SMALL_BODY:
            return read_call(body, engine, self.settings)
        pace = self._reading_pace

        def read() -> Call:
            began = time.monotonic()
            call = read_call(body, engine, self.settings)
            pace.took(len(body), time.monotonic() - began)
            return call

        pace.ahead += len(body)
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                return await asyncio.get_running_loop().run_in_executor(self._reading, read)
        except TimeoutError:
            raise DeadlineError from None
        finally:
            pace.ahead -= len(body)

    def _authorize(self, request: Request) -> None:
        if not self.token:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token):
            raise CallError(
                401, "token", "a bearer token is needed: Authorization: Bearer ...", WWW_Authenticate="Bearer"
            )

    def _deadline_s(self, request: Request) -> float:
        given = request.headers.get(DEADLINE_HEADER)
        if given is None:
            return self.settings.deadline_ms / 1000
        if not (given.isascii() and given.isdigit() and 0 < len(given) <= DEADLINE_DIGITS and int(given) > 0):
            raise CallError(
                400, "header", f"{DEADLINE_HEADER} is {given[:50]!r}, needed are whole milliseconds, at least 1"
            )
        return min(int(given), self.settings.deadline_ms) / 1000

    @property
    def _largest_body(self) -> int:
        return self.settings.max_body_kib << 10

    def _too_large(self) -> CallError:
        told = f"the body is larger than {self._largest_body} bytes (serving.max_body_kib)"
        return CallError(413, "body", told, Connection="close")

    async def _body(self, request: Request, began: float, deadline: float) -> bytes:
        parts, size = [], 0
        try:
            left_s = max(deadline - time.monotonic(), 0)
            async with asyncio.timeout(min(self.settings.body_timeout_s, left_s)):
                async for part in request.stream():
                    size += len(part)
                    if size > self._largest_body:
                        raise self._too_large()
                    parts.append(part)
        except TimeoutError as error:
            if left_s < self.settings.body_timeout_s:
                raise _late(began, deadline, Connection="close") from error
            raise CallError(
                408,
                "body",
                f"the body did not arrive within {self.settings.body_timeout_s:g} s ({size} bytes did)",
                Connection="close",
            ) from error
        return b"".join(parts)

    async def health(self) -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "alive"}

    async def ready(self) -> dict[str, Any]:
        """Tell which model answers."""
        engine = self.served.engine
        return {
            "status": "ready",
            "model": self.served.address,
            "version": engine.source.version,
            "day": engine.source.day,
            "since": self.served.since,
            "refused_version": self.served.refused,
            "fixed_batch_difference": engine.difference,
        }

    async def metrics(self, request: Request) -> Response:
        """Return the page that Prometheus reads."""
        try:
            self._authorize(request)
        except CallError as error:
            return error.response
        return Response(render(self._metrics()), media_type=CONTENT_TYPE)

    def _metrics(self) -> list[Counter | Gauge | Histogram]:
        engine, batcher, served, process = self.served.engine, self.batcher, self.served, psutil.Process()
        counts = engine.cache.counts
        found: dict[Labels, float] = {
            (("result", result),): getattr(counts, result) for result in ("equal", "appended", "encoded")
        }
        info: Labels = tuple(sorted({"version": engine.source.version, "day": engine.source.day}.items()))
        return [
            self.calls,
            self.seconds,
            self.candidates,
            Gauge("onetrans_queue_requests", "Requests that wait.", lambda: batcher.waiting),
            Gauge("onetrans_batches_total", "Forward passes.", lambda: batcher.batches, "counter"),
            Gauge("onetrans_scored_requests_total", "Requests scored.", lambda: batcher.scored, "counter"),
            Gauge("onetrans_scoring_seconds_total", "Time spent scoring.", lambda: batcher.busy_s, "counter"),
            Gauge("onetrans_user_cache_bytes", "Memory of users that are kept.", lambda: engine.cache.bytes),
            Gauge("onetrans_user_cache_users", "Users that are kept.", lambda: len(engine.cache)),
            Gauge(
                "onetrans_user_cache_requests_total", "Requests by what was kept.", lambda: found, "counter"
            ),
            Gauge("onetrans_user_cache_evicted_total", "Users dropped for room.", lambda: counts.evicted, "counter"),
            Gauge("onetrans_model", "The model that answers.", lambda: {info: 1.0}),
            Gauge("onetrans_model_swaps_total", "Versions that took over.", lambda: served.swaps, "counter"),
            Gauge("onetrans_model_refused_total", "Versions that were refused.", lambda: served.refusals, "counter"),
            Gauge(
                "onetrans_registry_failures_total", "Looks at the registry that failed.",
                lambda: served.failed_looks, "counter",
            ),
            Gauge("process_resident_memory_bytes", "Resident memory.", lambda: process.memory_info().rss),
            Gauge("process_cpu_seconds_total", "Processor time.", lambda: sum(process.cpu_times()[:2]), "counter"),
        ]  # fmt: skip

    # OpenAPI

    def _describe(self, schema: dict[str, Any]) -> dict[str, Any]:
        engine = self.served.engine
        kept = engine.source.kept
        first, last = (kept[0][0], kept[0][-1]) if kept else [example_request(engine.schema)] * 2
        content: dict[str, Any] = {
            "schema": call_schema(engine.schema, self.settings),
            "examples": {
                "one request": {"value": shortened(first)},
                "several requests": {"value": {"requests": [shortened(first), shortened(last)]}},
            },
        }
        error = {"application/json": {"schema": error_schema()}}
        operation: dict[str, Any] = {"summary": "Score the candidates of requests", "operationId": "rank"}
        schema["paths"] = {"/v1/rank": {"post": operation}, **schema["paths"]}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
        operation["parameters"] = [
            {
                "name": DEADLINE_HEADER,
                "in": "header",
                "required": False,
                "description": f"milliseconds within which the answer is of use; at most {self.settings.deadline_ms}",
                "schema": {"type": "integer", "minimum": 1, "maximum": 10**DEADLINE_DIGITS - 1},
            }
        ]
        operation["responses"] = {
            "200": {"description": "scores", "content": {"application/json": {"schema": answer_schema()}}},
            **{str(status): {"description": text, "content": error} for status, text in STATUSES.items()},
        }
        page = schema["paths"]["/metrics"]["get"]
        page["responses"] = {
            "200": {"description": "figures", "content": {CONTENT_TYPE: {"schema": {"type": "string"}}}},
            "401": operation["responses"]["401"],
        }
        if self.token:
            schema["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
            operation["security"] = page["security"] = [{"token": []}]
        return schema


def _announced_bytes(request: Request) -> int:
    """Return the length of the body by its head, 0 if that does not say it."""
    announced = request.headers.get("content-length", "")
    return int(announced[:15]) if announced.isdigit() else 0


async def _unless_gone(scoring: asyncio.Future[Any], receive: Callable[[], Awaitable[Any]]) -> Any:
    """Return what ``scoring`` gives; if the client goes away first, give up its place in the queue.

    Raises:
        ClientDisconnect: if it went away.
    """
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({scoring, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not scoring.done():
            raise ClientDisconnect
        return scoring.result()
    finally:
        gone.cancel()
        scoring.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _late(began: float, deadline: float, **headers: str) -> CallError:
    allowed_ms = 1000 * (deadline - began)
    return CallError(504, "deadline", f"not scored within {allowed_ms:.0f} ms; nothing was done", **headers)


async def _refused(request: Request, error: Exception) -> Response:
    """Answer a call of a route or with a method that does not exist, in the shape of every other error."""
    assert isinstance(error, HTTPException)
    code = {404: "no_such_route", 405: "method"}.get(error.status_code, "http")
    told = {
        404: f"there is no {request.url.path[:100]}; see /openapi.json",
        405: f"{request.method} is not for this route",
    }
    body = error_body(code, told.get(error.status_code, error.detail))
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _overloaded(error: OverloadedError) -> CallError:
    return CallError(429, "overloaded", str(error), Retry_After=str(error.retry_after_s))
