"""Knowledge vectors and semantic ids by id, memory-mapped: what the CTR models read while they train.

A folder holds ids.npy (int64, sorted), vectors.npy (float16 [n, d]) and, where vectors were coded, codes.npy (uint16
[n, levels]) with code_sizes.npy; a batch costs one binary search and one gather, and workers of one machine share the
page cache. An id without knowledge is normal (a new user): it yields zeros and a mask, never an error.
"""

import dataclasses
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.coded_vectors import codes_of
from owlrec.encoding.projection import Projection
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.ordered import rows_of

_ROWS_AT_ONCE = 1 << 15


@dataclasses.dataclass(frozen=True)
class KnowledgeTable:
    """Vectors of users or of items: `ids[i]` has `vectors[i]`, or `vectors[rows[i]]` where rows is given.

    Semantic ids likewise, where the vectors were coded.
    """

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float16 [n, d]
    rows: np.ndarray | None = None  # int64 [n]: a permutation, so that a shuffled table copies no vector
    codes: np.ndarray | None = None  # uint16 [n, levels]; the duplicate digit, which says nothing of an id, is left out
    code_sizes: tuple[int, ...] = ()  # how many codes each level has

    @classmethod
    def from_table(cls, table: pa.Table, kind: str, code_sizes: Sequence[int] = ()) -> "KnowledgeTable":
        """The rows of `kind` in a vectors table (schema.vectors_schema).

        code_sizes: how many codes each level of its quantiser has; without them semantic ids are left out.
        Raises SchemaError for a null, for an id that occurs twice, and for a row without codes where there should be.
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
        vectors = flat.to_numpy().astype(np.float16).reshape(len(keys), dim)
        if not code_sizes:
            return cls(keys.astype(np.int64), vectors)
        codes, coded = codes_of(table)
        if not coded.all() or codes.shape[1] != len(code_sizes) + 1:
            raise SchemaError(
                f"vectors of kind '{kind}': {len(coded) - coded.sum()} rows have no codes, the others "
                f"{codes.shape[1]}; {len(code_sizes)} and a duplicate digit are meant. Run `encode` again."
            )
        return cls(keys.astype(np.int64), vectors, codes=codes[:, :-1], code_sizes=tuple(code_sizes))

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
            codes: np.ndarray | None = None
            sizes: tuple[int, ...] = ()
            if (path / "codes.npy").exists():
                codes = np.load(path / "codes.npy", mmap_mode="r" if len(ids) else None, allow_pickle=False)
                sizes = tuple(np.load(path / "code_sizes.npy", allow_pickle=False).tolist())
        except (OSError, ValueError, EOFError) as error:
            raise WorkspaceError(f"{path} holds no readable knowledge vectors ({error}). Run `encode` again.") from None
        if codes is not None and codes.shape != (len(ids), len(sizes)):
            raise WorkspaceError(
                f"{path}: {len(ids)} ids and {len(sizes)} levels, but codes of shape {codes.shape}; the files are of "
                f"different runs. Delete the folder and run `encode` again."
            )
        if vectors.ndim != 2 or len(vectors) != len(ids):
            raise WorkspaceError(
                f"{path}: {len(ids)} ids but vectors of shape {vectors.shape}; the two files are of different runs. "
                f"Delete the folder and run `encode` again."
            )
        return cls(ids, vectors, codes=codes, code_sizes=sizes)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the arrays to a local folder, each atomically, the ids last."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        arrays = {"vectors": self.vectors if self.rows is None else self.vectors[self.rows]}
        if self.codes is not None:
            arrays["code_sizes"] = np.array(self.code_sizes, dtype=np.int64)
            arrays["codes"] = self.codes if self.rows is None else self.codes[self.rows]
        for name, array in [(f"{name}.npy", array) for name, array in {**arrays, "ids": self.ids}.items()]:
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

    def gather_codes(self, ids: np.ndarray) -> np.ndarray:
        """The semantic ids of `ids`, in their order: int64 [b, levels], each code plus one, zeros where an id has none.

        Raises SchemaError where the table has no codes.
        """
        if self.codes is None:
            raise SchemaError("these vectors have no semantic ids. Set encoder.semantic_ids, and run `encode` again.")
        found = np.zeros((len(ids), len(self.code_sizes)), dtype=np.int64)
        rows, mask = self._find(ids)
        found[mask] = self.codes[rows].astype(np.int64) + 1
        return found

    def gather(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of `ids`, in their order.

        ids: int64 [b], any order, repeats allowed. Returns [b, d] as the table holds them, zeros where an id has none,
        and bool [b], True where it has one.
        """
        found = np.zeros((len(ids), self.dim), dtype=self.vectors.dtype)
        rows, mask = self._find(ids)
        found[mask] = self.vectors[rows]
        return found, mask

    def projected(self, projection: Projection) -> "KnowledgeTable":
        """The same ids and codes with vectors of a projection's components. Raises SchemaError for a vector that is not
        finite.
        """
        vectors = np.empty((len(self.vectors), len(projection.directions)), dtype=np.float16)
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            block = np.asarray(self.vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
            refuse_non_finite(block, self.ids[start : start + _ROWS_AT_ONCE])
            vectors[start : start + len(block)] = projection.apply(block)
        return dataclasses.replace(self, vectors=vectors)

    def _find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of vectors and codes of the ids that have one, and which these are."""
        rows = rows_of(self.ids, ids)
        mask = rows >= 0
        return rows[mask] if self.rows is None else self.rows[rows[mask]], mask

    def shuffled(self, seed: int) -> "KnowledgeTable":
        """The control arm: the same ids, vectors and codes, but no id keeps its own (for n > 1).

        The permutation is one random cycle through all rows, so it has no fixed point by construction.
        """
        order = np.random.default_rng(seed).permutation(len(self.ids))
        rows = np.empty(len(self.ids), dtype=np.int64)
        rows[order] = np.roll(order, -1)
        return dataclasses.replace(self, rows=rows if self.rows is None else self.rows[rows])


def refuse_two_sizes(tables: Mapping[str, KnowledgeTable]) -> None:
    """Raises SchemaError where vectors differ in their number of components. tables: by what a message calls them."""
    (first, table), *others = tables.items()
    for name, other in others:
        if other.dim != table.dim:
            raise SchemaError(
                f"{first} have {table.dim} components but {name} have {other.dim}; the adaptor's shared experts read "
                f"both. Encode both with one encoder."
            )


def refuse_non_finite(vectors: np.ndarray, ids: np.ndarray) -> None:
    """Raises SchemaError, naming an id, where a vector has a component that is no finite number.

    vectors: float [n, ...]; ids: int64 [n].
    """
    finite = np.isfinite(vectors.sum(axis=tuple(range(1, vectors.ndim))))
    if not finite.all():
        raise SchemaError(
            f"the knowledge vector of id {ids[np.argmin(finite)]} has a component that is no finite number. Encode it "
            "again, or leave the id out: a missing vector is no error."
        )
