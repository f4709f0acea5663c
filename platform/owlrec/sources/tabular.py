"""Your own data: three tables as Parquet, CSV or JSON lines, or as Iceberg or Delta tables, with a mapping of column
names.

Columns that are neither ids nor mapped are kept as profile fields of users and attributes of items.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from owlrec.errors import SchemaError, did_you_mean
from owlrec.schema import missing_column
from owlrec.sources.files import (
    SourceFile,
    common_schema,
    file_format,
    head,
    input_files,
    is_lake_table,
    lake_files,
    read_file,
)
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
from owlrec.storage import fingerprint

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
        self.meaning = fingerprint(columns, source.timestamp_unit, self.has_users, attributes)

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
            common_schema(schemas, table)
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
            data = data.select(["user_id", "item_id", *self.outcomes]).append_column("timestamp", time)
            rows = interactions_piece(data, name, first_row)
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
