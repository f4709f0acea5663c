"""Stage 1 of `prepare`: fragments of the source, validated row by row, as files by bucket.

A shard is a group of fragments. The assignment of fragments to groups is stored, and a group with only
unchanged fragments keeps its number, so if a source grows by some files, only those are read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from owlrec.errors import WorkspaceError
from owlrec.ids import shard_of
from owlrec.runner import Result, Stage, Work
from owlrec.schema import INTERACTIONS
from owlrec.shards import Shard
from owlrec.sources.outcomes import Labels, with_outcomes
from owlrec.sources.raw import ENTITIES, TABLE_NAMES, Fragment, Fragments, Piece, Place, TableName
from owlrec.storage import FileEntry, Storage, fingerprint
from owlrec.workspace import Workspace, read_tombstones, shard_file, shards_for

# -------------------------------------------------------------------------------------------------------------- buckets
# Rows of a table by bucket: one file whose batches are fetched one at a time by ranged reads.
#
# A bucket is the low bits of an id's hash, like a shard, so a bucket is a set of whole shards (or a shard of
# whole buckets). This is the shuffle of `prepare`: writers sort rows by bucket once, readers fetch their
# own batch of every file, and nothing passes through a driver or Ray's object store.
#
# A file is one Arrow stream (LZ4) per batch, followed by the offsets of their starts and of the end, as int64. Arrow's
# own file format would take several more reads to find a batch.


MAX_BUCKETS = 1 << 14  # their numbers sort as 16-bit integers
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def write_buckets(storage: Storage, path: str, table: pa.Table, key: str, n_buckets: int) -> FileEntry:
    """Writes a table with one batch per bucket of its ids; rows keep their order within one."""
    order, bounds = bucket_order(table[key].to_numpy(), n_buckets)
    table = table.combine_chunks().take(pa.array(order))
    parts = (table.slice(begin, end - begin) for begin, end in pairwise(bounds))
    return write_batches(storage, path, parts, table.schema)


def bucket_order(ids: np.ndarray, n_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `ids` by bucket, int64 [n], in order within one; and the start of each bucket, [n_buckets + 1]."""
    buckets = shard_of(ids, n_buckets).astype(np.uint16)
    order = np.argsort(buckets, kind="stable")  # a radix sort, for 16-bit integers
    bounds = np.zeros(n_buckets + 1, dtype=np.int64)
    np.cumsum(np.bincount(buckets, minlength=n_buckets), out=bounds[1:])
    return order, bounds


def write_batches(storage: Storage, path: str, parts: Iterable[pa.Table], schema: pa.Schema) -> FileEntry:
    """Writes tables of one schema as one batch each."""
    begins = [0]
    with storage.writer(path) as file:
        for part in parts:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, schema, options=_OPTIONS) as writer:
                writer.write_table(part.combine_chunks())
            file.write(sink.getvalue())
            begins.append(file.tell())
        file.write(np.array(begins, dtype="<i8").tobytes())
    assert file.entry is not None
    return file.entry


def read_batches(storage: Storage, path: str, numbers: Sequence[int], n_batches: int) -> list[pa.Table]:
    """Some batches of a file that has `n_batches`, by ranged reads. Raises WorkspaceError if it is missing."""
    entry, size = storage.entry(path), 8 * (n_batches + 1)
    if entry is None:
        raise WorkspaceError(f"{storage.path(path)} does not exist. Run `prepare` again.")
    begins = np.frombuffer(storage.read_range(path, entry.bytes - size, size), dtype="<i8")
    if len(numbers) == n_batches:
        data = storage.read_range(path, 0, int(begins[-1]))
        pieces = [data[begin:end] for begin, end in pairwise(begins)]
    else:
        pieces = [storage.read_range(path, int(begins[n]), int(begins[n + 1] - begins[n])) for n in numbers]
    return [pa.ipc.open_stream(piece).read_all() for piece in pieces]


# --------------------------------------------------------------------------------------------------------------- ingest


KIND = "fragments"
GROUP_ROWS = 1 << 21
GROUP_BYTES = 128 << 20
BUCKET_INTERACTIONS = 1 << 20  # maximum in one bucket
BUCKET_ITEMS = 1 << 18
_SLACK = 4  # growth factor of a source before its buckets are redone and all of it is read again


class Grouping(BaseModel):
    """Fragments by group, and the number of buckets: groups.json."""

    user_buckets: int
    item_buckets: int
    groups: dict[int, list[dict[str, Any]]] = {}  # Fragment.json by group

    def inputs(self) -> dict[Shard, str]:
        """Digest of each group, for the runner."""
        return {
            Shard(KIND, number): fingerprint(
                self.user_buckets, self.item_buckets, [fragment["digest"] for fragment in group]
            )
            for number, group in sorted(self.groups.items())
        }

    def fragments(self, number: int) -> list[Fragment]:
        """The fragments of a group."""
        return [Fragment.from_json(values) for values in self.groups[number]]


