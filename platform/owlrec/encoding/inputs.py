"""Inputs of vectors: the rows of one shard, for each source of `encode`.

* knowledge: the LLM's texts. KAR encodes a user's history together with the answer. We encode the answer alone: an
encoder reads a few hundred tokens, and a preceding history would push the end of the answer, often its conclusion, out
of the window. The CTR model reads the history as ids anyway.
* metadata: the control, with the prompts' content but without an LLM: if it helps as much as knowledge, the LLM added
nothing.
* collective: the vector of a member's cohort; for users, by likes, with `disliked` as another source.

Imported vectors replace an id's own.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from owlrec.cohorts.clustering import unit
from owlrec.cohorts.cohort_model import memberships
from owlrec.encoding.vectors import (
    DIGEST_BYTES,
    Encoder,
    EncoderConfig,
    HashingEncoder,
    VectorShard,
    VectorShards,
    item_metadata,
    user_metadata,
)
from owlrec.errors import SchemaError, SourceError
from owlrec.generation.knowledge_files import lines, open_bytes
from owlrec.ids import Kind, shard_of, stable_id
from owlrec.shards import Stopwatch
from owlrec.sources.splits import ItemCatalog
from owlrec.storage import fingerprint
from owlrec.workspace import ITEM_UPDATES, Workspace, read_tombstones, shard_file, table_file


class Resources:
    """Resources shared by all shards of a process, loaded on first use. Pickling drops loaded ones."""

    def __init__(self, workspace: Workspace, config: EncoderConfig) -> None:
        self.workspace, self.config = workspace, config
        self.load_s = 0.0  # time to load the encoder

    def __reduce__(self) -> tuple[type["Resources"], tuple[Workspace, EncoderConfig]]:
        return Resources, (self.workspace, self.config)

    @cached_property
    def encoder(self) -> Encoder | HashingEncoder:
        """The recipe's encoder. Raises EngineError if it cannot be loaded."""
        watch = Stopwatch()
        encoder = self.config.load()
        self.load_s = watch.seconds
        return encoder

    @cached_property
    def catalog(self) -> ItemCatalog:
        """Titles of all items."""
        return ItemCatalog.load(self.workspace)


@dataclass(frozen=True)
class Rows:
    """Rows of a shard that get a vector."""

    ids: np.ndarray  # int64 [n], ascending
    as_of: np.ndarray  # int64 [n], ms: cutoff of each vector's input; ascending per id
    digests: np.ndarray  # uint8 [n, 16]: of each vector's input
    make: Callable[[np.ndarray], np.ndarray]  # vectors of some rows: int64 [k] -> float [k, dim]
    read: int  # rows read, including those without a text

    def take(self, at: np.ndarray) -> "Rows":
        """Some of the rows: int64 [k], ascending."""
        if len(at) == len(self.ids):
            return self
        return Rows(self.ids[at], self.as_of[at], self.digests[at], lambda rows: self.make(at[rows]), self.read)


class Input(Protocol):
    """A source of vectors of one kind; picklable."""

    def digests(self, workspace: Workspace) -> dict[int, str]:
        """By shard number, a digest of the inputs; it changes if an input file is rewritten.

        Lists folders and reads no rows.
        """

    def count(self, workspace: Workspace, number: int) -> int:
        """Maximum number of rows in shard `number`, from the footer of a file."""

    def rows(self, resources: Resources, number: int) -> Rows:
        """Rows of shard `number`. Raises WorkspaceError if its files are missing, and SchemaError if they are not
        in order.
        """


@dataclass(frozen=True)
class KnowledgeTexts:
    """Texts that `generate` wrote into a folder."""

    folder: str
    kind: Kind

    def digests(self, workspace: Workspace) -> dict[int, str]:
        """See Input."""
        return _tags(workspace, f"{self.folder}/{self.kind}")

    def count(self, workspace: Workspace, number: int) -> int:
        """See Input."""
        return workspace.count_rows(self.path(number))

    def rows(self, resources: Resources, number: int) -> Rows:
        """See Input."""
        path = self.path(number)
        table = resources.workspace.read_parquet(path, ["id", "as_of", "text"])
        keys = table["id"].to_numpy(), table["as_of"].to_numpy()
        return text_rows(resources, path, *keys, table["text"].to_pylist())

    def path(self, number: int) -> str:
        """File of a shard."""
        return f"{self.folder}/{self.kind}/{shard_file(number)}"


