"""The hashing encoder: a fixed function of the words, without torch, that keeps what is alike near."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer

from owlrec.encoding.vectors import EncoderConfig, HashingEncoder
from owlrec.errors import EngineError

NONZERO, SIGNS = [5, 53, 91, 123, 144, 165, 207, 249], [1, -1, -1, 1, 1, -1, -1, 1]  # of "owl"


def random_texts(n: int, words: int = 60, seed: int = 0) -> list[str]:
    drawn = np.random.default_rng(seed).integers(0, 5000, (n, words))
    return [" ".join(f"word{number}" for number in row) for row in drawn]


def test_vectors_are_unit_length_in_the_order_of_the_texts_and_zero_without_words() -> None:
    encoder = HashingEncoder(batch_size=2)
    batches: list[int] = []
    texts = ["a robot learns to love", "", "space opera", "! ?", "apple pie"]
    vectors = encoder.encode(texts, batches.append)
    assert (vectors.dtype, vectors.shape) == (np.float32, (5, encoder.dimension))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 1, 0, 1], abs=1e-6)
    assert batches == [2, 2, 1]
    np.testing.assert_array_equal(HashingEncoder().encode(texts), vectors)
    assert encoder.encode([]).shape == (0, encoder.dimension)


def test_the_projection_keeps_cosines() -> None:
    """Of 256 signs the standard error of a cosine is about 1/16, and of the mean over 4,950 pairs far less."""
    texts = random_texts(100) + [f"{text} end" for text in random_texts(20)]
    exact = HashingVectorizer(n_features=1 << 18, ngram_range=(1, 2)).transform(texts)
    wanted = (exact @ exact.T).toarray()
    vectors = HashingEncoder().encode(texts)
    error = (vectors @ vectors.T - wanted)[np.triu_indices(120, 1)]
    assert abs(error.mean()) < 0.01
    assert np.sqrt(np.square(error).mean()) < 1.3 / 16
    assert wanted[0, 100] > 0.9
    assert vectors[0] @ vectors[100] > 0.85


def test_vectors_are_those_of_every_version() -> None:
    """Worked out once; if this fails, change the encoder's identity, so that vectors of two versions do not mix."""
    vector = HashingEncoder().encode(["owl"])[0]
    assert np.flatnonzero(vector).tolist() == NONZERO
    assert np.sign(vector[NONZERO]).tolist() == SIGNS
    assert np.abs(vector[NONZERO]) == pytest.approx([8**-0.5] * 8)


@pytest.mark.process
def test_the_recipe_names_it_and_no_torch_is_imported() -> None:
    assert isinstance(EncoderConfig(model="hashing").load(), HashingEncoder)
    assert EncoderConfig(model="hashing", replicas=4).identity == EncoderConfig(model="hashing").identity
    code = (
        "import sys; from owlrec.encoding.vectors import EncoderConfig;"
        "EncoderConfig(model='hashing').load().encode(['x y']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_package_is_an_error_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(EngineError, match="scikit-learn"):
        HashingEncoder()
