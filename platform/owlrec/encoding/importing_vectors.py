"""Vectors that another encoder made, as NumPy arrays, into a vectors table.

The array stays on disk and is converted a slice at a time, so memory holds the float16 result and little else. Pickled
arrays are refused: reading one would run the code of whoever made the file.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from owlrec.errors import SourceError
from owlrec.generation.knowledge_files import lines, open_bytes
from owlrec.schema import Kind, stable_id, vectors_table
from owlrec.workspace import Workspace

_SLICE_VALUES = 1 << 22  # 32 MB as float64
_LARGEST = float(np.finfo(np.float16).max)


def imported_vectors(kind: str) -> str:
    """Where a workspace keeps imported vectors of a kind, relative to its root."""
    return f"vectors/imported/{kind}.parquet"


def take_imported(workspace: Workspace, kind: str, dimension: int) -> pa.Table | None:
    """The imported vectors of a kind, or None where there are none.

    Raises SourceError where they have another dimension than `dimension`, the encoder's: a release has one, and so have
    the arms of an experiment.
    """
    if not workspace.exists(imported_vectors(kind)):
        return None
    table = workspace.read_parquet(imported_vectors(kind))
    found = table.schema.field("vector").type.list_size
    if found != dimension:
        raise SourceError(
            f"{workspace.path(imported_vectors(kind))} has vectors of {found} components, but the recipe's encoder "
            f"gives {dimension}. Name an encoder of the same dimension, or remove the file."
        )
    return table


def read_vectors(npy_path: str | Path, ids_path: str | Path, kind: Kind) -> pa.Table:
    """The vectors table (schema.vectors_schema(dim)) of n vectors, all of one kind, without semantic ids.

    npy_path: float [n, dim]. ids_path: int64 [n] as .npy, taken as they are, or else a text file with one raw id a
    line (gzip or not), turned into ids by schema.stable_id; aligned with the vectors.
    Raises SourceError for a file that cannot be read, another shape or type, numbers of rows that differ, a component
    that is not finite or too large for float16 (naming the row, from 0), an empty or a doubled id.
    """
    vectors = _array(npy_path)
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or 0 in vectors.shape:
        raise SourceError(
            f"{npy_path}: the array is {vectors.dtype} {list(vectors.shape)}, but float [n, dim] is meant. Save it so."
        )
    ids = _npy_ids(ids_path) if str(ids_path).endswith(".npy") else _text_ids(ids_path)
    if len(ids) != (n := len(vectors)):
        raise SourceError(
            f"{npy_path} has {n} vectors, but {ids_path} has {len(ids)} ids. They must be aligned, row by row."
        )
    _refuse_doubled(ids, ids_path)
    return vectors_table(kind, ids, _halves(vectors, npy_path))


def _array(path: str | Path) -> np.ndarray:
    file = Path(path).expanduser()
    if not file.is_file():
        raise SourceError(f"{path}: there is no such file. Correct the path.")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise SourceError(
            f"{path}: no NumPy array without pickled objects ({error}). Write it with numpy.save."
        ) from None
    if not isinstance(array, np.ndarray):
        raise SourceError(f"{path}: an archive of arrays. Save the one array with numpy.save.")
    return array


def _npy_ids(path: str | Path) -> np.ndarray:
    ids = _array(path)
    if ids.ndim != 1 or not np.can_cast(ids.dtype, np.int64):
        raise SourceError(f"{path}: the array is {ids.dtype} {list(ids.shape)}, but int64 [n] is meant. Save it so.")
    return np.asarray(ids, dtype=np.int64)


def _text_ids(path: str | Path) -> np.ndarray:
    ids = []
    with open_bytes(Path(path).expanduser()) as stream:
        for number, line in enumerate(lines(stream), 1):
            try:
                raw = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path}, line {number}: no UTF-8 ({error.reason}). Save the file as UTF-8."
                ) from None
            if not raw:
                raise SourceError(f"{path}, line {number}: the id is empty. Give each vector an id, one a line.")
            ids.append(stable_id(raw))
    return np.array(ids, dtype=np.int64)


def _refuse_doubled(ids: np.ndarray, path: str | Path) -> None:
    order = np.argsort(ids, kind="stable")
    doubled = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(doubled):
        first, second = order[doubled[0]], order[doubled[0] + 1]
        raise SourceError(
            f"{path}, row {second}: id {ids[second]} stands in row {first} too ({len(doubled)} such rows). "
            "Keep one vector an id."
        )


def _halves(vectors: np.ndarray, path: str | Path) -> np.ndarray:
    """float16 [n, dim] of the vectors."""
    n, dim = vectors.shape
    halves = np.empty((n, dim), np.float16)
    step = max(1, _SLICE_VALUES // dim)
    for start in range(0, n, step):
        part = np.asarray(vectors[start : start + step])
        with np.errstate(over="ignore"):
            halves[start : start + step] = part
        bad = np.flatnonzero(~np.isfinite(halves[start : start + step]).all(axis=1))
        if len(bad):
            value = part[bad[0]][~np.isfinite(halves[start + bad[0]])][0]
            problem = f"too large for float16 (largest {_LARGEST:g})" if np.isfinite(value) else "not finite"
            raise SourceError(
                f"{path}, row {start + bad[0]}: a component is {value:g}, which is {problem}. "
                "Drop the row with its id, or scale the vectors."
            )
    return halves
