"""Converts tables with raw ids to contract tables: int64 ids by `stable_ids`, attributes as text, validation.

A source yields its tables in pieces. `users_piece`, `items_piece` and `interactions_piece` convert one to the
contract's columns and validate it row by row. Checks that need all rows of an id (`refuse_repeated_ids`,
`refuse_repeated_interactions`, `refuse_orphans`) run on whole tables here and on one bucket of ids at a time at scale.
Ids are hashed once per distinct raw id, never per interaction.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.config import Config
from owlrec.errors import SchemaError, SourceError, did_you_mean
from owlrec.ids import rows_of, shard_of
from owlrec.schema import INTERACTIONS, ITEMS, USERS, check_milliseconds, conform, missing_column, stable_ids
from owlrec.sources.outcomes import CARRIED, outcome_columns
from owlrec.storage import file_digest, fingerprint

# --------------------------------------------------------------------------------------------------------------- titles
# Film titles in their usual form: an LLM knows "The Usual Suspects" better than a catalog's "Usual Suspects, The".
#
# The year stays in the title, because it distinguishes remakes, and is also a separate attribute.


_ARTICLES = (
    r"The|A|An|Le|La|Les|L'|Un|Une|"  # English, French
    r"Il|Lo|Gli|I|Uno|Una|El|Los|Las|O|Os|As|"  # Italian, Spanish, Portuguese
    r"Der|Die|Das|Den|Ein|Eine|De|Het|Een|Det|En|Ett"  # German, Dutch, Scandinavian
)
# An article counts only at the end of the title or of an alternative title in brackets, so "Paris, Texas" stays.
_TRAILING_ARTICLE = re.compile(rf"(^|\((?:a\.k\.a\. )?)([^()]+), ({_ARTICLES})(?=\)|\s*\(|\s*$)")
_YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)")


def natural_title(title: str) -> str:
    """`title` with trailing articles in front: "Usual Suspects, The (1995)" becomes "The Usual Suspects (1995)"."""

    def moved(match: re.Match[str]) -> str:
        opening, name, article = match.groups()
        return f"{opening}{article}{'' if article.endswith(chr(39)) else ' '}{name}"

    return _TRAILING_ARTICLE.sub(moved, title.strip())


def title_year(title: str) -> str:
    """The last four-digit year in brackets in `title`, or ""."""
    years = _YEAR.findall(title)
    return years[-1] if years else ""


# ------------------------------------------------------------------------------------------------------------------ raw


TableName = Literal["users", "items", "interactions"]
TABLE_NAMES: tuple[TableName, ...] = ("items", "users", "interactions")  # items first: they have the fewest rows
ENTITIES: dict[TableName, tuple[str, pa.Schema]] = {"users": ("user_id", USERS), "items": ("item_id", ITEMS)}
_TEXTS = (pa.field("event", pa.string()), pa.field("split", pa.string()))
_INTERACTION = {field.name: field for field in (*INTERACTIONS, *_TEXTS)}
ORPHAN_REMEDY = "Add the row, or set source.drop_orphans: true in the recipe."


@dataclass(frozen=True)
class RawTables:
    """users and items as in `schema`, interactions before a label rule (see interactions_piece); `digest` covers the
    source's config and all bytes read.
    """

    users: pa.Table
    items: pa.Table
    interactions: pa.Table
    digest: str
    counts: dict[str, int] = field(default_factory=dict)  # dropped rows, by reason


@dataclass(frozen=True)
class Fragment:
    """A part of a source for one read: some row groups, a file, or (table "") all of it."""

    table: str
    path: str
    digest: str  # identifies the content
    rows: int  # estimated from bytes if unknown
    bytes: int = 0
    first_row: int = 0  # in its file
    groups: tuple[int, int] = (0, 0)  # row groups of a Parquet file: from, to

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Fragment":
        """Parses the output of `json`."""
        return cls(**{**values, "groups": tuple(values["groups"])})

    def json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """Rows of one contract table."""

    table: TableName
    data: pa.Table
    name: str  # of the source file
    first_row: int = 0  # in that file


class Fragments:
    """A source as fragments that workers read one at a time."""

    fragments: Sequence[Fragment]
    meaning: str  # fingerprint of how fragments are read
    has_users: bool = True  # otherwise users come from the interactions
    drop_orphans: bool = False
    names: Mapping[str, str]  # table -> name in errors
    outcomes: Sequence[str]  # OUTCOME_COLUMNS in the interactions
    carried: Sequence[str] = ()  # further columns of the interactions that `read` keeps: features and labels

    def carry(self, columns: Sequence[str]) -> None:
        """Sets `carried`. Raises SchemaError for a column that the interactions do not have."""
        has = self.interaction_columns
        for column in columns:
            if column not in has:
                raise SchemaError(
                    f"{self.names['interactions']}: the interactions have no column '{column}', which `features."
                    f"interactions` or `ctr.tasks` of the recipe names; they have {', '.join(has)}."
                    f"{did_you_mean(column, has)} Correct the name, or add the column."
                )
        self.carried = tuple(columns)

    @property
    @abstractmethod
    def interaction_columns(self) -> Sequence[str]:
        """Columns of the interactions, with our names."""

    @abstractmethod
    def read(self, fragment: Fragment) -> Iterator[Piece]:
        """The fragment's rows. Raises SourceError or SchemaError with file and row."""

    @abstractmethod
    def raw_ids(self, piece: Piece, row: int) -> tuple[str, str]:
        """Raw user and item id of a row of interactions: only for errors, since it reads the file again."""

    counts: Mapping[str, int] = {}


