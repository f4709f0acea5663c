"""The gate of this process, put before Serve's own HTTP handling.

Serve calls `middlewares` in every process that listens if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it
(`owlrec serve` does; on a cluster it is a variable of the Ray processes). Behind HAProxy these are the replicas
themselves; elsewhere it is Serve's proxy, whose gate nobody narrows.
"""

from starlette.middleware import Middleware

from owlrec.serving.gate import Gate, GateMiddleware

GATE = Gate()


def middlewares() -> list[Middleware]:
    """What Serve puts before each request."""
    return [Middleware(GateMiddleware, gate=GATE)]
