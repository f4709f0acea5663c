"""Knowledge vectors by id, memory-mapped: what the CTR models read while they train.

A folder holds ids.npy (int64, sorted) and vectors.npy (float16 [n, d]); a batch costs one binary search and one
gather, and workers of one machine share the page cache. An id without knowledge is normal (a new user): it yields
zeros and a mask, never an error.
"""

import dataclasses
import os
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.errors import SchemaError, WorkspaceError


@dataclasses.dataclass(frozen=True)
class KnowledgeTable:
    """Vectors of users or of items: `ids[i]` has `vectors[i]`, or `vectors[rows[i]]` where rows is given."""

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float16 [n, d]
    rows: np.ndarray | None = None  # int64 [n]: a permutation, so that a shuffled table copies no vector

    @classmethod
    def from_table(cls, table: pa.Table, kind: str) -> "KnowledgeTable":
        """The rows of `kind` in a vectors table (schema.vectors_schema).

        Raises SchemaError for a null, and for an id that occurs twice.
        """
        table = table.filter(pc.equal(table["kind"], kind)).sort_by("id")
        ids, column = table["id"], table["vector"]
        flat = pc.list_flatten(column)
        dim = column.type.list_size
        if ids.null_count or column.null_count or flat.null_count:
            raise SchemaError(
                f"vectors of kind '{kind}': a row has a null id, vector or component. Run `encode` again."
            )
        keys = ids.to_numpy()
        doubled = np.flatnonzero(keys[1:] == keys[:-1])
        if len(doubled):
            raise SchemaError(
                f"vectors of kind '{kind}': id {keys[doubled[0]]} occurs more than once ({len(doubled)} such rows). "
                f"Keep one vector an id, the newest."
            )
        return cls(keys.astype(np.int64), flat.to_numpy().astype(np.float16).reshape(len(keys), dim))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "KnowledgeTable":
        """The table that `save` wrote, its vectors memory-mapped. Raises WorkspaceError where it is missing or
        damaged.
        """
        path = Path(folder)
        try:
            ids = np.load(path / "ids.npy", allow_pickle=False)
            # numpy cannot map an array without elements
            vectors = np.load(path / "vectors.npy", mmap_mode="r" if len(ids) else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise WorkspaceError(f"{path} holds no readable knowledge vectors ({error}). Run `encode` again.") from None
        if vectors.ndim != 2 or len(vectors) != len(ids):
            raise WorkspaceError(
                f"{path}: {len(ids)} ids but vectors of shape {vectors.shape}; the two files are of different runs. "
                f"Delete the folder and run `encode` again."
            )
        return cls(ids, vectors)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ids.npy and vectors.npy to a local folder, each atomically, the ids last."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        vectors = self.vectors if self.rows is None else self.vectors[self.rows]
        for name, array in (("vectors.npy", vectors), ("ids.npy", self.ids)):
            temporary = path / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            with open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path / name)

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of `ids`, in their order.

        ids: int64 [b], any order, repeats allowed. Returns float32 [b, d], zeros where an id has none, and bool [b],
        True where it has one.
        """
        found = np.zeros((len(ids), self.dim), dtype=np.float32)
        if len(self.ids) == 0:
            return found, np.zeros(len(ids), dtype=bool)
        where = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        mask = self.ids[where] == ids
        rows = where if self.rows is None else self.rows[where]
        found[mask] = self.vectors[rows[mask]]
        return found, mask

    def shuffled(self, seed: int) -> "KnowledgeTable":
        """The control arm: the same ids and vectors, but no id keeps its own vector (for n > 1).

        The permutation is one random cycle through all rows, so it has no fixed point by construction.
        """
        order = np.random.default_rng(seed).permutation(len(self.ids))
        rows = np.empty(len(self.ids), dtype=np.int64)
        rows[order] = np.roll(order, -1)
        return dataclasses.replace(self, rows=rows if self.rows is None else self.rows[rows])