class LoadedTables(Fragments):
    """A source that fits in memory, as one fragment."""

    def __init__(self, raw: RawTables, name: str) -> None:
        """name: of the source, in errors."""
        self._raw, self.counts = raw, raw.counts
        self.fragments = [Fragment("", name, raw.digest, raw.interactions.num_rows)]
        self.meaning, self.names = "", dict.fromkeys(TABLE_NAMES, name)
        self.outcomes = outcome_columns(raw.interactions.column_names)

    @property
    def interaction_columns(self) -> Sequence[str]:
        """See Fragments."""
        names: list[str] = self._raw.interactions.column_names
        return names

    def read(self, fragment: Fragment) -> Iterator[Piece]:
        """See Fragments."""
        for table in TABLE_NAMES:
            yield Piece(table, getattr(self._raw, table), fragment.path)

    def raw_ids(self, piece: Piece, row: int) -> tuple[str, str]:
        """See Fragments."""
        return str(piece.data["user_id"][row]), str(piece.data["item_id"][row])


class Source(Config):
    """A recipe's source section and its reader."""

    type: str  # in a subclass: a Literal of its name in SOURCES

    @abstractmethod
    def load(self) -> RawTables:
        """All users, items and interactions, in memory. Raises SourceError or SchemaError with file and row."""

    def open(self) -> Fragments:
        """Source for `prepare`. Override it if the tables may not fit in memory. Raises the errors of `load`."""
        return LoadedTables(self.load(), self.type)


