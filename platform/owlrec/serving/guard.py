"""What guards every application: API keys, request ids, limits, load shedding, time-outs, bodies of errors."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from owlrec.config import Config
from owlrec.errors import OwlRecError, ServingError, StoreUnavailableError
from owlrec.serving.schemas import BYTES_TYPE, REQUEST_ID_HEADER, FieldError, Health, ProblemDocument

# ----------------------------------------------------------------------------------------------------------------- keys
# API keys: several with names, stored as salted hashes, compared in constant time, changed without a restart.
#
# A key file holds one line a key, `name salt hash`, as `owlrec keys NAME` prints it; lines that start with # are
# comments. Keys are 256 random bits, so that one round of SHA-256 is enough: there is no password to guess. To rotate a
# key, add the new line, move the clients, remove the old line; servers notice within a second.


_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})\s+(?P<salt>[0-9a-f]{32})\s+(?P<digest>[0-9a-f]{64})")
_LOOK_AGAIN_S = 1.0
_LONGEST_KEY = 200  # of what a client may send: hashing is not to be had for free

_log = logging.getLogger("owlrec.serving")


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as the server knows it: enough to recognise it, too little to use it."""

    name: str
    salt: bytes
    digest: bytes


def new_key(name: str) -> tuple[str, str]:
    """A fresh key: (the key itself, to give to the client; the line for the key file).

    Raises ServingError for a name that a key file cannot hold.
    """
    key, salt = f"owl_{secrets.token_urlsafe(32)}", secrets.token_bytes(16)
    line = f"{name} {salt.hex()} {_digest(salt, key).hex()}"
    if not _LINE.fullmatch(line):
        raise ServingError(f"'{name}' cannot name a key. Use up to 64 letters, digits, dots, dashes and underscores.")
    return key, line


def parse_keys(text: str, source: str) -> list[StoredKey]:
    """The keys in the lines of a key file. source: what to call it in errors.

    Raises ServingError for a line that is not a key (which is not repeated: it may be a secret), and for a name that
    occurs twice.
    """
    keys: list[StoredKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ServingError(
                f"{source}, line {number}: not a key. A line reads `name salt hash`, as `owlrec keys NAME` prints it."
            )
        if any(key.name == match["name"] for key in keys):
            raise ServingError(f"{source}, line {number}: the name '{match['name']}' occurs twice. Rename one key.")
        keys.append(StoredKey(match["name"], bytes.fromhex(match["salt"]), bytes.fromhex(match["digest"])))
    return keys


class KeyRing:
    """The keys that are valid now. An empty one of no source lets everybody in; see `required`."""

    def __init__(self, file: str | os.PathLike[str] | None = None, text: str | None = None) -> None:
        """file: a key file, read again when it changes. text: the lines themselves, where there is no file.

        Raises ServingError where the file cannot be read or holds no key, and as parse_keys does.
        """
        self._file = Path(file) if file is not None else None
        self._stamp: tuple[int, int, int] | None = None
        self._next_look = 0.0
        self._keys: list[StoredKey] = []
        self.required = self._file is not None or text is not None
        if self._file is not None:
            self._keys = self._read()
        elif text is not None:
            self._keys = parse_keys(text, "OWLREC_API_KEYS")
        if self.required and not self._keys:
            raise ServingError(f"{self._file or 'OWLREC_API_KEYS'}: holds no key. `owlrec keys NAME` makes one.")

    def name_of(self, key: str) -> str | None:
        """The name under which `key` is known, None where it is not valid (any more).

        Takes as long for a wrong key as for a right one.
        """
        self._look_again()
        found = None
        if len(key) > _LONGEST_KEY:
            return None
        for stored in self._keys:  # all of them, whichever matches
            if hmac.compare_digest(_digest(stored.salt, key), stored.digest):
                found = stored.name
        return found

    def _look_again(self) -> None:
        now = time.monotonic()
        if self._file is None or now < self._next_look:
            return
        self._next_look = now + _LOOK_AGAIN_S
        try:
            status = os.stat(self._file)
            if (status.st_mtime_ns, status.st_size, status.st_ino) != self._stamp:
                self._keys = self._read()
                _log.info("key file %s read again: %d keys", self._file, len(self._keys))
        except (OSError, ServingError) as error:
            # A typing mistake must not lock all clients out. An empty file does: it revokes every key.
            _log.error("key file %s cannot be used, the keys of before stay valid: %s", self._file, error)

    def _read(self) -> list[StoredKey]:
        assert self._file is not None
        try:
            status = os.stat(self._file)
            keys = parse_keys(self._file.read_text(encoding="utf-8"), str(self._file))
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(
                f"key file {self._file} cannot be read ({error}). Make one with `owlrec keys`."
            ) from None
        self._stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        return keys


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode("utf-8", "surrogatepass")).digest()


# ------------------------------------------------------------------------------------------------------------- problems
# Error bodies of one shape: RFC 9457 problem documents, which name the field that is wrong and never repeat its value.
#
# What clients sent and what went wrong inside stay out of the answers: a message holds only what the schema itself
# says.


