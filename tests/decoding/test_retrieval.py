import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec_decoding.index import (
    CONTEXT,
    LIVE,
    NOTHING,
    SEALED,
    TEXT,
    LivePool,
    SearchSet,
    build_pool,
    find_node,
    match_sealed,
)
from owlrec_decoding.pools import (
    AGREE,
    CELLS,
    LONGEST,
    OTHERS,
    SHORTER,
    SILENT,
    WRITTEN,
    AcceptanceRates,
    Drafts,
    draft_rows,
)

ONE = np.ones(4 * CELLS)


def draft(
    search_set: SearchSet,
    contexts: list[list[int]],
    sources: list[list[tuple[int, int]]],
    *,
    factors: np.ndarray = ONE,
    limit: int = 8,
    ends: tuple[int, ...] = (),
    prompt: int = 1000,
    floor: float = 0.0,
    groups: list[list[int]] | None = None,
) -> Drafts:
    width = max(len(s) for s in sources)
    padded = np.array([[*s, *[(NOTHING, 0)] * (width - len(s))] for s in sources], np.int64)
    tokens = np.full((len(contexts), 64), 999, np.int32)  # what stands beyond a context is stale and must not be read
    for row, context in enumerate(contexts):
        tokens[row, : len(context)] = context
    return draft_rows(
        tokens,
        np.arange(len(contexts)),
        np.array([len(c) for c in contexts]),
        np.full(len(contexts), prompt),
        np.full(len(contexts), limit),
        padded,
        np.array(groups, np.int64) if groups else np.zeros(padded.shape[:2], np.int64),
        search_set,
        factors,
        np.array(ends, np.int32),
        depth=8,
        floor=floor,
    )


def tokens(found: Drafts, row: int = 0) -> list[int]:
    return [int(t) for t in found.tokens[row, : found.count[row]]]


few = st.lists(st.integers(0, 3), max_size=30)


@settings(max_examples=100)
@given(st.lists(st.lists(few, max_size=5), min_size=1, max_size=4), st.lists(few, min_size=1, max_size=6), st.data())
def test_rows_are_searched_together_as_each_is_alone(
    pools: list[list[list[int]]], contexts: list[list[int]], data: st.DataObject
) -> None:
    search_set = SearchSet()
    built = [build_pool(pool) for pool in pools]
    places = [search_set.add_sealed(pool) for pool in built]
    chosen = [data.draw(st.sampled_from(range(len(pools)))) for _ in contexts]
    found = draft(search_set, contexts, [[(SEALED, places[at])] for at in chosen], limit=1)
    for row, (context, at) in enumerate(zip(contexts, chosen, strict=True)):
        walked = built[at].walked()
        leaf, length = match_sealed(*walked[:3], np.array(context, np.int32))
        if length == 0:
            assert found.count[row] == 0
        else:
            node = find_node(walked.leaves, walked.nodes, leaf, length)
            assert tokens(found, row) == [(walked.leaves[leaf] if node < 0 else walked.nodes[node])["token"]]


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.lists(few, max_size=5), st.booleans()), min_size=1, max_size=4),
    st.lists(few, min_size=1, max_size=4),
    st.data(),
)
def test_other_pools_change_nothing_that_a_pool_drafts(
    pools: list[tuple[list[list[int]], bool]], contexts: list[list[int]], data: st.DataObject
) -> None:
    together = SearchSet()
    built = [build_pool(texts, searchable=searchable) for texts, searchable in pools]
    places = [together.add_sealed(pool) for pool in built]
    if data.draw(st.booleans()):  # the first place is freed and used again
        together.remove(SEALED, places[0])
        places[0] = together.add_sealed(built[0])
    chosen = [data.draw(st.sampled_from(range(len(pools)))) for _ in contexts]
    found = draft(together, contexts, [[(SEALED, places[at])] for at in chosen])
    for row, (context, at) in enumerate(zip(contexts, chosen, strict=True)):
        alone = SearchSet()
        expected = draft(alone, [context], [[(SEALED, alone.add_sealed(built[at]))]])
        assert tokens(found, row) == tokens(expected)
        assert found.chance[row].tolist() == expected.chance[0].tolist()


@pytest.mark.parametrize("end", range(3, 8))
def test_a_draft_stops_at_an_end_token_wherever_it_stands(end: int) -> None:
    search_set = SearchSet()
    place = search_set.add_sealed(build_pool([[1, 2, 3, 4, 5, 6, 7]]))
    assert tokens(draft(search_set, [[1, 2]], [[(SEALED, place)]], ends=(99, end))) == list(range(3, end + 1))


