"""Who is forgotten: user ids as keyed hashes, which every lookup and every stage asks before it says a word.

    forgotten/key                    32 random bytes, made once per workspace
    forgotten/<run>/tombstones.bin   a record for each id of one `owlrec forget`; written first, never changed

The id itself is not kept: what is stored is BLAKE2b of it under the workspace's key, beside 20 bits of a cheaper hash,
so that of the millions of ids in a table only one in 2^20 per tombstone is hashed in Python. Key and file
together tell whether a given id was forgotten, which is what they are for.
"""

import hashlib
import os
import struct
import threading
import time
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from owlrec.errors import WorkspaceError
from owlrec.schema import shard_of
from owlrec.storage import Storage, fingerprint

FOLDER = "forgotten"
_KEY = f"{FOLDER}/key"
_KEY_BYTES = 32
_FILE = "tombstones.bin"
_BUCKETS = 1 << 20
_ONE, _TWO = struct.Struct("<q"), struct.Struct("<QQ")
_RECORD = np.dtype([("bucket", "<u4"), ("low", "<u8"), ("high", "<u8")])
_FEW = 16  # ids that are hashed one by one sooner than numpy has begun
_FRESH_S = 0.5  # how long what was read is believed: a server promises two seconds


class Tombstones:
    """A set of user ids that can be asked, not listed."""

    def __init__(self, key: bytes = b"", records: np.ndarray | None = None) -> None:
        """key: the workspace's. records: one for each id (see _records)."""
        self._key, self._records = key, np.zeros(0, _RECORD) if records is None else np.unique(records)
        self._digests = set(self._records[["low", "high"]].tolist())
        self._buckets = np.zeros(_BUCKETS if len(self._records) else 0, dtype=bool)
        self._buckets[self._records["bucket"]] = True
        #: Changes when anybody is added; "" where nobody is forgotten.
        self.mark = hashlib.blake2b(self._records.tobytes(), digest_size=4).hexdigest() if len(self._records) else ""

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, id_: int) -> bool:
        return bool(self._digests) and _digest(self._key, id_) in self._digests

    def among(self, ids: np.ndarray | Iterable[int]) -> np.ndarray:
        """Which of some user ids are forgotten: bool [n]. ids: int64 [n]."""
        ids = np.asarray(ids, dtype=np.int64)
        if not len(self):
            return np.zeros(len(ids), dtype=bool)
        if len(ids) <= _FEW:
            return np.array([_digest(self._key, id_) in self._digests for id_ in ids.tolist()], dtype=bool)
        found: np.ndarray = self._buckets[_bucket(self._key, ids)]
        for at in np.flatnonzero(found).tolist():
            found[at] = _digest(self._key, int(ids[at])) in self._digests
        return found

    def without(self, table: pa.Table, column: str = "user_id") -> pa.Table:
        """The rows of a table whose user is not forgotten. column: of the ids; a null is nobody."""
        if not len(self) or not len(table):
            return table
        return table.filter(pa.array(~self.among(table[column].fill_null(-1).to_numpy())))

    def to_bytes(self) -> bytes:
        """Key and records, as `from_bytes` takes them: for a copy in another store."""
        return self._key + self._records.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Tombstones":
        """What `to_bytes` gave."""
        return cls(data[:_KEY_BYTES], np.frombuffer(data[_KEY_BYTES:], _RECORD))


class _Latest:
    """What a process has read last of each storage. A run's file never changes, so each is read once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, tuple[float, tuple[str, ...], Tombstones]] = {}

    def get(self, storage: Storage) -> Tombstones:
        with self._lock:
            read, names, tombstones = self._runs.get(storage.base, (0.0, (), Tombstones()))
        if time.monotonic() - read < _FRESH_S and read:
            return tombstones
        # `key` is not a run, and a run whose folder was removed by hand has no file.
        now = tuple(name for name in storage.names(FOLDER) if name != "key")
        if now != names:
            paths = [f"{FOLDER}/{name}/{_FILE}" for name in now]
            records = [np.frombuffer(storage.read_bytes(p), _RECORD) for p in paths if storage.entry(p) is not None]
            if len(records) == len(now):
                names = now  # else a run is being written: look again
            tombstones = Tombstones(storage.read_bytes(_KEY), np.concatenate(records)) if records else Tombstones()
        with self._lock:
            self._runs[storage.base] = (time.monotonic(), names, tombstones)
        return tombstones

    def drop(self, storage: Storage) -> None:
        with self._lock:
            self._runs.pop(storage.base, None)


_latest = _Latest()


def read_tombstones(storage: Storage) -> Tombstones:
    """Who is forgotten in a workspace, at most half a second ago."""
    return _latest.get(storage)


def write_tombstones(storage: Storage, ids: np.ndarray) -> str:
    """Forgets some users from now on; the folder of this run, the same for the same ids.

    ids: int64 [n]. Raises WorkspaceError where the workspace cannot be written.
    """
    storage.create_bytes(_KEY, os.urandom(_KEY_BYTES))
    key = storage.read_bytes(_KEY)
    if len(key) != _KEY_BYTES:
        raise WorkspaceError(f"{storage.path(_KEY)} has {len(key)} bytes, not {_KEY_BYTES}. Restore it from a backup.")
    records = np.unique(_records(key, np.unique(np.asarray(ids, dtype=np.int64))))
    folder = f"{FOLDER}/{fingerprint(records.tobytes().hex())[:16]}"
    storage.create_bytes(f"{folder}/{_FILE}", records.tobytes())
    _latest.drop(storage)
    return folder


def _records(key: bytes, ids: np.ndarray) -> np.ndarray:
    records = np.zeros(len(ids), _RECORD)
    records["bucket"] = _bucket(key, ids)
    digests = [_digest(key, id_) for id_ in ids.tolist()]
    for column, name in enumerate(("low", "high")):
        records[name] = [digest[column] for digest in digests]
    return records


def _bucket(key: bytes, ids: np.ndarray) -> np.ndarray:
    mixed = shard_of(ids ^ np.int64(int.from_bytes(key[:8], "little", signed=True)), 1 << 62)
    return shard_of(mixed, _BUCKETS)


def _digest(key: bytes, id_: int) -> tuple[int, int]:
    low, high = _TWO.unpack(hashlib.blake2b(_ONE.pack(id_), key=key, digest_size=16).digest())
    return low, high
