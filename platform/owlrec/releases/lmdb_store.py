"""The embedded store: one LMDB file a release, memory-mapped, so that all processes of a machine share its pages.

Four databases stand in the file: `knowledge` (JSON text), `vectors` (raw float16), `memberships` (cohort ids, each as
eight big-endian bytes) and `codes` (semantic ids as owlrec.encoding.packed_codes writes them; empty: none). A key is
one byte for the kind and the id as eight big-endian bytes, so that byte order is numeric order; vectors of older
interest partitions follow their id's newest one, under its key and one byte more. LMDB's lock file is not used: one
process writes a file that nobody else sees yet (owlrec.releases.lmdb_writer), and afterwards it never changes.
"""

import struct
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from pydantic_core import from_json

from owlrec.encoding.packed_codes import unpack_codes
from owlrec.errors import ReleaseError, did_you_mean
from owlrec.releases.interface import Knowledge, KnowledgeStore

DATABASES = ("knowledge", "vectors", "memberships", "codes")
_ADDED_LATER = ("memberships", "codes")  # files of the first releases lack them
KEY_BYTES = 9
LAST_PARTITION = 255  # one byte of a key
_KIND_BYTES = {"user": b"u", "item": b"i", "cohort": b"c"}
_KINDS = {value: kind for kind, value in _KIND_BYTES.items()}
_KEY = struct.Struct(">cq")
_ROWS_A_READ = 1000  # about 1 MB of texts


def encode_key(kind: str, id_: int, partition: int = 0) -> bytes:
    """The nine bytes under which a row stands, ten for an older partition. Raises ReleaseError for an unknown kind."""
    if kind not in _KIND_BYTES:
        raise ReleaseError(f"kind '{kind}' is none that a release holds.{did_you_mean(kind, _KIND_BYTES)}")
    key = _KEY.pack(_KIND_BYTES[kind], id_)
    return key + bytes([partition]) if partition else key


def decode_key(key: bytes) -> tuple[str, int]:
    """The kind and the id that a key stands for."""
    kind, id_ = _KEY.unpack(key[:KEY_BYTES])
    return _KINDS[kind], id_


def encode_cohorts(cohorts: Sequence[int]) -> bytes:
    """The value of a membership."""
    return struct.pack(f">{len(cohorts)}q", *cohorts)


