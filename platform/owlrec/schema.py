"""The tables that stages exchange, as Arrow schemas, and the checks that guard them.

Every arrow of the design is one of these tables on disk, never an object in memory. Ids are int64 throughout: 10^8 of
them sort and join as one 0.8 GB array, where strings cost several times that in each process. Raw string ids are
hashed by `stable_id`; the raw id stays in the table and a collision is an error at ingest.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.errors import SchemaError

Kind = Literal["user", "item", "cohort"]  # what a text or a vector is about
KINDS: tuple[Kind, ...] = get_args(Kind)
TABLES: dict[Kind, str] = {"user": "users", "item": "items"}  # of each kind that has one
# By the hash of whose id each table's rows are sharded.
TABLE_KINDS: dict[str, Kind] = {
    "users": "user",
    "items": "item",
    "interactions": "user",
    "histories": "user",
    "samples": "user",
}

USERS = pa.schema([("user_id", pa.int64()), ("raw_id", pa.string())])  # then one string column a profile field
ITEMS = pa.schema([("item_id", pa.int64()), ("raw_id", pa.string()), ("title", pa.string())])  # then attributes
INTERACTIONS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("rating", pa.float32()),  # a grade, or how often; null: none
        ("timestamp", pa.int64()),
        ("label", pa.float32()),  # what models learn, in [0, 1]; see sources.outcomes for what was taken or passed over
        ("split", pa.int8()),  # a predefined one: its place among train, valid and test; null where the source has none
        ("weight", pa.float32()),  # of its samples in training; 1 where the source has none
    ]
)
# What the LLM reads of each user for one text, and up to which moment that reaches: a row per text, in order of user
# and as_of, written by the sample builder, read by the prompts.
HISTORIES = pa.schema(
    [
        ("user_id", pa.int64()),
        ("as_of", pa.int64()),
        ("items", pa.list_(pa.int64())),  # that they took, oldest first
        ("ratings", pa.list_(pa.float32())),  # aligned with items
        ("passed", pa.list_(pa.int64())),  # the last that they passed over up to then, oldest first
    ]
)
# A sample may read any row whose as_of is strictly earlier than its timestamp; `newest` gives what is published.
# What readers of samples get (sources.splits.read_samples): on disk a sample's history is where it stands among the
# rows of its shard of interactions (SAMPLE_ROWS).
SAMPLES = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("label", pa.float32()),
        ("timestamp", pa.int64()),
        ("history", pa.list_(pa.int64())),  # most recent last, strictly earlier than `timestamp`
        ("history_ratings", pa.list_(pa.float32())),  # aligned with history
        ("history_labels", pa.list_(pa.float32())),  # aligned with history
        ("split", pa.string()),  # train, valid or test
    ]
)
SAMPLE_ROWS = pa.schema(
    [
        *(SAMPLES.field(name) for name in ("user_id", "item_id", "label", "timestamp", "split")),
        ("history_start", pa.int32()),
        ("history_end", pa.int32()),
        INTERACTIONS.field("weight"),
    ]
)
# What the LLM makes of pairs of user and item at a moment: its probability of Yes.
SOFT_LABELS = pa.schema(
    [("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64()), ("p", pa.float32())]
)
# Who is like whom, as of each moment that a text is of. A user may stand in two rows for one: by what they liked, and
# by what they disliked.
COHORTS = pa.schema(
    [
        ("kind", pa.string()),  # user or item
        ("id", pa.int64()),
        ("as_of", pa.int64()),  # ms: what it follows from knows nothing later; 0 for items and where attributes decide
        ("cohort", pa.string()),  # its name; `stable_id` of it is the id of its knowledge
        ("facet", pa.string()),  # of users: liked or disliked; of items: ""
        ("source", pa.string()),  # collaborative, attribute or global
        ("distance", pa.float32()),  # 1 - cosine to the cohort's centre; null where it has none
    ]
)
# Whose texts stand in for an id that has none of its own, as a release holds it: the cohort that tells most first; one
# by what a user disliked as the complement of its id (cohorts.memberships.by_facet).
MEMBERSHIPS = pa.schema([("kind", pa.string()), ("id", pa.int64()), ("cohorts", pa.list_(pa.int64()))])
# The last that a user did, as a release keeps it for scores: aligned lists, oldest first.
BEHAVIORS = pa.schema(
    [
        ("id", pa.int64()),
        ("times", pa.list_(pa.int64())),  # ms since 1970, UTC
        ("items", pa.list_(pa.int64())),
        ("ratings", pa.list_(pa.float32())),  # null where not graded
        ("labels", pa.list_(pa.float32())),
    ]
)
# One of them in memory; NaN: not graded.
BEHAVIOR = np.dtype([("time", "<i8"), ("item", "<i8"), ("rating", "<f4"), ("label", "<f4")])
# Prompts that were made before the shard that asks them: of cohorts, and of a refresh.
PROMPTS = pa.schema(
    [
        ("kind", pa.string()),
        ("id", pa.int64()),
        ("as_of", pa.int64()),
        ("system", pa.string()),
        ("text", pa.string()),
        ("facts", pa.string()),  # in a sentence: what stands in for an answer that cannot be used
        ("earlier_tokens", pa.int32()),  # above 0: how much it quotes of the answer to the id's prompt before it
    ]
)
KNOWLEDGE = pa.schema(
    [
        ("kind", pa.string()),
        ("id", pa.int64()),
        ("as_of", pa.int64()),
        ("text", pa.string()),
        ("framework", pa.string()),
        ("prompt_sha256", pa.string()),
        ("fingerprint", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("quality", pa.string()),  # "ok", or the names of the quality rules that flagged the text
        ("drafted", pa.int32()),
        ("accepted", pa.int32()),
        ("relaxed", pa.int32()),
    ]
)
DEAD_LETTERS = pa.schema(
    [
        ("kind", pa.string()),
        ("id", pa.int64()),
        ("as_of", pa.int64()),
        ("stage", pa.string()),
        ("error", pa.string()),  # class of the error
        ("message", pa.string()),
        ("attempts", pa.int32()),
    ]
)


def vectors_schema(dim: int) -> pa.Schema:
    """Arrow schema of a vectors table whose vectors have `dim` components."""
    return pa.schema(
        [
            ("kind", pa.string()),
            ("id", pa.int64()),
            ("vector", pa.list_(pa.float16(), dim)),
            ("codes", pa.list_(pa.uint16())),  # semantic ids; empty where none were computed
        ]
    )


def vectors_table(kind: str | Sequence[str], ids: np.ndarray, vectors: np.ndarray) -> pa.Table:
    """A vectors table (vectors_schema) without codes.

    kind: of all rows, or of each; ids: int64 [n]; vectors: float [n, dim].
    """
    n, dim = vectors.shape
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float16).reshape(-1))
    columns = [
        pa.repeat(pa.scalar(kind), n) if isinstance(kind, str) else pa.array(kind, pa.string()),
        pa.array(ids, pa.int64()),
        pa.FixedSizeListArray.from_arrays(flat, dim),
        pa.ListArray.from_arrays(pa.array(np.zeros(n + 1, np.int32)), pa.array([], pa.uint16())),
    ]
    return pa.table(columns, schema=vectors_schema(dim))


def vector_matrix(table: pa.Table) -> np.ndarray:
    """The vectors of a vectors table, float16 [n, dim]."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)


