"""What guards every application: request ids, keys, limits, load shedding, time-outs, bodies of errors, logs."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import math
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owlrec.config import Config
from owlrec.errors import OwlRecError, ServingError, StoreUnavailableError
from owlrec.serving.keys import KeyRing
from owlrec.serving.keys import Scope as KeyScope
from owlrec.serving.schemas import ARROW_TYPE, BYTES_TYPE, REQUEST_ID_HEADER, FieldError, Health, ProblemDocument

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
        problem = unavailable(error)
        return problem_response(problem.status, str(problem), headers=problem.headers)

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> Response:
        return problem_response(500, _FAILED)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        errors = [_field_error(e) for e in error.errors()]
        return problem_response(422, f"{errors[0].field}: {errors[0].message}", errors)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return problem_response(error.status_code, str(error.detail), headers=error.headers)


def unavailable(error: StoreUnavailableError) -> Problem:
    """The problem of a store that does not respond. Its details go to the log, since they name hosts."""
    _log.error("%s", error)
    return Problem(503, "the store does not respond; try again", headers={"Retry-After": "1"})


def invalid(error: ValidationError) -> Problem:
    """The problem of a body that violates its schema."""
    errors = [_field_error({**e, "loc": ("body", *e["loc"])}) for e in error.errors(include_url=False)]
    problem = Problem(422, f"{errors[0].field}: {errors[0].message}")
    problem.errors = errors
    return problem


def _field_error(error: Any) -> FieldError:
    # A location reads ("body", "ids", 3); for JSON that does not parse, ("body", <offset>).
    where, *parts = error["loc"]
    if error["type"] == "json_invalid":
        return FieldError(field="body", message="is not valid JSON")
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
        403: "the API key does not have this application's scope, or, without keys, the host is not this machine",
        413: "the body is too large",
        422: "a field is invalid; the message names it",
        429: "the API key's rate is used up; see Retry-After",
        503: "overloaded, or a dependency is unavailable; try again",
        504: "no answer in time",
    }.items()
}
PROBLEMS_OF_ONE: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    404: {"model": ProblemDocument, "description": "this id has no knowledge"},
}


BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: {"schema": {"type": "string", "format": "binary"}} for media in (ARROW_TYPE, BYTES_TYPE)}}
}
PINNED: dict[int | str, dict[str, Any]] = {
    409: {"model": ProblemDocument, "description": "`if-release` names a release that is not served here"},
    410: {"model": ProblemDocument, "description": "`if-release` names a release that is not served any more"},
}


def complete_document(app: FastAPI, *, keys: bool, direct: Sequence[BaseRoute] = ()) -> None:
    """Adds the type of errors to the document of `app` and, with `keys`, that requests need one.

    direct: describe routes that are answered before the application (Direct).
    """

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(title=app.title, version=app.version, routes=[*direct, *app.routes])
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


# ---------------------------------------------------------------------------------------------------------------- audit


class AuditLog:
    """Who read whose knowledge: one JSON line per request in a file per process, opt-in.

    Ids are hashed with a secret (HMAC-SHA-256), since a plain hash of a small number is quickly reversed. Who has the
    secret can look for one id. Only the owner may read the files.
    """

    def __init__(self, folder: str | os.PathLike[str], secret: str) -> None:
        """folder: made if it is missing. Raises ServingError for a secret of fewer than 16 characters, or a folder that
        cannot be written.
        """
        if len(secret) < 16:
            raise ServingError(
                "the audit log hashes ids with a secret: set OWLREC_AUDIT_SECRET to 16 characters or more, such as "
                "the output of `openssl rand -hex 32`."
            )
        self._secret = secret.encode()
        path = Path(folder) / f"audit-{socket.gethostname()}-{os.getpid()}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ServingError(f"the audit log {path} cannot be written ({error}). Choose another folder.") from None

    def record(
        self, key: str, route: str, status: int, request_id: str, read: Iterable[tuple[str, Iterable[int]]]
    ) -> None:
        """Appends a line. read: kinds and the ids asked for, hashed here."""
        ids = {kind: [self.hashed(kind, id_) for id_ in ids] for kind, ids in read}
        line = {"at": round(time.time(), 3), "key": key, "route": route, "status": status, "request": request_id}
        os.write(self._file, json.dumps({**line, "ids": ids}).encode() + b"\n")

    def hashed(self, kind: str, id_: int) -> str:
        """What stands for an id: 16 hex digits."""
        return hmac.new(self._secret, f"{kind} {id_}".encode(), hashlib.sha256).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------- guard


OPEN_PATHS = ("/healthz", "/readyz")  # for load balancers, without a key
TOO_MANY = "too many requests at once; try again"
READ_KEY = "owlrec.read"  # in a scope: [(kind, ids)] whose data a request asked for, for the audit log
_FAILED = "a server error; find it in the server's log by this request id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOPBACK_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")
# A line costs as much as a lookup: all failures and slow requests have one, and of the others one in so many.
_LOGGED_ONE_IN = 100
_REQUEST_ID_HEADER = REQUEST_ID_HEADER.encode()
_SLOW_S = 0.25
_ROUND_S = 0.002  # of computing, before new requests are read


class Limits(Config):
    """Capacity of one replica."""

    max_active: int = Field(64, ge=1)  # concurrent requests; one more is refused with 503
    # Of these, how many run at once while the rest wait in line; None = all. Handlers that compute rather than wait
    # gain nothing from concurrency, and a refusal then waits for only a few of them.
    at_once: int | None = Field(None, ge=1)
    max_body_bytes: int = Field(256 * 1024, ge=1)  # a batch of 1,000 ids takes 20 kB
    timeout_s: float = Field(5.0, gt=0)
    retry_after_s: int = Field(1, ge=1)


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete response."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Direct(Protocol):
    """Answers some requests by itself, before the application and its framework see them."""

    def route(self, method: str, path: str) -> str | None:
        """Template of the path, if this request is one of them. Raises Problem (405) for another method."""

    @property
    def computes(self) -> bool:
        """Whether `answer` computes without waiting, so that requests had better run one after another."""

    async def answer(self, scope: Scope, path: str, headers: Mapping[bytes, bytes], body: bytes) -> Reply:
        """The response. Raises Problem, ValidationError (of the body) or StoreUnavailableError."""


class Line:
    """Lets requests that compute run one after another, about 2 ms in a round of the event loop: between two rounds new
    requests are read, and refused if there are too many.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_s = _ROUND_S / 4  # of one request
        self._left = 1  # that may still run in this round
        self._armed = False

    async def turn(self) -> None:
        """Waits until it is a request's turn."""
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_soon(self._next_round)
        if self._left > 0 and not self._waiting:
            self._left -= 1
            return
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting

    def took(self, seconds: float) -> None:
        """Learns how long a request computed."""
        self._mean_s += 0.1 * (seconds - self._mean_s)

    def _next_round(self) -> None:
        self._armed = bool(self._waiting)
        if self._armed:
            asyncio.get_running_loop().call_soon(self._next_round)
        self._left = max(1, int(_ROUND_S / max(self._mean_s, 1e-6)))
        while self._waiting and self._left > 0:
            waiting = self._waiting.popleft()
            if not waiting.done():  # its client may have gone
                waiting.set_result(None)
                self._left -= 1


