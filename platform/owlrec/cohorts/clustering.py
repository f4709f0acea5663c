"""Spherical k-means on two levels (faiss), with bounds on cohort sizes and names that persist across runs.

The first level splits a sample into at most 4,096 cells, the second runs a separate k-means in each cell. So neither
training nor search grows with the number of cohorts: finding one of 10^6 takes about as many products as one of
5,000. Up to 1,024 cohorts there is one cell, and the search is exact. A cohort above the maximum size is
split by a k-means of its own members, unless they are alike. One below the minimum is dissolved, and its members move
to their next best. A new run starts from the earlier centroids, and a cohort keeps its name if its centroid has moved
little, because texts depend on names.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from owlrec.config import Config
from owlrec.errors import SchemaError
from owlrec.ids import rows_of
from owlrec.storage import FileEntry
from owlrec.workspace import Workspace

# -------------------------------------------------------------------------------------------------------- collaborative
# Collaborative vectors: ALS item factors, and user vectors that best explain each user's items.
#
# Alternating least squares for implicit feedback (Hu, Koren and Volinsky, ICDM 2008, from the library `implicit`)
# learns item factors from a sample of users. A user's vector is then one least-squares solution given those factors:
# 10^8 users are folded in shard by shard, and a new user needs no training. A user's likes and dislikes give two
# vectors in the same space. Later training starts from the earlier factors, which keeps the axes, so vectors and
# centroids of two runs are comparable.


@dataclass(frozen=True)
class FactorSettings:
    """Settings of item factors and of the minimum behaviors for a vector. No recipe sets these."""

    factors: int = 64  # `implicit` advises 50 to 100; memory of the shuffles grows with it
    regularization: float = 0.05
    iterations: int = 15
    alpha: float = 10.0  # the confidence of a behavior is 1 + alpha, of its absence 1
    train_users: int = 1_000_000  # a sample this large fixes the factors of 10^5 items well
    min_behaviors: int = 3  # with fewer liked, known items, attributes decide
    min_item_users: int = 3  # items with fewer users get no factors
    seed: int = 0


@dataclass(frozen=True)
class ItemFactors:
    """Vectors of the items with enough users. Workers of a node map one copy."""

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float32 [n, d]

    @cached_property
    def gram(self) -> np.ndarray:
        """The vectors' inner products, summed over all items: float32 [d, d]."""
        return self.vectors.T @ self.vectors

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [m, d], bool [m]): each id's vector, or zeros and False if it has none."""
        rows = rows_of(self.ids, ids)
        return np.where((rows >= 0)[:, None], self.vectors[rows], np.float32(0)), rows >= 0

    def save(self, workspace: Workspace, path: str) -> FileEntry:
        """Writes an Arrow file that `load` maps."""
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(self.vectors.reshape(-1)), self.vectors.shape[1])
        table = pa.table({"id": pa.array(self.ids, pa.int64()), "vector": vectors})
        return workspace.write_arrow(path, table, table.schema)

    @classmethod
    def load(cls, workspace: Workspace, path: str) -> Self:
        """Maps the file of `save`. Raises WorkspaceError if it is missing."""
        table = workspace.map_arrow(path)
        vectors = table["vector"].combine_chunks()
        return cls(table["id"].to_numpy(), vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size))


def train_item_factors(
    histories: pa.Table, settings: FactorSettings, previous: ItemFactors | None = None
) -> ItemFactors:
    """ALS over histories (schema.HISTORIES), ignoring ratings: it models which items users chose.

    previous: factors of an earlier run, used as starting values.
    Raises SchemaError if no item has enough users.
    """
    from implicit.cpu.als import AlternatingLeastSquares  # here, since the recipe imports this module's Config

    items = histories["items"].combine_chunks()
    ids, column = np.unique(items.flatten().to_numpy(), return_inverse=True)
    matrix = _confidences(items, column, len(ids), settings)
    frequent = np.bincount(matrix.indices, minlength=len(ids)) >= settings.min_item_users
    if not frequent.any():
        raise SchemaError(
            f"histories: none of {len(ids)} items was chosen by at least {settings.min_item_users} users, so "
            "similarities cannot be computed. Use more users or longer histories."
        )
    ids, matrix = ids[frequent], matrix[:, np.flatnonzero(frequent)]
    model = _quietly(
        AlternatingLeastSquares,
        factors=settings.factors,
        regularization=settings.regularization,
        iterations=settings.iterations,
        random_state=settings.seed,
    )
    if previous is not None and previous.vectors.shape[1] == settings.factors:
        vectors, known = previous.gather(ids)
        fresh = np.random.RandomState(settings.seed).rand(len(ids), settings.factors).astype(np.float32) * 0.01
        model.item_factors = np.where(known[:, None], vectors, fresh)
    model.fit(matrix, show_progress=False)
    return ItemFactors(ids, np.asarray(model.item_factors, dtype=np.float32))


