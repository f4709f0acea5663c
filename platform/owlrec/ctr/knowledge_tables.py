"""Knowledge vectors and semantic ids by id and moment, read by CTR models during training.

A sample finds the newest row of an id that is strictly earlier than its own moment, so no later text reaches it. A
found row has a number; vectors and codes are read by number, each row once for all samples that found it.
A small table is held in memory; a large one stays in the memory-mapped shards of `encode` or `reduction`, and
a batch copies only its rows. An id without knowledge is normal (a new user): it gives zeros and a mask,
never an error.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, cast

import numpy as np

from owlrec.encoding.vectors import VectorShards
from owlrec.errors import RecipeError, SchemaError, WorkspaceError
from owlrec.ids import newest_rows, rows_of, run_starts

# ----------------------------------------------------------------------------------------------------------------- arms
# The arms of an experiment: what each reads about users and items, in which form, and its comparisons.
#
# An arm's name is its knowledge ("knowledge"), with no suffix for vectors, "-codes" for
# semantic ids alone, and "+codes" for both. Vectors of cohorts and of interest partitions have no
# semantic ids.


Arm = Literal[
    "none",
    "knowledge",
    "knowledge-codes",
    "knowledge+codes",
    "collective",
    "both",
    "streaming",
    "shuffled",
    "shuffled-codes",
    "shuffled+codes",
    "metadata",
    "metadata-codes",
    "metadata+codes",
]
Form = Literal["vectors", "codes", "both"]
DISLIKED = "disliked"  # a user's cohort by dislikes; "collective" is by likes
STREAMING = "streaming"  # vectors of the interest partitions that refreshes read
# Slots of a user's texts before the newest one, which is "knowledge" (LIBER, arXiv 2411.14713); the newest first.
OLDER_PARTITIONS = ("partition-1", "partition-2", "partition-3")


def arm_parts(arm: Arm) -> tuple[str, Form]:
    """Splits an arm into its knowledge and its form."""
    forms: dict[str, Form] = {"-codes": "codes", "+codes": "both"}
    for suffix, form in forms.items():
        if arm.endswith(suffix):
            return arm.removesuffix(suffix), form
    return arm, "vectors"


@dataclass(frozen=True)
class ArmSources:
    """Sources of the vectors that an arm reads, per side, in the order of the adaptor's slots."""

    user: tuple[str, ...] = ()
    item: tuple[str, ...] = ()


def arm_sources(arm: Arm, given: Mapping[str, Collection[str]]) -> ArmSources:
    """Selects an arm's sources from the given ones.

    `collective` reads the knowledge of cohorts; for users, by likes and, if given, by
    dislikes. `both` adds the individual knowledge. `streaming` reads a user's newest texts, including partitions
    read by refreshes. `shuffled` reads individual knowledge, or collective knowledge if there is
    no other.
    given: source -> kinds ("user", "item") that have vectors.
    Raises RecipeError if a required source is missing.
    """
    needed: tuple[str, ...]
    reads, _ = arm_parts(arm)
    match reads:
        case "none":
            needed = ()
        case "both":
            needed = ("knowledge", "collective")
        case "streaming":
            needed = ("knowledge",)
        case "shuffled":
            needed = ("collective",) if "knowledge" not in given and "collective" in given else ("knowledge",)
        case _:
            needed = (reads,)
    for source in needed:
        missing = [f"{kind}s" for kind in ("user", "item") if kind not in given.get(source, ())]
        if missing:
            raise RecipeError(
                f"ctr.arms: arm '{arm}' needs {source} vectors. `encode` wrote none of "
                f"{' and '.join(missing)}: run it with a recipe that produces them, or remove the arm."
            )
    further: tuple[str, ...] = (DISLIKED,) if "collective" in needed and "user" in given.get(DISLIKED, ()) else ()
    if reads == "streaming":
        if "user" not in given.get(STREAMING, ()):
            raise RecipeError(
                "ctr.arms: arm 'streaming' needs users' interest partitions, but no refresh with this encoder "
                "has read any. Run `owlrec refresh` first, or remove the arm: without partitions it equals "
                "`knowledge`."
            )
        further = OLDER_PARTITIONS
    return ArmSources(user=needed + further, item=needed)


