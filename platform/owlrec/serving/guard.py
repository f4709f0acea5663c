"""Middleware of every application: request ids, API keys, limits, load shedding, time-outs, one log line per request.

It is an ASGI middleware without Ray, so it works behind any server: Serve's proxy, HAProxy, a test. Each
replica counts for itself; Serve's own queue limit refuses requests before they reach a replica.
"""

import asyncio
import base64
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, Protocol

from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owlrec.config import Config
from owlrec.serving.keys import KeyRing
from owlrec.serving.problems import MEDIA_TYPE, Problem, problem_bytes
from owlrec.serving.schemas import REQUEST_ID_HEADER

# ------------------------------------------------------------------------------------------------------------ telemetry
# Telemetry of an application: one log line per request, and numbers for Prometheus.
#
# Neither contains requests' or responses' contents: a request is logged by its route, never by its path or body.


_log = logging.getLogger("owlrec.serving.access")


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
    _log.info(json.dumps(line))


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
            _log.exception("request %s failed", self._id)
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