class Guard:
    """Outermost middleware of an application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        limits: Limits,
        scope: KeyScope,
        telemetry: Telemetry | None = None,
        browser: bool = False,
        direct: Direct | None = None,
        audit: AuditLog | None = None,
    ) -> None:
        """scope: what a key must open. browser: also accept keys as the password of HTTP's basic authentication, for
        which browsers prompt. direct: answers some requests instead of `app`, and in a process with a narrowed gate
        before Serve sees them.
        """
        self._app = app
        self._keys = keys
        self._limits = limits
        self._scope: KeyScope = scope
        self._telemetry = telemetry or NoTelemetry()
        self._browser = browser
        self._direct = direct
        self._audit = audit
        self._active = 0
        self._answered = 0
        self._turns = asyncio.Semaphore(limits.at_once or limits.max_active)
        self._line = Line()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})  # refuses the handshake: websockets are not supported
            return
        if self._direct is not None:
            GATE.meet(self, scope)
        await _Exchange(self, scope, send).run(receive)

    def admit(self, headers: Mapping[bytes, bytes]) -> str:
        """Name of a request's key, "" if none is required. Raises Problem to refuse the request."""
        if not self._keys.required:
            # Keyless means loopback, but a web page that maps its own host name to 127.0.0.1 could reach that as well.
            if not _LOOPBACK_NAMES.fullmatch(headers.get(b"host", b"localhost").decode("latin-1")):
                raise Problem(403, "without API keys, only requests to localhost are answered", field="Host")
            return ""
        key = self._keys.find(_presented_key(headers, self._browser))
        if key is None or key.expired:
            scheme = 'Basic realm="OwlRec: the password is an API key", charset="UTF-8"' if self._browser else "Bearer"
            detail = (
                "the API key has expired: create another one with `owlrec keys`"
                if key
                else ("a valid API key is needed: Authorization: Bearer <key>")
            )
            raise Problem(401, detail, headers={"WWW-Authenticate": scheme})
        if not key.opens(self._scope):
            raise Problem(
                403,
                f"the API key does not have the scope '{self._scope}': create one with `owlrec keys NAME --scope "
                f"{self._scope}`",
                field="Authorization",
            )
        if wait_s := self._keys.wait_s(key):
            raise Problem(
                429,
                f"the API key's rate of {key.rate:g} requests/s is used up: send fewer, or raise its `rate=`",
                headers={"Retry-After": str(math.ceil(wait_s))},
            )
        return key.name


