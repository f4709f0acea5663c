"""Spherical k-means in faiss, with bounds on how large and how small a cohort may be, and names that outlive a run.

Trained on a sample; assigning is one matrix product. A cohort that would exceed the largest size is split by a k-means
of its own members; one below the smallest is dissolved and its members go to their next best. A new run starts from the
earlier centroids, and a cohort keeps its name where its centroid has moved little: texts and retrieval pools hang on
names.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from owlrec.config import Config
from owlrec.errors import SchemaError

_ROWS_AT_ONCE = 1 << 14  # of an assignment: the product with 1,000 centroids then takes 64 MB
_SPLITS = 8  # rounds; each at least halves what is too large, unless its members are alike
_SAME_COSINE = 0.7  # to the earlier centroid, for a cohort to be the same one


class ClusterConfig(Config):
    """How many cohorts, and how large."""

    k: int | None = Field(None, ge=1)  # None = as many as mean_size asks for
    mean_size: int = Field(40, ge=1)  # REKI's groups of MovieLens-1M hold 35 to 45 members
    min_size: int = Field(5, ge=1)
    max_size: int = Field(100, ge=2)
    iterations: int = Field(20, ge=1)
    sample_per_cohort: int = Field(256, ge=1)  # vectors that k-means is trained on: what faiss advises
    seed: int = 0

    @model_validator(mode="after")
    def _bounds(self) -> "ClusterConfig":
        if not self.min_size <= self.mean_size <= self.max_size or 2 * self.min_size > self.max_size:
            raise ValueError(
                f"min_size {self.min_size}, mean_size {self.mean_size} and max_size {self.max_size} contradict each "
                "other: they must rise in this order, and two cohorts of min_size fit into one of max_size"
            )
        return self

    def cohorts(self, population: int) -> int:
        """How many to look for among so many members. Raises SchemaError where k exceeds them."""
        if self.k is not None and self.k > population:
            raise SchemaError(
                f"cohorts: k is {self.k}, but only {population} have a vector to cluster by. Lower k, or leave it out."
            )
        return self.k or max(1, round(population / self.mean_size))


@dataclass(frozen=True)
class Codebook:
    """Centroids and the numbers that name them. No number is ever used again."""

    centroids: np.ndarray  # float32 [k, d], of length 1
    numbers: np.ndarray  # int64 [k]
    next_number: int

    def assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centroid of each vector.

        vectors: float [n, d], of length 1. Returns its row, int32 [n], and 1 - cosine, float32 [n].
        """
        import faiss

        index = faiss.IndexFlatIP(self.centroids.shape[1])
        index.add(self.centroids)
        nearest = np.empty(len(vectors), dtype=np.int32)
        distance = np.empty(len(vectors), dtype=np.float32)
        for rows in _slices(len(vectors)):
            similarity, found = index.search(np.ascontiguousarray(vectors[rows], dtype=np.float32), 1)
            nearest[rows], distance[rows] = found[:, 0], np.clip(1 - similarity[:, 0], 0, 2)
        return nearest, distance

    def without(self, rows: np.ndarray) -> "Codebook":
        """The codebook without some centroids; at least one stays."""
        keep = np.setdiff1d(np.arange(len(self.numbers)), rows)
        keep = keep if len(keep) else np.arange(1)
        return Codebook(self.centroids[keep], self.numbers[keep], self.next_number)