def stable_id(raw: str) -> int:
    """The int64 id of a raw id: a canonical decimal integer stays itself, any other text is hashed (BLAKE2b, 63
    bits).
    """
    raw = str(raw)
    if raw.isascii() and raw.isdigit() and len(raw) <= 18 and (raw == "0" or raw[0] != "0"):
        return int(raw)
    return int.from_bytes(hashlib.blake2b(raw.encode(), digest_size=8).digest(), "big") >> 1


def stable_ids(raw: pa.Array) -> np.ndarray:
    """`stable_id` of each raw id, without a Python call for those that are canonical integers.

    raw: distinct integers or strings, without nulls. Returns int64 [n].
    """
    if pa.types.is_integer(raw.type):
        values = raw.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False)
        canonical = pc.and_(pc.greater_equal(raw, 0), pc.less(raw, 10**18)).to_numpy(zero_copy_only=False)
    else:
        canonical = pc.match_substring_regex(raw, r"^(0|[1-9][0-9]{0,17})$").to_numpy(zero_copy_only=False)
        values = np.zeros(len(raw), dtype=np.int64)
        values[canonical] = raw.filter(pa.array(canonical)).cast(pa.int64()).to_numpy()
    if not canonical.all():
        values = values.copy()
        values[~canonical] = [stable_id(value) for value in raw.filter(pa.array(~canonical)).to_pylist()]
    return values


