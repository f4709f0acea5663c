"""Knowledge vectors and semantic ids by id: what the CTR models read while they train.

Both forms are gathered alike. A small table is held in memory; a large one stays in the memory-mapped shards that
`encode` or `reduction` wrote, from which a batch copies the rows it asks for. An id without knowledge is normal (a new
user): it yields zeros and a mask, never an error.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Protocol

import numpy as np

from owlrec.encoding.vector_shards import VectorShard, VectorShards
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.ordered import rows_of
from owlrec.schema import by_shard, shard_of

# Up to so many bytes a worker holds a table itself. Users' vectors are read from the few shards that a window of
# samples is of, those of items from all shards in each batch.
_HELD_BYTES = {"user": 1 << 27, "item": 1 << 31}


class VectorTable(Protocol):
    """Vectors of users or of items."""

    @property
    def dim(self) -> int:
        """Components of a vector."""

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """How many codes each level of the semantic ids has; empty where the vectors were not coded."""

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of `ids`, in their order.

        ids: int64 [b], any order, repeats allowed. Returns [b, dim], zeros where an id has none, and bool [b], True
        where it has one.
        """

    def gather_codes(self, ids: np.ndarray) -> np.ndarray:
        """The semantic ids of `ids`, in their order: int64 [b, levels], each code plus one, zeros where an id has none;
        the duplicate digit, which says nothing of an id, is left out. Raises SchemaError where there are no codes.
        """

    def ids_in(self, number: int, n_shards: int) -> np.ndarray:
        """The ids of one of `n_shards` shards that have a vector: int64 [n], ascending."""

    def shuffled(self, seed: int) -> "VectorTable":
        """The control arm: the same ids, vectors and codes, but no id keeps its own."""


@dataclasses.dataclass(frozen=True)
class KnowledgeTable:
    """A VectorTable in memory: `ids[i]` has `vectors[i]`, or `vectors[rows[i]]` where rows is given; codes likewise."""

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float16 [n, d]
    rows: np.ndarray | None = None  # int64 [n]: a permutation, so that a shuffled table copies no vector
    codes: np.ndarray | None = None  # uint16 [n, levels], without the duplicate digit
    code_sizes: tuple[int, ...] = ()

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See VectorTable; vectors are of the type that the table holds."""
        vectors = np.zeros((len(ids), self.dim), dtype=self.vectors.dtype)
        rows, mask = self._rows(ids)
        vectors[mask] = self.vectors[rows]
        return vectors, mask

    def gather_codes(self, ids: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        if self.codes is None:
            raise _uncoded()
        codes = np.zeros((len(ids), len(self.code_sizes)), dtype=np.int64)
        rows, mask = self._rows(ids)
        codes[mask] = self.codes[rows].astype(np.int64) + 1
        return codes

    def ids_in(self, number: int, n_shards: int) -> np.ndarray:
        """See VectorTable."""
        return self.ids[shard_of(self.ids, n_shards) == number]

    def _rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of vectors and codes of the ids that have one, and which these are."""
        rows = rows_of(self.ids, ids)
        mask = rows >= 0
        return rows[mask] if self.rows is None else self.rows[rows[mask]], mask

    def shuffled(self, seed: int) -> "KnowledgeTable":
        """See VectorTable; for more than one row."""
        rows = _cycle(len(self.ids), seed)
        return dataclasses.replace(self, rows=rows if self.rows is None else self.rows[rows])


