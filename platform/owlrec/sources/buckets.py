"""Rows of a table by bucket: one file whose batches are fetched by ranged reads, one at a time.

A bucket is the low bits of an id's hash, as a shard is, so that a bucket is a set of whole shards (or a shard of whole
buckets). This is the shuffle of `prepare`: whoever writes sorts rows by bucket once, whoever reads fetches its own
batch of every file, and nothing passes through a driver or an object store of Ray's.

A file is one Arrow stream (LZ4) per batch, then where each begins and the last one ends, as int64. Arrow's own file
format would take several reads more to find a batch.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from owlrec.errors import WorkspaceError
from owlrec.schema import shard_of
from owlrec.storage import FileEntry, Storage

MAX_BUCKETS = 1 << 14  # so that their numbers sort as 16-bit integers
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def write_buckets(storage: Storage, path: str, table: pa.Table, key: str, n_buckets: int) -> FileEntry:
    """Writes a table with one batch for each bucket of its ids; rows keep their order within one."""
    order, bounds = bucket_order(table[key].to_numpy(), n_buckets)
    table = table.combine_chunks().take(pa.array(order))
    parts = (table.slice(begin, end - begin) for begin, end in pairwise(bounds))
    return write_batches(storage, path, parts, table.schema)


def bucket_order(ids: np.ndarray, n_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `ids` by bucket, int64 [n], in their order within one; where each bucket begins, [n_buckets + 1]."""
    buckets = shard_of(ids, n_buckets).astype(np.uint16)
    order = np.argsort(buckets, kind="stable")  # of 16-bit integers: a radix sort
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
    """Some batches of a file that has `n_batches`, by ranged reads. Raises WorkspaceError where it is missing."""
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
