"""Cohort sizes, names that outlive a run, and the nearest centroid against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from owlrec.cohorts.clustering import ClusterConfig, Codebook, fold_small, train_codebook
from owlrec.cohorts.collaborative import unit
from owlrec.cohorts.model import cut_rings
from owlrec.errors import SchemaError

CONFIG = ClusterConfig(mean_size=20, min_size=5, max_size=40)


def blobs(n: int, centres: int, spread: float = 0.1, seed: int = 0, d: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = unit(np.random.default_rng(99).normal(size=(centres, d)))
    return unit(middle[rng.integers(centres, size=n)] + spread * rng.normal(size=(n, d)))


def sizes(book: Codebook, vectors: np.ndarray) -> np.ndarray:
    return np.bincount(book.assign(vectors)[0], minlength=len(book.numbers))


@settings(max_examples=20)
@given(st.integers(1, 400), st.integers(1, 12), st.integers(0, 3))
def test_no_cohort_of_the_sample_is_too_small(n: int, centres: int, seed: int) -> None:
    vectors = blobs(n, centres, seed=seed)
    book = train_codebook(vectors, CONFIG, n)
    found = sizes(book, vectors)
    assert found.sum() == n
    assert found.min() >= min(CONFIG.min_size, n)


def test_a_crowd_is_split_and_sizes_hold() -> None:
    vectors = np.concatenate([blobs(300, 1), blobs(100, 9, seed=1)])
    found = sizes(train_codebook(vectors, CONFIG, len(vectors)), vectors)
    assert (found >= CONFIG.min_size).all()
    assert np.mean(found <= CONFIG.max_size) > 0.9  # what is left over is cut into rings


def test_nearest_is_what_brute_force_finds() -> None:
    vectors, book = blobs(500, 5), train_codebook(blobs(500, 5), CONFIG, 500)
    nearest, distance = book.assign(vectors)
    cosine = vectors @ book.centroids.T
    np.testing.assert_array_equal(nearest, cosine.argmax(axis=1))
    np.testing.assert_allclose(distance, 1 - cosine.max(axis=1), atol=1e-5)


def test_identical_members_make_one_cohort() -> None:
    vectors = np.repeat(blobs(1, 1), 200, axis=0)
    book = train_codebook(vectors, CONFIG, 200)
    assert len(book.numbers) == 1
    assert book.assign(vectors)[1].max() < 1e-5


def test_more_cohorts_than_members_is_refused() -> None:
    with pytest.raises(SchemaError, match="k is 30, but only 20"):
        train_codebook(blobs(20, 3), CONFIG.model_copy(update={"k": 30}), 20)


def test_nobody_with_a_vector_is_refused() -> None:
    with pytest.raises(SchemaError, match="nobody has a vector"):
        train_codebook(np.zeros((0, 8), np.float32), CONFIG, 0)


def test_bounds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="contradict"):
        ClusterConfig(min_size=50, mean_size=40, max_size=100)


def test_cohorts_keep_their_names_and_new_ones_get_new() -> None:
    vectors = blobs(400, 20, spread=0.02)
    first = train_codebook(vectors, CONFIG, 400)
    again = train_codebook(unit(vectors + 0.01), CONFIG, 400, previous=first)
    before = first.numbers[first.assign(vectors)[0]]
    after = again.numbers[again.assign(unit(vectors + 0.01))[0]]
    assert np.mean(before == after) > 0.9
    assert set(again.numbers[again.numbers >= first.next_number]).isdisjoint(first.numbers)
    assert len(set(again.numbers)) == len(again.numbers)


def test_a_cohort_elsewhere_takes_no_old_name() -> None:
    first = train_codebook(blobs(100, 3, spread=0.02), CONFIG, 100)
    moved = train_codebook(-blobs(100, 3, spread=0.02), CONFIG, 100, previous=first)
    assert set(moved.numbers).isdisjoint(first.numbers)
    assert moved.numbers.min() >= first.next_number


def test_small_cohorts_are_dissolved_into_their_neighbours() -> None:
    vectors = np.concatenate([blobs(50, 1), -blobs(2, 1)])
    book = Codebook(np.stack([vectors[0], vectors[-1]]), np.array([3, 4]), 5)
    folded = fold_small(book, vectors, 5)
    assert folded.numbers.tolist() == [3]
    assert folded.next_number == 5


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2]), st.integers(0, 10**6)), min_size=1, unique_by=lambda x: x[1])
)
def test_rings_hold_every_member_and_none_is_too_large(members: list[tuple[float, int]]) -> None:
    distance = np.array([d for d, _ in members], np.float32)
    ids = np.array([i for _, i in members], np.int64)
    ring = cut_rings(distance, ids, 7).of(distance, ids)
    found = np.bincount(ring)
    assert found.sum() == len(members)
    assert found.max() <= 7
    assert len(found) == -(-len(members) // 7)
    assert all(distance[ring == a].max() <= distance[ring == a + 1].min() for a in range(len(found) - 1))
