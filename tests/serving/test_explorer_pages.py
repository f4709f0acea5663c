"""The explorer's pages, without a browser: what is found, what is shown, and that text from outside stays text."""

import re
import time

import pyarrow as pa
import pytest
from served_world import SCRIPT, publish_world
from starlette.testclient import TestClient

from owlrec import schema
from owlrec.serving.explorer.pages import build_explorer
from owlrec.serving.explorer.text import Paragraph, paragraphs
from owlrec.serving.keys import KeyRing, new_key
from owlrec.serving.knowledge_api import KnowledgeConfig
from owlrec.serving.served import ServedReleases, WorkspaceReleases
from owlrec.serving.similar import SimilarEntities
from owlrec.serving.tables import WorkspaceTables
from owlrec.workspace import Workspace


def write_tables(workspace):
    """Three users, one with a history of two films, one of whose titles is an attack."""
    users = pa.table({"user_id": [1, 2, 5], "raw_id": ["1", "2", "5"], "occupation": ["<b>baker", "", "writer"]})
    items = pa.table(
        {
            "item_id": pa.array([7, 9], pa.int64()),
            "raw_id": ["7", "9"],
            "title": ["War & Peace (1966)", "<img src=x onerror=alert(1)>"],
            "genres": [["Drama", "War"], []],
        }
    )
    histories = pa.table(
        {"user_id": [1], "as_of": [1000], "items": [[7, 9, 11]], "ratings": [[5.0, None, 3.5]]}, schema=schema.HISTORIES
    )
    workspace.write_table("users", users, key="user_id", n_shards=3)
    workspace.write_table("items", items, key="item_id", n_shards=2)
    workspace.write_table("histories", histories, key="user_id", n_shards=3)


def explorer(workspace, folder, keys=None):
    served = ServedReleases(WorkspaceReleases(workspace))
    folder.mkdir(exist_ok=True)
    similar = SimilarEntities(workspace.root, folder)
    config = KnowledgeConfig(refresh_s=0.05)
    return build_explorer(served, similar, WorkspaceTables(workspace), keys or KeyRing(), config)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    workspace = Workspace(folder / "ws")
    publish_world(workspace, "first")
    write_tables(workspace)
    with TestClient(explorer(workspace, folder / "indexes"), base_url="http://localhost") as client:
        yield client


def links(html):
    return re.findall(r'href="(/\w+/\d+)"', html)


def test_home_shows_the_release_and_its_quality(web):
    page = web.get("/")
    assert page.status_code == 200
    for words in ("Coverage and quality", "50.0 %", "short (1)", "1970-01-01"):
        assert words in page.text


def test_search_by_id_and_by_title(web):
    assert links(web.get("/search?kind=user&q=1").text) == ["/user/1"]
    assert links(web.get("/search?kind=user&q=5").text) == ["/user/5"]
    assert links(web.get("/search?kind=user&q=77").text) == []
    assert links(web.get("/search?kind=item&q=war+%26").text) == ["/item/7"]
    assert links(web.get("/search?kind=cohort&q=8").text) == ["/cohort/8"]
    assert "0 found" in web.get("/search?kind=item&q=%25.*").text
    assert web.get("/search?kind=film&q=1").status_code == 422
    assert web.get("/search?q=" + "x" * 201).status_code == 422


def test_a_user_with_history_and_neighbours(web):
    page = web.get("/user/1").text
    assert "first likes films" in page
    assert links(page) == ["/item/11", "/item/9", "/item/7", "/user/2"]
    assert "item 11" in page  # a title that the catalogue lacks
    assert page.count("rated") == 2
    assert "rated 3.5" in page


def test_what_cohorts_say_is_marked_as_theirs(web):
    page = web.get("/user/5").text
    assert "It has no text of its own" in page
    assert "first war films" in page
    assert "/cohort/8" in links(page)
    assert "occupation" in page


def test_all_text_is_escaped_and_scripts_are_forbidden(web):
    for path in (
        "/user/2",
        "/item/9",
        "/user/1",
        "/search?kind=item&q=img",
        "/search?q=%3Cscript%3Ealert(2)%3C/script%3E",
    ):
        page = web.get(path)
        assert page.status_code == 200
        assert not re.search(r"<(script|img|b)\b", page.text)
        assert "script-src" not in page.headers["content-security-policy"]
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in web.get("/user/2").text
    assert "☃" in SCRIPT
    assert "☃" in web.get("/user/2").text


def test_unknown_entities_and_wrong_paths(web):
    assert web.get("/user/77").status_code == 404
    assert web.get("/item/99999999999999999999").status_code == 422
    assert web.get("/film/1").status_code == 422
    assert web.get("/user/x").status_code == 422
    assert web.get("/style.css").headers["content-type"].startswith("text/css")


def test_every_page_can_be_used_without_a_mouse(web):
    for path in ("/", "/search?q=1", "/user/1"):
        page = web.get(path).text
        assert 'href="#main"' in page
        assert 'id="main"' in page
        assert '<html lang="en">' in page
        fields = re.findall(r'<(?:input|select)[^>]* id="(\w+)"', page) or re.findall(r'id="(q|kind)"', page)
        assert sorted(fields) == ["kind", "q"]
        for field in fields:
            assert f'<label for="{field}">' in page
        assert page.count("<h1>") == 1


def test_it_works_without_tables_and_with_a_swap(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    key, line = new_key("anna")
    with TestClient(explorer(workspace, tmp_path / "i", KeyRing(text=line))) as web:
        web.auth = ("anna", key)
        assert web.get("/").status_code == 503
        name = publish_world(workspace, "first")
        wait_for(lambda: web.get("/readyz").status_code == 200)
        assert name in web.get("/user/1").text
        assert web.get("/user/1", auth=("anna", "wrong")).status_code == 401


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Genre: dramas of war", [("Genre", "dramas of war")]),
        (
            "1. **Director/screenwriter**: Kubrick\n\n- Mood - dark",
            [("Director/screenwriter", "Kubrick"), ("Mood", "dark")],
        ),
        ("A sentence without any.", [("", "A sentence without any.")]),
        ("At 12:30 he left", [("", "At 12:30 he left")]),
        ("", []),
    ],
)
def test_factors_are_set_apart(text, expected):
    assert paragraphs(text) == [Paragraph(*pair) for pair in expected]
