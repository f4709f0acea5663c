"""Builds the cohorts of a workspace: which cohorts a row belongs to, and the seven stages from tables to prompts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.cohorts.clustering import (
    CELL_SAMPLE,
    Codebook,
    FactorSettings,
    ItemFactors,
    Sizes,
    fold_in,
    items_and_likes,
    name_centroids,
    nearest_rows,
    train_cells,
    train_centroids,
    train_item_factors,
    unit,
)
from owlrec.cohorts.cohort_model import (
    FACETS,
    FACTORS,
    PROFILES,
    Book,
    CohortModel,
    CohortsConfig,
    CohortSettings,
    Group,
    Moments,
    add_members,
    attribute_cohort_name,
    best_candidates,
    build_profiles,
    choose_group,
    cohort_name,
    count_groups,
    count_members,
    cut_moments,
    distinct_texts,
    item_candidates,
    keep_settled,
    large_groups,
    user_candidates,
    values_of,
)
from owlrec.errors import WorkspaceError
from owlrec.ids import TABLES, Kind, shard_of, stable_id
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.scenario import Scenario
from owlrec.schema import COHORTS, newest
from owlrec.shards import Card, Shard
from owlrec.sources.splits import Cut, ItemCatalog
from owlrec.storage import FileEntry, fingerprint
from owlrec.workspace import Workspace, shards_for

# ----------------------------------------------------------------------------------------------------------- assignment
# Assigns every user and item to cohorts: collaborative cohorts first, attribute groups as the fallback.
#
# With enough history, a user gets the nearest collaborative cohort and a second one by dislikes. Otherwise the
# attribute group, or else the group of everybody. All functions work on one shard of a table.


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


# ------------------------------------------------------------------------------------------------------------- building
# Builds cohorts from prepared tables: factors, vectors, codebooks, memberships, profiles and prompts.
#
# Seven stages for the runner, in this order. Stages that must see many users at once (factors, codebooks, profiles)
# read a sample: shards go by a hash of the id, so the first ones are a fair sample. Stages that see everybody (vectors,
# memberships) work shard by shard. Between the two levels of a codebook, and between members and their cohort, rows are
# shuffled: each batch of shards writes one Arrow file with one record batch per receiver, and each receiver reads its
# own batch from every file.


_BATCH_ROWS = 1 << 17  # per shuffle: 40 MB of candidates
_MOMENTS = "factors/moments.json"
_MERGE_ROWS = 1 << 17  # candidates in memory before only each cohort's best are kept
Ask = Callable[[pa.Table], pa.Table]  # profiles -> schema.PROMPTS about them


@dataclass(frozen=True)
class CodebookTraining:
    """Training plan of one codebook: its shards' vectors, read in batches, and the number of receivers."""

    book: Book
    sizes: Sizes
    batches: Sequence[range]  # of shards; together they are the sample
    sample: int  # vectors in them
    population: int

    @property
    def groups(self) -> int:
        """Number of shards in which its cells are trained."""
        return min(self.sizes.cells, -(-max(1, self.sample) // CELL_SAMPLE))

    def kind(self, step: str) -> str:
        """Kind of the shards of one of its steps."""
        return f"{self.book}-{step}"


@dataclass
class _CohortStage(Stage):
    """Shared parts of the stages."""

    folder: str
    config: CohortsConfig
    scenario: Scenario
    previous: str | None = None  # the folder of an earlier run
    settings: CohortSettings = field(default_factory=CohortSettings)

    def vectors(self, workspace: Workspace, book: Book, shards: Iterable[int]) -> Iterator[np.ndarray]:
        """Vectors of a codebook in some shards, float32 [n, d] each."""
        kind, column, _ = FACETS[book]
        for number in shards:
            table = workspace.map_arrow(f"{self.folder}/{Shard(f'{kind}-vectors', number).file('.arrow')}")
            yield vector_rows(newest(table)[column])[1]

    def earlier_book(self, workspace: Workspace, book: Book) -> Codebook | None:
        """The earlier run's codebook, if it is in the same space."""
        if self.previous is None:
            return None
        earlier = CohortModel.load(workspace, self.previous).books.get(book)
        same = earlier is not None and earlier.centroids.shape[1] == self.settings.factors.factors
        return earlier if same else None


@dataclass
class TrainFactors(_CohortStage):
    """ALS over a sample of histories, the newest of each user, as one shard."""

    cuts: Sequence[Cut] = ()
    name = "cohorts: factors"

    def run(self, work: Work) -> Result:
        """Writes the item factors, and the moments of the cuts."""
        tables, rows, wanted = [], 0, self.settings.factors.train_users
        for number in work.workspace.table_shards("histories"):
            tables.append(work.workspace.read_shard("histories", number))
            rows += len(newest(tables[-1], "user_id"))
            if rows >= wanted:
                break
        if rows == 0:
            raise WorkspaceError(
                f"{work.workspace.root}: the histories are empty. Run `prepare` again, with more data."
            )
        moments = cut_moments(pa.concat_tables(tables), self.cuts)
        histories = pa.concat_tables([newest(table, "user_id") for table in tables]).slice(0, wanted)
        earlier = ItemFactors.load(work.workspace, f"{self.previous}/{FACTORS}") if self.previous else None
        factors = train_item_factors(histories, self.settings.factors, earlier)
        files = {
            FACTORS: factors.save(work.workspace, work.artifact.path(FACTORS)),
            _MOMENTS: work.workspace.write_json(work.artifact.path(_MOMENTS), moments),
        }
        return Result(files, rows_in=histories.num_rows, rows_out=len(factors.ids))


@dataclass
class MakeVectors(_CohortStage):
    """Folds in the users of a shard, or gathers the vectors of its items."""

    name = "cohorts: vectors"

    def open(self, workspace: Workspace, worker: str) -> None:
        """Maps the item factors."""
        self.factors = ItemFactors.load(workspace, f"{self.folder}/{FACTORS}")

    def run(self, work: Work) -> Result:
        """Writes vectors, and the sizes of the attribute groups of rows without one."""
        kind: Kind = "user" if work.shard.kind == "user-vectors" else "item"
        number, workspace = work.shard.number, work.workspace
        rows = workspace.read_shard(TABLES[kind], number)
        ids = rows[f"{kind}_id"].to_numpy()
        if kind == "item":
            vectors = item_vectors(ids, self.factors)
        else:
            histories = workspace.read_shard("histories", number)
            above = self.scenario.positive_above
            vectors = user_vectors(ids, histories, self.factors, self.settings.factors, above)
        current = newest(vectors)
        groups = groups_without_vectors(kind, current, rows, self.scenario)
        columns = vectors.column_names[2:]
        path, about = work.shard.file(".arrow"), Shard(f"{kind}-groups", number).file(".json")
        files = {
            path: workspace.write_arrow(work.artifact.path(path), vectors, vectors.schema),
            about: workspace.write_json(
                work.artifact.path(about), [[list(map(list, g)), n] for g, n in groups.items()]
            ),
        }
        counts = {column: len(ids) - current[column].null_count for column in columns}
        return Result(files, rows_in=len(ids), rows_out=len(ids), counts=counts)


@dataclass
class TrainCells(_CohortStage):
    """The first level of a codebook: one shard."""

    name = "cohorts: cells"
    trainings: Mapping[str, CodebookTraining] = field(default_factory=dict)  # by kind of shard

    def run(self, work: Work) -> Result:
        """Writes the centroids of the cells."""
        training = self.trainings[work.shard.kind]
        sample, rows = [], 0
        for vectors in self.vectors(work.workspace, training.book, (n for batch in training.batches for n in batch)):
            sample.append(vectors)
            rows += len(vectors)
            if rows >= CELL_SAMPLE:
                break
        earlier = self.earlier_book(work.workspace, training.book)
        cells = train_cells(np.concatenate(sample), training.sizes, earlier, seed=self.settings.seed)
        return Result({work.shard.file(".arrow"): _write_vectors(work, np.arange(len(cells)), cells)}, rows, len(cells))


@dataclass
class DivideSample(_CohortStage):
    """Splits the vectors of a batch of shards by the groups that train their cells."""

    name = "cohorts: samples"
    trainings: Mapping[str, CodebookTraining] = field(default_factory=dict)

    def run(self, work: Work) -> Result:
        """Writes one record batch per group of cells: cell and vector."""
        training = self.trainings[work.shard.kind]
        cells = _read_vectors(work.workspace, work.artifact.path(Shard(training.kind("cells"), 0).file(".arrow")))[1]
        shards = training.batches[work.shard.number]
        sample = np.concatenate(list(self.vectors(work.workspace, training.book, shards)))
        cell = nearest_rows(cells, sample)
        table = _vectors_table(cell, sample)
        path = work.shard.file(".arrow")
        entry = _write_divided(work, path, table, cell * training.groups // len(cells), training.groups)
        return Result({path: entry}, rows_in=len(sample), rows_out=len(sample))


@dataclass
class TrainCentroids(_CohortStage):
    """The second level of a codebook, in a group of cells."""

    name = "cohorts: centroids"
    trainings: Mapping[str, CodebookTraining] = field(default_factory=dict)

    def run(self, work: Work) -> Result:
        """Writes the centroids of the group's cells, cell by cell."""
        training, workspace, group = self.trainings[work.shard.kind], work.workspace, work.shard.number
        cells = _read_vectors(workspace, work.artifact.path(Shard(training.kind("cells"), 0).file(".arrow")))[1]
        path = work.artifact.path(training.kind("samples"))
        sample = pa.concat_tables(_read_divided(workspace, path, len(training.batches), group))
        cell, vectors = sample["cell"].to_numpy(), vector_rows(sample["vector"])[1]
        order = np.argsort(cell, kind="stable")
        present, starts = np.unique(cell[order], return_index=True)
        book = self.earlier_book(workspace, training.book)
        earlier_cells = nearest_rows(cells, book.centroids) if book is not None else None
        centroids = []
        for number, (start, stop) in zip(present.tolist(), pairwise([*starts.tolist(), len(cell)]), strict=True):
            earlier = book.centroids[earlier_cells == number] if book is not None else None
            k = round((stop - start) * training.sizes.cohorts / training.sample)
            own = vectors[order[start:stop]]
            share = training.sample / training.population
            centroids.append(train_centroids(own, k, share, training.sizes, earlier, seed=self.settings.seed))
        cell_rows = np.repeat(present, [len(c) for c in centroids])
        made = np.concatenate([np.zeros((0, cells.shape[1]), np.float32), *centroids])
        return Result({work.shard.file(".arrow"): _write_vectors(work, cell_rows, made)}, len(vectors), len(made))


@dataclass
class AssignCohorts(_CohortStage):
    """The memberships of a shard of users or items."""

    name = "cohorts: memberships"

    def open(self, workspace: Workspace, worker: str) -> None:
        """Loads the model; its indexes are built once."""
        self.model = CohortModel.load(workspace, self.folder)

    def run(self, work: Work) -> Result:
        """Writes schema.COHORTS of the shard."""
        kind: Kind = "user" if work.shard.kind == "user" else "item"
        number, workspace = work.shard.number, work.workspace
        vectors = workspace.map_arrow(work.artifact.path(Shard(f"{kind}-vectors", number).file(".arrow")))
        table = route(self.model, kind, vectors, lambda: workspace.read_shard(TABLES[kind], number), self.scenario)
        path = work.shard.file()
        entry = workspace.write_parquet(work.artifact.path(path), table)
        return Result({path: entry}, rows_in=len(vectors), rows_out=len(table))


@dataclass
class FindCandidates(_CohortStage):
    """Sends the best representatives of a batch of shards to their cohorts."""

    name = "cohorts: candidates"
    batches: Mapping[Kind, Sequence[range]] = field(default_factory=dict)  # of shards, by kind
    moments: Moments = field(default_factory=dict)

    def run(self, work: Work) -> Result:
        """Writes one record batch of candidates and one of member counts per shard of cohorts."""
        kind: Kind = "user" if work.shard.kind == "user-candidates" else "item"
        workspace, shards = work.workspace, self.batches[kind][work.shard.number]
        candidates, sizes, rows = [], [], 0
        for number in shards:
            members, earlier = self._members(workspace, kind, number)
            table, n = workspace.read_shard(TABLES[kind], number), self.settings.profiles.representatives
            rows += table.num_rows
            if kind == "item":
                candidates.append(item_candidates(members, table, self.scenario, n))
            else:
                histories = workspace.read_shard("histories", number)
                candidates.append(user_candidates(members, table, histories, self.scenario, n, self.moments))
            sizes.append(count_members(newest(members), earlier))
        best, counts = best_candidates(candidates, self.settings.profiles.representatives), add_members(sizes)
        # A cohort of an earlier cut may no longer have members.
        names = list(dict.fromkeys([*counts["cohort"].to_pylist(), *best["cohort"].to_pylist()]))
        n_shards = workspace.n_shards("cohort")
        shard = dict(zip(names, cohort_shards(names, n_shards).tolist(), strict=True))
        files = {}
        for step, made in (("candidates", best), ("members", counts)):
            path = Shard(f"{kind}-{step}", work.shard.number).file(".arrow")
            receiver = np.array([shard[name] for name in made["cohort"].to_pylist()], dtype=np.int64)
            files[path] = _write_divided(work, path, made, receiver, n_shards)
        return Result(files, rows_in=rows, rows_out=len(best))

    def _members(self, workspace: Workspace, kind: Kind, number: int) -> tuple[pa.Table, pa.Table | None]:
        file = Shard(kind, number).file()
        earlier = f"{self.previous}/{file}"
        read = self.previous is not None and workspace.exists(earlier)
        members = workspace.read_parquet(f"{self.folder}/{file}")
        return members, newest(workspace.read_parquet(earlier, ["id", "as_of", "cohort"])) if read else None


@dataclass
class WritePrompts(_CohortStage):
    """The profiles and prompts of a shard of cohorts."""

    name = "cohorts: prompts"
    batches: Mapping[Kind, Sequence[range]] = field(default_factory=dict)
    moments: Moments = field(default_factory=dict)
    shares: Mapping[Kind, float] = field(default_factory=dict)  # share of all ids in the batches, by kind
    ask: Ask | None = None

    def open(self, workspace: Workspace, worker: str) -> None:
        """Loads the titles."""
        self.titles = ItemCatalog.load(workspace).titles

    def run(self, work: Work) -> Result:
        """Writes profiles/ and prompts/; a stable cohort keeps its earlier profile."""
        assert self.ask is not None
        workspace, number, settings = work.workspace, work.shard.number, self.settings.profiles
        tables = [PROFILES.empty_table()]
        stayed: dict[str, int] = {}
        counts: dict[str, int] = {}
        for kind in TABLES:
            best, sizes = self._merged(work, kind)
            share = self.shares[kind]
            scaled = {r["cohort"]: (round(r["members"] / share), round(r["stayed"] / share)) for r in sizes.to_pylist()}
            members = {name: n for name, (n, _) in scaled.items()}
            stayed |= {name: n for name, (_, n) in scaled.items()}
            tables.append(build_profiles(best, members, kind, self.titles, settings))
            counts |= {f"{kind}_cohorts": len(members), f"{kind}_members": sum(members.values())}
            counts[f"{kind}_cohort_largest"] = max(members.values(), default=0)
        profiles = pa.concat_tables(tables)
        before = f"{self.previous}/profiles/{number:08d}.parquet"
        if self.previous is not None and workspace.exists(before):
            profiles, counts["settled"] = keep_settled(profiles, workspace.read_parquet(before), stayed, settings)
        profiles = distinct_texts(profiles, self.moments)
        files = {}
        for name, table in (("profiles", profiles), ("prompts", self.ask(profiles))):
            path = Shard(name, number).file()
            files[path] = workspace.write_parquet(work.artifact.path(path), table)
        return Result(files, rows_in=len(profiles), rows_out=len(profiles), counts=counts)

    def _merged(self, work: Work, kind: Kind) -> tuple[pa.Table, pa.Table]:
        waiting: list[pa.Table] = []
        n_files = len(self.batches[kind])
        for table in _read_divided(
            work.workspace, work.artifact.path(f"{kind}-candidates"), n_files, work.shard.number
        ):
            waiting.append(table)
            if sum(map(len, waiting)) > _MERGE_ROWS:
                waiting = [best_candidates(waiting, self.settings.profiles.representatives)]
        sizes = list(_read_divided(work.workspace, work.artifact.path(f"{kind}-members"), n_files, work.shard.number))
        return best_candidates(waiting, self.settings.profiles.representatives), add_members(sizes)


def build_cohorts(
    workspace: Workspace,
    folder: str,
    config: CohortsConfig,
    scenario: Scenario,
    ask: Ask,
    *,
    shard_rows: int,
    cuts: Sequence[Cut] = (),
    pool: Pool | None = None,
    previous: str | None = None,
    settings: CohortSettings | None = None,
    on_card: Callable[[Card], None] | None = None,
) -> dict[str, int]:
    """Builds the cohorts of a prepared workspace in `folder`; returns counts.

    ask: turns profiles into prompts; shard_rows: cohorts per shard, if not yet fixed. cuts: of
    the recipe (see cut_moments). previous: the folder of an earlier run, to keep names and stable profiles.
    Raises SchemaError if the data cannot be clustered because no item has enough users.
    """
    inputs = fingerprint(folder, previous)
    common = (folder, config, scenario, previous, settings or CohortSettings())

    def run(stage: Stage, *kinds: tuple[str, int]) -> dict[str, Card]:
        shards = [Shard(kind, number) for kind, n in kinds for number in range(n)]
        return run_stage(workspace, stage, dict.fromkeys(shards, inputs), pool, on_card)

    n_shards = {kind: workspace.n_shards(kind) for kind in TABLES}
    run(TrainFactors(*common, cuts), ("factors", 1))
    moments = {str(cut): int(moment) for cut, moment in workspace.read_json(f"{folder}/{_MOMENTS}").items()}
    made = run(MakeVectors(*common), *((f"{kind}-vectors", n) for kind, n in n_shards.items()))
    cards = {kind: [made[Shard(f"{kind}-vectors", s).name] for s in range(n)] for kind, n in n_shards.items()}
    trainings = [
        training for book in FACETS if (training := _training_of(book, cards[FACETS[book][0]], config)) is not None
    ]

    def by_kind(step: str) -> dict[str, CodebookTraining]:
        return {training.kind(step): training for training in trainings}

    run(TrainCells(*common, by_kind("cells")), *((kind, 1) for kind in by_kind("cells")))
    samples = by_kind("samples")
    run(DivideSample(*common, samples), *((kind, len(training.batches)) for kind, training in samples.items()))
    centroids = by_kind("centroids")
    run(TrainCentroids(*common, centroids), *((kind, training.groups) for kind, training in centroids.items()))
    model = _join_model(workspace, TrainCells(*common), trainings, cards)
    model.save(workspace, folder)
    names = sum(len(book.numbers) for book in model.books.values()) + sum(len(g) + 1 for g in model.groups.values())
    workspace.fix_shards({"cohort": shards_for(names, shard_rows)})

    run(AssignCohorts(*common), *n_shards.items())
    batches = {kind: _profile_batches(kind, cards[kind], trainings) for kind in TABLES}
    shares = {kind: _share(batches[kind], cards[kind]) for kind in TABLES}
    run(FindCandidates(*common, batches, moments), *((f"{kind}-candidates", len(b)) for kind, b in batches.items()))
    done = run(WritePrompts(*common, batches, moments, shares, ask), ("prompts", workspace.n_shards("cohort")))
    return _summary(list(done.values()))


def cohort_shards(names: Sequence[str], n_shards: int) -> np.ndarray:
    """Shard of each cohort by its name, int64 [n]."""
    return shard_of(np.fromiter(map(stable_id, names), np.int64, len(names)), n_shards)


def _training_of(book: Book, cards: Sequence[Card], config: CohortsConfig) -> CodebookTraining | None:
    kind, column, _ = FACETS[book]
    rows = [int(card.counts[column]) for card in cards]
    if not any(rows) and book == "user-disliked":
        return None
    sizes = config.clusters(kind).sizes(sum(rows))
    batches = _batches(rows, sizes.sample)
    return CodebookTraining(book, sizes, batches, sum(rows[: batches[-1].stop]), sum(rows))


def _batches(rows: Sequence[int], wanted: int) -> list[range]:
    """The first shards that together have `wanted` rows, in batches of about the shuffle's size."""
    enough = int(np.searchsorted(np.cumsum(rows), wanted)) + 1
    batches, start, held = [], 0, 0
    for shard in range(min(enough, len(rows))):
        if shard > start and held + rows[shard] > _BATCH_ROWS:
            batches.append(range(start, shard))
            start, held = shard, 0
        held += rows[shard]
    return [*batches, range(start, min(enough, len(rows)))]


def _profile_batches(kind: str, cards: Sequence[Card], trainings: Sequence[CodebookTraining]) -> list[range]:
    """The shards that trained the kind's codebooks; all if the sample included everybody."""
    mine = [training for training in trainings if FACETS[training.book][0] == kind]
    everybody = any(training.sample >= training.population for training in mine)
    shards = len(cards) if everybody else max(training.batches[-1].stop for training in mine)
    rows = [card.rows_in for card in cards[:shards]]
    return _batches(rows, sum(rows) + 1)


def _share(batches: Sequence[range], cards: Sequence[Card]) -> float:
    read = sum(cards[number].rows_in for batch in batches for number in batch)
    return read / max(1, sum(card.rows_in for card in cards)) or 1.0


def _join_model(
    workspace: Workspace,
    stage: _CohortStage,
    trainings: Sequence[CodebookTraining],
    cards: Mapping[Kind, Sequence[Card]],
) -> CohortModel:
    books = {}
    for training in trainings:
        path = f"{stage.folder}/{Shard(training.kind('cells'), 0).file('.arrow')}"
        cells = _read_vectors(workspace, path)[1]
        files = [Shard(training.kind("centroids"), group).file(".arrow") for group in range(training.groups)]
        centroids = np.concatenate([_read_vectors(workspace, f"{stage.folder}/{file}")[1] for file in files])
        books[training.book] = name_centroids(cells, centroids, stage.earlier_book(workspace, training.book))
    groups = {}
    for kind, kind_cards in cards.items():
        smallest = stage.config.clusters(kind).sizes(sum(card.rows_in for card in kind_cards)).smallest
        groups[kind] = large_groups(_group_counts(workspace, stage.folder, kind, len(kind_cards)), smallest)
    return CohortModel(books, groups)


def _group_counts(
    workspace: Workspace, folder: str, kind: str, shards: int
) -> Iterator[dict[tuple[tuple[str, str], ...], int]]:
    for number in range(shards):
        counts = workspace.read_json(f"{folder}/{Shard(f'{kind}-groups', number).file('.json')}")
        yield {tuple(map(tuple, group)): n for group, n in counts}


def _summary(cards: Sequence[Card]) -> dict[str, int]:
    def counts(name: str) -> list[int]:
        return [int(card.counts.get(name, 0)) for card in cards]

    summary = {"settled": sum(counts("settled")), "prompts": sum(card.rows_out for card in cards)}
    for kind in TABLES:
        summary |= {name: sum(counts(name)) for name in (f"{kind}_cohorts", f"{kind}_members")}
        summary[f"{kind}_cohort_largest"] = max(counts(f"{kind}_cohort_largest"))
    return summary


# Files


def _vectors_table(cell: np.ndarray, vectors: np.ndarray) -> pa.Table:
    data = pa.py_buffer(np.ascontiguousarray(vectors, dtype=np.float16))
    column = pa.Array.from_buffers(pa.binary(2 * vectors.shape[1]), len(vectors), [None, data])
    return pa.table({"cell": pa.array(cell, pa.int64()), "vector": column})


def _write_vectors(work: Work, cell: np.ndarray, vectors: np.ndarray) -> FileEntry:
    """Centroids in full precision, by cell, in the shard's own file."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1])
    table = pa.table({"cell": pa.array(cell, pa.int64()), "vector": lists})
    return work.workspace.write_arrow(work.artifact.path(work.shard.file(".arrow")), table, table.schema)


def _read_vectors(workspace: Workspace, path: str) -> tuple[np.ndarray, np.ndarray]:
    table = workspace.map_arrow(path)
    vectors = table["vector"].combine_chunks()
    return table["cell"].to_numpy(), vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size)


def _write_divided(work: Work, path: str, table: pa.Table, receiver: np.ndarray, receivers: int) -> FileEntry:
    """Writes one Arrow file with one record batch of rows per receiver."""
    order = np.argsort(receiver, kind="stable")
    ends = np.searchsorted(receiver[order], np.arange(receivers + 1))
    table = table.take(pa.array(order)).combine_chunks()
    batches = [_one_batch(table.slice(start, stop - start)) for start, stop in pairwise(ends.tolist())]
    return work.workspace.write_arrow(work.artifact.path(path), batches, table.schema)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)


def _read_divided(workspace: Workspace, folder: str, files: int, receiver: int) -> Iterator[pa.Table]:
    """One receiver's rows from each file of _write_divided."""
    for number in range(files):
        with workspace.open_input(f"{folder}/{number:08d}.arrow") as file:
            yield pa.Table.from_batches([pa.ipc.open_file(file).get_batch(receiver)])
