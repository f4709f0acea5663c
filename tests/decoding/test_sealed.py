import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec_decoding.index import (
    BORDER,
    DEPTH,
    SealedPool,
    build_pool,
    find_node,
    match_sealed,
)

texts = st.lists(st.lists(st.integers(0, 3), max_size=50), max_size=6)


def key(tokens: np.ndarray, position: int) -> list[int]:
    """The text before `position` read backwards, to the border or DEPTH tokens."""
    out: list[int] = []
    while position > 0 and tokens[position - 1] != BORDER and len(out) < DEPTH:
        position -= 1
        out.append(int(tokens[position]))
    return out


def brute_force(sequences: list[list[int]], context: list[int]) -> int:
    """Length of the longest end of `context` that some sequence holds with a token after it."""
    for n in range(min(DEPTH, len(context)), 0, -1):
        end = context[-n:]
        if any(s[i : i + n] == end for s in sequences for i in range(len(s) - n)):
            return n
    return 0


@settings(max_examples=150)
@given(texts)
def test_order_is_sorted_by_the_text_read_backwards(sequences: list[list[int]]) -> None:
    pool = build_pool(sequences)
    keys = [key(pool.tokens, p) for p in pool.order]
    assert keys == sorted(keys)
    assert len(keys) == sum(max(0, len(s) - 1) for s in sequences)
    assert [int(pool.rank[p]) for p in pool.order] == list(range(len(keys)))


@settings(max_examples=150)
@given(texts, st.lists(st.integers(0, 3), max_size=45))
def test_longest_match_equals_brute_force(sequences: list[list[int]], context: list[int]) -> None:
    pool = build_pool(sequences)
    leaf, length = match_sealed(*pool.walked()[:3], np.array(context, np.int32))
    assert length == brute_force(sequences, context)
    if length:
        position = pool.order[leaf]
        assert list(pool.tokens[position - length : position]) == context[len(context) - length :]
        assert pool.tokens[position] != BORDER


def blended(sequences: list[list[int]], context: list[int], names: int) -> dict[int, float]:
    """What follows `context`, by plain counting: each distinct set of occurrences, from the shortest context on, leaves
    the discount of its counts to the one before."""
    chances: dict[int, float] = {}
    seen: list[tuple[int, int]] = []
    for n in range(min(DEPTH, len(context)) + 1):
        end = context[len(context) - n :]
        places = [
            (t, i + n) for t, s in enumerate(sequences) for i in range(1 - min(n, 1), len(s) - n) if s[i : i + n] == end
        ]
        if places == seen and n > 1:
            continue  # a longer context of the same occurrences is the same node; the root is one of its own
        followers = Counter(sequences[t][i] for t, i in places)
        total = len(places)
        shorter = {token: chances.get(token, 1 / names) for token in followers}
        left = 0.8 * len(followers) / total if total else 0
        chances = {token: (count - 0.8) / total + left * shorter[token] for token, count in followers.items()}
        seen = places
    return chances


@settings(max_examples=150)
@given(texts, st.lists(st.integers(0, 3), max_size=45))
def test_the_likeliest_follower_and_its_chance_equal_plain_counting(
    sequences: list[list[int]], start: list[int]
) -> None:
    pool = build_pool(sequences)
    leaf, length = match_sealed(*pool.walked()[:3], np.array(start, np.int32))
    if length == 0:
        return
    walked = pool.walked()
    node = find_node(walked.leaves, walked.nodes, leaf, length)
    said = walked.leaves[leaf] if node < 0 else walked.nodes[node]
    names = len({int(pool.tokens[p]) for p in pool.order})
    chances = blended(sequences, start[len(start) - length :], names)
    assert said["chance"] == pytest.approx(max(chances.values()), abs=1e-5)
    assert chances[int(said["token"])] == pytest.approx(max(chances.values()), abs=1e-5)


def test_a_match_never_crosses_from_one_text_to_the_next() -> None:
    pool = build_pool([[1, 2], [3, 4]])
    leaf, length = match_sealed(*pool.walked()[:3], np.array([1, 2, 3], np.int32))
    assert length == 1  # "3" alone, since "2 3" stands across the border
    assert pool.tokens[pool.order[leaf]] == 4


def test_documents_are_found_by_id_and_kept_in_order() -> None:
    pool = build_pool([[5, 6], [], [7]], ids=[30, 10, 20])
    assert list(pool.document(30)) == [5, 6]
    assert list(pool.document(20)) == [7]
    assert list(pool.document(10)) == []
    assert list(pool.document(99)) == []
    assert pool.tokens.tolist() == [5, 6, BORDER, BORDER, 7, BORDER]


def test_pool_reaches_another_process_whole_and_within_34_bytes_a_token() -> None:
    rng = np.random.default_rng(0)
    pool = build_pool([rng.integers(0, 1000, 200) for _ in range(500)], list(range(500)))
    arrays = pool.to_bytes()
    there = SealedPool.from_bytes(arrays)
    for name in ("tokens", "order", "rank", "leaf", "nodes", "chance", "documents"):
        np.testing.assert_array_equal(getattr(there, name), getattr(pool, name))
        assert getattr(there, name).dtype == getattr(pool, name).dtype
    assert sum(map(len, arrays)) <= 34 * len(pool.tokens)


def test_a_pool_of_documents_alone_has_no_tree() -> None:
    pool = build_pool([[1, 2], [3]], [7, 8], searchable=False)
    assert pool.document(7).tolist() == [1, 2]
    assert len(pool.order) == len(pool.chance) == 0
    assert pool.rank.tolist() == [-1] * 5  # kernels look up every position here, also in pools beside it
    assert len(SealedPool.from_bytes(pool.to_bytes()).nodes) == 0


def test_arrays_that_do_not_fit_are_refused() -> None:
    arrays = build_pool([[1, 2, 3]]).to_bytes()
    for at in range(len(arrays) - 1):  # all but the documents
        with pytest.raises(ValueError, match="a sealed pool of"):
            SealedPool.from_bytes([*arrays[:at], b"", *arrays[at + 1 :]])


@pytest.mark.parametrize(
    ("sequences", "ids"), [([[1, -1]], None), ([[1 << 21]], None), ([[1], [2]], [7, 7]), ([[1]], [1, 2])]
)
def test_wrong_input_is_refused(sequences: list[list[int]], ids: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"negative|distinct"):
        build_pool(sequences, ids)


def test_a_million_tokens_are_sorted_within_seconds() -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 50, 1000) for _ in range(1000)]
    build_pool(sequences[:2])
    start = time.process_time()
    build_pool(sequences)
    assert time.process_time() - start < 10