@dataclass(frozen=True)
class ItemMetadata:
    """Titles and attributes of the items table."""

    def digests(self, workspace: Workspace) -> dict[int, str]:
        """See Input."""
        return _item_tags(workspace)

    def count(self, workspace: Workspace, number: int) -> int:
        """See Input."""
        return workspace.count_rows(table_file("items", number))

    def rows(self, resources: Resources, number: int) -> Rows:
        """See Input."""
        ids, texts = item_metadata(resources.workspace.read_shard("items", number))
        return text_rows(resources, table_file("items", number), ids, np.zeros(len(ids), dtype=np.int64), texts)


@dataclass(frozen=True)
class ColumnTexts:
    """A text column of users or items, a source of an arm of the recipe's own."""

    kind: Kind
    column: str

    def digests(self, workspace: Workspace) -> dict[int, str]:
        """See Input."""
        return {number: fingerprint(tag, self.column) for number, tag in _tags(workspace, self._folder).items()}

    def count(self, workspace: Workspace, number: int) -> int:
        """See Input."""
        return workspace.count_rows(table_file(f"{self.kind}s", number))

    def rows(self, resources: Resources, number: int) -> Rows:
        """See Input. A column is known at any time, as profiles and attributes are."""
        path = table_file(f"{self.kind}s", number)
        table = resources.workspace.read_parquet(path, [f"{self.kind}_id", self.column]).sort_by(f"{self.kind}_id")
        ids, values = table[f"{self.kind}_id"].to_numpy(), table[self.column].to_pylist()
        texts = [", ".join(map(str, v)) if isinstance(v, list) else None if v is None else str(v) for v in values]
        return text_rows(resources, path, ids, np.zeros(len(ids), dtype=np.int64), texts)

    @property
    def _folder(self) -> str:
        return f"tables/{self.kind}s"


@dataclass(frozen=True)
class UserMetadata:
    """Profiles of the users table and the histories that the LLM read, each as of its text's moment."""

    def digests(self, workspace: Workspace) -> dict[int, str]:
        """See Input."""
        tables = [_tags(workspace, f"tables/{name}") for name in ("users", "histories")]
        titles = _item_tags(workspace)
        return {number: fingerprint(*(tags.get(number) for tags in tables), titles) for number in tables[0]}

    def count(self, workspace: Workspace, number: int) -> int:
        """See Input."""
        return workspace.count_rows(table_file("histories", number))

    def rows(self, resources: Resources, number: int) -> Rows:
        """See Input."""
        workspace = resources.workspace
        users = workspace.read_parquet(table_file("users", number))
        path = table_file("histories", number)
        histories = workspace.read_parquet(path)
        ids, texts = user_metadata(users, resources.catalog, histories)
        return text_rows(resources, path, ids, histories["as_of"].to_numpy(), texts)


@dataclass(frozen=True)
class Members:
    """Cohorts of users or items, of one facet, whose knowledge vectors are in a folder of vectors.

    A member's vector changes whenever its cohorts change or get another text. Each change is a row, which may quote
    nothing later than its as_of.
    """

    cohorts: str
    vectors: str
    kind: Kind
    disliked: bool = False  # use the cohorts by dislikes instead

    def digests(self, workspace: Workspace) -> dict[int, str]:
        """See Input."""
        made_from = _tags(workspace, f"{self.vectors}/knowledge-cohort", ".arrow")
        tags = _tags(workspace, f"{self.cohorts}/{self.kind}")
        return {number: fingerprint(tag, made_from) for number, tag in tags.items()}

    def count(self, workspace: Workspace, number: int) -> int:
        """See Input."""
        return workspace.count_rows(f"{self.cohorts}/{self.kind}/{shard_file(number)}")

    def rows(self, resources: Resources, number: int) -> Rows:
        """See Input."""
        table = resources.workspace.read_parquet(f"{self.cohorts}/{self.kind}/{shard_file(number)}")
        disliked = pc.equal(table["facet"], "disliked")
        table = memberships(table.filter(disliked if self.disliked else pc.invert(disliked)))
        shards = VectorShards(resources.workspace, self.vectors, "knowledge-cohort")
        ids, as_of, lists = _moments_of_members(table, shards)
        owner = np.repeat(np.arange(len(ids)), [len(cohorts) for cohorts in lists])
        cohorts = np.array([cohort for row_cohorts in lists for cohort in row_cohorts], dtype=np.int64)
        handles = shards.find(cohorts, as_of[owner] + 1 if len(owner) else None)
        digests = np.zeros((len(handles), DIGEST_BYTES), dtype=np.uint8)
        for _, shard, at, rows in shards.at(handles):
            digests[at] = shard.digests[rows]
        known = handles >= 0
        bounds = np.searchsorted(owner, np.arange(len(ids) + 1))
        made_from = [digests[a:b][known[a:b]].tobytes() for a, b in pairwise(bounds.tolist())]

        def make(rows: np.ndarray) -> np.ndarray:
            wanted = np.flatnonzero(known & np.isin(owner, rows))
            place = np.zeros(len(ids), dtype=np.int64)
            place[rows] = np.arange(len(rows))
            total = np.zeros((len(rows), shards.dim), dtype=np.float32)
            for _, shard, at, shard_rows in shards.at(handles[wanted]):
                np.add.at(total, place[owner[wanted[at]]], shard.vectors[shard_rows].astype(np.float32))
            return unit(total)

        return Rows(ids, as_of, digests_of(made_from), make, len(table))


