"""The cascade: who decides which places, what happens at the deadline, and what requests may hold."""

import asyncio
import math
import time

import pytest
from starlette.testclient import TestClient

from owlrec.serving.guard import Limits, NoTelemetry, Problem
from owlrec.serving.keys import KeyRing
from owlrec.serving.rank_api import Cascade, build_rank_api
from owlrec.serving.schemas import Rank

CTR = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.5, 5: 0.2}
LLM = {1: 0.99, 2: 0.3, 3: 0.8, 4: 0.6, 5: 0.0}


class Table:
    """Scores from a dict, after a while."""

    def __init__(self, scores, seconds=0.0, error=None):
        self.scores, self.seconds, self.error = scores, seconds, error
        self.asked = []
        self.given_up = False

    async def score(self, asked, candidates):
        self.asked.append(list(candidates))
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.given_up = True
            raise
        if self.error:
            raise self.error
        return [self.scores.get(c, math.nan) for c in candidates]


def ranked(ctr, llm=None, **asked):
    request = Rank(**{"user_id": 7, "candidates": [1, 2, 3, 4, 5], "deadline_ms": 300, **asked})
    return asyncio.run(Cascade(ctr, llm).rank(request))


def ids(answer):
    return [r.id for r in answer.results]


def test_by_the_ctr_model_alone():
    llm = Table(LLM)
    answer = ranked(Table(CTR), llm)
    assert ids(answer) == [2, 3, 4, 5, 1]  # of a tie, who came first
    assert [r.score for r in answer.results] == [0.9, 0.5, 0.5, 0.2, 0.1]
    assert (answer.degraded, answer.reason, llm.asked) == (False, None, [])
    assert ids(ranked(Table(CTR), top_k=2)) == [2, 3]


def test_the_shortest_deadline_leaves_the_ctr_model_some_time():
    assert ids(ranked(Table(CTR), deadline_ms=10)) == [2, 3, 4, 5, 1]


def test_a_cascade_asks_the_llm_about_the_head_alone():
    llm = Table(LLM)
    answer = ranked(Table(CTR), llm, mode="cascade", rerank=3, explain=True)
    assert llm.asked == [[2, 3, 4]]
    assert ids(answer) == [3, 4, 2, 5, 1]
    assert [r.by for r in answer.results] == ["llm", "llm", "llm", "ctr", "ctr"]
    assert [r.score for r in answer.results] == [0.8, 0.6, 0.3, 0.2, 0.1]
    explanations = [r.explanation for r in answer.results[:4]]
    assert [(e.ctr_place, e.ctr_score, e.llm_score) for e in explanations] == [
        (2, 0.5, 0.8), (3, 0.5, 0.6), (1, 0.9, 0.3), (4, 0.2, None),
    ]  # fmt: skip
    assert not answer.degraded


def test_the_llm_alone_is_asked_about_all():
    assert ids(ranked(Table(CTR), Table(LLM), mode="llm")) == [1, 3, 4, 2, 5]


def test_the_llm_may_share_the_say_with_the_ctr_model():
    answer = ranked(Table(CTR), Table(LLM), mode="cascade", rerank=3, llm_weight=0.25, explain=True)
    # 0.25 * 0.3 + 0.75 * 0.9 = 0.75; 0.25 * 0.8 + 0.75 * 0.5 = 0.575; 0.25 * 0.6 + 0.75 * 0.5 = 0.525
    assert [(r.id, r.by, round(r.score, 6)) for r in answer.results[:3]] == [
        (2, "llm", 0.75), (3, "llm", 0.575), (4, "llm", 0.525),
    ]  # fmt: skip
    assert [r.explanation.llm_score for r in answer.results[:3]] == [0.3, 0.8, 0.6]
    without = ranked(Table({2: 0.5}), Table({2: 0.4, 3: 0.9}), mode="llm", llm_weight=0.5)
    assert [(r.id, r.score) for r in without.results[:2]] == [(3, 0.9), (2, 0.45)]  # 3 has no CTR score to mix in


@pytest.mark.parametrize(
    ("llm", "reason"),
    [
        (None, "no LLM is deployed"),
        (Table(LLM, seconds=60), "the LLM did not answer within the deadline"),
        (Table(LLM, error=ConnectionError("it died")), "the LLM is not available"),
    ],
)
@pytest.mark.parametrize("mode", ["llm", "cascade"])
def test_without_the_llm_the_ctr_order_goes_out_in_time(llm, reason, mode):
    start = time.monotonic()
    answer = ranked(Table(CTR), llm, mode=mode)
    assert time.monotonic() - start < 1.0
    assert (ids(answer), answer.degraded, answer.reason) == ([2, 3, 4, 5, 1], True, reason)
    if llm and llm.seconds:
        assert llm.given_up  # nobody works on for an answer that went out


