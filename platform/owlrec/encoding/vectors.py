"""Tables of texts -> vectors tables, in memory, plus the texts of the metadata-only control arm (see inputs.py)."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.encoder import TextEncoder
from owlrec.encoding.semantic_ids import (
    QuantizationReport,
    Quantizer,
    SemanticIdConfig,
    code_vectors,
    measure_codes,
    train_quantizer,
)
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.ids import Kind, by_shard, shard_of
from owlrec.ordered import newest_rows
from owlrec.schema import vectors_schema, vectors_table
from owlrec.sources.catalog import ItemCatalog
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

# -------------------------------------------------------------------------------------------------------- coded vectors
# Codes of vectors tables: separate codebooks for the vectors of each source and kind.
#
# Users and items have separate codebooks. Their texts read differently ("the user prefers", "the film tells"), so a
# common first level would waste its codes on separating users from items, which their keys already do. And a refresh,
# which adds vectors of users, needs only the users' codebooks. Cohorts have no codes: a cohort is already a
# category. Codebooks are fitted once on a bounded sample; later vectors are coded with the same ones.


CODED_KINDS = ("user", "item")
CODED_SOURCES = ("knowledge", "metadata")  # members of a cohort share its vector and have its name as a category
_REPORT = "report.json"


def fit_codebooks(
    workspace: Workspace, folder: str, name: str, ids: np.ndarray, vectors: np.ndarray, config: SemanticIdConfig
) -> QuantizationReport:
    """Fits codebooks on a sample of a folder's vectors `name`, stores them next to these, and measures them.

    ids: int64 [n]; vectors: float [n, d], aligned. Codebooks that another run has stored meanwhile stay.
    Raises SchemaError like train_quantizer.
    """
    train_quantizer(vectors, config).save(workspace, quantizer_folder(folder, name))
    quantizer = Quantizer.load(workspace, quantizer_folder(folder, name))
    report = measure_codes(quantizer, code_vectors(quantizer, ids, vectors), vectors)
    workspace.write_json(f"{quantizer_folder(folder, name)}/{_REPORT}", report.model_dump(mode="json"))
    return report


def with_codes(table: pa.Table, codes: np.ndarray) -> pa.Table:
    """A vectors table with these semantic ids: uint16 [n, levels + 1], aligned with its rows."""
    n, width = codes.shape
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
    lists = pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(codes, dtype=np.uint16).reshape(-1)))
    column = table.schema.get_field_index("codes")
    return table.set_column(column, table.schema.field(column), lists)


def codes_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Semantic ids in a vectors table: (uint16 [n, width], mask bool [n]), zeros and False if missing.

    Raises SchemaError if rows have different numbers of codes.
    """
    lists = table["codes"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    widths = np.unique(lengths[lengths > 0])
    if len(widths) > 1:
        raise SchemaError(
            f"vectors: rows have {' and '.join(map(str, widths))} codes. They come from different quantizers: "
            "run `encode` again."
        )
    mask = lengths > 0
    codes = np.zeros((len(lengths), int(widths[0]) if len(widths) else 0), dtype=np.uint16)
    codes[mask] = pc.list_flatten(lists).to_numpy(zero_copy_only=False).reshape(mask.sum(), codes.shape[1])
    return codes, mask


def read_quantizers(workspace: Workspace, folder: str, source: str) -> dict[str, Quantizer]:
    """By kind, the quantizers of a source's vectors in a folder of `encode`; missing ones are left
    out.
    """
    places = {kind: quantizer_folder(folder, f"{source}-{kind}") for kind in CODED_KINDS}
    return {kind: Quantizer.load(workspace, place) for kind, place in places.items() if workspace.exists(place)}


def read_reports(workspace: Workspace, folder: str) -> dict[str, QuantizationReport]:
    """Reports on the vectors in a folder, by the name of their table ("knowledge-user")."""
    names = workspace.names(quantizer_folder(folder, ""))
    files = {name: f"{quantizer_folder(folder, name)}/{_REPORT}" for name in names}
    return {
        name: QuantizationReport.model_validate(workspace.read_json(file))
        for name, file in files.items()
        if workspace.exists(file)
    }


def quantizer_folder(folder: str, name: str) -> str:
    """Folder of the codebooks of a folder's vectors `name`."""
    return f"{folder}/quantizers/{name}".rstrip("/")


# -------------------------------------------------------------------------------------------------------------- vectors


_NO_ATTRIBUTES = {"user_id", "item_id", "raw_id", "title"}


def encode_knowledge(
    knowledge: pa.Table, encoder: TextEncoder, on_batch: Callable[[int], None] | None = None
) -> pa.Table:
    """The vectors table (schema.vectors_schema) of a knowledge table (schema.KNOWLEDGE), row by row.

    A row with an empty text has no vector: downstream it is a miss with its learned default, not a zero that looks
    like knowledge.
    """
    texts = [text or "" for text in knowledge["text"].to_pylist()]
    return encode_texts(knowledge["kind"].to_pylist(), knowledge["id"].to_numpy(), texts, encoder, on_batch)


def encode_texts(
    kind: str | Sequence[str],
    ids: Sequence[int] | np.ndarray,
    texts: Sequence[str],
    encoder: TextEncoder,
    on_batch: Callable[[int], None] | None = None,
) -> pa.Table:
    """Vectors table of texts aligned with `ids`, of one kind or with one kind per id. Empty texts are left out."""
    if len(ids) != len(texts):
        raise ValueError(f"{len(ids)} ids but {len(texts)} texts")
    rows = [row for row, text in enumerate(texts) if text.strip()]
    kinds = kind if isinstance(kind, str) else [kind[row] for row in rows]
    return vectors_table(kinds, np.asarray(ids, dtype=np.int64)[rows], encoder.encode(texts, on_batch)[rows])


def item_metadata_text(row: Mapping[str, Any]) -> str:
    """An item as `title; attribute: value, value; ...` from a row of the items table; without empty attributes."""
    return "; ".join(part for part in (str(row.get("title") or ""), *_attributes(row)) if part)


def user_metadata_text(profile: Mapping[str, Any], titles: Sequence[str], ratings: Sequence[float | None]) -> str:
    """A user as profile fields and rated titles, from a row of the users table and the history that the LLM read.

    titles, ratings: aligned, oldest first, as in schema.HISTORIES. The text lists the most recent first, so an
    encoder's window cuts off the oldest.
    """
    liked = [
        f"{title} ({rating:g})" if rating is not None else title
        for title, rating in zip(reversed(titles), reversed(ratings), strict=True)
        if title
    ]
    return "; ".join([*_attributes(profile), *([f"history: {', '.join(liked)}"] if liked else [])])


def item_metadata(items: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Ids (int64 [n]) and metadata texts of an items table."""
    return items["item_id"].to_numpy(), [item_metadata_text(row) for row in items.to_pylist()]


def user_metadata(users: pa.Table, catalog: ItemCatalog, histories: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Ids (int64 [n]) and metadata texts of the users with a history, in the order of `histories`
    (schema.HISTORIES).

    Raises SchemaError if a history belongs to a user who is not in the table.
    """
    items = histories["items"].combine_chunks()
    titles = catalog.titles(items.flatten().to_numpy())
    ends = np.cumsum(items.value_lengths().to_numpy()).tolist()
    profiles = {row["user_id"]: row for row in users.to_pylist()}
    ids, texts = histories["user_id"].to_pylist(), []
    starts = [0, *ends[:-1]] if ends else []
    for user, start, end, ratings in zip(ids, starts, ends, histories["ratings"].to_pylist(), strict=True):
        if user not in profiles:
            raise SchemaError(
                f"histories, user {user}: the users table has no row for this user. The tables come from "
                "different runs: run `prepare` again."
            )
        texts.append(user_metadata_text(profiles[user], titles[start:end], ratings))
    return histories["user_id"].to_numpy(), texts


def _attributes(row: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        text = ", ".join(str(v) for v in values if v not in (None, ""))
        if name not in _NO_ATTRIBUTES and text:
            parts.append(f"{name}: {text}")
    return parts


# -------------------------------------------------------------------------------------------------------- vector shards
# Vectors on disk: one Arrow file per shard of ids, memory-mapped and gathered by id.
#
# `encode` writes them; training, releases and refreshes read them. A file has the rows of one shard in ascending
# order of id and as_of, uncompressed, so a reader maps what it needs and copies only the requested rows; from
# an object store each file is fetched once per node. A lookup for a sample gives its moment and reads only earlier
# rows. An id without a vector is normal (a new user): it gives zeros and a mask, not an error.


DIGEST_BYTES = 16  # BLAKE2b-128 of a vector's input
PARTITIONS = "streaming-user"  # written by refreshes: a vector per interest partition of a user, by as_of
_MOST_OPEN = 256  # a mapped file keeps a descriptor; processes are often limited to 1,024
_ROWS_PER_SHARD = 1 << 32  # limit set by the handle's bits
_QUANTIZER, _ENCODER = b"quantizer", b"encoder"


@dataclass(frozen=True)
class VectorShard:
    """Rows of one file."""

    kind: str
    ids: np.ndarray  # int64 [n], ascending
    as_of: np.ndarray  # int64 [n], ms: the vector's cutoff; ascending and distinct per id
    vectors: np.ndarray  # float16 [n, dim]
    digests: np.ndarray  # uint8 [n, 16]: of each vector's input
    codes: np.ndarray  # uint16 [n, levels + 1], the duplicate digit last; [n, 0] without codes
    quantizer: str = ""  # fingerprint of the codebooks
    encoder: str = ""  # identity of the encoder
    mapped: pa.Table | None = field(default=None, repr=False, compare=False)  # the memory behind the arrays, kept open

    @classmethod
    def read(cls, workspace: Workspace, path: str) -> "VectorShard":
        """Maps a file. Raises WorkspaceError if it is missing or damaged."""
        table = workspace.map_arrow(path)
        try:
            about = table.schema.metadata or {}
            vectors = _whole(table["vector"])
            return cls(
                kind=str(table["kind"][0]) if len(table) else "",
                ids=_whole(table["id"]).to_numpy(),
                as_of=_whole(table["as_of"]).to_numpy(),
                vectors=vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size),
                digests=_bytes_matrix(_whole(table["digest"])),
                codes=codes_of(table)[0],
                quantizer=about.get(_QUANTIZER, b"").decode(),
                encoder=about.get(_ENCODER, b"").decode(),
                mapped=table,
            )
        except (KeyError, AttributeError, ValueError) as error:
            raise WorkspaceError(
                f"{workspace.path(path)} holds no vectors of this version ({error}). Delete it and run `encode` again."
            ) from None

    def table(self) -> pa.Table:
        """Rows as written: vectors_schema, `digest` and `as_of`."""
        n = len(self.ids)
        plain = with_codes(vectors_table(self.kind, self.ids, self.vectors), self.codes)
        digests = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DIGEST_BYTES), n, [None, pa.py_buffer(np.ascontiguousarray(self.digests, dtype=np.uint8))]
        )
        schema = vectors_schema(self.vectors.shape[1]).append(pa.field("digest", pa.binary(DIGEST_BYTES)))
        schema = schema.append(pa.field("as_of", pa.int64()))
        schema = schema.with_metadata({_QUANTIZER: self.quantizer.encode(), _ENCODER: self.encoder.encode()})
        return pa.table([*plain.columns, digests, pa.array(self.as_of, pa.int64())], schema=schema)


