"""What a scorer knows of each user before they ask, in mapped shards: their last behaviors and profile, encoded.

One of 10^8 users then costs a binary search in one file, and replicas of one machine share the page cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from owlrec.ctr.features import Histories, ItemFeatures, Vocabularies, encode_samples
from owlrec.errors import WorkspaceError
from owlrec.ordered import rows_of
from owlrec.schema import shard_of
from owlrec.sources.splits import last_behaviours
from owlrec.tombstones import read_tombstones
from owlrec.workspace import Workspace, shard_file

_SHARDS_OPEN = 256  # each holds a file descriptor, of which a process often has no more than 1,024
_PROFILE = "profile/"  # before the names of such columns


@dataclass(frozen=True)
class UserStates:
    """One row for each user; the arrays are those of `features.SampleFeatures`."""

    ids: np.ndarray  # int64 [n], ascending
    histories: Histories
    profile: np.ndarray  # int32 [n, n_profile]

    @classmethod
    def of_shard(
        cls, workspace: Workspace, number: int, items: ItemFeatures, vocabularies: Vocabularies, history_length: int
    ) -> "UserStates":
        """Of all users of one shard of the tables `users` and `interactions`."""
        users = workspace.read_shard("users", number, ["user_id", *vocabularies.profile])
        interactions = read_tombstones(workspace).without(workspace.read_shard("interactions", number))
        active = last_behaviours(interactions, history_length)
        silent = np.setdiff1d(users["user_id"].to_numpy(), active["user_id"].to_numpy())
        behaviors = pa.concat_tables([active, _without_behaviors(silent)]).sort_by("user_id")
        return cls.encode(behaviors, users, items, vocabularies, history_length)

    @classmethod
    def encode(
        cls, behaviors: pa.Table, users: pa.Table, items: ItemFeatures, vocabularies: Vocabularies, history_length: int
    ) -> "UserStates":
        """One for each row of `behaviors` (as `last_behaviours` gives them), in its order, by the encoding of training.

        users: the table with the profile fields of the vocabularies; a user whom it lacks has an unknown profile.
        """
        nothing = np.zeros(behaviors.num_rows)
        samples = behaviors.append_column("item_id", pa.array(nothing, pa.int64()))
        samples = samples.append_column("label", pa.array(nothing, pa.float32()))
        encoded = encode_samples(samples, users, items, vocabularies, history_length)
        return cls(encoded.user_ids, encoded.histories, encoded.profile)

    def table(self, profile: Sequence[str]) -> pa.Table:
        """As UserShards reads it. The states must be fresh from `encode`. profile: the names of its columns."""
        offsets = pa.array(np.r_[self.histories.starts, len(self.histories.items)].astype(np.int32))
        lists = [pa.ListArray.from_arrays(offsets, pa.array(a)) for a in (self.histories.items, self.histories.ratings)]
        columns = {"user_id": pa.array(self.ids), "history": lists[0], "ratings": lists[1]}
        return pa.table(columns | {f"{_PROFILE}{name}": self.profile[:, i] for i, name in enumerate(profile)})

    @classmethod
    def of_table(cls, table: pa.Table, width: int) -> "UserStates":
        """From what `table` gave, without copying. width: the history length that models read."""
        history, ratings = (table[name].combine_chunks() for name in ("history", "ratings"))
        offsets = history.offsets.to_numpy().astype(np.int64)
        histories = Histories(
            offsets[:-1], np.diff(offsets).astype(np.int32), history.values.to_numpy(), ratings.values.to_numpy(), width
        )
        profile = [table[name].to_numpy() for name in table.column_names if name.startswith(_PROFILE)]
        none = np.zeros((len(table), 0), dtype=np.int32)
        return cls(table["user_id"].to_numpy(), histories, np.stack(profile, axis=1) if profile else none)

    def take(self, rows: np.ndarray) -> "UserStates":
        """Some rows."""
        return UserStates(self.ids[rows], self.histories.take(rows), self.profile[rows])

    def __len__(self) -> int:
        return len(self.ids)


class UserShards:
    """All users' states on disk."""

    def __init__(self, workspace: Workspace, folder: str, width: int) -> None:
        """folder: of the shards, as many as the users had when they were written; width: see UserStates.of_table.

        Raises WorkspaceError where shards are missing, or the first one is damaged.
        """
        self._workspace, self._folder, self._width = workspace, folder, width
        self._n_shards = len(workspace.names(folder))
        if self._n_shards == 0 or self._n_shards & (self._n_shards - 1):
            raise WorkspaceError(
                f"{workspace.path(folder)} holds {self._n_shards} shards of users, and not a power of two: some are "
                "missing. Run `export_ctr` again."
            )
        self._shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)
        self._shard(0)

    def find(self, user_id: int) -> UserStates | None:
        """The one row of a user, None for a user who is not there."""
        shard = self._shard(int(shard_of(np.array([user_id]), self._n_shards)[0]))
        row = rows_of(shard.ids, np.array([user_id]))
        return None if row[0] < 0 else shard.take(row)

    def _open(self, number: int) -> UserStates:
        table = self._workspace.map_arrow(f"{self._folder}/{shard_file(number, '.arrow')}")
        return UserStates.of_table(table, self._width)


def _without_behaviors(ids: np.ndarray) -> pa.Table:
    empty: list[list[int]] = [[]] * len(ids)
    return pa.table(
        {
            "user_id": ids,
            "history": pa.array(empty, pa.list_(pa.int64())),
            "history_ratings": pa.array(empty, pa.list_(pa.float32())),
            "history_labels": pa.array(empty, pa.list_(pa.float32())),
        }
    )
