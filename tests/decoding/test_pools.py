"""The pools of an engine, and the texts that they are built from."""

import json
from pathlib import Path

import pytest

from owlrec_decoding import DecodingError, DraftLimits
from owlrec_decoding.index import LIVE, SEALED, build_pool
from owlrec_decoding.pools import Pools, Text, answer_tokens, build_pools, opening_tokens, read_texts, usable_pools


class Words:
    """A tokenizer of whole words: each new word gets the next id from 10 on; 1 opens a turn, 2 ends it, 3 = answer."""

    eos_token_id, chat_template = 2, "a template"

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


def test_an_answer_stands_behind_its_opening_and_before_its_end() -> None:
    tokenizer = Words()
    assert opening_tokens(tokenizer) == [1, 3]
    (tokens,) = answer_tokens(tokenizer, ["red blue red"])
    red, blue = tokenizer.ids["red"], tokenizer.ids["blue"]
    assert tokens.tolist() == [1, 3, red, blue, red, 2]
    assert list(answer_tokens(tokenizer, [])) == []


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_files_of_texts_are_read(tmp_path: Path, ending: str) -> None:
    import pandas as pd

    rows = [{"text": "by night", "id": 7, "pool": "item"}, {"text": "by day", "id": 8, "pool": "user"}]
    file, frame = tmp_path / f"texts.{ending}", pd.DataFrame(rows)
    if ending == "csv":
        frame.to_csv(file, index=False)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_texts(file) == [Text("by night", 7, "item"), Text("by day", 8, "user")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("texts.txt", "x", "is not one of"),
        ("texts.csv", "title\nx\n", "no column 'text'"),
        ("texts.jsonl", "{", "cannot be read"),
        ("texts.csv", "text,id\nx,seven\n", "cannot be read"),
    ],
)
def test_what_is_no_file_of_texts_is_refused(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DecodingError, match=problem):
        read_texts(tmp_path / name)
    with pytest.raises(DecodingError, match="cannot be read"):
        read_texts(tmp_path / "none.csv")


def test_texts_are_sorted_into_their_pools() -> None:
    tokenizer = Words()
    texts = [Text("red", 7, "item"), Text("blue", 7, "user"), Text("green", None, "item"), Text("black", 7, "item")]
    pools = build_pools(texts, tokenizer)
    assert sorted(pools) == ["item", "user"]
    assert pools["item"].document(7).tolist() == [1, 3, tokenizer.ids["black"], 2]  # the last of that id
    assert len(pools["item"].documents) == 2
    assert pools["user"].document(7).tolist() == [1, 3, tokenizer.ids["blue"], 2]


def test_the_first_texts_are_left_out_of_a_full_pool() -> None:
    texts = [Text(word) for word in "abcde"]
    assert len(build_pools(texts, Words(), max_tokens=2 * 5)["default"].documents) == 2  # of four tokens and a border


def test_a_pool_is_known_from_opening_to_closing() -> None:
    pools = Pools()
    assert pools.known("default")
    assert not pools.known("a")
    pools.open("a", build_pool([[1, 2, 3]], [7]))
    [(kind, place)] = pools.sources("a")
    assert kind == SEALED
    assert pools.document(["b", "a"], 7).tolist() == [1, 2, 3]
    assert pools.document(["a"], 8).tolist() == []
    version = pools.version
    pools.close("a")
    assert pools.version > version  # requests that had it look their sources up again
    assert not pools.known("a")
    pools.open("b", build_pool([[4, 5]]))
    assert pools.sources("b") == [(SEALED, place)]  # the place is used again
    pools.close("nobody")


def test_a_pool_takes_the_place_of_an_earlier_one_of_its_name() -> None:
    pools = Pools()
    for text in ([1, 2], [3, 4]):
        pools.open("a", build_pool([text], [7]))
    assert pools.document(["a"], 7).tolist() == [3, 4]
    assert len(pools.sources("a")) == 1
    assert pools.tokens() == {"sealed": 3, "live": 0}


def test_a_pool_with_tokens_that_the_model_lacks_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    known, unknown = build_pool([[1, 9]], [7]), build_pool([[1, 10]], [7])
    pools = Pools(vocabulary=10)
    pools.open("a", known)
    with pytest.raises(DecodingError, match="pool a: token 10 "):
        pools.open("a", unknown)
    assert pools.document(["a"], 7).tolist() == [1, 9]
    assert list(usable_pools({"a": known, "b": unknown}, 10)) == ["a"]
    assert "pool b: token 10 " in caplog.text


def test_finished_texts_join_the_live_tier_and_go_with_the_pool() -> None:
    pools = Pools()
    pools.open("a", build_pool([[1, 2, 3]], searchable=False))
    assert pools.sources("a") == []
    pools.insert("a", [4, 5])
    assert [kind for kind, _ in pools.sources("a")] == [LIVE]
    pools.insert("a", list(range(3000)))  # the arrays are replaced; the place stays
    assert [kind for kind, _ in pools.sources("a")] == [LIVE]
    assert pools.tokens() == {"sealed": 4, "live": 3 + 3001}
    pools.close("a")
    assert pools.tokens() == {"sealed": 0, "live": 0}


def test_no_live_tier_where_it_is_switched_off() -> None:
    pools = Pools(DraftLimits(live_tokens=0))
    pools.insert("default", [1, 2])
    assert pools.sources("default") == []
