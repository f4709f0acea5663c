"""The knowledge application on Ray Serve, over real HTTP: swaps and killed replicas under requests, Redis that stops,
what overload is answered with, keys and bindings.
"""

import asyncio
import json
import re
import threading
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
from processes import free_port
from redis_server import needs_redis, redis_server
from served_world import publish_world

from owlrec.releases import current_release, roll_back
from owlrec.releases.redis import RedisReleases, push, roll_back_redis
from owlrec.serving.keys import new_key
from owlrec.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
BATCH = "/v1/knowledge:batchGet"
ASKED = {"kind": "user", "ids": [1, 5], "fields": ["text"]}


@pytest.fixture(scope="module")
def base(ray_local):
    """The address of Serve's proxy, on loopback."""
    from ray import serve

    port = free_port()
    # As `owlrec serve` does: the proxy's access log has paths, and with them ids.
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("served") / "ws")
    for label in ("first", "second"):
        publish_world(workspace, label)
    return workspace


@pytest.fixture(scope="module")
def deploy(base, workspace):
    """Deploys the application with given arguments, unless it is there with these; its address."""
    from ray import serve

    from owlrec.apps.knowledge import KnowledgeArgs, app

    deployed = []

    def deploy(**args):
        settings = {"workspace": workspace.path(), "num_cpus": 0.1, "refresh_s": 0.05, **args}
        if [settings] != deployed:
            serve.run(app(KnowledgeArgs(**settings)), name="knowledge", route_prefix="/k")
            deployed[:] = [settings]
        return f"{base}/k"

    return deploy


class Stream:
    """Requests one after another from a thread, until it is stopped; what each was answered with."""

    def __init__(self, url, threads=2):
        self.answers = []  # (seconds since the start, status, texts or None, release)
        self._url = url
        self._stop = threading.Event()
        self._start = time.monotonic()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self):
        with httpx.Client(timeout=20) as web:
            while not self._stop.is_set():
                response = web.post(self._url + BATCH, json=ASKED)
                body = response.json() if response.status_code == 200 else {}
                texts = [r["text"] for r in body.get("results", ())]
                self.answers.append((time.monotonic() - self._start, response.status_code, texts, body.get("release")))
                time.sleep(0.01)  # the cores are others' too

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def labels(workspace):
    first, second = (name for name in workspace.names("releases") if name != "CURRENT")
    return {first: "first", second: "second"}


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_lookups_over_http_and_swaps_under_them(deploy, workspace):
    url, names = deploy(min_replicas=2), labels(workspace)
    assert httpx.get(f"{url}/readyz").json()["release"] == current_release(workspace)
    assert httpx.get(f"{url}/v1/knowledge/user/1").headers["x-owlrec-release"] == current_release(workspace)
    assert httpx.get(f"{url}/v1/knowledge/user/x").headers["content-type"] == "application/problem+json"
    with Stream(url) as stream:
        for _ in range(5):
            for name in sorted(names):
                roll_back(workspace, to=name)
                time.sleep(0.2)
    assert {status for _, status, _, _ in stream.answers} == {200}
    for _, _, texts, release in stream.answers:
        assert texts == [f"{names[release]} likes films", f"{names[release]} war films"]
    assert {release for *_, release in stream.answers} == set(names)


def test_metrics_reach_the_page_that_prometheus_reads(deploy):
    import ray

    url = deploy(min_replicas=2)
    for user in (1, 5, 9):
        httpx.get(f"{url}/v1/knowledge/user/{user}")
    node = ray.nodes()[0]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def exposed():
        text = urllib.request.urlopen(page, timeout=5).read().decode()
        return {
            "misses": re.search(r'ray_owlrec_serving_misses_total{.*kind="user".*} \d', text),
            "requests": re.search(r'ray_owlrec_serving_requests_total{.*route="/v1/knowledge/{kind}/{id}".*} \d', text),
            "seconds": re.search(r'ray_owlrec_serving_seconds_count{.*stage="lookup".*} \d', text),
            "age": re.search(r"ray_owlrec_serving_release_age_s{.*} \d", text),
        }

    wait_for(lambda: all(exposed().values()), 40)


def test_requests_are_logged_by_route_and_name_nobody(deploy):
    import ray

    url = deploy(min_replicas=2)
    httpx.get(f"{url}/v1/knowledge/user/987654321", headers={"x-request-id": "looked-for"})
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"

    def lines():
        files = [f.read_text() for f in logs.glob("replica_knowledge*")]
        return [json.loads(line) for text in files for line in text.splitlines() if "looked-for" in line]

    wait_for(lines)
    request = json.loads(lines()[0]["message"])
    assert (request["route"], request["status"]) == ("/v1/knowledge/{kind}/{id}", 404)
    assert not any("987654321" in f.read_text() for f in logs.iterdir())


