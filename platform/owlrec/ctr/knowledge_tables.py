"""Knowledge vectors and semantic ids by id and moment: what the CTR models read while they train.

A sample names its moment and finds the newest row of an id that is strictly earlier: no text from later reaches it. A
row that was found has a number, by which vectors and codes are then read, each row once however many samples found it.
A small table is held in memory; a large one stays in the memory-mapped shards that `encode` or `reduction` wrote, from
which a batch copies the rows it asks for. An id without knowledge is normal (a new user): it yields zeros and a mask,
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
from owlrec.schema import newest_rows, rows_of, run_starts

# ----------------------------------------------------------------------------------------------------------------- arms
# The arms of an experiment: what each reads of users and items, in which form, and what it is compared with.
#
# An arm's name is what it reads ("knowledge"), followed by nothing where it reads vectors, by "-codes" where it reads
# their semantic ids alone, and by "+codes" where it reads both. Vectors of cohorts and of interest partitions have no
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
DISLIKED = "disliked"  # of a user's cohort by what they disliked, beside "collective" of what they liked
STREAMING = "streaming"  # the source in which refreshes keep a vector of each partition of a user's interests
# Of a user's texts, before the newest one in the slot of "knowledge" (LIBER, arXiv 2411.14713); the newest first.
OLDER_PARTITIONS = ("partition-1", "partition-2", "partition-3")


def arm_parts(arm: Arm) -> tuple[str, Form]:
    """What an arm reads (an arm without a form), and in which form."""
    forms: dict[str, Form] = {"-codes": "codes", "+codes": "both"}
    for suffix, form in forms.items():
        if arm.endswith(suffix):
            return arm.removesuffix(suffix), form
    return arm, "vectors"


@dataclass(frozen=True)
class ArmSources:
    """The sources of the vectors that an arm reads, a side; their order is that of the adaptor's slots."""

    user: tuple[str, ...] = ()
    item: tuple[str, ...] = ()


