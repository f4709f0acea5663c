"""The embedded store: the parts of a release as LMDB files, mapped into memory, so all processes of a machine
share their pages.

An id's part comes from its hash (`part_of`). A part is written once, in ascending order of its keys, so its pages are
full and nothing is read while it is written. LMDB's lock file is not used, since one process writes a file that no
other process sees yet, and afterwards it never changes.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from owlrec.errors import ReleaseError
from owlrec.ids import shard_of
from owlrec.machine import CachedFile
from owlrec.releases.format import DATABASES, RowStore, decode_keys, encode_key, encode_keys

_IDS_AT_ONCE = 20_000
_READ_ROWS = 1000  # about 1 MB of texts
_WORD = (1 << 64) - 1


def part_of(id_: int, n_parts: int) -> int:
    """Part of one id: ids.shard_of without numpy, whose calls would take longer than the lookup."""
    x = ((id_ & _WORD) ^ ((id_ & _WORD) >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return (x ^ (x >> 31)) & (n_parts - 1)


class LmdbFile:
    """Reads one part. Threads may share it, and two in a process may read the same file."""

    def __init__(self, path: Path, copy: CachedFile | None = None) -> None:
        """copy: the copy in the node's cache behind the path; closed with the file. Raises ReleaseError if the
        file is not a part.

        The caller must have checked the file's size: LMDB reacts to a truncated file with SIGBUS, not with an
        error.
        """
        self.path, self._copy = path, copy
        self._name = str(path.resolve())
        self._closed = False
        self._env, self._databases = _shared_environments.acquire(self._name)

    def get(self, database: str, key: bytes) -> bytes | None:
        """Value under a key."""
        with self._env.begin(db=self._databases[database]) as transaction:
            value: bytes | None = transaction.get(key)
        return value

    def get_many(self, database: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values under many keys, aligned, in one transaction: faster than `getmulti` and a dict."""
        with self._env.begin(db=self._databases[database]) as transaction:
            get = transaction.get
            return [get(key) for key in keys]

    def rows(self, database: str) -> int:
        """Number of rows in a database."""
        with self._env.begin() as transaction:
            return int(transaction.stat(self._databases[database])["entries"])

    def items(self, database: str) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values of a database, ascending by key."""
        after = b""
        while True:
            # No transaction outlives a batch, so the file may be closed while an iterator still exists.
            with self._env.begin(db=self._databases[database]) as transaction:
                cursor = transaction.cursor()
                if not cursor.set_range(after):
                    return
                batch = list(islice(cursor.iternext(), _READ_ROWS))
            yield from batch
            after = batch[-1][0] + b"\0"  # the smallest key above it

    def ids(self, kind: str, limit: int | None = None, database: str = "knowledge") -> np.ndarray:
        """Ids of a kind with a row in a database, at most `limit`: int64, ascending."""
        first, pieces, left = encode_key(kind, 0), [np.zeros(0, dtype=np.int64)], limit
        with self._env.begin(db=self._databases[database]) as transaction:
            cursor = transaction.cursor()
            keys = cursor.iternext(values=False) if cursor.set_range(first) else iter(())
            while batch := list(islice(keys, _IDS_AT_ONCE if left is None else min(left, _IDS_AT_ONCE))):
                kinds, ids = decode_keys(batch)
                pieces.append(ids[kinds == first[0]])
                left = None if left is None else left - len(pieces[-1])
                if len(pieces[-1]) < len(batch):
                    break
        return np.concatenate(pieces)

    def close(self) -> None:
        """Closes the file. Safe to call twice."""
        if not self._closed:
            self._closed = True
            _shared_environments.release(self._name)
            if self._copy:
                self._copy.close()

    def __enter__(self) -> "LmdbFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class LmdbStore(RowStore):
    """Reads the parts of one release; threads may share it."""

    def __init__(
        self,
        where: str,
        n_parts: int,
        open_part: Callable[[int], LmdbFile],
        *,
        dim: int,
        counts: Mapping[str, int],
        partitions: Mapping[str, int],
        code_sizes: Mapping[str, Sequence[int]],
    ) -> None:
        """n_parts: a power of two. open_part: called for a part when one of its ids is first requested. For the others,
        see RowStore.
        """
        super().__init__(where, dim=dim, counts=counts, partitions=partitions, code_sizes=code_sizes)
        self._parts: list[LmdbFile | None] = [None] * n_parts
        self._open_part = open_part
        self._lock = threading.Lock()

    def open_all(self, threads: int) -> None:
        """Opens all parts, some at a time, so that no request waits for one."""
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self._part, range(len(self._parts))):
                pass

    def values(
        self, database: str, kind: str, ids: Sequence[int] | np.ndarray, partition: int = 0
    ) -> list[bytes | None]:
        """See RowStore.values: one transaction per part."""
        n_parts = len(self._parts)
        if len(ids) == 1:
            id_ = int(ids[0])
            part = self._part(part_of(id_, n_parts) if n_parts > 1 else 0)
            return [part.get(database, encode_key(kind, id_, partition))]
        wanted = np.asarray(ids, dtype=np.int64)
        keys = encode_keys(kind, wanted, partition)
        if n_parts == 1:
            return self._part(0).get_many(database, keys)
        homes = shard_of(wanted, n_parts)
        order = np.argsort(homes, kind="stable")
        bounds = np.flatnonzero(np.diff(homes[order], prepend=-1, append=n_parts))
        values: list[bytes | None] = [None] * len(keys)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            rows = order[start:end].tolist()
            answers = self._part(int(homes[rows[0]])).get_many(database, [keys[row] for row in rows])
            for row, value in zip(rows, answers, strict=True):
                values[row] = value
        return values

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        pieces = [self._part(number).ids(kind, limit) for number in range(len(self._parts))]
        return np.sort(np.concatenate(pieces))[:limit]

    def vector_ids(self, kind: str) -> np.ndarray:
        """Ids of a kind with a vector, ascending: for deltas, which are small."""
        pieces = [self._part(number).ids(kind, database="vectors") for number in range(len(self._parts))]
        return np.unique(np.concatenate(pieces))

    def close(self) -> None:
        """See KnowledgeStore.close."""
        for part in self._parts:
            if part is not None:
                part.close()

    def _part(self, number: int) -> LmdbFile:
        part = self._parts[number]
        if part is None:
            opened = self._open_part(number)
            with self._lock:  # not during opening, so several can be fetched at once
                part = self._parts[number]
                if part is None:
                    part = self._parts[number] = opened
                else:
                    opened.close()
        return part


def warm(path: Path) -> None:
    """Asks the kernel to read a file ahead, so the first lookups do not wait for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


class _SharedEnvironments:
    """LMDB refuses to open a file twice in one process, so stores on the same file share one environment with a
    reference count.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Any, dict[str, Any], int]] = {}

    def acquire(self, path: str) -> tuple[Any, dict[str, Any]]:
        with self._lock:
            if path in self._open:
                env, databases, users = self._open[path]
            else:
                (env, databases), users = _open_readonly(path), 0
            self._open[path] = (env, databases, users + 1)
            return env, databases

    def release(self, path: str) -> None:
        with self._lock:
            env, databases, users = self._open.pop(path)
            if users > 1:
                self._open[path] = (env, databases, users - 1)
            else:
                env.close()


_shared_environments = _SharedEnvironments()


def _open_readonly(path: str) -> tuple[Any, dict[str, Any]]:
    try:
        # Without read-ahead: lookups are random, and reading 128 kB for each would evict useful pages.
        env = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False, max_dbs=len(DATABASES))
        try:
            return env, {name: env.open_db(name.encode(), create=False) for name in DATABASES}
        except lmdb.Error:
            env.close()
            raise
    except lmdb.Error as error:
        raise ReleaseError(
            f"{path} is not part of a release ({error}). Roll back to the previous release, or publish again."
        ) from None
