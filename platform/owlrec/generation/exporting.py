"""Knowledge for others: one JSON-lines or one Parquet file of all rows, each written whole or not at all.

Tables are written as they come, so that an export of 10^8 rows takes the memory of one shard. What `export_jsonl` and
`export_parquet` write, `importing` reads back.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from owlrec.errors import SchemaError
from owlrec.schema import KNOWLEDGE, conform
from owlrec.storage import Storage, Writer

_ROWS_AT_ONCE = 2048  # what is turned into Python objects at a time: about 10 MB


def export_jsonl(tables: Iterable[pa.Table], path: str | Path) -> int:
    """Writes knowledge tables (schema.KNOWLEDGE, further columns too) as one JSON object a line, in UTF-8.

    A name in .gz is compressed. The file appears, or replaces an older one, when it is complete. Returns the number of
    rows. Raises SchemaError where a table breaks the contract, WorkspaceError where the file cannot be written.
    """
    rows = 0
    with _appearing_whole(path) as file, _packing(file) if str(path).endswith(".gz") else nullcontext(file) as stream:
        for table in tables:
            table = conform(table, KNOWLEDGE, name=f"knowledge for {path}")
            for batch in table.to_batches(_ROWS_AT_ONCE):
                lines = [json.dumps(row, ensure_ascii=False) for row in batch.to_pylist()]
                stream.write("".join(f"{line}\n" for line in lines).encode())
            rows += table.num_rows
    return rows


def export_parquet(tables: Iterable[pa.Table], path: str | Path) -> int:
    """Writes knowledge tables (schema.KNOWLEDGE, further columns too) as one Parquet file, in Zstandard.

    Each table is written on its own, in row groups of at most 2^20 rows. All must have the columns of the first.
    Returns, raises and replaces as `export_jsonl` does; no tables make a file of no rows.
    """
    rows = 0
    writer: pq.ParquetWriter | None = None
    with _appearing_whole(path) as file:
        try:
            for table in tables:
                table = conform(table, KNOWLEDGE, name=f"knowledge for {path}")
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                if not table.schema.equals(writer.schema):
                    raise SchemaError(
                        f"knowledge for {path}: a table has columns {', '.join(table.column_names)}, but the first has "
                        f"{', '.join(writer.schema.names)}, or types differ. Export them to two files."
                    )
                writer.write_table(table)
                rows += table.num_rows
            writer = writer or pq.ParquetWriter(file, KNOWLEDGE, compression="zstd")
        finally:
            if writer:
                writer.close()
    return rows


def _packing(file: Writer) -> BinaryIO:
    # No name and no time inside: the same rows make the same bytes.
    return cast(BinaryIO, gzip.GzipFile("", "wb", 6, cast(BinaryIO, file), mtime=0))


@contextmanager
def _appearing_whole(path: str | Path) -> Iterator[Writer]:
    """A file to write to, which takes its name only when the block ends without an error."""
    target = Path(path).expanduser()
    with Storage(target.parent).writer(target.name) as writer:
        yield writer
