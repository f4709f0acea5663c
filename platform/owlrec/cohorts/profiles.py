"""What the LLM reads of a cohort: its most representative members, the titles they share, their common attributes.

The members nearest to the centre stand for all; of an attribute group, those with the longest history. A profile is
kept from one run to the next while the cohort's members and titles have hardly moved, so that its prompt stays the
same to the letter and nothing is asked again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from owlrec.cohorts.attributes import values_of
from owlrec.config import Config
from owlrec.ordered import run_starts
from owlrec.scenario import Scenario
from owlrec.schema import TABLES, Kind, stable_id
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

PROFILES = pa.schema(
    [
        ("id", pa.int64()),  # stable_id(cohort): the id of its knowledge
        ("cohort", pa.string()),
        ("kind", pa.string()),  # of its members
        ("facet", pa.string()),
        ("source", pa.string()),
        ("size", pa.int64()),
        ("as_of", pa.int64()),  # ms: of the latest behaviour that the profile rests on; 0 for items
        ("titles", pa.list_(pa.string())),  # liked, or disliked where that is the facet; of items, their own
        ("opposite", pa.list_(pa.string())),  # the other way round
        ("attributes", pa.list_(pa.string())),
        ("representatives", pa.list_(pa.int64())),
    ]
)
_CANDIDATES = pa.schema(
    [
        ("cohort", pa.string()),
        ("facet", pa.string()),
        ("source", pa.string()),
        ("rank", pa.float32()),  # ascending
        ("id", pa.int64()),
        ("as_of", pa.int64()),
        ("chosen", pa.list_(pa.int64())),  # item ids that the facet is about
        ("opposite", pa.list_(pa.int64())),
        ("attributes", pa.list_(pa.string())),
    ]
)
_MERGE_ROWS = 1 << 17  # candidates in memory before all but the best of each cohort go


class ProfileConfig(Config):
    """How much of a cohort its prompt quotes, and how far it may move before it is asked about again."""

    representatives: int = Field(10, ge=1)
    titles: int = Field(15, ge=1)  # REKI quotes as many
    opposite: int = Field(5, ge=0)
    common_share: float = Field(0.5, gt=0, le=1)  # an attribute is common where so many representatives have it
    # Of its members, or of its titles: below this a cohort's text is still about the same people and tastes.
    settled_share: float = Field(0.3, ge=0, le=1)


@dataclass(frozen=True)
class CandidateReader:
    """The best representatives of each cohort within one part of a table."""

    workspace: Workspace
    folder: str
    scenario: Scenario
    config: ProfileConfig

    def __call__(self, kind: Kind, part: str) -> dict[str, Any]:
        """Writes candidates/<kind>/<part>; returns its number of rows."""
        members = self.workspace.read_parquet(f"{self.folder}/{kind}/{part}")
        rows = self.workspace.read_parquet(f"tables/{TABLES[kind]}/{part}")
        read = self._items(rows) if kind == "item" else self._users(rows, part)
        ids = members["id"].to_pylist()
        length = np.array([-len(read[i][1]) for i in ids], dtype=np.float32)
        distance = members["distance"].to_numpy()  # NaN where null
        rank = np.where(np.isnan(distance), length, distance)
        best = _best(members["cohort"], rank, members["id"].to_numpy(), self.config.representatives)
        found = []
        for row, at in zip(members.take(pa.array(best)).to_pylist(), best.tolist(), strict=True):
            as_of, liked, disliked, attributes = read[row["id"]]
            chosen, opposite = (disliked, liked) if row["facet"] == "disliked" else (liked, disliked)
            found.append(
                (row["cohort"], row["facet"], row["source"], rank[at], row["id"], as_of, chosen, opposite, attributes)
            )
        columns = [pa.array([f[i] for f in found], field.type) for i, field in enumerate(_CANDIDATES)]
        self.workspace.write_parquet(f"{self.folder}/candidates/{kind}/{part}", pa.table(columns, schema=_CANDIDATES))
        return {"rows": len(found)}

    def _items(self, rows: pa.Table) -> dict[int, tuple[int, list[int], list[int], list[str]]]:
        return {
            r["item_id"]: (0, [r["item_id"]], [], _attributes(r, self.scenario.text_fields)) for r in rows.to_pylist()
        }

    def _users(self, rows: pa.Table, part: str) -> dict[int, tuple[int, list[int], list[int], list[str]]]:
        histories = self.workspace.read_parquet(f"tables/histories/{part}")
        read: dict[int, tuple[int, list[int], list[int]]] = {}
        for row in histories.to_pylist():
            ratings = row["ratings"] or [None] * len(row["items"])
            liked: list[int] = []
            disliked: list[int] = []
            for item, rating in zip(row["items"], ratings, strict=True):
                (liked if rating is None or rating > self.scenario.positive_above else disliked).append(item)
            read[row["user_id"]] = (row["as_of"], liked, disliked)
        fields = self.scenario.profile_fields
        return {
            r["user_id"]: (
                *read.get(r["user_id"], (0, [], [])),
                [f"{field} {value}" for field, value in values_of(r, fields)],
            )
            for r in rows.to_pylist()
        }


def build_profiles(
    workspace: Workspace,
    folder: str,
    kind: Kind,
    sizes: Mapping[str, int],
    catalog: ItemCatalog,
    config: ProfileConfig,
) -> pa.Table:
    """The profiles (PROFILES) of all cohorts of a kind, by name, from what CandidateReader wrote."""
    rows = []
    best = _merged(workspace, f"{folder}/candidates/{kind}", config.representatives)
    cohorts: dict[str, list[dict[str, Any]]] = {}
    for row in best.to_pylist():
        cohorts.setdefault(row["cohort"], []).append(row)
    for name in sorted(cohorts):
        members = cohorts[name]
        rows.append(
            {
                "id": stable_id(name),
                "cohort": name,
                "kind": kind,
                "facet": members[0]["facet"],
                "source": members[0]["source"],
                "size": sizes[name],
                "as_of": max(m["as_of"] for m in members),
                "titles": _shared_titles((m["chosen"] for m in members), catalog, config.titles),
                "opposite": _shared_titles((m["opposite"] for m in members), catalog, config.opposite),
                "attributes": _common([m["attributes"] for m in members], config.common_share),
                "representatives": sorted(m["id"] for m in members),
            }
        )
    return pa.Table.from_pylist(rows, schema=PROFILES)


def keep_settled(
    new: pa.Table, previous: pa.Table, stayed: Mapping[str, int], config: ProfileConfig
) -> tuple[pa.Table, int]:
    """`new` profiles, but the earlier one of each cohort that has settled, and how many these are.

    stayed: how many of a cohort's members were in it before. It has settled where the share of members, of those then
    and now together, that came or went is at most `settled_share`, and so is that of titles.
    """
    before = {row["cohort"]: row for row in previous.to_pylist()}
    rows, kept = [], 0
    for row in new.to_pylist():
        old = before.get(row["cohort"])
        if old is not None:
            both = stayed.get(row["cohort"], 0)
            moved = max(
                _distance(both, old["size"] + row["size"] - both),
                _distance(len(set(row["titles"]) & set(old["titles"])), len(set(row["titles"]) | set(old["titles"]))),
            )
            if moved <= config.settled_share:
                row, kept = {**old, "size": row["size"]}, kept + 1
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=PROFILES), kept


def _distance(common: int, together: int) -> float:
    return 1 - common / together if together else 0.0


def _merged(workspace: Workspace, folder: str, n: int) -> pa.Table:
    waiting, rows = [_CANDIDATES.empty_table()], 0
    for name in workspace.names(folder):
        waiting.append(workspace.read_parquet(f"{folder}/{name}"))
        rows += waiting[-1].num_rows
        if rows > _MERGE_ROWS:
            waiting = [_best_rows(pa.concat_tables(waiting), n)]
            rows = 0
    return _best_rows(pa.concat_tables(waiting), n)


def _best_rows(table: pa.Table, n: int) -> pa.Table:
    return table.take(pa.array(_best(table["cohort"], table["rank"].to_numpy(), table["id"].to_numpy(), n)))


def _best(cohorts: pa.ChunkedArray, rank: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    """The rows of the n members of least rank of each cohort, int64, cohort by cohort."""
    codes = pc.dictionary_encode(cohorts).combine_chunks().indices.to_numpy(zero_copy_only=False)
    order = np.lexsort((ids, rank, codes))
    return order[np.arange(len(order)) - run_starts(codes[order]) < n]


def _shared_titles(items: Iterable[Sequence[int]], catalog: ItemCatalog, n: int) -> list[str]:
    """Titles of the items that most representatives have, ties by the order in which they first occur."""
    counts = Counter(item for chosen in items for item in dict.fromkeys(chosen))
    ids = np.array([item for item, _ in counts.most_common()], dtype=np.int64)
    return list(dict.fromkeys(title for title in catalog.titles(ids) if title))[:n]


def _common(attributes: Sequence[Sequence[str]], share: float) -> list[str]:
    counts = Counter(a for of_one in attributes for a in set(of_one))
    return sorted(a for a, n in counts.items() if n >= share * len(attributes))


def _attributes(row: Mapping[str, Any], fields: Sequence[str]) -> list[str]:
    values = ((field, row.get(field)) for field in fields)
    return [
        f"{field} {one}"
        for field, value in values
        for one in (value if isinstance(value, list) else [value])
        if one not in (None, "")
    ]
