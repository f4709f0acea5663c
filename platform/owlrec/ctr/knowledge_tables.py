"""Knowledge vectors and semantic ids by id and moment, read by CTR models during training.

A sample finds the newest row of an id that is strictly earlier than its own moment, so no later text reaches it. A
found row has a number; vectors and codes are read by number, each row once for all samples that found it.
A small table is held in memory; a large one stays in the memory-mapped shards of `encode` or `reduction`, and
a batch copies only its rows. An id without knowledge is normal (a new user): it gives zeros and a mask,
never an error.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from owlrec.config import Config
from owlrec.encoding.compression import unit_rows
from owlrec.encoding.vectors import VectorShards
from owlrec.errors import RecipeError, SchemaError, WorkspaceError, did_you_mean
from owlrec.ids import newest_rows, rows_of, run_starts

# ----------------------------------------------------------------------------------------------------------------- arms
# The arms of an experiment: what each reads about users and items, in which form, and its comparisons.
#
# An arm is a named set of sources. Its name tells its form: no suffix for vectors, "-codes" for semantic ids alone,
# "+codes" for both; and whether it is a control: "shuffled-metadata" reads what "metadata" reads, with the wrong ids,
# and "shuffled" is short for "shuffled-knowledge". Vectors of cohorts and of interest partitions have no semantic ids.


Arm = str  # the name of an arm
Form = Literal["vectors", "codes", "both"]
DISLIKED = "disliked"  # a user's cohort by dislikes; "collective" is by likes
STREAMING = "streaming"  # vectors of the interest partitions that refreshes read
# Slots of a user's texts before the newest one, which is "knowledge" (LIBER, arXiv 2411.14713); the newest first.
OLDER_PARTITIONS = ("partition-1", "partition-2", "partition-3")
# Sources that `encode` or refreshes write; any other is a text column of a table, or imported vectors.
WRITTEN = ("knowledge", "collective", DISLIKED, STREAMING, "metadata")
_SHORT = {
    "none": (),
    "knowledge": ("knowledge",),
    "metadata": ("metadata",),
    "collective": ("collective",),
    "both": ("knowledge", "collective"),
}
_SUFFIXES: dict[str, Form] = {"-codes": "codes", "+codes": "both"}
_NAME = r"^[A-Za-z0-9_]+$"


class OwnArm(Config):
    """An arm of a recipe's own, `name: {users: [...], items: [...]}`: the sources that it reads about each side."""

    users: tuple[Annotated[str, Field(pattern=_NAME)], ...] = ()
    items: tuple[Annotated[str, Field(pattern=_NAME)], ...] = ()

    @model_validator(mode="after")
    def _reads_something(self) -> "OwnArm":
        if not self.users and not self.items:
            raise ValueError("names no source. List sources under users, items or both")
        for sources in (self.users, self.items):
            if len(set(sources)) < len(sources):
                raise ValueError(f"{', '.join(sources)}: list each source once")
        return self


class ArmParts(NamedTuple):
    """What an arm's name says."""

    reads: str  # "knowledge", "both", or the name of an own arm
    form: Form
    shuffled: bool


def arm_parts(arm: Arm) -> ArmParts:
    """Splits an arm's name."""
    form: Form = "vectors"
    for suffix, suffix_form in _SUFFIXES.items():
        if arm.endswith(suffix):
            arm, form = arm.removesuffix(suffix), suffix_form
            break
    if arm == "shuffled":
        return ArmParts("knowledge", form, True)
    return ArmParts(arm.removeprefix("shuffled-"), form, arm.startswith("shuffled-"))


def check_arm(arm: Arm, own: Collection[str]) -> None:
    """Raises RecipeError if neither a short name nor an own arm has this name. own: names of own arms."""
    reads, form, shuffled = arm_parts(arm)
    known = [*_SHORT, STREAMING, *own]
    if reads not in known or (reads == "none" and (shuffled or form != "vectors")):
        hint = did_you_mean(arm, [*known, "shuffled"])
        raise RecipeError(
            f"there is no arm '{arm}'.{hint} Define your own as `- {{{arm}: {{users: [...], items: [...]}}}}`"
        )


@dataclass(frozen=True)
class ArmSources:
    """Sources of the vectors that an arm reads, per side, in the order of the adaptor's slots."""

    user: tuple[str, ...] = ()
    item: tuple[str, ...] = ()


