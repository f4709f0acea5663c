"""What guards every application: request ids, limits, load shedding, time-outs, bodies of errors."""

import asyncio
import base64
import json
import logging
import re
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import cache
from http import HTTPStatus
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owlrec.config import Config
from owlrec.errors import OwlRecError, StoreUnavailableError
from owlrec.serving.keys import KeyRing
from owlrec.serving.schemas import BYTES_TYPE, REQUEST_ID_HEADER, FieldError, Health, ProblemDocument

# ------------------------------------------------------------------------------------------------------------- problems
# Error bodies: RFC 9457 problem documents, which name the invalid field and never repeat its value.
#
# Responses contain neither client data nor internal errors: a message has only what the schema itself says.


MEDIA_TYPE = "application/problem+json"


class Problem(OwlRecError):
    """Ends a request with an error status."""

    def __init__(
        self, status: int, detail: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """field: the invalid field of the request, if any."""
        super().__init__(detail)
        self.status = status
        self.errors = [FieldError(field=field, message=detail)] if field else []
        self.headers = dict(headers or {})


def problem_bytes(status: int, detail: str, errors: list[FieldError] | None = None) -> bytes:
    """A problem document as JSON."""
    document = ProblemDocument(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors or [])
    return json.dumps(document.model_dump(), ensure_ascii=False).encode("utf-8", "backslashreplace")


def problem_response(
    status: int, detail: str, errors: list[FieldError] | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """A problem document as a response."""
    return Response(problem_bytes(status, detail, errors), status, dict(headers or {}), MEDIA_TYPE)


def install_problem_handlers(app: FastAPI) -> None:
    """Makes `app` answer errors with problem documents. The guard handles other errors."""

    @app.exception_handler(Problem)
    async def _problem(_: Request, error: Problem) -> Response:
        return problem_response(error.status, str(error), error.errors, error.headers)

    @app.exception_handler(StoreUnavailableError)
    async def _unavailable(_: Request, error: StoreUnavailableError) -> Response:
        _log.error("%s", error)
        return problem_response(503, "the store does not respond; try again", headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> Response:
        return problem_response(500, "a server error; find it in the server's log by this request id")

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        errors = [_field_error(e) for e in error.errors()]
        return problem_response(422, f"{errors[0].field}: {errors[0].message}", errors)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return problem_response(error.status_code, str(error.detail), headers=error.headers)


def _field_error(error: Any) -> FieldError:
    # A location reads ("body", "ids", 3); for JSON that does not parse, ("body", <offset>).
    where, *parts = error["loc"]
    if error["type"] == "json_invalid":
        return FieldError(field="body", message=f"is not valid JSON, at character {parts[0] if parts else 0}")
    field = ""
    for part in parts:
        field += f"[{part}]" if isinstance(part, int) else f".{str(part)[:60]}" if field else str(part)[:60]
    return FieldError(field=field or str(where), message=error["msg"].removeprefix("Value error, "))


# -------------------------------------------------------------------------------------------------------------- openapi
# Shared parts of all applications' OpenAPI documents: the errors and the authentication.


_PROBLEM = "#/components/schemas/ProblemDocument"

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "description": about}
    for status, about in {
        400: "the request cannot be read",
        401: "no valid API key",
        403: "not a request from this machine, which needs no key",
        413: "the body is too large",
        422: "a field is invalid; the message names it",
        503: "overloaded, or a dependency is unavailable; try again",
        504: "no answer in time",
    }.items()
}
PROBLEMS_OF_ONE: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    404: {"model": ProblemDocument, "description": "this id has no knowledge"},
}


BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {BYTES_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


def complete_document(app: FastAPI, *, keys: bool) -> None:
    """Adds the type of errors to the document of `app` and, with `keys`, that requests need one."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operation in (o for path in made["paths"].values() for o in path.values()):
                for response in operation["responses"].values():
                    content = response.get("content", {})
                    if _PROBLEM in str(content.get("application/json")):  # FastAPI has one type for all models
                        content[MEDIA_TYPE] = content.pop("application/json")
            if keys:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------------ readiness
# Response of /readyz, for load balancers.


Stopping = Callable[[], bool]  # whether a stop was requested


def never_stopping() -> bool:
    """For a process without stop requests."""
    return False


def readiness(
    problem: str | None, stopping: Stopping, *, release: str | None = None, note: str | None = None
) -> Response:
    """200, or 503 with the problem. After a stop request a process finishes its requests and is no longer
    ready, so it gets no new ones. note: a problem that does not prevent answers.
    """
    problem = "stopping" if stopping() else problem
    health = Health(status="not ready" if problem else "ready", release=release, problem=problem or note)
    return Response(health.model_dump_json(), 503 if problem else 200, media_type="application/json")


# ---------------------------------------------------------------------------------------------------------------- guard
# Middleware of every application: request ids, API keys, limits, load shedding, time-outs, one log line per request.
#
# It is an ASGI middleware without Ray, so it works behind any server: Serve's proxy, HAProxy, a test. Each
# replica counts for itself; Serve's own queue limit refuses requests before they reach a replica.


# ------------------------------------------------------------------------------------------------------------ telemetry
# Telemetry of an application: one log line per request, and numbers for Prometheus.
#
# Neither contains requests' or responses' contents: a request is logged by its route, never by its path or body.


_log = logging.getLogger("owlrec.serving")
_access_log = logging.getLogger("owlrec.serving.access")


class Telemetry(Protocol):
    """Receiver of metrics."""

    def count(self, name: str, n: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """Adds to a counter."""

    def time(self, stage: str, seconds: float) -> None:
        """Duration of one stage of a request."""

    def gauge(self, name: str, value: float) -> None:
        """Current value of a gauge."""


class NoTelemetry:
    """Discards metrics."""

    def count(self, name: str, n: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """See Telemetry.count."""

    def time(self, stage: str, seconds: float) -> None:
        """See Telemetry.time."""

    def gauge(self, name: str, value: float) -> None:
        """See Telemetry.gauge."""


def log_request(*, request_id: str, key: str, method: str, route: str, status: int, seconds: float) -> None:
    """One JSON line. route: the template of the path. key: the name of the API key, never the key."""
    line = {
        "request_id": request_id,
        "key": key,
        "method": method,
        "route": route,
        "status": status,
        "ms": round(seconds * 1e3, 2),
    }
    _access_log.info(json.dumps(line))


# ---------------------------------------------------------------------------------------------------------------- guard


OPEN_PATHS = ("/healthz", "/readyz")  # for load balancers, without a key
TOO_MANY = "too many requests at once; try again"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOPBACK_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")


class Limits(Config):
    """Capacity of one replica."""

    max_active: int = Field(64, ge=1)  # concurrent requests; one more is refused with 503
    # Of these, how many run at once while the rest wait in line; None = all. Handlers that compute rather than wait
    # gain nothing from concurrency, and a refusal then waits for only a few of them.
    at_once: int | None = Field(None, ge=1)
    max_body_bytes: int = Field(256 * 1024, ge=1)  # a batch of 1,000 ids takes 20 kB
    timeout_s: float = Field(5.0, gt=0)
    retry_after_s: int = Field(1, ge=1)


class Guard:
    """Outermost middleware of an application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        limits: Limits,
        telemetry: Telemetry | None = None,
        browser: bool = False,
    ) -> None:
        """browser: also accept keys as the password of HTTP's basic authentication, for which browsers prompt."""
        self._app = app
        self._keys = keys
        self._limits = limits
        self._telemetry = telemetry or NoTelemetry()
        self._browser = browser
        self._active = 0
        self._turns = asyncio.Semaphore(limits.at_once or limits.max_active)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})  # refuses the handshake: websockets are not supported
            return
        await _Exchange(self, scope, send).run(receive)

    def admit(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Name of a request's key, "" if none is required. Raises Problem to refuse the request."""
        if _path(scope) in OPEN_PATHS:
            return ""
        if not self._keys.required:
            # Keyless means loopback, but a web page that maps its own host name to 127.0.0.1 could reach that as well.
            if not _LOOPBACK_NAMES.fullmatch(headers.get(b"host", b"localhost").decode("latin-1")):
                raise Problem(403, "without API keys, only requests to localhost are answered", field="Host")
            return ""
        name = self._keys.name_of(_presented_key(headers, self._browser))
        if name is None:
            scheme = 'Basic realm="OwlRec: the password is an API key", charset="UTF-8"' if self._browser else "Bearer"
            raise Problem(
                401, "a valid API key is needed: Authorization: Bearer <key>", headers={"WWW-Authenticate": scheme}
            )
        return name


class _Exchange:
    """One request and its response."""

    def __init__(self, guard: Guard, scope: Scope, send: Send) -> None:
        self._guard = guard
        self._scope = scope
        self._send = send
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        asked = self._headers.get(b"x-request-id", b"").decode("latin-1")
        self._id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        self._status = 0  # 0 until the response starts

    async def run(self, receive: Receive) -> None:
        guard, limits, start, key = self._guard, self._guard._limits, time.perf_counter(), ""
        guard._active += 1
        try:
            key = guard.admit(self._scope, self._headers)
            if guard._active > limits.max_active and _path(self._scope) not in OPEN_PATHS:
                raise Problem(503, TOO_MANY, headers={"Retry-After": str(limits.retry_after_s)})
            async with asyncio.timeout(limits.timeout_s):
                body = await _read_body(self._headers, receive, limits.max_body_bytes)
                # A turn starts after the body has arrived, so slow senders block nobody.
                async with nullcontext() if _path(self._scope) in OPEN_PATHS else guard._turns:
                    await guard._app(self._scope, _replay(body, receive), self._forward)
        except Problem as problem:
            await self._refuse(problem)
        except TimeoutError:
            await self._refuse(Problem(504, f"no answer within {limits.timeout_s:g} s"))
        except _ClientGoneError:
            self._status = 499
        except Exception:
            _access_log.exception("request %s failed", self._id)
            await self._refuse(Problem(500, "a server error; find it in the server's log by this request id"))
        finally:
            guard._active -= 1
            self._record(key, time.perf_counter() - start)

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._own_headers()]
        await self._send(message)

    async def _refuse(self, problem: Problem) -> None:
        if self._status:  # the response has started: it can only be aborted
            return
        self._status = problem.status
        body = problem_bytes(problem.status, str(problem), problem.errors)
        headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **problem.headers}
        raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        await self._send(
            {"type": "http.response.start", "status": problem.status, "headers": raw + self._own_headers()}
        )
        body = b"" if self._scope["method"] == "HEAD" else body
        await self._send({"type": "http.response.body", "body": body})

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        return [(REQUEST_ID_HEADER.encode(), self._id.encode()), (b"x-content-type-options", b"nosniff")]

    def _record(self, key: str, seconds: float) -> None:
        route = getattr(self._scope.get("route"), "path", "") or "unknown"
        method = self._scope["method"] if self._scope["method"] in _METHODS else "other"
        self._guard._telemetry.count("requests", tags={"route": route, "status": str(self._status)})
        self._guard._telemetry.time("request", seconds)
        log_request(request_id=self._id, key=key, method=method, route=route, status=self._status, seconds=seconds)


