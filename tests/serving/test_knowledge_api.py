"""Knowledge over HTTP, without Ray: what answers hold, what is refused and how, and one release an answer."""

import threading
import time
from collections import Counter
from unittest.mock import Mock

import lmdb
import numpy as np
import pytest
from release_rows import Rows, publish_rows
from served_world import SCRIPT, knowledge_app, publish_world
from starlette.testclient import TestClient

from owlrec.errors import StoreUnavailableError
from owlrec.ids import stable_id
from owlrec.releases import current_release, roll_back
from owlrec.serving.guard import NoTelemetry, Problem
from owlrec.serving.http_lookup import Lookups
from owlrec.serving.keys import KeyRing, new_key
from owlrec.serving.knowledge_api import KnowledgeConfig, build_knowledge_api
from owlrec.serving.schemas import ONE_PATH, BatchAnswer, SingleAnswer
from owlrec.serving.served import ServedReleases, WorkspaceReleases
from owlrec.workspace import Workspace

BATCH, SIMILAR = "/v1/knowledge:batchGet", "/v1/knowledge:similar"
BYTES = {"Accept": "application/octet-stream"}
ARROW = {"Accept": "application/vnd.apache.arrow.stream"}
LOCAL = "http://localhost"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("served") / "ws")
    publish_world(workspace, "first")
    return workspace


@pytest.fixture(scope="module")
def web(workspace, tmp_path_factory):
    app, _ = knowledge_app(workspace)
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as client:
        yield client


def test_one_entity(web, workspace):
    response = web.get("/v1/knowledge/user/1")
    assert response.status_code == 200
    assert response.headers["x-owlrec-release"] == current_release(workspace)
    assert response.json() == {
        "release": current_release(workspace),
        "kind": "user",
        "id": 1,
        "found": True,
        "text": "first likes films",
        "provenance": {
            "as_of": 1000, "framework": "kar", "quality": "ok", "model": "m", "encoder": "e", "from_cohorts": False,
        },
    }  # fmt: skip


def test_only_what_was_asked_for(web):
    body = web.get("/v1/knowledge/item/7?fields=vector&fields=codes").json()
    assert body["vector"] == [0.1, -2.0]
    assert body["codes"] is None
    assert set(body) == {"release", "kind", "id", "found", "vector", "codes"}


def test_cohorts_stand_in_for_a_user_without_a_text(web):
    body = web.get("/v1/knowledge/user/5?fields=text&fields=vector&fields=provenance").json()
    assert body["text"] == "first war films"
    assert body["provenance"]["from_cohorts"]
    assert body["vector"] == [0.6, 0.8]
    assert not web.get("/v1/knowledge/cohort/8").json()["provenance"]["from_cohorts"]


def test_texts_pass_as_they_are(web):
    assert web.get("/v1/knowledge/user/2").json()["text"] == SCRIPT
    assert web.get("/v1/knowledge/user/2").headers["x-content-type-options"] == "nosniff"


def test_a_batch_is_aligned_and_misses_are_explicit(web, workspace):
    ids = [9, 5, 1, 3, 2**63 - 1]
    response = web.post(BATCH, json={"kind": "user", "ids": ids, "fields": ["text", "vector"]})
    body = response.json()
    assert (body["release"], body["kind"]) == (current_release(workspace), "user")
    assert [r["id"] for r in body["results"]] == ids
    assert [r["found"] for r in body["results"]] == [False, True, True, True, False]
    assert [r["text"] for r in body["results"]] == [None, "first war films", "first likes films", None, None]
    assert [r["vector"] for r in body["results"]] == [None, [0.6, 0.8], [1, 0], [3, 1], None]
    default = web.post(BATCH, json={"kind": "user", "ids": [1]}).json()["results"][0]
    assert set(default) == {"id", "found", "text", "provenance"}


def test_vectors_as_bytes(web):
    response = web.post(BATCH, json={"kind": "user", "ids": [2, 9, 5]}, headers=BYTES)
    assert response.headers["content-type"] == "application/octet-stream"
    rows = np.frombuffer(response.content, "<f2").reshape(-1, int(response.headers["x-owlrec-dim"]))
    np.testing.assert_allclose(rows, [[0, 2], [np.nan, np.nan], [0.6, 0.8]], atol=1e-3)
    one = web.get("/v1/knowledge/item/7", headers=BYTES)
    assert one.content == np.array([0.1, -2], "<f2").tobytes()
    assert web.get("/v1/knowledge/user/9", headers=BYTES).status_code == 404


