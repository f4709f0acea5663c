"""Columns in ascending order: positions of ids, and starts of runs of equal keys."""

import numpy as np


def rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of each wanted id in sorted `ids`, or -1: int64 of the same shape."""
    if len(ids) == 0:
        return np.full(np.shape(wanted), -1, dtype=np.int64)
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[rows] == wanted, rows, -1)


def run_starts(*columns: np.ndarray) -> np.ndarray:
    """For each row, the first row of its run of equal values in all `columns`: int64 [n]."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def last_rows(ids: np.ndarray) -> np.ndarray:
    """The last row of each run of equal `ids`, which ascend: int64."""
    return np.flatnonzero(np.diff(ids, append=ids[-1:] + 1))


def newest_rows(ids: np.ndarray, as_of: np.ndarray, wanted: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Newest row of each wanted id: int64 of the same shape, -1 for none.

    ids, as_of: int64 [n], in ascending order of both, with distinct moments per id. before: int64 aligned with wanted;
    then only rows with a strictly earlier as_of count.
    """
    if len(ids) == 0:
        return np.full(np.shape(wanted), -1, dtype=np.int64)
    rows = np.searchsorted(ids, wanted, side="right") - 1
    if before is not None:
        while True:  # once per row of an id that is too new
            late = (rows >= 0) & (ids[rows] == wanted) & (as_of[rows] >= before)
            if not late.any():
                break
            rows = rows - late
    return np.where((rows >= 0) & (ids[rows] == wanted), rows, -1)
