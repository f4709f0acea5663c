"""Your own data: three tables as Parquet or CSV, each a file, a folder or a glob, with a mapping of column names.

CSV is read as text except for ratings and timestamps, since guessing types would turn the id "007" into 7. Columns that
are neither ids nor mapped are kept, as profile fields of users and attributes of items.
"""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from owlrec.errors import SchemaError, SourceError, did_you_mean
from owlrec.schema import INTERACTIONS, missing_column
from owlrec.sources.raw import RawTables, Source, finish

_CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
TableName = Literal["users", "items", "interactions"]


class TableSource(Source):
    """Parquet or CSV tables. `columns` maps, for each table, our column name to the file's: {items: {title: name}}."""

    type: Literal["table"]
    users: str | None = None  # without it, users are those of the interactions and have no profile
    items: str
    interactions: str
    columns: dict[TableName, dict[str, str]] = {}
    timestamp_unit: Literal["s", "ms", "us", "ns"] = "ms"
    drop_orphans: bool = False  # drop interactions whose user or item has no row, in place of an error

    def load(self) -> RawTables:
        """The three tables. No rating column means implicit feedback, written as rating 1.

        Raises SourceError where a file is missing or cannot be parsed, SchemaError where its content breaks the
        contract.
        """
        names = {"users": self.users or self.interactions, "items": self.items, "interactions": self.interactions}
        paths = {table: input_files(path) for table, path in names.items()}
        items = self._read("items", paths["items"])
        interactions = self._read("interactions", paths["interactions"])
        if "title" not in items.column_names:
            raise missing_column(items, "title", name=self.items, section="source.columns.items")
        for column in ("user_id", "item_id", "timestamp"):
            if column not in interactions.column_names:
                section = "source.columns.interactions"
                raise missing_column(interactions, column, name=self.interactions, section=section)
        if "rating" not in interactions.column_names:
            interactions = interactions.append_column(
                "rating", pa.repeat(pa.scalar(1.0, pa.float32()), interactions.num_rows)
            )
        interactions = interactions.select(INTERACTIONS.names)
        timestamps = to_milliseconds(interactions["timestamp"], self.timestamp_unit, name=self.interactions)
        return finish(
            self,
            [file for table, files in paths.items() for file in files if table != "users" or self.users],
            users=self._read("users", paths["users"]) if self.users else None,
            items=items,
            interactions=interactions.set_column(3, "timestamp", timestamps),
            names=names,
            drop_orphans=self.drop_orphans,
        )

    def _read(self, table: TableName, files: Sequence[Path]) -> pa.Table:
        """The files of one table, concatenated, under our column names."""
        mapping = self.columns.get(table, {})
        typed = {mapping.get(c, c) for c in ("rating", "timestamp")} if table == "interactions" else set()
        parts = [_rename(read_file(file, typed), mapping, table, file) for file in files]
        try:
            return pa.concat_tables(parts, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SchemaError(
                f"source.{table}: its {len(files)} files disagree on a column's type ({error}). Write that column "
                "alike in all."
            ) from None


def input_files(pattern: str) -> list[Path]:
    """The files that a path names: itself, the Parquet and CSV files in a folder, or those matching a glob, sorted."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if not any(q.startswith((".", "_")) for q in p.relative_to(path).parts)]
    elif path.exists():
        return [path]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    files = sorted(p for p in found if p.is_file() and _format(p))
    if not files:
        raise SourceError(
            f"{pattern}: no Parquet or CSV file is there (names in .parquet, {', '.join(_CSV_SUFFIXES)}). "
            f"Correct the path in the recipe's source section."
        )
    return files


def _format(file: Path) -> Literal["parquet", "csv"] | None:
    if ".parquet" in file.name:
        return "parquet"
    return "csv" if file.name.endswith(_CSV_SUFFIXES) else None


def read_file(file: Path, typed: set[str]) -> pa.Table:
    """One Parquet or CSV file. In CSV only the columns in `typed` get a guessed type, all others are text.

    Raises SourceError for another kind of file or one that cannot be parsed.
    """
    format_ = _format(file)
    if format_ is None:
        raise SourceError(
            f"{file}: neither Parquet nor CSV by its name. Name it .parquet or {', '.join(_CSV_SUFFIXES)}."
        )
    try:
        # ParquetFile, since read_table would add columns for folder names such as day=3.
        return pq.ParquetFile(file).read() if format_ == "parquet" else _read_csv(file, typed)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{file}: the file cannot be read as {format_} ({error}). Correct or replace it.") from None


def _read_csv(file: Path, typed: set[str]) -> pa.Table:
    delimiter = "\t" if ".tsv" in file.name else ","
    lenient = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=lambda row: "skip")
    with pacsv.open_csv(file, parse_options=lenient) as reader:
        names = reader.schema.names
    # Line breaks occur inside titles, never inside the numbers of interactions, which are parsed faster without.
    parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=not typed)
    convert = pacsv.ConvertOptions(column_types={name: pa.string() for name in names if name not in typed})
    try:
        return pacsv.read_csv(file, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid:
        # Only the single-threaded reader says which row is wrong.
        return pacsv.read_csv(
            file, read_options=pacsv.ReadOptions(use_threads=False), parse_options=parse, convert_options=convert
        )


def _rename(data: pa.Table, mapping: dict[str, str], table: TableName, file: Path) -> pa.Table:
    for ours, theirs in mapping.items():
        if theirs not in data.column_names:
            raise SchemaError(
                f"{file}: source.columns.{table} maps {ours} to column '{theirs}', which the file "
                f"lacks.{did_you_mean(theirs, data.column_names)}"
            )
    rest = [c for c in data.column_names if c not in mapping and c not in mapping.values()]
    return pa.table({**{ours: data[theirs] for ours, theirs in mapping.items()}, **{c: data[c] for c in rest}})


def to_milliseconds(column: pa.ChunkedArray, unit: Literal["s", "ms", "us", "ns"], *, name: str) -> pa.ChunkedArray:
    """Timestamps as ms since 1970, UTC. Dates and Arrow timestamps know their unit; for numbers it is `unit`.

    Times without a zone count as UTC, fractions of a millisecond are cut off, text is returned as it is. Raises
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
                f"{name}: timestamp {pc.max(column).as_py()} is no number of seconds since 1970. "
                f"Set source.timestamp_unit to its real unit in the recipe."
            ) from None
    elif unit != "ms":
        column = pc.divide(column, {"us": 1_000, "ns": 1_000_000}[unit])
    return pc.floor(column) if pa.types.is_floating(column.type) else column
