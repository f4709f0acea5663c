"""What the prepared tables know of users and items whom no refresh has met.

A state has its own shards, which stay as they are when `prepare` writes the tables into another number of parts; so
users are looked up here by id, in whichever part they stand.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.schema import shard_of
from owlrec.streaming.events import Events
from owlrec.workspace import Workspace


class PreparedTables:
    """Lookups in the tables of a workspace. Raises WorkspaceError, when made, where `prepare` has not run."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._parts = {name: workspace.table_parts(name) for name in ("users", "interactions", "histories")}
        self.n_shards = len(self._parts["users"])
        self._items: np.ndarray | None = None

    def known_users(self, ids: np.ndarray) -> np.ndarray:
        """Those of `ids` that the users table holds, ascending."""
        return np.unique(self._rows("users", ids, ["user_id"])["user_id"].to_numpy())

    def known_items(self) -> np.ndarray:
        """All ids of the items table, ascending."""
        if self._items is None:
            self._items = np.unique(self.workspace.read_table("items", ["item_id"])["item_id"].to_numpy())
        return self._items

    def interactions(self, ids: np.ndarray) -> Events:
        """All interactions of the users `ids`."""
        columns = ["user_id", "item_id", "rating", "timestamp"]
        return Events.from_table(self._rows("interactions", ids, columns))

    def histories(self, ids: np.ndarray) -> pa.Table:
        """What the LLM has read of the users `ids` (schema.HISTORIES), in any order."""
        return self._rows("histories", ids, ["user_id", "as_of", "items", "ratings"])

    def _rows(self, table: str, ids: np.ndarray, columns: list[str]) -> pa.Table:
        parts = self._parts[table]
        wanted = pa.array(ids, pa.int64())
        found = []
        for number in np.unique(shard_of(ids, len(parts))) if len(ids) else [0]:
            rows = self.workspace.read_parquet(f"tables/{table}/{parts[number]}", columns)
            found.append(rows.filter(pc.is_in(rows["user_id"], value_set=wanted)))
        return pa.concat_tables(found)