class _Exchange:
    """One request and its response."""

    __slots__ = ("_guard", "_headers", "_id", "_path", "_route", "_scope", "_send", "_status")

    def __init__(self, guard: Guard, scope: Scope, send: Send) -> None:
        self._guard = guard
        self._scope = scope
        self._send = send
        self._path = _path(scope)
        self._route: str | None = None  # of a direct answer
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        asked = self._headers.get(b"x-request-id", b"").decode("latin-1")
        self._id = asked if asked and _REQUEST_ID.fullmatch(asked) else os.urandom(16).hex()
        self._status = 0  # 0 until the response starts

    async def run(self, receive: Receive) -> None:
        guard, limits, start, key = self._guard, self._guard._limits, time.perf_counter(), ""
        guard._active += 1
        try:
            is_open = self._path in OPEN_PATHS
            if guard._active > limits.max_active and not is_open:
                raise Problem(503, TOO_MANY, headers={"Retry-After": str(limits.retry_after_s)})
            if not is_open:
                key = guard.admit(self._headers)
            self._route = guard._direct.route(self._scope["method"], self._path) if guard._direct else None
            if self._route is not None:
                await self._answer_directly(receive)
            else:
                async with asyncio.timeout(limits.timeout_s):
                    body = await _read_body(self._headers, receive, limits.max_body_bytes)
                    # A turn starts after the body has arrived, so slow senders block nobody.
                    async with nullcontext() if is_open else guard._turns:
                        await guard._app(self._scope, _replay(body, receive), self._forward)
        except Problem as problem:
            await self._refuse(problem)
        except ValidationError as error:
            await self._refuse(invalid(error))
        except StoreUnavailableError as error:
            await self._refuse(unavailable(error))
        except TimeoutError:
            await self._refuse(Problem(504, f"no answer within {limits.timeout_s:g} s"))
        except _ClientGoneError:
            self._status = 499
        except Exception:
            _access_log.exception("request %s failed", self._id)
            await self._refuse(Problem(500, _FAILED))
        finally:
            guard._active -= 1
            self._record(key, time.perf_counter() - start)

    async def _answer_directly(self, receive: Receive) -> None:
        guard, direct, limits = self._guard, self._guard._direct, self._guard._limits
        assert direct is not None
        body = b""
        if self._scope["method"] == "POST":
            async with asyncio.timeout(limits.timeout_s):
                body = await _read_body(self._headers, receive, limits.max_body_bytes)
        if direct.computes:
            await guard._line.turn()
            start = time.perf_counter()
            reply = await direct.answer(self._scope, self._path, self._headers, body)
            guard._line.took(time.perf_counter() - start)
        else:
            async with asyncio.timeout(limits.timeout_s), guard._turns:
                reply = await direct.answer(self._scope, self._path, self._headers, body)
        self._status = reply.status
        headers = reply.headers + self._own_headers()
        await self._send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": reply.body})

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
        return [(_REQUEST_ID_HEADER, self._id.encode()), (b"x-content-type-options", b"nosniff")]

    def _record(self, key: str, seconds: float) -> None:
        guard, status = self._guard, self._status
        route = self._route or getattr(self._scope.get("route"), "path", "") or "unknown"
        guard._telemetry.count("requests", tags={"route": route, "status": str(status)})
        guard._telemetry.time("request", seconds)
        method = self._scope["method"] if self._scope["method"] in _METHODS else "other"
        if guard._audit is not None and READ_KEY in self._scope:
            guard._audit.record(key, route, status, self._id, self._scope[READ_KEY])
        guard._answered += 1
        if status not in (200, 304) or seconds > _SLOW_S or guard._answered % _LOGGED_ONE_IN == 1:
            log_request(request_id=self._id, key=key, method=method, route=route, status=status, seconds=seconds)


