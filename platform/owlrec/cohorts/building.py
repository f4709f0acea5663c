"""From prepared tables to cohorts: vectors, codebooks, assignments, profiles and the prompts about them.

The order of the stage `cohorts`. What runs over all parts of a table goes through `map_parts`, which a cluster spreads;
in between the driver trains on samples and holds nothing longer than a list of cohorts.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.cohorts.assignment import FACETS, Router, Vectorizer, add_counts, vector_rows
from owlrec.cohorts.clustering import Codebook, train_codebook
from owlrec.cohorts.collaborative import train_item_factors
from owlrec.cohorts.model import LATEST, Book, CohortModel, CohortsConfig, Rings, cohort_name, cut_rings
from owlrec.cohorts.profiles import PROFILES, CandidateReader, build_profiles, keep_settled
from owlrec.errors import WorkspaceError
from owlrec.scenario import Scenario
from owlrec.schema import TABLES, Kind
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

_ROUNDS = 3  # of folding what is too small
MapParts = Callable[[Callable[[str], Any], Sequence[str]], Mapping[str, Any]]  # results by part


def build_cohorts(
    workspace: Workspace,
    folder: str,
    config: CohortsConfig,
    scenario: Scenario,
    map_parts: MapParts,
    previous: str | None = None,
) -> dict[str, int]:
    """Builds the cohorts of a prepared workspace in `folder`; returns what there is to count.

    previous: the folder of an earlier run, whose names and settled profiles go on. Raises SchemaError where the data
    cannot be clustered: no item that enough users chose, k beyond the number of members.
    """
    before = CohortModel.load(workspace, previous) if previous else None
    parts = {kind: workspace.table_parts(table) for kind, table in TABLES.items()}
    factors = train_item_factors(
        _histories(workspace, config.collaborative.train_users),
        config.collaborative,
        before.factors if before is not None else None,
    )
    vectorize = Vectorizer(workspace, folder, factors, config.collaborative, scenario)
    counts: dict[Kind, list[Any]] = {
        kind: list(map_parts(partial(vectorize, kind), parts[kind]).values()) for kind in parts
    }
    model = CohortModel(
        factors,
        {
            book: codebook
            for book in FACETS
            if (codebook := _train(workspace, folder, config, book, counts, before)) is not None
        },
        {kind: _groups(counts[kind]) for kind in parts},
        min_group=config.users.min_size,
    )
    model.save(workspace, folder)
    router = Router(workspace, folder, scenario, previous)

    def assign() -> dict[Kind, dict[str, Counter[str]]]:
        found = {k: list(map_parts(partial(router, k), parts[k]).values()) for k in parts}
        return {k: {name: add_counts(results, name) for name in ("sizes", "stayed")} for k, results in found.items()}

    assigned = assign()
    for _ in range(_ROUNDS):
        smaller = _without_small(model, config, assigned)
        if smaller is model:
            break
        model = smaller
        model.save(workspace, folder)
        assigned = assign()
    rings = _rings(workspace, folder, model, config, assigned)
    if any(rings.values()):
        model = dataclasses.replace(model, rings=rings)
        model.save(workspace, folder)
        assigned = assign()
    kept = _write_profiles(workspace, folder, config, scenario, map_parts, parts, assigned, previous)
    return _summary(assigned, kept)


def read_profiles(workspace: Workspace, folder: str) -> pa.Table:
    """The profiles of all cohorts (cohorts.profiles.PROFILES)."""
    return workspace.read_parquet(f"{folder}/profiles.parquet")


def previous_of(workspace: Workspace, folder: str) -> str | None:
    """The folder that a run in `folder` goes on from; a run that is repeated goes on from where it did before."""
    if not workspace.exists(LATEST):
        return None
    newest = workspace.read_json(LATEST)
    found: str | None = newest["previous"] if newest["folder"] == folder else newest["folder"]
    return found


def make_latest(workspace: Workspace, folder: str) -> None:
    """Makes a finished folder what the next run starts from."""
    workspace.write_json(LATEST, {"folder": folder, "previous": previous_of(workspace, folder)})


def _histories(workspace: Workspace, n_users: int) -> pa.Table:
    """Enough parts for so many users; parts go by a hash of the id, so that any are a fair sample."""
    tables, rows = [], 0
    for part in workspace.table_parts("histories"):
        tables.append(workspace.read_parquet(f"tables/histories/{part}"))
        rows += tables[-1].num_rows
        if rows >= n_users:
            break
    if rows == 0:
        raise WorkspaceError(f"{workspace.root}: the histories are empty. Run `prepare` again, with more data.")
    return pa.concat_tables(tables).slice(0, n_users)


def _train(
    workspace: Workspace,
    folder: str,
    config: CohortsConfig,
    book: Book,
    counts: Mapping[Kind, Sequence[Any]],
    before: CohortModel | None,
) -> Codebook | None:
    kind, column, _ = FACETS[book]
    population = sum(result["counts"][column] for result in counts[kind])
    settings = config.clusters(book)
    if population == 0 and book == "user-disliked":
        return None
    wanted = settings.cohorts(max(population, 1)) * settings.sample_per_cohort
    sample: list[np.ndarray] = []
    for part in workspace.names(folder, "vectors", kind):
        table = workspace.read_parquet(f"{folder}/vectors/{kind}/{part}", [column])
        sample.append(vector_rows(table[column])[1])
        if sum(map(len, sample)) >= wanted:
            break
    return train_codebook(
        np.concatenate(sample), settings, population, before.books.get(book) if before is not None else None
    )


def _groups(results: Sequence[Any]) -> dict[Any, int]:
    total: Counter[Any] = Counter()
    for result in results:
        total.update({tuple(map(tuple, group)): n for group, n in result["groups"]})
    return dict(total)


def _without_small(
    model: CohortModel, config: CohortsConfig, assigned: Mapping[Kind, Mapping[str, Counter[str]]]
) -> CohortModel:
    """The model itself where no cohort is too small."""
    folded = {}
    for name, book in model.books.items():
        sizes = assigned[FACETS[name][0]]["sizes"]
        smallest = config.clusters(name).min_size
        small = [row for row, n in enumerate(book.numbers) if sizes[cohort_name(name, int(n))] < smallest]
        if small and len(book.numbers) > 1:
            folded[name] = book.without(np.array(small))
    return dataclasses.replace(model, books={**model.books, **folded}) if folded else model


def _rings(
    workspace: Workspace,
    folder: str,
    model: CohortModel,
    config: CohortsConfig,
    assigned: Mapping[Kind, Mapping[str, Counter[str]]],
) -> dict[Book, dict[int, Rings]]:
    found: dict[Book, dict[int, Rings]] = {}
    for name, book in model.books.items():
        kind, largest = FACETS[name][0], config.clusters(name).max_size
        over = {cohort_name(name, int(n)): int(n) for n in book.numbers}
        over = {cohort: n for cohort, n in over.items() if assigned[kind]["sizes"][cohort] > largest}
        if not over:
            continue
        tables = []
        for part in workspace.names(folder, kind):
            table = workspace.read_parquet(f"{folder}/{kind}/{part}", ["id", "cohort", "distance"])
            tables.append(table.filter(pc.is_in(table["cohort"], pa.array(sorted(over)))))
        members = pa.concat_tables(tables)
        found[name] = {}
        for cohort, number in over.items():
            of_it = members.filter(pc.equal(members["cohort"], cohort))
            found[name][number] = cut_rings(of_it["distance"].to_numpy(), of_it["id"].to_numpy(), largest)
    return found


def _write_profiles(
    workspace: Workspace,
    folder: str,
    config: CohortsConfig,
    scenario: Scenario,
    map_parts: MapParts,
    parts: Mapping[Kind, Sequence[str]],
    assigned: Mapping[Kind, Mapping[str, Counter[str]]],
    previous: str | None,
) -> int:
    reader, catalog = CandidateReader(workspace, folder, scenario, config.profiles), ItemCatalog.load(workspace)
    earlier = read_profiles(workspace, previous) if previous else PROFILES.empty_table()
    tables, kept = [], 0
    for kind in parts:
        map_parts(partial(reader, kind), parts[kind])
        new = build_profiles(workspace, folder, kind, assigned[kind]["sizes"], catalog, config.profiles)
        settled, n = keep_settled(new, earlier, assigned[kind]["stayed"], config.profiles)
        tables.append(settled)
        kept += n
    workspace.write_parquet(f"{folder}/profiles.parquet", pa.concat_tables(tables))
    return kept


def _summary(assigned: Mapping[Kind, Mapping[str, Counter[str]]], kept: int) -> dict[str, int]:
    summary: dict[str, int] = {}
    for kind, counts in assigned.items():
        sizes = np.array(list(counts["sizes"].values()))
        summary |= {
            f"{kind}_cohorts": len(sizes),
            f"{kind}_cohort_smallest": int(sizes.min()),
            f"{kind}_cohort_median": int(np.median(sizes)),
            f"{kind}_cohort_largest": int(sizes.max()),
        }
    return summary | {"settled": kept}
