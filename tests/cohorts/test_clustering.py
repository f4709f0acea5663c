"""Cohort sizes, names that outlive a run, and the nearest centroid against brute force, on one level and on two."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.cohorts import clustering
from owlrec.cohorts.clustering import (
    ClusterConfig,
    Codebook,
    Sizes,
    fold_small,
    name_centroids,
    nearest_rows,
    train_cells,
    train_centroids,
    unit,
)
from owlrec.errors import SchemaError

CONFIG = ClusterConfig(mean_size=20)  # 2 to 50 members
SMALLEST, LARGEST = 2, 50


def blobs(n: int, centers: int, spread: float = 0.1, seed: int = 0, d: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = unit(np.random.default_rng(99).normal(size=(centers, d)))
    return unit(middle[rng.integers(centers, size=n)] + spread * rng.normal(size=(n, d)))


def train(
    vectors: np.ndarray, config: ClusterConfig = CONFIG, previous: Codebook | None = None, wanted: Sizes | None = None
) -> Codebook:
    """Both levels in this process, of a population that is its own sample."""
    wanted = wanted or config.sizes(len(vectors))
    cells = train_cells(vectors, wanted, previous)
    cell = nearest_rows(cells, vectors)
    earlier = nearest_rows(cells, previous.centroids) if previous is not None else None
    centroids = [
        train_centroids(
            vectors[cell == c],
            round((cell == c).sum() * wanted.cohorts / len(vectors)),
            1.0,
            wanted,
            previous.centroids[earlier == c] if previous is not None else None,
        )
        for c in np.unique(cell)
    ]
    return name_centroids(cells, np.concatenate(centroids), previous)


def sizes(book: Codebook, vectors: np.ndarray) -> np.ndarray:
    return np.bincount(book.assign(vectors)[0], minlength=len(book.numbers))


@pytest.mark.parametrize(
    ("population", "cohorts", "smallest", "largest", "cells"),
    [
        (943, 24, 5, 100, 1),  # MovieLens-100K: 40 each
        (10**4, 250, 5, 100, 1),
        (10**7, 25_000, 50, 1000, 98),  # a thousand times 10^4: ten times the size
        (10**8, 116_009, 108, 2155, 454),
    ],
)
def test_cohorts_grow_with_the_cube_root_of_the_population(
    population: int, cohorts: int, smallest: int, largest: int, cells: int
) -> None:
    bounds = ClusterConfig().sizes(population)
    assert bounds[:3] == (cohorts, smallest, largest)
    assert bounds.cells == cells
    assert bounds.sample == min(population, cohorts * max(64, min(256, 2**22 // cohorts)))


def test_both_levels_are_bounded_whatever_is_asked_for() -> None:
    bounds = ClusterConfig(mean_size=2).sizes(10**9)
    assert bounds.cohorts <= 2**20
    assert bounds.cells <= 4096


@settings(max_examples=20)
@given(st.integers(1, 400), st.integers(1, 12), st.integers(0, 3))
def test_no_cohort_of_the_sample_is_too_small(n: int, centers: int, seed: int) -> None:
    vectors = blobs(n, centers, seed=seed)
    bounds = sizes(train(vectors), vectors)
    assert bounds.sum() == n
    assert bounds.min() >= min(SMALLEST, n)


def test_a_crowd_is_split_and_sizes_hold() -> None:
    vectors = np.concatenate([blobs(300, 1), blobs(100, 9, seed=1)])
    bounds = sizes(train(vectors), vectors)
    assert (bounds >= SMALLEST).all()
    assert np.mean(bounds <= LARGEST) > 0.9  # folding what is too small may fill another


def test_nearest_is_what_brute_force_finds() -> None:
    vectors = blobs(500, 5)
    book = train(vectors)
    nearest, distance = book.assign(vectors)
    cosine = vectors @ book.centroids.T
    np.testing.assert_array_equal(nearest, cosine.argmax(axis=1))
    np.testing.assert_allclose(distance, 1 - cosine.max(axis=1), atol=1e-5)


def test_two_levels_find_nearly_what_brute_force_finds() -> None:
    vectors = blobs(6_000, 300, d=16)
    book = train(vectors, wanted=Sizes(1500, 1, 100, 6_000))
    assert book.cells is not None
    assert len(book.cells) == 6  # 1,500 cohorts, 256 in one cell
    assert 1300 < len(book.numbers) < 1700
    nearest, distance = book.assign(vectors)
    cosine = vectors @ book.centroids.T
    assert np.mean(nearest == cosine.argmax(axis=1)) > 0.95
    np.testing.assert_allclose(distance, 1 - cosine[np.arange(6_000), nearest], atol=1e-5)
    again = name_centroids(book.cells, book.centroids, book)
    np.testing.assert_array_equal(again.numbers, book.numbers)


def test_a_vector_whose_cells_are_empty_is_compared_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_PROBES", 1)
    cells = np.eye(3, dtype=np.float32)
    book = Codebook(cells[:2], np.array([0, 1]), 2, cells)  # none in the third cell
    nearest, distance = book.assign(unit(np.array([[0.1, 0.3, 1.0], [1.0, 0.0, 0.0]])))
    assert nearest.tolist() == [1, 0]
    np.testing.assert_allclose(distance, [1 - 0.3 / np.sqrt(1.1), 0], atol=1e-6)


def test_identical_members_make_one_cohort() -> None:
    vectors = np.repeat(blobs(1, 1), 200, axis=0)
    book = train(vectors)
    assert len(book.numbers) == 1
    assert book.assign(vectors)[1].max() < 1e-5


def test_nobody_with_a_vector_is_refused() -> None:
    with pytest.raises(SchemaError, match="vector to cluster"):
        train(np.zeros((0, 8), np.float32))


def test_cohorts_keep_their_names_and_new_ones_get_new() -> None:
    vectors = blobs(400, 20, spread=0.02)
    first = train(vectors)
    again = train(unit(vectors + 0.01), previous=first)
    before = first.numbers[first.assign(vectors)[0]]
    after = again.numbers[again.assign(unit(vectors + 0.01))[0]]
    assert np.mean(before == after) > 0.9
    assert set(again.numbers[again.numbers >= first.next_number]).isdisjoint(first.numbers)
    assert len(set(again.numbers)) == len(again.numbers)


def test_a_cohort_elsewhere_takes_no_old_name() -> None:
    first = train(blobs(100, 3, spread=0.02))
    moved = train(-blobs(100, 3, spread=0.02), previous=first)
    assert set(moved.numbers).isdisjoint(first.numbers)
    assert moved.numbers.min() >= first.next_number


def test_small_cohorts_are_dissolved_into_their_neighbors() -> None:
    vectors = np.concatenate([blobs(50, 1), -blobs(2, 1)])
    folded = fold_small(np.stack([vectors[0], vectors[-1]]), vectors, 5)
    np.testing.assert_array_equal(folded, vectors[:1])
