"""How far a user's unread behaviors lie from what they did before, and what a call of the LLM is worth.

An interest is two sums of item vectors: of what was liked, weighted by rating, and of what was graded no higher than
the scenario's bound. In one sum they would cancel wherever a user likes and dislikes films of one kind. Drift is one
minus the cosine between the interest of the short term and that of everything read, the larger one of the two sides.
Where neither side can be compared, since one interest has no vectors of it, all is new (1.0): a user who comes to
dislike what they liked has drifted.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

# Vectors of item ids int64 [n]: (float32 [n, d], mask bool [n]); KnowledgeStore.vectors of kind "item" is one.
Gather = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_UNKNOWN = 1.0


def sum_vectors(
    items: np.ndarray, ratings: np.ndarray, lengths: np.ndarray, gather: Gather, liked_above: float
) -> np.ndarray:
    """The interest of each list: float32 [m, 2, d], the weighted sum of what was liked, then that of what was not.

    items, ratings: int64 and float [n], all lists one after another; lengths: int [m]. What was liked has a rating
    above `liked_above`, by which it is weighted, or none (NaN) and weight 1; what was not has weight 1. An item without
    a finite vector has weight 0.
    """
    ids, place = np.unique(items, return_inverse=True)
    vectors, known = gather(ids)
    known = known & np.isfinite(vectors).all(axis=1)
    disliked = ratings <= liked_above  # False for NaN
    weights = np.where(np.isnan(ratings) | disliked, 1.0, np.maximum(ratings, 0.0)).astype(np.float32)
    weights *= known[place]
    sums = np.zeros((len(lengths), 2, vectors.shape[1]), dtype=np.float32)
    bounds = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    for row, (start, end) in enumerate(pairwise(bounds)):  # bounds what is in memory at once
        used = start + np.flatnonzero(weights[start:end])
        for side in (0, 1):
            mine = used[disliked[used] == bool(side)]
            sums[row, side] = (weights[mine, None] * vectors[place[mine]]).sum(axis=0)
    return sums


def drifts(unread: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Of each pair of interests 1 - cosine of the side that differs more: float64 [n] in [0, 2].

    unread, read: float [n, 2, d]. A side that has no length in either is left out; 1.0 where both are.
    """
    unread, read = unread.astype(np.float64), read.astype(np.float64)
    lengths = np.linalg.norm(unread, axis=2) * np.linalg.norm(read, axis=2)
    comparable = lengths > 0
    cosine = (unread * read).sum(axis=2) / np.where(comparable, lengths, 1.0)
    of_sides = np.where(comparable, 1.0 - np.clip(cosine, -1.0, 1.0), -1.0)
    return np.where(comparable.any(axis=1), of_sides.max(axis=1), _UNKNOWN)


def priorities(drift: np.ndarray, n_unread: np.ndarray) -> np.ndarray:
    """What a call about each user is worth: drift times activity, log(1 + unread behaviors)."""
    return drift * np.log1p(n_unread)
