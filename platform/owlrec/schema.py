"""The tables that stages exchange, as Arrow schemas, with their validation.

Stages exchange only these tables on disk, never objects in memory. Ids are int64 throughout: 10^8 of
them sort and join as one 0.8 GB array, while strings cost several times that in each process. Raw string ids are
hashed by `ids.stable_id`; the raw id stays in the table and a collision is an error at ingest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.errors import SchemaError
from owlrec.ids import last_rows, stable_id

USERS = pa.schema([("user_id", pa.int64()), ("raw_id", pa.string())])  # then one string column a profile field
ITEMS = pa.schema([("item_id", pa.int64()), ("raw_id", pa.string()), ("title", pa.string())])  # then attributes
INTERACTIONS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("rating", pa.float32()),  # a grade or a count; null: none
        ("timestamp", pa.int64()),
        ("label", pa.float32()),  # training label, in [0, 1]; see sources.outcomes for taken and passed-over items
        ("split", pa.int8()),  # predefined split: index into train, valid, test; null if the source has none
        ("weight", pa.float32()),  # of its samples in training; 1 if the source has none
    ]
)
# Behaviors that the LLM reads for each text about a user, and their cutoff: one row per text, in order of user
# and as_of, written by the sample builder and read by the prompts.
HISTORIES = pa.schema(
    [
        ("user_id", pa.int64()),
        ("as_of", pa.int64()),
        ("items", pa.list_(pa.int64())),  # taken by the user, oldest first
        ("ratings", pa.list_(pa.float32())),  # aligned with items
        ("passed", pa.list_(pa.int64())),  # latest ones passed over up to then, oldest first
    ]
)
# A sample may read any row whose as_of is strictly earlier than its timestamp; `newest` returns the published rows.
# Readers of samples get this form (sources.splits.read_samples). On disk a sample's history is a position among the
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
# The LLM's probability of Yes for pairs of user and item at a moment.
SOFT_LABELS = pa.schema(
    [("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64()), ("p", pa.float32())]
)
# Cohorts of each id, as of each text's moment. A user may have two rows for a moment: one by likes and
# one by dislikes.
COHORTS = pa.schema(
    [
        ("kind", pa.string()),  # user or item
        ("id", pa.int64()),
        ("as_of", pa.int64()),  # ms: cutoff of its inputs; 0 for items and attribute groups
        ("cohort", pa.string()),  # its name; `stable_id` of the name is the id of its knowledge
        ("facet", pa.string()),  # for users: liked or disliked; for items: ""
        ("source", pa.string()),  # collaborative, attribute or global
        ("distance", pa.float32()),  # 1 - cosine to the cohort's center; null without one
    ]
)
# Cohorts whose texts replace a missing text of an id, in a release: the most informative first; one
# by dislikes as the complement of its id (releases.format.by_facet).
MEMBERSHIPS = pa.schema([("kind", pa.string()), ("id", pa.int64()), ("cohorts", pa.list_(pa.int64()))])
# A user's latest behaviors in a release, for scores: aligned lists, oldest first.
BEHAVIORS = pa.schema(
    [
        ("id", pa.int64()),
        ("times", pa.list_(pa.int64())),  # ms since 1970, UTC
        ("items", pa.list_(pa.int64())),
        ("ratings", pa.list_(pa.float32())),  # null if not graded
        ("labels", pa.list_(pa.float32())),
        ("events", pa.list_(pa.uint8())),  # place among outcomes.EVENTS, from 1; 0 if unknown
    ]
)
# Prompts that were made before the shard that asks them: of cohorts, and of a refresh.
PROMPTS = pa.schema(
    [
        ("kind", pa.string()),
        ("id", pa.int64()),
        ("as_of", pa.int64()),
        ("system", pa.string()),
        ("text", pa.string()),
        ("facts", pa.string()),  # as a sentence: replaces an unusable answer
        ("earlier_tokens", pa.int32()),  # above 0: quoted tokens of the answer to the id's previous prompt
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
    """Arrow schema of a vectors table with `dim` components."""
    return pa.schema(
        [
            ("kind", pa.string()),
            ("id", pa.int64()),
            ("vector", pa.list_(pa.float16(), dim)),
            ("codes", pa.list_(pa.uint16())),  # semantic ids; empty if none were computed
        ]
    )


def vectors_table(kind: str | Sequence[str], ids: np.ndarray, vectors: np.ndarray) -> pa.Table:
    """A vectors table (vectors_schema) without codes.

    kind: of all rows, or per row; ids: int64 [n]; vectors: float [n, dim].
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
    """Vectors of a vectors table, float16 [n, dim]."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)


def stable_ids(raw: pa.Array) -> np.ndarray:
    """`stable_id` of each raw id, without a Python call for canonical integers.

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


def newest(table: pa.Table, key: str = "id") -> pa.Table:
    """Rows with the last as_of of their id, from rows in order of id and as_of; all rows without an as_of column."""
    if "as_of" not in table.column_names:
        return table
    ids, as_of = table[key].to_numpy(), table["as_of"].to_numpy()
    last = last_rows(ids)
    if len(last) == len(ids):
        return table
    return table.filter(pa.array(as_of == np.repeat(as_of[last], np.diff(last, prepend=-1))))


def conform(table: pa.Table, schema: pa.Schema, *, name: str, first_row: int = 0) -> pa.Table:
    """`table` with the columns of `schema` first, in its order and types, followed by all other columns.

    name: name of the table in errors (usually a file path); first_row: of the table, in that file.
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
    """Error for a missing column. name: see conform; section: of the recipe, that maps its columns."""
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
            f"{name}, row {first_row + where}: column '{field.name}' holds {value!r}, which is not a valid "
            f"{field.type} ({error}). Correct the value or drop the row."
        ) from None


def _first_bad(column: pa.ChunkedArray, type_: pa.DataType) -> tuple[int, Any]:
    for row, value in enumerate(column):
        try:
            pa.chunked_array([pa.array([value.as_py()], column.type)]).cast(type_)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return row, value.as_py()
    return -1, None


# From March 1973 to November 2286; in seconds, micro- or nanoseconds no real behavior log is in this range.
MILLISECONDS = range(10**11, 10**13 + 1)


def check_milliseconds(timestamps: pa.ChunkedArray, *, name: str, first_row: int = 0) -> None:
    """Refuses timestamps that can only be in seconds or smaller units instead of milliseconds since 1970, UTC."""
    largest = pc.max(timestamps).as_py()
    if largest is not None and largest < MILLISECONDS.start:
        row = first_row + pc.index(timestamps, largest).as_py()
        raise SchemaError(
            f"{name}, row {row}: timestamp {largest} looks like seconds, but must be milliseconds since 1970 "
            "(UTC). Multiply by 1000, or set source.timestamp_unit: s in the recipe."
        )
    if largest is not None and largest >= MILLISECONDS.stop:
        raise SchemaError(
            f"{name}: timestamp {largest} looks like micro- or nanoseconds, but must be milliseconds since "
            "1970 (UTC). Set source.timestamp_unit: us or ns in the recipe."
        )
