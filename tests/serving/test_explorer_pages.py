"""The explorer's pages, without a browser: what is found, what is shown, and that text from outside stays text."""

import re
import time

import pyarrow as pa
import pytest
from release_rows import Rows, publish_rows
from served_world import SCRIPT, publish_world
from starlette.testclient import TestClient

from owlrec import schema
from owlrec.errors import ServingError
from owlrec.serving.explorer.pages import Paragraph, build_explorer, paragraphs
from owlrec.serving.keys import KeyRing, new_key
from owlrec.serving.knowledge_api import KnowledgeConfig
from owlrec.serving.questions import WorkspaceTables
from owlrec.serving.schemas import RankAnswer
from owlrec.serving.served import ServedReleases, WorkspaceReleases
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
        {
            "user_id": [1],
            "as_of": [1000],
            "items": [[7, 9, 11]],
            "ratings": [[5.0, None, 3.5]],
            "passed": [[]],
        },
        schema=schema.HISTORIES,
    )
    workspace.write_table("users", users, key="user_id", n_shards=4)
    workspace.write_table("items", items, key="item_id", n_shards=2)
    workspace.write_table("histories", histories, key="user_id", n_shards=4)


def by_ctr_and_llm(asked):
    """Like a ranking application: the CTR model likes small ids, the LLM great ones; it knows no item above 100."""
    n = len(asked.candidates)
    ids = sorted(asked.candidates, key=lambda id_: (id_ > 100, -id_))
    places = {id_: place for place, id_ in enumerate(sorted(asked.candidates), 1)}

    def ranked(id_, by):
        explanation = {
            "ctr_score": None if id_ > 100 else 1 - places[id_] / 10,
            "ctr_place": places[id_],
            "llm_score": 0.5 if by == "llm" else None,
        }
        return {"id": id_, "score": 0.5, "by": by, "explanation": explanation}

    results = [ranked(id_, "ctr" if id_ > 100 else "llm") for id_ in ids]
    degraded = any(id_ > 100 for id_ in ids)
    reason = f"the LLM could not score 1 of {n} candidates" if degraded else None
    return RankAnswer.model_validate({"mode": "llm", "degraded": degraded, "reason": reason, "results": results})


def by_ctr_alone(asked):
    """Like one whose LLM is gone."""
    answer = by_ctr_and_llm(asked)
    results = sorted(answer.results, key=lambda r: r.explanation.ctr_place)
    for result in results:
        result.by, result.explanation.llm_score = "ctr", None
    reason = "the LLM is not available"
    return answer.model_copy(update={"degraded": True, "reason": reason, "results": results})


def explorer(workspace, folder, keys=None, rank=None):
    served = ServedReleases(WorkspaceReleases(workspace, similar=True))
    config = KnowledgeConfig(refresh_s=0.05)

    async def ranker(asked):
        assert asked.mode == "llm"
        return rank(asked)

    tables, keys = WorkspaceTables(workspace), keys or KeyRing()
    return build_explorer(served, tables, keys, config, ranker=ranker if rank else None)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    workspace = Workspace(folder / "ws")
    publish_world(workspace, "first")
    write_tables(workspace)
    with TestClient(
        explorer(workspace, folder / "indexes", rank=by_ctr_and_llm), base_url="http://localhost"
    ) as client:
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


def test_a_user_with_history_and_neighbors(web):
    page = web.get("/user/1").text
    assert "first likes films" in page
    assert links(page) == ["/item/11", "/item/9", "/item/7", "/user/3", "/user/2"]
    assert "item 11" in page  # a title that the catalog lacks
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
        "/rank?user=1&candidates=7,9",
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
    for path in ("/", "/search?q=1", "/user/1", "/rank?user=1"):
        page = web.get(path).text
        assert 'href="#main"' in page
        assert 'id="main"' in page
        assert '<html lang="en">' in page
        fields = re.findall(r'<(?:input|select)[^>]* id="(\w+)"', page) or re.findall(r'id="(q|kind)"', page)
        assert sorted(fields) == (["candidates", "kind", "q"] if "user" in path else ["kind", "q"])
        for field in fields:
            assert f'<label for="{field}">' in page
        assert page.count("<h1>") == 1