def _moments_of_members(table: pa.Table, shards: VectorShards) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Ids, moments and cohorts of members' rows, in order: a row starts when a member joins a cohort, or the cohort
    gets a text, and ends when either changes.

    table: memberships.memberships, of one kind; shards: of the cohorts' knowledge.
    """
    ids, as_of = table["id"].to_pylist(), table["as_of"].to_pylist()
    lists = table["cohorts"].to_pylist()
    texts = {cohort: shards.moments(cohort) for cohort in {cohort for row_cohorts in lists for cohort in row_cohorts}}
    rows: list[tuple[int, int, list[int]]] = []
    for row, (id_, since, cohorts) in enumerate(zip(ids, as_of, lists, strict=True)):
        until = as_of[row + 1] if row + 1 < len(ids) and ids[row + 1] == id_ else None
        moments = {max(since, moment) for cohort in cohorts for moment in texts[cohort]}
        rows += [(id_, moment, cohorts) for moment in sorted(moments) if until is None or moment < until]
    keys = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
    return keys[:, 0], keys[:, 1], [row[2] for row in rows]


@dataclass(frozen=True)
class WithImported:
    """Knowledge with imported vectors in place of an id's own."""

    texts: KnowledgeTexts
    imported: str  # folder of vector shards, named by their content

    def digests(self, workspace: Workspace) -> dict[int, str]:
        """See Input."""
        own, imported = self.texts.digests(workspace), _tags(workspace, self.imported, ".arrow")
        return {number: fingerprint(own.get(number), self.imported) for number in sorted({*own, *imported})}

    def count(self, workspace: Workspace, number: int) -> int:
        """See Input."""
        imported = self._imported(workspace, number)
        own = self.texts.count(workspace, number) if workspace.entry(self.texts.path(number)) else 0
        return own + (len(imported.ids) if imported else 0)

    def rows(self, resources: Resources, number: int) -> Rows:
        """See Input."""
        workspace, imported = resources.workspace, self._imported(resources.workspace, number)
        there = workspace.entry(self.texts.path(number)) is not None
        none = np.zeros(0, np.int64)
        own = self.texts.rows(resources, number) if there else text_rows(resources, "", none, none, [])
        return own if imported is None else _merged(own, imported)

    def _imported(self, workspace: Workspace, number: int) -> VectorShard | None:
        path = f"{self.imported}/{shard_file(number, '.arrow')}"
        return VectorShard.read(workspace, path) if workspace.entry(path) else None


def text_rows(resources: Resources, path: str, ids: np.ndarray, as_of: np.ndarray, texts: Sequence[str | None]) -> Rows:
    """Rows of texts aligned with `ids` and `as_of`. An empty text has no vector: downstream that is a
    miss with its learned default, not a zero that looks like knowledge.

    path: the source file. Raises SchemaError if the rows are not in order of id and as_of.
    """
    bad = np.flatnonzero((ids[1:] < ids[:-1]) | ((ids[1:] == ids[:-1]) & (as_of[1:] <= as_of[:-1])))
    if len(bad):
        raise SchemaError(
            f"{resources.workspace.path(path)}, row {bad[0] + 1}: id {ids[bad[0] + 1]} as of "
            f"{as_of[bad[0] + 1]} follows {ids[bad[0]]} as of {as_of[bad[0]]}, but rows of a shard must ascend "
            "by both, without duplicates. Delete the file and run its stage again."
        )
    full = [row for row, text in enumerate(texts) if text and text.strip()]
    kept = [str(texts[row]) for row in full]

    def make(rows: np.ndarray) -> np.ndarray:
        return resources.encoder.encode([kept[row] for row in rows.tolist()])

    digests = digests_of([text.encode("utf-8", "surrogatepass") for text in kept])
    return Rows(np.asarray(ids, dtype=np.int64)[full], np.asarray(as_of, dtype=np.int64)[full], digests, make, len(ids))


