"""Builds the LMDB file of a release from rows in any order, twenty thousand a transaction, doubling the map when full.

Rows above the greatest key so far are appended, which fills pages to the brim; others are inserted in sorted runs.
Tables that arrive in shards by hash therefore give pages that are about two thirds full: the price of never sorting
10^8 texts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.errors import SchemaError
from owlrec.schema import KNOWLEDGE, conform
from owlrec.store.lmdb_store import DATABASES, decode_key, encode_key

_ROWS_A_TRANSACTION = 20_000  # bounds the dirty pages LMDB holds in memory: about 20 MB of texts
_FIRST_MAP_BYTES = 64 << 20
_SAMPLE = 10_000  # rows whose bytes are kept, to be compared after the file was closed and opened again


class LmdbWriter:
    """Builds one LMDB file. Rows may come in any order; the closer to ascending ids, the denser the file."""

    def __init__(self, path: Path) -> None:
        """path: the file to make; its folder exists, the file does not."""
        self.path = path
        self._env = lmdb.open(
            str(path), subdir=False, lock=False, max_dbs=2, map_size=_FIRST_MAP_BYTES, sync=False, metasync=False
        )
        self._databases = {name: self._env.open_db(name.encode()) for name in DATABASES}
        self._last: dict[str, bytes] = {}  # the greatest key so far, by database
        self.counts: dict[str, dict[str, int]] = {"knowledge": {}, "vectors": {}}
        self.samples: dict[str, _Sample] = {"knowledge": _Sample(), "vectors": _Sample()}
        self.dim = 0
        self.as_of_min: int | None = None
        self.as_of_max: int | None = None

    def add_knowledge(self, table: pa.Table, *, name: str) -> None:
        """Writes the rows of a knowledge table (schema.KNOWLEDGE).

        Raises SchemaError for a null or a key that is there already.
        """
        table = conform(table, KNOWLEDGE, name=name)
        columns = ("kind", "id", "as_of", "text", "framework", "quality")
        _refuse_nulls(table, ("kind", "id", "as_of", "text"), name)
        if table.num_rows:
            bounds = pc.min_max(table["as_of"]).as_py()
            self.as_of_min = bounds["min"] if self.as_of_min is None else min(self.as_of_min, bounds["min"])
            self.as_of_max = bounds["max"] if self.as_of_max is None else max(self.as_of_max, bounds["max"])
        for batch in _sorted_batches(table.select(columns)):
            kinds, ids, as_ofs, texts, frameworks, qualities = (batch[c].to_pylist() for c in columns)
            values = (
                json.dumps(
                    {"text": t, "as_of": a, "framework": f or "", "quality": q or ""}, ensure_ascii=False
                ).encode()
                for t, a, f, q in zip(texts, as_ofs, frameworks, qualities, strict=True)
            )
            self._put("knowledge", kinds, ids, values, name)

    def add_vectors(self, table: pa.Table, *, name: str) -> None:
        """Writes the rows of a vectors table (schema.vectors_schema).

        Raises SchemaError where vectors differ in length.
        """
        for column in ("kind", "id", "vector"):
            if column not in table.column_names:
                raise SchemaError(f"{name}: column '{column}' is missing. Run the encode stage again.")
        _refuse_nulls(table, ("kind", "id", "vector"), name)
        for batch in _sorted_batches(table.select(["kind", "id", "vector"])):
            vectors = batch["vector"].combine_chunks()
            rows = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float16).reshape(batch.num_rows, -1)
            if self.dim not in (0, rows.shape[1]):
                raise SchemaError(
                    f"{name}: its vectors have {rows.shape[1]} components, earlier ones {self.dim}. "
                    f"One release holds the vectors of one encoder: encode all of them again."
                )
            self.dim = rows.shape[1]
            values = (row.tobytes() for row in rows)
            self._put("vectors", batch["kind"].to_pylist(), batch["id"].to_pylist(), values, name)

    def close(self) -> None:
        """Writes everything to the disk and closes the file."""
        self._env.sync(True)
        self._env.close()

    def abort(self) -> None:
        """Closes the file without making it durable."""
        self._env.close()

    def _put(self, database: str, kinds: list[str], ids: list[int], values: Iterable[bytes], name: str) -> None:
        pairs = [(encode_key(kind, id_), value) for kind, id_, value in zip(kinds, ids, values, strict=True)]
        # MDB_APPEND below the greatest key drops rows silently when overwrite is off, so it is asked for only where it
        # holds.
        append = pairs[0][0] > self._last.get(database, b"")
        while True:
            transaction = self._env.begin(write=True, db=self._databases[database])
            try:
                consumed, added = transaction.cursor().putmulti(pairs, overwrite=False, append=append)
                if added != consumed:
                    transaction.abort()
                    self._refuse_double(database, pairs, name)
                transaction.commit()
                break
            except lmdb.MapFullError:
                transaction.abort()
                self._env.set_mapsize(2 * self._env.info()["map_size"])
        self._last[database] = max(self._last.get(database, b""), pairs[-1][0])
        self.samples[database].add(pairs)
        counts = self.counts[database]
        for kind in set(kinds):
            counts[kind] = counts.get(kind, 0) + kinds.count(kind)

    def _refuse_double(self, database: str, pairs: list[tuple[bytes, bytes]], name: str) -> None:
        seen: set[bytes] = set()
        with self._env.begin(db=self._databases[database]) as transaction:
            for key, _ in pairs:
                if key in seen or transaction.get(key) is not None:
                    kind, id_ = decode_key(key)
                    raise SchemaError(
                        f"{name}: {kind} {id_} occurs twice in the {database} to publish. Keep one row a key."
                    )
                seen.add(key)


class _Sample:
    """About ten thousand of the rows that pass by, evenly spread, without knowing how many will come."""

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, bytes]] = []
        self._stride = 1
        self._seen = 0

    def add(self, pairs: list[tuple[bytes, bytes]]) -> None:
        self.rows.extend(pairs[-self._seen % self._stride :: self._stride])
        self._seen += len(pairs)
        while len(self.rows) > 2 * _SAMPLE:
            self.rows = self.rows[::2]
            self._stride *= 2


def _sorted_batches(table: pa.Table) -> Iterator[pa.Table]:
    order = pc.sort_indices(table, sort_keys=[("kind", "ascending"), ("id", "ascending")])
    for start in range(0, table.num_rows, _ROWS_A_TRANSACTION):
        yield table.take(order.slice(start, _ROWS_A_TRANSACTION))


def _refuse_nulls(table: pa.Table, columns: Sequence[str], name: str) -> None:
    for column in columns:
        if table[column].null_count:
            row = pc.index(pc.is_null(table[column]), True).as_py()
            raise SchemaError(
                f"{name}, row {row}: {column} is null. Drop the row, or run the stage that wrote it again."
            )
