"""The packaged encoder, for real: order, length and emptiness; and what a wrong model is answered with."""

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from owlrec.encoding import vectors as module
from owlrec.encoding.vectors import Encoder, EncoderConfig
from owlrec.errors import EngineError


@pytest.fixture(scope="module")
def encoder():
    return Encoder(EncoderConfig())


def test_vectors_are_unit_length_and_in_the_order_of_the_texts(encoder, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_TEXTS", 2)
    texts = ["a robot learns to love " * 9, "space opera", "", "a recipe for apple pie", "  \n"]
    batches = []
    vectors = encoder.encode(texts, batches.append)
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, encoder.dimension) == (5, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 0, 1, 0], abs=1e-5)
    assert batches == [2, 2, 1]
    for row in (0, 1, 3):
        assert vectors[row] == pytest.approx(encoder.encode([texts[row]])[0], abs=1e-5)


def test_meaning_is_closer_than_wording(encoder):
    query, near, far = encoder.encode(["a film about outer space", "science fiction in the galaxy", "a pie of apples"])
    assert query @ near > query @ far + 0.2


def test_text_beyond_the_window_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENS", 8)
    short = Encoder(EncoderConfig())
    assert short.encode(["one two three four five six seven"])[0] == pytest.approx(
        short.encode(["one two three four five six and entirely different words"])[0], abs=1e-5
    )


def test_no_text_gives_no_vectors(encoder):
    assert encoder.encode([]).shape == (0, 384)


def test_identity_follows_the_window_and_the_files_but_not_the_place(tmp_path, monkeypatch):
    packaged = EncoderConfig().identity
    assert packaged == EncoderConfig(replicas=2).identity
    with monkeypatch.context() as narrow:
        narrow.setattr(module, "MAX_TOKENS", 128)
        assert packaged != EncoderConfig().identity
    identities = []
    for place, text in (("a", "{}"), ("b", "{}"), ("c", '{"x": 1}')):
        folder = tmp_path / place / "model"
        folder.mkdir(parents=True)
        (folder / "modules.json").write_text(text)
        identities.append(EncoderConfig(model=str(folder)).identity)
    assert identities[0] == identities[1] != identities[2]


def test_a_wrong_model_is_an_error_with_the_next_step(tmp_path, monkeypatch):
    with pytest.raises(EngineError, match=r"no modules\.json"):
        Encoder(EncoderConfig(model=str(tmp_path)))
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(EngineError, match="cannot be loaded"):
        Encoder(EncoderConfig(model=str(tmp_path)))
    with pytest.raises(EngineError, match="does not exist"):
        Encoder(EncoderConfig(model=str(tmp_path / "none")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="make setup"):
        Encoder(EncoderConfig())


def test_missing_packages_are_an_error_with_the_next_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(EngineError, match=r"pip install 'owlrec\[cpu\]'"):
        Encoder(EncoderConfig())


def test_mistyped_options_are_refused():
    with pytest.raises(ValidationError, match="batchsize"):
        EncoderConfig(batchsize=3)
    with pytest.raises(ValidationError):
        EncoderConfig(replicas=0)


@pytest.mark.parametrize("ids", ["256", "3x", "x8", "3x100", "0x4", "three"])
def test_semantic_ids_are_levels_and_whole_bits_of_codes(ids):
    with pytest.raises(ValidationError, match="semantic_ids"):
        EncoderConfig(semantic_ids=ids)


@pytest.mark.process
def test_importing_the_module_imports_no_torch():
    code = "import sys, owlrec.encoding.vectors, owlrec.encoding.vectors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
