"""The OpenAPI documents fuzzed by schemathesis over real HTTP: whatever is sent, no answer is a server's error or
breaks its own schema.

Skips itself where the program is not installed: `pipx install schemathesis`, or in an environment of its own, since it
brings a pytest plugin. `--fuzz-cases` sets how many requests are sent at least, to each application.
"""

import asyncio
import shutil
import subprocess
import threading
import time
from collections import Counter

import httpx
import pytest
import uvicorn
from processes import free_port
from served_world import knowledge_app, publish_world
from test_ranking import CTR, LLM, Table

from owlrec.serving.guard import Limits, NoTelemetry
from owlrec.serving.keys import KeyRing, new_key
from owlrec.serving.rank_api import Cascade, build_rank_api
from owlrec.workspace import Workspace

PROGRAM = shutil.which("schemathesis")
# That there is no server error is counted here: 503 is a documented answer, to a deadline of 10 ms for one.
CHECKS = "status_code_conformance,content_type_conformance,response_schema_conformance"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(PROGRAM is None, reason="schemathesis is not installed")]


class Counting:
    """Counts the statuses of what an application answers."""

    def __init__(self, app):
        self.app, self.statuses = app, Counter()

    async def __call__(self, scope, receive, send):
        async def counted(message):
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        await self.app(scope, receive, counted)


KEYS = {scope: new_key(scope, [scope]) for scope in ("lookup", "rank")}
RING = "\n".join(line for _, line in KEYS.values())


def knowledge(folder, keys):
    workspace = Workspace(folder / "ws")
    publish_world(workspace, "first")
    return knowledge_app(workspace, keys)[0]


def ranking(_, keys):
    async def ready():
        await asyncio.sleep(0)

    return build_rank_api(Cascade(Table(CTR), Table(LLM)), keys, Limits(), NoTelemetry(), ready)


@pytest.mark.parametrize(
    ("build", "scope"),
    [(knowledge, None), (ranking, None), (knowledge, "lookup"), (knowledge, "rank"), (ranking, "rank")],
)
def test_no_request_breaks_an_application(build, scope, tmp_path, request):
    """scope: of the key that is sent; None without keys."""
    at_least = request.config.getoption("--fuzz-cases")
    app, port = Counting(build(tmp_path, KeyRing(text=RING) if scope else KeyRing())), free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        own = KEYS["rank" if build is ranking else "lookup"][0]
        answer = httpx.get(f"http://127.0.0.1:{port}/openapi.json", headers={"Authorization": f"Bearer {own}"})
        (tmp_path / "openapi.json").write_text(answer.text)
        document, seed = str(tmp_path / "openapi.json"), 0
        while sum(app.statuses.values()) < at_least:
            seed += 1
            command = [PROGRAM, "run", document, "--checks", CHECKS, "--no-color", "--url", f"http://127.0.0.1:{port}"]
            command += ["--header", f"Authorization: Bearer {KEYS[scope][0]}"] if scope else []
            command += ["--max-examples", str(at_least // 4), "--seed", str(seed), "--request-timeout", "20"]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
            assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    finally:
        server.should_exit = True
        thread.join()
    print(f"{build.__name__}: {sum(app.statuses.values()):,} requests, by status {dict(app.statuses)}")
    assert not [status for status in app.statuses if status >= 500 and status != 503]
    if scope == "rank" and build is knowledge:
        assert app.statuses[403] > at_least / 2
    else:
        assert app.statuses[200] > app.statuses[503]
