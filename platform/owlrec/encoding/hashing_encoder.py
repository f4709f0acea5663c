"""Texts -> vectors by hashing words: no model, no download, no torch, thousands of texts a second on one core.

A baseline to compare language models with, and the encoder of large trial runs: texts that share words and word pairs
are near. scikit-learn's HashingVectorizer counts words and pairs in 2^18 hashed features; it gets them as bytes, cut
in half the time that its own tokenizer takes. A fixed random matrix with eight non-zeros per feature, one in each
eighth of the vector, projects them and keeps distances in expectation (a sparse Johnson-Lindenstrauss transform: Kane
and Nelson, JACM 2014, "block construction"). The matrix comes from a hash function, not from a random generator, so
that it is the same with every version of numpy.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from owlrec.errors import EngineError
from owlrec.schema import shard_of

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
