"""A user's interest partitions as a sample may see them (LIBER, arXiv 2411.14713): the newest ones that are earlier.

Refreshes keep a vector of each partition, by user and as_of. Each slot of the adaptor's tower is a table of its own:
the first reads the newest partition before the sample, the second the one before that, and the fusion weighs them.
"""

from dataclasses import dataclass, replace

import numpy as np

from owlrec.ctr.arms import PARTITION_SLOTS
from owlrec.ctr.knowledge import VectorTable


@dataclass(frozen=True)
class PartitionSlot(VectorTable):
    """A VectorTable of the partitions that stand `older` places before the newest one."""

    partitions: VectorTable
    older: int
    code_sizes: tuple[int, ...] = ()  # partitions have no semantic ids

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.partitions.dim

    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """See VectorTable."""
        rows = self.partitions.find(ids, before)
        for _ in range(self.older):  # what is strictly earlier than the one that was found
            there = np.flatnonzero(rows >= 0)
            rows[there] = self.partitions.find(ids[there], self.partitions.as_of_at(rows[there]))
        return rows

    def as_of_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        return self.partitions.as_of_at(rows)

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        return self.partitions.vectors_at(rows)

    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        return self.partitions.codes_at(rows)

    def ids_in(self, number: int, n_shards: int) -> np.ndarray:
        """See VectorTable: users with any partition."""
        return self.partitions.ids_in(number, n_shards)

    def shuffled(self, seed: int) -> "PartitionSlot":
        """See VectorTable."""
        return replace(self, partitions=self.partitions.shuffled(seed))


def partition_slots(partitions: VectorTable) -> dict[str, dict[str, VectorTable]]:
    """PARTITION_SLOTS as sources of users. partitions: of all moments."""
    return {slot: {"user": PartitionSlot(partitions, older)} for older, slot in enumerate(PARTITION_SLOTS)}