class VectorShards:
    """Vectors of one source and kind ("knowledge-user") in a folder of `encode`.

    Opens a shard on first use and keeps the 256 most recently used. Threads may share it; processes get their own
    copy by pickling.
    """

    def __init__(self, workspace: Workspace, folder: str, name: str) -> None:
        """Reads nothing yet. name: `<source>-<kind>`; the kind determines the number of shards."""
        self.workspace, self.folder, self.name = workspace, folder, name
        self.kind = cast(Kind, name.rpartition("-")[2])
        self.n_shards = workspace.n_shards(self.kind)
        self._open: OrderedDict[int, VectorShard | None] = OrderedDict()
        self._lock = threading.Lock()
        self._quantizer: Quantizer | None = None

    def __reduce__(self) -> tuple[type["VectorShards"], tuple[Workspace, str, str]]:
        return VectorShards, (self.workspace, self.folder, self.name)

    @property
    def numbers(self) -> list[int]:
        """Shards with a file, ascending; lists the folder."""
        suffix = shard_file(0, ".arrow")[8:]
        names = self.workspace.names(self.folder, self.name)
        return [int(name.removesuffix(suffix)) for name in names if name.endswith(suffix)]

    @cached_property
    def dim(self) -> int:
        """Components of a vector. Raises WorkspaceError if no shard has a file."""
        # The first shard nearly always exists; the folder is listed only if it does not.
        if (shard := self.shard(0) or next(map(self.shard, self.numbers), None)) is not None:
            return int(shard.vectors.shape[1])
        raise WorkspaceError(
            f"{self.workspace.path(self.folder, self.name)} holds no vectors. Run `encode` first, with the same recipe."
        )

    def quantizer(self) -> Quantizer | None:
        """Codebooks of the codes, None if these vectors have no codes."""
        if self._quantizer is None:
            folder = quantizer_folder(self.folder, self.name)
            self._quantizer = Quantizer.load(self.workspace, folder) if self.workspace.exists(folder) else None
        return self._quantizer

    def shard(self, number: int) -> VectorShard | None:
        """Rows of one shard, mapped; None if nothing was encoded for it."""
        with self._lock:
            if number not in self._open:
                path = f"{self.folder}/{self.name}/{shard_file(number, '.arrow')}"
                there = self.workspace.entry(path) is not None
                self._open[number] = VectorShard.read(self.workspace, path) if there else None
                while len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def gather(self, ids: np.ndarray, before: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Newest vectors of `ids`, in their order.

        ids: int64 [b], any order, repeats allowed. before: int64 [b], ms: considers only strictly earlier rows.
        Returns float16 [b, dim], zeros if missing, and bool [b], False if missing.
        """
        vectors, mask = np.zeros((len(ids), self.dim), dtype=np.float16), np.zeros(len(ids), dtype=bool)
        for shard, at, rows in self._rows(ids, before):
            vectors[at], mask[at] = shard.vectors[rows], True
        return vectors, mask

    def codes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Semantic ids of `ids`, in their order: uint16 [b, levels + 1], the duplicate digit last, zeros
        if missing, and bool [b], False if missing.

        Raises SchemaError if the vectors have no codes, or a shard was coded with other codebooks than the folder's.
        """
        quantizer = self.quantizer()
        if quantizer is None:
            raise SchemaError(
                f"{self.name} vectors have no semantic ids. Set encoder.semantic_ids and run `encode` again."
            )
        codes = np.zeros((len(ids), len(quantizer.codebooks) + 1), dtype=np.uint16)
        mask = np.zeros(len(ids), dtype=bool)
        for shard, at, rows in self._rows(ids):
            if shard.quantizer != quantizer.fingerprint:
                raise SchemaError(
                    f"{self.name}: shard {shard_of(shard.ids[:1], self.n_shards)[0]} was coded with codebooks "
                    f"{shard.quantizer[:8] or 'none'}, but the folder has {quantizer.fingerprint[:8]}. Run "
                    "`encode`."
                )
            codes[at], mask[at] = shard.codes[rows], True
        return codes, mask

    def moments(self, id_: int) -> list[int]:
        """as_of (ms) of each vector of an id, ascending."""
        shard = self.shard(int(shard_of(np.array([id_]), self.n_shards)[0]))
        if shard is None:
            return []
        low, high = np.searchsorted(shard.ids, [id_, id_ + 1])
        moments: list[int] = shard.as_of[low:high].tolist()
        return moments

    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """Rows that `gather` would read: int64 [b], a handle per row, -1 for ids without any."""
        handles = np.full(len(ids), -1, dtype=np.int64)
        for shard, at, rows in self._rows(ids, before):
            handles[at] = shard_of(shard.ids[:1], self.n_shards)[0] * _ROWS_PER_SHARD + rows
        return handles

    def at(self, handles: np.ndarray) -> Iterator[tuple[int, VectorShard, np.ndarray, np.ndarray]]:
        """By shard number: which of `handles` (see find; may include -1) are its rows, and which rows."""
        known = np.flatnonzero(handles >= 0)
        numbers, rows = np.divmod(handles[known], _ROWS_PER_SHARD)
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        for shard_places in np.split(order, starts[1:]) if len(known) else ():
            number = int(numbers[shard_places[0]])
            shard = self.shard(number)
            assert shard is not None
            yield number, shard, known[shard_places], rows[shard_places]

    def sample(self, rows: int, seed: int, numbers: Iterable[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and vectors of at most `rows` ids: int64 [n] and float16 [n, dim], deterministic for a seed.

        Takes whole shards, in random order or in that of `numbers`, until there are enough. Shards are a hash of the
        id, so their ids are a random sample. It holds `rows` vectors in memory and reads only those shards.
        """
        ids, vectors, left = [np.zeros(0, np.int64)], [np.zeros((0, self.dim), np.float16)], rows
        for number in shard_order(self.n_shards, seed) if numbers is None else numbers:
            if left <= 0:
                break
            if (shard := self.shard(number)) is not None:
                ids.append(shard.ids[:left])
                vectors.append(shard.vectors[:left])
                left -= len(ids[-1])
        return np.concatenate(ids), np.concatenate(vectors)

    def _rows(
        self, ids: np.ndarray, before: np.ndarray | None = None
    ) -> Iterator[tuple[VectorShard, np.ndarray, np.ndarray]]:
        """By shard: which of `ids` have a row there, and the newest such row before a moment."""
        ids = np.asarray(ids, dtype=np.int64)
        for number, at in by_shard(ids, self.n_shards):
            if (shard := self.shard(number)) is None:
                continue
            rows = newest_rows(shard.ids, shard.as_of, ids[at], None if before is None else before[at])
            known = rows >= 0
            if known.any():
                yield shard, at[known], rows[known]


def partitions_folder(encoder: str) -> str:
    """Folder of PARTITIONS by encoder (EncoderConfig.identity), relative to the workspace."""
    return f"vectors/{fingerprint('partitions', encoder)[:16]}"


def shard_order(n_shards: int, seed: int) -> list[int]:
    """The shards in the random order of samples."""
    return [int(number) for number in np.random.default_rng(seed).permutation(n_shards)]


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one chunk; copies only if it has several, unlike combine_chunks."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _bytes_matrix(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """uint8 [n, width] of a fixed-size binary column, without copying."""
    width = column.type.byte_width
    if not len(column):
        return np.zeros((0, width), dtype=np.uint8)
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return flat[column.offset * width : (column.offset + len(column)) * width].reshape(len(column), width)
