"""How far a user's unread behaviors lie from what they did before, and what a call of the LLM is worth.

An interest is the mean of item vectors, weighted by rating; drift is one minus the cosine between that of the short
term and that of everything read. What cannot be compared, since one side has no vectors, counts as wholly new (1.0).
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

# Vectors of item ids int64 [n]: (float32 [n, d], mask bool [n]); KnowledgeStore.vectors of kind "item" is one.
Gather = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_UNKNOWN = 1.0


def sum_vectors(
    items: np.ndarray, ratings: np.ndarray, lengths: np.ndarray, gather: Gather
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted sum of the item vectors of each list, and the sum of its weights.

    items, ratings: int64 and float [n], all lists one after another; lengths: int [m]. A weight is the rating, 1 where
    there is none (NaN) and 0 for a negative one or an item without a finite vector.
    Returns (float32 [m, d], float32 [m]).
    """
    ids, place = np.unique(items, return_inverse=True)
    vectors, known = gather(ids)
    known = known & np.isfinite(vectors).all(axis=1)
    weights = np.where(np.isnan(ratings), 1.0, np.maximum(ratings, 0.0)).astype(np.float32)
    weights *= known[place]
    sums = np.zeros((len(lengths), vectors.shape[1]), dtype=np.float32)
    totals = np.zeros(len(lengths), dtype=np.float32)
    bounds = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    for row, (start, end) in enumerate(pairwise(bounds)):  # bounds what is in memory at once
        used = start + np.flatnonzero(weights[start:end])
        sums[row] = (weights[used, None] * vectors[place[used]]).sum(axis=0)
        totals[row] = weights[used].sum()
    return sums, totals


def drifts(unread: np.ndarray, unread_weight: np.ndarray, read: np.ndarray, read_weight: np.ndarray) -> np.ndarray:
    """1 - cosine of each pair of interests: float64 [n] in [0, 2].

    unread, read: weighted sums, float [n, d]; their weights float [n]. 1.0 where a weight or a length is 0.
    """
    unread, read = unread.astype(np.float64), read.astype(np.float64)
    lengths = np.linalg.norm(unread, axis=1) * np.linalg.norm(read, axis=1)
    comparable = (unread_weight > 0) & (read_weight > 0) & (lengths > 0)
    cosine = (unread * read).sum(axis=1) / np.where(comparable, lengths, 1.0)
    return np.where(comparable, 1.0 - np.clip(cosine, -1.0, 1.0), _UNKNOWN)


def priorities(drift: np.ndarray, n_unread: np.ndarray) -> np.ndarray:
    """What a call about each user is worth: drift times activity, log(1 + unread behaviors)."""
    return drift * np.log1p(n_unread)
