"""The gate before everything: who is refused, by what, and who never is."""

import asyncio
import os
import subprocess
from pathlib import Path

import httpx
import pytest
from ray.serve._private import http_util

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


def test_a_narrowed_gate_takes_serves_fast_path():
    """Names and values that Ray's own parsers read: it then awaits the application without two extra tasks."""
    headers = {}

    async def app(scope, receive, send):
        headers.update(scope["headers"])
        await Application()(scope, receive, send)

    async def scenario():
        gate = Gate()
        async with client(GateMiddleware(app, gate)) as web:
            await web.get("/")
            assert not http_util.parse_disconnect_disabled_header(headers)
            gate.narrow(1, 1)
            await web.get("/", headers={"x-request-timeout-seconds": "9"})

    asyncio.run(scenario())
    assert http_util.parse_disconnect_disabled_header(headers)
    assert http_util.parse_request_timeout_header(headers, 40.0) is None


def test_direct_requests_skip_serve_once_it_has_passed_one_on_and_are_counted(monkeypatch):
    counted, guarded, through = [], [], Application()

    async def guard(scope, receive, send):
        guarded.append((scope["root_path"], scope["path"]))
        assert sum(counted) == 1
        await Application()(scope, receive, send)

    async def scenario():
        gate = Gate()
        gate.narrow(4, 1, count=counted.append)
        async with client(GateMiddleware(through, gate)) as web:
            await web.get("/k/v1/knowledge/user/1")  # Serve knows where the application is
            gate.meet(guard, {"root_path": "/k"})
            for path in ("/k/v1/knowledge/user/1", "/v1/knowledge/user/1", "/k/v1/knowledge:similar", "/k/docs"):
                await web.get(path)
            await web.post("/k/v1/knowledge:batchGet")
        assert gate.inside == 0

    asyncio.run(scenario())
    assert guarded == [("/k", "/k/v1/knowledge/user/1"), ("/k", "/k/v1/knowledge:batchGet")]
    assert through.seen == [
        "/k/v1/knowledge/user/1", "/v1/knowledge/user/1", "/k/v1/knowledge:similar", "/k/docs",
    ]  # fmt: skip
    assert counted == [1, -1, 1, -1]


def test_a_process_that_cannot_answer_fails_the_balancers_check():
    async def scenario():
        app, gate, reason = Application(), Gate(), ["nothing has been published"]
        gate.narrow(1, 1, unready=lambda: reason[0])
        async with client(GateMiddleware(app, gate)) as web:
            refused = await web.get("/-/healthz")
            assert (refused.status_code, refused.text) == (503, "nothing has been published")
            assert (await web.get("/readyz")).status_code == 200  # the application's own affair
            reason[0] = None
            assert (await web.get("/-/healthz")).status_code == 200
        assert app.seen == ["/readyz", "/-/healthz"]

    asyncio.run(scenario())


CONFIGURATION = """defaults
    balance leastconn
    errorfile 503 /tmp/500.http
frontend prometheus
    bind :9101
frontend http_frontend
    bind {host}:8000
backend http-knowledge
    default-server fastinter 250ms fall 12 check
backend http-rank
    default-server fastinter 250ms fall 12 check
listen stats
  bind *:8404
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_haproxy_has_its_own_pages_on_loopback_and_sheds_load(tmp_path, host):
    file = tmp_path / "haproxy.cfg"
    command = ["sh", str(Path(laptop.__file__).parent / "haproxy.sh"), "-db", "-f", str(file), "-x"]
    environment = {"PATH": os.environ["PATH"], "OWLREC_HAPROXY": "echo"}
    for _ in range(2):  # Ray starts it again with the file of before
        file.write_text(CONFIGURATION.format(host=host))
        started = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert started.stdout == f"-db -f {file} -x\n"
        lines = [line.strip() for line in file.read_text().splitlines()]
        assert [line for line in lines if line.startswith("bind")] == [
            "bind 127.0.0.1:9101", f"bind {host}:8000", "bind 127.0.0.1:8404",
        ]  # fmt: skip
        assert [" maxconn 16 " in line for line in lines if line.startswith("default-server")] == [True, False]
        assert "timeout queue 50ms" in lines
    file.write_text(CONFIGURATION.format(host=host).replace("bind *:8404", "bind [::]:8404"))
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "2.60" in refused.stderr