def input_file(path: str | Path) -> Path:
    """`path` with ~ expanded. Raises SourceError if the file does not exist."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise SourceError(f"{path}: file not found. Correct the path in the recipe's source section.")
    return file


def finish(
    config: Config,
    files: Sequence[Path],
    *,
    users: pa.Table | None,
    items: pa.Table,
    interactions: pa.Table,
    names: Mapping[str, str],
    drop_orphans: bool = False,
    orphan_remedy: str = ORPHAN_REMEDY,
    counts: Mapping[str, int] | None = None,
) -> RawTables:
    """Contract tables from whole tables with raw ids.

    users: user_id (raw, of any scalar type) and profile fields; None takes the users from the interactions. items:
    item_id (raw), title and attributes. interactions: see interactions_piece. names: table -> its name in
    errors. Attributes become text or lists of text, nulls "". Raises SchemaError for a null or
    duplicate id, two raw ids with one hash, an exact duplicate (user, item, timestamp), a wrong time unit, and, unless
    `drop_orphans`, an interaction whose user or item has no row.
    """
    piece = interactions_piece(interactions, names["interactions"])
    if users is None:
        users = pa.table({"user_id": interactions["user_id"].unique()})
    pieces = [
        entities_piece("users", users, names["users"]),
        entities_piece("items", items, names["items"]),
        Piece("interactions", piece, names["interactions"]),
    ]

    def raw_ids(piece: Piece, row: int) -> tuple[str, str]:
        return str(interactions["user_id"][row]), str(interactions["item_id"][row])

    digest = fingerprint(config, [file_digest(file) for file in files])
    return checked(pieces, raw_ids, digest, names, drop_orphans, orphan_remedy, counts or {})


def checked(
    pieces: Sequence[Piece],
    raw_ids: Callable[[Piece, int], tuple[str, str]],
    digest: str,
    names: Mapping[str, str],
    drop_orphans: bool,
    orphan_remedy: str = ORPHAN_REMEDY,
    counts: Mapping[str, int] | None = None,
) -> RawTables:
    """All pieces of a source as three tables. Arguments and errors: see finish."""
    tables: dict[str, pa.Table] = {}
    for name in TABLE_NAMES:
        own = [piece for piece in pieces if piece.table == name]
        tables[name] = pa.concat_tables([piece.data for piece in own])
        if tables[name].num_rows == 0:
            raise no_rows(names[name])
    for name, (key, _) in ENTITIES.items():
        refuse_repeated_ids(tables[name], key, Places(pieces, name, raw_ids))
    interactions = tables["interactions"]
    places = Places(pieces, "interactions", raw_ids)
    refuse_repeated_interactions(interactions, places)
    user_ids, item_ids = (np.sort(tables[name][key].to_numpy()) for name, (key, _) in ENTITIES.items())
    orphan_user, orphan_item = (
        rows_of(user_ids, interactions["user_id"].to_numpy()) < 0,
        rows_of(item_ids, interactions["item_id"].to_numpy()) < 0,
    )
    dropped = dict(counts or {})
    if drop_orphans:
        dropped["orphans_dropped"] = int((orphan_user | orphan_item).sum())
        interactions = interactions.filter(pa.array(~(orphan_user | orphan_item)))
        if interactions.num_rows == 0:
            raise no_rows(names["interactions"])
    else:
        refuse_orphans(orphan_user, orphan_item, places, names, orphan_remedy)
    return RawTables(tables["users"], tables["items"], interactions, digest, dropped)


@dataclass(frozen=True)
class Place:
    """Position of a row in the source."""

    name: str
    row: int
    user: str = ""  # raw ids, of an interaction
    item: str = ""


class Places:
    """Finds the source position of a row of concatenated pieces, for errors."""

    def __init__(
        self, pieces: Sequence[Piece], table: str, raw_ids: Callable[[Piece, int], tuple[str, str]] | None
    ) -> None:
        self._pieces = [piece for piece in pieces if piece.table == table]
        self._raw_ids = raw_ids if table == "interactions" else None

    def __call__(self, row: int) -> Place:
        """Position of a row."""
        for piece in self._pieces:
            if row < piece.data.num_rows:
                user, item = self._raw_ids(piece, row) if self._raw_ids else ("", "")
                return Place(piece.name, piece.first_row + row, user, item)
            row -= piece.data.num_rows
        raise IndexError(row)


# One piece of a table


def entities_piece(table: TableName, data: pa.Table, name: str, first_row: int = 0) -> Piece:
    """Users or items as in `schema`: the id, the raw id, and all other columns as text or lists of text.

    Raises SchemaError with file and row for a null or empty id, or a column that is neither text nor texts.
    """
    key, schema = ENTITIES[table]
    raw = _raw_ids(data, key, name, first_row).cast(pa.string())
    columns: dict[str, Any] = {key: id_array(raw), "raw_id": raw}
    for column in data.column_names:
        if column not in columns:
            columns[column] = _as_text(data[column], column, name)
    return Piece(table, conform(pa.table(columns), schema, name=name), name, first_row)


def interactions_piece(data: pa.Table, name: str, first_row: int = 0, carried: Sequence[str] = ()) -> pa.Table:
    """Interactions with int64 ids, before a label rule, without checking that their users and items exist.

    data: user_id, item_id (raw), timestamp (ms) and any of OUTCOME_COLUMNS, which are kept
    unchanged. carried: further columns, as text or lists of text.
    Raises SchemaError with file and row for a null or empty id, a null or implausible timestamp, or a value
    of another type.
    """
    ids = {key: id_array(_raw_ids(data, key, name, first_row)) for key in ("user_id", "item_id")}
    _refuse_null(data, "timestamp", name, first_row)
    outcome_names = outcome_columns(data.column_names)
    table = pa.table({**ids, "timestamp": data["timestamp"], **{column: data[column] for column in outcome_names}})
    schema = pa.schema([_INTERACTION[column] for column in table.column_names])
    table = conform(table, schema, name=name, first_row=first_row)
    check_milliseconds(table["timestamp"], name=name, first_row=first_row)
    for column in carried:
        table = table.append_column(CARRIED + column, _as_text(data[column], column, name))
    return table


def hashed_users(data: pa.Table, interactions: pa.Table) -> pa.Table:
    """Distinct users of some interactions whose raw ids are not canonical integers (others follow from the id).

    data: with the raw ids of `interactions`.
    """
    if pa.types.is_integer(data["user_id"].type):
        raw = pa.chunked_array([], pa.string())
    else:
        raw = data["user_id"].cast(pa.string()).unique()
    ids = id_array(pa.chunked_array([raw]) if isinstance(raw, pa.Array) else raw)
    users = pa.table({"user_id": pa.array(ids), "raw_id": raw}, schema=USERS)
    return users.filter(pc.not_equal(users["user_id"].cast(pa.string()), users["raw_id"]))


def with_raw_ids(ids: pa.Array, texts: pa.Table) -> pa.Table:
    """A users table with these distinct ids. texts: rows of `hashed_users`; all other ids equal their raw ids."""
    texts = texts.group_by(["user_id", "raw_id"]).aggregate([])
    others = ids.filter(pc.invert(pc.is_in(ids, value_set=texts["user_id"].combine_chunks())))
    plain = pa.table({"user_id": others, "raw_id": others.cast(pa.string())}, schema=texts.schema)
    users = pa.concat_tables([texts, plain])
    place = pc.index_in(users["user_id"], value_set=ids)
    return users.take(pc.sort_indices(place))


def id_array(raw: pa.ChunkedArray) -> np.ndarray:
    """int64 id of each raw id, int64 [n]; distinct texts are parsed or hashed once."""
    if pa.types.is_integer(raw.type):
        values = pa.concat_arrays(raw.chunks) if raw.num_chunks else pa.array([], raw.type)
        return stable_ids(values)
    encoded = raw.dictionary_encode().unify_dictionaries()
    if encoded.num_chunks == 0:
        return np.zeros(0, dtype=np.int64)
    ids = stable_ids(encoded.chunk(0).dictionary.cast(pa.string()))
    return ids[np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])]


def _raw_ids(table: pa.Table, key: str, name: str, first_row: int) -> pa.ChunkedArray:
    """Raw ids in column `key`, integers or strings. Raises SchemaError for a missing column, a null or an empty id."""
    if key not in table.column_names:
        raise missing_column(table, key, name=name)
    _refuse_null(table, key, name, first_row)
    column = table[key]
    if pa.types.is_integer(column.type):
        return column
    try:
        column = column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise SchemaError(f"{name}: column '{key}' has type {column.type}. Write ids as integers or text.") from None
    if (row := pc.index(column, "").as_py()) >= 0:
        raise SchemaError(
            f"{name}, row {first_row + row}: {key} is empty. Drop the row or add an id; rows without ids "
            "cannot be joined."
        )
    return column


def _refuse_null(table: pa.Table, column: str, name: str, first_row: int) -> None:
    if table[column].null_count:
        row = first_row + pc.index(pc.is_null(table[column]), True).as_py()
        raise SchemaError(
            f"{name}, row {row}: {column} is null. Drop the row or add a value; rows without one cannot be joined."
        )


def _as_text(column: pa.ChunkedArray, name: str, table: str) -> pa.ChunkedArray | pa.Array:
    """A column as string or list<string>: null and NaN become "", a null list the empty list."""
    type_ = column.type
    try:
        if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
            lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type_)
            lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            return pa.ListArray.from_arrays(pa.array(offsets), lists.flatten().cast(pa.string()).fill_null(""))
        if pa.types.is_floating(type_):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, type_), column)
        return column.cast(pa.string()).fill_null("")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise SchemaError(
            f"{table}: column '{name}' has type {type_}, which is neither text nor a list of texts ({error}). "
            "Drop the column or convert it to text."
        ) from None


# All rows of some ids


def no_rows(name: str) -> SchemaError:
    """Error for a table without rows."""
    return SchemaError(f"{name}: the table has no rows. Check the file and the filters in the recipe's source section.")


def refuse_repeated_ids(table: pa.Table, key: str, where: Callable[[int], Place]) -> None:
    """Refuses a second row with one id, and two raw ids with one hash. table: all rows of its ids."""
    ids = table[key].to_numpy()
    order = np.argsort(ids, kind="stable")
    repeated = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if not len(repeated):
        return
    at = repeated[np.argmin(order[repeated + 1])]
    first, row = int(order[at]), int(order[at + 1])
    raw, other = table["raw_id"][row].as_py(), table["raw_id"][first].as_py()
    place = where(row)
    if raw != other:
        raise SchemaError(
            f"{place.name}: the raw ids '{other}' and '{raw}' of {key} both hash to {ids[row]}. "
            f"Rename one of them in the data (a prefix is enough)."
        )
    raise SchemaError(
        f"{place.name}, row {place.row}: {key} '{raw}' is a duplicate ({len(repeated)} such rows so far). Keep "
        "one row per id."
    )


def refuse_repeated_interactions(
    table: pa.Table, where: Callable[[int], Place], order: np.ndarray | None = None
) -> None:
    """Refuses a second interaction of one user with one item at one moment, naming the first one's raw ids.

    order: of the rows by user, timestamp and item, if known.
    """
    user, item, time = (table[c].to_numpy() for c in ("user_id", "item_id", "timestamp"))
    if order is None:
        order = np.lexsort((item, time, user))
    user, item, time = user[order], item[order], time[order]
    same = np.flatnonzero((user[1:] == user[:-1]) & (time[1:] == time[:-1]) & (item[1:] == item[:-1])) + 1
    if len(same):
        row = int(order[same].min())
        place = where(row)
        raise SchemaError(
            f"{place.name}, row {place.row}: user_id '{place.user}', item_id '{place.item}', timestamp "
            f"{table['timestamp'][row].as_py()} is a duplicate ({len(same)} such rows so far). Drop the "
            "duplicates, or give repeated interactions different timestamps."
        )


def refuse_orphans(
    orphan_user: np.ndarray,
    orphan_item: np.ndarray,
    where: Callable[[int], Place],
    names: Mapping[str, str],
    remedy: str = ORPHAN_REMEDY,
) -> None:
    """Refuses interactions whose user or item has no row. orphan_*: bool [n], per interaction."""
    for kind, orphan in (("user", orphan_user), ("item", orphan_item)):
        if orphan.any():
            place = where(int(orphan.argmax()))
            raise SchemaError(
                f"{place.name}, row {place.row}: {kind}_id '{place.user if kind == 'user' else place.item}' has no "
                f"row in {names[f'{kind}s']} ({int(orphan.sum())} such interactions so far). {remedy}"
            )


# --------------------------------------------------------------------------------------------------------------- subset
# A smaller copy of a data set that behaves like the original: users sampled by hash, then the items they touched.
#
# Sampling users by the hash of their id needs no random state: the same recipe gives the same users on any machine, and
# a larger `max_users` gives a superset of them.


# A modulus this large keeps the whole hash, so the order does not follow the shards, which are its low bits.
_ORDER = 1 << 62


def keep_subset(raw: RawTables, *, max_users: int | None, max_items: int | None) -> RawTables:
    """`raw` with the `max_users` users of the smallest hash, and the `max_items` most frequent of their items.

    Drops interactions with other users or items, then users and items without interactions. Without limits, returns
    `raw`. Ties between equally frequent items go to the smaller item_id.
    """
    if max_users is None and max_items is None:
        return raw
    interactions = raw.interactions
    if max_users is not None:
        ids = raw.users["user_id"].to_numpy()
        kept = ids[np.lexsort((ids, shard_of(ids, _ORDER)))[:max_users]]
        interactions = _rows_in(interactions, "user_id", kept)
    if max_items is not None:
        ids, frequency = np.unique(interactions["item_id"].to_numpy(), return_counts=True)
        interactions = _rows_in(interactions, "item_id", ids[np.lexsort((ids, -frequency))[:max_items]])
    return replace(
        raw,
        users=_rows_in(raw.users, "user_id", interactions["user_id"].unique().to_numpy()),
        items=_rows_in(raw.items, "item_id", interactions["item_id"].unique().to_numpy()),
        interactions=interactions,
    )


def _rows_in(table: pa.Table, column: str, values: np.ndarray) -> pa.Table:
    return table.filter(pc.is_in(table[column], value_set=pa.array(values)))
