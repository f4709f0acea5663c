"""What is remembered of all users, in shards by the hash of their id, so that a refresh rewrites only what it touches.

A state is a manifest that names one Parquet file a shard. A shard without news keeps its file from an earlier state;
the manifest also says of each shard whether anybody in it waits for a call, or when the next one will, so that the
others need not be opened. A user whom no event has reached stands in no file.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from owlrec.streaming.events import REFUSED, Events
from owlrec.streaming.partitions import Behaviour, UserState
from owlrec.workspace import Workspace

MANIFEST = "state.json"
STATE = pa.schema(
    [
        ("user_id", pa.int64()),
        ("text_as_of", pa.int64()),
        ("n_partitions", pa.int32()),
        ("held", pa.int32()),
        ("times", pa.list_(pa.int64())),  # of the short term, as are items and ratings
        ("items", pa.list_(pa.int64())),
        ("ratings", pa.list_(pa.float32())),
        ("seen_times", pa.list_(pa.int64())),
        ("seen_items", pa.list_(pa.int64())),
        ("interest", pa.list_(pa.float32())),
        ("weight", pa.float32()),
    ]
)
_KEYS = ["user_id", "times", "items", "seen_times", "seen_items"]


class StateShard(BaseModel):
    """One file of a state."""

    file: str  # relative to the workspace
    users: int
    encoder: str  # whose vectors the interests were summed from
    waiting: int = 0  # users whose short term is to be frozen, but for whom the budget had no call
    due_at: int | None = None  # ms: when the next user's short term will be old enough


class State(BaseModel):
    """A state's manifest."""

    n_shards: int
    shards: dict[int, StateShard] = {}
    refused: str | None = None  # the file of the refused events that may yet be taken in (events.REFUSED)
    log: dict[str, int] = {}  # rows of each of the log's files when it was read

    def due_shards(self, clock: int) -> set[int]:
        """The shards in which somebody waits, or has an old enough short term by `clock` (ms)."""
        return {
            number
            for number, shard in self.shards.items()
            if shard.waiting or (shard.due_at is not None and shard.due_at <= clock)
        }


def read_users(workspace: Workspace, state: State, shard: int, encoder: str) -> list[UserState]:
    """The users of a shard, ascending; none where it has no file.

    encoder: what vectors come from now. Interests of another encoder's are left out: they cannot be compared.
    """
    found = state.shards.get(shard)
    if found is None:
        return []
    table = workspace.read_parquet(found.file)
    return from_table(table, interests=found.encoder == encoder)


def read_keys(workspace: Workspace, state: State, shard: int) -> tuple[np.ndarray, Events]:
    """The ids of a shard's users, ascending, and the keys of all behaviours that they still know."""
    found = state.shards.get(shard)
    if found is None:
        return np.zeros(0, dtype=np.int64), Events.join([])
    table = workspace.read_parquet(found.file, _KEYS)
    users = table["user_id"].to_numpy()
    parts = []
    for times, items in (("times", "items"), ("seen_times", "seen_items")):
        time, lengths = _flat(table, times)
        item, _ = _flat(table, items)
        parts.append(Events(np.repeat(users, lengths), item, np.full(len(item), np.nan, np.float32), time))
    return users, Events.join(parts)


def read_refused(workspace: Workspace, state: State) -> pa.Table:
    """The events that the refresh before refused (events.REFUSED)."""
    return workspace.read_parquet(state.refused) if state.refused else REFUSED.empty_table()


def to_table(users: Sequence[UserState]) -> pa.Table:
    """A table of STATE, in the order of `users`."""
    columns = [
        [u.user_id for u in users],
        [u.text_as_of for u in users],
        [u.n_partitions for u in users],
        [u.held for u in users],
        [[b.time for b in u.short] for u in users],
        [[b.item for b in u.short] for u in users],
        [[b.rating for b in u.short] for u in users],
        [[time for time, _ in u.seen] for u in users],
        [[item for _, item in u.seen] for u in users],
        [u.interest for u in users],
        [u.weight for u in users],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, STATE, strict=True)], schema=STATE)


def from_table(table: pa.Table, *, interests: bool = True) -> list[UserState]:
    """The users of a table of STATE; without `interests`, nothing is known of what they liked."""
    values, lengths = _flat(table, "interest")
    bounds = np.r_[0, np.cumsum(lengths)]
    users = []
    for row, fields in enumerate(table.drop_columns(["interest"]).to_pylist()):
        interest = values[bounds[row] : bounds[row + 1]] if interests else values[:0]
        users.append(
            UserState(
                user_id=fields["user_id"],
                text_as_of=fields["text_as_of"],
                n_partitions=fields["n_partitions"],
                held=fields["held"],
                short=tuple(map(Behaviour, fields["times"], fields["items"], fields["ratings"])),
                seen=tuple(zip(fields["seen_times"], fields["seen_items"], strict=True)),
                interest=interest,
                weight=fields["weight"] if interests else 0.0,
            )
        )
    return users


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column's values, one list after another, and the lists' lengths."""
    lists = table[column].combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy(zero_copy_only=False)
