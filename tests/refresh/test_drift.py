"""Interests and drift by hand and what cannot be compared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from owlrec.refresh.drift import drifts, priorities, sum_vectors

NAN = float("nan")
TABLE = {1: [1.0, 0.0], 2: [0.0, 1.0], 3: [NAN, 0.0]}


def gather(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.array([TABLE.get(i, [0.0, 0.0]) for i in ids.tolist()], dtype=np.float32).reshape(len(ids), 2)
    return rows, np.array([i in TABLE for i in ids.tolist()], dtype=bool)


def test_sums_are_weighted_by_rating_and_skip_what_has_no_vector() -> None:
    items = np.array([1, 2, 9, 3, 2, 1])
    ratings = np.array([3, 5, 4, 4, NAN, -2], dtype=np.float32)
    sums, weights = sum_vectors(items, ratings, np.array([3, 0, 3]), gather)
    # 3 of the first and 5 of the second direction, item 9 unknown; nothing; item 3 broken, no rating is 1, -2 is 0.
    assert sums.tolist() == [[3, 5], [0, 0], [0, 1]]
    assert weights.tolist() == [8, 0, 1]


def test_sums_of_nothing_at_all() -> None:
    sums, weights = sum_vectors(np.zeros(0, np.int64), np.zeros(0, np.float32), np.array([0]), gather)
    assert (sums.shape, weights.tolist()) == ((1, 2), [0.0])


@pytest.mark.parametrize(
    ("unread", "read", "drift"),
    [
        ([1, 0], [5, 0], 0.0),
        ([1, 0], [0, 5], 1.0),
        ([1, 0], [-2, 0], 2.0),
        ([1, 1], [1, 0], 1 - 1 / np.sqrt(2)),
        ([3, 4], [4, 3], 1 - 24 / 25),
    ],
)
def test_drift_is_one_minus_the_cosine(unread: list[float], read: list[float], drift: float) -> None:
    one = np.ones(1)
    found = drifts(np.array([unread], np.float32), one, np.array([read], np.float32), one)
    assert found[0] == pytest.approx(drift, abs=1e-12)


def test_what_cannot_be_compared_counts_as_new() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 0]], np.float32)
    assert drifts(vectors, np.array([0, 1, 1]), vectors, np.array([1, 0, 1])).tolist() == [1, 1, 1]
    assert drifts(np.zeros((1, 0), np.float32), np.zeros(1), np.zeros((1, 0), np.float32), np.zeros(1)).tolist() == [1]


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2), st.lists(st.floats(0, 9), min_size=2, max_size=2)
)
def test_drift_is_always_a_number_between_0_and_2(vector: list[float], weights: tuple[float, float]) -> None:
    rows = np.array([vector], np.float32)
    found = drifts(rows, np.array(weights[:1]), rows, np.array(weights[1:]))
    assert 0 <= found[0] <= 2


def test_priority_is_drift_times_activity() -> None:
    found = priorities(np.array([0.5, 1.0, 0.0]), np.array([7, 0, 9]))
    assert found == pytest.approx([0.5 * np.log(8), 0.0, 0.0])
