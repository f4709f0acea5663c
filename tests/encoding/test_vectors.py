"""Vectors tables and metadata texts, on rows small enough to check by eye."""

import numpy as np
import pyarrow as pa
import pytest

from owlrec.encoding.vectors import (
    encode_knowledge,
    encode_texts,
    item_metadata,
    item_metadata_text,
    user_metadata,
    user_metadata_text,
)
from owlrec.errors import SchemaError
from owlrec.schema import HISTORIES, KNOWLEDGE, vectors_schema
from owlrec.sources.splits import ItemCatalog


class LengthEncoder:
    """Encodes a text as (its length, 1)."""

    dimension = 2

    def encode(self, texts, on_batch=None):
        return np.array([[len(text), 1] for text in texts], dtype=np.float32).reshape(-1, 2)


def test_knowledge_becomes_vectors_and_empty_answers_none():
    defaults = {f.name: "kar" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    rows = [("user", 2**63 - 1, "abc"), ("item", 5, " "), ("item", 6, "ab")]
    table = pa.Table.from_pylist([{**defaults, "kind": k, "id": i, "text": t} for k, i, t in rows], KNOWLEDGE)
    vectors = encode_knowledge(table, LengthEncoder())
    assert vectors.schema == vectors_schema(2)
    assert vectors.to_pylist() == [
        {"kind": "user", "id": 2**63 - 1, "vector": [3, 1], "codes": []},
        {"kind": "item", "id": 6, "vector": [2, 1], "codes": []},
    ]


def test_a_table_without_texts_gives_an_empty_vectors_table():
    vectors = encode_texts("item", [], [], LengthEncoder())
    assert vectors.schema == vectors_schema(2)
    assert vectors.num_rows == 0


def test_texts_of_other_number_than_ids_are_refused():
    with pytest.raises(ValueError, match="2 ids but 1 texts"):
        encode_texts("item", [1, 2], ["a"], LengthEncoder())


def test_an_items_metadata_is_its_title_and_attributes():
    row = {
        "item_id": 1,
        "raw_id": "x9",
        "title": "Alien (1979)",
        "genres": ["horror", "sci-fi"],
        "year": "1979",
        "a": "",
    }
    assert item_metadata_text(row) == "Alien (1979); genres: horror, sci-fi; year: 1979"
    assert item_metadata_text({"item_id": 1, "raw_id": "x9", "title": "", "genres": []}) == ""


def test_a_users_metadata_lists_the_most_recent_first():
    profile = {"user_id": 1, "raw_id": "1", "gender": "female", "age": "", "occupation": "artist"}
    assert (
        user_metadata_text(profile, ["Alien", "", "Heat"], [4.0, 1.0, 3.5])
        == "gender: female; occupation: artist; history: Heat (3.5), Alien (4)"
    )
    assert user_metadata_text({"user_id": 1}, ["Alien"], [None]) == "history: Alien"
    assert user_metadata_text({"user_id": 1}, [], []) == ""


def test_metadata_of_tables_is_aligned_with_ids():
    items = pa.table({"item_id": [7, 8], "raw_id": ["7", "8"], "title": ["Alien", None], "year": ["1979", "1995"]})
    users = pa.table({"user_id": [1, 2], "raw_id": ["1", "2"], "gender": ["male", "female"]})
    histories = pa.Table.from_pylist([{"user_id": 2, "as_of": 5, "items": [8, 7], "ratings": [1.0, 5.0]}], HISTORIES)
    ids, texts = item_metadata(items)
    assert (ids.tolist(), texts) == ([7, 8], ["Alien; year: 1979", "year: 1995"])
    ids, texts = user_metadata(users, ItemCatalog(items), histories)
    assert (ids.tolist(), texts) == ([2], ["gender: female; history: Alien (5)"])
    assert user_metadata(users, ItemCatalog(items.slice(1)), histories)[1] == ["gender: female"]
    with pytest.raises(SchemaError, match="histories, user 2"):
        user_metadata(users.slice(0, 1), ItemCatalog(items), histories)
