"""The layout of a workspace, which contains all artifacts of a run:

    workspace.json                       number of shards per kind, fixed by the first `prepare`
    tables/<name>/00000000.parquet       users, items, interactions, histories, samples
    cohorts/<fingerprint>/               memberships by shard, prompts, the model; cohorts/CURRENT names the newest
    knowledge/<fingerprint>/<kind>/      texts by shard; dead/<kind>/ for failed rows
    vectors/<fingerprint>/<source>-<kind>/   encoded texts by shard; quantizers/ next to them
    soft-labels/<fingerprint>/user/      an LLM's probabilities of pairs by shard; dead/user/ for failed rows
    releases/<name>/                     immutable; releases/CURRENT names the current one
    refresh/<fingerprint>/               inputs and results of a refresh; refresh/CURRENT names the last one
    refresh/items/                       rows of the items table that came after `prepare`
    ctr/, reports/, logs/                trained models, files for people
    <artifact>/cards/<kind>/00000000.json    "this shard is done" (owlrec.shards)
    stages/<stage>.json                  "this stage is done"
    forgotten/<run>/                     forgotten users as keyed hashes, and reports of erasures (owlrec.workspace)

A row's shard is its id's hash modulo the number of shards of its kind, a power of two, so more users move no rows.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ValidationError

from owlrec.errors import WorkspaceError
from owlrec.ids import TABLE_KINDS, Kind, shard_of
from owlrec.storage import Storage, fingerprint

if TYPE_CHECKING:
    import pyarrow as pa  # imported where a table is read or written: a lookup needs no Arrow

# ----------------------------------------------------------------------------------------------------------- tombstones
# Forgotten users: user ids as keyed hashes, checked by every lookup and every stage.
#
#     forgotten/key                    32 random bytes, made once per workspace
#     forgotten/<run>/tombstones.bin   one record per id of one `owlrec forget`; written first, never changed
#
# The id itself is not stored: the record is BLAKE2b of it under the workspace's key, plus 20 bits of a cheaper
# hash, so of the millions of ids in a table only one in 2^20 per tombstone is hashed in Python. Key and file
# together can show whether a given id was forgotten, which is their purpose.


TOMBSTONES = "forgotten"
_KEY = f"{TOMBSTONES}/key"
_KEY_BYTES = 32
_TOMBSTONES_FILE = "tombstones.bin"
_BUCKETS = 1 << 20
_ONE, _TWO = struct.Struct("<q"), struct.Struct("<QQ")
_RECORD = np.dtype([("bucket", "<u4"), ("low", "<u8"), ("high", "<u8")])
_FEW = 16  # up to this many ids, a loop is faster than numpy
_FRESH_S = 0.5  # lifetime of cached tombstones; a server promises two seconds


class Tombstones:
    """A set of user ids that supports tests of membership but not listing."""

    def __init__(self, key: bytes = b"", records: np.ndarray | None = None) -> None:
        """key: the workspace's. records: one per id (see _records)."""
        self._key, self._records = key, np.zeros(0, _RECORD) if records is None else np.unique(records)
        self._digests = set(self._records[["low", "high"]].tolist())
        self._buckets = np.zeros(_BUCKETS if len(self._records) else 0, dtype=bool)
        self._buckets[self._records["bucket"]] = True
        #: Changes when users are added; "" if nobody is forgotten.
        self.mark = hashlib.blake2b(self._records.tobytes(), digest_size=4).hexdigest() if len(self._records) else ""

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, id_: int) -> bool:
        return bool(self._digests) and _digest(self._key, id_) in self._digests

    def among(self, ids: np.ndarray | Iterable[int]) -> np.ndarray:
        """Forgotten ones among some user ids: bool [n]. ids: int64 [n]."""
        ids = np.asarray(ids, dtype=np.int64)
        if not len(self):
            return np.zeros(len(ids), dtype=bool)
        if len(ids) <= _FEW:
            return np.array([_digest(self._key, id_) in self._digests for id_ in ids.tolist()], dtype=bool)
        forgotten: np.ndarray = self._buckets[_bucket(self._key, ids)]
        for at in np.flatnonzero(forgotten).tolist():
            forgotten[at] = _digest(self._key, int(ids[at])) in self._digests
        return forgotten

    def without(self, table: pa.Table, column: str = "user_id") -> pa.Table:
        """Rows of a table whose user is not forgotten. column: of the ids; a null is nobody."""
        import pyarrow as pa

        if not len(self) or not len(table):
            return table
        return table.filter(pa.array(~self.among(table[column].fill_null(-1).to_numpy())))

    def to_bytes(self) -> bytes:
        """Key and records for `from_bytes`, for a copy in another store."""
        return self._key + self._records.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Tombstones:
        """Parses the output of `to_bytes`."""
        return cls(data[:_KEY_BYTES], np.frombuffer(data[_KEY_BYTES:], _RECORD))


