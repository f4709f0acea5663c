"""Builds the LMDB file of a release from rows in any order, twenty thousand a transaction, doubling the map when full.

Rows above the greatest key so far are appended, which fills pages to the brim; others are inserted in sorted runs.
Tables that arrive in shards by hash therefore give pages that are about two thirds full: the price of never sorting
10^8 texts.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.coded_vectors import codes_of
from owlrec.encoding.packed_codes import pack_codes
from owlrec.errors import SchemaError
from owlrec.releases.lmdb_store import DATABASES, KEY_BYTES, LAST_PARTITION, decode_key, encode_cohorts, encode_key
from owlrec.releases.manifest import SemanticIdEntry
from owlrec.schema import KNOWLEDGE, MEMBERSHIPS, conform

_ROWS_A_TRANSACTION = 20_000  # bounds the dirty pages LMDB holds in memory: about 20 MB of texts
_FIRST_MAP_BYTES = 64 << 20
_SAMPLE = 10_000  # rows whose bytes are kept, to be compared after the file was closed and opened again


class LmdbWriter:
    """Builds one LMDB file. Rows may come in any order; the closer to ascending ids, the denser the file."""

    def __init__(self, path: Path) -> None:
        """path: the file to make; its folder exists, the file does not."""
        self.path = path
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
        self._last: dict[str, bytes] = {}  # the greatest key so far, by database
        # Rows by kind; `vectors` are the newest ones of their ids, `partitions` those of older interest partitions.
        self.counts: dict[str, dict[str, int]] = {name: {} for name in (*DATABASES, "partitions")}
        self.samples: dict[str, _Sample] = {name: _Sample() for name in DATABASES}
        self.dim = 0  # that vectors must have; 0: the first one decides
        self.semantic_ids: dict[str, SemanticIdEntry] = {}  # of the kinds whose vectors have codes
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
            keys = map(encode_key, kinds, ids)
            self.add_rows("knowledge", list(zip(keys, values, strict=True)), name=name)

    def add_vectors(self, table: pa.Table, *, name: str) -> None:
        """Writes the rows of a vectors table (schema.vectors_schema), which may have a column `partition`: 0 for the
        newest or only vector of an id, 1 for the one before, at most 255.

        The codes of partition 0 are the id's semantic id; a row without them says that it has none.
        Raises SchemaError where vectors differ in length, or codes are not those of `semantic_ids`.
        """
        for column in ("kind", "id", "vector"):
            if column not in table.column_names:
                raise SchemaError(f"{name}: column '{column}' is missing. Run the encode stage again.")
        table = _with_partitions(table, name)
        _refuse_nulls(table, ("kind", "id", "vector", "partition"), name)
        for batch in _sorted_batches(table):
            vectors = batch["vector"].combine_chunks()
            rows = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float16).reshape(batch.num_rows, -1)
            if self.dim not in (0, rows.shape[1]):
                raise SchemaError(
                    f"{name}: its vectors have {rows.shape[1]} components, earlier ones {self.dim}. "
                    f"One release holds the vectors of one encoder: encode all of them again."
                )
            self.dim = rows.shape[1]
            keys = map(encode_key, *(batch[c].to_pylist() for c in ("kind", "id", "partition")))
            values = (row.tobytes() for row in rows)
            self.add_rows("vectors", list(zip(keys, values, strict=True)), name=name)
            if "codes" in batch.column_names:
                self._add_codes(batch.filter(pc.equal(batch["partition"], 0)), name)

    def add_memberships(self, table: pa.Table, *, name: str) -> None:
        """Writes the rows of a memberships table (schema.MEMBERSHIPS); an empty list says that an id has no cohort.

        Raises SchemaError for a null or a key that is there already.
        """
        table = conform(table, MEMBERSHIPS, name=name)
        _refuse_nulls(table, MEMBERSHIPS.names, name)
        for batch in _sorted_batches(table.select(MEMBERSHIPS.names)):
            pairs = []
            for kind, id_, cohorts in zip(*(batch[c].to_pylist() for c in MEMBERSHIPS.names), strict=True):
                if None in cohorts:
                    raise SchemaError(f"{name}: the cohorts of {kind} {id_} hold a null. Leave that cohort out.")
                pairs.append((encode_key(kind, id_), encode_cohorts(cohorts)))
            self.add_rows("memberships", pairs, name=name)

    def add_rows(self, database: str, pairs: list[tuple[bytes, bytes]], *, name: str) -> None:
        """Writes rows as they stand in a file, at least one and ascending by key, in one transaction.

        Raises SchemaError for a key that is there already.
        """
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
        for key, _ in pairs:
            counts = self.counts[database if len(key) == KEY_BYTES else "partitions"]
            kind = decode_key(key)[0]
            counts[kind] = counts.get(kind, 0) + 1

    def check_partitions(self) -> None:
        """Refuses older partitions of an id without partition 0, which no lookup would reach (SchemaError)."""
        if not self.counts["partitions"]:
            return
        newest = b""
        with self._env.begin(db=self._databases["vectors"]) as transaction:
            for key in transaction.cursor().iternext(values=False):
                if len(key) == KEY_BYTES:
                    newest = key
                elif key[:KEY_BYTES] != newest:
                    kind, id_ = decode_key(key)
                    raise SchemaError(
                        f"{kind} {id_} has a vector of partition {key[-1]}, but none of partition 0. "
                        f"Publish all partitions of an id together."
                    )

    def close(self) -> None:
        """Writes everything to the disk and closes the file."""
        self._env.sync(True)
        self._env.close()

    def abort(self) -> None:
        """Closes the file without making it durable."""
        self._env.close()

    def _add_codes(self, batch: pa.Table, name: str) -> None:
        """Writes the semantic ids of vectors in ascending order of kind and id."""
        for kind in pc.unique(batch["kind"]).to_pylist():
            rows = batch.filter(pc.equal(batch["kind"], kind))
            codes, coded = codes_of(rows)
            entry = self.semantic_ids.get(kind)
            if entry is None:
                if coded.any():
                    raise SchemaError(
                        f"{name}: vectors of kind '{kind}' have codes, but the release has no codebooks for them. "
                        "Publish them with their quantiser, or without codes."
                    )
                continue
            values = [b""] * len(rows)
            if coded.any():
                for row, value in zip(np.flatnonzero(coded), pack_codes(codes[coded], entry.sizes), strict=True):
                    values[row] = value
                last = max(entry.last_digit, int(codes[coded, -1].max()))
                self.semantic_ids[kind] = entry.model_copy(update={"last_digit": last})
            keys = (encode_key(kind, id_) for id_ in rows["id"].to_pylist())
            self.add_rows("codes", list(zip(keys, values, strict=True)), name=name)

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
    by = [(column, "ascending") for column in ("kind", "id", "partition") if column in table.column_names]
    order = pc.sort_indices(table, sort_keys=by)
    for start in range(0, table.num_rows, _ROWS_A_TRANSACTION):
        yield table.take(order.slice(start, _ROWS_A_TRANSACTION))


def _with_partitions(table: pa.Table, name: str) -> pa.Table:
    """kind, id, vector, codes where there are any, and partition of a vectors table, 0 where it has no such column."""
    columns = [c for c in ("kind", "id", "vector", "codes") if c in table.column_names]
    if "partition" not in table.column_names:
        zeros = pa.array(np.zeros(table.num_rows, dtype=np.int32))
        return table.select(columns).append_column("partition", zeros)
    table = conform(table.select([*columns, "partition"]), pa.schema([("partition", pa.int32())]), name=name)
    outside = pc.or_(pc.less(table["partition"], 0), pc.greater(table["partition"], LAST_PARTITION))
    if pc.any(outside).as_py():
        row = pc.index(outside, True).as_py()
        raise SchemaError(
            f"{name}, row {row}: partition {table['partition'][row]} is outside 0..{LAST_PARTITION}. "
            f"Keep fewer partitions an id."
        )
    return table


def _refuse_nulls(table: pa.Table, columns: Iterable[str], name: str) -> None:
    for column in columns:
        if table[column].null_count:
            row = pc.index(pc.is_null(table[column]), True).as_py()
            raise SchemaError(
                f"{name}, row {row}: {column} is null. Drop the row, or run the stage that wrote it again."
            )