MEDIA_TYPE = "application/problem+json"


class Problem(OwlRecError):
    """Ends a request with an error status."""

    def __init__(
        self, status: int, detail: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """field: the field of the request that is wrong, if it is one's."""
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
    """Makes `app` answer its errors with problem documents. Other errors are left to the guard."""

    @app.exception_handler(Problem)
    async def _problem(_: Request, error: Problem) -> Response:
        return problem_response(error.status, str(error), error.errors, error.headers)

    @app.exception_handler(StoreUnavailableError)
    async def _unavailable(_: Request, error: StoreUnavailableError) -> Response:
        _log.error("%s", error)
        return problem_response(503, "the store does not answer; try again", headers={"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def _failed(_: Request, error: Exception) -> Response:
        return problem_response(500, "an error on our side; the server's log has it under this request id")

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        errors = [_field_error(e) for e in error.errors()]
        return problem_response(422, f"{errors[0].field}: {errors[0].message}", errors)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return problem_response(error.status_code, str(error.detail), headers=error.headers)


def _field_error(error: Any) -> FieldError:
    # A location reads ("body", "ids", 3); of JSON that does not parse, ("body", <offset>).
    where, *parts = error["loc"]
    if error["type"] == "json_invalid":
        return FieldError(field="body", message=f"is no JSON, at character {parts[0] if parts else 0}")
    field = ""
    for part in parts:
        field += f"[{part}]" if isinstance(part, int) else f".{str(part)[:60]}" if field else str(part)[:60]
    return FieldError(field=field or str(where), message=error["msg"].removeprefix("Value error, "))


# -------------------------------------------------------------------------------------------------------------- openapi
# What the OpenAPI documents of all applications say alike: the errors, and how to come in.


_PROBLEM = "#/components/schemas/ProblemDocument"

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "description": about}
    for status, about in {
        400: "the request cannot be read",
        401: "no valid API key",
        403: "not a request of this machine, where no key is asked for",
        413: "the body is too large",
        422: "a field is wrong; the message names it",
        503: "overloaded, or what it needs is not available: try again",
        504: "not answered in time",
    }.items()
}
PROBLEMS_OF_ONE: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    404: {"model": ProblemDocument, "description": "nothing is known of this id"},
}


BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {BYTES_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


def complete_document(app: FastAPI, *, keys: bool) -> None:
    """Makes the document of `app` say of what type errors are and, with `keys`, that requests need one."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operation in (o for path in made["paths"].values() for o in path.values()):
                for response in operation["responses"].values():
                    content = response.get("content", {})
                    if _PROBLEM in str(content.get("application/json")):  # FastAPI knows one type for all models
                        content[MEDIA_TYPE] = content.pop("application/json")
            if keys:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------------------ readiness
# What /readyz answers: the truth, for load balancers to go by.


Stopping = Callable[[], bool]  # whether this process was asked to stop


def never_stopping() -> bool:
    """Of a process that nobody asks."""
    return False


def readiness(
    problem: str | None, stopping: Stopping, *, release: str | None = None, note: str | None = None
) -> Response:
    """200, or 503 with what keeps it from answering. A process that was asked to stop finishes what it has and is not
    ready from then on, so that nothing new is sent to it. note: what is wrong though requests are answered.
    """
    problem = "stopping" if stopping() else problem
    health = Health(status="not ready" if problem else "ready", release=release, problem=problem or note)
    return Response(health.model_dump_json(), 503 if problem else 200, media_type="application/json")


# ---------------------------------------------------------------------------------------------------------------- guard
# What stands before every application: request ids, API keys, limits, load shedding, time-outs, one line of log.
#
# An ASGI middleware without Ray, so that it holds whatever carries the requests: Serve's proxy, HAProxy, a test. Each
# replica counts for itself; Serve's own queue limit, before it, refuses what does not even reach a replica.


# ------------------------------------------------------------------------------------------------------------ telemetry
# What an application says about itself while it serves: one line of log a request, and numbers for Prometheus.
#
# Neither holds what was asked about or answered: a request is logged under its route, never under its path or body.


_access_log = logging.getLogger("owlrec.serving.access")


class Telemetry(Protocol):
    """Where numbers go."""

    def count(self, name: str, n: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """Adds to a counter."""

    def time(self, stage: str, seconds: float) -> None:
        """How long a stage of one request took."""

    def gauge(self, name: str, value: float) -> None:
        """What something stands at."""


class NoTelemetry:
    """Numbers go nowhere."""

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


OPEN_PATHS = ("/healthz", "/readyz")  # what a load balancer asks, without a key
TOO_MANY = "too many requests at once; try again"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOPBACK_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")


class Limits(Config):
    """How much one replica takes on."""

    max_active: int = Field(64, ge=1)  # requests at work at once; one more is refused with 503
    # Of these, how many run at once while the rest wait in line; None = all. Handlers that compute rather than wait
    # gain nothing by taking turns, and a few turns are all that a refusal then has to wait for.
    at_once: int | None = Field(None, ge=1)
    max_body_bytes: int = Field(256 * 1024, ge=1)  # a batch of 1,000 ids takes 20 kB
    timeout_s: float = Field(5.0, gt=0)
    retry_after_s: int = Field(1, ge=1)


class Guard:
    """The outermost middleware of an application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        limits: Limits,
        telemetry: Telemetry | None = None,
        browser: bool = False,
    ) -> None:
        """browser: keys may also come as the password of HTTP's basic authentication, which browsers ask people for."""
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
            await send({"type": "websocket.close", "code": 1000})  # a refused handshake: nothing here speaks it
            return
        await _Exchange(self, scope, send).run(receive)

    def admit(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """The name of the key that a request comes with, "" where none is needed. Raises Problem to keep it out."""
        if _path(scope) in OPEN_PATHS:
            return ""
        if not self._keys.required:
            # Keyless means loopback, but a web page that renames its own host to 127.0.0.1 would reach that as well.
            if not _LOOPBACK_NAMES.fullmatch(headers.get(b"host", b"localhost").decode("latin-1")):
                raise Problem(403, "without API keys only requests to localhost are answered", field="Host")
            return ""
        name = self._keys.name_of(_presented_key(headers, self._browser))
        if name is None:
            scheme = 'Basic realm="OwlRec: the password is an API key", charset="UTF-8"' if self._browser else "Bearer"
            raise Problem(
                401, "a valid API key is needed: Authorization: Bearer <key>", headers={"WWW-Authenticate": scheme}
            )
        return name


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, send: Send) -> None:
        self._guard = guard
        self._scope = scope
        self._send = send
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        asked = self._headers.get(b"x-request-id", b"").decode("latin-1")
        self._id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        self._status = 0  # 0 until the answer has begun

    async def run(self, receive: Receive) -> None:
        guard, limits, start, key = self._guard, self._guard._limits, time.perf_counter(), ""
        guard._active += 1
        try:
            key = guard.admit(self._scope, self._headers)
            if guard._active > limits.max_active and _path(self._scope) not in OPEN_PATHS:
                raise Problem(503, TOO_MANY, headers={"Retry-After": str(limits.retry_after_s)})
            async with asyncio.timeout(limits.timeout_s):
                body = await _read_body(self._headers, receive, limits.max_body_bytes)
                # A turn begins after the body is here: who sends slowly holds up nobody.
                async with nullcontext() if _path(self._scope) in OPEN_PATHS else guard._turns:
                    await guard._app(self._scope, _replay(body, receive), self._forward)
        except Problem as problem:
            await self._refuse(problem)
        except TimeoutError:
            await self._refuse(Problem(504, f"not answered within {limits.timeout_s:g} s"))
        except _ClientGoneError:
            self._status = 499
        except Exception:
            _access_log.exception("request %s failed", self._id)
            await self._refuse(Problem(500, "an error on our side; the server's log has it under this request id"))
        finally:
            guard._active -= 1
            self._record(key, time.perf_counter() - start)

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._own_headers()]
        await self._send(message)

    async def _refuse(self, problem: Problem) -> None:
        if self._status:  # the answer has begun: it can only be cut off
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
    """The path within the application, wherever that is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


async def _read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body, which is small by contract: what is too large is refused before it is held."""
    too_large = Problem(413, f"the body has more than {limit:,} bytes", field="body")
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
    """What is wrong with serving on `host`, None where nothing is: off loopback an API key is needed."""
    if keys.required or host is None or _LOOPBACK_NAMES.fullmatch(host) or host == "::1":
        return None
    return (
        f"the HTTP server listens on {host}, beyond this machine, but no API key is asked for. Make one with `owlrec "
        f"keys NAME >> keys.txt` and name the file (keys_file=keys.txt), or listen on 127.0.0.1."
    )


# ----------------------------------------------------------------------------------------------------------------- gate
# Refuses what a server process cannot take on before anything else is done for it.
#
# Beyond its capacity a server pays for every request that it refuses with one that it could have answered. So the gate
# stands before routing, keys, logs and limits, and refuses with bytes that were written once, over a connection that
# stays open. What passes it meets the guard (owlrec.serving.guard).


_ALWAYS = (*OPEN_PATHS, "/-/healthz", "/-/routes")  # full is not dead


class Gate:
    """Of one process. Open until it is narrowed."""

    def __init__(self) -> None:
        self.inside = 0
        self._limit: int | None = None
        self._on_refusal: Callable[[], None] | None = None
        self._messages: tuple[dict[str, object], dict[str, object]] | None = None

    def narrow(self, limit: int, retry_after_s: int, on_refusal: Callable[[], None] | None = None) -> None:
        """Lets `limit` requests in at once from now on. on_refusal: called for each that is refused."""
        body = problem_bytes(503, TOO_MANY)
        headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), "retry-after": str(retry_after_s)}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._messages = (
            {"type": "http.response.start", "status": 503, "headers": raw},
            {"type": "http.response.body", "body": body},
        )
        self._limit, self._on_refusal = limit, on_refusal

    def refusal(self, scope: Scope) -> tuple[dict[str, object], dict[str, object]] | None:
        """The messages that refuse a request; None for one that may come in."""
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