def as_ids(names: Iterable[int | str]) -> np.ndarray:
    """The int64 ids [n] that callers mean: a text is a raw id (`stable_id`), an integer an int64 id as tables hold it.

    names: a sequence, an array or a pandas Series. Raises SchemaError for what is neither text nor integer.
    """
    if isinstance(names, str | bytes):
        raise SchemaError(f"ids: {names!r} is one id where several are meant. Write [{names!r}].")
    kind = getattr(getattr(names, "dtype", None), "kind", "")
    if kind in ("i", "u"):
        return np.asarray(names, dtype=np.int64)
    ids = []
    for row, name in enumerate(names):
        if isinstance(name, str):
            ids.append(stable_id(name))
        elif isinstance(name, int | np.integer) and not isinstance(name, bool):
            ids.append(int(name))
        else:
            raise SchemaError(
                f"ids, row {row}: {name!r} is neither a text nor an integer. Convert it, or drop the row."
            )
    return np.array(ids, dtype=np.int64)


def shard_of(ids: np.ndarray, n_shards: int) -> np.ndarray:
    """Which of `n_shards` shards each id belongs to.

    ids: int64 [n]. Returns int64 [n] in [0, n_shards). A multiplicative hash (splitmix64's finaliser), so that ids
    which share a stride still spread evenly.
    """
    x = np.asarray(ids, dtype=np.int64).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x % np.uint64(n_shards)).astype(np.int64)


def hash_of(*keys: int | np.ndarray) -> np.ndarray:
    """A hash of aligned keys (int64 [n] each) and numbers, int64 [n] in [0, 2^62): a draw that hangs on a row alone."""
    mixed = np.zeros(1, dtype=np.int64)
    for key in keys:
        mixed = shard_of(mixed ^ np.asarray(key, dtype=np.int64), 1 << 62)
    return mixed


