"""The gate of this process, installed before Serve's own HTTP handling.

Serve calls `middlewares` in every listening process if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it
(`owlrec serve` sets it; on a cluster it is a variable of the Ray processes). Behind HAProxy these are the replicas
themselves; otherwise it is Serve's proxy, whose gate is never narrowed.
"""

import socket
from functools import cache

import uvicorn
from starlette.middleware import Middleware

from owlrec.serving.guard import Gate, GateMiddleware

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
