"""The clients against the real applications, in this process: what is asked and read agrees with what is served."""

import asyncio
import doctest
import inspect
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from served_world import SCRIPT, knowledge_app, publish_world
from starlette.testclient import TestClient
from test_ranking import CTR, LLM, Table

import owlrec
from owlrec import AsyncClient, Client
from owlrec.client import ClientError, RetryPolicy
from owlrec.releases import current_release
from owlrec.serving.guard import Limits, NoTelemetry
from owlrec.serving.keys import KeyRing, new_key
from owlrec.serving.rank_api import Cascade, build_rank_api
from owlrec.workspace import Workspace

KEY, LINE = new_key("shop", ["lookup", "rank"])
LOCAL = "http://localhost"
ONCE = RetryPolicy(attempts=1)


class InProcess(httpx.BaseTransport):
    """Hands blocking requests to an application."""

    def __init__(self, web):
        self.web = web

    def handle_request(self, request):
        answer = self.web.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        return httpx.Response(answer.status_code, headers=list(answer.headers.items()), content=answer.content)


class Blocking:
    """An AsyncClient whose calls are waited for, so that one test body does for both clients."""

    def __init__(self, portal, client):
        self._portal, self._client = portal, client

    def __getattr__(self, name):
        return lambda *a, **k: self._portal.call(lambda: getattr(self._client, name)(*a, **k))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("client") / "ws")
    publish_world(workspace, "first")
    return workspace


@pytest.fixture(scope="module")
def applications(workspace):
    """Knowledge, which wants a key, and ranking under a prefix of its own."""

    async def ready():
        return None

    knowledge, _ = knowledge_app(workspace, KeyRing(text=LINE))
    cascade = Cascade(Table(CTR), Table(LLM))
    return knowledge, build_rank_api(cascade, KeyRing(text=LINE), Limits(), NoTelemetry(), ready)


class Router:
    """Two applications at one address, as Serve's proxy holds them."""

    def __init__(self, knowledge, rank):
        self._knowledge, self._rank = knowledge, rank

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"].startswith("/ranking/"):
            await self._rank({**scope, "root_path": "/ranking"}, receive, send)
        else:
            await self._knowledge(scope, receive, send)


@pytest.fixture(scope="module", params=["blocking", "async"])
def connect(request, applications):
    """Makes a client; what it calls is waited for."""
    app = Router(*applications)
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as web:

        def connect(**options):
            options = {"rank_url": f"{LOCAL}/ranking/", "api_key": KEY, "policy": ONCE, **options}
            if request.param == "blocking":
                return Client(f"{LOCAL}/", transport=InProcess(web), **options)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            return Blocking(web.portal, AsyncClient(f"{LOCAL}/", transport=transport, **options))

        yield connect


@pytest.fixture(scope="module")
def owl(connect):
    return connect()


def test_one_entity_and_a_miss(owl, workspace):
    entity = owl.get("user", 1)
    assert (entity.release, entity.id, entity.text) == (current_release(workspace), 1, "first likes films")
    assert entity.provenance.as_of == 1000
    assert owl.get("user", np.int64(9)) is None
    assert owl.get("user", 3, ["vector", "codes"]).vector == [3.0, 1.0]


def test_many_aligned(owl, workspace):
    answer = owl.batch_get("user", np.array([9, 5, 1]), ["text"])
    assert answer.release == current_release(workspace)
    assert [(r.id, r.found, r.text) for r in answer.results] == [
        (9, False, None), (5, True, "first war films"), (1, True, "first likes films"),
    ]  # fmt: skip


def test_vectors_as_numpy(owl, workspace):
    vectors = owl.vectors("user", [2, 9, 5])
    assert vectors.release == current_release(workspace)
    assert (vectors.rows.dtype, vectors.rows.shape) == (np.float16, (3, 2))
    np.testing.assert_allclose(vectors.rows, [[0, 2], [0, 0], [0.6, 0.8]], atol=1e-3)
    assert vectors.mask.tolist() == [True, False, True]


def test_a_table_of_several_kinds(owl, workspace):
    table = owl.table({"user": [2, 9], "item": ["7"]}, ["text", "vector"], if_release=current_release(workspace))
    assert table.schema.metadata == {b"release": current_release(workspace).encode()}
    assert table.drop_columns("text").to_pylist() == [
        {"kind": "user", "id": 2, "found": True, "vector": [0, 2]},
        {"kind": "user", "id": 9, "found": False, "vector": None},
        {"kind": "item", "id": 7, "found": True, "vector": [pytest.approx(0.1, abs=1e-4), -2]},
    ]
    assert table["text"].to_pylist() == [SCRIPT, None, "first a film"]
    with pytest.raises(ClientError) as refused:
        owl.batch_get("user", [1], if_release="20200101T000000Z-00000000")
    assert refused.value.status == 409


def test_similar_entities(owl):
    assert [n.id for n in owl.similar("user", 5).results] == [3, 2, 1]
    near = owl.similar("user", vector=np.array([2, 1], np.float32), limit=1)
    assert near.results[0].id == 3
    assert near.results[0].score == pytest.approx(7 / 50**0.5, abs=1e-4)
    assert owl.similar("user", 9) is None


def test_the_release_and_whether_it_is_served(owl, workspace):
    release = owl.current_release()
    assert (release.release, release.dim) == (current_release(workspace), 2)
    assert (owl.readiness().status, owl.readiness().release) == ("ready", release.release)


