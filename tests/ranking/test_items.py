"""Item vectors for retrieval: encoded once, and again when a title or a setting changes."""

from collections.abc import Sequence

import numpy as np
import pytest

from owlrec.encoding.compression import ProjectionSettings
from owlrec.encoding.vectors import EncoderConfig
from owlrec.ranking.behavior_retrieval import ItemVectors, item_retriever
from owlrec.shards import finish_stage
from owlrec.workspace import Workspace, table_file


class Letters:
    """An encoder that counts letters, and the texts that it was given."""

    texts = 0

    def __init__(self, config: EncoderConfig) -> None:
        pass

    def encode(self, texts: Sequence[str], on_batch: object = None) -> np.ndarray:
        Letters.texts += len(texts)
        return np.array([[text.count(c) for c in "abcdefghijklmnop0123456789"] for text in texts], dtype=np.float32)


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    Letters.texts = 0
    monkeypatch.setattr("owlrec.encoding.vectors.Encoder", Letters)


def test_items_are_encoded_once_and_again_where_a_text_has_changed(small_world: Workspace) -> None:
    usual, small = ProjectionSettings(components=8), ProjectionSettings(components=4)
    history, candidates = np.arange(100, 120), np.array([101, 128])
    first = item_retriever(small_world, EncoderConfig(), usual)
    again = item_retriever(small_world, EncoderConfig(), usual)
    np.testing.assert_array_equal(*(r.retrieve(history, candidates, 5) for r in (first, again)))
    assert Letters.texts == 30
    item_retriever(small_world, EncoderConfig(), small)  # another projection of the same vectors
    assert Letters.texts == 30
    shard = small_world.read_shard("items", 2)
    titles = ["Film zero", *shard["title"].to_pylist()[1:]]
    small_world.write_parquet(table_file("items", 2), shard.set_column(2, "title", [titles]))
    item_retriever(small_world, EncoderConfig(), usual)
    assert Letters.texts == 31


def test_a_retriever_of_some_items_finds_what_one_of_all_does(small_world: Workspace) -> None:
    vectors = ItemVectors.encoded(small_world, EncoderConfig(), ProjectionSettings(components=8))
    history, candidates = np.arange(100, 120), np.array([101, 128])
    some = vectors.retriever(np.concatenate([candidates, history, [10**9]]))
    np.testing.assert_array_equal(*(r.retrieve(history, candidates, 5) for r in (some, vectors.retriever())))


def test_vectors_that_encode_has_written_are_read(small_world: Workspace) -> None:
    encoder = EncoderConfig()
    made = ItemVectors.encoded(small_world, encoder)
    finish_stage(small_world, "encode", "e" * 64, outputs={"vectors": made.shards.folder})
    small_world.delete_dir("ranking", "projections")
    again = ItemVectors.encoded(small_world, encoder)
    assert again.shards.folder == made.shards.folder
    assert Letters.texts == 30


def test_like_items_are_near(small_world: Workspace) -> None:
    """Odd films are dramas, even ones comedies; only their genres' letters tell them apart from afar."""
    retriever = item_retriever(small_world, EncoderConfig())
    odd, even = (retriever.retrieve(np.arange(100, 120), np.array([candidate]), 8) for candidate in (121, 122))
    assert (odd % 2 == 1).mean() > 0.7
    assert (even % 2 == 0).mean() > 0.7