class _ClientGoneError(Exception):
    pass


def _presented_key(headers: dict[bytes, bytes], browser: bool) -> str:
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if browser and scheme.lower() == "basic":
        with suppress(ValueError):
            return base64.b64decode(key, validate=True).decode("latin-1").partition(":")[2]
    return key.strip() if scheme.lower() == "bearer" else ""


def _path(scope: Scope) -> str:
    """Path within the application, independent of its mount point."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


async def _read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body, which is small by contract; larger ones are refused before they are held."""
    too_large = Problem(413, f"the body is larger than {limit:,} bytes", field="body")
    declared = headers.get(b"content-length", b"0").decode("latin-1")
    if not declared.isdigit() or int(declared[:20]) > limit:
        raise too_large if declared.isdigit() else Problem(400, "is not a number", field="Content-Length")
    parts, size = [], 0
    while True:
        message: dict[str, Any] = dict(await receive())
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def once() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return once


def check_binding(host: str | None, keys: KeyRing) -> str | None:
    """Problem with serving on `host`, None if there is none: off loopback an API key is required."""
    if keys.required or host is None or _LOOPBACK_NAMES.fullmatch(host) or host == "::1":
        return None
    return (
        f"the HTTP server listens on {host}, beyond this machine, but requires no API key. Create one with "
        "`owlrec keys NAME >> keys.txt` and pass the file (keys_file=keys.txt), or listen on 127.0.0.1."
    )


