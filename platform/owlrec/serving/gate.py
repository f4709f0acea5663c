"""Refuses what a server process cannot take on before anything else is done for it.

Beyond its capacity a server pays for every request that it refuses with one that it could have answered. So the gate
stands before routing, keys, logs and limits, and refuses with bytes that were written once, over a connection that
stays open. What passes it meets the guard (owlrec.serving.guard).
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from owlrec.serving.guard import OPEN_PATHS, TOO_MANY
from owlrec.serving.problems import MEDIA_TYPE, problem_bytes

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
