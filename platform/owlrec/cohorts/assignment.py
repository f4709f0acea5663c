"""Assigns every user and item to cohorts: collaborative cohorts first, attribute groups as the fallback.

With enough history, a user gets the nearest collaborative cohort and a second one by dislikes. Otherwise the attribute
group, or else the group of everybody. All functions work on one shard of a table.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.cohorts.clustering import FactorSettings, ItemFactors, fold_in, items_and_likes, unit
from owlrec.cohorts.model import FACETS, Book, CohortModel, attribute_cohort_name, cohort_name
from owlrec.cohorts.profiles import Group, choose_group, count_groups, values_of
from owlrec.ids import Kind
from owlrec.scenario import Scenario
from owlrec.schema import COHORTS


def user_vectors(
    ids: np.ndarray, histories: pa.Table, factors: ItemFactors, settings: FactorSettings, positive_above: float
) -> pa.Table:
    """Columns id, as_of, liked and disliked (see vector_array) of a shard's users, ordered by id and as_of: one row
    per history, and one as of 0 for users without any.

    ids: int64 [n], ascending; histories: schema.HISTORIES for some of them.
    """
    items, liked = items_and_likes(histories, positive_above)
    silent = np.setdiff1d(ids, histories["user_id"].to_numpy())
    owner = np.concatenate([histories["user_id"].to_numpy(), silent])
    as_of = np.concatenate([histories["as_of"].to_numpy(), np.zeros(len(silent), dtype=np.int64)])
    order = np.lexsort((as_of, owner))
    columns = {"id": pa.array(owner[order], pa.int64()), "as_of": pa.array(as_of[order], pa.int64())}
    for name, chosen in (("liked", liked), ("disliked", ~liked)):
        vectors, known = np.zeros((len(owner), factors.vectors.shape[1]), np.float32), np.zeros(len(owner), bool)
        vectors[: len(histories)], known[: len(histories)] = fold_in(factors, settings, items, chosen)
        columns[name] = vector_array(vectors[order], known[order])
    return pa.table(columns)


def item_vectors(ids: np.ndarray, factors: ItemFactors) -> pa.Table:
    """Columns id, as_of (0: it depends on no behavior) and vector of a shard's items."""
    vectors, known = factors.gather(ids)
    columns = {"id": ids, "as_of": np.zeros(len(ids), dtype=np.int64), "vector": vector_array(unit(vectors), known)}
    return pa.table(columns)


def groups_without_vectors(kind: Kind, vectors: pa.Table, rows: pa.Table, scenario: Scenario) -> Counter[Group]:
    """Number of a shard's rows without a first vector, per attribute group.

    vectors: the newest of each row; rows: of the kind's own table, aligned.
    """
    lonely = rows.filter(vectors["liked" if kind == "user" else "vector"].is_null())
    fields = _fields(kind, scenario)
    return count_groups(values_of(row, fields) for row in lonely.to_pylist())


def route(
    model: CohortModel, kind: Kind, vectors: pa.Table, attributes: Callable[[], pa.Table], scenario: Scenario
) -> pa.Table:
    """Cohorts of users or items, including new ones (schema.COHORTS), ordered by id and as_of.

    vectors: columns id, as_of and, made by vector_array, `liked` and `disliked` of users or `vector` of items.
    attributes: returns rows of the users or items table; called only if somebody has no vector. Assignments that depend
    only on attributes are as of 0.
    """
    ids, as_of = vectors["id"].to_numpy(), vectors["as_of"].to_numpy()
    tables, alone = [], np.ones(len(ids), dtype=bool)
    for book, (book_kind, column, facet) in FACETS.items():
        if book_kind != kind or book not in model.books:
            continue
        rows, matrix = vector_rows(vectors[column])
        if facet != "disliked":
            alone[rows] = False
        names, distance = _collaborative(model, book, matrix)
        tables.append(_table(kind, ids[rows], as_of[rows], names, facet, "collaborative", distance))
    if alone.any():
        fields, groups = _fields(kind, scenario), model.groups.get(kind, ())
        lonely = np.unique(ids[alone])
        rows_of_id: Mapping[int, Mapping[str, Any]] = {row[f"{kind}_id"]: row for row in attributes().to_pylist()}
        chosen = [choose_group(values_of(rows_of_id.get(i, {}), fields), groups) for i in lonely.tolist()]
        names = pa.array([attribute_cohort_name(kind, g) for g in chosen], pa.string())
        source = pa.array(["attribute" if g else "global" for g in chosen], pa.string())
        nothing = np.zeros(len(lonely), dtype=np.int64)
        tables.append(_table(kind, lonely, nothing, names, "liked" if kind == "user" else "", source, None))
    table = pa.concat_tables([COHORTS.empty_table(), *tables])
    order = np.lexsort((table["as_of"].to_numpy(), table["id"].to_numpy()))
    return table.take(pa.array(order))


def vector_array(vectors: np.ndarray, known: np.ndarray) -> pa.FixedSizeBinaryArray:
    """float [n, d] as float16 bytes, null if not `known`."""
    data = pa.py_buffer(np.ascontiguousarray(vectors, dtype=np.float16))
    validity = pa.py_buffer(np.packbits(known, bitorder="little"))
    return pa.Array.from_buffers(pa.binary(2 * vectors.shape[1]), len(vectors), [validity, data])


def vector_rows(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a vector, int64 [m], and their vectors, float32 [m, d], from a column of vector_array."""
    array = column.combine_chunks()
    rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    dim = array.type.byte_width // 2
    matrix = np.frombuffer(array.buffers()[1], np.float16, len(array) * dim, 2 * dim * array.offset)
    return rows, matrix.reshape(-1, dim)[rows].astype(np.float32)


def _collaborative(model: CohortModel, book: Book, vectors: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    codebook = model.books[book]
    nearest, distance = codebook.assign(vectors)
    used, codes = np.unique(nearest, return_inverse=True)
    names = pa.array([cohort_name(book, n) for n in codebook.numbers[used].tolist()], pa.string())
    return names.take(pa.array(codes)), distance


def _fields(kind: Kind, scenario: Scenario) -> tuple[str, ...]:
    return scenario.profile_fields if kind == "user" else scenario.text_fields


def _table(
    kind: str,
    ids: np.ndarray,
    as_of: np.ndarray,
    names: pa.Array,
    facet: str,
    source: str | pa.Array,
    distance: np.ndarray | None,
) -> pa.Table:
    n = len(ids)
    columns = [
        pa.repeat(pa.scalar(kind), n),
        pa.array(ids, pa.int64()),
        pa.array(as_of, pa.int64()),
        names,
        pa.repeat(pa.scalar(facet), n),
        pa.repeat(pa.scalar(source), n) if isinstance(source, str) else source,
        pa.array(distance, pa.float32()) if distance is not None else pa.nulls(n, pa.float32()),
    ]
    return pa.table(columns, schema=COHORTS)
