"""The guard before every application: keys, limits, shedding, time-outs, request ids, logs that name nobody."""

import asyncio
import json
import logging

import httpx
import pytest
from fastapi import FastAPI, Request

from owlrec.errors import ServingError
from owlrec.serving.guard import (
    READ_KEY,
    AuditLog,
    Guard,
    Limits,
    Line,
    Problem,
    Reply,
    install_problem_handlers,
)
from owlrec.serving.keys import KeyRing, new_key

KEY, LINE = new_key("shop")


class Recorder:
    def __init__(self):
        self.counts = []
        self.stages = []

    def count(self, name, n=1, tags=None):
        self.counts.append((name, n, dict(tags or {})))

    def time(self, stage, seconds):
        self.stages.append((stage, seconds))

    def gauge(self, name, value):
        raise AssertionError(name)


def guarded(keys=None, telemetry=None, options=None, **limits):
    options = options or {}
    app = FastAPI()
    install_problem_handlers(app)
    app.state.open = asyncio.Event()

    @app.get("/readyz")
    async def readyz():
        return "ready"

    @app.get("/wait/{user}")
    async def wait(user: str):
        await app.state.open.wait()
        return user

    @app.post("/echo")
    async def echo(request: Request):
        return len(await request.body())

    @app.get("/broken")
    async def broken():
        raise RuntimeError("secret detail")

    @app.get("/problem")
    async def problem():
        raise Problem(418, "no coffee", field="drink", headers={"x-more": "yes"})

    app.add_middleware(
        Guard, keys=keys or KeyRing(), limits=Limits(**limits), scope="lookup", telemetry=telemetry, **options
    )
    return app


async def _hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def client(app, host="127.0.0.1", **options):
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=f"http://{host}:8000", **options)


def check_problem(response, status, *words):
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert set(body) == {"type", "title", "status", "detail", "errors"}
    for word in words:
        assert word in body["detail"]
    return body


def run(coroutine):
    return asyncio.run(coroutine)


def test_only_a_valid_key_opens():
    async def scenario():
        async with client(guarded(KeyRing(text=LINE)), host="owl.example.org") as web:
            for headers in (
                {},
                {"Authorization": KEY},
                {"Authorization": f"Basic {KEY}"},
                {"Authorization": "Bearer "},
            ):
                response = await web.get("/problem", headers=headers)
                check_problem(response, 401, "API key")
                assert response.headers["www-authenticate"] == "Bearer"
            check_problem(await web.get("/problem", headers={"Authorization": f"bearer {KEY}"}), 418)
            check_problem(await web.get("/nowhere"), 401)  # what exists is nobody's business without a key
            assert (await web.get("/readyz")).status_code == 200

    run(scenario())


@pytest.mark.parametrize(
    ("made", "status", "words"),
    [
        ({"scopes": ["rank"]}, 403, ["'lookup'", "owlrec keys NAME --scope lookup"]),
        ({"scopes": ["admin"]}, 418, []),
        ({"expires": "2020-01-01"}, 401, ["expired", "owlrec keys"]),
        ({"expires": "2999-01-01"}, 418, []),
    ],
)
def test_a_key_opens_what_its_scopes_name_until_it_expires(made, status, words):
    key, line = new_key("shop", **made)

    async def scenario():
        async with client(guarded(KeyRing(text=line)), headers={"Authorization": f"Bearer {key}"}) as web:
            response = await web.get("/problem")
            check_problem(response, status, *words)
            if status == 401:
                assert response.headers["www-authenticate"] == "Bearer"

    run(scenario())


def test_a_key_has_a_rate():
    key, line = new_key("shop", rate=2)

    async def scenario():
        async with client(guarded(KeyRing(text=line)), headers={"Authorization": f"Bearer {key}"}) as web:
            statuses = [(await web.get("/problem")).status_code for _ in range(3)]
            assert statuses == [418, 418, 429]
            refused = await web.get("/problem")
            check_problem(refused, 429, "2 requests/s")
            assert refused.headers["retry-after"] == "1"
            await asyncio.sleep(0.6)
            assert (await web.get("/problem")).status_code == 418

    run(scenario())