class _ClientGoneError(Exception):
    pass


def _presented_key(headers: Mapping[bytes, bytes], browser: bool) -> str:
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if browser and scheme.lower() == "basic":
        with suppress(ValueError):
            return base64.b64decode(key, validate=True).decode("latin-1").partition(":")[2]
    return key.strip() if scheme.lower() == "bearer" else ""


def _path(scope: Scope) -> str:
    """Path within the application, independent of its mount point."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


async def _read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
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


_DIRECT = "/v1/knowledge"  # of the paths that are answered directly
_ALWAYS = (*OPEN_PATHS, "/-/healthz", "/-/routes")  # a full process is not dead
# With these Serve awaits the application itself, without two tasks that watch for a time-out and for a client that
# leaves (ray/serve/_private/replica.py, _direct_ingress_asgi, Ray 2.60). The guard has a time-out of its own.
_SERVE_FAST_PATH = [(b"x-request-disconnect-disabled", b"?1"), (b"x-request-timeout-seconds", b"0")]


class Gate:
    """Gate of one process. Open until it is narrowed."""

    def __init__(self) -> None:
        self.inside = 0
        self.narrowed = False
        self.count: Callable[[int], None] | None = None  # tells Serve of requests that start (1) and end (-1)
        self._front: ASGIApp | None = None
        self._root = ""
        self._limit = 0
        self._on_refusal: Callable[[], None] | None = None
        self._unready: Callable[[], str | None] = lambda: None
        self._messages: tuple[dict[str, object], dict[str, object]] | None = None

    def narrow(
        self,
        limit: int,
        retry_after_s: int,
        on_refusal: Callable[[], None] | None = None,
        unready: Callable[[], str | None] = lambda: None,
        count: Callable[[int], None] | None = None,
    ) -> None:
        """From now on admits `limit` requests at once. on_refusal: called for each refused one. unready: the reason for
        which a load balancer should send nothing here. count: see `front`.
        """
        self.count = count
        self._messages = _messages(
            503, problem_bytes(503, TOO_MANY), {"content-type": MEDIA_TYPE, "retry-after": str(retry_after_s)}
        )
        self._limit, self._on_refusal, self._unready, self.narrowed = limit, on_refusal, unready, True

    def meet(self, guard: ASGIApp, scope: Scope) -> None:
        """Called by a guard with direct answers, when Serve has passed it a request: from then on such requests come to
        it at once, if `count` lets Serve know of them.
        """
        if self._front is None and self.count is not None:
            self._front, self._root = guard, scope.get("root_path", "")

    def front(self, scope: Scope) -> ASGIApp | None:
        """The guard, for a request that it answers directly; None for one that Serve must pass on."""
        path: str = scope["path"]
        if self._front is None or not path.startswith(self._root + _DIRECT) or path.endswith(":similar"):
            return None
        scope["root_path"] = self._root
        return self._front

    def refusal(self, scope: Scope) -> tuple[dict[str, object], dict[str, object]] | None:
        """Messages that refuse a request; None for an admitted one."""
        if not self.narrowed:
            return None
        path: str = scope["path"]
        if path.endswith("/-/healthz") and (reason := self._unready()):
            return _messages(503, reason.encode("utf-8", "replace"), {"content-type": "text/plain"})
        if self.inside < self._limit or path.endswith(_ALWAYS):
            return None
        if self._on_refusal:
            self._on_refusal()
        return self._messages


def _messages(status: int, body: bytes, headers: Mapping[str, str]) -> tuple[dict[str, object], dict[str, object]]:
    listed = {**headers, "content-length": str(len(body))}
    raw = [(name.encode(), value.encode()) for name, value in listed.items()]
    return (
        {"type": "http.response.start", "status": status, "headers": raw},
        {"type": "http.response.body", "body": body},
    )


class GateMiddleware:
    """The gate as an ASGI middleware."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        gate = self._gate
        if scope["type"] != "http" or not gate.narrowed:
            await self._app(scope, receive, send)
            return
        refusal = gate.refusal(scope)
        if refusal:
            for message in refusal:
                await send(message)
            return
        gate.inside += 1
        try:
            if gate.count and (front := gate.front(scope)):
                gate.count(1)
                try:
                    await front(scope, receive, send)
                finally:
                    gate.count(-1)
            else:
                scope["headers"] = [*scope["headers"], *_SERVE_FAST_PATH]
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
    return [Middleware(GateMiddleware, gate=GATE)]