def arm_sources(arm: Arm, given: Mapping[str, Collection[str]]) -> ArmSources:
    """Which of the vectors that were given an arm reads.

    `collective` reads the knowledge of cohorts, of users by what they liked and, where that was given, by what they
    disliked; `both` that and the individual knowledge; `streaming` the newest texts of a user, those of partitions
    that refreshes have read among them. `shuffled` reads individual knowledge, or collective knowledge where there is
    no other.
    given: source -> the sides ("user", "item") of which it has vectors.
    Raises RecipeError where a source that the arm needs was not given.
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
        missing = [f"{side}s" for side in ("user", "item") if side not in given.get(source, ())]
        if missing:
            raise RecipeError(
                f"ctr.arms: arm '{arm}' needs {source} vectors. `encode` wrote none of {' and '.join(missing)}: "
                f"run it with a recipe that yields them, or leave the arm out."
            )
    further: tuple[str, ...] = (DISLIKED,) if "collective" in needed and "user" in given.get(DISLIKED, ()) else ()
    if reads == "streaming":
        if "user" not in given.get(STREAMING, ()):
            raise RecipeError(
                "ctr.arms: arm 'streaming' needs the interest partitions of users, but no refresh has read any with "
                "this encoder. Run `owlrec refresh` first, or leave the arm out: without partitions it would be "
                "`knowledge`."
            )
        further = OLDER_PARTITIONS
    return ArmSources(user=needed + further, item=needed)


def stored_sources(sources: ArmSources) -> set[str]:
    """The sources that hold what an arm reads: partitions stand in one."""
    return {STREAMING if source in OLDER_PARTITIONS else source for source in (*sources.user, *sources.item)}


def bases(arm: Arm) -> tuple[Arm, ...]:
    """What an arm is compared with: no knowledge, as many parameters reading the wrong ids' knowledge, and, where it
    reads semantic ids, the vectors alone.
    """
    reads, form = arm_parts(arm)
    shuffled: dict[Form, Arm] = {"vectors": "shuffled", "codes": "shuffled-codes", "both": "shuffled+codes"}
    found: list[Arm] = ["none", shuffled[form], *([] if form == "vectors" else [cast(Arm, reads)])]
    return tuple(base for base in found if arm not in ("none", base))


# ------------------------------------------------------------------------------------------------------------ knowledge


# Up to so many bytes a worker holds a table itself. Users' vectors are read from the few shards that a window of
# samples is of, those of items from all shards in each batch.
_HELD_BYTES = {"user": 1 << 27, "item": 1 << 31}


class VectorTable(ABC):
    """Vectors of users or of items."""

    code_sizes: tuple[int, ...]  # how many codes each level of the semantic ids has; empty where they were not coded

    @property
    @abstractmethod
    def dim(self) -> int:
        """Components of a vector."""

    @abstractmethod
    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """The row that is to be read of each id: the newest, of those whose as_of is strictly earlier than `before`.

        ids: int64 [b], any order, repeats allowed; before: int64 [b], ms. Returns int64 [b], -1 where there is none.
        """

    @abstractmethod
    def as_of_at(self, rows: np.ndarray) -> np.ndarray:
        """The as_of (ms) of rows that `find` gave, none of them -1: int64 [b]."""

    @abstractmethod
    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of rows that `find` gave: float16 [b, dim], zeros for -1."""

    @abstractmethod
    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """Their semantic ids: int64 [b, levels], each code plus one, zeros for -1; the duplicate digit, which says
        nothing of an id, is left out. Raises SchemaError where there are no codes.
        """

    @abstractmethod
    def shuffled(self, seed: int) -> "VectorTable":
        """The control arm: the same ids and moments, but no id keeps a vector or code of its own."""

    def gather(self, ids: np.ndarray, before: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The vectors that `find` finds, [b, dim], zeros where an id has none, and bool [b], True where it has one."""
        rows = self.find(ids, before)
        return self.vectors_at(rows), rows >= 0

    def gather_codes(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """The semantic ids that `find` finds: see codes_at."""
        return self.codes_at(self.find(ids, before))


@dataclasses.dataclass(frozen=True)
class KnowledgeTable(VectorTable):
    """A VectorTable in memory: row i is of `ids[i]` as of `as_of[i]`."""

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float16 [n, d]
    as_of: np.ndarray | None = None  # int64 [n], ms, ascending for an id; None: known at any time
    codes: np.ndarray | None = None  # uint16 [n, levels], without the duplicate digit
    code_sizes: tuple[int, ...] = ()
    order: np.ndarray | None = None  # int64 [n]: whose vector and code each row has, where they were shuffled

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
        """See VectorTable; for a table that knows it."""
        assert self.as_of is not None
        return self.as_of[rows]

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable; of the type that the table holds."""
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
        for _, shard, at, of_shard in self.shards.at(rows):
            moments[at] = shard.as_of[of_shard]
        return moments

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        vectors = np.zeros((len(rows), self.dim), dtype=np.float16)
        for _, shard, at, of_shard in self.shards.at(rows):
            vectors[at] = shard.vectors[of_shard]
        return vectors

    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        if not self.code_sizes:
            raise _uncoded()
        codes = np.zeros((len(rows), len(self.code_sizes)), dtype=np.int64)
        for _, shard, at, of_shard in self.shards.at(rows):
            codes[at] = shard.codes[of_shard, :-1].astype(np.int64) + 1
        return codes

    def shuffled(self, seed: int) -> "MappedTable":
        """See VectorTable."""
        return dataclasses.replace(self, seed=seed)


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
    ids, as_of, vectors, codes = [], [], [], []
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


def _wrong_rows(ids: np.ndarray, *seed: int) -> np.ndarray:
    """int64 [n]: for each row one of another id, so that all ids are on one random cycle; of an id's rows the first
    gets the other's first, and so on, and those without a counterpart its last. ids: ascending.
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
    """The same within a shard; None where it has one id only."""
    shard = shards.shard(number)
    assert shard is not None
    return _wrong_rows(shard.ids, seed, number) if len(np.unique(shard.ids)) > 1 else None


def _uncoded() -> SchemaError:
    return SchemaError("these vectors have no semantic ids. Set encoder.semantic_ids, and run `encode` again.")


# -------------------------------------------------------------------------------------------------------------- cascade
# A user's texts as a sample may see them (LIBER, arXiv 2411.14713): the newest ones that are earlier, one per slot.
#
# Whole runs write one text per cut, refreshes one per partition of the interests since. In order of as_of they are
# what a release stacks up: the first slot of the adaptor's tower reads the newest text before the sample, the second
# the one before that, and the fusion weighs them.


_NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True)
class CascadeTable(VectorTable):
    """A VectorTable of the texts in two, of which each slot reads the one that stands `older` places before the newest.

    Rows are those of both tables by turns: 2 i is row i of the first, 2 i + 1 that of the second.
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
        for _ in range(self.older):  # what is strictly earlier than the one that was found
            there = np.flatnonzero(rows >= 0)
            rows[there] = self._newest(ids[there], self.as_of_at(rows[there]))
        return rows

    def as_of_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        moments = np.empty(len(rows), dtype=np.int64)
        for side, table in enumerate((self.runs, self.partitions)):
            mine = rows % 2 == side
            moments[mine] = table.as_of_at(rows[mine] // 2)
        return moments

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """See VectorTable."""
        vectors = np.zeros((len(rows), self.dim), dtype=np.float16)
        for side, table in enumerate((self.runs, self.partitions)):
            mine = (rows >= 0) & (rows % 2 == side)
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
        for table, found, of_table in zip((self.runs, self.partitions), rows, moments, strict=True):
            of_table[found >= 0] = table.as_of_at(found[found >= 0])
        later = moments[1] > moments[0]
        return np.where(later, 2 * rows[1] + 1, np.where(rows[0] >= 0, 2 * rows[0], -1))


def cascade_slots(runs: VectorTable, partitions: VectorTable) -> tuple[VectorTable, ...]:
    """The slots of the arm `streaming`, the newest text first.

    runs: texts of whole runs; partitions: those that refreshes have read.
    """
    return tuple(CascadeTable(runs, partitions, older) for older in range(1 + len(OLDER_PARTITIONS)))