def test_what_the_llm_cannot_score_keeps_its_ctr_place_behind_the_scored():
    answer = ranked(Table(CTR), Table({3: 0.1, 4: 0.7}), mode="cascade", rerank=4)
    assert ids(answer) == [4, 3, 2, 5, 1]
    assert (answer.degraded, answer.reason) == (True, "the LLM could not score 2 of 4 candidates")
    assert ids(ranked(Table(CTR), Table({}), mode="cascade")) == [2, 3, 4, 5, 1]


def test_what_the_ctr_model_cannot_score_comes_last_and_without_a_score():
    answer = ranked(Table({2: 0.5, 5: 0.6}), explain=True)
    assert ids(answer) == [5, 2, 1, 3, 4]
    assert [r.score for r in answer.results] == [0.6, 0.5, None, None, None]
    assert answer.results[2].explanation.ctr_score is None


@pytest.mark.parametrize("ctr", [Table(CTR, seconds=60), Table(CTR, error=RuntimeError("secret"))])
def test_without_the_ctr_model_it_is_503_in_time(ctr):
    start = time.monotonic()
    with pytest.raises(Problem) as raised:
        ranked(ctr, Table(LLM), mode="cascade", deadline_ms=100)
    assert time.monotonic() - start < 1.0
    assert raised.value.status == 503
    assert "secret" not in str(raised.value)


@pytest.fixture
def web():
    async def ready():
        return None

    app = build_rank_api(Cascade(Table(CTR), None), KeyRing(), Limits(), NoTelemetry(), ready)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


GOOD = {"user_id": 1, "candidates": [1, 2]}


def test_over_http(web):
    answer = web.post("/v1/rank", json=GOOD | {"mode": "cascade"}).json()
    assert [r["id"] for r in answer["results"]] == [2, 1]
    assert answer["reason"] == "no LLM is deployed"
    assert "explanation" not in answer["results"][0]
    assert web.get("/readyz").json()["status"] == "ready"
    inline = {"history": [{"item_id": 3, "rating": 5}, {"item_id": 4}], "profile": {"age": "30"}, "candidates": [1]}
    assert web.post("/v1/rank", json=inline).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"candidates": [1]}, "body"),
        ({"user_id": 1}, "candidates"),
        (GOOD | {"user_id": "1"}, "user_id"),
        (GOOD | {"user_id": -1}, "user_id"),
        (GOOD | {"candidates": []}, "candidates"),
        (GOOD | {"candidates": [1, 1]}, "candidates"),
        (GOOD | {"candidates": list(range(1001))}, "candidates"),
        (GOOD | {"candidates": [1, "x"]}, "candidates[1]"),
        (GOOD | {"candidates": list(range(101)), "mode": "llm"}, "body"),
        (GOOD | {"mode": "magic"}, "mode"),
        (GOOD | {"top_k": 0}, "top_k"),
        (GOOD | {"rerank": 101}, "rerank"),
        (GOOD | {"llm_weight": 0}, "llm_weight"),
        (GOOD | {"llm_weight": 1.01}, "llm_weight"),
        (GOOD | {"llm_weight": "much"}, "llm_weight"),
        (GOOD | {"deadline_ms": 9}, "deadline_ms"),
        (GOOD | {"deadline_ms": 1e9}, "deadline_ms"),
        (GOOD | {"explain": "maybe"}, "explain"),
        (GOOD | {"history": [{"item_id": "1"}]}, "history[0].item_id"),
        (GOOD | {"history": [{"item_id": 1, "rating": "good"}]}, "history[0].rating"),
        (GOOD | {"history": [{"item_id": 1}] * 501}, "history"),
        (GOOD | {"profile": {"age": None}}, "profile.age"),
        (GOOD | {"context": {"device": {"a": 1}}}, "context.device"),
        (GOOD | {"history": [{"item_id": 1, "event": "carts"}]}, "history[0].event"),
        (GOOD | {"profile": {"age": "x" * 201}}, "profile.age"),
        (GOOD | {"limit": 3}, "limit"),
    ],
)
def test_a_wrong_field_is_named(web, body, field):
    response = web.post("/v1/rank", json=body)
    assert response.status_code == 422
    assert field in [e["field"] for e in response.json()["errors"]]