def test_the_commonest_continuation_of_the_longest_match_wins() -> None:
    search_set = SearchSet()
    place = search_set.add_sealed(
        build_pool([[1, 2, 3, 7], [1, 2, 3, 8], [1, 2, 3, 8], [9, 3, 5], [9, 3, 5], [9, 3, 5]])
    )
    found = draft(search_set, [[1, 2, 3]], [[(SEALED, place)]])
    # "1 2 3" was followed by 8 twice and 7 once; 5 followed "3" alone, three times of six.
    assert tokens(found) == [8]
    # Names 2, 3, 5, 7, 8; nothing: 8 is 2 of 15. "3": 2 of 6. "1 2 3": 2 of 3. Each count leaves .8 to what is shorter.
    nothing = (2 - 0.8 + 0.8 * 5 / 5) / 15
    three = (2 - 0.8 + 0.8 * 3 * nothing) / 6
    assert found.expected[0, 0] == pytest.approx((2 - 0.8 + 0.8 * 2 * three) / 3)
    assert found.chance[0, 0] == found.expected[0, 0]
    # A chance between .45 and .6, no other source, never written by the row.
    assert found.cell[0, 0] == (3 * OTHERS + SILENT) * WRITTEN


def test_chances_multiply_along_the_chain_and_end_at_the_floor() -> None:
    search_set = SearchSet()
    place = search_set.add_text(np.array([1, 2, 3, 4, 5, 6], np.int32))
    found = draft(search_set, [[1]], [[(TEXT, place)]])
    assert tokens(found) == [2, 3, 4, 5, 6]
    np.testing.assert_allclose(found.expected[0, :5], [0.2, 0.35, 0.4, 0.45, 0.5])  # of matches of 1, 2, 3, 4, 5 tokens
    np.testing.assert_allclose(found.chance[0, :5], np.cumprod([0.2, 0.35, 0.4, 0.45, 0.5]))
    assert tokens(draft(search_set, [[1]], [[(TEXT, place)]], floor=0.03)) == [2, 3]
    assert tokens(draft(search_set, [[1]], [[(TEXT, place)]], limit=1)) == [2]
    assert tokens(draft(search_set, [[1]], [[(TEXT, place)]], limit=0)) == []


