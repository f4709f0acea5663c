"""The gate of this process, put before Serve's own HTTP handling.

Serve calls `middlewares` in every process that listens if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it
(`owlrec serve` does; on a cluster it is a variable of the Ray processes). Behind HAProxy these are the replicas
themselves; elsewhere it is Serve's proxy, whose gate nobody narrows.
"""

import socket
from functools import cache

import uvicorn
from starlette.middleware import Middleware

from owlrec.serving.guard import Gate, GateMiddleware

GATE = Gate()


def middlewares() -> list[Middleware]:
    """What Serve puts before each request."""
    _send_at_once()
    return [Middleware(GateMiddleware, gate=GATE)]


@cache  # once a process, however often Serve asks
def _send_at_once() -> None:
    """Sets TCP_NODELAY on the socket that Serve is going to listen on, which connections inherit.

    asyncio sets it only where a socket was made with IPPROTO_TCP, and Serve's is not: the body of an answer would wait
    40 ms for its head to be acknowledged.
    """
    startup = uvicorn.Server.startup

    async def startup_without_delay(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        for one in sockets or ():
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await startup(server, sockets)

    uvicorn.Server.startup = startup_without_delay  # type: ignore[method-assign, assignment]
