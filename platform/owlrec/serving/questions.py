"""What the LLM is asked about a request's candidates: the user's behaviours that bear on them (SUBR, ReLLa), in the
words that the ranker was tuned on. Retrieved for the set, they are the same in each prompt, so the engine reads them
once.

A user who comes by id is asked about by the behaviors that the current release holds, cut as the samples were. A
history that comes with the request stands in the place of these; nothing is kept of it.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from owlrec.errors import OwlRecError
from owlrec.prompting.frameworks import rank_prompt
from owlrec.ranking.behavior_retrieval import BehaviourRetriever
from owlrec.ranking.samples import RankingConfig, Shown, behaviours_shown
from owlrec.scenario import Scenario
from owlrec.schema import shard_of
from owlrec.serving.schemas import Rank
from owlrec.serving.served import ServedReleases
from owlrec.sources.outcomes import taken
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace, read_tombstones

# --------------------------------------------------------------------------------------------------------------- tables
# The tables of a prepared workspace, one row at a time: who a user is, what they did, what an item is.
#
# Rows are found by the shard that their id's hash names, so that one page of the explorer reads a file or two however
# many users there are. Titles alone are held whole, for the search.


_SHARDS_HELD = 64


class WorkspaceTables:
    """Read access to users, items and histories; what a workspace lacks is not found."""

    def __init__(self, workspace: Workspace) -> None:
        """workspace: prepared, or not."""
        self._workspace = workspace
        self._shard = lru_cache(maxsize=_SHARDS_HELD)(workspace.read_shard)
        self._catalog: ItemCatalog | None = None

    def row(self, kind: str, id_: int) -> dict[str, Any] | None:
        """A user's or an item's columns; None where there is no such row, or the user is forgotten."""
        return self._find(f"{kind}s", f"{kind}_id", id_)

    def behaviours(self, user: int) -> list[tuple[int, float | None]]:
        """What the LLM read of a user when it wrote their text: (item, rating), oldest first."""
        found = self._find("histories", "user_id", user)
        items = (found or {}).get("items") or []
        ratings = (found or {}).get("ratings") or [None] * len(items)
        return list(zip(items, ratings, strict=True))

    def history(self, user: int) -> list[tuple[int, str, float | None]]:
        """The same for people: (item, its title, rating), latest first."""
        behaviours = self.behaviours(user)
        titles = self.titles([item for item, _ in behaviours])
        return [(item, title, rating) for (item, rating), title in zip(behaviours, titles, strict=True)][::-1]

    def titles(self, items: list[int]) -> list[str]:
        """The title of each item, "" where it has none."""
        catalog = self._titles()
        return catalog.titles(np.array(items, dtype=np.int64)) if catalog and items else [""] * len(items)

    def find_items(self, words: str, limit: int) -> list[tuple[int, str]]:
        """Items whose title holds `words`, whatever the case: (id, title), by id."""
        catalog = self._titles()
        return catalog.find(words, limit) if catalog else []

    def draw_candidates(self, user: int, n: int) -> list[int]:
        """At most `n` items that a user has no behaviour towards, drawn from the catalogue, the same each time."""
        catalog, seen = self._titles(), {item for item, _ in self.behaviours(user)}
        drawn = catalog.draw(n + len(seen), user) if catalog else []
        return [item for item in drawn if item not in seen][:n]

    def _titles(self) -> ItemCatalog | None:
        if self._catalog is None:
            try:
                self._catalog = ItemCatalog.load(self._workspace)
            except OwlRecError:
                return None
        return self._catalog

    def _find(self, table: str, key: str, id_: int) -> dict[str, Any] | None:
        if key == "user_id" and id_ in read_tombstones(self._workspace):  # shards that are held may be older
            return None
        try:
            shards = self._workspace.table_shards(table)
            rows = self._shard(table, int(shard_of(np.array([id_]), len(shards))[0]))
        except OwlRecError:  # not prepared
            return None
        at = int(np.searchsorted(ids := rows[key].to_numpy(), id_, side="right")) - 1  # the last: the newest history
        return None if at < 0 or ids[at] != id_ else dict(rows.slice(at, 1).to_pylist()[0])


# ------------------------------------------------------------------------------------------------------------ questions


Recent = Callable[[int], list[tuple[int, float | None]]]  # user -> (item, rating) of what they took, oldest first


def recent_of(served: ServedReleases) -> Recent:
    """What a user took among the last behaviors that the current release holds; raises Problem (503) without one."""

    def recent(user: int) -> list[tuple[int, float | None]]:
        with served.lease() as release:
            (found,) = release.store.behaviors([user])
        rows = [] if found is None else found[taken(found["rating"], found["label"])].tolist()
        return [(item, None if math.isnan(rating) else rating) for _, item, rating, _ in rows]

    return recent


class QuestionWriter:
    """Writes the questions of `ranking.scorer.LlmScorer`."""

    def __init__(
        self,
        tables: WorkspaceTables,
        retriever: BehaviourRetriever,
        scenario: Scenario,
        config: RankingConfig,
        recent: Recent,
        count_tokens: Callable[[str], int],
    ) -> None:
        """config: that the ranker was tuned with; the last of its ways of showing behaviours is asked in."""
        self._tables = tables
        self._retriever = retriever
        self._scenario = scenario
        self._config = config
        self._recent = recent
        self._count_tokens = count_tokens
        self._shown: Shown = config.data.shown[-1]

    def write(self, asked: Rank, candidates: Sequence[int]) -> list[tuple[str, str]]:
        """System turn and user turn about each candidate, in their order; two "" for one without a title."""
        if asked.history is None:
            behaviours = [] if asked.user_id is None else self._recent(asked.user_id)
        else:
            behaviours = [(b.item_id, b.rating) for b in asked.history if b.taken]
        items = [item for item, _ in behaviours]
        sample = {
            "user_id": asked.user_id,
            "history": items,
            "history_ratings": [rating for _, rating in behaviours],
        }
        titles, targets = self._tables.titles(items), self._tables.titles(list(candidates))
        profile, prompt, k = self._profile(asked), self._config.prompt, self._config.data.behaviours
        sets = [list(candidates)] if prompt.retrieved_for == "set" else [[item] for item in candidates]
        shown = [behaviours_shown(sample, titles, one, self._retriever, k, self._shown) for one in sets]
        if prompt.retrieved_for == "set":
            shown *= len(targets)
        return [
            rank_prompt(self._scenario, profile, target, prompt, self._count_tokens, **lists)
            for target, lists in zip(targets, shown, strict=True)
        ]

    def _profile(self, asked: Rank) -> dict[str, str]:
        row = self._tables.row("user", asked.user_id) if asked.user_id is not None else None
        known = {f: str(row[f]) for f in self._scenario.profile_fields if row and row.get(f) is not None}
        return known | {f: v for f, v in asked.profile.items() if f in self._scenario.profile_fields}