def by_shard(ids: np.ndarray, n_shards: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each shard that some of `ids` (int64 [n]) belong to, and the positions of those."""
    numbers = shard_of(ids, n_shards)
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for at in np.split(order, starts[1:]) if len(ids) else ():
        yield int(numbers[at[0]]), at


def newest(table: pa.Table, key: str = "id") -> pa.Table:
    """Of rows in order of an id and as_of, those with the last as_of of their id; all where the table has no as_of."""
    if "as_of" not in table.column_names:
        return table
    ids, as_of = table[key].to_numpy(), table["as_of"].to_numpy()
    last = last_rows(ids)
    if len(last) == len(ids):
        return table
    return table.filter(pa.array(as_of == np.repeat(as_of[last], np.diff(last, prepend=-1))))


def conform(table: pa.Table, schema: pa.Schema, *, name: str, first_row: int = 0) -> pa.Table:
    """`table` with the columns of `schema` first, in order and of its types, and its further columns after them.

    name: what to call the table in errors (a file path, usually); first_row: of the table, in that file.
    Raises SchemaError for a missing column or a value that does not convert.
    """
    columns: list[pa.ChunkedArray] = []
    for field in schema:
        if field.name not in table.column_names:
            raise missing_column(table, field.name, name=name)
        columns.append(_cast(table[field.name], field, name, first_row))
    rest = [c for c in table.column_names if c not in schema.names]
    return pa.table(
        [*columns, *(table[c] for c in rest)],
        schema=pa.schema([*schema, *(table.schema.field(c) for c in rest)]),
    )


def missing_column(table: pa.Table, column: str, *, name: str, section: str = "source.columns") -> SchemaError:
    """The error of a table that lacks a column. name: see conform; section: of the recipe, that maps its columns."""
    return SchemaError(
        f"{name}: column '{column}' is missing; the table has {', '.join(table.column_names) or 'no columns'}. "
        f"Rename a column, or map one to it under {section} in the recipe."
    )


def _cast(column: pa.ChunkedArray, field: pa.Field, name: str, first_row: int) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        where, value = _first_bad(column, field.type)
        raise SchemaError(
            f"{name}, row {first_row + where}: column '{field.name}' holds {value!r}, which is no {field.type} "
            f"({error}). Correct the value or drop the row."
        ) from None


def _first_bad(column: pa.ChunkedArray, type_: pa.DataType) -> tuple[int, Any]:
    for row, value in enumerate(column):
        try:
            pa.chunked_array([pa.array([value.as_py()], column.type)]).cast(type_)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return row, value.as_py()
    return -1, None


# From March 1973 to November 2286; in seconds, micro- or nanoseconds no real behaviour log lies between these numbers.
MILLISECONDS = range(10**11, 10**13 + 1)


def check_milliseconds(timestamps: pa.ChunkedArray, *, name: str, first_row: int = 0) -> None:
    """Refuses timestamps that can only be seconds (or smaller) where milliseconds since 1970, UTC, are meant."""
    largest = pc.max(timestamps).as_py()
    if largest is not None and largest < MILLISECONDS.start:
        row = first_row + pc.index(timestamps, largest).as_py()
        raise SchemaError(
            f"{name}, row {row}: timestamp {largest} looks like seconds, but milliseconds since 1970 (UTC) are meant. "
            f"Multiply by 1000, or set source.timestamp_unit: s in the recipe."
        )
    if largest is not None and largest >= MILLISECONDS.stop:
        raise SchemaError(
            f"{name}: timestamp {largest} looks like micro- or nanoseconds, but milliseconds since 1970 (UTC) are "
            "meant. Set source.timestamp_unit: us or ns in the recipe."
        )


# -------------------------------------------------------------------------------------------------------------- ordered
# Columns in ascending order: where an id stands in one, and where a run of equal keys begins.


def rows_of(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The row of each of `wanted` among `ids`, which ascend: int64 of its shape, -1 for what is not there."""
    if len(ids) == 0:
        return np.full(np.shape(wanted), -1, dtype=np.int64)
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[rows] == wanted, rows, -1)


def run_starts(*columns: np.ndarray) -> np.ndarray:
    """For each row the first of the rows around it that are equal in all `columns`: int64 [n]."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def last_rows(ids: np.ndarray) -> np.ndarray:
    """The last row of each run of equal `ids`, which ascend: int64."""
    return np.flatnonzero(np.diff(ids, append=ids[-1:] + 1))


def newest_rows(ids: np.ndarray, as_of: np.ndarray, wanted: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Where what is known of each of `wanted` stands: int64 of its shape, -1 for nothing.

    ids, as_of: int64 [n], in ascending order of both, the moments of an id apart. before: int64 aligned with wanted;
    then the newest row whose as_of is strictly earlier, else the newest of all.
    """
    if len(ids) == 0:
        return np.full(np.shape(wanted), -1, dtype=np.int64)
    rows = np.searchsorted(ids, wanted, side="right") - 1
    if before is not None:
        while True:  # as often as an id has rows that are too new
            late = (rows >= 0) & (ids[rows] == wanted) & (as_of[rows] >= before)
            if not late.any():
                break
            rows = rows - late
    return np.where((rows >= 0) & (ids[rows] == wanted), rows, -1)