class RowStore(KnowledgeStore):
    """What a database answers that holds the rows of an LMDB file under the same keys."""

    def __init__(self, where: str, counts: Mapping[str, int], code_sizes: Mapping[str, Sequence[int]]) -> None:
        """where: the file or server, for errors. counts, code_sizes: as the release's manifest states."""
        self._where, self._counts, self._code_sizes = where, counts, code_sizes

    @abstractmethod
    def _values(self, database: str, kind: str, ids: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """The bytes under each id in a database, which an older release may lack. Raises ReleaseError for an unknown
        kind.
        """

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        values = self._values("knowledge", kind, ids)
        return [None if v is None else self._knowledge(kind, int(id_), v) for id_, v in zip(ids, values, strict=True)]

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.own_codes."""
        sizes = self._code_sizes.get(kind, ())
        values = self._values("codes", kind, ids)
        return [None if v is None else unpack_codes(v, sizes) if v else () for v in values]

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.memberships."""
        values = self._values("memberships", kind, ids)
        return [None if v is None else struct.unpack(f">{len(v) // 8}q", v) for v in values]

    def count(self, kind: str) -> int:
        """See KnowledgeStore.count."""
        return self._counts.get(kind, 0)

    def _knowledge(self, kind: str, id_: int, value: bytes) -> Knowledge:
        try:
            fields = from_json(value)
            return Knowledge(kind, id_, fields["as_of"], fields["text"], fields["framework"], fields["quality"])
        except (ValueError, KeyError) as error:
            raise ReleaseError(
                f"{self._where}: the row of {kind} {id_} is unreadable ({error!r}). The store is corrupt: "
                f"roll back to the previous release, or publish again."
            ) from None


class LmdbStore(RowStore):
    """Reads one LMDB file. Threads may share a store, and two stores of a process may share a file."""

    def __init__(
        self,
        path: Path,
        *,
        dim: int,
        counts: dict[str, int],
        code_sizes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """dim, counts, code_sizes: as the release's manifest states. Raises ReleaseError where the file is no store.

        The file's size must have been checked by the caller: LMDB answers a truncated file with SIGBUS, not with an
        error.
        """
        super().__init__(str(path.resolve()), counts, code_sizes or {})
        self.path = path
        self._dim = dim
        self._closed = False
        self._env, self._databases = _shared_environments.acquire(self._where)

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors."""
        found = np.zeros((len(ids), n, self._dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        older = range(1, min(n, LAST_PARTITION + 1))
        with self._env.begin(db=self._databases["vectors"], buffers=True) as transaction:
            for row, id_ in enumerate(ids):
                value = transaction.get(encode_key(kind, int(id_)))
                if value is None:
                    continue
                found[row, 0] = np.frombuffer(value, dtype=np.float16)
                mask[row, 0] = True
                for partition in older:
                    value = transaction.get(encode_key(kind, int(id_), partition))
                    if value is not None:
                        found[row, partition] = np.frombuffer(value, dtype=np.float16)
                        mask[row, partition] = True
        return found, mask

    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """See KnowledgeStore.ids."""
        n = self.count(kind) if limit is None else min(limit, self.count(kind))
        found = np.zeros(n, dtype=np.int64)
        with self._env.begin(db=self._databases["knowledge"]) as transaction:
            cursor = transaction.cursor()
            cursor.set_range(encode_key(kind, 0))
            for row, key in zip(range(n), cursor.iternext(values=False), strict=False):
                found[row] = decode_key(key)[1]
        return found

    def close(self) -> None:
        """See KnowledgeStore.close."""
        if not self._closed:
            self._closed = True
            _shared_environments.release(self._where)

    def rows(self, database: str) -> int:
        """How many rows the file itself holds in one of its databases."""
        if database not in self._databases:
            return 0
        with self._env.begin() as transaction:
            return int(transaction.stat(self._databases[database])["entries"])

    def raw(self, database: str, key: bytes) -> bytes | None:
        """The bytes stored under a key, for the verification of a release."""
        with self._env.begin(db=self._databases[database]) as transaction:
            value: bytes | None = transaction.get(key)
        return value

    def items(self, database: str) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values of a database as they stand in the file, ascending by key."""
        after = b""
        while database in self._databases:
            # No transaction outlives a batch, so that the store may be closed while an iterator is still around.
            with self._env.begin(db=self._databases[database]) as transaction:
                cursor = transaction.cursor()
                if not cursor.set_range(after):
                    return
                batch = list(islice(cursor.iternext(), _ROWS_A_READ))
            yield from batch
            after = batch[-1][0] + b"\0"  # the least key above it

    def missing(self, database: str, keys: Iterable[bytes]) -> list[bytes]:
        """Those of `keys` that a database does not hold."""
        with self._env.begin(db=self._databases[database], buffers=True) as transaction:
            return [key for key in keys if transaction.get(key) is None]

    def _values(self, database: str, kind: str, ids: Sequence[int] | np.ndarray) -> list[bytes | None]:
        keys = [encode_key(kind, int(id_)) for id_ in ids]
        if database not in self._databases:
            return [None] * len(keys)
        with self._env.begin(db=self._databases[database]) as transaction:
            return [transaction.get(key) for key in keys]


class _SharedEnvironments:
    """LMDB refuses to open a file twice in one process, so stores on the same file share one environment and count its
    users.
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
        # Without read-ahead: lookups are random, and reading 128 kB for each would evict pages that are wanted.
        env = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False, max_dbs=len(DATABASES))
        databases = {}
        for name in DATABASES:
            try:
                databases[name] = env.open_db(name.encode(), create=False)
            except lmdb.NotFoundError:
                if name not in _ADDED_LATER:
                    env.close()
                    raise
        return env, databases
    except lmdb.Error as error:
        raise ReleaseError(
            f"{path} is no release store ({error}). Roll back to the previous release, or publish again."
        ) from None