class _Latest:
    """Latest tombstones that a process has read from each storage. A run's file never changes, so each is read once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, tuple[float, tuple[str, ...], Tombstones]] = {}

    def get(self, storage: Storage) -> Tombstones:
        with self._lock:
            read, names, tombstones = self._runs.get(storage.base, (0.0, (), Tombstones()))
        if time.monotonic() - read < _FRESH_S and read:
            return tombstones
        # `key` is not a run, and a run whose folder was removed by hand has no file.
        now = tuple(name for name in storage.names(TOMBSTONES) if name != "key")
        if now != names:
            paths = [f"{TOMBSTONES}/{name}/{_TOMBSTONES_FILE}" for name in now]
            records = [np.frombuffer(storage.read_bytes(p), _RECORD) for p in paths if storage.entry(p) is not None]
            if len(records) == len(now):
                names = now  # otherwise a run is being written: list again
            tombstones = Tombstones(storage.read_bytes(_KEY), np.concatenate(records)) if records else Tombstones()
        with self._lock:
            self._runs[storage.base] = (time.monotonic(), names, tombstones)
        return tombstones

    def drop(self, storage: Storage) -> None:
        with self._lock:
            self._runs.pop(storage.base, None)


_latest = _Latest()


def read_tombstones(storage: Storage) -> Tombstones:
    """Forgotten users of a workspace, at most half a second old."""
    return _latest.get(storage)


def write_tombstones(storage: Storage, ids: np.ndarray) -> str:
    """Forgets some users from now on; returns the folder of this run, the same for the same ids.

    ids: int64 [n]. Raises WorkspaceError if the workspace cannot be written.
    """
    storage.create_bytes(_KEY, os.urandom(_KEY_BYTES))
    key = storage.read_bytes(_KEY)
    if len(key) != _KEY_BYTES:
        raise WorkspaceError(f"{storage.path(_KEY)} has {len(key)} bytes, not {_KEY_BYTES}. Restore it from a backup.")
    records = np.unique(_records(key, np.unique(np.asarray(ids, dtype=np.int64))))
    folder = f"{TOMBSTONES}/{fingerprint(records.tobytes().hex())[:16]}"
    storage.create_bytes(f"{folder}/{_TOMBSTONES_FILE}", records.tobytes())
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


# ------------------------------------------------------------------------------------------------------------ workspace


FORMAT = 2  # 1 was the first edition, which had no workspace.json
ITEM_UPDATES = "refresh/items"  # an artifact: rows of items, by shard, that override the prepared table
_FILE = "workspace.json"
_TRIES = 10


class Layout(BaseModel):
    """The content of workspace.json."""

    format: int = FORMAT
    shards: dict[str, int] = {}  # by kind: powers of two


class Workspace(Storage):
    """A storage with OwlRec's layout."""

    _layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """workspace.json, read once; empty if nothing has been prepared.

        Raises WorkspaceError for a workspace of the first edition, or of a newer OwlRec.
        """
        if self._layout is None:
            layout = self._read_layout()[0]
            if layout.shards:
                self._layout = layout
            return layout
        return self._layout

    def n_shards(self, kind: Kind) -> int:
        """Number of shards of a kind. Raises WorkspaceError if it was never prepared."""
        shards = self.layout.shards.get(kind)
        if shards is None:
            raise WorkspaceError(
                f"{self.path(_FILE)} does not set the number of {kind} shards. Run `prepare` first, with the "
                "same recipe."
            )
        return shards

    def fix_shards(self, shards: Mapping[Kind, int]) -> None:
        """Fixes the numbers of shards of kinds without one; others keep theirs."""
        for n in shards.values():
            if n < 1 or n & (n - 1):
                raise ValueError(f"{n} shards: the number must be a power of two to grow by splitting")
        self._swap_layout({str(kind): n for kind, n in shards.items()} | self._read_layout()[0].shards)

    def grow_shards(self, shards: Mapping[Kind, int]) -> None:
        """Replaces numbers of shards; only for `reshard`, once every file is in its new place."""
        self._swap_layout(self._read_layout()[0].shards | {str(kind): n for kind, n in shards.items()})

    def _swap_layout(self, shards: Mapping[str, int]) -> None:
        for _ in range(_TRIES):
            layout, e_tag = self._read_layout()
            wanted = Layout(shards=dict(sorted(shards.items())))
            self._layout = wanted
            data = wanted.model_dump_json(indent=2).encode()
            if wanted == layout or self.swap_bytes(_FILE, data, e_tag) is not None:
                return
        raise WorkspaceError(f"{self.path(_FILE)} was changed by other processes {_TRIES} times in a row. Try again.")

    def _read_layout(self) -> tuple[Layout, str | None]:
        if self.entry(_FILE) is None:
            if self.exists("manifests"):
                raise WorkspaceError(
                    f"{self.root} was written by the first edition of OwlRec, and this edition cannot read its "
                    "files. Use another workspace in the recipe."
                )
            return Layout(), None
        data, e_tag = self.read_tagged(_FILE)
        try:
            layout = Layout.model_validate_json(data)
        except ValidationError as error:
            raise WorkspaceError(f"{self.path(_FILE)} is unreadable ({error}). Restore it from a backup.") from None
        if layout.format > FORMAT:
            raise WorkspaceError(f"{self.path(_FILE)} has format {layout.format}; this OwlRec reads {FORMAT}. Upgrade.")
        return layout, e_tag

    # Tables

    def table_shards(self, name: str) -> range:
        """Shards of a table. Raises WorkspaceError if `prepare` has not run."""
        return range(self.n_shards(TABLE_KINDS[name]))

    def read_shard(self, name: str, number: int, columns: list[str] | None = None) -> pa.Table:
        """One shard of a table: users and histories without forgotten ones, items with the rows
        added after `prepare` (then ascending by id). Raises WorkspaceError if it was never written.

        Samples refer to interactions by position: code that reads both must remove users afterwards.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        path = table_file(name, number)
        if name == "items" and self.entry(updated := f"{ITEM_UPDATES}/item/{shard_file(number)}") is not None:
            table = self.read_parquet(path, columns and list({*columns, "item_id"}))
            updates = as_texts(self.read_parquet(updated), table.schema)
            others = pc.invert(pc.is_in(table["item_id"], value_set=updates["item_id"].combine_chunks()))
            table = pa.concat_tables([table.filter(others), updates]).sort_by("item_id")
            return table.select(columns) if columns else table
        table = self.read_parquet(path, columns)
        if name in ("users", "histories") and len(gone := read_tombstones(self)):
            owners = table if "user_id" in table.column_names else self.read_parquet(path, ["user_id"])
            table = table.filter(pa.array(~gone.among(owners["user_id"].to_numpy())))
        return table

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """All shards of a table, in shard order: for small tables, and for tests. Raises the errors of read_shard."""
        import pyarrow as pa

        return pa.concat_tables([self.read_shard(name, number, columns) for number in self.table_shards(name)])

    def write_table(self, name: str, table: pa.Table, *, key: str, n_shards: int = 1) -> None:
        """Writes a small table by the hash of its `key` (an int64 column). Rows keep their order within a shard.

        n_shards: of the table's kind, if not yet fixed.
        """
        import pyarrow as pa

        kind = TABLE_KINDS[name]
        self.fix_shards({kind: n_shards})
        n = self.n_shards(kind)
        shards = shard_of(table[key].to_numpy(), n)
        order = np.argsort(shards, kind="stable")
        bounds = np.searchsorted(shards[order], np.arange(n + 1))
        for number in range(n):
            rows = order[bounds[number] : bounds[number + 1]]
            self.write_parquet(table_file(name, number), table.take(pa.array(rows)))

    def log_path(self, name: str) -> Path:
        """A local file for third-party logs: in the workspace, or in the temporary folder if that is remote."""
        base = self.local_path("logs") if self.local else Path("/tmp/owlrec-logs") / fingerprint(self.root)[:8]
        base.mkdir(parents=True, exist_ok=True)
        return base / f"{name}.log"


def as_texts(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of items in the columns of another items table: missing values are empty, and texts and lists of texts are
    converted to each other.
    """
    import pyarrow as pa

    return pa.table([_as_texts(table, field) for field in schema], schema=schema)


def _as_texts(table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    import pyarrow as pa

    is_list = pa.types.is_list(field.type)
    if field.name not in table.column_names:
        return pa.array([[] if is_list else ""] * len(table), field.type)
    column = table[field.name]
    if is_list and not pa.types.is_list(column.type):
        return pa.array([[text] if text else [] for text in column.to_pylist()], field.type)
    if pa.types.is_list(column.type) and not is_list:
        return pa.array([", ".join(texts or ()) for texts in column.to_pylist()], field.type)
    return column.cast(field.type)


def shard_file(number: int, suffix: str = ".parquet") -> str:
    """File name of a shard: eight digits, so order by name is order by number."""
    return f"{number:08d}{suffix}"


def table_file(name: str, number: int) -> str:
    """Path of a table's shard, relative to the workspace."""
    return f"tables/{name}/{shard_file(number)}"


def shards_for(rows: int, rows_per_shard: int) -> int:
    """Power of two of shards for `rows`, with about `rows_per_shard` or fewer each."""
    return 1 << (max(1, -(-rows // rows_per_shard)) - 1).bit_length()
