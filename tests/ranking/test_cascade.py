"""The cascade offline: figures worked out by hand, the rule that is served, lists that know nothing of what follows."""

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ranking_cascade import evaluate_cascade, held_out_lists, ndcg, reorder
from owlrec.errors import RecipeError
from owlrec.schema import SAMPLES
from owlrec.serving.rank_api import Cascade
from owlrec.serving.schemas import Rank

CTR = np.array([0.9, 0.2, 0.7, 0.5])
LLM = np.array([0.1, 1.0, 0.8, 0.6])


@pytest.mark.parametrize(
    ("first", "weight", "order", "scores"),
    [
        (0, 0.5, [0, 2, 3, 1], [0.9, 0.2, 0.7, 0.5]),
        (3, 0.0, [0, 2, 3, 1], [0.9, 0.2, 0.7, 0.5]),
        (2, 0.5, [2, 0, 3, 1], [0.5, 0.2, 0.75, 0.5]),
        (3, 1.0, [2, 3, 0, 1], [0.1, 0.2, 0.8, 0.6]),
        (9, 1.0, [1, 2, 3, 0], [0.1, 1.0, 0.8, 0.6]),
    ],
)
def test_head_is_reordered_by_the_blend(first: int, weight: float, order: list[int], scores: list[float]) -> None:
    ranking, blended = reorder(CTR, LLM, first=first, weight=weight)
    assert ranking.tolist() == order
    np.testing.assert_allclose(blended, scores)


def test_what_the_llm_could_not_score_follows_those_that_it_could() -> None:
    order, scores = reorder(CTR, np.array([np.nan, 1.0, 0.1, 0.6]), first=3, weight=1.0)
    assert order.tolist() == [3, 2, 0, 1]
    assert scores.tolist() == [0.9, 0.2, 0.1, 0.6]
    with pytest.raises(ValueError, match="4 scores of the CTR model, but 3"):
        reorder(CTR, LLM[:3], first=3, weight=1.0)


class Fixed:
    """A backend that knows the scores."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = scores

    async def score(self, asked: Rank, candidates: Sequence[int]) -> Sequence[float]:
        return [self.scores[item] for item in candidates]


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.sampled_from([0.0, 0.3, 0.5, 1.0, math.nan])),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 10),
    st.sampled_from([0.1, 0.25, 0.5, 1.0]),
)
@settings(max_examples=200)
def test_order_and_scores_are_those_that_are_served(
    pairs: list[tuple[float, float]], first: int, weight: float
) -> None:
    ctr, llm = (np.array(column) for column in zip(*pairs, strict=True))
    asked = Rank(
        user_id=1,
        candidates=list(range(len(ctr))),
        mode="cascade",
        rerank=first,
        llm_weight=weight,
        top_k=len(ctr),
        deadline_ms=10_000,
    )
    served = asyncio.run(Cascade(Fixed(ctr.tolist()), Fixed(llm.tolist())).rank(asked)).results
    order, scores = reorder(ctr, llm, first=first, weight=weight)
    assert [result.id for result in served] == order.tolist()
    assert [result.score for result in served] == scores[order].tolist()


def test_ndcg_by_hand() -> None:
    second = 1 / math.log2(3)
    assert ndcg(np.array([[0, 1, 0]]), 10) == pytest.approx(second)
    assert ndcg(np.array([[0, 1, 1]]), 2) == pytest.approx(second / (1 + second))
    assert ndcg(np.array([[0, 1, 0], [0, 0, 0], [1, 1, 0]]), 10) == pytest.approx((second + 1) / 2)
    assert math.isnan(ndcg(np.zeros((1, 3)), 10))


def test_figures_of_a_perfect_llm_grow_with_depth_and_weight() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 12)) < 0.4).astype(float)
    ctr, llm = rng.random(labels.shape), 0.8 * labels + 0.1
    by = {(f.first, f.weight): f for f in evaluate_cascade(labels, ctr, llm, depths=[4, 12], weights=[0, 0.5, 1])}
    assert list(by) == [(4, 0), (4, 0.5), (4, 1), (12, 0), (12, 0.5), (12, 1)]
    perfect = by[12, 1]
    assert (perfect.ndcg, perfect.auc, perfect.list_auc) == (1.0, 1.0, 1.0)
    for figure in ("ndcg", "auc", "list_auc"):
        assert getattr(by[4, 0], figure) == getattr(by[12, 0], figure)
        assert getattr(by[12, 0], figure) < getattr(by[4, 1], figure) < getattr(perfect, figure)
    one = evaluate_cascade(labels[:1], ctr[:1], llm[:1], depths=[4], weights=[0])[0]
    order = np.argsort(-ctr[0])
    assert one.ndcg == pytest.approx(ndcg(labels[:1, order], 10))
    wins = [(a < b) for a in ctr[0][labels[0] == 0] for b in ctr[0][labels[0] == 1]]
    assert one.auc == one.list_auc == pytest.approx(np.mean(wins))


def samples_of(counts: dict[int, int], split: str = "test") -> pa.Table:
    """`counts` samples a user; each one's history is all items before it."""
    rows = [
        {
            "user_id": user,
            "item_id": 100 + i,
            "label": float(i % 2),
            "timestamp": 10 + i,
            "history": list(range(100 + i)),
            "history_ratings": None,
            "history_labels": [1.0] * (100 + i),
            "split": split,
        }
        for user, n in counts.items()
        for i in reversed(range(n))
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def test_lists_know_only_what_was_known_at_their_moment() -> None:
    samples = pa.concat_tables([samples_of({1: 5, 2: 3, 3: 4, 4: 2}), samples_of({9: 8}, "train")])
    held_out = held_out_lists(samples, lists=3, length=3)
    assert held_out.schema == SAMPLES
    users = held_out["user_id"].to_numpy().reshape(3, 3)
    assert set(users[:, 0]) == {1, 2, 3}
    assert (users == users[:, :1]).all()
    assert held_out["item_id"].to_pylist() == [100, 101, 102] * 3
    assert held_out["label"].to_pylist() == [0, 1, 0] * 3
    assert set(held_out["timestamp"].to_pylist()) == {10}
    assert held_out["history"].to_pylist() == [list(range(100))] * 9
    fewer = held_out_lists(samples, lists=2, length=3)
    assert fewer.equals(held_out.slice(0, 6).combine_chunks())
    with pytest.raises(RecipeError, match="4 lists of 3 candidates are asked for, but 3 users"):
        held_out_lists(samples, lists=4, length=3)
