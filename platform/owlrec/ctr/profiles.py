"""The profile of each user as codes, in mapped shards: what an artifact holds of users, as far as its model reads it.

One of 10^8 users then costs a binary search in one file, and replicas of one machine share the page cache.
"""

from functools import lru_cache

import numpy as np
import pyarrow as pa

from owlrec.ctr.export import read_vocabularies
from owlrec.ctr.features import value_codes
from owlrec.errors import WorkspaceError
from owlrec.ordered import rows_of
from owlrec.runner import Result, Stage, Work
from owlrec.schema import shard_of
from owlrec.workspace import Workspace, shard_file

FOLDER = "profiles"
_SHARDS_OPEN = 256  # each holds a file descriptor, of which a process often has no more than 1,024


class EncodeProfiles(Stage):
    """Encodes a shard of the users table by an artifact's vocabularies."""

    name = "export_ctr"

    def __init__(self, folder: str) -> None:
        """folder: of the artifact, with its vocabularies."""
        self.folder = folder

    def run(self, work: Work) -> Result:
        """Writes the shard's one file."""
        profile = read_vocabularies(work.workspace, self.folder).profile
        users = work.workspace.read_shard("users", work.shard.number, ["user_id", *profile]).sort_by("user_id")
        columns = {name: value_codes(users[name], values) for name, values in profile.items()}
        table = pa.table({"user_id": users["user_id"], **{f"profile/{name}": codes for name, codes in columns.items()}})
        path = work.shard.file(".arrow")
        work.check()
        file = work.workspace.write_arrow(work.artifact.path(path), table, table.schema)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))


class Profiles:
    """All users' profiles on disk."""

    def __init__(self, workspace: Workspace, folder: str) -> None:
        """folder: of the shards, as many as the users had when they were written.

        Raises WorkspaceError where shards are missing, or the first one is damaged.
        """
        self._workspace, self._folder = workspace, folder
        self._n_shards = len(workspace.names(folder))
        if self._n_shards == 0 or self._n_shards & (self._n_shards - 1):
            raise WorkspaceError(
                f"{workspace.path(folder)} holds {self._n_shards} shards of users, and not a power of two: some are "
                "missing. Run `export_ctr` again."
            )
        self._shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)
        self._shard(0)

    def find(self, user_id: int) -> np.ndarray | None:
        """A user's codes, int32 [fields]; None for a user who is not there."""
        ids, codes = self._shard(int(shard_of(np.array([user_id]), self._n_shards)[0]))
        row = int(rows_of(ids, np.array([user_id]))[0])
        return None if row < 0 else np.array([column[row] for column in codes], dtype=np.int32)

    def _open(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        table = self._workspace.map_arrow(f"{self._folder}/{shard_file(number, '.arrow')}")
        ids, *codes = (column.to_numpy() for column in table.columns)
        return ids, codes
