"""Pools made of a release's texts: tokens as the engine writes them, the newest kept, relaxed texts left out."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from owlrec.generation.release_pools import write_release_pools
from owlrec.schema import KNOWLEDGE
from owlrec_decoding.index import BORDER, PoolError, open_pool
from owlrec_decoding.options import pools_identity
from owlrec_decoding.pools import answer_tokens, opening_tokens


class Words:
    """A tokenizer of whole words: each new word gets the next id from 10 on; 1 opens a turn, 2 ends it, 3 = answer."""

    eos_token_id = 2

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[self.ids.setdefault(w, 10 + len(self.ids)) for w in t.split()] for t in texts]}

    def apply_chat_template(
        self, turns: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> list[int]:
        content = self([turns[0]["content"]], add_special_tokens=False)["input_ids"][0]
        return [1, *content, 2, *([1, 3] if add_generation_prompt else [])]


def table(*rows: dict[str, Any]) -> pa.Table:
    full = {"kind": "user", "as_of": 0, "text": "a b", "finish_reason": "stop", "relaxed": 0}
    return pa.Table.from_pylist([{**dict.fromkeys(KNOWLEDGE.names), **full, **r} for r in rows], schema=KNOWLEDGE)


def test_an_answer_stands_behind_its_opening_and_before_its_end() -> None:
    tokenizer = Words()
    assert opening_tokens(tokenizer) == [1, 3]
    whole, cut = answer_tokens(tokenizer, ["red blue red", "blue"], [True, False])
    red, blue = tokenizer.ids["red"], tokenizer.ids["blue"]
    assert whole.tolist() == [1, 3, red, blue, red, 2]
    assert cut.tolist() == [1, 3, blue]


def test_there_is_a_pool_per_kind_whose_documents_are_found_by_id(tmp_path: Path) -> None:
    tokenizer = Words()
    tables = [
        table({"id": 7, "text": "red"}, {"id": 8, "text": "blue"}),
        table({"kind": "item", "id": 7, "text": "green", "finish_reason": "length"}),
    ]
    written = write_release_pools(tmp_path, tables, tokenizer, identity="m", max_tokens=100)
    assert written == {"user": 10, "item": 4}  # two of four tokens and a border, one of three and a border
    assert open_pool(tmp_path / "user", "m").document(8).tolist() == [1, 3, tokenizer.ids["blue"], 2]
    assert open_pool(tmp_path / "item", "m").document(7).tolist() == [1, 3, tokenizer.ids["green"]]
    assert pools_identity(tmp_path) == "m"
    with pytest.raises(PoolError, match="holds tokens of m, but the engine runs other"):
        open_pool(tmp_path / "user", "other")


def test_relaxed_and_empty_texts_draft_for_nobody(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": ""}, {"id": 2, "relaxed": 3}, {"id": 3}]
    write_release_pools(tmp_path, [table(*rows)], Words(), identity="m", max_tokens=100)
    assert open_pool(tmp_path / "user", "m").documents[:, 0].tolist() == [3]


def test_the_newest_texts_stay_within_the_bound(tmp_path: Path) -> None:
    tables = [table(*[{"id": 10 * t + i, "as_of": 1000 - 10 * t - i} for i in range(10)]) for t in range(20)]
    written = write_release_pools(tmp_path, tables, Words(), identity="m", max_tokens=30)
    pool = open_pool(tmp_path / "user", "m")
    assert written["user"] <= 30
    ids, starts = pool.documents[:, :2].T  # six tokens each with their border; oldest first
    assert (ids.tolist(), starts.tolist()) == ([0, 1, 2, 3, 4], [24, 18, 12, 6, 0])
    assert int((pool.tokens == BORDER).sum()) == 5


def test_no_pools_have_no_identity(tmp_path: Path) -> None:
    assert write_release_pools(tmp_path / "none", [], Words(), identity="m", max_tokens=9) == {}
    assert pools_identity(tmp_path / "none") is None
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{")
    assert pools_identity(tmp_path) is None
