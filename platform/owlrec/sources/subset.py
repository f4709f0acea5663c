"""A smaller copy of a data set that behaves like the whole: users drawn by hash, then the items that they touched.

Drawing users by the hash of their id needs no random state: the same recipe gives the same users on any machine, and a
larger `max_users` gives a superset of them.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.schema import shard_of
from owlrec.sources.raw import RawTables

# A modulus this large keeps the hash whole, so that the order does not follow the shards, which are its low bits.
_ORDER = 1 << 62


def keep_subset(raw: RawTables, *, max_users: int | None, max_items: int | None) -> RawTables:
    """`raw` with the `max_users` users of the smallest hash, and of their items the `max_items` most frequent.

    Interactions with other users or items go, then users and items without interactions. With neither limit, `raw` as
    it is. Ties between equally frequent items fall to the smaller item_id.
    """
    if max_users is None and max_items is None:
        return raw
    interactions = raw.interactions
    if max_users is not None:
        ids = raw.users["user_id"].to_numpy()
        kept = ids[np.lexsort((ids, shard_of(ids, _ORDER)))[:max_users]]
        interactions = _rows_in(interactions, "user_id", kept)
    if max_items is not None:
        ids, frequency = np.unique(interactions["item_id"].to_numpy(), return_counts=True)
        interactions = _rows_in(interactions, "item_id", ids[np.lexsort((ids, -frequency))[:max_items]])
    return replace(
        raw,
        users=_rows_in(raw.users, "user_id", interactions["user_id"].unique().to_numpy()),
        items=_rows_in(raw.items, "item_id", interactions["item_id"].unique().to_numpy()),
        interactions=interactions,
    )


def _rows_in(table: pa.Table, column: str, values: np.ndarray) -> pa.Table:
    return table.filter(pc.is_in(table[column], value_set=pa.array(values)))
