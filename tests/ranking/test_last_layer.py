"""Item vectors of the LLM's last layer: the mean over the text alone, whoever shares the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]

from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.projection import ProjectionConfig
from owlrec.errors import EngineError
from owlrec.generation import VllmEngineConfig
from owlrec.generation.models import load_tokenizer
from owlrec.ranking import retrieval as last_layer
from owlrec.ranking.experiment import RankingConfig
from owlrec.ranking.retrieval import LastLayerConfig, LastLayerEncoder, item_retriever
from owlrec.workspace import Workspace

TEXTS = ["Bright River; genres: drama", "Dark Star", " ", "Bright House; genres: comedy, drama"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder: str = write_tiny_ranker(tmp_path / "model", [*TEXTS, "An item of a catalogue: "])
    return folder


def test_a_vector_is_the_mean_of_the_last_states_of_its_own_text(model: str) -> None:
    from transformers import AutoModel

    found = LastLayerEncoder(LastLayerConfig(model=model)).encode(TEXTS)
    tokenizer = load_tokenizer(model)
    net = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    lead = tokenizer("An item of a catalogue: ")["input_ids"]
    for vector, text in zip(found, TEXTS, strict=True):
        if not text.strip():
            assert not vector.any()
            continue
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = net(input_ids=torch.tensor([lead + own])).last_hidden_state[0, len(lead) :]
        expected = torch.nn.functional.normalize(states.mean(dim=0), dim=0).numpy()
        assert vector @ expected > 0.999
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_neither_batch_nor_order_nor_what_is_cut_changes_a_vector(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    encoder = LastLayerEncoder(LastLayerConfig(model=model))
    together = encoder.encode(TEXTS, done.append)
    assert sum(done) == 3
    monkeypatch.setattr(last_layer, "_BATCH_TOKENS", 1)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1])[::-1], together, atol=0.01)
    tokenizer = load_tokenizer(model)
    whole, title = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TEXTS[3], "Bright House"))
    assert whole[: len(title)] == title
    short = LastLayerEncoder(LastLayerConfig(model=model, max_tokens=len(title)))
    np.testing.assert_allclose(*short.encode([TEXTS[3], "Bright House"]), atol=0.01)
    assert not np.allclose(together[0], together[3], atol=0.01)


def test_recipe_chooses_whose_vectors_retrieve(model: str) -> None:
    encoder, engine = EncoderConfig(), VllmEngineConfig(type="vllm", model=model)
    assert RankingConfig().item_encoder(encoder, engine) is encoder
    chosen = RankingConfig(item_vectors="llm").item_encoder(encoder, engine)
    assert chosen == LastLayerConfig(model=model)


def test_items_are_read_by_the_llm_once_and_projected(
    small_world: Workspace, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, projection = LastLayerConfig(model=model), ProjectionConfig(components=8)
    history, candidates = np.arange(100, 120), np.array([101, 128])
    first = item_retriever(small_world, config, projection)
    monkeypatch.setattr(last_layer, "LastLayerEncoder", None)  # a second reading would fail
    again = item_retriever(small_world, config, projection)
    np.testing.assert_array_equal(*(r.retrieve(history, candidates, 5) for r in (first, again)))


def test_a_model_that_is_no_language_model_is_refused(model: str) -> None:
    (Path(model) / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="cannot be"):
        LastLayerEncoder(LastLayerConfig(model=model))
