"""The last behaviors of users with new events, as the next release keeps them: scores follow what users did, whether or
not their texts are renewed.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from owlrec.refresh.partitions import UserState
from owlrec.releases.release import Release
from owlrec.schema import BEHAVIOR, BEHAVIORS


def renewed_behaviors(users: Sequence[UserState], parent: Release) -> pa.Table:
    """The rows of these users (schema.BEHAVIORS): what the parent release holds of them and their unread behaviors,
    each once, by time and item, as many as the release keeps. Empty where it keeps none.

    The parent's row of a behavior stays: it knows the label.
    """
    length = parent.manifest.history_length
    if not length or not users:
        return BEHAVIORS.empty_table()
    earlier = parent.store.behaviors([user.user_id for user in users])
    rows = [_last(user, before, length) for user, before in zip(users, earlier, strict=True)]
    columns = [pa.array([user.user_id for user in users], pa.int64())]
    for field, name in zip(list(BEHAVIORS)[1:], BEHAVIOR.names or (), strict=True):
        values = [row[name] for row in rows]
        lists = [pa.array(v, field.type.value_type, from_pandas=name == "rating") for v in values]
        offsets = pa.array(np.r_[0, np.cumsum([len(v) for v in values])].astype(np.int32))
        columns.append(pa.ListArray.from_arrays(offsets, pa.concat_arrays(lists)))
    return pa.table(columns, schema=BEHAVIORS)


def _last(user: UserState, before: np.ndarray | None, length: int) -> np.ndarray:
    known = np.zeros(0, dtype=BEHAVIOR) if before is None else before
    new = np.zeros(len(user.short), dtype=BEHAVIOR)
    for name in ("time", "item", "rating"):
        new[name] = np.array([getattr(b, name) for b in user.short], dtype=BEHAVIOR[name])  # None becomes NaN
    new["label"] = 1  # events that were passed over are not read
    both = np.concatenate([known, new])
    kept = both[np.unique(both[["time", "item"]], return_index=True)[1]]  # the first of each, by time and item
    return kept[-length:]