def arm_sources(arm: Arm, given: Mapping[str, Collection[str]], own: OwnArm | None = None) -> ArmSources:
    """Selects an arm's sources from the given ones.

    `collective` reads the knowledge of cohorts; for users, by likes and, if given, by dislikes. `streaming` reads a
    user's newest texts, including partitions read by refreshes. `shuffled` reads individual knowledge, or collective
    knowledge without it.
    given: source -> kinds ("user", "item") that have vectors. own: what the arm reads, if it is the recipe's own.
    Raises RecipeError if a required source is missing.
    """
    reads, _, shuffled = arm_parts(arm)
    if own is not None:
        users, items = own.users, own.items
    elif reads == STREAMING:
        users, items = (STREAMING,), ("knowledge",)
    else:
        users = items = _SHORT[reads]
        if shuffled and reads == "knowledge" and "knowledge" not in given and "collective" in given:
            users = items = ("collective",)
    wanted = {"user": tuple("knowledge" if s == STREAMING else s for s in users), "item": items}
    for source in dict.fromkeys((*wanted["user"], *wanted["item"])):
        missing = [f"{k}s" for k in wanted if source in wanted[k] and k not in given.get(source, ())]
        if missing:
            raise RecipeError(
                f"ctr.arms: arm '{arm}' needs {source} vectors. `encode` wrote none of "
                f"{' and '.join(missing)}: run it with a recipe that produces them, or remove the arm."
            )
    if STREAMING in users and "user" not in given.get(STREAMING, ()):
        raise RecipeError(
            f"ctr.arms: arm '{arm}' needs users' interest partitions, but no refresh with this encoder "
            "has read any. Run `owlrec refresh` first, or remove the arm: without partitions it equals "
            "`knowledge`."
        )
    expanded: list[str] = []
    for source in users:
        expanded += ("knowledge", *OLDER_PARTITIONS) if source == STREAMING else (source,)
        if source == "collective" and DISLIKED not in users and "user" in given.get(DISLIKED, ()):
            expanded.append(DISLIKED)
    return ArmSources(tuple(expanded), items)


def source_slots(sources: Sequence[str]) -> tuple[int, ...]:
    """Vectors of each source, in order: a field of the adaptor reads one source, and a cascade is one source."""
    slots: list[int] = []
    for source in sources:
        if source in OLDER_PARTITIONS:
            slots[-1] += 1
        else:
            slots.append(1)
    return tuple(slots)


def stored_sources(sources: ArmSources) -> set[str]:
    """Stored sources of an arm: all partitions are in one."""
    return {STREAMING if source in OLDER_PARTITIONS else source for source in (*sources.user, *sources.item)}


def bases(arm: Arm) -> tuple[Arm, ...]:
    """The arms to compare with, the decisive one first: the text that was there before the LLM, in the same form; the
    wrong ids' vectors with the same number of parameters; no knowledge; and, for arms with semantic ids, the vectors
    alone.
    """
    reads, form, shuffled = arm_parts(arm)
    if arm == "none":
        return ()
    suffix = {"vectors": "", "codes": "-codes", "both": "+codes"}[form]
    control = "shuffled" if reads == "knowledge" else f"shuffled-{reads}"
    candidates = [] if shuffled else [f"metadata{suffix}", f"{control}{suffix}"]
    candidates.append("none")
    if form != "vectors":
        candidates.append(control if shuffled else reads)
    return tuple(base for base in candidates if base != arm)


# ------------------------------------------------------------------------------------------------------------ knowledge


# Largest table in bytes that a worker holds in memory. Users' vectors come from the few shards of a window of
# samples; items' vectors come from all shards in each batch.
_HELD_BYTES = {"user": 1 << 27, "item": 1 << 31}


# Ids -> int [n], the stratum of each: deciles of popularity or of activity. A text says how well known its subject is
# (length, detail), so a control that exchanged a blockbuster's vector for a rarity's would lose that, too.
Strata = Callable[[np.ndarray], np.ndarray]
_N_STRATA = 10


@dataclass(frozen=True, eq=False)
class Deciles:
    """Strata by deciles of a count; unknown ids count as 0, and equal counts share a stratum."""

    ids: np.ndarray  # int64 [n], ascending
    counts: np.ndarray  # int [n]

    def __call__(self, wanted: np.ndarray) -> np.ndarray:
        """int64 [k]: strata of some ids, int64 [k]."""
        if not len(self.ids):
            return np.zeros(len(wanted), dtype=np.int64)
        edges = np.unique(np.quantile(self.counts, np.arange(1, _N_STRATA) / _N_STRATA))
        rows = rows_of(self.ids, wanted)
        return np.searchsorted(edges, np.where(rows < 0, 0, self.counts[rows]), side="left")


