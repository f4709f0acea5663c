"""Item vectors for retrieval: encoded once, and again when a title or a setting changes."""

from collections.abc import Sequence

import numpy as np
import pytest

from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.projection import ProjectionConfig
from owlrec.ranking.items import item_retriever
from owlrec.workspace import Workspace


class Letters:
    """An encoder that counts letters, and its own calls."""

    calls = 0

    def __init__(self, config: EncoderConfig) -> None:
        Letters.calls += 1

    def encode(self, texts: Sequence[str], on_batch: object = None) -> np.ndarray:
        return np.array([[text.count(c) for c in "abcdefghijklmnop0123456789"] for text in texts], dtype=np.float32)


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    Letters.calls = 0
    monkeypatch.setattr("owlrec.encoding.encoder.Encoder", Letters)


def test_items_are_encoded_once_for_the_same_texts_and_settings(small_world: Workspace) -> None:
    usual, small = ProjectionConfig(components=8), ProjectionConfig(components=4)
    history, candidates = np.arange(100, 120), np.array([101, 128])
    first = item_retriever(small_world, EncoderConfig(), usual)
    again = item_retriever(small_world, EncoderConfig(), usual)
    np.testing.assert_array_equal(*(r.retrieve(history, candidates, 5) for r in (first, again)))
    assert Letters.calls == 1
    item_retriever(small_world, EncoderConfig(), small)
    assert Letters.calls == 2
    assert len(small_world.names("ranking")) == 2
    table = small_world.read_table("items")
    titles = ["Film zero", *table["title"].to_pylist()[1:]]
    small_world.write_table("items", table.set_column(2, "title", [titles]), key="item_id", n_shards=4)
    item_retriever(small_world, EncoderConfig(), usual)
    assert Letters.calls == 3


def test_like_items_are_near(small_world: Workspace) -> None:
    """Odd films are dramas, even ones comedies; only their genres' letters tell them apart from afar."""
    retriever = item_retriever(small_world, EncoderConfig(), ProjectionConfig())
    found = retriever.retrieve(np.arange(100, 120), np.array([121, 122]), 8)
    assert (found[0] % 2 == 1).mean() > 0.7
    assert (found[1] % 2 == 0).mean() > 0.7
