"""Where an id stands in a column in ascending order, where a run of equal keys begins, and which ids share a shard."""

from collections.abc import Iterator

import numpy as np

from owlrec.schema import shard_of


def rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The row of each of `wanted` among `ids`, which ascend: int64 of its shape, -1 for what is not there."""
    if len(ids) == 0:
        return np.full(np.shape(wanted), -1, dtype=np.int64)
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[rows] == wanted, rows, -1)


def run_starts(*columns: np.ndarray) -> np.ndarray:
    """For each row the first of the rows around it that are equal in all `columns`: int64 [n]."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def by_shard(ids: np.ndarray, n_shards: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each shard that some of `ids` (int64 [n]) belong to, and the positions of those."""
    numbers = shard_of(ids, n_shards)
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for at in np.split(order, starts[1:]) if len(ids) else ():
        yield int(numbers[at[0]]), at