def test_a_copy_that_still_holds_is_not_sent_again(web):
    first = web.get("/v1/knowledge/user/1")
    tag = first.headers["etag"]
    for sent in (tag, f"W/{tag}", f'"other", {tag}'):
        again = web.get("/v1/knowledge/user/1", headers={"If-None-Match": sent})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert web.get("/v1/knowledge/user/1", headers={"If-None-Match": '"other"'}).status_code == 200
    assert web.get("/v1/knowledge/user/1", headers=BYTES).headers["etag"] != tag


def test_similar_entities(web):
    body = web.post(SIMILAR, json={"kind": "user", "id": 1, "limit": 5}).json()
    assert [(r["id"], r["score"]) for r in body["results"]] == [(3, pytest.approx(3 / 10**0.5, abs=1e-4)), (2, 0.0)]
    body = web.post(SIMILAR, json={"kind": "user", "vector": [2, 1.0], "limit": 1}).json()
    assert [(r["id"], r["score"]) for r in body["results"]] == [(3, pytest.approx(7 / 50**0.5, abs=1e-4))]
    cohort = web.post(SIMILAR, json={"kind": "user", "id": 5}).json()["results"]  # by its cohort's vector
    assert [r["id"] for r in cohort] == [3, 2, 1]


def test_the_release_in_use_is_described(web, workspace):
    body = web.get("/v1/releases/current").json()
    assert body["release"] == current_release(workspace)
    assert body["knowledge"] == {"user": 2, "item": 1, "cohort": 1}
    assert (body["dim"], body["delta"], body["as_of_max"], body["chain"]) == (2, False, 3000, [body["release"]])


GOOD = {"kind": "user", "ids": [1], "fields": ["text"]}
WRONG = {"kind": "user", "id": 1, "limit": 3}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (BATCH, GOOD | {"kind": "film"}, "kind"),
        (BATCH, GOOD | {"kind": None}, "body"),
        (BATCH, {"ids": [1]}, "body"),
        (BATCH, {"kind": "user"}, "body"),
        (BATCH, GOOD | {"kinds": {"user": [1]}}, "body"),
        (BATCH, {"kinds": {"user": [1], "film": [2]}}, "kinds.film.[key]"),
        (BATCH, {"kinds": {"user": [1], "item": []}}, "kinds.item"),
        (BATCH, {"kinds": {"user": [1, 1]}}, "kinds"),
        (BATCH, {"kinds": {"user": list(range(600)), "item": list(range(600))}}, "kinds"),
        (BATCH, {"kinds": {}}, "kinds"),
        (BATCH, GOOD | {"ids": []}, "ids"),
        (BATCH, GOOD | {"ids": [1, 2, 1]}, "ids"),
        (BATCH, GOOD | {"ids": list(range(1001))}, "ids"),
        (BATCH, GOOD | {"ids": [""]}, "ids[0]"),
        (BATCH, GOOD | {"ids": ["x" * 513]}, "ids[0]"),
        (BATCH, GOOD | {"ids": [5, 1.0]}, "ids[1]"),
        (BATCH, GOOD | {"ids": [True]}, "ids[0]"),
        (BATCH, GOOD | {"ids": [-1]}, "ids[0]"),
        (BATCH, GOOD | {"ids": [2**63]}, "ids[0]"),
        (BATCH, GOOD | {"ids": 1}, "ids"),
        (BATCH, GOOD | {"fields": ["password"]}, "fields[0]"),
        (BATCH, GOOD | {"fields": []}, "fields"),
        (BATCH, GOOD | {"fields": ["text", "text"]}, "fields"),
        (BATCH, GOOD | {"page": 2}, "page"),
        (BATCH, [], "body"),
        (SIMILAR, WRONG | {"kind": 7}, "kind"),
        (SIMILAR, WRONG | {"id": "1"}, "id"),
        (SIMILAR, WRONG | {"id": None}, "body"),
        (SIMILAR, WRONG | {"vector": [1, 0]}, "body"),
        (SIMILAR, WRONG | {"limit": 0}, "limit"),
        (SIMILAR, WRONG | {"limit": 101}, "limit"),
        (SIMILAR, {"kind": "user", "vector": []}, "vector"),
        (SIMILAR, {"kind": "user", "vector": [1, "x"]}, "vector[1]"),
        (SIMILAR, {"kind": "user", "vector": [1, 2, 3]}, "vector"),
        (SIMILAR, {"kind": "user", "vector": [0, 0]}, "vector"),
    ],
)
def test_a_wrong_field_is_named(web, path, body, field):
    response = web.post(path, json=body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert field in [e["field"] for e in response.json()["errors"]]
    assert "password" not in response.text


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "-Infinity"])
def test_numbers_that_are_none_are_refused(web, value):
    for path, body in (
        (SIMILAR, f'{{"kind":"user","vector":[{value},1]}}'),
        (BATCH, f'{{"kind":"user","ids":[{value}]}}'),
    ):
        assert web.post(path, content=body).status_code == 422


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'"\\ud800"', b"9" * 5000, b"\x00" * 10,
        b'{"kind":"user","ids":[1' + b"0" * 5000 + b"]}", b'{"kind":"user","ids":[1],"\\u0000":1}',
        b'{"kind":"user\\u0000","ids":[1]}', b'{"kind":{"$ne":1},"ids":[1]}',
    ],
)  # fmt: skip
def test_bodies_made_to_break_it_get_4xx(web, content):
    response = web.post(BATCH, content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("user/x", 404), ("user/-1", 404), ("user/1.0", 404), ("user/1_0", 404), ("user/%20%31", 404), ("user/", 404),
        ("user/9223372036854775808", 404), ("user/99999999999999999999", 404), ("user/٣", 404), ("film/1", 422),
        ("user/1?fields=password", 422), ("user/..%2f..%2fetc", 404), ("user/1'%20OR%201=1", 404),
        ("%7B%7B7*7%7D%7D/1", 422), ("user/9", 404), ("user/1%00", 404), ("user/" + "1" * 5000, 422),
        ("user/1?fields=text&fields=text&fields=text&fields=text&fields=text", 422),
    ],
)  # fmt: skip
def test_paths_made_to_break_it_get_4xx(web, path, status):
    response = web.get(f"/v1/knowledge/{path}")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert "Traceback" not in response.text


