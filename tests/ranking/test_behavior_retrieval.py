"""Behavior retrieval, against a brute-force reference and on the cases that the paper's released code gets wrong."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.encoding.compression import ProjectionSettings, fit_projection, unit_rows
from owlrec.errors import SchemaError
from owlrec.ranking.behavior_retrieval import BehaviorRetriever
from owlrec.schema import vectors_schema

NEITHER = 99  # an id without a vector


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def reference(ids: np.ndarray, vectors: np.ndarray, history: np.ndarray, candidates: np.ndarray, k: int) -> list[int]:
    """Each candidate with a vector sorts the whole history by (cosine, newness) in exact sums; then they take turns."""
    unit = dict(zip(ids.tolist(), unit_rows(vectors).astype(np.float64), strict=True))
    unit = {id_: vector for id_, vector in unit.items() if vector.any()}
    known = [p for p in range(len(history)) if int(history[p]) in unit]

    def nearness(candidate: int, position: int) -> tuple[float, int]:
        return -round(math.fsum(unit[int(history[position])] * unit[candidate]), 12), -position

    wanted = sorted(set(candidates.tolist()) & unit.keys())
    orders = [sorted(nearness(candidate, position) for position in known) for candidate in wanted]
    shown: list[int] = []
    for turn in range(len(known) if wanted else 0):
        shown += [-newness for _, newness in sorted(order[turn] for order in orders)]
    shown += sorted(set(range(len(history))) - set(shown), reverse=True)
    return sorted(list(dict.fromkeys(shown))[:k])


def each(retriever: BehaviorRetriever, history: np.ndarray, candidates: np.ndarray, k: int) -> list[list[int]]:
    """What each candidate is shown by itself."""
    return [retriever.retrieve(history, ints(candidate), k).tolist() for candidate in candidates]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Ids with gaps, vectors with many ties and some zeros, histories with repeats and unknown items."""
    ids = np.array(sorted(draw(st.sets(st.integers(-5, 30), min_size=0, max_size=12))), dtype=np.int64)
    component = st.integers(-2, 2)
    rows = draw(st.lists(st.tuples(component, component, component), min_size=len(ids), max_size=len(ids)))
    item = st.integers(-6, 31)
    history = draw(st.lists(item, max_size=25))
    candidates = draw(st.lists(item, min_size=0, max_size=4))
    vectors = np.array(rows, dtype=np.float32).reshape(len(ids), 3)
    return ids, vectors, ints(*history), ints(*candidates), draw(st.integers(1, 8))


@given(worlds())
@settings(max_examples=500)
def test_same_as_brute_force(world: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]) -> None:
    ids, vectors, history, candidates, k = world
    retriever = BehaviorRetriever(ids, vectors)
    retrieved = retriever.retrieve(history, candidates, k)
    assert retrieved.dtype == np.int64
    assert retrieved.tolist() == reference(ids, vectors, history, candidates, k)
    expected = [reference(ids, vectors, history, ints(candidate), k) for candidate in candidates]
    assert each(retriever, history, candidates, k) == expected


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([2, 17, 64]))
@settings(max_examples=60)
def test_same_as_brute_force_with_real_valued_vectors_and_exact_copies(seed: int, k: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(60, dim)).astype(np.float32)
    vectors[30:] = vectors[rng.integers(0, 30, 30)]  # the same text under another id
    ids = np.sort(rng.choice(10**12, 60, replace=False))
    history, candidates = rng.choice(ids, 300), rng.choice(ids, 3)
    retriever = BehaviorRetriever(ids, vectors)
    retrieved = retriever.retrieve(history, candidates, k)
    assert retrieved.tolist() == reference(ids, vectors, history, candidates, k)
    shuffled = np.r_[candidates[::-1], candidates]  # neither order nor repeats count
    np.testing.assert_array_equal(retriever.retrieve(retriever.look_up(history), shuffled, k), retrieved)


def test_ids_that_start_at_one_are_not_row_numbers() -> None:
    retriever = BehaviorRetriever(ints(1, 2, 3, 4), np.eye(4, dtype=np.float32))
    history = ints(4, 3, 2, 1)
    for item in (1, 2, 3, 4):
        assert history[retriever.retrieve(history, ints(item), 1)] == [item]


def test_ids_with_gaps_at_either_end_and_between_are_found_or_missed_exactly() -> None:
    retriever = BehaviorRetriever(ints(10, 20, 30), np.eye(3, dtype=np.float32))
    history = ints(9, 10, 19, 20, 21, 30, 31)
    assert each(retriever, history, ints(10, 20, 30), 1) == [[1], [3], [5]]
    assert each(retriever, history, ints(9, 19, 21, 31), 1) == [[6]] * 4  # the newest


def test_a_long_vector_is_no_nearer_than_a_short_one() -> None:
    retriever = BehaviorRetriever(ints(0, 1, 2), np.array([[1, 0], [1, 0.1], [100, 100]], dtype=np.float32))
    assert retriever.retrieve(ints(2, 1, 2), ints(0), 1).tolist() == [1]


def test_order_is_that_of_the_history_not_of_the_cosine() -> None:
    retriever = BehaviorRetriever(ints(0, 1, 2), np.array([[1, 0], [1, 1], [0, 1]], dtype=np.float32))
    assert retriever.retrieve(ints(2, 1, 0, 2), ints(0), 2).tolist() == [1, 2]
    assert retriever.retrieve(ints(0, 2, 1, 2), ints(0), 2).tolist() == [0, 2]


def test_of_equals_the_newer_is_taken() -> None:
    retriever = BehaviorRetriever(ints(0, 1), np.array([[1, 0], [2, 0]], dtype=np.float32))
    assert retriever.retrieve(ints(0, 1, 0, 1, 0), ints(0), 2).tolist() == [3, 4]


