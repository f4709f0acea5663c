"""What a scorer knows of every user before they ask: their last behaviours and profile, encoded and memory-mapped.

A user of 10^8 then costs a binary search and a row of a file, and replicas of one machine share the page cache.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from owlrec.ctr.features import ItemFeatures, Vocabularies, encode_samples
from owlrec.errors import WorkspaceError
from owlrec.sources.splits import last_behaviours
from owlrec.workspace import Workspace

_ARRAYS = ("history", "ratings", "profile", "ids")


@dataclass(frozen=True)
class UserStates:
    """One row a user; the arrays are those of `features.SampleFeatures`."""

    ids: np.ndarray  # int64 [n], ascending
    history: np.ndarray  # int32 [n, L]
    ratings: np.ndarray  # int32 [n, L]
    profile: np.ndarray  # int32 [n, n_profile]

    @classmethod
    def build(
        cls, workspace: Workspace, items: ItemFeatures, vocabularies: Vocabularies, history_length: int
    ) -> "UserStates":
        """Of all users of the tables `users` and `interactions`, a shard at a time: a user's rows stand in one."""
        users, parts = workspace.read_table("users"), []
        for part in workspace.table_parts("interactions"):
            found = last_behaviours(workspace.read_parquet(f"tables/interactions/{part}"), history_length)
            if found.num_rows:
                parts.append(cls.encode(found, users, items, vocabularies, history_length))
        told = np.concatenate([part.ids for part in parts]) if parts else np.zeros(0, np.int64)
        silent = np.setdiff1d(users["user_id"].to_numpy(), told)
        parts.append(cls.encode(_without_behaviours(silent), users, items, vocabularies, history_length))
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        order = np.argsort(arrays["ids"], kind="stable")
        return cls(**{name: array[order] for name, array in arrays.items()})

    @classmethod
    def encode(
        cls,
        behaviours: pa.Table,
        users: pa.Table,
        items: ItemFeatures,
        vocabularies: Vocabularies,
        history_length: int,
    ) -> "UserStates":
        """A row of `behaviours` (as `last_behaviours` gives them) each, in its order, by the encoding of training.

        users: the table with the profile fields of the vocabularies; a user whom it lacks has an unknown profile.
        """
        nothing = np.zeros(behaviours.num_rows)
        samples = behaviours.append_column("item_id", pa.array(nothing, pa.int64()))
        samples = samples.append_column("label", pa.array(nothing, pa.float32()))
        encoded = encode_samples(samples, users, items, vocabularies, history_length)
        return cls(encoded.user_ids, encoded.history, encoded.ratings, encoded.profile)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "UserStates":
        """What `save` wrote, memory-mapped. Raises WorkspaceError where it is missing or damaged."""
        try:
            return cls(**{name: _mapped(Path(folder) / f"{name}.npy") for name in _ARRAYS})
        except (OSError, ValueError, EOFError) as error:
            raise WorkspaceError(f"{folder} holds no readable users ({error}). Run `export_ctr` again.") from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes an .npy file an array to a local folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(Path(folder) / f"{name}.npy", getattr(self, name), allow_pickle=False)

    def find(self, user_id: int) -> "UserStates | None":
        """The one row of a user, None for a user who is not there."""
        where = int(np.searchsorted(self.ids, user_id))
        if where == len(self.ids) or self.ids[where] != user_id:
            return None
        return UserStates(**{name: getattr(self, name)[where : where + 1] for name in _ARRAYS})

    def __len__(self) -> int:
        return len(self.ids)


def _mapped(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    # numpy cannot map an array without elements
    array: np.ndarray = np.load(path, mmap_mode=None if 0 in shape else "r", allow_pickle=False)
    return array


def _without_behaviours(ids: np.ndarray) -> pa.Table:
    empty: list[list[int]] = [[]] * len(ids)
    return pa.table(
        {
            "user_id": ids,
            "history": pa.array(empty, pa.list_(pa.int64())),
            "history_ratings": pa.array(empty, pa.list_(pa.float32())),
        }
    )