def digests_of(contents: Sequence[bytes]) -> np.ndarray:
    """BLAKE2b-128 of each: uint8 [n, 16]."""
    joined = b"".join(hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() for content in contents)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _tags(workspace: Workspace, folder: str, suffix: str = ".parquet") -> dict[int, str]:
    """e_tag of each shard's file in a folder, by number."""
    files = workspace.entries(folder)
    return {int(name.removesuffix(suffix)): entry.e_tag for name, entry in files.items() if name.endswith(suffix)}


def _item_tags(workspace: Workspace) -> dict[int, str]:
    """For the items table, including changes after `prepare`."""
    updates = _tags(workspace, f"{ITEM_UPDATES}/item")
    return {
        number: fingerprint(tag, updates[number]) if number in updates else tag
        for number, tag in _tags(workspace, "tables/items").items()
    }


def _merged(own: Rows, imported: VectorShard) -> Rows:
    kept = np.flatnonzero(~np.isin(own.ids, imported.ids))
    ids = np.concatenate([own.ids[kept], imported.ids])
    order = np.argsort(ids, kind="stable")

    def make(rows: np.ndarray) -> np.ndarray:
        at = order[rows]
        fresh = at < len(kept)
        vectors = np.zeros((len(rows), imported.vectors.shape[1]), dtype=np.float32)
        vectors[~fresh] = imported.vectors[at[~fresh] - len(kept)]
        if fresh.any():
            vectors[fresh] = own.make(kept[at[fresh]])
        return vectors

    as_of = np.concatenate([own.as_of[kept], imported.as_of])
    digests = np.concatenate([own.digests[kept], imported.digests])
    return Rows(ids[order], as_of[order], digests[order], make, own.read)


# ----------------------------------------------------------------------------------------------------- imported vectors
# Imports another encoder's vectors from NumPy arrays into shards in the form of `encode`.
#
# Two passes over an array of any size: the first converts a slice at a time and sorts its rows into buckets of
# shards on the local disk, the second reads one bucket at a time and writes its shards. Pickled arrays are refused,
# because reading one runs code from the file.


KNOWLEDGE = "knowledge"
_SLICE_VALUES = 1 << 22  # 32 MB as float64
_BUCKET_BYTES = 1 << 28
_MOST_BUCKETS = 256  # open files
_LARGEST = float(np.finfo(np.float16).max)


class ImportedVectors(BaseModel, frozen=True):
    """A workspace's imported vectors of one kind."""

    folder: str  # folder of their shards, relative to the workspace; named by a content digest
    rows: int
    dim: int


def imported_vectors(workspace: Workspace, kind: str, source: str = KNOWLEDGE) -> ImportedVectors | None:
    """Imported vectors of a kind and source, None if there are none."""
    if workspace.entry(_card(kind, source)) is None:
        return None
    return ImportedVectors.model_validate(workspace.read_json(_card(kind, source)))


