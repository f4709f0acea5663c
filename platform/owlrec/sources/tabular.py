"""Your own data: three tables as Parquet, CSV or JSON lines, on disks or object stores, or Iceberg or Delta tables.

A recipe maps column names. Columns that are neither ids nor mapped are kept, as profile fields of users and
attributes of items.
"""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from owlrec.errors import SchemaError, SourceError, WorkspaceError, did_you_mean
from owlrec.schema import missing_column
from owlrec.shards import in_threads
from owlrec.sources.outcomes import outcome_columns
from owlrec.sources.raw import (
    ENTITIES,
    TABLE_NAMES,
    Fragment,
    Fragments,
    Piece,
    RawTables,
    Source,
    TableName,
    checked,
    entities_piece,
    hashed_users,
    interactions_piece,
    with_raw_ids,
)
from owlrec.storage import Storage, fingerprint

# ---------------------------------------------------------------------------------------------------------------- files
# The files of a source, on a disk or an object store, and their rows: Parquet, CSV and JSON lines.
#
# CSV is read as text except for ratings and timestamps, since guessing types would turn the id "007" into 7.


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


# -------------------------------------------------------------------------------------------------------------- tabular
# Your own data: three tables as Parquet, CSV or JSON lines, or as Iceberg or Delta tables, with a mapping of column
# names.
#
# Columns that are neither ids nor mapped are kept as profile fields of users and attributes of items.


FRAGMENT_ROWS = 1 << 21  # rows of row groups read together
FRAGMENT_BYTES = 128 << 20
_ROW_BYTES = {"users": 64, "items": 128, "interactions": 32}  # approximate bytes per line of text
_THREADS = 32  # threads that open files: on an object store each mostly waits


class TableSource(Source):
    """Tables in files. `columns` maps our column names to the file's, per table: {items: {title: name}}."""

    type: Literal["table"]
    users: str | None = None  # default: the users of the interactions, without profiles
    items: str
    interactions: str
    columns: dict[TableName, dict[str, str]] = {}
    timestamp_unit: Literal["s", "ms", "us", "ns"] = "ms"
    drop_orphans: bool = False  # drop interactions whose user or item has no row instead of failing

    def open(self) -> Fragments:
        """The files as fragments, with checked columns. Raises SourceError if a file is missing or cannot be
        parsed, and SchemaError if one lacks a column or files disagree.
        """
        return FileFragments(self)

    def load(self) -> RawTables:
        """The three tables, in memory. Raises the errors of `open`, and SchemaError if their content breaks the
        contract."""
        fragments = self.open()
        pieces = [piece for fragment in fragments.fragments for piece in fragments.read(fragment)]
        if not self.users:
            seen = {piece.name: piece for piece in pieces if piece.table == "interactions"}
            texts = pa.concat_tables([piece.data for piece in pieces if piece.table == "users"])
            ids = pa.concat_tables([piece.data for piece in seen.values()])["user_id"].unique()
            pieces = [piece for piece in pieces if piece.table != "users"]
            pieces.append(Piece("users", with_raw_ids(ids, texts), self.interactions))
        digest = fingerprint(self, [fragment.digest for fragment in fragments.fragments])
        return checked(pieces, fragments.raw_ids, digest, fragments.names, self.drop_orphans)


