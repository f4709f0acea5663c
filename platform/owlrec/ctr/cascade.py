"""A user's texts as a sample may see them (LIBER, arXiv 2411.14713): the newest ones that are earlier, one per slot.

Whole runs write one text per cut, refreshes one per partition of the interests since. In order of as_of they are what
a release stacks up: the first slot of the adaptor's tower reads the newest text before the sample, the second the one
before that, and the fusion weighs them.
"""

from dataclasses import dataclass, replace

import numpy as np

from owlrec.ctr.arms import OLDER_PARTITIONS
from owlrec.ctr.knowledge import VectorTable

_NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True)
class CascadeTable(VectorTable):
    """A VectorTable of the texts in two, of which each slot reads the one that stands `older` places before the newest.

    Rows are those of both tables by turns: 2 i is row i of the first, 2 i + 1 that of the second.
    """

    runs: VectorTable
    partitions: VectorTable
    older: int = 0
    code_sizes: tuple[int, ...] = ()  # partitions have no semantic ids

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.partitions.dim

    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """See VectorTable."""
        rows = self._newest(ids, before)
        for _ in range(self.older):  # what is strictly earlier than the one that was found
            there = np.flatnonzero(rows >= 0)
            rows[there] = self._newest(ids[there], self.as_of_at(rows[there]))
        return rows

    def as_of_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        moments = np.empty(len(rows), dtype=np.int64)
        for side, table in enumerate((self.runs, self.partitions)):
            mine = rows % 2 == side
            moments[mine] = table.as_of_at(rows[mine] // 2)
        return moments

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        vectors = np.zeros((len(rows), self.dim), dtype=np.float16)
        for side, table in enumerate((self.runs, self.partitions)):
            mine = (rows >= 0) & (rows % 2 == side)
            vectors[mine] = table.vectors_at(rows[mine] // 2)
        return vectors

    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable; raises SchemaError."""
        return self.partitions.codes_at(rows)

    def shuffled(self, seed: int) -> "CascadeTable":
        """See VectorTable."""
        return replace(self, runs=self.runs.shuffled(seed), partitions=self.partitions.shuffled(seed))

    def _newest(self, ids: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        rows = [table.find(ids, before) for table in (self.runs, self.partitions)]
        moments = np.full((2, len(ids)), _NEVER, dtype=np.int64)
        for table, found, of_table in zip((self.runs, self.partitions), rows, moments, strict=True):
            of_table[found >= 0] = table.as_of_at(found[found >= 0])
        later = moments[1] > moments[0]
        return np.where(later, 2 * rows[1] + 1, np.where(rows[0] >= 0, 2 * rows[0], -1))


def cascade_slots(runs: VectorTable, partitions: VectorTable) -> tuple[VectorTable, ...]:
    """The slots of the arm `streaming`, the newest text first.

    runs: texts of whole runs; partitions: those that refreshes have read.
    """
    return tuple(CascadeTable(runs, partitions, older) for older in range(1 + len(OLDER_PARTITIONS)))