class VectorTable(ABC):
    """Vectors of users or of items."""

    code_sizes: tuple[int, ...]  # number of codes per level of the semantic ids; empty without codes

    @property
    @abstractmethod
    def encoder(self) -> str:
        """EncoderConfig.identity of the vectors; "" if unknown."""

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
    def shuffled(self, seed: int, strata: "Strata | None" = None) -> "VectorTable":
        """The control arm: the same ids and moments, but no id keeps its own vector or code. strata: exchanges only
        within them.
        """

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
    encoder: str = ""

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

    def shuffled(self, seed: int, strata: Strata | None = None) -> "KnowledgeTable":
        """See VectorTable; for more than one id."""
        order = _wrong_rows(self.ids, seed, strata=strata)
        return dataclasses.replace(self, order=order if self.order is None else self.order[order])


@dataclasses.dataclass(frozen=True)
class MappedTable(VectorTable):
    """A VectorTable in shards on disk. When shuffled, vectors are exchanged within their shard, which is a random set
    of ids; an id alone in its shard then has none.
    """

    shards: VectorShards
    code_sizes: tuple[int, ...] = ()
    seed: int | None = None  # of the shuffle
    strata: Strata | None = None

    @property
    def encoder(self) -> str:
        """See VectorTable."""
        return _encoder_of(self.shards)

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self.shards.dim

    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """See VectorTable."""
        handles = self.shards.find(ids, before)
        if self.seed is not None:
            for number, _, at, rows in self.shards.at(handles):
                order = _wrong_rows_in(self.shards, number, self.seed, self.strata)
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

    def shuffled(self, seed: int, strata: Strata | None = None) -> "MappedTable":
        """See VectorTable."""
        return dataclasses.replace(self, seed=seed, strata=strata)


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
    sorted_ids, sorted_vectors, moments = (np.concatenate(arrays)[order] for arrays in (ids, vectors, as_of))
    table = KnowledgeTable(sorted_ids, sorted_vectors, moments, encoder=_encoder_of(shards))
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


def refuse_two_encoders(arm: Arm, tables: Mapping[str, VectorTable]) -> None:
    """Raises RecipeError if an arm's vectors come from several encoders, whose components mean different things.

    tables: by the name for messages.
    """
    encoders = {name: table.encoder for name, table in tables.items() if table.encoder}
    if len(set(encoders.values())) > 1:
        each = ", ".join(f"{name} from {encoder}" for name, encoder in encoders.items())
        raise RecipeError(
            f"ctr.arms: arm '{arm}' reads vectors of several encoders ({each}), but its shared experts need one. "
            "Put each encoder's vectors into an arm of their own, or encode all texts with one encoder."
        )


def _encoder_of(shards: VectorShards) -> str:
    shard = shards.shard(0) or next(filter(None, map(shards.shard, shards.numbers)), None)
    return shard.encoder if shard is not None else ""


def _wrong_rows(ids: np.ndarray, *seed: int, strata: Strata | None = None) -> np.ndarray:
    """int64 [n]: for each row a row of another id, such that the ids of a stratum form one random cycle; the first row
    of an id gets the other id's first, and so on; rows without a counterpart get its last. ids: ascending.
    """
    starts = np.unique(run_starts(ids))
    counts = np.diff(starts, append=len(ids))
    order = np.random.default_rng(seed).permutation(len(starts))
    stratum = np.zeros(len(starts), np.int64) if strata is None else strata(ids[starts])
    order = order[np.argsort(stratum[order], kind="stable")]
    ends = _cycle_ends(stratum[order])
    following = np.arange(1, len(order) + 1)
    following[ends - 1] = np.concatenate([[0], ends[:-1]])
    other = np.empty(len(starts), dtype=np.int64)
    other[order] = order[following]
    owner = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(ids)) - starts[owner]
    return starts[other[owner]] + np.minimum(nth, counts[other[owner]] - 1)


def _cycle_ends(strata: np.ndarray) -> np.ndarray:
    """End of each cycle over ids sorted by stratum: int64, ascending. An id that is alone joins its neighbors."""
    ends: list[int] = []
    start = 0
    for end in [*(np.flatnonzero(np.diff(strata)) + 1).tolist(), len(strata)]:
        if end - start > 1 or not ends:
            ends.append(end)
        else:
            ends[-1] = end
        start = end
    if len(ends) > 1 and ends[0] == 1:
        del ends[0]
    return np.array(ends, dtype=np.int64)


