"""Collaborative vectors: ALS item factors, and every user as what best explains the items they chose.

Alternating least squares for implicit feedback (Hu, Koren and Volinsky, ICDM 2008, by the library `implicit`) learns
item factors from a sample of users. A user's vector is then one least-squares solution given those factors, whoever the
user is: 10^8 users stream through, and a new user needs no training. What a user liked and what they disliked give two
vectors in the same space. A later training starts from the earlier factors, which keeps the axes, so that vectors and
centroids of two runs can be compared.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from owlrec.config import Config
from owlrec.errors import SchemaError
from owlrec.ordered import rows_of


class CollaborativeConfig(Config):
    """How item factors are learnt, and from how much on a user has a vector."""

    factors: int = Field(64, ge=1)
    regularization: float = Field(0.05, gt=0)
    iterations: int = Field(15, ge=1)
    alpha: float = Field(10.0, gt=0)  # a behaviour's confidence is 1 + alpha, that of its absence 1
    train_users: int = Field(1_000_000, ge=1)  # a sample this large fixes the factors of 10^5 items well
    min_behaviours: int = Field(3, ge=1)  # a user who liked fewer known items says too little: attributes decide
    min_item_users: int = Field(3, ge=1)  # likewise an item that fewer users chose
    seed: int = 0


@dataclass(frozen=True)
class ItemFactors:
    """Vectors of the items that enough users chose."""

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float32 [n, d]

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [m, d], bool [m]): the vector of each id, zeros and False where it has none."""
        rows = rows_of(self.ids, ids)
        return np.where((rows >= 0)[:, None], self.vectors[rows], np.float32(0)), rows >= 0


def train_item_factors(
    histories: pa.Table, config: CollaborativeConfig, previous: ItemFactors | None = None
) -> ItemFactors:
    """ALS over histories (schema.HISTORIES), whatever their ratings: that a user chose an item is what is modelled.

    previous: factors of an earlier run, to start from where an item has some.
    Raises SchemaError where no item was chosen by enough users.
    """
    from implicit.cpu.als import AlternatingLeastSquares  # here, since the recipe imports this module's Config
    from scipy.sparse import csr_matrix

    items = histories["items"].combine_chunks()
    chosen = items.flatten().to_numpy()
    of_user = np.repeat(np.arange(histories.num_rows), items.value_lengths().fill_null(0).to_numpy())
    pairs = np.unique(np.stack([of_user, chosen], axis=1), axis=0)
    ids, column, n_users = np.unique(pairs[:, 1], return_inverse=True, return_counts=True)
    frequent = n_users >= config.min_item_users
    if not frequent.any():
        raise SchemaError(
            f"histories: none of {len(ids)} items was chosen by {config.min_item_users} users or more, so nothing says "
            "which are alike. Use more users, or lower cohorts.collaborative.min_item_users in the recipe."
        )
    kept = frequent[column]
    rows, columns = pairs[kept, 0], (np.cumsum(frequent) - 1)[column[kept]]
    ids = ids[frequent]
    confidence = np.full(len(rows), 1 + config.alpha, dtype=np.float32)
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
    model.fit(csr_matrix((confidence, (rows, columns)), shape=(histories.num_rows, len(ids))), show_progress=False)
    return ItemFactors(ids, np.asarray(model.item_factors, dtype=np.float32))


class FoldIn:
    """Users' vectors from given item factors: the user's half of an ALS step."""

    def __init__(self, factors: ItemFactors, config: CollaborativeConfig) -> None:
        from implicit.cpu.als import AlternatingLeastSquares

        self.factors, self.config = factors, config
        self._model = _quietly(
            AlternatingLeastSquares, factors=factors.vectors.shape[1], regularization=config.regularization
        )
        self._model.item_factors = factors.vectors.copy()  # its solver refuses what Ray hands over, which is read-only

    def vectors(self, items: pa.ListArray, chosen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of users who chose `items`.

        items: list<int64> [n]. chosen: bool, aligned with the flattened items: which of them count; None = all.
        Returns float32 [n, d] of length 1 and bool [n]: False, and zeros, for fewer known items than min_behaviours.
        """
        from scipy.sparse import csr_matrix

        flat = items.flatten().to_numpy()
        of_user = np.repeat(np.arange(len(items)), items.value_lengths().fill_null(0).to_numpy())
        rows = rows_of(self.factors.ids, flat)
        counts = rows >= 0 if chosen is None else (rows >= 0) & chosen
        pairs = np.unique(np.stack([of_user[counts], rows[counts]], axis=1), axis=0)
        confidence = np.full(len(pairs), 1 + self.config.alpha, dtype=np.float32)
        matrix = csr_matrix((confidence, (pairs[:, 0], pairs[:, 1])), shape=(len(items), len(self.factors.ids)))
        vectors = self._model.recalculate_user(np.arange(len(items)), matrix)
        known = np.diff(matrix.indptr) >= self.config.min_behaviours
        return np.where(known[:, None], unit(vectors), np.float32(0)), known


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors brought to length 1; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def _quietly(model: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        # implicit asks for one BLAS thread at its construction; its native solvers, which run here, call none.
        warnings.simplefilter("ignore", RuntimeWarning)
        return model(**settings)