class FileFragments(Fragments):
    """The files of a TableSource."""

    def __init__(self, source: TableSource) -> None:
        """Lists the files and reads their columns. Errors: see TableSource.open."""
        self._source = source
        self.drop_orphans, self.has_users = source.drop_orphans, source.users is not None
        paths = {"users": source.users or source.interactions, "items": source.items}
        self.names = paths | {"interactions": source.interactions}
        self.fragments: list[Fragment] = []
        self._attributes: dict[str, pa.Schema] = {}
        for table in TABLE_NAMES:
            if table != "users" or self.has_users:
                self._list(table, self.names[table])
        columns = {table: sorted(columns.items()) for table, columns in source.columns.items()}
        attributes = {table: [str(field) for field in schema] for table, schema in self._attributes.items()}
        self._meaning = fingerprint(columns, source.timestamp_unit, self.has_users, attributes)

    @property
    def meaning(self) -> str:  # type: ignore[override]
        """See Fragments."""
        return fingerprint(self._meaning, list(self.carried)) if self.carried else self._meaning

    @property
    def interaction_columns(self) -> Sequence[str]:
        """See Fragments."""
        return self._interaction_columns

    def _list(self, table: TableName, pattern: str) -> None:
        files, snapshot = lake_files(pattern) if is_lake_table(pattern) else (input_files(pattern), "")
        typed = self._typed(table)
        with ThreadPoolExecutor(min(_THREADS, len(files))) as pool:
            heads = list(pool.map(lambda file: head(file, typed), files))
        schemas = []
        for file, (schema, footer) in zip(files, heads, strict=True):
            schemas.append(self._checked_columns(table, file, schema))
            self.fragments += fragments_of(table, file, footer, snapshot)
        if table in ENTITIES:
            self._attributes[table] = common_schema(schemas, table)
        else:
            self._interaction_columns = common_schema(schemas, table).names
            self.outcomes = self._common_outcomes(files, schemas)

    def _common_outcomes(self, files: Sequence[SourceFile], schemas: Sequence[pa.Schema]) -> list[str]:
        first = outcome_columns(schemas[0].names)
        for file, schema in zip(files, schemas, strict=True):
            if (other := outcome_columns(schema.names)) != first:
                mine = " and ".join(other) or "neither rating, label, event, split nor weight"
                raise SchemaError(
                    f"{file.path} has {mine}, but {files[0].path} has "
                    f"{' and '.join(first) or 'none of these'}. All interactions files need the same columns."
                )
        return first

    def _typed(self, table: TableName) -> set[str]:
        """Columns whose types are guessed in CSV files, by name."""
        mapping = self._source.columns.get(table, {})
        numbers = ("rating", "label", "timestamp", "weight")
        return {mapping.get(c, c) for c in numbers} if table == "interactions" else set()

    def _checked_columns(self, table: TableName, file: SourceFile, schema: pa.Schema) -> pa.Schema:
        """A file's columns with our names. Raises SchemaError if a required one is missing."""
        empty = _rename(schema.empty_table(), self._source.columns.get(table, {}), table, file.path)
        needed = {"users": ("user_id",), "items": ("item_id", "title")}.get(table, ("user_id", "item_id", "timestamp"))
        for column in needed:
            if column not in empty.column_names:
                raise missing_column(empty, column, name=file.path, section=f"source.columns.{table}")
        return empty.schema

    def read(self, fragment: Fragment) -> Iterator[Piece]:
        """See Fragments."""
        name, first_row = fragment.path, fragment.first_row
        table: TableName = fragment.table  # type: ignore[assignment]
        data = self._raw(fragment)
        if table == "interactions":
            time = to_milliseconds(data["timestamp"], self._source.timestamp_unit, name=name)
            for column in self.carried:  # a column of other files
                if column not in data.column_names:
                    data = data.append_column(column, pa.nulls(data.num_rows, pa.string()))
            data = data.select(["user_id", "item_id", *dict.fromkeys([*self.outcomes, *self.carried])])
            data = data.append_column("timestamp", time)
            rows = interactions_piece(data, name, first_row, self.carried)
            yield Piece("interactions", rows, name, first_row)
            if not self.has_users:
                yield Piece("users", hashed_users(data, rows), name, first_row)
        else:
            schema = self._attributes[table]
            for field in schema:  # a column of other files
                if field.name not in data.column_names:
                    data = data.append_column(field, pa.nulls(data.num_rows, field.type))
            yield entities_piece(table, data.select(schema.names), name, first_row)

    def raw_ids(self, piece: Piece, row: int) -> tuple[str, str]:
        """See Fragments."""
        for fragment in self.fragments:
            if fragment.path == piece.name and fragment.first_row == piece.first_row:
                data = self._raw(fragment)
                return str(data["user_id"][row]), str(data["item_id"][row])
        raise IndexError(row)

    def _raw(self, fragment: Fragment) -> pa.Table:
        table: TableName = fragment.table  # type: ignore[assignment]
        file = SourceFile(fragment.path, fragment.bytes, "")
        groups = fragment.groups if file_format(file) == "parquet" else None
        data = read_file(file, self._typed(table), groups)
        return _rename(data, self._source.columns.get(table, {}), table, fragment.path)


def fragments_of(
    table: TableName, file: SourceFile, footer: pq.FileMetaData | None, snapshot: str = ""
) -> list[Fragment]:
    """Runs of row groups of up to FRAGMENT_ROWS, or the whole of a text file."""
    if footer is None:
        rows = max(1, file.bytes * (4 if file.path.endswith(".gz") else 1) // _ROW_BYTES[table])
        return [Fragment(table, file.path, fingerprint(file.path, file.e_tag, file.bytes), rows, file.bytes)]
    fragments, first_row, begin, rows, size = [], 0, 0, 0, 0
    for group in range(footer.num_row_groups):
        meta = footer.row_group(group)
        rows, size = rows + meta.num_rows, size + meta.total_byte_size
        following = footer.row_group(group + 1).num_rows if group + 1 < footer.num_row_groups else FRAGMENT_ROWS + 1
        if rows + following > FRAGMENT_ROWS or size > FRAGMENT_BYTES:
            digest = fingerprint(file.path, file.e_tag, file.bytes, begin, group + 1, snapshot)
            fragments.append(Fragment(table, file.path, digest, rows, size, first_row, (begin, group + 1)))
            first_row, begin, rows, size = first_row + rows, group + 1, 0, 0
    return fragments


def _rename(data: pa.Table, mapping: Mapping[str, str], table: TableName, file: str) -> pa.Table:
    for ours, theirs in mapping.items():
        if theirs not in data.column_names:
            raise SchemaError(
                f"{file}: source.columns.{table} maps {ours} to column '{theirs}', which the file does not "
                f"have.{did_you_mean(theirs, data.column_names)}"
            )
    rest = [c for c in data.column_names if c not in mapping and c not in mapping.values()]
    return pa.table({**{ours: data[theirs] for ours, theirs in mapping.items()}, **{c: data[c] for c in rest}})


def to_milliseconds(column: pa.ChunkedArray, unit: Literal["s", "ms", "us", "ns"], *, name: str) -> pa.ChunkedArray:
    """Timestamps as ms since 1970, UTC. Dates and Arrow timestamps have a unit; for numbers it is `unit`.

    Times without a zone count as UTC, fractions of a millisecond are truncated, text is returned unchanged. Raises
    SchemaError for numbers too large for the unit.
    """
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return column.cast(pa.timestamp("ms", getattr(column.type, "tz", None)), safe=False).cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return column
    if unit == "s":
        try:
            column = pc.multiply_checked(column, 1000)
        except pa.ArrowInvalid:
            raise SchemaError(
                f"{name}: timestamp {pc.max(column).as_py()} is not a number of seconds since 1970. "
                f"Set source.timestamp_unit to its real unit in the recipe."
            ) from None
    elif unit != "ms":
        column = pc.divide(column, {"us": 1_000, "ns": 1_000_000}[unit])
    return pc.floor(column) if pa.types.is_floating(column.type) else column
