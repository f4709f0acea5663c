"""The LLM's prompts about a request's candidates: the user's most relevant behaviors (SUBR, ReLLa), in the
wording that the ranker was tuned on. Retrieved for the set, they are the same in each prompt, so the engine reads them
once.

For a user known by id, prompts quote the behaviors in the current release, truncated like the samples. A
history in the request replaces them and is not stored.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from owlrec.errors import OwlRecError
from owlrec.ids import shard_of
from owlrec.prompting.frameworks import rank_prompt
from owlrec.ranking.behavior_retrieval import BehaviorRetriever
from owlrec.ranking.samples import RankingConfig, Shown, behaviors_shown
from owlrec.scenario import Scenario
from owlrec.serving.schemas import Rank
from owlrec.serving.served import ServedReleases
from owlrec.sources.outcomes import taken
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace, read_tombstones

# --------------------------------------------------------------------------------------------------------------- tables
# The tables of a prepared workspace, one row at a time: profiles, behaviors, items.
#
# Rows are found by their id's shard, so a page of the explorer reads a file or two for any number of
# users. Only titles are held completely, for the search.


_SHARDS_HELD = 64


class WorkspaceTables:
    """Read access to users, items and histories; missing tables have no rows."""

    def __init__(self, workspace: Workspace) -> None:
        """workspace: prepared or not."""
        self._workspace = workspace
        self._shard = lru_cache(maxsize=_SHARDS_HELD)(workspace.read_shard)
        self._catalog: ItemCatalog | None = None

    def row(self, kind: str, id_: int) -> dict[str, Any] | None:
        """A user's or an item's columns; None if there is no such row, or the user is forgotten."""
        return self._find(f"{kind}s", f"{kind}_id", id_)

    def behaviors(self, user: int) -> list[tuple[int, float | None]]:
        """Behaviors in the prompt of a user's text: (item, rating), oldest first."""
        row = self._find("histories", "user_id", user)
        items = (row or {}).get("items") or []
        ratings = (row or {}).get("ratings") or [None] * len(items)
        return list(zip(items, ratings, strict=True))

    def history(self, user: int) -> list[tuple[int, str, float | None]]:
        """The same for display: (item, its title, rating), latest first."""
        behaviors = self.behaviors(user)
        titles = self.titles([item for item, _ in behaviors])
        return [(item, title, rating) for (item, rating), title in zip(behaviors, titles, strict=True)][::-1]

    def titles(self, items: list[int]) -> list[str]:
        """Title of each item, "" if it has none."""
        catalog = self._titles()
        return catalog.titles(np.array(items, dtype=np.int64)) if catalog and items else [""] * len(items)

    def find_items(self, words: str, limit: int) -> list[tuple[int, str]]:
        """Items whose title contains `words`, in any case: (id, title), by id."""
        catalog = self._titles()
        return catalog.find(words, limit) if catalog else []

    def draw_candidates(self, user: int, n: int) -> list[int]:
        """At most `n` random catalog items without behaviors of the user; always the same ones."""
        catalog, seen = self._titles(), {item for item, _ in self.behaviors(user)}
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
        if key == "user_id" and id_ in read_tombstones(self._workspace):  # cached shards may be older
            return None
        try:
            shards = self._workspace.table_shards(table)
            rows = self._shard(table, int(shard_of(np.array([id_]), len(shards))[0]))
        except OwlRecError:  # not prepared
            return None
        at = int(np.searchsorted(ids := rows[key].to_numpy(), id_, side="right")) - 1  # the newest history
        return None if at < 0 or ids[at] != id_ else dict(rows.slice(at, 1).to_pylist()[0])


# ------------------------------------------------------------------------------------------------------------ questions


Recent = Callable[[int], list[tuple[int, float | None]]]  # user -> (item, rating) of taken items, oldest first


def recent_of(served: ServedReleases) -> Recent:
    """Items that a user took among the latest behaviors in the current release; raises Problem (503) without one."""

    def recent(user: int) -> list[tuple[int, float | None]]:
        with served.lease() as release:
            (recorded,) = release.store.behaviors([user])
        if recorded is None:
            return []
        rows = recorded[taken(recorded["rating"], recorded["label"])]
        pairs = zip(rows["item"].tolist(), rows["rating"].tolist(), strict=True)
        return [(item, None if math.isnan(rating) else rating) for item, rating in pairs]

    return recent


class QuestionWriter:
    """Writes prompts for `ranking.scorer.LlmScorer`."""

    def __init__(
        self,
        tables: WorkspaceTables,
        retriever: BehaviorRetriever,
        scenario: Scenario,
        config: RankingConfig,
        recent: Recent,
        count_tokens: Callable[[str], int],
    ) -> None:
        """config: from the ranker's tuning; uses the last of its prompt types."""
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
            behaviors = [] if asked.user_id is None else self._recent(asked.user_id)
        else:
            behaviors = [(b.item_id, b.rating) for b in asked.history if b.taken]
        items = [item for item, _ in behaviors]
        sample = {
            "user_id": asked.user_id,
            "history": items,
            "history_ratings": [rating for _, rating in behaviors],
        }
        titles, targets = self._tables.titles(items), self._tables.titles(list(candidates))
        profile, prompt, k = self._profile(asked), self._config.prompt, self._config.data.behaviors
        sets = [list(candidates)] if prompt.retrieved_for == "set" else [[item] for item in candidates]
        shown = [behaviors_shown(sample, titles, one, self._retriever, k, self._shown) for one in sets]
        if prompt.retrieved_for == "set":
            shown *= len(targets)
        return [
            rank_prompt(self._scenario, profile, target, prompt, self._count_tokens, **lists)
            for target, lists in zip(targets, shown, strict=True)
        ]

    def _profile(self, asked: Rank) -> dict[str, str]:
        row = self._tables.row("user", asked.user_id) if asked.user_id is not None else None
        known = {f: str(row[f]) for f in self._scenario.profile_fields if row and row.get(f) is not None}
        given = {f: v for f, v in asked.profile.items() if f in self._scenario.profile_fields}
        return known | {f: ", ".join(v) if isinstance(v, list) else str(v) for f, v in given.items()}