def train_codebook(
    vectors: np.ndarray, config: ClusterConfig, population: int, previous: Codebook | None = None
) -> Codebook:
    """Cohorts of a population, from a sample of its vectors.

    vectors: float32 [n, d], of length 1; population: how many there are beyond the sample, at least n. previous: an
    earlier run's, in the same space. Sizes hold for the sample, in proportion: what is beyond it may exceed them.
    Raises SchemaError where there is no vector, or k exceeds the population.
    """
    if len(vectors) == 0:
        raise SchemaError("cohorts: nobody has a vector to cluster by. Use more data, or lower min_behaviours.")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if previous is not None and previous.centroids.shape[1] != vectors.shape[1]:
        previous = None  # of other factors: nothing of it can be compared
    k = min(config.cohorts(population), len(np.unique(vectors, axis=0)))
    share = len(vectors) / population
    largest = max(1, int(config.max_size * share))
    centroids = _kmeans(vectors, k, config, previous)
    for _ in range(_SPLITS):
        nearest, _ = Codebook(centroids, np.arange(len(centroids)), 0).assign(vectors)
        sizes = np.bincount(nearest, minlength=len(centroids))
        over = np.flatnonzero(sizes > largest)
        split = [_split(vectors[nearest == c], -(-int(sizes[c]) // largest), config) for c in over]
        if not any(len(parts) > 1 for parts in split):
            break
        centroids = np.concatenate([np.delete(centroids, over, axis=0), *split])
    codebook = _named(centroids, previous)
    return fold_small(codebook, vectors, max(1, round(config.min_size * share)))


def fold_small(codebook: Codebook, vectors: np.ndarray, smallest: int) -> Codebook:
    """The codebook without the centroids that fewer than `smallest` of the vectors are nearest to, smallest first: what
    one frees may fill up another."""
    while len(codebook.numbers) > 1:
        sizes = np.bincount(codebook.assign(vectors)[0], minlength=len(codebook.numbers))
        small = np.flatnonzero(sizes < smallest)
        if not len(small):
            break
        order = small[np.argsort(sizes[small], kind="stable")]
        codebook = codebook.without(order[: max(1, len(order) // 2)])
    return codebook


def _split(members: np.ndarray, parts: int, config: ClusterConfig) -> np.ndarray:
    return _kmeans(members, min(parts, len(np.unique(members, axis=0))), config, None)


def _kmeans(vectors: np.ndarray, k: int, config: ClusterConfig, previous: Codebook | None) -> np.ndarray:
    import faiss

    if k == 1:
        mean = vectors.mean(axis=0, keepdims=True)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), dtype=np.float32)
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        k,
        niter=config.iterations,
        spherical=True,
        seed=config.seed,
        min_points_per_centroid=1,
        max_points_per_centroid=config.sample_per_cohort,
        gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
    )
    kmeans.train(vectors, init_centroids=_start(vectors, k, config, previous))
    return np.asarray(kmeans.centroids, dtype=np.float32)


def _start(vectors: np.ndarray, k: int, config: ClusterConfig, previous: Codebook | None) -> np.ndarray | None:
    """The earlier centroids, filled up with vectors drawn at random."""
    if previous is None:
        return None
    drawn = np.random.default_rng(config.seed).choice(len(vectors), size=k, replace=False)
    return np.concatenate([previous.centroids, vectors[drawn]])[:k]


def _named(centroids: np.ndarray, previous: Codebook | None) -> Codebook:
    """Numbers for centroids: that of the earlier one where they are near enough, the best pairs first."""
    numbers = np.full(len(centroids), -1, dtype=np.int64)
    following = 0
    if previous is not None:
        following = previous.next_number
        for row, number in _pairs(centroids, previous):
            numbers[row] = number
    new = numbers < 0
    numbers[new] = following + np.arange(new.sum())
    return Codebook(centroids, numbers, following + int(new.sum()))


def _pairs(centroids: np.ndarray, previous: Codebook) -> Iterator[tuple[int, int]]:
    import faiss

    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(previous.centroids)
    cosine, found = index.search(centroids, min(8, len(previous.numbers)))
    order = np.argsort(-cosine, axis=None, kind="stable")
    rows, columns = np.unravel_index(order, cosine.shape)
    taken_rows, taken = set(), set()
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        number = int(previous.numbers[found[row, column]])
        if cosine[row, column] >= _SAME_COSINE and row not in taken_rows and number not in taken:
            taken_rows.add(row)
            taken.add(number)
            yield row, number


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, n, _ROWS_AT_ONCE))
