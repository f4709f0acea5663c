"""Nearest neighbors by cosine: an index per part and kind, built by `publish` and mapped by servers.

A part is small (PART_IDS), so the worker that builds it holds its vectors, and nothing grows with the release. Up to
20,000 vectors are compared one by one; more go into inverted lists (faiss IVF, 8 bits per component), of which as many
are searched as give a recall of .95 at 10 on the part's own vectors. The recall is measured against exact search and is
in the manifest. A delta's parts have indexes of their own: an id that a newer layer has a vector of is not found by its
older one, and the search widens until enough neighbors are left.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from owlrec.ids import KINDS
from owlrec.releases.format import KEY_BYTES, KnowledgeStore, SimilarEntry, decode_keys, kind_of
from owlrec.releases.lmdb import LmdbFile

_EXACT_UP_TO = 20_000
_TRAINED_ON = 64  # vectors per inverted list
_ROWS_AT_ONCE = 20_000
_RECALL_AT, _WANTED, _QUESTIONS = 10, 0.95, 100


def similar_file(number: int, kind: str) -> str:
    """File with the index of a part's vectors of a kind, relative to the release's folder."""
    return f"parts/{number:05d}-{kind}.faiss"


def faiss_or_none() -> ModuleType | None:
    """The library, if it is installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def build_indexes(part: Path, folder: Path) -> dict[str, tuple[Path, int, float]]:
    """Indexes of a finished part: by kind, the file (in `folder`), its vectors and its recall at 10.

    Kinds without vectors are missing; empty without faiss.
    """
    faiss = faiss_or_none()
    if faiss is None:
        return {}
    built = {}
    for kind, (ids, rows) in _vectors(part).items():
        lengths = np.linalg.norm(rows.astype(np.float32), axis=1)
        usable = np.isfinite(lengths) & (lengths > 0)
        if not usable.any():
            continue
        ids, rows = ids[usable], rows[usable]
        path = folder / f"{kind}.faiss"
        index, recall = _index(faiss, ids, rows)
        faiss.write_index(index, str(path))
        built[kind] = path, len(ids), recall
    return built


def open_index(path: Path) -> Any:
    """The index in a file, mapped where faiss can."""
    faiss = faiss_or_none()
    assert faiss is not None
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)


class SimilarIndex:
    """The indexes of a release and its parents."""

    def __init__(self, layers: Sequence[tuple[KnowledgeStore, Mapping[str, Sequence[Any]]]]) -> None:
        """layers: newest first, each release's store and its parts' indexes by kind."""
        self._layers = layers

    def nearest(
        self, kind: str, vector: np.ndarray, k: int, hidden: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest ids and their cosines: (int64 [m], float32 [m]), the most similar first, m at most `k`.

        vector: float32 [d], not zero. hidden: whether ids (int64 [n]) must not be found: bool [n].
        """
        question = (vector / np.linalg.norm(vector)).astype(np.float32)[None]
        pieces = []
        for depth, (_, indexes) in enumerate(self._layers):
            newer = [store for store, _ in self._layers[:depth]]
            size, wanted = sum(index.ntotal for index in indexes.get(kind, ())), k
            while size:
                scores, ids = _merged([index.search(question, wanted) for index in indexes[kind]], wanted)
                stale = np.zeros(len(ids), dtype=bool) if hidden is None else hidden(ids)
                for store in newer:
                    stale |= store.own_vectors(kind, ids, 1)[1][:, 0]
                if (~stale).sum() >= k or wanted >= size:
                    pieces.append((scores[~stale], ids[~stale]))
                    break
                wanted = min(2 * wanted, size)
        if not pieces:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        scores, ids = _merged([(s[None], i[None]) for s, i in pieces], k)
        return ids, scores


def entries(counts: Mapping[str, Mapping[str, float]]) -> dict[str, SimilarEntry]:
    """What a manifest says of its indexes. counts: sums over the parts' cards, by name and kind."""
    vectors, recalled = counts["similar"], counts["recalled"]
    return {kind: SimilarEntry(vectors=int(n), recall=round(recalled[kind] / n, 4)) for kind, n in vectors.items() if n}


def _merged(answers: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` of several searches for one question."""
    scores, ids = (np.concatenate([answer[at][0] for answer in answers]) for at in (0, 1))
    scores, ids = scores[ids >= 0], ids[ids >= 0]
    best = np.argsort(-scores, kind="stable")[:k]
    return scores[best], ids[best]


def _vectors(part: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The newest vectors of a part by kind: int64 [n] and float16 [n, d]."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in KINDS}
    with LmdbFile(part) as file:
        rows = file.items("vectors")
        while batch := list(islice(rows, _ROWS_AT_ONCE)):
            newest = [row for row in batch if len(row[0]) == KEY_BYTES]  # longer keys are of older partitions
            if not newest:
                continue
            kinds, ids = decode_keys([key for key, _ in newest])
            values = np.frombuffer(b"".join(value for _, value in newest), dtype=np.float16).reshape(len(newest), -1)
            for byte in np.unique(kinds).tolist():
                found[kind_of(byte)].append((ids[kinds == byte], values[kinds == byte]))
    return {
        kind: (np.concatenate([ids for ids, _ in pieces]), np.concatenate([rows for _, rows in pieces]))
        for kind, pieces in found.items()
        if pieces
    }


def _index(faiss: ModuleType, ids: np.ndarray, rows: np.ndarray) -> tuple[Any, float]:
    n, dim = rows.shape
    inner = faiss.METRIC_INNER_PRODUCT
    if n <= _EXACT_UP_TO:
        index = faiss.IndexIDMap(faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, inner))
        _add(index, ids, rows)
        return index, 1.0
    lists = int(2 * math.sqrt(n))
    drawn = np.random.default_rng(0).choice(n, size=min(n, lists * _TRAINED_ON), replace=False)
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, faiss.ScalarQuantizer.QT_8bit, inner)
    index.train(_unit(rows[np.sort(drawn)]))
    _add(index, ids, rows)
    return index, _tuned(index, ids, rows)


def _add(index: Any, ids: np.ndarray, rows: np.ndarray) -> None:
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        index.add_with_ids(_unit(rows[start : start + _ROWS_AT_ONCE]), ids[start : start + _ROWS_AT_ONCE])


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _tuned(index: Any, ids: np.ndarray, rows: np.ndarray) -> float:
    """Searches as many lists as give the wanted recall at 10; returns the recall."""
    drawn = np.sort(np.random.default_rng(1).choice(len(ids), size=min(_QUESTIONS, len(ids)), replace=False))
    questions, k = _unit(rows[drawn]), _RECALL_AT
    best_scores, best_ids = np.full((len(drawn), k), -np.inf, np.float32), np.full((len(drawn), k), -1)
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        some = ids[start : start + _ROWS_AT_ONCE]
        scores = np.hstack([best_scores, questions @ _unit(rows[start : start + _ROWS_AT_ONCE]).T])
        named = np.hstack([best_ids, np.broadcast_to(some, (len(drawn), len(some)))])
        order = np.argpartition(-scores, k, axis=1)[:, :k]
        best_scores, best_ids = np.take_along_axis(scores, order, 1), np.take_along_axis(named, order, 1)
    index.nprobe = 8
    while True:
        found = index.search(questions, k)[1]
        recall = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, best_ids, strict=True)]))
        if recall >= _WANTED or index.nprobe >= index.nlist:
            return recall
        index.nprobe = min(2 * index.nprobe, index.nlist)
