import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec_decoding.index import CONTEXT, LIVE, NOTHING, SEALED, TEXT, LivePool, SearchSet, build_pool
from owlrec_decoding.pools import CELLS, VOTES, AcceptanceRates, Drafts, draft_rows

HALF = np.full((4, CELLS), 0.5)


def draft(
    search_set: SearchSet,
    contexts: list[list[int]],
    sources: list[list[tuple[int, int]]],
    *,
    rates: np.ndarray = HALF,
    limit: int = 8,
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
        np.full(len(contexts), limit),
        padded,
        np.array(groups, np.int64) if groups else np.zeros(padded.shape[:2], np.int64),
        search_set,
        rates,
        depth=8,
        floor=floor,
    )


def tokens(drafts: Drafts, row: int = 0) -> list[int]:
    return [int(t) for t in drafts.tokens[row, : drafts.count[row]]]


def test_the_commonest_continuation_of_the_longest_match_wins() -> None:
    search_set = SearchSet()
    place = search_set.add_sealed(
        build_pool([[1, 2, 3, 7], [1, 2, 3, 8], [1, 2, 3, 8], [9, 3, 5], [9, 3, 5], [9, 3, 5]])
    )
    drafts = draft(search_set, [[1, 2, 3]], [[(SEALED, place)]])
    # "1 2 3" was followed by 8 twice and 7 once; 5 followed only the shorter "3", three times at a quarter of a vote.
    assert tokens(drafts) == [8]
    assert drafts.cell[0, 0] == 2 * VOTES + 3  # three shared tokens; 2 of 3 votes lie between 55 and 75 %


def test_chances_multiply_along_the_chain_and_end_at_the_floor() -> None:
    search_set = SearchSet()
    place = search_set.add_sealed(build_pool([[1, 2, 3, 4, 5, 6]]))
    drafts = draft(search_set, [[1]], [[(SEALED, place)]])
    assert tokens(drafts) == [2, 3, 4, 5, 6]
    np.testing.assert_allclose(drafts.chance[0, :5], [0.5, 0.25, 0.125, 0.0625, 0.03125])
    assert tokens(draft(search_set, [[1]], [[(SEALED, place)]], floor=0.2)) == [2, 3]
    assert tokens(draft(search_set, [[1]], [[(SEALED, place)]], limit=1)) == [2]
    assert tokens(draft(search_set, [[1]], [[(SEALED, place)]], limit=0)) == []


def test_the_source_that_promises_most_accepted_tokens_wins() -> None:
    search_set = SearchSet()
    short = search_set.add_sealed(build_pool([[1, 2, 3]]))
    long = search_set.add_text(np.array([1, 2, 4, 5, 6], np.int32))
    rates = np.stack([np.full(CELLS, 0.9), np.full(CELLS, 0.5), *HALF[:2]])
    both = [[(SEALED, short), (TEXT, long)]]
    # One token at 0.9 beats 0.5 + 0.25 + 0.125; with equal rates the longer draft wins.
    assert tokens(draft(search_set, [[1, 2]], both, rates=rates, groups=[[0, 1]])) == [3]
    drafts = draft(search_set, [[1, 2]], both, rates=rates, groups=[[1, 1]])
    assert tokens(drafts) == [4, 5, 6]
    assert drafts.source[0] == 1


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
    drafts = draft(search_set, [[1], [1], [1], [8]], [[(SEALED, a)], [(SEALED, b)], [(LIVE, c)], [(SEALED, a)]])
    assert [tokens(drafts, row) for row in range(4)] == [[2], [3], [4], []]
    assert list(drafts.source) == [0, 0, 0, -1]


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
    """A drafted chain, behind the token it follows, stands in a text of the pool word for word."""
    search_set, live = SearchSet(), LivePool(max_tokens=1 << 12)
    for text in texts:
        live.insert(text)
    sealed_place, live_place = search_set.add_sealed(build_pool(texts)), search_set.add_live(live)
    for source in ((SEALED, sealed_place), (LIVE, live_place)):
        chain = [context[-1], *tokens(draft(search_set, [context], [[source]]))]
        assert any(text[i : i + len(chain)] == chain for text in texts for i in range(len(text))) or len(chain) == 1
        followed = any(context[-1] in text[:-1] for text in texts)
        assert (len(chain) > 1) == followed


def test_rates_follow_what_is_observed_and_forget() -> None:
    rates = AcceptanceRates(2)
    before = rates.rates.copy()
    n = 400
    rates.observe(np.ones(n, int), np.full(n, 5), np.arange(n) < 100)
    assert rates.rates[1, 5] == pytest.approx((100 + 8 * before[1, 5]) / (n + 8))
    rates.rates[1, 5] = before[1, 5]
    assert (rates.rates == before).all()  # no other cell moved
    for _ in range(20):
        rates.observe(np.ones(n, int), np.full(n, 5), np.ones(n, bool))
    assert rates.rates[1, 5] > 0.97  # the early rejections have faded
