"""What every source returns: the three contract tables, and a digest of what was read so that changed data is noticed.

A source reads its own format into tables that still carry raw ids; `finish` does the rest once for all of them: int64
ids by `stable_id`, attributes as text, and the checks. Ids are hashed once per distinct raw id, never per interaction,
so 10^7 interactions cost seconds.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.config import Config
from owlrec.errors import SchemaError, SourceError
from owlrec.ordered import run_starts
from owlrec.schema import INTERACTIONS, ITEMS, USERS, check_milliseconds, check_rows, conform, missing_column, stable_id
from owlrec.storage import file_digest, fingerprint

ORPHAN_REMEDY = "Add the row, or set source.drop_orphans: true in the recipe."


@dataclass(frozen=True)
class RawTables:
    """users, items, interactions as in `schema`; `digest` covers the source's config and all bytes read."""

    users: pa.Table
    items: pa.Table
    interactions: pa.Table
    digest: str
    counts: dict[str, int] = field(default_factory=dict)  # what was dropped on the way, by reason


class Source(Config):
    """What a recipe says of a source, and how it is read."""

    type: str  # of a subclass: a Literal of its name in SOURCES

    @abstractmethod
    def load(self) -> RawTables:
        """Reads users, items and interactions. Raises SourceError or SchemaError, naming file and row."""


def input_file(path: str | Path) -> Path:
    """`path` with ~ expanded. Raises SourceError where there is no such file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise SourceError(f"{path}: there is no such file. Correct the path in the recipe's source section.")
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
    """Contract tables from tables with raw ids.

    users: user_id (raw, of any scalar type) and profile fields; None takes the users from the interactions. items:
    item_id (raw), title and attributes. interactions: user_id, item_id (raw), rating, timestamp (ms, UTC). names: table
    -> what to call it in errors. Attributes become text or lists of text, nulls "". Raises SchemaError for a null or
    doubled id, two raw ids with one hash, an exact doubled (user, item, timestamp), a wrong time unit, and, unless
    `drop_orphans`, an interaction whose user or item has no row.
    """
    user_raw, user_codes = encode(_id_column(interactions, "user_id", names["interactions"]))
    item_raw, item_codes = encode(_id_column(interactions, "item_id", names["interactions"]))
    check_rows(interactions, name=names["interactions"], key=(), required=("timestamp",))
    if users is None:
        users = pa.table({"user_id": user_raw})
    user_table, user_ids, known_user = _entities(users, "user_id", user_raw, names["users"], USERS)
    item_table, item_ids, known_item = _entities(items, "item_id", item_raw, names["items"], ITEMS)

    orphan_user, orphan_item = ~known_user[user_codes], ~known_item[item_codes]
    dropped = dict(counts or {})
    if drop_orphans:
        dropped["orphans_dropped"] = int((orphan_user | orphan_item).sum())
    else:
        _refuse_orphans(orphan_user, interactions["user_id"], "user", names, orphan_remedy)
        _refuse_orphans(orphan_item, interactions["item_id"], "item", names, orphan_remedy)

    table = pa.table(
        {
            "user_id": user_ids[user_codes],
            "item_id": item_ids[item_codes],
            "rating": interactions["rating"],
            "timestamp": interactions["timestamp"],
        }
    )
    table = conform(table, INTERACTIONS, name=names["interactions"])
    check_milliseconds(table["timestamp"], name=names["interactions"])
    _check_doubled(table, interactions, names["interactions"])
    if drop_orphans:
        table = table.filter(pa.array(~(orphan_user | orphan_item)))
        check_rows(table, name=names["interactions"], key=())
    digest = fingerprint(config, [file_digest(file) for file in files])
    return RawTables(users=user_table, items=item_table, interactions=table, digest=digest, counts=dropped)


def encode(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The distinct values of `column` as strings, and for each row the index of its own, int64 [n]."""
    encoded = column.dictionary_encode().unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int64)
    return encoded.chunk(0).dictionary.cast(pa.string()), codes


def _id_column(table: pa.Table, key: str, name: str) -> pa.ChunkedArray:
    """The raw ids in column `key`, integers or strings. Raises SchemaError for no column, a null or an empty id."""
    if key not in table.column_names:
        raise missing_column(table, key, name=name)
    check_rows(table, name=name, key=(), required=(key,))
    column = table[key]
    if pa.types.is_integer(column.type):
        return column
    try:
        column = column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise SchemaError(f"{name}: column '{key}' is of type {column.type}. Write ids as integers or text.") from None
    if (row := pc.index(column, "").as_py()) >= 0:
        raise SchemaError(
            f"{name}, row {row}: {key} is empty. Drop the row or give it an id; rows without ids cannot be joined."
        )
    return column


def _entities(
    table: pa.Table, key: str, seen: pa.Array, name: str, schema: pa.Schema
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """The contract table of users or items; the id of each raw id in `seen`; whether the table has a row for it."""
    raw = pa.concat_arrays(_id_column(table, key, name).cast(pa.string()).chunks)
    check_rows(pa.table({key: raw}), name=name, key=(key,))
    distinct = pc.unique(pa.chunked_array([raw, seen]))
    ids = _distinct_ids(distinct, key, name)
    columns = {key: ids[pc.index_in(raw, distinct).to_numpy()], "raw_id": raw}
    for column in table.column_names:
        if column not in columns:
            columns[column] = _as_text(table[column], column, name)
    seen_ids = ids[pc.index_in(seen, distinct).to_numpy()]
    return conform(pa.table(columns), schema, name=name), seen_ids, pc.is_in(seen, raw).to_numpy(zero_copy_only=False)


def _distinct_ids(raw: pa.Array, key: str, name: str) -> np.ndarray:
    """The int64 ids of distinct raw ids. Raises SchemaError where two of them share one."""
    ids = np.fromiter((stable_id(value) for value in raw.to_pylist()), dtype=np.int64, count=len(raw))
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(same):
        first, second = raw[int(order[same[0]])].as_py(), raw[int(order[same[0] + 1])].as_py()
        raise SchemaError(
            f"{name}: the raw ids '{first}' and '{second}' of {key} both hash to {ids[order[same[0]]]}. "
            f"Rename one of them in the data (a prefix is enough)."
        )
    return ids


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
            f"{table}: column '{name}' is of type {type_}, which is neither text nor a list of texts ({error}). "
            f"Drop the column or write it as text."
        ) from None


def _refuse_orphans(orphan: np.ndarray, raw: pa.ChunkedArray, kind: str, names: Mapping[str, str], remedy: str) -> None:
    if orphan.any():
        row = int(orphan.argmax())
        raise SchemaError(
            f"{names['interactions']}, row {row}: {kind}_id '{raw[row].as_py()}' has no row in {names[f'{kind}s']} "
            f"({int(orphan.sum())} such interactions). {remedy}"
        )


def _check_doubled(table: pa.Table, raw: pa.Table, name: str) -> None:
    """Refuses a second interaction of one user with one item at one moment, naming the first by its raw ids."""
    user, item, time = (table[c].to_numpy() for c in ("user_id", "item_id", "timestamp"))
    order = np.lexsort((time, item, user))
    same = run_starts(user[order], item[order], time[order]) < np.arange(len(order))
    if same.any():
        row = int(order[same].min())
        raise SchemaError(
            f"{name}, row {row}: user_id '{raw['user_id'][row].as_py()}', item_id '{raw['item_id'][row].as_py()}', "
            f"timestamp {table['timestamp'][row].as_py()} occurs a second time ({int(same.sum())} such rows in all). "
            "Drop the repeated rows; only other timestamps make it another interaction."
        )