@lru_cache(maxsize=256)
def _wrong_rows_in(shards: VectorShards, number: int, seed: int, strata: Strata | None) -> np.ndarray | None:
    """The same within a shard; None if it has only one id."""
    shard = shards.shard(number)
    assert shard is not None
    return _wrong_rows(shard.ids, seed, number, strata=strata) if len(np.unique(shard.ids)) > 1 else None


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
    def encoder(self) -> str:
        """See VectorTable."""
        return self.partitions.encoder

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

    def shuffled(self, seed: int, strata: Strata | None = None) -> "CascadeTable":
        """See VectorTable."""
        runs, partitions = (table.shuffled(seed, strata) for table in (self.runs, self.partitions))
        return replace(self, runs=runs, partitions=partitions)

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


# --------------------------------------------------------------------------------------------------------- similarities
# How alike a candidate's vector is to those of the user's history: the cheapest way to make frozen vectors pay, since
# no embedding has to learn what the encoder already knows (cosines fed to the model as in SimTier, CIKM 2024). They
# are computed from the vectors that a sample may read, of the behaviors before it, in training and in serving alike.


SIMILARITY_CENTERS = (0.0, 0.25, 0.5, 0.75)  # of the histogram; cosines of centered vectors are mostly around 0
SIMILARITIES = 2 * (
    2 + len(SIMILARITY_CENTERS)
)  # of a source: mean, maximum, histogram; of liked and of other behaviors
_COSINE_ROWS = 4096  # tables up to this size have all their cosines computed once: 64 MB
_COSINE_VALUES = 1 << 22  # components gathered at once otherwise


def similarity_features(cosines: np.ndarray, known: np.ndarray, liked: np.ndarray) -> np.ndarray:
    """float32 [b, SIMILARITIES]: over liked behaviors, then over the others: mean, maximum, and the shares near each
    of SIMILARITY_CENTERS; zeros without any.

    A cosine between two centers counts for both in proportion, so that rounding moves a share by no more than itself.
    cosines: float32 [b, L], of candidate and behavior; known: bool [b, L], both have vectors; liked: bool [b, L].
    """
    centers = np.array(SIMILARITY_CENTERS, dtype=np.float32)
    width = centers[1] - centers[0]
    clipped = np.clip(cosines, centers[0], centers[-1])
    shares = np.maximum(0, 1 - np.abs(clipped[:, :, None] - centers) / width)
    features = []
    for group in (known & liked, known & ~liked):
        n = np.maximum(1, group.sum(axis=1, keepdims=True)).astype(np.float32)
        mean = np.where(group, cosines, 0).sum(axis=1, keepdims=True) / n
        largest = np.where(group, cosines, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
        largest = np.where(np.isfinite(largest), largest, 0)
        histogram = np.einsum("bl,blk->bk", group.astype(np.float32), shares) / n
        features += [mean, largest, histogram]
    return np.concatenate(features, axis=1, dtype=np.float32)


@dataclass(frozen=True)
class Cosines:
    """Cosines between rows of a table of items."""

    table: VectorTable

    @cached_property
    def _all(self) -> np.ndarray | None:
        """float32 [n, n] of a small table in memory."""
        if not isinstance(self.table, KnowledgeTable) or len(self.table) > _COSINE_ROWS:
            return None
        unit = unit_rows(self.table.vectors)
        return unit @ unit.T

    def of(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """float32 [b, L]; any value where a row is -1. rows: int64 [b], from `find`; others: int64 [b, L]."""
        if self._all is not None:
            flat = np.maximum(rows, 0)[:, None] * len(self._all) + np.maximum(others, 0)
            found: np.ndarray = self._all.reshape(-1).take(flat)
            return found
        distinct, at = np.unique(np.concatenate([rows, others.reshape(-1)]), return_inverse=True)
        unit = unit_rows(self.table.vectors_at(distinct))
        ours, theirs = at[: len(rows)], at[len(rows) :].reshape(others.shape)
        step = max(1, _COSINE_VALUES // max(1, others.shape[1] * unit.shape[1]))
        parts = [
            np.matmul(unit[theirs[i : i + step]], unit[ours[i : i + step], :, None])[:, :, 0]
            for i in range(0, len(rows), step)
        ]
        return np.concatenate(parts) if parts else np.zeros(others.shape, np.float32)
