"""A delta release and what it is read on top of, as one store: whatever a part lacks, the next older one answers.

Only what stands under an id itself is looked up part by part. Which cohorts stand in for an id, and what those say, is
settled above (owlrec.releases.interface) over the whole chain: a delta that renews a cohort's text renews what a member
stored in any other part resolves to.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from owlrec.releases.interface import Knowledge, KnowledgeStore
from owlrec.releases.lmdb_store import LmdbStore, decode_key

_KEYS_AT_ONCE = 20_000
_Found = TypeVar("_Found")
_Part = TypeVar("_Part", bound=KnowledgeStore)


class ChainedStore(KnowledgeStore, Generic[_Part]):
    """Reads the stores of a chain, newest first; closes all of them."""

    def __init__(self, parts: Sequence[_Part], *, dim: int, totals: dict[str, int]) -> None:
        """parts: newest first, the last of them a full release. dim, totals: as the newest manifest states."""
        self.parts = tuple(parts)
        self.remote = self.parts[0].remote
        self._dim = dim
        self._totals = totals

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        return self._first_found(lambda part, asked: part.own_knowledge(kind, asked), ids)

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors. The newest part with an id's partition 0 answers for all its partitions:
        older ones may lie elsewhere in it, or be gone.
        """
        found = np.zeros((len(ids), n, self._dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        missing = np.arange(len(ids))
        for part in self.parts:
            rows, there = part.own_vectors(kind, [int(ids[row]) for row in missing.tolist()], n)
            hit = there[:, 0]
            if hit.any():  # else its rows may have no components at all: vectors began later in the chain
                found[missing[hit]], mask[missing[hit]] = rows[hit], there[hit]
                missing = missing[~hit]
            if not len(missing):
                break
        return found, mask

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.own_codes."""
        return self._first_found(lambda part, asked: part.own_codes(kind, asked), ids)

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.memberships."""
        return self._first_found(lambda part, asked: part.memberships(kind, asked), ids)

    def count(self, kind: str) -> int:
        """See KnowledgeStore.count."""
        return self._totals.get(kind, 0)

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        found = np.unique(np.concatenate([part.ids(kind, limit) for part in self.parts]))
        return found if limit is None else found[:limit]

    def close(self) -> None:
        """See KnowledgeStore.close."""
        for part in self.parts:
            part.close()

    def _first_found(
        self, look_up: Callable[[_Part, Sequence[int]], list[_Found | None]], ids: Sequence[int] | np.ndarray
    ) -> list[_Found | None]:
        found: list[_Found | None] = [None] * len(ids)
        missing = list(range(len(ids)))
        for part in self.parts:
            answers = look_up(part, [int(ids[row]) for row in missing])
            for row, answer in zip(missing, answers, strict=True):
                found[row] = answer
            missing = [row for row in missing if found[row] is None]
            if not missing:
                break
        return found


def count_new_ids(added: LmdbStore, parents: Sequence[LmdbStore]) -> Counter[str]:
    """How many ids by kind have knowledge in `added` and in none of `parents`."""
    new: Counter[str] = Counter()
    keys = (key for key, _ in added.items("knowledge"))
    while batch := list(islice(keys, _KEYS_AT_ONCE)):
        for part in parents:
            batch = part.missing("knowledge", batch)
        new.update(decode_key(key)[0] for key in batch)
    return new
