"""The tables of a prepared workspace, one row at a time: who a user is, what they did, what an item is.

Rows are found by the shard that their id's hash names, so that one page of the explorer reads a file or two however
many users there are. Titles alone are held whole, for the search.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from owlrec.errors import OwlRecError
from owlrec.schema import shard_of
from owlrec.sources.catalog import ItemCatalog
from owlrec.tombstones import read_tombstones
from owlrec.workspace import Workspace

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
