import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sealed import brute_force

from owlrec_decoding.index import LivePool, build_pool, match_live, match_sealed

texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), max_size=8)


def matches(pool: LivePool, context: list[int], room: int = 512) -> tuple[np.ndarray, np.ndarray]:
    positions, lengths = np.zeros(room, np.int64), np.zeros(room, np.int64)
    n = match_live(pool.tokens, pool.heads, pool.earlier, np.array(context, np.int32), positions, lengths)
    return positions[:n], lengths[:n]


@settings(max_examples=150)
@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_longest_match_equals_brute_force(sequences: list[list[int]], context: list[int]) -> None:
    pool = LivePool(max_tokens=1 << 12)
    for s in sequences:
        pool.insert(s)
    positions, lengths = matches(pool, context)
    assert (lengths[0] if len(lengths) else 0) == brute_force(sequences, context)
    assert len(set(positions)) == len(positions)
    for position, length in zip(positions, lengths, strict=True):
        assert list(pool.tokens[position - length : position]) == context[len(context) - length :]


@settings(max_examples=60)
@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_a_sealed_pool_finds_as_long_matches(sequences: list[list[int]], context: list[int]) -> None:
    pool = LivePool(max_tokens=1 << 12)
    for s in sequences:
        pool.insert(s)
    sealed = build_pool(pool.sequences())
    _, length = match_sealed(*sealed.walked()[:3], np.array(context, np.int32))
    assert length == max([0, *matches(pool, context)[1]])


def test_latest_of_equal_matches_stands_first() -> None:
    pool = LivePool(max_tokens=1 << 12)
    for after in (5, 6, 7):
        pool.insert([1, 2, after])
    positions, _ = matches(pool, [1, 2])
    assert [int(pool.tokens[p]) for p in positions] == [7, 6, 5]


def test_full_pool_drops_the_oldest_texts_and_stays_within_bounds() -> None:
    pool = LivePool(max_tokens=2000)
    for i in range(100):
        pool.insert([i] * 49)
        assert len(pool) <= 2000
    held = [int(s[0]) for s in pool.sequences()]
    assert held == list(range(100 - len(held), 100))  # the latest, in order, none missing
    assert pool.dropped == 100 - len(held)
    assert len(pool) >= 0.7 * 2000
    assert len(matches(pool, [99, 99])[0]) > 0
    assert len(matches(pool, [0, 0])[0]) == 0


def test_index_takes_at_most_80_bytes_per_token() -> None:
    pool = LivePool(max_tokens=1 << 20)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        pool.insert(rng.integers(0, 1000, 100))
        if len(pool) > 2000:
            assert sum(a.nbytes for a in (pool.tokens, pool.heads, pool.earlier)) <= 80 * len(pool)


def test_insert_says_when_the_arrays_were_replaced() -> None:
    pool = LivePool(max_tokens=1 << 14)
    before = pool.tokens
    assert not pool.insert([1, 2, 3])
    assert pool.tokens is before
    assert pool.insert(list(range(2000)))
    assert pool.tokens is not before


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1024"):
        LivePool(max_tokens=10)
    with pytest.raises(ValueError, match="negative"):
        LivePool(max_tokens=2048).insert([3, -1])
    pool = LivePool(max_tokens=2048)
    pool.insert([])
    assert len(pool) == 0
    pool.insert(np.arange(5000))  # cut to its end
    assert int(pool.sequences()[0][-1]) == 4999
