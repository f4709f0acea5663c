"""The gate before everything: who is refused, by what, and who never is."""

import asyncio
import socket

import httpx
import uvicorn

from owlrec.apps import laptop
from owlrec.serving import guard as process_gate
from owlrec.serving.guard import Gate, GateMiddleware


class Application:
    """Answers once it is let; fails for /broken."""

    def __init__(self):
        self.open = asyncio.Event()
        self.seen = []

    async def __call__(self, scope, receive, send):
        self.seen.append(scope["path"])
        if scope["path"] == "/broken":
            raise RuntimeError
        if scope["path"] == "/wait":
            await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})


def client(app):
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def test_beyond_the_limit_requests_are_refused_before_the_application_sees_them():
    async def scenario():
        app, gate, refused = Application(), Gate(), []
        gate.narrow(2, 7, lambda: refused.append(1))
        async with client(GateMiddleware(app, gate)) as web:
            waiting = [asyncio.create_task(web.get("/wait")) for _ in range(2)]
            await asyncio.sleep(0.01)
            answer = await web.post("/v1/knowledge:batchGet", content=b"x" * 10_000)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "7"
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["content-length"]) == len(answer.content)  # or connections could not be kept
            assert answer.json()["status"] == 503
            for path in ("/readyz", "/explorer/healthz", "/-/healthz"):
                assert (await web.get(path)).status_code == 200  # full is not dead
            assert app.seen == ["/wait", "/wait", "/readyz", "/explorer/healthz", "/-/healthz"]
            assert refused == [1]
            app.open.set()
            assert [(await task).status_code for task in waiting] == [200, 200]
            assert (await web.get("/")).status_code == 200
            assert gate.inside == 0

    asyncio.run(scenario())


def test_a_request_that_fails_leaves_again():
    async def scenario():
        gate = Gate()
        gate.narrow(1, 1)
        async with client(GateMiddleware(Application(), gate)) as web:
            for _ in range(3):
                assert (await web.get("/broken")).status_code == 500
        assert gate.inside == 0

    asyncio.run(scenario())


def test_it_is_open_until_it_is_narrowed():
    async def scenario():
        app = Application()
        async with client(GateMiddleware(app, Gate())) as web:
            waiting = [asyncio.create_task(web.get("/wait")) for _ in range(200)]
            await asyncio.sleep(0.01)
            app.open.set()
            assert {(await task).status_code for task in waiting} == {200}

    asyncio.run(scenario())


def test_serve_is_given_the_gate_of_its_process():
    [middleware] = process_gate.middlewares()
    assert middleware.cls is GateMiddleware
    assert middleware.kwargs == {"gate": process_gate.GATE}
    assert laptop._ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "owlrec.serving.guard:middlewares"


def test_an_answer_does_not_wait_for_its_head_to_be_acknowledged():
    delays = []

    class Seeing(asyncio.Protocol):
        def connection_made(self, transport):
            delays.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def scenario(listening):
        config = uvicorn.Config(Application(), http=lambda **_: Seeing(), lifespan="off", log_level="critical")
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup([listening])
        _, writer = await asyncio.open_connection(*listening.getsockname())
        writer.close()
        await asyncio.sleep(0.05)
        await server.shutdown([listening])

    process_gate.middlewares()
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)  # as Serve makes its own
    listening.bind(("127.0.0.1", 0))
    asyncio.run(scenario(listening))
    assert delays == [1]
