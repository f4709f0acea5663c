"""Titles by item id: an Arrow column behind a sorted id array.

10^7 titles take about 0.5 GB per process this way, and several times that in a Python dict.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.ordered import last_rows, rows_of
from owlrec.workspace import Workspace


class ItemCatalog:
    """Titles by item id."""

    def __init__(self, items: pa.Table) -> None:
        """items: a table with `item_id` and `title`, in any order; among several rows of an item, the last one wins."""
        ids = items["item_id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        order = order[last_rows(ids[order])]
        self._ids = ids[order]
        self._titles = items["title"].combine_chunks().take(pa.array(order))

    @classmethod
    def load(cls, workspace: Workspace, more: Sequence[pa.Table] = ()) -> "ItemCatalog":
        """Reads the workspace's items table, without titles other than text. more: rows that override it."""
        parts = []
        for number in workspace.table_shards("items"):
            table = workspace.read_shard("items", number, ["item_id", "title"])
            if table.schema.field("title").type != pa.string():
                table = table.set_column(1, "title", pa.nulls(table.num_rows, pa.string()))
            parts.append(table)
        return cls(pa.concat_tables([*parts, *more]))

    @property
    def ids(self) -> np.ndarray:
        """All ids: int64 [n], ascending."""
        return self._ids

    def titles(self, ids: np.ndarray) -> list[str]:
        """Title of each id, in order; "" for an unknown id, a null title or invalid text.

        ids: int64 [n].
        """
        rows = rows_of(self._ids, ids)
        column = self._titles.take(pa.array(rows, mask=rows < 0))
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:
            texts = [_text_or_none(value) for value in column]
        return [text or "" for text in texts]

    def draw(self, n: int, seed: int) -> list[int]:
        """At most `n` random items, always the same ones for a seed, in the order drawn."""
        chosen = np.random.default_rng(seed).permutation(len(self._ids))[:n]
        drawn: list[int] = self._ids[chosen].tolist()
        return drawn

    def find(self, words: str, limit: int) -> list[tuple[int, str]]:
        """Items whose title contains `words`, in any case: at most `limit` (id, title), by id."""
        rows = np.flatnonzero(pc.match_substring(self._titles, words, ignore_case=True).fill_null(False))[:limit]
        return list(zip(self._ids[rows].tolist(), self._titles.take(pa.array(rows)).to_pylist(), strict=True))


def _text_or_none(value: pa.Scalar) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None