def test_the_line_reads_new_requests_between_those_that_compute():
    async def scenario():
        line, events = Line(), []
        line.took(0.1)  # slower than a round: one per round

        async def one(number):
            await line.turn()
            events.append(number)

        waiting = [asyncio.create_task(one(number)) for number in range(4)]
        asyncio.get_running_loop().call_later(0, events.append, "new")
        gone = asyncio.create_task(one("gone"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(*waiting)
        assert [e for e in events if e != "new"] == [0, 1, 2, 3]
        assert events.index("new") < events.index(2)

    run(scenario())


def test_the_audit_log_says_who_read_whom_without_ids(tmp_path):
    class Answers:
        computes = True

        def route(self, method, path):
            return "/read" if path == "/read" else None

        async def answer(self, scope, path, headers, body):
            scope[READ_KEY] = [("user", [4711, 4712])]
            return Reply(200, [], b"")

    audit = AuditLog(tmp_path / "audit", "s" * 16)

    async def scenario():
        app = guarded(KeyRing(text=LINE), options={"direct": Answers(), "audit": audit})
        async with client(app, headers={"Authorization": f"Bearer {KEY}", "x-request-id": "r-1"}) as web:
            assert (await web.get("/read")).status_code == 200
            assert (await web.get("/problem")).status_code == 418

    run(scenario())
    (file,) = (tmp_path / "audit").iterdir()
    (line,) = map(json.loads, file.read_text().splitlines())
    assert file.stat().st_mode & 0o077 == 0
    assert (line["key"], line["route"], line["status"], line["request"]) == ("shop", "/read", 200, "r-1")
    assert line["ids"] == {"user": [audit.hashed("user", 4711), audit.hashed("user", 4712)]}
    assert "4711" not in file.read_text()
    with pytest.raises(ServingError, match="OWLREC_AUDIT_SECRET"):
        AuditLog(tmp_path, "short")


def test_browsers_ask_people_for_the_key():
    async def scenario():
        app = Guard(_hello, keys=KeyRing(text=LINE), limits=Limits(), scope="lookup", browser=True)
        async with client(app) as web:
            refused = await web.get("/")
            check_problem(refused, 401)
            assert refused.headers["www-authenticate"].startswith("Basic realm=")
            assert (await web.get("/", auth=("anybody", KEY))).status_code == 200
            for wrong in ("Basic !!!", "Basic a", f"Basic {KEY}", "Basic"):
                assert (await web.get("/", headers={"Authorization": wrong})).status_code == 401
        async with client(guarded(KeyRing(text=LINE))) as web:
            assert (await web.get("/problem", auth=("anybody", KEY))).status_code == 401

    run(scenario())


def test_health_is_open_wherever_the_application_is_mounted():
    async def scenario():
        transport = httpx.ASGITransport(app=guarded(KeyRing(text=LINE)), root_path="/k")
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
            assert (await web.get("/k/readyz")).status_code == 200
            assert (await web.get("/k/problem")).status_code == 401

    run(scenario())


def test_without_keys_a_renamed_host_is_refused():
    async def scenario():
        app = guarded()
        for host, status in (("localhost", 418), ("127.0.0.1", 418), ("evil.example.org", 403), ("10.1.1.1", 403)):
            async with client(app, host=host) as web:
                assert (await web.get("/problem")).status_code == status

    run(scenario())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_before_it_is_held(chunked):
    async def parts(n, read):
        for _ in range(n):
            read.append(1)
            yield b"x" * 100

    async def scenario():
        async with client(guarded(max_body_bytes=1000)) as web:
            read = []
            body = (lambda n: parts(n, read)) if chunked else lambda n: b"x" * (100 * n)
            assert (await web.post("/echo", content=body(10))).json() == 1000
            read.clear()
            check_problem(await web.post("/echo", content=body(500)), 413, "1,000 bytes")
            assert len(read) <= 12
            check_problem(await web.post("/echo", headers={"content-length": "-1"}, content=b""), 400, "not a number")

    run(scenario())


def test_too_many_at_once_are_shed_and_it_recovers():
    async def scenario():
        app = guarded(max_active=3, retry_after_s=7)
        async with client(app) as web:
            waiting = [asyncio.create_task(web.get(f"/wait/{i}")) for i in range(3)]
            await asyncio.sleep(0.05)
            refused = await web.get("/problem")
            check_problem(refused, 503, "try again")
            assert refused.headers["retry-after"] == "7"
            assert (await web.get("/readyz")).status_code == 200  # full is not dead
            app.state.open.set()
            assert [(await task).json() for task in waiting] == ["0", "1", "2"]
            check_problem(await web.get("/problem"), 418)

    run(scenario())


def test_what_runs_at_once_is_bounded_while_the_rest_waits_in_line():
    async def scenario():
        app = guarded(max_active=4, at_once=2, timeout_s=5)
        async with client(app) as web:
            waiting = [asyncio.create_task(web.get(f"/wait/{i}")) for i in range(2)]
            await asyncio.sleep(0.05)
            queued = asyncio.create_task(web.get("/problem"))
            sender_is_open = asyncio.Event()

            async def slow_body():
                yield b"x"
                await sender_is_open.wait()
                yield b"x"

            slow = asyncio.create_task(web.post("/echo", content=slow_body()))
            await asyncio.sleep(0.05)
            assert not queued.done()
            assert (await web.get("/readyz")).status_code == 200
            app.state.open.set()
            check_problem(await queued, 418)  # though a body is still being sent
            check_problem(await web.get("/problem"), 418)
            sender_is_open.set()
            assert (await slow).json() == 2
            assert [(await task).json() for task in waiting] == ["0", "1"]

    run(scenario())


def test_a_request_that_takes_too_long_ends_and_frees_its_place():
    async def scenario():
        async with client(guarded(max_active=1, timeout_s=0.1)) as web:
            check_problem(await web.get("/wait/1"), 504, "0.1 s")
            check_problem(await web.get("/problem"), 418)

    run(scenario())


def test_errors_have_one_shape_and_tell_nothing(caplog):
    async def scenario():
        async with client(guarded()) as web:
            body = check_problem(await web.get("/broken"), 500, "server error")
            assert "secret" not in json.dumps(body)
            response = await web.get("/problem")
            assert check_problem(response, 418)["errors"] == [{"field": "drink", "message": "no coffee"}]
            assert response.headers["x-more"] == "yes"
            check_problem(await web.get("/nowhere"), 404)
            check_problem(await web.post("/problem"), 405)

    run(scenario())
    assert "secret detail" in caplog.text


def test_request_ids_are_kept_or_made():
    async def scenario():
        async with client(guarded()) as web:
            given = await web.get("/problem", headers={"x-request-id": "abc-1"})
            assert given.headers["x-owlrec-request-id"] == "abc-1"
            made = {
                (await web.get("/problem", headers={"x-request-id": bad})).headers["x-owlrec-request-id"]
                for bad in ("a b", "x" * 65, "<script>")
            }
            assert len(made) == 3
            assert all(len(one) == 32 for one in made)

    run(scenario())


def test_the_log_has_a_line_per_request_and_names_no_user(caplog):
    caplog.set_level(logging.INFO, "owlrec.serving.access")
    recorder = Recorder()

    async def scenario():
        app = guarded(KeyRing(text=LINE), telemetry=recorder)
        app.state.open.set()
        async with client(app, headers={"Authorization": f"Bearer {KEY}"}) as web:
            await web.get("/wait/4711?history=12,13", headers={"x-request-id": "r-1"})
            await web.get("/nowhere/4711")

    run(scenario())
    lines = [json.loads(r.message) for r in caplog.records if r.name == "owlrec.serving.access"]
    assert lines[0].pop("ms") >= 0
    expected = {"request_id": "r-1", "key": "shop", "method": "GET", "route": "/wait/{user}", "status": 200}
    assert lines[0] == expected
    assert (lines[1]["route"], lines[1]["status"]) == ("unknown", 404)
    assert "4711" not in caplog.text
    assert KEY not in caplog.text
    assert recorder.counts == [
        ("requests", 1, {"route": "/wait/{user}", "status": "200"}),
        ("requests", 1, {"route": "unknown", "status": "404"}),
    ]
    assert [stage for stage, _ in recorder.stages] == ["request", "request"]
