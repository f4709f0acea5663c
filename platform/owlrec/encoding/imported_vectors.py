"""Vectors that another encoder made, as NumPy arrays, into shards of the form that `encode` writes.

Two passes over the array, whatever its size: the first converts a slice at a time and sorts its rows into buckets of
shards on the local disk, the second reads one bucket at a time and writes its shards. Pickled arrays are refused:
reading one runs code that the file brings.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from owlrec.encoding.inputs import digests_of
from owlrec.encoding.vector_shards import VectorShard
from owlrec.errors import SourceError
from owlrec.generation.knowledge_files import lines, open_bytes
from owlrec.schema import Kind, shard_of, stable_id
from owlrec.storage import fingerprint
from owlrec.tombstones import read_tombstones
from owlrec.workspace import Workspace, shard_file

_SLICE_VALUES = 1 << 22  # 32 MB as float64
_BUCKET_BYTES = 1 << 28
_MOST_BUCKETS = 256  # files that are open at once
_LARGEST = float(np.finfo(np.float16).max)


class ImportedVectors(BaseModel, frozen=True):
    """What a workspace holds of a kind's imported vectors."""

    folder: str  # of their shards, relative to the workspace; named by a digest of the content
    rows: int
    dim: int


def imported_vectors(workspace: Workspace, kind: str) -> ImportedVectors | None:
    """The imported vectors of a kind, None where there are none."""
    if workspace.entry(_card(kind)) is None:
        return None
    return ImportedVectors.model_validate(workspace.read_json(_card(kind)))


def import_vectors(
    workspace: Workspace, kind: Kind, npy_path: str | Path, ids_path: str | Path, as_of_ms: int | None = None
) -> ImportedVectors:
    """Shards n vectors of one kind into the workspace; those imported before go.

    npy_path: float [n, dim]. ids_path: int64 [n] as .npy, taken as they are, or else a text file with one raw id per
    line (gzip or not), turned into ids by schema.stable_id; aligned with the vectors. as_of_ms: the last moment that
    the vectors know of their ids; only later samples read them. Items, which depend on nobody's behavior, are 0 then.
    Raises SourceError for vectors of users without as_of_ms, for a file that cannot be read, another shape or type,
    numbers of rows that differ, a component that is not finite or too large for float16 (naming the row, from 0), an
    empty or a duplicate id; nothing is written then. Raises WorkspaceError where the workspace was never prepared.
    """
    if kind == "user" and as_of_ms is None:
        raise SourceError(
            f"{npy_path}: nothing says up to which moment these vectors know their users. Set as_of_ms (--as-of-ms) to "
            "the time of the last behavior that shaped them, ms since 1970, UTC: only later samples will read them."
        )
    vectors = _array(npy_path)
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or 0 in vectors.shape:
        raise SourceError(
            f"{npy_path}: the array is {vectors.dtype} {list(vectors.shape)}, but float [n, dim] is meant. Save it so."
        )
    n_shards, before = workspace.n_shards(kind), imported_vectors(workspace, kind)
    scratch = workspace.scratch()
    try:
        buckets, digest = _spill(vectors, npy_path, ids_path, n_shards, scratch)
        for bucket in buckets:
            _refuse_duplicates(bucket, ids_path)
        named = fingerprint(digest, as_of_ms or 0)
        imported = ImportedVectors(
            folder=f"vectors/imported/{named[:16]}-{kind}", rows=len(vectors), dim=vectors.shape[1]
        )
        for bucket in buckets:
            _write_shards(workspace, imported.folder, kind, n_shards, bucket, as_of_ms or 0)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    workspace.write_json(_card(kind), imported.model_dump(mode="json"))
    if before is not None and before.folder != imported.folder:
        workspace.delete_dir(before.folder)
    return imported


def _card(kind: str) -> str:
    return f"vectors/imported/{kind}.json"


