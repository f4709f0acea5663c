"""Interests and drift by hand and what cannot be compared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.refresh.interests import drifts, priorities, sum_vectors

NAN = float("nan")
TABLE = {1: [1.0, 0.0], 2: [0.0, 1.0], 3: [NAN, 0.0]}


def gather(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.array([TABLE.get(i, [0.0, 0.0]) for i in ids.tolist()], dtype=np.float32).reshape(len(ids), 2)
    return rows, np.array([i in TABLE for i in ids.tolist()], dtype=bool)


def sums(items: list[int], ratings: list[float], lengths: list[int], above: float = 3) -> np.ndarray:
    return sum_vectors(np.array(items, np.int64), np.array(ratings, np.float32), np.array(lengths), gather, above)


def test_what_was_liked_is_weighted_by_rating_and_summed_apart_from_what_was_not() -> None:
    total = sums([1, 2, 1, 9, 3, 2, 1], [4, 5, 3, 4, 4, NAN, -2], [4, 0, 3])
    # 4 of the first and 5 of the second direction, one of the first disliked, item 9 unknown; nothing; item 3 broken, a
    # missing rating is liked and weighs 1, one of -2 is not.
    assert total.tolist() == [[[4, 5], [1, 0]], [[0, 0], [0, 0]], [[0, 1], [1, 0]]]
    assert sums([1], [-2], [1], above=-5).tolist() == [[[0, 0], [0, 0]]]  # above the bound, of no weight


def test_sums_of_nothing_at_all() -> None:
    assert sums([], [], [0]).tolist() == [[[0, 0], [0, 0]]]


def drift(unread: list[list[float]], read: list[list[float]]) -> float:
    return float(drifts(np.array([unread], np.float32), np.array([read], np.float32))[0])


NONE = [0.0, 0.0]


@pytest.mark.parametrize(
    ("unread", "read", "expected"),
    [
        ([1, 0], [5, 0], 0.0),
        ([1, 0], [0, 5], 1.0),
        ([1, 0], [-2, 0], 2.0),
        ([1, 1], [1, 0], 1 - 1 / np.sqrt(2)),
        ([3, 4], [4, 3], 1 - 24 / 25),
    ],
)
def test_drift_is_one_minus_the_cosine(unread: list[float], read: list[float], expected: float) -> None:
    for other in (NONE, [1.0, 0.0]):  # of a side that only one of them has, or in which they agree
        assert drift([unread, other], [read, NONE]) == pytest.approx(expected, abs=1e-12)
        assert drift([other, unread], [other, read]) == pytest.approx(expected, abs=1e-12)


def test_likes_and_dislikes_of_one_kind_do_not_cancel() -> None:
    mixed = sums([1, 1, 1, 1], [5, 1, 4, 2], [2, 2])
    assert drifts(mixed[:1], mixed[1:]).tolist() == [0]


def test_who_comes_to_dislike_what_they_liked_has_drifted() -> None:
    liked, disliked = sums([1, 1], [5, 1], [1, 1])
    assert drift(disliked.tolist(), liked.tolist()) == 1.0


def test_what_cannot_be_compared_counts_as_new() -> None:
    assert drift([[1, 0], NONE], [NONE, NONE]) == 1.0
    assert drift([NONE, NONE], [[1, 0], [1, 0]]) == 1.0
    assert drifts(np.zeros((1, 2, 0), np.float32), np.zeros((1, 2, 0), np.float32)).tolist() == [1]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=8, max_size=8))
def test_drift_is_always_a_number_between_0_and_2(values: list[float]) -> None:
    rows = np.array(values, np.float32).reshape(2, 1, 2, 2)
    assert 0 <= drifts(rows[0], rows[1])[0] <= 2


def test_priority_is_drift_times_activity() -> None:
    ranked = priorities(np.array([0.5, 1.0, 0.0]), np.array([7, 0, 9]))
    assert ranked == pytest.approx([0.5 * np.log(8), 0.0, 0.0])