def fold_in(
    factors: ItemFactors, settings: FactorSettings, items: pa.ListArray, chosen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of users who chose `items`: the user half of an ALS step.

    items: list<int64> [n]. chosen: bool, aligned with the flattened items: marks the ones to count; None = all.
    Returns float32 [n, d] of length 1 and bool [n]: False, and zeros, for fewer known items than min_behaviors.
    """
    from implicit.cpu.als import AlternatingLeastSquares

    rows = rows_of(factors.ids, items.flatten().to_numpy())
    used, column = np.unique(rows, return_inverse=True)  # -1, if present, is first: an item without a vector
    if not len(used):
        return np.zeros((len(items), factors.vectors.shape[1]), np.float32), np.zeros(len(items), bool)
    matrix = _confidences(items, column, len(used), settings, rows >= 0 if chosen is None else (rows >= 0) & chosen)
    model = _quietly(AlternatingLeastSquares, factors=factors.vectors.shape[1], regularization=settings.regularization)
    # Only these items' factors are copied (the solver refuses read-only memory); YtY covers all.
    model.item_factors, model._YtY, model.num_threads = factors.vectors[used], factors.gram, 1
    vectors = model.recalculate_user(np.arange(len(items)), matrix)
    known = np.diff(matrix.indptr) >= settings.min_behaviors
    return np.where(known[:, None], unit(vectors), np.float32(0)), known


def items_and_likes(histories: pa.Table, positive_above: float) -> tuple[pa.ListArray, np.ndarray]:
    """Each user's items, list<int64> [n], and whether each was liked: bool, aligned with all items.

    Liked means taken and, if graded, rated above `positive_above`.
    """
    items, passed = (histories[column].combine_chunks() for column in ("items", "passed"))
    values = histories["ratings"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    liked = np.isnan(values) | (values > positive_above)
    lengths = [column.value_lengths().fill_null(0).to_numpy() for column in (items, passed)]
    user = np.concatenate([np.repeat(np.arange(len(n)), n) for n in lengths])
    flat = np.concatenate([items.flatten().to_numpy(), passed.flatten().to_numpy()])
    order = np.argsort(user, kind="stable")
    mask = np.concatenate([liked, np.zeros(len(flat) - len(liked), dtype=bool)])
    offsets = np.r_[0, np.cumsum(lengths[0] + lengths[1])].astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat[order], pa.int64())), mask[order]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors scaled to length 1; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def _confidences(
    items: pa.ListArray,
    column: np.ndarray,
    n_columns: int,
    settings: FactorSettings,
    chosen: np.ndarray | None = None,
) -> Any:
    """Sparse user-item matrix; repeated choices count once. column: of each flat item."""
    from scipy.sparse import csr_matrix

    user_rows = np.repeat(np.arange(len(items), dtype=np.int32), items.value_lengths().fill_null(0).to_numpy())
    if chosen is not None:
        user_rows, column = user_rows[chosen], column[chosen]
    ones = np.ones(len(column), dtype=np.float32)
    matrix = csr_matrix((ones, (user_rows, column.astype(np.int32))), shape=(len(items), n_columns))
    matrix.data[:] = 1 + settings.alpha
    return matrix


def _quietly(model: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        # implicit asks for one BLAS thread in its constructor; its native solvers, used here, call none.
        warnings.simplefilter("ignore", RuntimeWarning)
        return model(**settings)


# ----------------------------------------------------------------------------------------------------------- clustering


_REKI_SIZE = 40  # REKI's groups of MovieLens-1M (6,040 users) have 35 to 45 members
_REKI_USERS = 10_000
_ONE_CELL, _PER_CELL, _MOST_PER_CELL, _MOST_CELLS = 1024, 256, 1024, 4096  # cohorts, and cells
_PROBES = 4  # cells searched per vector
CELL_SAMPLE = 1 << 18  # training vectors per k-means: 64 MB at 64 dimensions
_SAMPLE = 1 << 22  # vectors of all cohorts together, but 64 to 256 per cohort
ITERATIONS = 20  # of k-means: faiss stops at 25, and the last few move hardly any vector
_SPLITS = 8  # rounds; each at least halves too large cohorts, unless their members are alike
_SAME_COSINE = 0.7  # to the earlier centroid, for a cohort to be the same one


class Sizes(NamedTuple):
    """Number of cohorts, bounds on their members, and size of the training sample."""

    cohorts: int
    smallest: int
    largest: int
    sample: int  # vectors

    @property
    def cells(self) -> int:
        """Cells of the first level; 1 if the second level needs no first."""
        return 1 if self.cohorts <= _ONE_CELL else -(-self.cohorts // _PER_CELL)


class ClusterConfig(Config):
    """Sizes of cohorts: the smallest have an eighth of the mean size, the largest two and a half times it."""

    # None: 40 up to 10^4 members, then growing with the cube root of the population. k-means' error falls only by
    # k^(-2/d), while each cohort costs an LLM call: 10^8 users make 116,000 cohorts of 862, where 40 would need
    # 2.5 million.
    mean_size: int | None = Field(None, ge=2)

    def sizes(self, population: int) -> Sizes:
        """Sizes for a given number of members with a vector."""
        mean = self.mean_size or round(_REKI_SIZE * max(1.0, population / _REKI_USERS) ** (1 / 3))
        mean = max(mean, -(-population // (_MOST_CELLS * _PER_CELL)))
        cohorts = max(1, round(population / mean))
        sample = min(population, cohorts * min(256, max(64, _SAMPLE // cohorts)))
        return Sizes(cohorts, max(2, round(mean / 8)), mean * 5 // 2, sample)


@dataclass(frozen=True)
class Codebook:
    """Centroids and their permanent numbers. A number is never reused."""

    centroids: np.ndarray  # float32 [k, d], of length 1
    numbers: np.ndarray  # int64 [k]
    next_number: int
    cells: np.ndarray | None = None  # float32 [c, d], first level; None = one cell

    @cached_property
    def _indexes(self) -> list[tuple[np.ndarray, Any]]:
        """Per cell, the rows of its centroids and a faiss index over them; built once per process."""
        if self.cells is None:
            return [(np.arange(len(self.centroids)), _flat(self.centroids))]
        cell = nearest_rows(self.cells, self.centroids)
        order = np.argsort(cell, kind="stable")
        rows_by_cell = np.split(order, np.searchsorted(cell[order], np.arange(1, len(self.cells))))
        return [(rows, _flat(self.centroids[rows])) for rows in rows_by_cell]

    def search(self, vectors: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The `n` nearest centroids of each vector, from the cells nearest to it.

        vectors: float32 [m, d], of length 1. Returns cosines, float32 [m, n], and rows, int64 [m, n]; -inf and -1 if
        these cells have fewer centroids. All vectors of a cell are compared at once: such matrix products take a third
        of the time of faiss's own inverted lists, which compare vector by vector (5,376 cohorts, one core).
        """
        if self.cells is None:
            cosines, rows = self._indexes[0][1].search(vectors, n)
            return cosines, rows
        probes = min(_PROBES, len(self.cells))
        cell = _flat(self.cells).search(vectors, probes)[1].ravel()
        order = np.argsort(cell, kind="stable")
        bounds = np.searchsorted(cell[order], np.arange(len(self.cells) + 1))
        cosines = np.full((len(cell), n), -np.inf, dtype=np.float32)
        rows = np.full((len(cell), n), -1, dtype=np.int64)
        for (cell_rows, index), start, stop in zip(self._indexes, bounds[:-1], bounds[1:], strict=True):
            k, slots = min(n, len(cell_rows)), order[start:stop]
            if k and len(slots):
                cosines[slots, :k], nearest = index.search(vectors[slots // probes], k)
                rows[slots, :k] = cell_rows[nearest]
        cosines, rows = cosines.reshape(len(vectors), -1), rows.reshape(len(vectors), -1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :n]
        return np.take_along_axis(cosines, best, axis=1), np.take_along_axis(rows, best, axis=1)

    def assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centroid of each vector.

        vectors: float [n, d], of length 1. Returns rows, int64 [n], and 1 - cosine, float32 [n].
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        cosine, nearest = self.search(vectors, 1)
        if len(lost := np.flatnonzero(nearest[:, 0] < 0)):  # all searched cells are empty
            cosine[lost], nearest[lost] = _flat(self.centroids).search(vectors[lost], 1)
        return nearest[:, 0], np.clip(1 - cosine[:, 0], 0, 2)


def train_cells(vectors: np.ndarray, sizes: Sizes, previous: Codebook | None = None, *, seed: int = 0) -> np.ndarray:
    """First level: float32 [c, d]. vectors: float32 [n, d], of length 1; only the first 2^18 are used.

    Raises SchemaError if there are no vectors.
    """
    if len(vectors) == 0:
        raise SchemaError(
            "cohorts: no user has a vector to cluster. Use more data: users need several items in common."
        )
    earlier = previous.cells if previous is not None else None
    return _kmeans(vectors[:CELL_SAMPLE], min(sizes.cells, _distinct(vectors)), earlier, seed)


def train_centroids(
    vectors: np.ndarray,
    k: int,
    share: float,
    sizes: Sizes,
    earlier: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Second level within one cell: float32 [about k, d], at most 1,024 before splitting.

    vectors: float32 [n, d], of length 1: the cell's part of the sample, a `share` of the population. earlier:
    centroids of an earlier run in this cell. Sizes apply to the sample, in proportion: rows beyond it may exceed
    them.
    """
    smallest, largest = max(1, round(sizes.smallest * share)), max(1, int(sizes.largest * share))
    vectors = vectors[:CELL_SAMPLE]
    centroids = _kmeans(vectors, min(max(1, k), _MOST_PER_CELL, _distinct(vectors)), earlier, seed)
    for _ in range(_SPLITS):
        nearest = nearest_rows(centroids, vectors)
        members = np.bincount(nearest, minlength=len(centroids))
        over = np.flatnonzero(members > largest)
        split = [_split(vectors[nearest == c], -(-int(members[c]) // largest), seed) for c in over]
        if not any(len(pieces) > 1 for pieces in split):
            break
        centroids = np.concatenate([np.delete(centroids, over, axis=0), *split])
    return fold_small(centroids, vectors, smallest)


def fold_small(centroids: np.ndarray, vectors: np.ndarray, smallest: int) -> np.ndarray:
    """Removes centroids with fewer than `smallest` nearest vectors, smallest first, since the vectors of one
    may fill up another. At least one stays."""
    while len(centroids) > 1:
        members = np.bincount(nearest_rows(centroids, vectors), minlength=len(centroids))
        small = np.flatnonzero(members < smallest)
        if not len(small):
            break
        order = small[np.argsort(members[small], kind="stable")]
        centroids = np.delete(centroids, order[: min(max(1, len(order) // 2), len(centroids) - 1)], axis=0)
    return centroids


def name_centroids(cells: np.ndarray, centroids: np.ndarray, previous: Codebook | None) -> Codebook:
    """Codebook of both levels: a centroid takes the number of a close enough earlier one, best pairs first,
    or else a new number."""
    numbers = np.full(len(centroids), -1, dtype=np.int64)
    following = 0
    if previous is not None:
        following = previous.next_number
        for row, number in _pairs(centroids, previous):
            numbers[row] = number
    new = numbers < 0
    numbers[new] = following + np.arange(new.sum())
    return Codebook(centroids, numbers, following + int(new.sum()), cells if len(cells) > 1 else None)


def nearest_rows(centroids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Row of the nearest centroid of each vector, int64 [n], by comparison with all."""
    nearest: np.ndarray = _flat(centroids).search(vectors, 1)[1][:, 0]
    return nearest


def _pairs(centroids: np.ndarray, previous: Codebook) -> Iterator[tuple[int, int]]:
    cosine, earlier = previous.search(centroids, min(8, len(previous.numbers)))
    rows, columns = np.nonzero(cosine >= _SAME_COSINE)
    order = np.argsort(-cosine[rows, columns], kind="stable")
    taken_rows, taken = set(), set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        number = int(previous.numbers[earlier[row, column]])
        if row not in taken_rows and number not in taken:
            taken_rows.add(row)
            taken.add(number)
            yield row, number


def _split(members: np.ndarray, pieces: int, seed: int) -> np.ndarray:
    return _kmeans(members, min(pieces, _distinct(members)), None, seed)


def _kmeans(vectors: np.ndarray, k: int, earlier: np.ndarray | None, seed: int) -> np.ndarray:
    import faiss

    if k == 1:
        mean = vectors.mean(axis=0, keepdims=True)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), dtype=np.float32)
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        k,
        niter=ITERATIONS,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
    )
    start = None
    if earlier is not None:  # filled up with random vectors
        drawn = np.random.default_rng(seed).choice(len(vectors), size=k, replace=False)
        start = np.concatenate([earlier, vectors[drawn]])[:k]
    kmeans.train(vectors, init_centroids=start)
    return np.asarray(kmeans.centroids, dtype=np.float32)


def _flat(vectors: np.ndarray) -> Any:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return index


def _distinct(vectors: np.ndarray) -> int:
    """Number of distinct vectors, since k-means needs at least one per centroid. Compares 64-bit sums of their bits."""
    bits = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32)
    odd = np.random.default_rng(0).integers(1 << 62, size=(bits.shape[1],), dtype=np.uint64) * 2 + 1
    digest = np.zeros(len(bits), dtype=np.uint64)
    for column in range(bits.shape[1]):
        digest += bits[:, column] * odd[column]
    return len(np.unique(digest))