def test_it_works_without_tables_and_with_a_swap(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    key, line = new_key("anna", ["explore"])
    with TestClient(explorer(workspace, tmp_path / "i", KeyRing(text=line))) as web:
        web.auth = ("anna", key)
        assert web.get("/").status_code == 503
        name = publish_world(workspace, "first")
        wait_for(lambda: web.get("/readyz").status_code == 200)
        assert name in web.get("/user/1").text
        assert web.get("/user/1", auth=("anna", "wrong")).status_code == 401


def columns(page):
    """The ids in each column, and what is said of each move."""
    ctr, llm = page.split('aria-labelledby="by-ctr"')[1].split('aria-labelledby="by-llm"')
    moves = re.findall(r'<span class="(?:up|down|note)">(▲ up \d+|▼ down \d+|stays)</span>', llm)
    return [[int(link.rsplit("/")[-1]) for link in links(column)] for column in (ctr, llm)] + [moves]


def test_a_ranking_by_ctr_and_by_llm_side_by_side(web):
    page = web.get("/rank?user=1&candidates=9,+7;8 9%0A11").text
    assert columns(page) == [[7, 8, 9, 11], [11, 9, 8, 7], ["▲ up 3", "▲ up 1", "▼ down 1", "▼ down 3"]]
    assert "4 of 4 candidates moved; the furthest is item 11, up 3." in page
    assert "War &amp; Peace (1966)" in page
    assert re.findall(r'<input[^>]* value="([^"]*)"', page) == ["", "1", "9, 7;8 9\n11"]  # search, user, candidates
    odd = web.get("/rank?user=1&candidates=7,8,9").text
    assert columns(odd)[2] == ["▲ up 2", "stays", "▼ down 2"]
    assert 'role="status"' not in odd


def test_what_the_llm_could_not_score_is_said(web):
    page = web.get("/rank?user=1&candidates=7,9,101").text
    assert columns(page)[:2] == [[7, 9, 101], [9, 7, 101]]
    assert "the LLM could not score 1 of 3 candidates" in page
    assert page.count("not scored") == 2  # by neither


def test_without_ids_unseen_items_are_drawn(web):
    page = web.get("/rank?user=2").text
    assert sorted(columns(page)[0]) == [7, 9]
    assert columns(web.get("/rank?user=2").text) == columns(page)
    assert "there are no candidates" in web.get("/rank?user=1").text  # who has seen both


@pytest.mark.parametrize(
    "query",
    ["", "user=x", "user=-1", "user=99999999999999999999", "user=1&candidates=a", "user=1&candidates=1.5",
     "user=1&candidates=99999999999999999999", "user=1&candidates=" + ",".join(map(str, range(101))),
     "user=1&candidates=" + "1," * 1300, "user=1&candidates=<script>"],
)  # fmt: skip
def test_what_is_no_list_of_ids_is_refused(web, query):
    refused = web.get(f"/rank?{query}")
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] in ("user", "candidates")
    assert "script" not in refused.text


def failing(error):
    def rank(asked):
        raise error

    return rank


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (None, "No ranking: no ranking application is deployed with this page."),
        (failing(ServingError("the CTR model is not available")), "No ranking: the CTR model is not available."),
        (failing(RuntimeError("secret")), "No ranking: the ranking application does not respond."),
    ],
)
def test_without_a_ranking_the_page_says_so(tmp_path, rank, words):
    workspace = Workspace(tmp_path / "ws")
    publish_world(workspace, "first")
    with TestClient(explorer(workspace, tmp_path / "i", rank=rank), base_url="http://localhost") as web:
        page = web.get("/rank?user=1&candidates=7,9")
        assert page.status_code == 200
        assert words in page.text
        assert "secret" not in page.text


def test_without_the_llm_the_ctr_order_stands_alone(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    publish_world(workspace, "first")
    with TestClient(explorer(workspace, tmp_path / "i", rank=by_ctr_alone), base_url="http://localhost") as web:
        page = web.get("/rank?user=1&candidates=9,7").text
    assert columns(page) == [[7, 9], [], []]
    assert "The LLM did not rank: the LLM is not available." in page
    assert "It ranked nothing." in page


def test_a_moment_beyond_the_calendar_is_shown_as_it_is(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    rows = Rows(texts={("user", 1): (2**62, "from afar", "ok")}, vectors={("user", 1): [[1, 0]]}, cohorts={})
    publish_rows(workspace, "far", rows)
    with TestClient(explorer(workspace, tmp_path / "i"), base_url="http://localhost") as web:
        for path in ("/", "/user/1"):
            assert str(2**62) in web.get(path).text


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
