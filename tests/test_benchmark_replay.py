"""The replay behind the decoder's figures counts as it says."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay import Corpus, Drafter, prefix, read_column, replay_vote


def between(*tokens: int) -> np.ndarray:
    """A text behind the one token that stands for its prompt and before its end token."""
    return np.array([0, *tokens, 999], np.int32)


def test_the_plain_vote_drafts_the_likeliest_and_counts_each_step() -> None:
    # "1 2" is followed by 3 twice and by 4 once: 3 is drafted (2/3), then 5 (half of what follows "2 3": 1/3).
    pool = [between(1, 2, 3, 5), between(1, 2, 3, 6), between(1, 2, 4, 7)]
    counted = replay_vote([between(1, 2, 3, 5)], pool)
    # Nothing is drafted for "1" and "2"; behind "1 2" come 3 and, of two equally frequent, 5: both right.
    assert (counted.steps, counted.drafted, counted.tokens) == (3, 2, 5)
    given = replay_vote([between(1, 2, 3, 5)], pool, given=1)
    assert (given.steps, given.tokens) == (2, 4)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_text_known_word_for_word_takes_few_steps(batch: int) -> None:
    texts = {i: between(*range(10 * i + 1, 10 * i + 9)) for i in range(1, 5)}
    drafter = Drafter(Corpus(kind={10 + i: text for i, text in texts.items()}))
    counted = drafter.replay(texts, batch, 0.001)
    assert counted.tokens >= 4 * 8
    assert counted.steps <= 4 * 3
    assert counted.accepted["kind"] > 4 * 4
    assert sum(counted.accepted.values()) == counted.tokens - counted.steps
    trace = counted.trace()
    assert len(trace.count) == counted.steps
    assert trace.accepted is not None
    assert int(trace.accepted.sum()) == sum(counted.accepted.values())


def test_each_source_is_named() -> None:
    own, mate, other = (between(*range(start, start + 8)) for start in (100, 200, 300))
    texts = {1: own, 2: mate, 3: between(1, 2)}
    corpus = Corpus(kind={7: mate, 8: other}, earlier={1: own}, cohorts={2: "a", 7: "a"})
    counted = Drafter(corpus).replay(texts, 3, 0.001)
    assert counted.accepted["own earlier"] > 0
    assert counted.accepted["cohort"] > 0  # before the kind, which knows as much
    assert counted.accepted["just written"] == 0


def test_what_was_just_written_drafts_for_the_next() -> None:
    texts = {i: between(*range(1, 9)) for i in (1, 2)}
    counted = Drafter(Corpus(kind={9: between(50, 51)})).replay(texts, 1, 0.001)
    assert counted.accepted["just written"] > 4


def test_a_right_prefix_ends_at_the_first_wrong_token() -> None:
    assert prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert prefix(np.array([1, 2, 3]), np.array([1, 2])) == 2
    assert prefix(np.array([], dtype=int), np.array([1])) == 0


def test_texts_are_read_from_csv(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text('id,text\n3,"a, b"\n4,c\n')
    assert read_column(tmp_path / "texts.csv", "text") == {3: "a, b", 4: "c"}
