"""A store as somebody would add it: this process's own memory. `STORES` gets one line for it."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from release_rows import Rows  # type: ignore[import-not-found]

from owlrec.ids import BEHAVIOR
from owlrec.releases import Knowledge, KnowledgeStore, Release, ReleaseManifest


class MemoryStore(KnowledgeStore):
    """Rows in dicts, by kind and id."""

    def __init__(self, rows: Rows, dim: int) -> None:
        self._rows, self._dim = rows, dim

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        texts = [self._rows.texts.get((kind, int(i))) for i in ids]
        return [
            t and Knowledge(kind, int(i), as_of=t[0], text=t[1], framework="kar", quality=t[2])
            for i, t in zip(ids, texts, strict=True)
        ]

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        vectors, mask = np.zeros((len(ids), n, self._dim), np.float32), np.zeros((len(ids), n), bool)
        for row, id_ in enumerate(ids):
            for slot, vector in enumerate(self._rows.vectors.get((kind, int(id_)), [])[:n]):
                vectors[row, slot], mask[row, slot] = vector, True
        return vectors, mask

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        return [self._rows.codes.get((kind, int(i))) for i in ids]

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        return [self._rows.cohorts.get((kind, int(i))) for i in ids]

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        own = [self._rows.behaviors.get(int(i)) for i in ids]
        return [None if rows is None else np.array([(*row, 0) for row in rows], dtype=BEHAVIOR) for rows in own]

    def count(self, kind: str) -> int:
        return len(self.ids(kind))

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        return np.array(sorted(i for k, i in self._rows.texts if k == kind)[:limit], np.int64)

    def close(self) -> None:
        pass


class MemoryReleases:
    """One release an address, put there by whoever has it."""

    held: ClassVar[dict[str, tuple[Rows, ReleaseManifest]]] = {}

    def __init__(self, url: str) -> None:
        self._url = url

    def current(self) -> str | None:
        return self.held[self._url][1].name if self._url in self.held else None

    def forgotten(self) -> str:
        return ""

    def open(self, name: str) -> Release:
        rows, manifest = self.held[self._url]
        return Release(MemoryStore(rows, manifest.dim), [manifest])