@dataclasses.dataclass(frozen=True)
class MappedTable:
    """A VectorTable in shards on disk. Shuffled, vectors change hands within their shard, which is as random a set of
    ids as any; a shard's only id has none then.
    """

    shards: VectorShards
    code_sizes: tuple[int, ...] = ()
    seed: int | None = None  # of a shuffled one

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.shards.dim

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See VectorTable."""
        vectors, mask = np.zeros((len(ids), self.dim), dtype=np.float16), np.zeros(len(ids), dtype=bool)
        for shard, at, rows in self._rows(ids):
            vectors[at], mask[at] = shard.vectors[rows], True
        return vectors, mask

    def gather_codes(self, ids: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        if not self.code_sizes:
            raise _uncoded()
        codes = np.zeros((len(ids), len(self.code_sizes)), dtype=np.int64)
        for shard, at, rows in self._rows(ids):
            codes[at] = shard.codes[rows, :-1].astype(np.int64) + 1
        return codes

    def ids_in(self, number: int, n_shards: int) -> np.ndarray:
        """See VectorTable."""
        assert n_shards == self.shards.n_shards, f"{n_shards} shards of a table that has {self.shards.n_shards}"
        return self.shards.ids(number)

    def shuffled(self, seed: int) -> "MappedTable":
        """See VectorTable."""
        return dataclasses.replace(self, seed=seed)

    def _rows(self, ids: np.ndarray) -> Iterator[tuple[VectorShard, np.ndarray, np.ndarray]]:
        """By shard: which of `ids` have a vector there, and in which row it stands."""
        for number, at in by_shard(ids, self.shards.n_shards):
            shard = self.shards.shard(number)
            if shard is None or (self.seed is not None and len(shard.ids) < 2):
                continue
            rows = rows_of(shard.ids, ids[at])
            at, rows = at[rows >= 0], rows[rows >= 0]
            yield shard, at, rows if self.seed is None else _cycle_of_shard(len(shard.ids), self.seed, number)[rows]


def open_vectors(shards: VectorShards, code_sizes: tuple[int, ...] = (), *, held: bool = True) -> VectorTable:
    """The table of some shards, in memory where it is small and `held` allows it.

    code_sizes: of the quantiser that coded them. Raises WorkspaceError where nothing was encoded, SchemaError where
    rows have other codes than code_sizes says.
    """
    entries = shards.workspace.entries(shards.folder, shards.name)
    if not entries:
        raise WorkspaceError(
            f"{shards.workspace.path(shards.folder, shards.name)} holds no vectors. Run `encode` again, with the same "
            "recipe."
        )
    if not held or sum(entry.bytes for entry in entries.values()) > _HELD_BYTES[shards.kind]:
        return MappedTable(shards, code_sizes)
    ids, vectors, codes = [], [], []
    for number in shards.numbers:
        if (shard := shards.shard(number)) is None or not len(shard.ids):
            continue
        if code_sizes and shard.codes.shape[1] != len(code_sizes) + 1:
            raise SchemaError(
                f"{shards.name} vectors, shard {number}: rows have {shard.codes.shape[1]} codes; {len(code_sizes)} and "
                "a duplicate digit are meant. Run `encode` again."
            )
        # Copied one by one: views of all shards would hold as many files open.
        ids.append(np.array(shard.ids))
        vectors.append(np.array(shard.vectors))
        codes.append(np.array(shard.codes[:, : len(code_sizes)]))
    if not ids:
        return MappedTable(shards, code_sizes)
    order = np.argsort(np.concatenate(ids), kind="stable")
    table = KnowledgeTable(np.concatenate(ids)[order], np.concatenate(vectors)[order])
    if not code_sizes:
        return table
    return dataclasses.replace(table, codes=np.concatenate(codes)[order], code_sizes=code_sizes)


def refuse_two_sizes(tables: Mapping[str, VectorTable]) -> None:
    """Raises SchemaError where vectors differ in their number of components. tables: by what a message calls them."""
    (first, table), *others = tables.items()
    for name, other in others:
        if other.dim != table.dim:
            raise SchemaError(
                f"{first} have {table.dim} components but {name} have {other.dim}; the adaptor's shared experts read "
                f"both. Encode both with one encoder."
            )


def refuse_non_finite(vectors: np.ndarray, ids: np.ndarray) -> None:
    """Raises SchemaError, naming an id, where a vector has a component that is not a finite number.

    vectors: float [n, ...]; ids: int64 [n].
    """
    finite = np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim)))
    if not finite.all():
        raise SchemaError(
            f"the knowledge vector of id {ids[np.argmin(finite)]} has a component that is not a finite number. Encode "
            "it again, or leave the id out: a missing vector is not an error."
        )


def _cycle(n: int, *seed: int) -> np.ndarray:
    """int64 [n]: a permutation that is one random cycle through all rows, so it has no fixed point for n > 1."""
    order = np.random.default_rng(seed).permutation(n)
    rows = np.empty(n, dtype=np.int64)
    rows[order] = np.roll(order, -1)
    return rows


_cycle_of_shard = lru_cache(maxsize=256)(_cycle)


def _uncoded() -> SchemaError:
    return SchemaError("these vectors have no semantic ids. Set encoder.semantic_ids, and run `encode` again.")