def test_the_likeliest_token_of_all_sources_wins_each_place() -> None:
    search_set = SearchSet()
    short = search_set.add_text(np.array([2, 3, 9], np.int32))
    long = search_set.add_text(np.array([1, 2, 4, 5, 6], np.int32))
    both = [[(TEXT, short), (TEXT, long)]]
    # A match of two tokens is worth .35, of one .2.
    found = draft(search_set, [[1, 2]], both, groups=[[0, 1]])
    assert tokens(found) == [4, 5, 6]
    assert list(found.cell[0, :3] // CELLS) == [1, 1, 1]
    # Where the first source was learned to be far better, its token leads, and the second, that lost its place, has
    # nothing to say of what follows.
    factors = ONE.copy()
    factors[:CELLS] = 3.0
    found = draft(search_set, [[1, 2]], both, factors=factors, groups=[[0, 1]])
    assert tokens(found) == [3, 9]
    assert list(found.cell[0, :2] // CELLS) == [0, 0]


def test_sources_that_agree_support_each_other() -> None:
    search_set = SearchSet()
    a, b = search_set.add_text(np.array([1, 2, 3], np.int32)), search_set.add_text(np.array([1, 2, 3], np.int32))
    found = draft(search_set, [[1, 2]], [[(TEXT, a), (TEXT, b)]])
    assert found.expected[0, 0] == pytest.approx(1 - 0.65**2)
    assert found.cell[0, 0] // WRITTEN % OTHERS == AGREE


def test_a_longer_match_elsewhere_is_told_from_a_shorter_one() -> None:
    search_set = SearchSet()
    short, long = search_set.add_text(np.array([9, 2, 3], np.int32)), search_set.add_text(np.array([1, 2, 4], np.int32))
    sources, groups = [[(TEXT, short), (TEXT, long)]], [[0, 1]]
    assert draft(search_set, [[1, 2]], sources, groups=groups).cell[0, 0] // WRITTEN % OTHERS == LONGEST
    factors = ONE.copy()
    factors[CELLS : 2 * CELLS] = 0.01
    assert (
        draft(search_set, [[1, 2]], sources, groups=groups, factors=factors).cell[0, 0] // WRITTEN % OTHERS == SHORTER
    )


def test_what_the_row_has_written_before_has_cells_of_its_own() -> None:
    search_set = SearchSet()
    place = search_set.add_text(np.array([1, 2, 3], np.int32))

    def cell(context: list[int], prompt: int) -> int:
        found = draft(search_set, [context], [[(TEXT, place)]], prompt=prompt)
        assert tokens(found) == [3]
        return int(found.cell[0, 0]) % WRITTEN

    assert cell([3, 3, 1, 2], prompt=4) == 0  # in the prompt alone
    assert cell([3, 3, 1, 2], prompt=1) == 1
    assert cell([3, 3, 3, 1, 2], prompt=0) == 2


def test_a_draft_goes_on_where_its_text_ends_and_another_has_the_same_words() -> None:
    search_set = SearchSet()
    place = search_set.add_sealed(build_pool([[1, 2, 3], [1, 2, 3], [7, 3, 4, 5]]))
    assert tokens(draft(search_set, [[1, 2]], [[(SEALED, place)]])) == [3, 4, 5]


def test_a_repeating_row_is_continued_from_itself_beyond_its_end() -> None:
    assert tokens(draft(SearchSet(), [[5, 1, 2, 1, 2]], [[(CONTEXT, 0)]])) == [1, 2, 1, 2, 1, 2, 1, 2]


def test_a_text_is_never_read_on_past_its_end() -> None:
    search_set = SearchSet()
    place = search_set.add_text(np.array([1, 2, 3], np.int32))
    assert tokens(draft(search_set, [[1, 2]], [[(TEXT, place)]])) == [3]
    assert tokens(draft(search_set, [[2, 3]], [[(TEXT, place)]])) == []


def test_rows_of_different_pools_are_served_in_one_call() -> None:
    search_set = SearchSet()
    a, b = search_set.add_sealed(build_pool([[1, 2]])), search_set.add_sealed(build_pool([[1, 3]]))
    live = LivePool(max_tokens=1 << 12)
    live.insert([1, 4])
    c = search_set.add_live(live)
    found = draft(search_set, [[1], [1], [1], [8]], [[(SEALED, a)], [(SEALED, b)], [(LIVE, c)], [(SEALED, a)]])
    assert [tokens(found, row) for row in range(4)] == [[2], [3], [4], []]


def test_a_freed_place_finds_nothing_and_is_used_again() -> None:
    search_set = SearchSet()
    place = search_set.add_sealed(build_pool([[1, 2]]))
    search_set.remove(SEALED, place)
    assert tokens(draft(search_set, [[1]], [[(SEALED, place)]])) == []
    assert search_set.add_sealed(build_pool([[1, 3]])) == place
    assert tokens(draft(search_set, [[1]], [[(SEALED, place)]])) == [3]


@pytest.mark.parametrize("kind", [SEALED, LIVE, TEXT])
def test_empty_pools_draft_nothing(kind: int) -> None:
    search_set = SearchSet()
    add = {
        SEALED: lambda: search_set.add_sealed(build_pool([])),
        LIVE: lambda: search_set.add_live(LivePool(max_tokens=2048)),
        TEXT: lambda: search_set.add_text(np.zeros(0, np.int32)),
    }[kind]
    assert tokens(draft(search_set, [[1, 2, 3]], [[(kind, add())]])) == []


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
)
def test_every_tier_drafts_what_some_text_says_after_the_match(texts: list[list[int]], context: list[int]) -> None:
    """Each drafted token follows the one before it somewhere in the pool; a sealed pool drafts as long as anything
    does, a live one to the end of the texts that it found."""
    search_set, live = SearchSet(), LivePool(max_tokens=1 << 12)
    for text in texts:
        live.insert(text)
    sealed_place, live_place = search_set.add_sealed(build_pool(texts)), search_set.add_live(live)
    for source in ((SEALED, sealed_place), (LIVE, live_place)):
        chain = [context[-1], *tokens(draft(search_set, [context], [[source]]))]
        pairs = {pair for text in texts for pair in itertools.pairwise(text)}
        assert all(pair in pairs for pair in itertools.pairwise(chain))
        goes_on = any(chain[-1] == first for first, _ in pairs)
        assert len(chain) == 9 or not goes_on or (source[0] == LIVE and len(chain) > 1)


def test_factors_follow_what_is_observed_and_forget() -> None:
    rates = AcceptanceRates(2)
    before = rates.factors.copy()
    n, cell = 400, CELLS + 5 * OTHERS * WRITTEN
    cells, chances, one = np.full((n, 1), cell), np.full((n, 1), 0.8), np.ones(n, np.int64)
    rates.observe(cells, chances, one, (np.arange(n) < 160).astype(np.int64))
    assert rates.factors[cell] == pytest.approx((160 + 20) / (320 + 20))  # the prior stands for 20 expected ones
    assert (np.delete(rates.factors, cell) == np.delete(before, cell)).all()  # no other cell moved
    for _ in range(20):
        rates.observe(cells, chances, one, one)
    assert rates.factors[cell] == pytest.approx(1 / 0.8, rel=0.02)  # the early rejections have faded


def test_a_batch_drafts_what_its_rows_draft_alone() -> None:
    rng = np.random.default_rng(0)
    search_set = SearchSet()
    place = search_set.add_sealed(build_pool([rng.integers(0, 30, 100) for _ in range(50)]))
    contexts = [rng.integers(0, 30, 40).tolist() for _ in range(64)]
    sources = [[(SEALED, place), (CONTEXT, 0)]]
    together = draft(search_set, contexts, sources * 64)
    for row, context in enumerate(contexts):
        assert tokens(together, row) == tokens(draft(search_set, [context], sources))
