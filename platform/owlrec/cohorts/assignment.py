"""Which cohorts every user and item belongs to: the router between collaborative cohorts and attribute groups.

Enough history: the nearest collaborative cohort, and a second one by what the user disliked. Else the attribute group,
else everybody. All of it works on one part of a table at a time, so that a cluster works on many; what a part tells the
driver is a count for each cohort, never a row.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.cohorts.attributes import choose_group, count_groups, values_of
from owlrec.cohorts.collaborative import CollaborativeConfig, FoldIn, ItemFactors, unit
from owlrec.cohorts.model import Book, CohortModel, attribute_cohort_name, cohort_name, open_model
from owlrec.scenario import Scenario
from owlrec.schema import COHORTS, TABLES, Kind
from owlrec.workspace import Workspace

FACETS: dict[Book, tuple[Kind, str, str]] = {  # kind, vector column, facet
    "user-liked": ("user", "liked", "liked"),
    "user-disliked": ("user", "disliked", "disliked"),
    "item": ("item", "vector", ""),
}


@dataclass(frozen=True)
class Vectorizer:
    """The vectors of a part's rows, and the attribute groups of those who have none."""

    workspace: Workspace
    folder: str
    factors: ItemFactors
    config: CollaborativeConfig
    scenario: Scenario

    def __call__(self, kind: Kind, part: str) -> dict[str, Any]:
        """Writes vectors/<kind>/<part>; returns how many rows have which vector, and the counts of groups."""
        rows = self.workspace.read_parquet(f"tables/{TABLES[kind]}/{part}")
        ids = rows[f"{kind}_id"].to_numpy()
        if kind == "item":
            vectors, known = self.factors.gather(ids)
            columns = {"vector": (unit(vectors), known)}
        else:
            columns = self._users(ids, self.workspace.read_parquet(f"tables/histories/{part}"))
        table = pa.table({"id": pa.array(ids)} | {name: vector_array(*c) for name, c in columns.items()})
        self.workspace.write_parquet(f"{self.folder}/vectors/{kind}/{part}", table)
        first = next(iter(columns.values()))[1]
        fields = self.scenario.profile_fields if kind == "user" else self.scenario.text_fields
        groups = count_groups(values_of(row, fields) for row in rows.filter(pa.array(~first)).to_pylist())
        counts = {name: int(known.sum()) for name, (_, known) in columns.items()}
        return {"rows": len(ids), "counts": counts, "groups": [[list(map(list, g)), n] for g, n in groups.items()]}

    def _users(self, ids: np.ndarray, histories: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        fold_in = FoldIn(self.factors, self.config)
        items, liked = histories["items"].combine_chunks(), liked_mask(histories, self.scenario.positive_above)
        order = np.argsort(ids, kind="stable")
        place = order[np.searchsorted(ids, histories["user_id"].to_numpy(), sorter=order)]
        columns = {}
        for name, chosen in (("liked", liked), ("disliked", ~liked)):
            vectors, known = np.zeros((len(ids), self.factors.vectors.shape[1]), np.float32), np.zeros(len(ids), bool)
            vectors[place], known[place] = fold_in.vectors(items, chosen)
            columns[name] = (vectors, known)
        return columns


@dataclass(frozen=True)
class Router:
    """Assigns a part's rows to cohorts, by the model in `folder`."""

    workspace: Workspace
    folder: str
    scenario: Scenario
    previous: str | None = None  # the folder of an earlier run

    def __call__(self, kind: Kind, part: str) -> dict[str, Any]:
        """Writes <kind>/<part> (schema.COHORTS); returns members by cohort, and how many of them were in the cohort of
        this name before."""
        model = open_model(self.workspace, self.folder)
        vectors = self.workspace.read_parquet(f"{self.folder}/vectors/{kind}/{part}")

        def attributes() -> pa.Table:
            return self.workspace.read_parquet(f"tables/{TABLES[kind]}/{part}")

        table = route(model, kind, vectors, attributes, self.scenario)
        self.workspace.write_parquet(f"{self.folder}/{kind}/{part}", table)
        sizes = _count(table)
        before = f"{self.previous}/{kind}/{part}"
        stayed: Mapping[str, int] = {}
        if self.previous and self.workspace.exists(before):
            was = self.workspace.read_parquet(before, ["id", "cohort"])
            stayed = _count(table.select(["id", "cohort"]).join(was, ["id", "cohort"], join_type="inner"))
        return {"sizes": sizes, "stayed": stayed}


def route(
    model: CohortModel, kind: Kind, vectors: pa.Table, attributes: Callable[[], pa.Table], scenario: Scenario
) -> pa.Table:
    """The cohorts of some users or items, new ones too (schema.COHORTS).

    vectors: columns id and, made by vector_array, `liked` and `disliked` of users or `vector` of items.
    attributes: gives the rows of the users or items table; asked only where somebody has no vector.
    """
    ids = vectors["id"].to_numpy()
    parts, alone = [], np.ones(len(ids), dtype=bool)
    for book, (of, column, facet) in FACETS.items():
        if of != kind or book not in model.books:
            continue
        rows, matrix = vector_rows(vectors[column])
        if facet != "disliked":
            alone[rows] = False
        names, distance = _collaborative(model, book, ids[rows], matrix)
        parts.append(_table(kind, ids[rows], names, facet, "collaborative", distance))
    if alone.any():
        fields = scenario.profile_fields if kind == "user" else scenario.text_fields
        rows_of = {row[f"{kind}_id"]: row for row in attributes().to_pylist()}
        lonely = ids[alone]
        chosen = [
            choose_group(values_of(rows_of.get(i, {}), fields), model.groups.get(kind, {}), model.min_group)
            for i in lonely.tolist()
        ]
        names = pa.array([attribute_cohort_name(kind, g) for g in chosen], pa.string())
        source = pa.array(["attribute" if g else "global" for g in chosen], pa.string())
        parts.append(_table(kind, lonely, names, "liked" if kind == "user" else "", source, None))
    return pa.concat_tables([COHORTS.empty_table(), *parts])


def liked_mask(histories: pa.Table, positive_above: float) -> np.ndarray:
    """bool, aligned with the flattened items of histories: which were liked. Without ratings all were."""
    ratings = histories["ratings"].combine_chunks().flatten()
    values = ratings.to_numpy(zero_copy_only=False).astype(np.float32)
    return np.isnan(values) | (values > positive_above)


def vector_array(vectors: np.ndarray, known: np.ndarray) -> pa.FixedSizeBinaryArray:
    """float [n, d] as float16 bytes, null where not `known`: Parquet reads bytes several times faster than lists."""
    data = pa.py_buffer(np.ascontiguousarray(vectors, dtype=np.float16))
    validity = pa.py_buffer(np.packbits(known, bitorder="little"))
    return pa.Array.from_buffers(pa.binary(2 * vectors.shape[1]), len(vectors), [validity, data])


def vector_rows(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that have a vector, int64 [m], and these, float32 [m, d]; of a column that vector_array made."""
    array = column.combine_chunks()
    rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    dim = array.type.byte_width // 2
    matrix = np.frombuffer(array.buffers()[1], np.float16, len(array) * dim, 2 * dim * array.offset)
    return rows, matrix.reshape(-1, dim)[rows].astype(np.float32)


def _collaborative(model: CohortModel, book: Book, ids: np.ndarray, vectors: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    codebook = model.books[book]
    nearest, distance = codebook.assign(vectors)
    names = pa.array([cohort_name(book, int(n)) for n in codebook.numbers], pa.string()).take(pa.array(nearest))
    of_number = model.rings.get(book, {})
    rings = {row: of_number[n] for row, n in enumerate(codebook.numbers.tolist()) if n in of_number}
    if not rings:
        return names, distance
    shown = names.to_pylist()
    for row, ring in rings.items():
        members = np.flatnonzero(nearest == row)
        for member, n in zip(members, ring.of(distance[members], ids[members]), strict=True):
            shown[member] = cohort_name(book, int(codebook.numbers[row]), int(n))
    return pa.array(shown, pa.string()), distance


def _table(
    kind: str, ids: np.ndarray, names: pa.Array, facet: str, source: str | pa.Array, distance: np.ndarray | None
) -> pa.Table:
    n = len(ids)
    columns = [
        pa.repeat(pa.scalar(kind), n),
        pa.array(ids, pa.int64()),
        names,
        pa.repeat(pa.scalar(facet), n),
        pa.repeat(pa.scalar(source), n) if isinstance(source, str) else source,
        pa.array(distance, pa.float32()) if distance is not None else pa.nulls(n, pa.float32()),
    ]
    return pa.table(columns, schema=COHORTS)


def _count(table: pa.Table) -> dict[str, int]:
    counts = table["cohort"].value_counts()
    return dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))


def add_counts(results: Sequence[Mapping[str, Mapping[str, int]]], name: str) -> Counter[str]:
    """One of the counts of all parts, summed."""
    total: Counter[str] = Counter()
    for result in results:
        total.update(result[name])
    return total
