"""The files of a source, on a disk or an object store, and their rows: Parquet, CSV and JSON lines.

CSV is read as text except for ratings and timestamps, since guessing types would turn the id "007" into 7.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from owlrec.errors import SchemaError, SourceError, WorkspaceError
from owlrec.shards import in_threads
from owlrec.storage import Storage

Format = Literal["parquet", "csv", "json"]
_CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_SUFFIXES = ", ".join((*_CSV_SUFFIXES, *_JSON_SUFFIXES))
_JSON_BLOCK = 16 << 20  # Arrow refuses a line that is longer than its block
_HEAD_BYTES = 1 << 20  # bytes of a text file read to find its columns
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """A file from a listing."""

    path: str  # local, or a URI
    bytes: int
    e_tag: str

    def open(self) -> pa.NativeFile:
        """Opens it for reading, decompressed if its name ends in .gz. Raises SourceError if it is missing."""
        storage, name = _at(self.path)
        try:
            stream = storage.open_input(name)
        except WorkspaceError as error:
            raise SourceError(f"{self.path}: the file cannot be opened ({error.__cause__ or error}).") from None
        return pa.CompressedInputStream(stream, "gzip") if self.path.endswith(".gz") else stream


def input_files(pattern: str) -> list[SourceFile]:
    """Files for a path or URI: itself, the data files in a folder, or the matches of a glob, sorted.

    Raises SourceError if there are none.
    """
    files = _remote_files(pattern) if "://" in pattern else _local_files(Path(pattern).expanduser())
    if not files:
        raise SourceError(
            f"{pattern}: there are no Parquet, CSV or JSON lines files (.parquet, {_SUFFIXES}). Correct the "
            "path in the recipe's source section."
        )
    return sorted(files, key=lambda file: file.path)


def _local_files(path: Path) -> list[SourceFile]:
    if path.is_dir():
        names = [p for p in path.rglob("*") if not _is_marker(p.relative_to(path).parts)]
    elif path.exists():
        return [_local(path)]
    else:
        names = [Path(p) for p in glob.glob(str(path), recursive=True)]
    return [_local(p) for p in names if p.is_file() and _format(p.name)]


def _local(path: Path) -> SourceFile:
    storage, name = _at(str(path.absolute()))
    entry = storage.entry(name)
    if entry is None:
        raise SourceError(f"{path}: the file disappeared while the source was listed. Run the same command again.")
    return SourceFile(str(path.absolute()), entry.bytes, entry.e_tag)


def _remote_files(uri: str) -> list[SourceFile]:
    bucket, path = _at(uri.rstrip("/"))
    wild = _WILD.search(path)
    if wild is None and (entry := bucket.entry(path)) is not None:
        return [SourceFile(uri, entry.bytes, entry.e_tag)]
    folder = path[: wild.start()].rpartition("/")[0] if wild else path
    rest = path[len(folder) :].lstrip("/")
    matches = _glob_pattern(rest) if wild else re.compile("")
    return [
        SourceFile(f"{bucket.root}/{folder}/{name}" if folder else f"{bucket.root}/{name}", entry.bytes, entry.e_tag)
        for name, entry in bucket.entries(*([folder] if folder else [])).items()
        if matches.match(name) and _format(name) and (wild or not _is_marker(name.split("/")))
    ]


def _at(path: str) -> tuple[Storage, str]:
    """The bucket or local folder of a file, and its path there."""
    if "://" not in path:
        return Storage(Path(path).parent), Path(path).name
    scheme, _, rest = path.partition("://")
    bucket, _, name = rest.partition("/")
    return _bucket(f"{scheme}://{bucket}"), name


@lru_cache(maxsize=64)
def _bucket(uri: str) -> Storage:
    return Storage(uri)  # once: each has its own connections


def _glob_pattern(text: str) -> re.Pattern[str]:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(parts.get(t, re.escape(t)) for t in re.split(r"(\*\*/|\*\*|\*|\?)", text)) + r"\Z")


def _is_marker(parts: Sequence[str]) -> bool:
    """Whether a path is an auxiliary file of data writers, such as _SUCCESS."""
    return any(part.startswith((".", "_")) for part in parts)


def _format(name: str) -> Format | None:
    if ".parquet" in name:
        return "parquet"
    if name.endswith(_JSON_SUFFIXES):
        return "json"
    return "csv" if name.endswith(_CSV_SUFFIXES) else None


def file_format(file: SourceFile) -> Format:
    """Format by file name. Raises SourceError for an unknown one."""
    format_ = _format(file.path)
    if format_ is None:
        raise SourceError(
            f"{file.path}: the file is not Parquet, CSV or JSON lines by its name. Use .parquet, {_SUFFIXES}."
        )
    return format_


def head(file: SourceFile, typed: set[str]) -> tuple[pa.Schema, pq.FileMetaData | None]:
    """A file's columns without its rows, and a Parquet file's footer. typed: see read_file."""
    format_ = file_format(file)
    try:
        with file.open() as stream:
            if format_ == "parquet":
                parquet = pq.ParquetFile(stream)
                return parquet.schema_arrow, parquet.metadata
            start = stream.read(_HEAD_BYTES)
            if format_ == "csv":
                return pa.schema([(name, _csv_type(name, typed)) for name in _csv_names(start, file)]), None
            lines = start[: start.rfind(b"\n") + 1] or start
            return _json_table(pa.BufferReader(lines)).schema if lines.strip() else pa.schema([]), None
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(file, format_, error) from None


def read_file(path: SourceFile | str | Path, typed: set[str], groups: tuple[int, int] | None = None) -> pa.Table:
    """One Parquet, CSV or JSON lines file, or some row groups of it. In CSV only the columns in `typed` get a guessed
    type; all others are text.

    Raises SourceError for another kind of file or one that cannot be parsed.
    """
    file = path if isinstance(path, SourceFile) else _local(Path(path).expanduser())
    format_ = file_format(file)
    try:
        if format_ == "parquet":
            with file.open() as stream:
                # ParquetFile, since read_table would add columns for folder names such as day=3.
                parquet = pq.ParquetFile(stream)
                return parquet.read() if groups is None else parquet.read_row_groups(list(range(*groups)))
        return _read_csv(file, typed) if format_ == "csv" else _read_json(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(file, format_, error) from None


def _unreadable(file: SourceFile, format_: str, error: Exception) -> SourceError:
    return SourceError(f"{file.path}: the file cannot be read as {format_} ({error}). Correct or replace it.")


def _csv_type(name: str, typed: set[str]) -> pa.DataType:
    return pa.null() if name in typed else pa.string()  # null: type to be guessed


def _delimiter(file: SourceFile) -> str:
    return "\t" if ".tsv" in file.path else ","


def _csv_names(start: bytes, file: SourceFile) -> list[str]:
    lenient = pacsv.ParseOptions(
        delimiter=_delimiter(file), newlines_in_values=True, invalid_row_handler=lambda row: "skip"
    )
    with pacsv.open_csv(pa.BufferReader(start), parse_options=lenient) as reader:
        names: list[str] = reader.schema.names
    return names


def _read_csv(file: SourceFile, typed: set[str]) -> pa.Table:
    with file.open() as stream:
        names = _csv_names(stream.read(_HEAD_BYTES), file)
    # Line breaks occur inside titles, never inside the numbers of interactions, which parse faster without them.
    parse = pacsv.ParseOptions(delimiter=_delimiter(file), newlines_in_values=not typed)
    convert = pacsv.ConvertOptions(column_types={name: pa.string() for name in names if name not in typed})
    try:
        with file.open() as stream:
            return pacsv.read_csv(stream, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid:
        # Only the single-threaded reader reports the faulty row.
        single = pacsv.ReadOptions(use_threads=False)
        with file.open() as stream:
            return pacsv.read_csv(stream, read_options=single, parse_options=parse, convert_options=convert)


def _read_json(file: SourceFile) -> pa.Table:
    with file.open() as stream:
        return _json_table(stream)


def _json_table(stream: pa.NativeFile) -> pa.Table:
    return pajson.read_json(stream, read_options=pajson.ReadOptions(block_size=_JSON_BLOCK))


def common_schema(schemas: Sequence[pa.Schema], table: str) -> pa.Schema:
    """Columns of several files of one table. Raises SchemaError if they disagree on a column's type."""
    try:
        return pa.unify_schemas(list(dict.fromkeys(schemas)), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(
            f"source.{table}: its {len(schemas)} files disagree on a column's type ({error}). Use the same "
            "type in all files."
        ) from None


# ----------------------------------------------------------------------------------------------------------------- lake
# Tables of a lake, by snapshot: `iceberg:CATALOG.NAMESPACE.TABLE[@SNAPSHOT]` and `delta:PATH-OR-URI[@VERSION]`.
#
# Each is resolved to its Parquet data files, which are read like any others; the snapshot is part of the
# fingerprint. Needs the extra `lake` (pyiceberg, deltalake).


_SCHEMES = ("iceberg:", "delta:")
_SNAPSHOT = re.compile(r"@(\d+)$")  # Azure addresses contain another @
_INSTALL = "Install owlrec's extra `lake`: pip install 'owlrec[lake]'."

_CHECK = "Correct its name or snapshot in the recipe, or the settings of its catalog or store."


def is_lake_table(name: str) -> bool:
    """Whether a recipe's path is a lake table."""
    return name.startswith(_SCHEMES)


def lake_files(name: str) -> tuple[list[SourceFile], str]:
    """Data files of a table's snapshot, and the name of that snapshot.

    Raises SourceError if the package is missing, the table cannot be opened, or rows are deleted by other files.
    """
    scheme, _, table = name.partition(":")
    table, version = _SNAPSHOT.sub("", table), _SNAPSHOT.search(table)
    try:
        paths, snapshot = (_iceberg if scheme == "iceberg" else _delta)(
            name, table, int(version[1]) if version else None
        )
    except ImportError as error:
        raise SourceError(f"{name}: {error.name} is not installed. {_INSTALL}") from None
    if not paths:
        raise SourceError(f"{name}: the table has no data files. Correct its name or its snapshot.")
    files = in_threads(input_files, sorted(paths))
    return [file for shares in files for file in shares], f"{scheme}@{snapshot}"


def _iceberg(name: str, table: str, snapshot: int | None) -> tuple[list[str], str]:
    from pyiceberg.catalog import load_catalog

    catalog, _, identifier = table.partition(".")
    try:
        opened = load_catalog(catalog).load_table(identifier)
        tasks = list(opened.scan(snapshot_id=snapshot).plan_files())
    except Exception as error:  # pyiceberg's catalogs raise their own classes and those of their back ends
        raise SourceError(f"{name}: the table cannot be opened ({type(error).__name__}: {error}). {_CHECK}") from error
    if any(task.delete_files for task in tasks):
        raise SourceError(f"{name}: it has delete files, which are not supported. Compact the table first.")
    current = opened.current_snapshot()
    paths = [task.file.file_path.removeprefix("file://") for task in tasks]
    return paths, str(snapshot or (current.snapshot_id if current else 0))


def _delta(name: str, table: str, version: int | None) -> tuple[list[str], str]:
    from deltalake import DeltaTable

    try:
        opened = DeltaTable(table, version=version)
        paths = [path.removeprefix("file://") for path in opened.file_uris()]
        features = opened.protocol().reader_features or []
    except Exception as error:  # deltalake's classes have no common base, and its stores raise OSError
        raise SourceError(f"{name}: the table cannot be opened ({type(error).__name__}: {error}). {_CHECK}") from error
    if "deletionVectors" in features:
        raise SourceError(f"{name}: it has deletion vectors, which are not supported. Purge the table first.")
    return paths, str(opened.version())
