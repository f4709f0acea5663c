"""The sealed tier of a retrieval pool: token sequences and a suffix array over them, memory-mapped and never changed.

The order is that of the texts read *backwards* from each position, because a query starts from the end of a context:
one binary search then finds where the context would stand, and the longest matches are its neighbours on both sides
(REST, NAACL 2024, keeps forward order and needs one search for each match length). Keys are compared to `DEPTH` tokens,
which bounds building to five sorts: a match of 32 tokens is as good as a longer one. 9 bytes a token: 4 of text, 4 of
order, 1 of shared lengths.
"""

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from owlrec.decoding.compiled import compiled
from owlrec.errors import EngineError

DEPTH = 32
NAMELESS = -1  # the id of a document that nobody asks for
BORDER = -1  # stands between documents, so that no match crosses from one to the next
_FORMAT = 1
_ARRAYS = ("tokens", "order", "shared", "documents")
_MAX_TOKENS = 2**31 - 1


class PoolError(EngineError):
    """A retrieval pool cannot be used: written for another model, of another format, or damaged."""


class CorruptPool(PoolError):
    """A pool's files do not match its manifest."""


class SealedPool:
    """Documents of one cohort, searchable.

    tokens: int32 [n], documents one after another, each followed by BORDER.
    order: int32 [m], the positions p that have a token before and at them, sorted by the text before p read backwards.
    shared: uint8 [m], how many tokens (at most DEPTH) the keys of order[i-1] and order[i] share.
    documents: int64 [d, 3] of id, start and end in `tokens`, sorted by id.
    """

    def __init__(self, tokens: np.ndarray, order: np.ndarray, shared: np.ndarray, documents: np.ndarray) -> None:
        self.tokens, self.order, self.shared, self.documents = tokens, order, shared, documents

    def document(self, id_: int) -> np.ndarray:
        """The tokens of document `id_`, int32 [length], empty where the pool has none of that id."""
        at = int(np.searchsorted(self.documents[:, 0], id_))
        if id_ == NAMELESS or at == len(self.documents) or self.documents[at, 0] != id_:
            return self.tokens[:0]
        start, end = self.documents[at, 1:]
        return self.tokens[start:end]

    def save(self, folder: str | os.PathLike[str], identity: str) -> None:
        """Writes the pool to `folder`, replacing what is there, so that a reader finds the old or the new one whole.

        identity: names the model and tokenizer whose token ids these are; `open_pool` refuses any other.
        """
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        files = {}
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(self, name))
            files[name] = _checksum(temporary / f"{name}.npy")
        manifest = {
            "format": _FORMAT,
            "identity": identity,
            "depth": DEPTH,
            "tokens": len(self.tokens),
            "documents": len(self.documents),
            "crc32": files,
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        if target.exists():
            # Readers that have mapped the old files keep them: the inodes live until they are closed.
            retired = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
            target.rename(retired)
            temporary.rename(target)
            shutil.rmtree(retired)
        else:
            temporary.rename(target)


def build_pool(sequences: Sequence[Sequence[int] | np.ndarray], ids: Sequence[int] | None = None) -> SealedPool:
    """Sorts token sequences into a sealed pool: about a second a million tokens.

    ids: one a sequence (user or item ids), for `SealedPool.document`; None where all are NAMELESS.
    Raises ValueError for a negative token id, doubled ids, or more than 2^31 tokens.
    """
    parts = [np.asarray(s, dtype=np.int32) for s in sequences]
    lengths = np.array([len(p) for p in parts], dtype=np.int64)
    ends = np.cumsum(lengths + 1) - 1
    n = int(ends[-1] + 1) if len(parts) else 0
    if n > _MAX_TOKENS:
        raise ValueError(f"a sealed pool holds at most {_MAX_TOKENS} tokens, not {n}: split the cohort")
    tokens = np.full(n, BORDER, dtype=np.int32)
    for part, end in zip(parts, ends, strict=True):
        if len(part) and part.min() < 0:
            raise ValueError(f"token ids are not negative, but a sequence holds {part.min()}")
        tokens[end - len(part) : end] = part
    names = np.full(len(parts), NAMELESS, dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
    named = names[names != NAMELESS]
    if len(names) != len(parts) or len(np.unique(named)) != len(named):
        raise ValueError(
            f"{len(parts)} sequences need as many distinct ids, not {len(names)} with {len(np.unique(named))} distinct"
        )
    documents = np.stack([names, ends - lengths, ends], axis=1) if len(parts) else np.zeros((0, 3), dtype=np.int64)
    order = _sort_backwards(tokens)
    return SealedPool(
        tokens, order, _shared_lengths(tokens, order), documents[np.argsort(documents[:, 0], kind="stable")]
    )


def open_pool(folder: str | os.PathLike[str], identity: str) -> SealedPool:
    """Maps a saved pool into memory after checking every file's CRC-32.

    Raises CorruptPool where a file is missing or differs from the manifest, PoolError where the pool belongs to another
    model or tokenizer than `identity`.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest.get("format") != _FORMAT or manifest.get("depth") != DEPTH:
        raise CorruptPool(
            f"pool {folder}: format {manifest.get('format')} is not the expected {_FORMAT}. Build the pool anew."
        )
    if manifest.get("identity") != identity:
        raise PoolError(
            f"pool {folder} holds tokens of {manifest.get('identity')}, but the engine runs {identity}. "
            f"Build the pool anew with this model, or point decoding.pools at another folder."
        )
    return SealedPool(*(_map_checked(folder, name, manifest) for name in _ARRAYS))


def rebuild_pool(folder: str | os.PathLike[str]) -> SealedPool:
    """Sorts a damaged pool anew from its tokens, where those and its documents are intact. Raises CorruptPool where
    they are not."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    tokens = np.array(_map_checked(folder, "tokens", manifest))
    documents = np.array(_map_checked(folder, "documents", manifest))
    order = _sort_backwards(tokens)
    return SealedPool(tokens, order, _shared_lengths(tokens, order), documents)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return manifest
    except (OSError, ValueError) as error:
        raise CorruptPool(f"pool {folder}: manifest.json cannot be read ({error}). Build the pool anew.") from None


def _map_checked(folder: Path, name: str, manifest: dict[str, Any]) -> np.ndarray:
    file = folder / f"{name}.npy"
    try:
        if _checksum(file) != manifest["crc32"][name]:
            raise CorruptPool(f"pool {folder}: {file.name} differs from its checksum. Build the pool anew.")
        # Copy-on-write, though nobody writes: kernels take writable and read-only arrays for two types and compile for
        # each.
        array: np.ndarray = np.load(file, mmap_mode="c", allow_pickle=False)
        return array.view(np.ndarray)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptPool(f"pool {folder}: {file.name} cannot be read ({error}). Build the pool anew.") from None


def _checksum(file: Path) -> int:
    crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _sort_backwards(tokens: np.ndarray) -> np.ndarray:
    """Prefix doubling, backwards: ranks by the last 1, 2, 4, … DEPTH tokens before each position, until all differ."""
    before = np.arange(len(tokens)) - np.maximum.accumulate(np.where(tokens == BORDER, np.arange(len(tokens)) + 1, 0))
    before = np.maximum(before, 0)  # tokens between a position and the border before it
    positions = np.flatnonzero((before > 0) & (tokens != BORDER))
    rank = np.zeros(len(tokens), dtype=np.int64)
    # Positions at a border are keys of nobody's, but the second half of no key either: only p - k with k < before[p]
    # are read.
    rank[1:] = tokens[:-1].astype(np.int64) + 1
    order = positions
    width = 1
    while width <= DEPTH and len(positions):
        if width == 1:
            key = rank[positions]
        else:
            half = width // 2
            beyond = before[positions] > half
            key = rank[positions] * (len(tokens) + 1)
            key[beyond] += rank[positions[beyond] - half]
        by_key = np.argsort(key, kind="stable")
        order, key = positions[by_key], key[by_key]
        new = np.concatenate([[True], key[1:] != key[:-1]])
        rank[order] = np.cumsum(new)
        if new.all():
            break
        width *= 2
    return order.astype(np.int32)


@compiled
def _shared_lengths(tokens: np.ndarray, order: np.ndarray) -> np.ndarray:
    shared = np.zeros(len(order), dtype=np.uint8)
    for i in range(1, len(order)):
        a, b, n = order[i - 1] - 1, order[i] - 1, 0
        while n < DEPTH and a >= 0 and b >= 0 and tokens[a] == tokens[b] and tokens[a] != BORDER:
            a -= 1
            b -= 1
            n += 1
        shared[i] = n
    return shared