def test_a_killed_replica_is_replaced(deploy, workspace):
    import ray

    url = deploy(min_replicas=2)
    with Stream(url) as stream:
        time.sleep(0.5)
        actors = ray.util.list_named_actors(all_namespaces=True)
        replica = next(a for a in actors if a["name"].startswith("SERVE_REPLICA::knowledge"))
        killed = time.monotonic() - stream._start
        ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]), no_restart=True)
        time.sleep(10)
    failed = [at for at, status, *_ in stream.answers if status != 200]
    assert {status for _, status, *_ in stream.answers} <= {200, 500, 503, 504}
    assert all(at < killed + 10 for at in failed)
    assert [status for _, status, *_ in stream.answers[-10:]] == [200] * 10


@needs_redis
def test_redis_that_stops_is_503_and_comes_back(deploy, workspace, tmp_path):
    port = free_port()
    roll_back(workspace, to=min(labels(workspace)))
    with redis_server(tmp_path, port) as server:
        releases = RedisReleases(server)
        first = push(workspace, releases)
        url = deploy(store=server)
        with httpx.Client(timeout=10) as web:
            assert web.post(url + BATCH, json=ASKED).json()["release"] == first
            second = push(workspace, releases, max(labels(workspace)))
            wait_for(lambda: web.post(url + BATCH, json=ASKED).json()["release"] == second)
            assert web.post(url + BATCH, json=ASKED).json()["results"][0]["text"] == "second likes films"
            assert roll_back_redis(releases) == first
            wait_for(lambda: web.post(url + BATCH, json=ASKED).json()["release"] == first)
    with httpx.Client(timeout=10) as web:
        start = time.monotonic()
        refused = web.post(url + BATCH, json=ASKED)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert time.monotonic() - start < 5
        with redis_server(tmp_path, port):
            push(workspace, releases)
            start = time.monotonic()
            wait_for(lambda: web.post(url + BATCH, json=ASKED).status_code == 200, 10)
            assert web.post(url + BATCH, json=ASKED).json()["results"][0]["text"] == "first likes films"


@needs_redis
def test_redis_that_hangs_holds_nobody_past_the_timeout(deploy, workspace, tmp_path):
    import redis

    with redis_server(tmp_path) as server, httpx.Client(timeout=20) as web:
        push(workspace, RedisReleases(server))
        url = deploy(store=server, timeout_s=2.0)
        assert web.post(url + BATCH, json=ASKED).status_code == 200
        redis.Redis.from_url(server).client_pause(4000, all=True)
        start = time.monotonic()
        assert web.post(url + BATCH, json=ASKED).status_code in (503, 504)
        assert time.monotonic() - start < 3.5
        wait_for(lambda: web.post(url + BATCH, json=ASKED).status_code == 200, 15)


def test_overload_is_refused_with_503_and_retry_after(deploy):
    url = deploy(max_active=2)

    async def flood():
        async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=60)) as web:
            return await asyncio.gather(*[web.post(url + BATCH, json=ASKED) for _ in range(300)])

    answers = asyncio.run(flood())
    refused = [a for a in answers if a.status_code != 200]
    assert {a.status_code for a in answers} == {200, 503}
    assert all(a.headers["retry-after"] == "1" for a in refused)
    assert httpx.post(url + BATCH, json=ASKED).status_code == 200


def test_keys_are_asked_for_and_rotate(deploy, tmp_path):
    (old, old_line), (new, new_line) = new_key("old"), new_key("new")
    file = tmp_path / "keys.txt"
    file.write_text(old_line)
    url = deploy(keys_file=str(file))

    def status(key):
        return httpx.get(f"{url}/v1/knowledge/user/1", headers={"Authorization": f"Bearer {key}"}).status_code

    assert httpx.get(f"{url}/v1/knowledge/user/1").status_code == 401
    assert (status(old), status(new), httpx.get(f"{url}/readyz").status_code) == (200, 401, 200)
    file.write_text(new_line)
    wait_for(lambda: status(new) == 200)
    assert status(old) == 401


def test_off_loopback_without_keys_no_replica_starts(ray_local, monkeypatch):
    from owlrec.apps import knowledge
    from owlrec.errors import ServingError
    from owlrec.serving.keys import KeyRing

    class Client:
        class http_config:
            host = "0.0.0.0"

    monkeypatch.setattr(knowledge.context, "_get_global_client", Client)
    with pytest.raises(ServingError, match="no API key"):
        knowledge.refuse_open_binding(KeyRing())
    knowledge.refuse_open_binding(KeyRing(text=new_key("a")[1]))