def import_vectors(
    workspace: Workspace,
    kind: Kind,
    npy_path: str | Path,
    ids_path: str | Path,
    as_of_ms: int | None = None,
    source: str = KNOWLEDGE,
) -> ImportedVectors:
    """Writes n vectors of one kind into the workspace's shards, replacing earlier imports.

    source: their name as a source of arms (`ctr.arms`), of any dimension; `knowledge` replaces the encoder's vectors of
    these ids.

    npy_path: float [n, dim]. ids_path: int64 [n] as .npy, used unchanged, or a text file with one raw id per
    line (gzip or not), converted by ids.stable_id; aligned with the vectors. as_of_ms: the vectors' cutoff
    time; only later samples read them. Items depend on nobody's behavior, so theirs is 0.
    Raises SourceError for user vectors without as_of_ms, an unreadable file, another shape or type,
    different numbers of rows, a component that is not finite or too large for float16 (with its row, from 0), an
    empty or a duplicate id; nothing is written then. Raises WorkspaceError if the workspace was never prepared.
    """
    if kind == "user" and as_of_ms is None:
        raise SourceError(
            f"{npy_path}: the cutoff of these users' vectors is unknown. Set as_of_ms (--as-of-ms) to the time "
            "of the last behavior they reflect (ms since 1970, UTC): only later samples will read them."
        )
    vectors = _array(npy_path)
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or 0 in vectors.shape:
        raise SourceError(
            f"{npy_path}: the array is {vectors.dtype} {list(vectors.shape)}, but must be float [n, dim]. Convert it."
        )
    if not source.isidentifier():
        raise SourceError(f"'{source}' cannot name a source: use letters, digits and _.")
    n_shards, before = workspace.n_shards(kind), imported_vectors(workspace, kind, source)
    scratch = workspace.scratch()
    try:
        buckets, digest = _spill(vectors, npy_path, ids_path, n_shards, scratch)
        for bucket in buckets:
            _refuse_duplicates(bucket, ids_path)
        named = fingerprint(digest, as_of_ms or 0)
        # Under a name of its own, a folder like those of `encode`, which arms read as it is.
        place, encoder = f"vectors/imported/{named[:16]}-{kind}", ""
        if source != KNOWLEDGE:
            place, encoder = f"vectors/imported/{source}/{named[:16]}/{source}-{kind}", f"imported as {source}"
        imported = ImportedVectors(folder=place, rows=len(vectors), dim=vectors.shape[1])
        for bucket in buckets:
            _write_shards(workspace, imported.folder, kind, n_shards, bucket, as_of_ms or 0, encoder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    workspace.write_json(_card(kind, source), imported.model_dump(mode="json"))
    if before is not None and before.folder != imported.folder:
        workspace.delete_dir(before.folder)
    return imported


def _card(kind: str, source: str) -> str:
    return f"vectors/imported/{kind}.json" if source == KNOWLEDGE else f"vectors/imported/{source}-{kind}.json"


def _spill(
    vectors: np.ndarray, npy_path: str | Path, ids_path: str | Path, n_shards: int, scratch: Path
) -> tuple[list[np.ndarray], str]:
    """Rows in buckets of neighboring shards, each a mapped array of records on disk, and a digest of them all."""
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
            f"{npy_path} has {n} vectors, but {ids_path} has {start} ids. Each vector needs the id in the same row."
        )
    return [np.memmap(path, record, "r") for path in paths if path.stat().st_size], total.hexdigest()


def _refuse_duplicates(bucket: np.ndarray, path: str | Path) -> None:
    ids, rows = np.array(bucket["id"]), np.array(bucket["row"])
    order = np.lexsort((rows, ids))
    repeated = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(repeated):
        first, second = order[repeated[0]], order[repeated[0] + 1]
        raise SourceError(
            f"{path}, row {rows[second]}: id {ids[second]} is also in row {rows[first]}. Keep one vector per id."
        )


def _write_shards(
    workspace: Workspace, folder: str, kind: str, n_shards: int, bucket: np.ndarray, as_of: int, encoder: str
) -> None:
    rows = np.array(bucket)
    if kind == "user":
        rows = rows[~read_tombstones(workspace).among(rows["id"])]
    numbers = shard_of(rows["id"], n_shards)
    order = np.lexsort((rows["id"], numbers))
    for at in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        vectors = rows["vector"][at]
        digests = digests_of([vector.tobytes() for vector in vectors])
        moments, no_codes = np.full(len(at), as_of, dtype=np.int64), np.zeros((len(at), 0), np.uint16)
        table = VectorShard(kind, rows["id"][at], moments, vectors, digests, no_codes, encoder=encoder).table()
        workspace.write_arrow(f"{folder}/{shard_file(int(numbers[at[0]]), '.arrow')}", table, table.schema)


def _array(path: str | Path) -> np.ndarray:
    file = Path(path).expanduser()
    if not file.is_file():
        raise SourceError(f"{path}: file not found. Correct the path.")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise SourceError(f"{path}: not a pickle-free NumPy array ({error}). Write it with numpy.save.") from None
    if not isinstance(array, np.ndarray):
        raise SourceError(f"{path}: this is an archive of arrays. Save a single array with numpy.save.")
    return array


def _id_slices(path: str | Path, step: int) -> Iterator[np.ndarray]:
    """int64 ids, `step` at a time."""
    if str(path).endswith(".npy"):
        ids = _array(path)
        if ids.ndim != 1 or not np.can_cast(ids.dtype, np.int64):
            raise SourceError(f"{path}: the array is {ids.dtype} {list(ids.shape)}, but must be int64 [n]. Convert it.")
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
    """float16 of a slice starting at row `start`."""
    with np.errstate(over="ignore"):
        halves = np.asarray(vectors).astype(np.float16)
    bad = np.flatnonzero(~np.isfinite(halves).all(axis=1))
    if len(bad):
        value = vectors[bad[0]][~np.isfinite(halves[bad[0]])][0]
        problem = f"too large for float16 (largest {_LARGEST:g})" if np.isfinite(value) else "not finite"
        raise SourceError(
            f"{path}, row {start + bad[0]}: a component is {value:g}, which is {problem}. Drop the row and its "
            "id, or scale the vectors."
        )
    return halves
