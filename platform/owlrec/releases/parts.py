"""Writes the parts of a release: tables to rows as bytes, in ascending order of their keys, and the file read back.

Lookups import none of this, and so no Arrow.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress, pairwise
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.compression import pack_codes
from owlrec.encoding.vectors import codes_of
from owlrec.errors import ReleaseError, SchemaError, WorkspaceError
from owlrec.ids import BEHAVIOR
from owlrec.releases.format import (
    DATABASES,
    KEY_BYTES,
    KEY_ORDER,
    LAST_PARTITION,
    SemanticIdEntry,
    byte_rows,
    decode_keys,
    encode_key,
    encode_keys,
    kind_of,
    speaking,
)
from owlrec.releases.lmdb import LmdbFile
from owlrec.schema import BEHAVIORS, KNOWLEDGE, MEMBERSHIPS, conform
from owlrec.workspace import Tombstones

_TRANSACTION_ROWS = 20_000  # bounds the dirty pages LMDB holds in memory: about 20 MB of texts
_FIRST_MAP_BYTES = 64 << 20
_SAMPLE = 1000  # rows of each database whose bytes are kept, to be compared after the file was closed and opened again
# framework, quality: lengths of the two names in bytes. relaxed: tokens accepted only by the relaxed rule.
_HEAD = np.dtype([("as_of", ">i8"), ("framework", ">u2"), ("quality", ">u2"), ("relaxed", ">u2")])
_LONGEST_NAME = (1 << 16) - 1


class PartWriter:
    """Writes one part. Each database takes cohorts, then items, then users, with a kind's rows in one call."""

    def __init__(
        self,
        path: Path,
        *,
        codes: Mapping[str, SemanticIdEntry],
        dim: int = 0,
        tombstones: Tombstones | None = None,
    ) -> None:
        """path: the file to create, in an existing folder. codes: format of semantic ids, by kind.
        dim: components of a vector; 0: taken from the first one. tombstones: users whose rows are left out.
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
        # Rows by kind; `vectors` are the newest of their ids, `partitions` those of older interest partitions.
        self.counts: dict[str, dict[str, int]] = {name: {} for name in (*DATABASES, "partitions")}
        self.ids: dict[str, list[np.ndarray]] = {kind: [] for kind in KEY_ORDER}  # ids with knowledge
        self.as_of: tuple[int, int] | None = None  # the earliest and the latest moment of its texts, ms
        self._samples: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in DATABASES}

    def add_knowledge(self, kind: str, table: pa.Table, *, name: str) -> None:
        """Writes knowledge of a kind (schema.KNOWLEDGE), in any order.

        Raises SchemaError for a null or a duplicate id.
        """
        table = conform(table, KNOWLEDGE, name=name)
        _refuse_nulls(table, ("id", "as_of", "text"), name)
        if table.num_rows:
            bounds = pc.min_max(table["as_of"]).as_py()
            low, high = self.as_of or (bounds["min"], bounds["max"])
            self.as_of = min(low, bounds["min"]), max(high, bounds["max"])
        columns = ["id", "as_of", "text", "framework", "quality", "relaxed"]
        for batch in _ascending(table.select(columns), kind, "knowledge", name):
            keys = encode_keys(kind, batch["id"].to_numpy())
            self.add_rows("knowledge", keys, encode_knowledge(batch, name=name))

    def add_vectors(self, kind: str, table: pa.Table, *, name: str) -> None:
        """Writes vectors of a kind (schema.vectors_schema), in any order; an optional column `partition`
        counts from 0, the newest or only vector of an id, to 255.

        The codes of partition 0 are the id's semantic id; a row without codes marks that it has none.
        Raises SchemaError if vectors differ in length, codes are not from these codebooks, or an id has an older
        partition but no newest one.
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
                    f"{name}: its vectors have {rows.shape[1]} components, but earlier ones have {self.dim}. A "
                    "release has vectors of one encoder: encode all of them again."
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
        """Writes memberships of a kind (schema.MEMBERSHIPS), in any order; an empty list marks an id without
        cohorts.

        Raises SchemaError for a null or a duplicate id.
        """
        table = conform(table, MEMBERSHIPS, name=name)
        _refuse_nulls(table, ("id", "cohorts"), name)
        for batch in _ascending(table.select(["id", "cohorts"]), kind, "memberships", name):
            ids, lists = batch["id"].to_numpy(), batch["cohorts"].combine_chunks()
            if lists.flatten().null_count:
                row = next(row for row, cohorts in enumerate(lists.to_pylist()) if None in cohorts)
                raise SchemaError(f"{name}: the cohorts of {kind} {ids[row]} contain a null. Remove that cohort.")
            self.add_rows("memberships", encode_keys(kind, ids), encode_lists(lists))

    def add_behaviors(self, table: pa.Table, *, name: str) -> None:
        """Writes the latest behaviors of users (schema.BEHAVIORS), in any order.

        Raises SchemaError for a null, a duplicate user, or lists that are not aligned.
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
        """Writes rows in stored form, all keys above earlier ones, in one transaction."""
        if len(self._tombstones):
            visible = speaking(keys, self._tombstones)
            keys, values = list(compress(keys, visible)), list(compress(values, visible))
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
                    f"{self.path} cannot be written ({error}). Free some space and publish again: finished parts stay."
                ) from None
        self._keep_sample(database, keys, values)
        self._count(database, keys)

    def close(self) -> None:
        """Finishes the file and reads it back: row counts and a sample of rows. Raises ReleaseError if they differ
        from the written data.
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
                        f"{self.path}: its {database} read back differently from what was written. Check the "
                        "disk, then publish again; the current release did not change."
                    )

    def abort(self) -> None:
        """Closes the file without making it durable."""
        self._env.close()

    def ids_bytes(self) -> bytes:
        """Contents of the part's file of ids: those with knowledge, little-endian int64, kinds in KEY_ORDER."""
        return b"".join(ids.astype("<i8").tobytes() for kind in KEY_ORDER for ids in self.ids[kind])

    def _add_codes(self, kind: str, rows: pa.Table, name: str) -> None:
        codes, coded = codes_of(rows)
        entry = self.codes.get(kind)
        if entry is None:
            if coded.any():
                raise SchemaError(
                    f"{name}: vectors of kind '{kind}' have codes, but the release has no codebooks for them. "
                    "Publish them with their quantizer, or without codes."
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
                kind, kind_rows = kind_of(byte), kinds == byte
                self.counts[name][kind] = self.counts[name].get(kind, 0) + int(kind_rows.sum())
                if name == "knowledge":
                    self.ids[kind].append(ids[kind_rows])

    def _keep_sample(self, database: str, keys: list[bytes], values: list[bytes]) -> None:
        stride = max(1, len(keys) * 4 // _SAMPLE)
        sample = self._samples[database]
        sample.extend(zip(keys[::stride], values[::stride], strict=True))
        if len(sample) > 2 * _SAMPLE:
            self._samples[database] = sample[::2]


def _ascending(table: pa.Table, kind: str, database: str, name: str) -> Iterator[pa.Table]:
    """Rows in ascending order of their keys, in batches. Raises SchemaError for a duplicate key."""
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
    """id, vector, codes if present, and partition of a vectors table, 0 without such a column."""
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
    """Refuses older partitions of an id without partition 0, which no lookup would find."""
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


# -------------------------------------------------------------------------------------------------------- rows as bytes


def encode_knowledge(table: pa.Table, *, name: str) -> list[bytes]:
    """The values of knowledge rows (schema.KNOWLEDGE). Raises SchemaError for a framework or quality beyond 64 kB."""
    framework, quality, text = (_binary(table[column]) for column in ("framework", "quality", "text"))
    head = np.empty(table.num_rows, dtype=_HEAD)
    head["as_of"] = table["as_of"].to_numpy()
    for column, values in (("framework", framework), ("quality", quality)):
        lengths = pc.binary_length(values).to_numpy(zero_copy_only=False)
        if len(lengths) and lengths.max() > _LONGEST_NAME:
            row = int(lengths.argmax())
            raise SchemaError(
                f"{name}, row {row}: its {column} has {lengths[row]:,} bytes, more than {_LONGEST_NAME:,}. Shorten it."
            )
        head[column] = lengths
    head["relaxed"] = np.minimum(table["relaxed"].fill_null(0).to_numpy(), 2**16 - 1)
    heads = pa.FixedSizeBinaryArray.from_buffers(pa.binary(_HEAD.itemsize), len(head), [None, pa.py_buffer(head)])
    return _slices(pc.binary_join_element_wise(heads.cast(pa.binary()), framework, quality, text, b""))


def encode_lists(lists: pa.ListArray) -> list[bytes]:
    """Values of memberships: per list of int64, eight big-endian bytes per cohort."""
    offsets = lists.offsets.to_numpy().astype(np.int64) * 8
    data = lists.values.to_numpy().astype(">i8").tobytes()
    return [data[start:end] for start, end in pairwise(offsets.tolist())]


def encode_behaviors(table: pa.Table) -> list[bytes]:
    """Values of behaviors (schema.BEHAVIORS): ids.BEHAVIOR, NaN for no rating.

    Raises ValueError if the lists of a row differ in length.
    """
    lists = {name: table[f"{name}s"].combine_chunks() for name in BEHAVIOR.names or ()}
    offsets = np.r_[0, np.cumsum(lists["time"].value_lengths().to_numpy())]
    rows = np.empty(offsets[-1], dtype=BEHAVIOR)
    for name, column in lists.items():
        if not np.array_equal(column.value_lengths().to_numpy(), np.diff(offsets)):
            raise ValueError(f"{name}s and times differ in length")
        rows[name] = column.flatten().to_numpy(zero_copy_only=False)
    data, bounds = rows.tobytes(), (offsets * BEHAVIOR.itemsize).tolist()
    return [data[start:end] for start, end in pairwise(bounds)]


def _binary(column: pa.ChunkedArray) -> pa.Array:
    """A string column as one array of bytes, "" for nulls."""
    column = pc.fill_null(column, "") if column.null_count else column
    return column.cast(pa.binary()).combine_chunks()


def _slices(values: pa.Array) -> list[bytes]:
    """A binary array as a list of bytes; `to_pylist` takes several times as long."""
    offsets = np.frombuffer(values.buffers()[1], dtype=np.int32)[values.offset : values.offset + len(values) + 1]
    data = values.buffers()[2]
    data = data.to_pybytes() if data is not None else b""
    bounds = offsets.tolist()
    return [data[start:end] for start, end in pairwise(bounds)]
