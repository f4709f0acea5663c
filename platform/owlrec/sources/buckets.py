"""Rows of a table by bucket: one Arrow file whose batches are read by ranges, one at a time.

A bucket is the low bits of an id's hash, as a shard is, so that a bucket is a set of whole shards (or a shard of whole
buckets). This is the shuffle of `prepare`: whoever writes sorts rows by bucket once, whoever reads fetches its own
batch of every file, and nothing passes through a driver or an object store of Ray's.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

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


def write_batches(storage: Storage, path: str, parts: Iterator[pa.Table], schema: pa.Schema) -> FileEntry:
    """Writes tables of one schema as one batch each."""
    with storage.writer(path) as file, pa.ipc.new_file(file, schema, options=_OPTIONS) as writer:
        for part in parts:
            batches = part.combine_chunks().to_batches()
            writer.write_batch(batches[0] if batches else _empty(schema))
    assert file.entry is not None
    return file.entry


def read_batches(
    storage: Storage, paths: Sequence[str], numbers: Sequence[int], columns: Sequence[str] | None = None
) -> Iterator[list[pa.RecordBatch]]:
    """These batches of each file, by ranged reads. columns: by default all."""
    for path in paths:
        with storage.open_input(path) as stream:
            options = pa.ipc.IpcReadOptions(use_threads=False)
            reader = pa.ipc.open_file(stream, options=options)
            if columns is not None:
                options.included_fields = [reader.schema.get_field_index(name) for name in columns]
                reader = pa.ipc.open_file(stream, options=options)
            yield [reader.get_batch(number) for number in numbers]


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