def _spill(
    vectors: np.ndarray, npy_path: str | Path, ids_path: str | Path, n_shards: int, scratch: Path
) -> tuple[list[np.ndarray], str]:
    """The rows in buckets of neighboring shards, each a mapped array of records on disk, and a digest of them all."""
    n, dim = vectors.shape
    record = np.dtype([("id", "<i8"), ("row", "<i8"), ("vector", "<f2", (dim,))])
    wanted = -(-n * record.itemsize // _BUCKET_BYTES)
    n_buckets = min(n_shards, _MOST_BUCKETS, 1 << (wanted - 1).bit_length())
    step = max(1, _SLICE_VALUES // dim)
    paths, total, start = [scratch / f"{number:03d}" for number in range(n_buckets)], hashlib.sha256(), 0
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for ids in _id_slices(ids_path, step):
            if start + len(ids) > n:
                start += len(ids)
                continue
            rows = np.empty(len(ids), record)
            rows["id"], rows["row"] = ids, np.arange(start, start + len(ids))
            rows["vector"] = _halves(vectors[start : start + len(ids)], npy_path, start)
            total.update(rows.data)
            bucket = shard_of(ids, n_shards) * n_buckets // n_shards
            for number in np.unique(bucket).tolist():
                files[number].write(rows[bucket == number].data)
            start += len(ids)
    if start != n:
        raise SourceError(
            f"{npy_path} has {n} vectors, but {ids_path} has {start} ids. They must be aligned, row by row."
        )
    return [np.memmap(path, record, "r") for path in paths if path.stat().st_size], total.hexdigest()


def _refuse_duplicates(bucket: np.ndarray, path: str | Path) -> None:
    ids, rows = np.array(bucket["id"]), np.array(bucket["row"])
    order = np.lexsort((rows, ids))
    doubled = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(doubled):
        first, second = order[doubled[0]], order[doubled[0] + 1]
        raise SourceError(
            f"{path}, row {rows[second]}: id {ids[second]} occurs in row {rows[first]} too. Keep one vector per id."
        )


def _write_shards(workspace: Workspace, folder: str, kind: str, n_shards: int, bucket: np.ndarray, as_of: int) -> None:
    rows = np.array(bucket)
    if kind == "user":
        rows = rows[~read_tombstones(workspace).among(rows["id"])]
    numbers = shard_of(rows["id"], n_shards)
    order = np.lexsort((rows["id"], numbers))
    for at in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        vectors = rows["vector"][at]
        digests = digests_of([vector.tobytes() for vector in vectors])
        moments, no_codes = np.full(len(at), as_of, dtype=np.int64), np.zeros((len(at), 0), np.uint16)
        table = VectorShard(kind, rows["id"][at], moments, vectors, digests, no_codes).table()
        workspace.write_arrow(f"{folder}/{shard_file(int(numbers[at[0]]), '.arrow')}", table, table.schema)


def _array(path: str | Path) -> np.ndarray:
    file = Path(path).expanduser()
    if not file.is_file():
        raise SourceError(f"{path}: there is no such file. Correct the path.")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise SourceError(
            f"{path}: not a NumPy array without pickled objects ({error}). Write it with numpy.save."
        ) from None
    if not isinstance(array, np.ndarray):
        raise SourceError(f"{path}: an archive of arrays. Save the one array with numpy.save.")
    return array


def _id_slices(path: str | Path, step: int) -> Iterator[np.ndarray]:
    """int64 ids, `step` at a time."""
    if str(path).endswith(".npy"):
        ids = _array(path)
        if ids.ndim != 1 or not np.can_cast(ids.dtype, np.int64):
            raise SourceError(
                f"{path}: the array is {ids.dtype} {list(ids.shape)}, but int64 [n] is meant. Save it so."
            )
        yield from (np.asarray(ids[start : start + step], dtype=np.int64) for start in range(0, len(ids), step))
        return
    parsed = _text_ids(path)
    while block := list(islice(parsed, step)):
        yield np.array(block, dtype=np.int64)


def _text_ids(path: str | Path) -> Iterator[int]:
    with open_bytes(Path(path).expanduser()) as stream:
        for number, line in enumerate(lines(stream), 1):
            try:
                raw = line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}). Save the file as UTF-8."
                ) from None
            if not raw:
                raise SourceError(f"{path}, line {number}: the id is empty. Give each vector an id, one per line.")
            yield stable_id(raw)


def _halves(vectors: np.ndarray, path: str | Path, start: int) -> np.ndarray:
    """float16 of a slice that begins at row `start`."""
    with np.errstate(over="ignore"):
        halves = np.asarray(vectors).astype(np.float16)
    bad = np.flatnonzero(~np.isfinite(halves).all(axis=1))
    if len(bad):
        value = vectors[bad[0]][~np.isfinite(halves[bad[0]])][0]
        problem = f"too large for float16 (largest {_LARGEST:g})" if np.isfinite(value) else "not finite"
        raise SourceError(
            f"{path}, row {start + bad[0]}: a component is {value:g}, which is {problem}. "
            "Drop the row with its id, or scale the vectors."
        )
    return halves
