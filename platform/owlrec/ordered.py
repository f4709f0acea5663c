"""Columns in ascending order: where an id stands in one, and where a run of equal keys begins."""

import numpy as np


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