def stored_sources(sources: ArmSources) -> set[str]:
    """Stored sources of an arm: all partitions are in one."""
    return {STREAMING if source in OLDER_PARTITIONS else source for source in (*sources.user, *sources.item)}


def bases(arm: Arm) -> tuple[Arm, ...]:
    """The arms to compare with: no knowledge, the wrong ids' knowledge with the same number of parameters, and, for
    arms with semantic ids, the vectors alone.
    """
    reads, form = arm_parts(arm)
    shuffled: dict[Form, Arm] = {"vectors": "shuffled", "codes": "shuffled-codes", "both": "shuffled+codes"}
    candidates: list[Arm] = ["none", shuffled[form], *([] if form == "vectors" else [cast(Arm, reads)])]
    return tuple(base for base in candidates if arm not in ("none", base))


# ------------------------------------------------------------------------------------------------------------ knowledge


# Largest table in bytes that a worker holds in memory. Users' vectors come from the few shards of a window of
# samples; items' vectors come from all shards in each batch.
_HELD_BYTES = {"user": 1 << 27, "item": 1 << 31}


class VectorTable(ABC):
    """Vectors of users or of items."""

    code_sizes: tuple[int, ...]  # number of codes per level of the semantic ids; empty without codes

    @property
    @abstractmethod
    def dim(self) -> int:
        """Components of a vector."""

    @abstractmethod
    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """Row to read for each id: the newest with an as_of strictly earlier than `before`.

        ids: int64 [b], any order, repeats allowed; before: int64 [b], ms. Returns int64 [b], -1 if there is none.
        """

    @abstractmethod
    def as_of_at(self, rows: np.ndarray) -> np.ndarray:
        """as_of (ms) of rows from `find`, none of them -1: int64 [b]."""

    @abstractmethod
    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows from `find`: float16 [b, dim], zeros for -1."""

    @abstractmethod
    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """Semantic ids: int64 [b, levels], each code plus one, zeros for -1; without the duplicate digit, which carries
        no information. Raises SchemaError without codes.
        """

    @abstractmethod
    def shuffled(self, seed: int) -> "VectorTable":
        """The control arm: the same ids and moments, but no id keeps its own vector or code."""

    def gather(self, ids: np.ndarray, before: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the rows from `find`, [b, dim], zeros if missing, and bool [b], False if missing."""
        rows = self.find(ids, before)
        return self.vectors_at(rows), rows >= 0

    def gather_codes(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """Semantic ids of the rows from `find`: see codes_at."""
        return self.codes_at(self.find(ids, before))


@dataclasses.dataclass(frozen=True)
class KnowledgeTable(VectorTable):
    """A VectorTable in memory: row i belongs to `ids[i]` as of `as_of[i]`."""

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float16 [n, d]
    as_of: np.ndarray | None = None  # int64 [n], ms, ascending for an id; None: known at any time
    codes: np.ndarray | None = None  # uint16 [n, levels], without the duplicate digit
    code_sizes: tuple[int, ...] = ()
    order: np.ndarray | None = None  # int64 [n]: source row of each vector and code, if shuffled

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """See VectorTable."""
        rows = rows_of(self.ids, ids) if self.as_of is None else newest_rows(self.ids, self.as_of, ids, before)
        return rows if self.order is None else np.where(rows < 0, -1, self.order[rows])

    def as_of_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable; only for a table with moments."""
        assert self.as_of is not None
        return self.as_of[rows]

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable; in the table's own type."""
        vectors = np.zeros((len(rows), self.dim), dtype=self.vectors.dtype)
        vectors[rows >= 0] = self.vectors[rows[rows >= 0]]
        return vectors

    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        if self.codes is None:
            raise _uncoded()
        codes = np.zeros((len(rows), len(self.code_sizes)), dtype=np.int64)
        codes[rows >= 0] = self.codes[rows[rows >= 0]].astype(np.int64) + 1
        return codes

    def shuffled(self, seed: int) -> "KnowledgeTable":
        """See VectorTable; for more than one id."""
        order = _wrong_rows(self.ids, seed)
        return dataclasses.replace(self, order=order if self.order is None else self.order[order])


@dataclasses.dataclass(frozen=True)
class MappedTable(VectorTable):
    """A VectorTable in shards on disk. When shuffled, vectors are exchanged within their shard, which is a random set
    of ids; an id alone in its shard then has none.
    """

    shards: VectorShards
    code_sizes: tuple[int, ...] = ()
    seed: int | None = None  # of the shuffle

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.shards.dim

    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """See VectorTable."""
        handles = self.shards.find(ids, before)
        if self.seed is not None:
            for number, _, at, rows in self.shards.at(handles):
                order = _wrong_rows_in(self.shards, number, self.seed)
                handles[at] = -1 if order is None else handles[at] - rows + order[rows]
        return handles

    def as_of_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        moments = np.zeros(len(rows), dtype=np.int64)
        for _, shard, at, shard_rows in self.shards.at(rows):
            moments[at] = shard.as_of[shard_rows]
        return moments

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        vectors = np.zeros((len(rows), self.dim), dtype=np.float16)
        for _, shard, at, shard_rows in self.shards.at(rows):
            vectors[at] = shard.vectors[shard_rows]
        return vectors

    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        if not self.code_sizes:
            raise _uncoded()
        codes = np.zeros((len(rows), len(self.code_sizes)), dtype=np.int64)
        for _, shard, at, shard_rows in self.shards.at(rows):
            codes[at] = shard.codes[shard_rows, :-1].astype(np.int64) + 1
        return codes

    def shuffled(self, seed: int) -> "MappedTable":
        """See VectorTable."""
        return dataclasses.replace(self, seed=seed)


def open_vectors(shards: VectorShards, code_sizes: tuple[int, ...] = (), *, held: bool = True) -> VectorTable:
    """Table of some shards, in memory if it is small and `held` allows it.

    code_sizes: of the quantizer. Raises WorkspaceError if nothing was encoded, and SchemaError if
    rows have codes of other sizes.
    """
    entries = shards.workspace.entries(shards.folder, shards.name)
    if not entries:
        raise WorkspaceError(
            f"{shards.workspace.path(shards.folder, shards.name)} holds no vectors. Run `encode` again, with the same "
            "recipe."
        )
    if not held or sum(entry.bytes for entry in entries.values()) > _HELD_BYTES[shards.kind]:
        return MappedTable(shards, code_sizes)
    ids, as_of, vectors, codes = [], [], [], []
    for number in shards.numbers:
        if (shard := shards.shard(number)) is None or not len(shard.ids):
            continue
        if code_sizes and shard.codes.shape[1] != len(code_sizes) + 1:
            raise SchemaError(
                f"{shards.name} vectors, shard {number}: rows have {shard.codes.shape[1]} codes; expected "
                f"{len(code_sizes)} and a duplicate digit. Run `encode` again."
            )
        # Copied one by one: views of all shards would keep all their files open.
        ids.append(np.array(shard.ids))
        as_of.append(np.array(shard.as_of))
        vectors.append(np.array(shard.vectors))
        codes.append(np.array(shard.codes[:, : len(code_sizes)]))
    if not ids:
        return MappedTable(shards, code_sizes)
    order = np.argsort(np.concatenate(ids), kind="stable")
    table = KnowledgeTable(*(np.concatenate(arrays)[order] for arrays in (ids, vectors, as_of)))
    if not code_sizes:
        return table
    return dataclasses.replace(table, codes=np.concatenate(codes)[order], code_sizes=code_sizes)


def refuse_two_sizes(tables: Mapping[str, VectorTable]) -> None:
    """Raises SchemaError if vectors differ in their number of components. tables: by the name for messages."""
    (first, table), *others = tables.items()
    for name, other in others:
        if other.dim != table.dim:
            raise SchemaError(
                f"{first} have {table.dim} components but {name} have {other.dim}; the adaptor's shared "
                "experts need the same dimension. Use one encoder for both."
            )


def refuse_non_finite(vectors: np.ndarray, ids: np.ndarray) -> None:
    """Raises SchemaError with an id if a vector has a component that is not finite.

    vectors: float [n, ...]; ids: int64 [n].
    """
    finite = np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim)))
    if not finite.all():
        raise SchemaError(
            f"the knowledge vector of id {ids[np.argmin(finite)]} has a component that is not finite. Encode "
            "it again, or remove the id: a missing vector is not an error."
        )