# ----------------------------------------------------------------------------------------------------------------- gate
# Refuses requests beyond a server process's capacity before doing anything else for them.
#
# Beyond capacity, every refusal costs the server a request that it could have answered. So the gate
# comes before routing, keys, logs and limits, and refuses with constant bytes over a connection that
# stays open. Requests that pass it reach the guard (owlrec.serving.guard).


_ALWAYS = (*OPEN_PATHS, "/-/healthz", "/-/routes")  # a full process is not dead


class Gate:
    """Gate of one process. Open until it is narrowed."""

    def __init__(self) -> None:
        self.inside = 0
        self._limit: int | None = None
        self._on_refusal: Callable[[], None] | None = None
        self._messages: tuple[dict[str, object], dict[str, object]] | None = None

    def narrow(self, limit: int, retry_after_s: int, on_refusal: Callable[[], None] | None = None) -> None:
        """From now on admits `limit` requests at once. on_refusal: called for each refused one."""
        body = problem_bytes(503, TOO_MANY)
        headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), "retry-after": str(retry_after_s)}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._messages = (
            {"type": "http.response.start", "status": 503, "headers": raw},
            {"type": "http.response.body", "body": body},
        )
        self._limit, self._on_refusal = limit, on_refusal

    def refusal(self, scope: Scope) -> tuple[dict[str, object], dict[str, object]] | None:
        """Messages that refuse a request; None for an admitted one."""
        if self._limit is None or self.inside < self._limit or scope["path"].endswith(_ALWAYS):
            return None
        if self._on_refusal:
            self._on_refusal()
        return self._messages


class GateMiddleware:
    """The gate as an ASGI middleware."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gate = self._gate
        refusal = gate.refusal(scope)
        if refusal:
            for message in refusal:
                await send(message)
            return
        gate.inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            gate.inside -= 1


# ----------------------------------------------------------------------------------------------------------------- gate
# The gate of this process, installed before Serve's own HTTP handling.
#
# Serve calls `middlewares` in every listening process if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it
# (`owlrec serve` sets it; on a cluster it is a variable of the Ray processes). Behind HAProxy these are the replicas
# themselves; otherwise it is Serve's proxy, whose gate is never narrowed.


GATE = Gate()


def middlewares() -> list[Middleware]:
    """Middlewares that Serve installs before each request."""
    _send_at_once()
    return [Middleware(GateMiddleware, gate=GATE)]


@cache  # once per process, however often Serve calls it
def _send_at_once() -> None:
    """Sets TCP_NODELAY on the socket on which Serve will listen; connections inherit it.

    asyncio sets it only for a socket created with IPPROTO_TCP, and Serve's is not: the body of a response would wait
    40 ms for its head to be acknowledged.
    """
    startup = uvicorn.Server.startup

    async def startup_without_delay(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        for one in sockets or ():
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await startup(server, sockets)

    uvicorn.Server.startup = startup_without_delay  # type: ignore[method-assign, assignment]