def test_behaviors_without_a_vector_fill_up_newest_first() -> None:
    retriever = BehaviorRetriever(ints(0, 1, 2), np.array([[1, 0], [-1, 0], [0, 0]], dtype=np.float32))
    history = ints(1, NEITHER, 2, NEITHER, 0)
    assert retriever.retrieve(history, ints(0), 2).tolist() == [0, 4]  # the opposite comes before an unknown one
    assert retriever.retrieve(history, ints(0), 4).tolist() == [0, 2, 3, 4]
    assert retriever.retrieve(history, ints(2, NEITHER), 3).tolist() == [2, 3, 4]  # nothing to compare by
    assert retriever.retrieve(history, ints(2, NEITHER, 0), 2).tolist() == [0, 4]  # they take no turn


def test_candidates_own_earlier_occurrences_are_nearest() -> None:
    retriever = BehaviorRetriever(ints(0, 1), np.array([[1, 0], [1, 0.01]], dtype=np.float32))
    assert retriever.retrieve(ints(0, 1, 0, 1), ints(0), 2).tolist() == [0, 2]


def test_each_candidate_gets_its_nearest_before_one_gets_its_second() -> None:
    """Items 1 and 2 are as like as can be to 0; 4 and 5 are only a little like 3."""
    vectors = np.array([[1, 0], [1, 0], [1, 0.01], [0, 1], [1, 1], [1, 0.9]], dtype=np.float32)
    retriever, history = BehaviorRetriever(np.arange(6), vectors), ints(1, 5, 2, 4)
    assert each(retriever, history, ints(0, 3), 2) == [[0, 2], [1, 3]]
    assert retriever.retrieve(history, ints(0, 3), 2).tolist() == [0, 3]
    assert retriever.retrieve(history, ints(0, 3), 3).tolist() == [0, 2, 3]  # the nearer of the second nearest


def test_short_and_empty_histories_are_shown_whole() -> None:
    retriever = BehaviorRetriever(ints(0), np.ones((1, 2), dtype=np.float32))
    assert retriever.retrieve(ints(NEITHER, 0), ints(0), 4).tolist() == [0, 1]
    assert retriever.retrieve(ints(), ints(0, 0), 2).tolist() == []
    assert retriever.retrieve(ints(0, NEITHER, 0), ints(), 2).tolist() == [1, 2]
    with pytest.raises(ValueError, match="k is 0"):
        retriever.retrieve(ints(0), ints(0), 0)


def test_more_candidates_than_scores_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    retriever = BehaviorRetriever(np.arange(50), rng.normal(size=(50, 4)))
    history, candidates = rng.integers(0, 50, 200), rng.choice(50, 20, replace=False)
    whole = retriever.retrieve(history, candidates, 5)
    monkeypatch.setattr("owlrec.ranking.behavior_retrieval._SCORES_AT_ONCE", 150)
    np.testing.assert_array_equal(retriever.retrieve(history, candidates, 5), whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_that_share_a_history_find_what_one_finds(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((1001, 16), dtype=np.float32)
    history, candidates = rng.integers(0, 1001, 900), rng.integers(0, 1001, 5)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.setattr("owlrec.ranking.behavior_retrieval._BLOCK_BYTES", 16 * 4 * 7)  # blocks of seven rows
    retriever = BehaviorRetriever(np.arange(1001), vectors)
    for asked in (candidates, candidates[:1]):
        expected = reference(np.arange(1001), vectors, history, asked, 9)
        assert retriever.retrieve(history, asked, 9).tolist() == expected


@pytest.mark.parametrize(
    ("ids", "rows", "says"),
    [((1, 3, 2), 3, "row 2: id 2 follows 3"), ((1, 1), 2, "row 1: id 1 follows 1"), ((1, 2), 3, "2 ids, but")],
)
def test_a_table_out_of_order_is_refused(ids: tuple[int, ...], rows: int, says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        BehaviorRetriever(ints(*ids), np.ones((rows, 2)))


def vectors_table(kinds: list[str], ids: list[int], vectors: np.ndarray) -> pa.Table:
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    codes = pa.array([[]] * len(ids), pa.list_(pa.uint16()))
    return pa.table(
        [pa.array(kinds), pa.array(ids, pa.int64()), column, codes], schema=vectors_schema(vectors.shape[1])
    )


def test_table_in_any_order_gives_its_items_only() -> None:
    table = vectors_table(["item", "user", "item"], [7, 1, 3], np.array([[1, 0], [0, 1], [0, 1]]))
    retriever = BehaviorRetriever.from_table(table)
    assert each(retriever, ints(3, 7, 3, 7), ints(7, 3), 2) == [[1, 3], [0, 2]]
    assert each(retriever, ints(3, 7, 3, 7), ints(1), 2) == [[2, 3]]  # a user's vector is not an item's
    assert each(BehaviorRetriever.from_table(table.slice(1, 1)), ints(3, 7), ints(7), 1) == [[1]]


def test_projection_takes_out_what_all_items_share() -> None:
    rng = np.random.default_rng(3)
    own = rng.normal(size=(40, 8))
    shared = np.concatenate([own, np.full((40, 1), 50.0)], axis=1)
    table = vectors_table(["item"] * 40, list(range(40)), shared)
    projection = fit_projection(shared.astype(np.float32), ProjectionSettings(components=8))
    history = rng.permutation(40)
    retrieved = each(BehaviorRetriever.from_table(table, projection), history, np.arange(40), 5)
    centered = unit_rows(own - own.mean(axis=0))
    for item in range(40):
        expected = np.argsort(-centered[history] @ centered[item], kind="stable")[:5]
        assert len(set(retrieved[item]) & set(expected)) >= 4  # float16 and the noise of a small component
