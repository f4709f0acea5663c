"""Collaborative vectors: ALS item factors, and every user as what best explains the items they chose.

Alternating least squares for implicit feedback (Hu, Koren and Volinsky, ICDM 2008, by the library `implicit`) learns
item factors from a sample of users. A user's vector is then one least-squares solution given those factors: 10^8 users
are folded in shard by shard, and a new user needs no training. What a user liked and what they disliked give two
vectors in the same space. A later training starts from the earlier factors, which keeps the axes, so that vectors and
centroids of two runs can be compared.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from owlrec.config import Config
from owlrec.errors import SchemaError
from owlrec.ordered import rows_of
from owlrec.storage import FileEntry
from owlrec.workspace import Workspace


class CollaborativeConfig(Config):
    """How item factors are learned, and how many behaviors give a user a vector."""

    factors: int = Field(64, ge=1)
    regularization: float = Field(0.05, gt=0)
    iterations: int = Field(15, ge=1)
    alpha: float = Field(10.0, gt=0)  # a behavior's confidence is 1 + alpha, that of its absence 1
    train_users: int = Field(1_000_000, ge=1)  # a sample this large fixes the factors of 10^5 items well
    min_behaviours: int = Field(3, ge=1)  # a user who liked fewer known items says too little: attributes decide
    min_item_users: int = Field(3, ge=1)  # likewise an item that fewer users chose
    seed: int = 0


@dataclass(frozen=True)
class ItemFactors:
    """Vectors of the items that enough users chose. Workers of a node map one copy of them."""

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float32 [n, d]

    @cached_property
    def gram(self) -> np.ndarray:
        """The vectors' inner products, summed over all items: float32 [d, d]."""
        return self.vectors.T @ self.vectors

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [m, d], bool [m]): the vector of each id, zeros and False where it has none."""
        rows = rows_of(self.ids, ids)
        return np.where((rows >= 0)[:, None], self.vectors[rows], np.float32(0)), rows >= 0

    def save(self, workspace: Workspace, path: str) -> FileEntry:
        """Writes an Arrow file that `load` maps."""
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(self.vectors.reshape(-1)), self.vectors.shape[1])
        table = pa.table({"id": pa.array(self.ids, pa.int64()), "vector": vectors})
        return workspace.write_arrow(path, table, table.schema)

    @classmethod
    def load(cls, workspace: Workspace, path: str) -> Self:
        """Maps what `save` wrote. Raises WorkspaceError where it is missing."""
        table = workspace.map_arrow(path)
        vectors = table["vector"].combine_chunks()
        return cls(table["id"].to_numpy(), vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size))


def train_item_factors(
    histories: pa.Table, config: CollaborativeConfig, previous: ItemFactors | None = None
) -> ItemFactors:
    """ALS over histories (schema.HISTORIES), whatever their ratings: that a user chose an item is what is modeled.

    previous: factors of an earlier run, to start from where an item has some.
    Raises SchemaError where no item was chosen by enough users.
    """
    from implicit.cpu.als import AlternatingLeastSquares  # here, since the recipe imports this module's Config

    items = histories["items"].combine_chunks()
    ids, column = np.unique(items.flatten().to_numpy(), return_inverse=True)
    matrix = _confidences(items, column, len(ids), config)
    frequent = np.bincount(matrix.indices, minlength=len(ids)) >= config.min_item_users
    if not frequent.any():
        raise SchemaError(
            f"histories: none of {len(ids)} items was chosen by {config.min_item_users} users or more, so nothing says "
            "which are alike. Use more users, or lower cohorts.collaborative.min_item_users in the recipe."
        )
    ids, matrix = ids[frequent], matrix[:, np.flatnonzero(frequent)]
    model = _quietly(
        AlternatingLeastSquares,
        factors=config.factors,
        regularization=config.regularization,
        iterations=config.iterations,
        random_state=config.seed,
    )
    if previous is not None and previous.vectors.shape[1] == config.factors:
        vectors, known = previous.gather(ids)
        fresh = np.random.RandomState(config.seed).rand(len(ids), config.factors).astype(np.float32) * 0.01
        model.item_factors = np.where(known[:, None], vectors, fresh)
    model.fit(matrix, show_progress=False)
    return ItemFactors(ids, np.asarray(model.item_factors, dtype=np.float32))


def fold_in(
    factors: ItemFactors, config: CollaborativeConfig, items: pa.ListArray, chosen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of users who chose `items`: the user's half of an ALS step.

    items: list<int64> [n]. chosen: bool, aligned with the flattened items: which of them count; None = all.
    Returns float32 [n, d] of length 1 and bool [n]: False, and zeros, for fewer known items than min_behaviours.
    """
    from implicit.cpu.als import AlternatingLeastSquares

    rows = rows_of(factors.ids, items.flatten().to_numpy())
    used, column = np.unique(rows, return_inverse=True)  # -1, if at all, is the first: an item without a vector
    if not len(used):
        return np.zeros((len(items), factors.vectors.shape[1]), np.float32), np.zeros(len(items), bool)
    matrix = _confidences(items, column, len(used), config, rows >= 0 if chosen is None else (rows >= 0) & chosen)
    model = _quietly(AlternatingLeastSquares, factors=factors.vectors.shape[1], regularization=config.regularization)
    # Of all factors, only those of these items are copied (the solver refuses read-only memory); YtY is of all.
    model.item_factors, model._YtY, model.num_threads = factors.vectors[used], factors.gram, 1
    vectors = model.recalculate_user(np.arange(len(items)), matrix)
    known = np.diff(matrix.indptr) >= config.min_behaviours
    return np.where(known[:, None], unit(vectors), np.float32(0)), known


def judged(histories: pa.Table, positive_above: float) -> tuple[pa.ListArray, np.ndarray]:
    """What each user took or passed over, list<int64> [n], and which of it they liked: bool, aligned with all items.

    Liked is what was taken, and where it was graded, with more than `positive_above`.
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
    """Vectors brought to length 1; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def _confidences(
    items: pa.ListArray,
    column: np.ndarray,
    n_columns: int,
    config: CollaborativeConfig,
    chosen: np.ndarray | None = None,
) -> Any:
    """The sparse matrix of who chose what; what a user chose several times counts once. column: of each flat item."""
    from scipy.sparse import csr_matrix

    of_user = np.repeat(np.arange(len(items), dtype=np.int32), items.value_lengths().fill_null(0).to_numpy())
    if chosen is not None:
        of_user, column = of_user[chosen], column[chosen]
    ones = np.ones(len(column), dtype=np.float32)
    matrix = csr_matrix((ones, (of_user, column.astype(np.int32))), shape=(len(items), n_columns))
    matrix.data[:] = 1 + config.alpha
    return matrix


def _quietly(model: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        # implicit asks for one BLAS thread at its construction; its native solvers, which run here, call none.
        warnings.simplefilter("ignore", RuntimeWarning)
        return model(**settings)