def _wrong_rows(ids: np.ndarray, *seed: int) -> np.ndarray:
    """int64 [n]: for each row a row of another id, such that all ids form one random cycle; the first row of an id
    gets the other id's first, and so on; rows without a counterpart get its last. ids: ascending.
    """
    starts = np.unique(run_starts(ids))
    counts = np.diff(starts, append=len(ids))
    order = np.random.default_rng(seed).permutation(len(starts))
    other = np.empty(len(starts), dtype=np.int64)
    other[order] = np.roll(order, -1)
    owner = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(ids)) - starts[owner]
    return starts[other[owner]] + np.minimum(nth, counts[other[owner]] - 1)


@lru_cache(maxsize=256)
def _wrong_rows_in(shards: VectorShards, number: int, seed: int) -> np.ndarray | None:
    """The same within a shard; None if it has only one id."""
    shard = shards.shard(number)
    assert shard is not None
    return _wrong_rows(shard.ids, seed, number) if len(np.unique(shard.ids)) > 1 else None


def _uncoded() -> SchemaError:
    return SchemaError("these vectors have no semantic ids. Set encoder.semantic_ids and run `encode` again.")


# -------------------------------------------------------------------------------------------------------------- cascade
# A user's texts as a sample may see them (LIBER, arXiv 2411.14713): the newest earlier ones, one per slot.
#
# Full runs write one text per cut, refreshes one per interest partition since then. Ordered by as_of, they are
# stacked like in a release: the first slot of the adaptor's tower reads the newest text before the sample, the second
# the one before that, and the fusion weights them.


_NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True)
class CascadeTable(VectorTable):
    """A VectorTable over two tables of texts; each slot reads the text that is `older` places before the newest.

    Rows of the two tables alternate: 2 i is row i of the first, 2 i + 1 row i of the second.
    """

    runs: VectorTable
    partitions: VectorTable
    older: int = 0
    code_sizes: tuple[int, ...] = ()  # partitions have no semantic ids

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.partitions.dim

    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """See VectorTable."""
        rows = self._newest(ids, before)
        for _ in range(self.older):  # strictly earlier than the found one
            there = np.flatnonzero(rows >= 0)
            rows[there] = self._newest(ids[there], self.as_of_at(rows[there]))
        return rows

    def as_of_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        moments = np.empty(len(rows), dtype=np.int64)
        for parity, table in enumerate((self.runs, self.partitions)):
            mine = rows % 2 == parity
            moments[mine] = table.as_of_at(rows[mine] // 2)
        return moments

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        vectors = np.zeros((len(rows), self.dim), dtype=np.float16)
        for parity, table in enumerate((self.runs, self.partitions)):
            mine = (rows >= 0) & (rows % 2 == parity)
            vectors[mine] = table.vectors_at(rows[mine] // 2)
        return vectors

    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable; raises SchemaError."""
        return self.partitions.codes_at(rows)

    def shuffled(self, seed: int) -> "CascadeTable":
        """See VectorTable."""
        return replace(self, runs=self.runs.shuffled(seed), partitions=self.partitions.shuffled(seed))

    def _newest(self, ids: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        rows = [table.find(ids, before) for table in (self.runs, self.partitions)]
        moments = np.full((2, len(ids)), _NEVER, dtype=np.int64)
        for table, table_rows, table_moments in zip((self.runs, self.partitions), rows, moments, strict=True):
            table_moments[table_rows >= 0] = table.as_of_at(table_rows[table_rows >= 0])
        later = moments[1] > moments[0]
        return np.where(later, 2 * rows[1] + 1, np.where(rows[0] >= 0, 2 * rows[0], -1))


def cascade_slots(runs: VectorTable, partitions: VectorTable) -> tuple[VectorTable, ...]:
    """Slots of the arm `streaming`, the newest text first.

    runs: texts of full runs; partitions: those read by refreshes.
    """
    return tuple(CascadeTable(runs, partitions, older) for older in range(1 + len(OLDER_PARTITIONS)))