def test_ranking(owl):
    answer = owl.rank([1, 2, 3, 4, 5], user_id=7, mode="cascade", rerank=3, explain=True, deadline_ms=2000)
    assert [r.id for r in answer.results] == [3, 4, 2, 5, 1]
    assert answer.results[0].explanation.ctr_place == 2
    assert not answer.degraded
    inline = owl.rank(np.array([2, 1]), history=[{"item_id": 3, "rating": 5.0}, {"item_id": 4}], top_k=1)
    assert [r.id for r in inline.results] == [2]


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda owl: owl.get("film", 1), "kind"),
        (lambda owl: owl.get("user/../item", 1), "kind"),
        (lambda owl: owl.get("user", ""), "ids[0]"),
        (lambda owl: owl.get("user", -1), "ids[0]"),
        (lambda owl: owl.batch_get("user", []), "ids"),
        (lambda owl: owl.batch_get("user", [1, 1]), "ids"),
        (lambda owl: owl.batch_get("user", np.array([1.0])), "ids[0]"),
        (lambda owl: owl.vectors("user", range(1001)), "ids"),
        (lambda owl: owl.similar("user"), "body"),
        (lambda owl: owl.similar("user", vector=[np.nan, 1]), "vector[0]"),
        (lambda owl: owl.rank([1]), "body"),
        (lambda owl: owl.rank([1], user_id=1, mood="good"), "mood"),
        (lambda owl: owl.rank([1], history=[{"item_id": "1"}]), "history[0].item_id"),
    ],
)
def test_a_mistake_is_named_before_anything_is_sent(owl, ask, field):
    with pytest.raises(ClientError) as raised:
        ask(owl)
    assert raised.value.status is None
    assert [e.field for e in raised.value.errors] == [field]


def test_the_servers_refusals_are_told(owl, connect):
    with pytest.raises(ClientError, match="has 3 components") as raised:
        owl.similar("user", vector=[1, 2, 3])
    assert (raised.value.status, [e.field for e in raised.value.errors]) == (422, ["vector"])
    assert len(raised.value.request_id) == 32
    for key in (None, "owl_wrong"):
        with pytest.raises(ClientError, match="API key") as raised:
            connect(api_key=key).get("user", 1)
        assert raised.value.status == 401
    with pytest.raises(ClientError) as raised:
        connect(rank_url=f"{LOCAL}/nowhere").rank([1], user_id=1)
    assert raised.value.status == 404


def test_keys_are_not_shown():
    assert repr(Client(LOCAL, api_key="owl_secret")) == "Client('http://localhost')"
    with pytest.raises(ClientError, match="http://"):
        Client("localhost:8000")


def test_both_clients_have_the_same_calls():
    calls = [n for n, f in inspect.getmembers(Client, inspect.isfunction) if not n.startswith("_")]
    assert len(calls) == 9
    for name in calls:
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(AsyncClient, name))


def server_that(*behaviors):
    """A real address whose connections are treated in turns: an answer in bytes, or None to say nothing. Its url, and
    what it was sent.
    """
    listener, got = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        held = []
        for behavior in behaviors:
            connection, _ = listener.accept()
            got.append(connection.recv(65536))
            if behavior is None:
                held.append(connection)
            elif callable(behavior):
                behavior(connection)
            else:
                connection.sendall(behavior)
                connection.close()
        listener.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", got


READY = b'HTTP/1.1 200 OK\r\ncontent-length: 18\r\nconnection: close\r\n\r\n{"status":"ready"}'


def both(url, policy):
    """The readiness by each client."""

    async def ask():
        async with AsyncClient(url, policy=policy) as owl:
            return await owl.readiness()

    with Client(url, policy=policy) as owl:
        yield owl.readiness
    yield lambda: asyncio.run(ask())


def test_over_a_real_connection_it_asks_again():
    policy = RetryPolicy(first_wait_s=0.01, timeout_s=0.3)
    cut = READY[:60]  # the connection ends amid the answer
    url, got = server_that(*[b"", cut, None, READY] * 2)
    for ask in both(url, policy):
        assert ask().status == "ready"
    assert len(got) == 8


def test_a_server_that_trickles_is_given_up():
    def trickle(connection):
        connection.sendall(READY[:-19])
        for byte in READY[-19:]:
            time.sleep(0.1)
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return

    url, _ = server_that(trickle, trickle)
    for ask in both(url, RetryPolicy(attempts=1, timeout_s=0.4)):
        with pytest.raises(ClientError, match=r"within 0\.4 s"):
            ask()


def test_threads_share_one_client(connect):
    owl = connect()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: owl.get("user", 1).text, range(40)))
    assert set(texts) == {"first likes films"}


@pytest.mark.parametrize("name", ["Client", "AsyncClient"])
def test_the_docstring_of_each_client_holds_an_example_that_runs(name, workspace, monkeypatch):
    app, _ = knowledge_app(workspace)
    blocking, waiting = httpx.Client, httpx.AsyncClient
    with TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 1)) as web:
        monkeypatch.setattr(httpx, "Client", lambda transport: blocking(transport=InProcess(web)))
        monkeypatch.setattr(
            httpx, "AsyncClient", lambda transport: waiting(transport=httpx.ASGITransport(app, client=("127.0.0.1", 1)))
        )
        runner = doctest.DocTestRunner()
        for test in doctest.DocTestFinder(recurse=False).find(getattr(owlrec, name), name, module=False, globs={}):
            assert test.examples
            runner.run(test)
        assert runner.summarize(verbose=False).failed == 0


@pytest.mark.process
def test_naming_the_client_loads_neither_ray_nor_torch():
    code = (
        "import sys, owlrec; assert 'httpx' not in sys.modules; owlrec.Client('http://x'); owlrec.AsyncClient; "
        "print([m for m in ('torch', 'ray', 'fastapi', 'pyarrow', 'pandas') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="Klient"):
        _ = owlrec.Klient
