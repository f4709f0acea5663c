"""What a store of knowledge answers, whatever database is behind it: texts and vectors, aligned with their ids.

A miss is an answer, never an error, because new users and items are normal: `get` gives None in its place, `vectors` a
zero row with a False in the mask. Before that the cohorts of an id stand in for it (REKI's collective knowledge): that
rule is written here once, and a database only says what it holds under an id itself. Stores are read-only: what they
hold was written and verified once, by `owlrec.releases.build`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np

from owlrec.cohorts.memberships import by_facet
from owlrec.tombstones import Tombstones

_Value = TypeVar("_Value")
_Store = TypeVar("_Store", bound="KnowledgeStore")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What the LLM wrote about one user, item or cohort."""

    kind: str
    id: int
    as_of: int  # ms since 1970, UTC: the text knows nothing later
    text: str
    framework: str  # "collective": the texts of the id's cohorts, which has none of its own
    quality: str  # "ok", or the names of the quality rules that flagged the text


class KnowledgeStore(ABC):
    """Read access to one release; a context manager that closes itself."""

    remote = False  # whether a question waits for a network: servers then ask from a thread

    def get(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """Knowledge aligned with `ids`: an id's own, else what its cohorts say, None where there is neither.

        The texts of several cohorts are joined by a line break, in the order of the memberships; the moment is the
        latest of theirs, the quality that of the first. Raises ReleaseError for an unknown kind.
        """
        answers = self.own_knowledge(kind, ids)
        missing = [row for row, knowledge in enumerate(answers) if knowledge is None]
        if not missing:
            return answers
        groups, cohorts = self._stand_ins(kind, [int(ids[row]) for row in missing])
        texts = dict(zip(cohorts, self.own_knowledge("cohort", cohorts), strict=True)) if cohorts else {}
        for row, group in zip(missing, groups, strict=True):
            known = [knowledge for cohort in group if (knowledge := texts[cohort])]
            if known:
                answers[row] = Knowledge(
                    kind=kind,
                    id=int(ids[row]),
                    as_of=max(k.as_of for k in known),
                    text="\n".join(k.text for k in known),
                    framework="collective",
                    quality=known[0].quality,
                )
        return answers

    def vectors(self, kind: str, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors aligned with `ids`: (float32 [n, d], mask bool [n]).

        An id's own newest vector; else the mean of its cohorts' vectors, scaled to length 1; else zeros and False.
        """
        rows, mask = self.partitions(kind, ids, 1)
        return rows[:, 0], mask[:, 0]

    def partitions(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of the newest `n` interest partitions of each id: (float32 [m, n, d], mask bool [m, n]).

        Newest first. An id without a vector of its own has in slot 0 what `vectors` gives for it. n: at least 1.
        """
        rows, mask = self.own_vectors(kind, ids, n)
        missing = [row for row, there in enumerate(mask[:, 0].tolist()) if not there]
        if not missing:
            return rows, mask
        groups, cohorts = self._stand_ins(kind, [int(ids[row]) for row in missing])
        if not cohorts:
            return rows, mask
        of_cohorts, known = self.own_vectors("cohort", cohorts, 1)
        place = {cohort: at for at, cohort in enumerate(cohorts) if known[at, 0]}
        for row, group in zip(missing, groups, strict=True):
            at = [place[cohort] for cohort in group if cohort in place]
            if not at:
                continue
            mean = of_cohorts[at, 0].mean(axis=0)
            length = np.linalg.norm(mean)
            if length > 0:  # vectors that cancel each other out point nowhere: a miss
                rows[row, 0], mask[row, 0] = mean / length, True
        return rows, mask

    def codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The semantic ids of the newest vectors of `ids`: (uint16 [n, levels + 1], mask bool [n]).

        Coarse to fine, the duplicate digit last; zeros and False where an id has none of its own, for cohorts do not
        stand in: what several share tells nobody apart. [n, 0] where none of them has any.
        """
        own = self.own_codes(kind, ids)
        width = max((len(codes) for codes in own if codes), default=0)
        rows, mask = np.zeros((len(own), width), dtype=np.uint16), np.array([bool(codes) for codes in own], bool)
        if mask.any():
            rows[mask] = [codes for codes in own if codes]
        return rows, mask

    def cohorts(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...]]:
        """The cohorts of each id, the one that tells most first; an empty tuple where it has none."""
        return [liked + disliked for liked, disliked in self.facets(kind, ids)]

    def facets(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The cohorts of each id, and apart from them those of users by what they disliked."""
        return [by_facet(group or ()) for group in self.memberships(kind, ids)]

    def _stand_ins(self, kind: str, ids: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
        """The cohorts of each id, and all of them, each once."""
        groups = self.cohorts(kind, ids)
        return groups, sorted({cohort for group in groups for cohort in group})

    @abstractmethod
    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """Knowledge that stands under the ids themselves, aligned, None where there is none.

        Raises ReleaseError for an unknown kind.
        """

    @abstractmethod
    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of partitions 0 to n - 1 that stand under the ids themselves: (float32 [m, n, d], mask bool [m, n]).

        An id without partition 0 has none at all.
        """

    @abstractmethod
    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """The codes of each id, its duplicate digit last; None where nothing is said of it, () where its newest vector
        is said to have none.
        """

    @abstractmethod
    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """The cohorts of each id, as `by_facet` reads them; None where nothing is said of it, () where it is said that
        it has none.
        """

    @abstractmethod
    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """The last behaviors of each user, oldest first: schema.BEHAVIOR [k]; None of those without any."""

    @abstractmethod
    def count(self, kind: str) -> int:
        """How many ids of this kind have knowledge of their own."""

    @abstractmethod
    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """The ids of this kind that have knowledge of their own: int64, ascending, at most `limit`."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the store holds; calling it twice does no harm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ChainedStore(KnowledgeStore, Generic[_Store]):
    """A delta release and what it is read on top of: whatever a layer lacks, the next older one answers.

    Only what stands under an id itself is looked up layer by layer. Which cohorts stand in for an id, and what those
    say, is settled above over the whole chain: a delta that renews a cohort's text renews what a member stored in any
    other layer resolves to.
    """

    def __init__(self, layers: Sequence[_Store], *, dim: int, totals: dict[str, int]) -> None:
        """layers: newest first, the last of them a full release; closed with the chain. dim, totals: as the newest
        manifest states.
        """
        self.layers = tuple(layers)
        self.remote = self.layers[0].remote
        self._dim = dim
        self._totals = totals

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        return self._newest(lambda layer, asked: layer.own_knowledge(kind, asked), ids)

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors. The newest layer with an id's partition 0 answers for all its partitions:
        older ones may lie elsewhere in it, or be gone.
        """
        vectors = np.zeros((len(ids), n, self._dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        missing = np.arange(len(ids))
        for layer in self.layers:
            rows, known = layer.own_vectors(kind, [int(ids[row]) for row in missing.tolist()], n)
            hit = known[:, 0]
            if hit.any():  # else its rows may have no components at all: vectors began later in the chain
                vectors[missing[hit]], mask[missing[hit]] = rows[hit], known[hit]
                missing = missing[~hit]
            if not len(missing):
                break
        return vectors, mask

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.own_codes."""
        return self._newest(lambda layer, asked: layer.own_codes(kind, asked), ids)

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.memberships."""
        return self._newest(lambda layer, asked: layer.memberships(kind, asked), ids)

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """See KnowledgeStore.behaviors."""
        return self._newest(lambda layer, asked: layer.behaviors(asked), ids)

    def count(self, kind: str) -> int:
        """See KnowledgeStore.count."""
        return self._totals.get(kind, 0)

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        return np.unique(np.concatenate([layer.ids(kind, limit) for layer in self.layers]))[:limit]

    def close(self) -> None:
        """See KnowledgeStore.close."""
        for layer in self.layers:
            layer.close()

    def _newest(
        self, look_up: Callable[[_Store, Sequence[int]], list[_Value | None]], ids: Sequence[int] | np.ndarray
    ) -> list[_Value | None]:
        values: list[_Value | None] = [None] * len(ids)
        missing = list(range(len(ids)))
        for layer in self.layers:
            answers = look_up(layer, [int(ids[row]) for row in missing])
            for row, answer in zip(missing, answers, strict=True):
                values[row] = answer
            missing = [row for row in missing if values[row] is None]
            if not missing:
                break
        return values


class TombstonedStore(KnowledgeStore):
    """A store that says nothing of users who are forgotten, whatever it still holds."""

    def __init__(self, store: KnowledgeStore, tombstones: Tombstones) -> None:
        """store: closed with this one."""
        self.remote = store.remote
        self._store, self._tombstones = store, tombstones

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        return self._without(kind, ids, self._store.own_knowledge(kind, ids))

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors."""
        rows, mask = self._store.own_vectors(kind, ids, n)
        gone = self._gone(kind, ids)
        rows[gone], mask[gone] = 0, False
        return rows, mask

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.own_codes."""
        return self._without(kind, ids, self._store.own_codes(kind, ids))

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.memberships."""
        return self._without(kind, ids, self._store.memberships(kind, ids))

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """See KnowledgeStore.behaviors."""
        return self._without("user", ids, self._store.behaviors(ids))

    def count(self, kind: str) -> int:
        """See KnowledgeStore.count: as the release was built, those who are forgotten since included."""
        return self._store.count(kind)

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        if kind != "user":
            return self._store.ids(kind, limit)
        ids = self._store.ids(kind, None if limit is None else limit + len(self._tombstones))
        return ids[~self._tombstones.among(ids)][:limit]

    def close(self) -> None:
        """See KnowledgeStore.close."""
        self._store.close()

    def _gone(self, kind: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._tombstones.among(ids) if kind == "user" else np.zeros(len(ids), dtype=bool)

    def _without(self, kind: str, ids: Sequence[int] | np.ndarray, values: list[_Value | None]) -> list[_Value | None]:
        for row in np.flatnonzero(self._gone(kind, ids)).tolist():
            values[row] = None
        return values


def measure_lookup(
    store: KnowledgeStore, kind: str, ids: np.ndarray, *, n: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Times `n` single lookups each of knowledge and vectors, for ids drawn from `ids` and read once before.

    Returns {"n", "knowledge_p50_us", "knowledge_p99_us", "vector_p50_us", "vector_p99_us"} (microseconds); n is 0 where
    ids is empty.
    """
    if len(ids) == 0:
        return {"n": 0.0}
    drawn = np.random.default_rng(seed).choice(np.asarray(ids, dtype=np.int64), size=n)
    store.get(kind, drawn)
    store.vectors(kind, drawn)
    figures: dict[str, float] = {"n": float(n)}
    for name, lookup in (("knowledge", store.get), ("vector", store.vectors)):
        micros = np.empty(n)
        for row in range(n):
            one = drawn[row : row + 1]
            start = time.perf_counter_ns()
            lookup(kind, one)
            micros[row] = (time.perf_counter_ns() - start) / 1000
        figures[f"{name}_p50_us"] = round(float(np.percentile(micros, 50)), 1)
        figures[f"{name}_p99_us"] = round(float(np.percentile(micros, 99)), 1)
    return figures