def test_no_release_is_not_ready_and_becomes_so(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    app, _ = knowledge_app(workspace, refresh_s=0.05)
    with TestClient(app, base_url=LOCAL) as web:
        assert web.get("/healthz").status_code == 200
        assert web.get("/readyz").status_code == 503
        assert "nothing has been published" in web.get("/readyz").json()["problem"]
        refused = web.get("/v1/knowledge/user/1")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        name = publish_world(workspace, "first")
        wait_for(lambda: web.get("/readyz").status_code == 200)
        assert web.get("/readyz").json() == {"status": "ready", "release": name, "problem": None}


def test_a_process_that_was_asked_to_stop_is_not_ready_and_finishes_what_it_has(workspace, tmp_path):
    asked = threading.Event()
    app, _ = knowledge_app(workspace, stopping=asked.is_set)
    with TestClient(app, base_url=LOCAL) as web:
        assert web.get("/readyz").status_code == 200
        asked.set()
        answer = web.get("/readyz")
        assert (answer.status_code, answer.json()["problem"]) == (503, "stopping")
        assert web.get("/healthz").status_code == 200
        assert web.get("/v1/knowledge/user/1").status_code == 200


def test_swaps_and_roll_backs_are_seen_and_never_mixed(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    names = {publish_world(workspace, label): label for label in ("first", "second")}
    app, _ = knowledge_app(workspace, refresh_s=0.02)
    seen, stop = set(), threading.Event()

    def move():
        for _ in range(15):
            time.sleep(0.04)
            roll_back(workspace, to=min(names))
            time.sleep(0.04)
            roll_back(workspace, to=max(names))
        stop.set()

    with TestClient(app, base_url=LOCAL) as web:
        mover = threading.Thread(target=move)
        mover.start()
        while not stop.is_set():
            body = web.post(BATCH, json={"kind": "user", "ids": [1, 5], "fields": ["text"]}).json()
            label = names[body["release"]]
            assert [r["text"] for r in body["results"]] == [f"{label} likes films", f"{label} war films"]
            seen.add(label)
            web.post(SIMILAR, json={"kind": "user", "id": 1})
        mover.join()
        assert seen == {"first", "second"}


def test_a_release_that_cannot_be_opened_leaves_the_old_one_in_use(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    first = publish_world(workspace, "first")
    app, served = knowledge_app(workspace, refresh_s=60)
    with TestClient(app, base_url=LOCAL) as web:
        second = publish_world(workspace, "second")
        file = workspace.local_path("releases", second, "parts/00000.lmdb")
        whole = file.read_bytes()
        file.write_bytes(whole[:1000])
        assert not served.refresh()
        assert web.get("/v1/knowledge/user/1").json()["release"] == first
        assert "1000 bytes" in web.get("/readyz").json()["problem"]
        file.write_bytes(whole)
        assert served.refresh()
        assert web.get("/readyz").json() == {"status": "ready", "release": second, "problem": None}
    served.close()
    assert served.name is None


def test_a_store_that_does_not_answer_is_503(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "ws")
    publish_world(workspace, "first")
    app, served = knowledge_app(workspace)

    def away(*_):
        raise StoreUnavailableError("redis://secret-host is gone")

    with TestClient(app, base_url=LOCAL) as web:
        with served.lease() as release:
            monkeypatch.setattr(release.store, "get", away)
        response = web.get("/v1/knowledge/user/1")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "secret-host" not in response.text


def test_the_document_says_how_to_authenticate(tmp_path):
    key, line = new_key("docs")
    app, _ = knowledge_app(Workspace(tmp_path / "ws"), KeyRing(text=line))
    with TestClient(app) as web:
        assert web.get("/openapi.json").status_code == 401
        document = web.get("/openapi.json", headers={"Authorization": f"Bearer {key}"}).json()
    assert document["security"] == [{"key": []}]
    assert set(document["paths"]) >= {"/v1/knowledge/{kind}/{id}", BATCH, SIMILAR, "/v1/releases/current"}
    responses = document["paths"][BATCH]["post"]["responses"]
    assert list(responses["422"]["content"]) == ["application/problem+json"]
    assert set(responses["200"]["content"]) == {"application/json", *BYTES.values(), ARROW["Accept"]}


def test_what_is_answered_directly_is_what_the_document_describes(web):
    lookups = Lookups(ServedReleases(None), NoTelemetry())
    paths = web.get("/openapi.json").json()["paths"]
    direct = {(m, p) for p in paths for m in paths[p] if _routed(lookups, m.upper(), p.replace("{kind}", "user"))}
    assert direct == {("get", ONE_PATH), ("post", BATCH)}
    assert paths[BATCH]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/BatchGet")
    for method, path in (("PUT", BATCH), ("DELETE", "/v1/knowledge/user/1")):
        refused = web.request(method, path)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST" if path == BATCH else "GET")
    # Every answer that comes is one that the document has.
    for body, status in ((GOOD, 200), (GOOD | {"if_release": "x"}, 409), (GOOD | {"ids": []}, 422)):
        assert web.post(BATCH, json=body).status_code == status
        assert str(status) in paths[BATCH]["post"]["responses"]
    full = {"kinds": {"user": [1], "item": [7, 8]}, "fields": ["text", "vector", "codes", "provenance"]}
    parsed = BatchAnswer.model_validate(web.post(BATCH, json=full).json())
    assert [e.found for e in parsed.kinds["item"]] == [True, False]
    SingleAnswer.model_validate(web.get("/v1/knowledge/user/2?fields=codes&fields=text").json())


def _routed(lookups, method, path):
    try:
        return lookups.route(method, path)
    except Problem:
        return None


def test_raw_ids_are_accepted_and_returned(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    ids = {name: stable_id(name) for name in ("B007", "ünï/code", "007")}
    publish_rows(workspace, "raw", Rows(texts={("item", id_): (1, name, "ok") for name, id_ in ids.items()}))
    app, _ = knowledge_app(workspace)
    with TestClient(app, base_url=LOCAL) as web:
        assert web.get("/v1/knowledge/item/B007").json()["text"] == "B007"
        assert web.get("/v1/knowledge/item/B007").json()["id"] == "B007"
        assert web.get("/v1/knowledge/item/007").json()["text"] == "007"
        assert web.get(f"/v1/knowledge/item/{ids['B007']}").json()["id"] == ids["B007"]
        asked = ["ünï/code", ids["B007"], "7"]
        results = web.post(BATCH, json={"kind": "item", "ids": asked}).json()["results"]
        assert [(r["id"], r["text"]) for r in results] == [
            ("ünï/code", "ünï/code"), (ids["B007"], "B007"), ("7", None),
        ]  # fmt: skip


def test_a_pinned_release_is_answered_from_or_refused(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    first = publish_world(workspace, "first")
    app, served = knowledge_app(workspace, refresh_s=60)
    with TestClient(app, base_url=LOCAL) as web:
        second = publish_world(workspace, "second")
        early = web.get("/v1/knowledge/user/1", headers={"if-release": second})
        assert (early.status_code, early.headers["x-owlrec-release"]) == (409, first)
        assert served.refresh()
        for pinned, text in ((first, "first likes films"), (second, "second likes films")):
            answer = web.post(BATCH, json=GOOD | {"if_release": pinned}).json()
            assert (answer["release"], answer["results"][0]["text"]) == (pinned, text)
        publish_world(workspace, "third")
        assert served.refresh()
        gone = web.post(BATCH, json=GOOD, headers={"if-release": first})
        assert (gone.status_code, gone.headers["content-type"]) == (410, "application/problem+json")
        assert "without `if-release`" in gone.json()["detail"]
    served.close()


def test_a_pointer_that_vanished_is_503_and_not_ready(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    publish_world(workspace, "first")
    app, served = knowledge_app(workspace, refresh_s=60)
    with TestClient(app, base_url=LOCAL) as web:
        pointer = workspace.local_path("releases", "CURRENT")
        moved = pointer.rename(pointer.with_name("MOVED"))
        served.refresh()
        assert web.get("/v1/knowledge/user/1").status_code == 200  # one look may be a hiccup
        served.refresh()
        assert web.get("/v1/knowledge/user/9").status_code == 503
        assert web.get("/readyz").status_code == 503
        moved.rename(pointer)
        served.refresh()
        assert (web.get("/v1/knowledge/user/1").status_code, web.get("/readyz").status_code) == (200, 200)


def test_following_survives_any_exception_and_counts_it(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "ws")
    publish_world(workspace, "first")
    recorder = Recorder()
    served = ServedReleases(WorkspaceReleases(workspace))
    app = build_knowledge_api(served, KeyRing(), KnowledgeConfig(refresh_s=0.02), recorder)
    with TestClient(app, base_url=LOCAL) as web:
        for error in (MemoryError(), RuntimeError("can't start new thread"), lmdb.Error("MDB_PANIC")):
            with monkeypatch.context() as patched:
                patched.setattr(served._source, "current", Mock(side_effect=error))
                before = served.failures
                wait_for(lambda: served.failures > before + 1)  # noqa: B023
                assert type(error).__name__ in web.get("/readyz").json()["problem"]
                assert web.get("/v1/knowledge/user/1").status_code == 200
        looked = served.looked
        second = publish_world(workspace, "second")
        wait_for(lambda: web.get("/readyz").json() == {"status": "ready", "release": second, "problem": None})
        assert served.looked > looked
        assert served.unhealthy is None
    assert recorder.counts["follow_failures"] >= 6
    assert recorder.gauges["release_looked"] == pytest.approx(time.time(), abs=30)
    served._looked -= 100
    assert "100 s" in served.unhealthy
    served._opening = True  # a copy may take many minutes without a restart
    assert served.unhealthy is None


class Recorder(NoTelemetry):
    def __init__(self):
        self.counts, self.gauges = Counter(), {}

    def count(self, name, n=1, tags=None):
        self.counts[name] += n

    def gauge(self, name, value):
        self.gauges[name] = value


def test_without_an_index_similar_says_so(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "ws")
    monkeypatch.setattr("owlrec.releases.similar.faiss_or_none", lambda: None)
    publish_world(workspace, "first")
    monkeypatch.undo()
    with TestClient(knowledge_app(workspace)[0], base_url=LOCAL) as web:
        refused = web.post(SIMILAR, json={"kind": "user", "id": 1})
        assert (refused.status_code, refused.headers["content-type"]) == (501, "application/problem+json")
        assert "publish again" in refused.json()["detail"]


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
