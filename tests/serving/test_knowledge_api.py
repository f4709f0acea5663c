"""Knowledge over HTTP, without Ray: what answers hold, what is refused and how, and one release an answer."""

import threading
import time

import numpy as np
import pytest
from served_world import SCRIPT, knowledge_app, publish_world
from starlette.testclient import TestClient

from owlrec.errors import StoreUnavailableError
from owlrec.releases import current_release, roll_back
from owlrec.serving.keys import KeyRing, new_key
from owlrec.serving.served import SimilarEntities
from owlrec.workspace import Workspace

BATCH, SIMILAR = "/v1/knowledge:batchGet", "/v1/knowledge:similar"
BYTES = {"Accept": "application/octet-stream"}
LOCAL = "http://localhost"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("served") / "ws")
    publish_world(workspace, "first")
    return workspace


@pytest.fixture(scope="module")
def web(workspace, tmp_path_factory):
    app, _ = knowledge_app(workspace, tmp_path_factory.mktemp("indexes"))
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
    assert body["results"] == [{"id": 2, "score": 0.0}]  # user 3 has no text, and so is in no list of ids
    body = web.post(SIMILAR, json={"kind": "user", "vector": [2, 1.0], "limit": 1}).json()
    assert [(r["id"], r["score"]) for r in body["results"]] == [(1, pytest.approx(2 / 5**0.5, abs=1e-4))]
    cohort = web.post(SIMILAR, json={"kind": "user", "id": 5}).json()["results"]  # by its cohort's vector
    assert [r["id"] for r in cohort] == [2, 1]


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
        (BATCH, GOOD | {"kind": None}, "kind"),
        (BATCH, {"ids": [1]}, "kind"),
        (BATCH, {"kind": "user"}, "ids"),
        (BATCH, GOOD | {"ids": []}, "ids"),
        (BATCH, GOOD | {"ids": [1, 2, 1]}, "ids"),
        (BATCH, GOOD | {"ids": list(range(1001))}, "ids"),
        (BATCH, GOOD | {"ids": ["1"]}, "ids[0]"),
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
        ("user/x", 422), ("user/-1", 422), ("user/1.0", 422), ("user/1_0", 422), ("user/%20%31", 422), ("user/", 404),
        ("user/9223372036854775808", 422), ("user/99999999999999999999", 422), ("user/٣", 422), ("film/1", 422),
        ("user/1?fields=password", 422), ("user/..%2f..%2fetc", 404), ("user/1'%20OR%201=1", 422),
        ("%7B%7B7*7%7D%7D/1", 422), ("user/9", 404), ("user/1%00", 422), ("user/" + "1" * 5000, 422),
    ],
)  # fmt: skip
def test_paths_made_to_break_it_get_4xx(web, path, status):
    response = web.get(f"/v1/knowledge/{path}")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert "Traceback" not in response.text


def test_no_release_is_not_ready_and_becomes_so(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    app, _ = knowledge_app(workspace, tmp_path / "indexes", refresh_s=0.05)
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
    app, _ = knowledge_app(workspace, tmp_path / "indexes", stopping=asked.is_set)
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
    app, _ = knowledge_app(workspace, tmp_path / "indexes", refresh_s=0.02)
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
    app, served = knowledge_app(workspace, tmp_path / "indexes", refresh_s=60)
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
    app, served = knowledge_app(workspace, tmp_path / "indexes")

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
    app, _ = knowledge_app(Workspace(tmp_path / "ws"), tmp_path / "indexes", KeyRing(text=line))
    with TestClient(app) as web:
        assert web.get("/openapi.json").status_code == 401
        document = web.get("/openapi.json", headers={"Authorization": f"Bearer {key}"}).json()
    assert document["security"] == [{"key": []}]
    assert set(document["paths"]) >= {"/v1/knowledge/{kind}/{id}", BATCH, SIMILAR, "/v1/releases/current"}
    responses = document["paths"][BATCH]["post"]["responses"]
    assert list(responses["422"]["content"]) == ["application/problem+json"]
    assert set(responses["200"]["content"]) == {"application/json", "application/octet-stream"}


def test_indexes_of_releases_that_are_not_served_are_removed(tmp_path):
    similar = SimilarEntities("root", tmp_path)
    for name in ("20260101T000000Z-aaaaaaaa-user.faiss", "20260102T000000Z-bbbbbbbb-user.faiss"):
        (tmp_path / name).touch()
    similar.forget_all_but(None)
    assert len(list(tmp_path.iterdir())) == 2
    similar.forget_all_but("20260102T000000Z-bbbbbbbb")
    assert [p.name[:16] for p in tmp_path.iterdir()] == ["20260102T000000Z"]


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