def grouped(fragments: Sequence[Fragment], earlier: Grouping | None) -> Grouping:
    """Groups of fragments of one table, of about GROUP_ROWS each; unchanged groups of an earlier run stay."""
    rows = dict.fromkeys(("", *TABLE_NAMES), 0)
    for fragment in fragments:
        rows[fragment.table] += fragment.rows
    user_buckets = min(MAX_BUCKETS, shards_for(max(1, rows["interactions"] + rows[""]), BUCKET_INTERACTIONS))
    item_buckets = min(MAX_BUCKETS, shards_for(max(1, rows["items"]), BUCKET_ITEMS))
    result = Grouping(user_buckets=user_buckets, item_buckets=item_buckets)
    left = {fragment.digest: fragment for fragment in fragments}
    if earlier is not None:
        result.user_buckets = _kept(user_buckets, earlier.user_buckets)
        result.item_buckets = _kept(item_buckets, earlier.item_buckets)
        for number, known in earlier.groups.items():
            digests = [values["digest"] for values in known]
            if all(digest in left for digest in digests):
                result.groups[number] = known
                for digest in digests:
                    del left[digest]
    number = max(result.groups, default=-1) + 1
    group: list[Fragment] = []
    for fragment in left.values():
        if group and (
            group[0].table != fragment.table
            or sum(f.rows for f in group) + fragment.rows > GROUP_ROWS
            or sum(f.bytes for f in group) + fragment.bytes > GROUP_BYTES
        ):
            result.groups[number] = [f.json() for f in group]
            number, group = number + 1, []
        group.append(fragment)
    if group:
        result.groups[number] = [f.json() for f in group]
    return result


def _kept(wanted: int, earlier: int) -> int:
    return earlier if wanted // _SLACK <= earlier <= wanted * _SLACK else wanted


def read_grouping(workspace: Workspace, folder: str) -> Grouping | None:
    """Grouping of an earlier run, None if there was none."""
    try:
        return Grouping.model_validate_json(workspace.read_bytes(f"{folder}/groups.json"))
    except (WorkspaceError, ValueError):
        return None


@dataclass
class Ingest(Stage):
    """Reads groups of fragments: one file by bucket per table."""

    source: Fragments
    folder: str
    grouping: Grouping
    labels: Labels

    name = "ingest"

    def run(self, work: Work) -> Result:
        """See Stage."""
        tables: dict[TableName, list[Piece]] = {}
        for fragment in self.grouping.fragments(work.shard.number):
            for piece in self.source.read(fragment):
                tables.setdefault(piece.table, []).append(piece)
        files: dict[str, FileEntry] = {}
        counts: dict[str, int] = {}
        gone = read_tombstones(work.workspace)
        for name, pieces in tables.items():
            data = [self._labeled(piece) if name == "interactions" else piece.data for piece in pieces]
            if name != "items":
                data = [gone.without(table) for table in data]
            table = pa.concat_tables(data)
            counts[name] = table.num_rows
            path = bucket_file(name, work.shard.number)
            buckets = self.grouping.item_buckets if name == "items" else self.grouping.user_buckets
            files[path] = write_buckets(work.workspace, f"{self.folder}/{path}", table, _key(name), buckets)
        rows = sum(counts[name] for name in tables)
        return Result(files, rows_in=rows, rows_out=rows, counts=counts)

    def _labeled(self, piece: Piece) -> pa.Table:
        table = with_outcomes(piece.data, self.labels, piece.name, piece.first_row)
        return table.select(INTERACTIONS.names).cast(INTERACTIONS)


def bucket_file(table: str, group: int) -> str:
    """Path of a group's rows of a table, relative to the artifact."""
    return f"{table}/{shard_file(group, '.arrow')}"


def _key(table: TableName) -> str:
    return ENTITIES[table][0] if table in ENTITIES else "user_id"


@dataclass(frozen=True)
class Groups:
    """Ingested files of a table, and positions of their rows in the source."""

    source: Fragments
    folder: str
    grouping: Grouping
    table: TableName
    numbers: Sequence[int]  # groups with a file of the table
    rows: int

    @property
    def schema(self) -> pa.Schema:
        """The table's columns, if no group has rows of it."""
        return ENTITIES[self.table][1] if self.table in ENTITIES else INTERACTIONS

    @property
    def paths(self) -> list[str]:
        """The files, relative to the workspace."""
        return [f"{self.folder}/{bucket_file(self.table, number)}" for number in self.numbers]

    @property
    def n_buckets(self) -> int:
        """Number of buckets in the files."""
        return self.grouping.item_buckets if self.table == "items" else self.grouping.user_buckets

    def place(self, workspace: Workspace, number: int, bucket: int, row: int) -> Place:
        """Position in the source of a row from a bucket of a group's file: only for errors, since it reads the group
        again.
        """
        gone = read_tombstones(workspace)
        for fragment in self.grouping.fragments(number):
            for piece in self.source.read(fragment):
                if piece.table == self.table:
                    ids = piece.data[_key(self.table)].to_numpy()
                    kept = np.flatnonzero(~gone.among(ids)) if self.table != "items" else np.arange(len(ids))
                    order, bounds = bucket_order(ids[kept], self.n_buckets)
                    rows = kept[order[bounds[bucket] : bounds[bucket + 1]]]
                    if row < len(rows):
                        at = int(rows[row])
                        raw = self.source.raw_ids(piece, at) if self.table == "interactions" else ("", "")
                        return Place(piece.name, piece.first_row + at, *raw)
                    row -= len(rows)
        raise IndexError(row)
