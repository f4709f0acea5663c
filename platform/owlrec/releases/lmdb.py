"""The embedded store: the parts of a release as LMDB files, mapped into memory, so that all processes of a machine
share their pages.

An id's part is its hash's (`part_of`). A part is written once, in ascending order of its keys, so that its pages are
full and nothing is read while it is written; LMDB's lock file is not used, since one process writes a file that nobody
else sees yet and afterwards it never changes.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress, islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.compression import pack_codes
from owlrec.encoding.vectors import codes_of
from owlrec.errors import ReleaseError, SchemaError, WorkspaceError
from owlrec.machine import CachedFile
from owlrec.releases.format import (
    DATABASES,
    KEY_BYTES,
    KEY_ORDER,
    LAST_PARTITION,
    RowStore,
    SemanticIdEntry,
    byte_rows,
    decode_keys,
    encode_behaviors,
    encode_key,
    encode_keys,
    encode_knowledge,
    encode_lists,
    kind_of,
    speaking,
)
from owlrec.schema import BEHAVIORS, KNOWLEDGE, MEMBERSHIPS, conform, shard_of
from owlrec.workspace import Tombstones

_TRANSACTION_ROWS = 20_000  # bounds the dirty pages LMDB holds in memory: about 20 MB of texts
_READ_ROWS = 1000  # about 1 MB of texts
_FIRST_MAP_BYTES = 64 << 20
_SAMPLE = 1000  # rows of each database whose bytes are kept, to be compared after the file was closed and opened again
_WORD = (1 << 64) - 1


def part_of(id_: int, n_parts: int) -> int:
    """The part of one id: schema.shard_of without numpy, whose calls would take longer than the lookup."""
    x = ((id_ & _WORD) ^ ((id_ & _WORD) >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return (x ^ (x >> 31)) & (n_parts - 1)


class LmdbFile:
    """Reads one part. Threads may share it, and two of a process may read the same file."""

    def __init__(self, path: Path, copy: CachedFile | None = None) -> None:
        """copy: the copy in the node's cache that the path is of; closed with the file. Raises ReleaseError where the
        file is not a part.

        The file's size must have been checked by the caller: LMDB answers a truncated file with SIGBUS, not with an
        error.
        """
        self.path, self._copy = path, copy
        self._name = str(path.resolve())
        self._closed = False
        self._env, self._databases = _shared_environments.acquire(self._name)

    def get(self, database: str, key: bytes) -> bytes | None:
        """The value under a key."""
        with self._env.begin(db=self._databases[database]) as transaction:
            value: bytes | None = transaction.get(key)
        return value

    def get_many(self, database: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values under many keys, aligned, by one cursor."""
        with self._env.begin(db=self._databases[database]) as transaction:
            known = dict(transaction.cursor().getmulti(keys))
        return [known.get(key) for key in keys]

    def rows(self, database: str) -> int:
        """How many rows a database holds."""
        with self._env.begin() as transaction:
            return int(transaction.stat(self._databases[database])["entries"])

    def items(self, database: str) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values of a database, ascending by key."""
        after = b""
        while True:
            # No transaction outlives a batch, so that the file may be closed while an iterator is still around.
            with self._env.begin(db=self._databases[database]) as transaction:
                cursor = transaction.cursor()
                if not cursor.set_range(after):
                    return
                batch = list(islice(cursor.iternext(), _READ_ROWS))
            yield from batch
            after = batch[-1][0] + b"\0"  # the least key above it

    def ids(self, kind: str, limit: int | None = None, database: str = "knowledge") -> np.ndarray:
        """The ids of a kind that a database has a row of, at most `limit`: int64, ascending."""
        first, pieces, left = encode_key(kind, 0), [np.zeros(0, dtype=np.int64)], limit
        with self._env.begin(db=self._databases[database]) as transaction:
            cursor = transaction.cursor()
            keys = cursor.iternext(values=False) if cursor.set_range(first) else iter(())
            while batch := list(islice(keys, _TRANSACTION_ROWS if left is None else min(left, _TRANSACTION_ROWS))):
                kinds, ids = decode_keys(batch)
                pieces.append(ids[kinds == first[0]])
                left = None if left is None else left - len(pieces[-1])
                if len(pieces[-1]) < len(batch):
                    break
        return np.concatenate(pieces)

    def close(self) -> None:
        """Closes it; calling it twice does no harm."""
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
        """n_parts: a power of two. open_part: called for a part when an id of it is first asked for. The others: see
        RowStore.
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
        """See RowStore.values: one cursor per part."""
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
        """The ids of a kind that have a vector, ascending: for deltas, which are small."""
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
            with self._lock:  # not while it opens: several may be fetched at once
                part = self._parts[number]
                if part is None:
                    part = self._parts[number] = opened
                else:
                    opened.close()
        return part


