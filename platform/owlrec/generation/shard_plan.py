"""Which rows make up which shard of a job: by cohort, then by the hash of the id.

A replica then works on few retrieval pools at a time. A shard is a pure function of a row's cohort and id, so two
passes that count are all the planning there is: 10^8 rows take seconds, and memory for one chunk of them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from owlrec.errors import SchemaError
from owlrec.schema import shard_of

_MOST_COHORTS = 10**8  # counts are kept by cohort number, so that a hash in its place would not fit into memory
_CHUNK_ROWS = 1 << 16  # chunks of this size stay in the processor's cache

Chunk = tuple[np.ndarray, np.ndarray | None]  # ids int64 [m], cohorts int64 [m]; None = all rows are of one cohort


@dataclass(frozen=True)
class ShardPlan:
    """The number of rows of each shard, and which shard a row belongs to."""

    rows: np.ndarray  # int64 [n shards]
    first: np.ndarray  # int64 [n cohorts], a cohort's first shard
    count: np.ndarray  # int64 [n cohorts], its number of shards; 0 where it has no rows

    @property
    def spread(self) -> tuple[float, float, float]:
        """Rows of the smallest, the median and the largest shard. There must be one."""
        return float(self.rows.min()), float(np.median(self.rows)), float(self.rows.max())

    def shards(self, ids: np.ndarray, cohorts: np.ndarray | None = None) -> np.ndarray:
        """The shard of each row, int64 [m]. ids, cohorts: int64 [m]. Raises SchemaError for an unplanned cohort."""
        if cohorts is None:
            cohorts = np.zeros(len(ids), dtype=np.int64)
        inside = not len(cohorts) or (cohorts.min() >= 0 and cohorts.max() < len(self.count))
        count = self.count[cohorts] if inside else np.zeros(1)
        if not count.all():
            raise SchemaError("a row's cohort has no shard: the rows are not those that were planned. Plan anew.")
        return self.first[cohorts] + shard_of(ids, count)  # type: ignore[arg-type]  # one number a row broadcasts


def consecutive_ids(n_rows: int) -> Callable[[], Iterator[Chunk]]:
    """Chunks of the ids 0 to n_rows - 1, of no cohort: what can be planned before any real id is there."""
    return lambda: ((np.arange(i, min(i + _CHUNK_ROWS, n_rows)), None) for i in range(0, n_rows, _CHUNK_ROWS))


def shard_sizes(chunks: Callable[[], Iterable[Chunk]], shard_rows: int) -> ShardPlan:
    """How many rows each shard gets, in memory for one chunk, the cohorts and the shards.

    chunks: gives all rows anew at each call; they are read twice. How rows are cut into chunks changes nothing. Cohorts
    are numbered from 0. One of more than shard_rows rows gets ceil(rows / shard_rows) shards of its own; smaller ones,
    in order of number, share a shard while they fit.
    Raises ValueError where shard_rows < 1 or the second reading differs, SchemaError for a cohort out of range.
    """
    if shard_rows < 1:
        raise ValueError(f"shard_rows is {shard_rows}; a shard holds at least one row")
    sizes = np.zeros(1, dtype=np.int64)
    for ids, cohorts in chunks():
        if cohorts is None:
            sizes[0] += len(ids)
        elif len(cohorts):
            if cohorts.min() < 0 or cohorts.max() >= _MOST_COHORTS:
                raise SchemaError(
                    f"cohorts {cohorts.min()} to {cohorts.max()}: they are numbered from 0, below {_MOST_COHORTS}. "
                    "Replace other names by their position in a list."
                )
            more = np.bincount(cohorts, minlength=len(sizes))
            more[: len(sizes)] += sizes
            sizes = more
    first, count, n_shards = _pack(sizes, shard_rows)
    found = ShardPlan(np.zeros(n_shards, dtype=np.int64), first, count)
    for ids, cohorts in chunks():
        found.rows[:] += np.bincount(found.shards(ids, cohorts), minlength=n_shards)
    if found.rows.sum() != sizes.sum():
        raise ValueError(f"chunks gave {sizes.sum()} rows at first and {found.rows.sum()} when read again")
    return found


def _pack(sizes: np.ndarray, shard_rows: int) -> tuple[np.ndarray, np.ndarray, int]:
    """First shard and number of shards of each cohort, and the number of all shards."""
    present = np.flatnonzero(sizes)
    ends = np.cumsum(sizes[present])
    first, count = np.zeros_like(sizes), np.zeros_like(sizes)
    shard = start = 0
    while start < len(present):
        before = ends[start - 1] if start else 0
        # A cohort that overflows a shard ends the one before it, and then stands alone.
        stop = max(int(np.searchsorted(ends, before + shard_rows, side="right")), start + 1)
        needed = -(-int(ends[stop - 1] - before) // shard_rows)
        first[present[start:stop]], count[present[start:stop]] = shard, needed
        shard, start = shard + needed, stop
    return first, count, shard