def warm(path: Path) -> None:
    """Asks the kernel to read a file ahead, so that the first lookups do not wait for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


class PartWriter:
    """Writes one part. Each database takes cohorts, then items, then users, and a kind's rows in one call."""

    def __init__(
        self,
        path: Path,
        *,
        codes: Mapping[str, SemanticIdEntry],
        dim: int = 0,
        tombstones: Tombstones | None = None,
    ) -> None:
        """path: the file to make; its folder exists, the file does not. codes: how semantic ids are written, by kind.
        dim: components of a vector; 0: the first one decides. tombstones: of users whose rows are left out.
        """
        self.path, self.dim = path, dim
        self.codes = codes
        self._tombstones = tombstones or Tombstones()
        self._env = lmdb.open(
            str(path),
            subdir=False,
            lock=False,
            max_dbs=len(DATABASES),
            map_size=_FIRST_MAP_BYTES,
            sync=False,
            metasync=False,
        )
        self._databases = {name: self._env.open_db(name.encode()) for name in DATABASES}
        # Rows by kind; `vectors` are the newest ones of their ids, `partitions` those of older interest partitions.
        self.counts: dict[str, dict[str, int]] = {name: {} for name in (*DATABASES, "partitions")}
        self.ids: dict[str, list[np.ndarray]] = {kind: [] for kind in KEY_ORDER}  # that have knowledge
        self.as_of: tuple[int, int] | None = None  # the earliest and the latest moment of its texts, ms
        self._samples: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in DATABASES}

    def add_knowledge(self, kind: str, table: pa.Table, *, name: str) -> None:
        """Writes the knowledge of a kind (schema.KNOWLEDGE), in any order.

        Raises SchemaError for a null or an id that occurs twice.
        """
        table = conform(table, KNOWLEDGE, name=name)
        _refuse_nulls(table, ("id", "as_of", "text"), name)
        if table.num_rows:
            bounds = pc.min_max(table["as_of"]).as_py()
            low, high = self.as_of or (bounds["min"], bounds["max"])
            self.as_of = min(low, bounds["min"]), max(high, bounds["max"])
        columns = ["id", "as_of", "text", "framework", "quality"]
        for batch in _ascending(table.select(columns), kind, "knowledge", name):
            keys = encode_keys(kind, batch["id"].to_numpy())
            self.add_rows("knowledge", keys, encode_knowledge(batch, name=name))

    def add_vectors(self, kind: str, table: pa.Table, *, name: str) -> None:
        """Writes the vectors of a kind (schema.vectors_schema), in any order; a column `partition`, where there is one,
        counts from 0, the newest or only vector of an id, to 255.

        The codes of partition 0 are the id's semantic id; a row without them says that it has none.
        Raises SchemaError where vectors differ in length, codes are not of these codebooks, or an id has an older
        partition and no newest one.
        """
        for column in ("id", "vector"):
            if column not in table.column_names:
                raise SchemaError(f"{name}: column '{column}' is missing. Run the encode stage again.")
        table = _with_partitions(table, name)
        _refuse_nulls(table, ("id", "vector", "partition"), name)
        last = None
        for batch in _ascending(table, kind, "vectors", name):
            ids, partitions = batch["id"].to_numpy(), batch["partition"].to_numpy()
            _refuse_headless(kind, ids, partitions, last)
            last = ids[-1]
            vectors = batch["vector"].combine_chunks()
            rows = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float16).reshape(len(ids), -1)
            if self.dim not in (0, rows.shape[1]):
                raise SchemaError(
                    f"{name}: its vectors have {rows.shape[1]} components, earlier ones {self.dim}. "
                    f"One release holds the vectors of one encoder: encode all of them again."
                )
            self.dim = rows.shape[1]
            if partitions.any():
                keys = [encode_key(kind, id_, p) for id_, p in zip(ids.tolist(), partitions.tolist(), strict=True)]
            else:
                keys = encode_keys(kind, ids)
            self.add_rows("vectors", keys, byte_rows(rows))
            if "codes" in batch.column_names:
                self._add_codes(kind, batch.filter(pc.equal(batch["partition"], 0)), name)

    def add_memberships(self, kind: str, table: pa.Table, *, name: str) -> None:
        """Writes the memberships of a kind (schema.MEMBERSHIPS), in any order; an empty list says that an id has no
        cohort.

        Raises SchemaError for a null or an id that occurs twice.
        """
        table = conform(table, MEMBERSHIPS, name=name)
        _refuse_nulls(table, ("id", "cohorts"), name)
        for batch in _ascending(table.select(["id", "cohorts"]), kind, "memberships", name):
            ids, lists = batch["id"].to_numpy(), batch["cohorts"].combine_chunks()
            if lists.flatten().null_count:
                row = next(row for row, cohorts in enumerate(lists.to_pylist()) if None in cohorts)
                raise SchemaError(f"{name}: the cohorts of {kind} {ids[row]} hold a null. Leave that cohort out.")
            self.add_rows("memberships", encode_keys(kind, ids), encode_lists(lists))

    def add_behaviors(self, table: pa.Table, *, name: str) -> None:
        """Writes the last behaviors of users (schema.BEHAVIORS), in any order.

        Raises SchemaError for a null, a user who occurs twice, or lists that are not aligned.
        """
        table = conform(table, BEHAVIORS, name=name)
        _refuse_nulls(table, BEHAVIORS.names, name)
        for batch in _ascending(table.select(BEHAVIORS.names), "user", "behaviors", name):
            try:
                values = encode_behaviors(batch)
            except ValueError as error:
                raise SchemaError(
                    f"{name}: the behaviors of a user are not aligned ({error}). Run `prepare`."
                ) from None
            self.add_rows("behaviors", encode_keys("user", batch["id"].to_numpy()), values)

    def add_rows(self, database: str, keys: list[bytes], values: list[bytes]) -> None:
        """Writes rows as they stand in a file, all keys above those before, in one transaction."""
        if len(self._tombstones):
            told = speaking(keys, self._tombstones)
            keys, values = list(compress(keys, told)), list(compress(values, told))
        if not keys:
            return
        while True:
            try:
                with self._env.begin(write=True, db=self._databases[database]) as transaction:
                    transaction.cursor().putmulti(zip(keys, values, strict=True), append=True)
                break
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
            except lmdb.Error as error:
                raise WorkspaceError(
                    f"{self.path} cannot be written ({error}). Free some space there and publish again: finished parts "
                    f"stay."
                ) from None
        self._keep_sample(database, keys, values)
        self._count(database, keys)

    def close(self) -> None:
        """Finishes the file and reads it back: row counts and a sample of rows. Raises ReleaseError where they differ
        from what was written.
        """
        self._env.sync(True)
        self._env.close()
        with LmdbFile(self.path) as file:
            for database in DATABASES:
                rows = sum(self.counts[database].values())
                rows += sum(self.counts["partitions"].values()) if database == "vectors" else 0
                sample = self._samples[database]
                same = file.get_many(database, [key for key, _ in sample]) == [value for _, value in sample]
                if file.rows(database) != rows or not same:
                    raise ReleaseError(
                        f"{self.path}: its {database} do not read back as they were written. Check the disk, then "
                        f"publish again; nothing was made visible."
                    )

    def abort(self) -> None:
        """Closes the file without making it durable."""
        self._env.close()

    def ids_bytes(self) -> bytes:
        """The content of the part's file of ids: those with knowledge, little-endian int64, kinds in KEY_ORDER."""
        return b"".join(ids.astype("<i8").tobytes() for kind in KEY_ORDER for ids in self.ids[kind])

    def _add_codes(self, kind: str, rows: pa.Table, name: str) -> None:
        codes, coded = codes_of(rows)
        entry = self.codes.get(kind)
        if entry is None:
            if coded.any():
                raise SchemaError(
                    f"{name}: vectors of kind '{kind}' have codes, but the release has no codebooks for them. "
                    "Publish them with their quantiser, or without codes."
                )
            return
        values = [b""] * len(rows)
        if coded.any():
            for row, value in zip(np.flatnonzero(coded).tolist(), pack_codes(codes[coded], entry.sizes), strict=True):
                values[row] = value
        self.add_rows("codes", encode_keys(kind, rows["id"].to_numpy()), values)

    def _count(self, database: str, keys: list[bytes]) -> None:
        older = [key for key in keys if len(key) > KEY_BYTES] if database == "vectors" else []
        newest = [key for key in keys if len(key) == KEY_BYTES] if older else keys
        for counted, name in ((newest, database), (older, "partitions")):
            kinds, ids = decode_keys(counted)
            for byte in np.unique(kinds).tolist():
                kind, of_kind = kind_of(byte), kinds == byte
                self.counts[name][kind] = self.counts[name].get(kind, 0) + int(of_kind.sum())
                if name == "knowledge":
                    self.ids[kind].append(ids[of_kind])

    def _keep_sample(self, database: str, keys: list[bytes], values: list[bytes]) -> None:
        stride = max(1, len(keys) * 4 // _SAMPLE)
        sample = self._samples[database]
        sample.extend(zip(keys[::stride], values[::stride], strict=True))
        if len(sample) > 2 * _SAMPLE:
            self._samples[database] = sample[::2]


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
        try:
            return env, {name: env.open_db(name.encode(), create=False) for name in DATABASES}
        except lmdb.Error:
            env.close()
            raise
    except lmdb.Error as error:
        raise ReleaseError(
            f"{path} is not part of a release ({error}). Roll back to the previous release, or publish again."
        ) from None


def _ascending(table: pa.Table, kind: str, database: str, name: str) -> Iterator[pa.Table]:
    """The rows in ascending order of their keys, some at a time. Raises SchemaError for a key that occurs twice."""
    ids = table["id"].to_numpy()
    partitions = table["partition"].to_numpy() if "partition" in table.column_names else np.zeros(len(ids), np.int32)
    order = None
    if not (np.diff(ids) > 0).all():
        order = np.lexsort((partitions, ids))
        ids, partitions = ids[order], partitions[order]
        same = (np.diff(ids) == 0) & (np.diff(partitions) == 0)
        if same.any():
            raise SchemaError(
                f"{name}: {kind} {ids[same.argmax()]} occurs twice in the {database} to publish. Keep one row per key."
            )
    for start in range(0, len(ids), _TRANSACTION_ROWS):
        if order is None:
            yield table.slice(start, _TRANSACTION_ROWS)
        else:
            yield table.take(pa.array(order[start : start + _TRANSACTION_ROWS]))


def _with_partitions(table: pa.Table, name: str) -> pa.Table:
    """id, vector, codes where there are any, and partition of a vectors table, 0 where it has no such column."""
    columns = [c for c in ("id", "vector", "codes") if c in table.column_names]
    if "partition" not in table.column_names:
        zeros = pa.array(np.zeros(table.num_rows, dtype=np.int32))
        return table.select(columns).append_column("partition", zeros)
    table = conform(table.select([*columns, "partition"]), pa.schema([("partition", pa.int32())]), name=name)
    outside = pc.or_(pc.less(table["partition"], 0), pc.greater(table["partition"], LAST_PARTITION))
    if pc.any(outside).as_py():
        row = pc.index(outside, True).as_py()
        raise SchemaError(
            f"{name}, row {row}: partition {table['partition'][row]} is outside 0..{LAST_PARTITION}. "
            f"Keep fewer partitions per id."
        )
    return table


def _refuse_headless(kind: str, ids: np.ndarray, partitions: np.ndarray, last: int | None) -> None:
    """Refuses older partitions of an id without partition 0, which no lookup would reach."""
    first = np.diff(ids, prepend=ids[0] - 1 if last is None else last) != 0
    headless = first & (partitions > 0)
    if headless.any():
        row = headless.argmax()
        raise SchemaError(
            f"{kind} {ids[row]} has a vector of partition {partitions[row]}, but none of partition 0. "
            f"Publish all partitions of an id together."
        )


def _refuse_nulls(table: pa.Table, columns: Sequence[str], name: str) -> None:
    for column in columns:
        if table[column].null_count:
            row = pc.index(pc.is_null(table[column]), True).as_py()
            raise SchemaError(
                f"{name}, row {row}: {column} is null. Drop the row, or run the stage that wrote it again."
            )
