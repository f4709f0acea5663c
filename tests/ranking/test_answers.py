"""Yes and No in the vocabularies of the tokenizers in use, built here at toy size, and the probability of Yes."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from owlrec.errors import EngineError
from owlrec.generation.engines import load_tokenizer
from owlrec.ranking.scorer import Answers, find_answers, likely_answers, yes_probability

WORDS = ("Yes", "No", "yes", "no", "YES", "NO", "Not", "yesterday")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
ASCII = [chr(c) for c in range(33, 127)] + ["▁", "\n"]


def bpe(alphabet: Iterable[str], words: Iterable[str], space: str) -> models.BPE:
    """A vocabulary in which each word has a token, and another with the space in front."""
    merges = []
    for word in words:
        pieces = [(word[:end], word[end]) for end in range(1, len(word))]
        merges += [pair for pair in [*pieces, (space, word)] if pair not in merges]
    tokens = [*dict.fromkeys([*SPECIAL, "<unk>", *alphabet, *(a + b for a, b in merges)])]
    return models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>")


def gpt2(words: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(bpe(BYTES, words, "Ġ"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama3(words: Iterable[str]) -> Tokenizer:
    """Llama 3: an expression of its own parts the words before the bytes are mapped."""
    tokenizer = Tokenizer(bpe(BYTES, words, "Ġ"))
    split = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+|[^\s]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def qwen(words: Iterable[str]) -> Tokenizer:
    """Qwen 2 and 3: digits one by one, after Unicode's composed form."""
    tokenizer = Tokenizer(bpe(BYTES, words, "Ġ"))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s*[\r\n]+|\s+|[^\s]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama2(words: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(bpe(ASCII, words, "▁"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def mistral(words: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(bpe(ASCII, words, "▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def gemma(words: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(bpe(ASCII, words, "▁"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer, template: str | None = None) -> Any:
    """The tokenizer as transformers reads it back from disk."""
    tokenizer.add_special_tokens([*SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


MODELS = {
    "gpt2": (gpt2, "Ġ", CHATML, ""),
    "llama3": (llama3, "Ġ", CHATML, ""),
    "qwen": (qwen, "Ġ", CHATML, ""),
    "llama2": (llama2, "▁", LLAMA2, "▁"),
    "mistral": (mistral, "▁", LLAMA2, "▁"),
    "gemma": (gemma, "▁", GEMMA, ""),
}
every_model = pytest.mark.parametrize(("build", "space", "template", "likely"), MODELS.values(), ids=MODELS)


@every_model
def test_every_form_that_is_one_token_is_found_and_nothing_else(
    tmp_path: Path, build: Callable[[Iterable[str]], Tokenizer], space: str, template: str, likely: str
) -> None:
    tokenizer = saved(tmp_path, build(WORDS), template)
    answers = find_answers(tokenizer)
    for ids, words in ((answers.yes, ("Yes", "yes", "YES")), (answers.no, ("No", "no", "NO"))):
        expected = [form for word in words for form in (word, space + word)]
        assert sorted(tokenizer.convert_ids_to_tokens(list(ids))) == sorted(expected)
        assert list(ids) == sorted(ids)
    assert answers.ids == answers.yes + answers.no


@every_model
def test_template_decides_whether_a_space_comes_first(
    tmp_path: Path, build: Callable[[Iterable[str]], Tokenizer], space: str, template: str, likely: str
) -> None:
    tokenizer = saved(tmp_path, build(WORDS), template)
    picked = likely_answers(tokenizer, find_answers(tokenizer))
    assert tokenizer.convert_ids_to_tokens([*picked.yes, *picked.no]) == [f"{likely}Yes", f"{likely}No"]


@every_model
def test_a_word_in_pieces_is_refused_by_name(
    tmp_path: Path, build: Callable[[Iterable[str]], Tokenizer], space: str, template: str, likely: str
) -> None:
    tokenizer = saved(tmp_path, build(("No", "no")), template)
    assert len(tokenizer.tokenize("Yes")) > 1
    with pytest.raises(EngineError, match=rf"{tmp_path.name}.*no single token for Yes,"):
        find_answers(tokenizer)


def test_neither_word_is_named_with_both(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="for Yes and No,"):
        find_answers(saved(tmp_path, gpt2(())))


def test_one_token_for_both_words_is_refused() -> None:
    class Damaged:
        name_or_path = "damaged"

        def get_vocab(self) -> dict[str, int]:
            return {"Yes": 5, "No": 5, "no": 6}

    with pytest.raises(EngineError, match=r"damaged gives Yes and No the same token \(5\)"):
        find_answers(Damaged())


def test_a_template_that_puts_something_before_the_answer_is_refused(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, llama3(WORDS), THINKING)
    answers = find_answers(tokenizer)
    with pytest.raises(EngineError, match=r"does not let the answer follow.*<think>"):
        likely_answers(tokenizer, answers, template_options={})
    picked = likely_answers(tokenizer, answers)
    assert tokenizer.convert_ids_to_tokens(list(picked.ids)) == ["Yes", "No"]


@pytest.mark.parametrize(
    ("template", "says"), [(None, "has no chat template"), ("{{ 'fixed' }}", "does not let the answer")]
)
def test_a_template_that_says_nothing_is_refused(tmp_path: Path, template: str | None, says: str) -> None:
    tokenizer = saved(tmp_path, gpt2(WORDS), template)
    with pytest.raises(EngineError, match=says):
        likely_answers(tokenizer, find_answers(tokenizer))


def test_the_packaged_model() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    answers = find_answers(tokenizer)
    for ids, word in ((answers.yes, "yes"), (answers.no, "no")):
        texts = [tokenizer.decode([i]) for i in ids]
        assert {word.title(), f" {word.title()}", word, f" {word}"} <= set(texts)
        assert {text.strip().lower() for text in texts} == {word}
    picked = likely_answers(tokenizer, answers)
    assert [tokenizer.decode([i]) for i in picked.ids] == ["Yes", "No"]
    assert len(picked.yes) == len(picked.no) == 1


FORMS = Answers(yes=(1, 4), no=(2, 5, 6))


def test_probability_sums_all_forms() -> None:
    logprobs = {1: math.log(0.3), 4: math.log(0.1), 2: math.log(0.15), 5: math.log(0.04), 6: math.log(0.01), 9: 0.0}
    assert yes_probability(logprobs, FORMS) == pytest.approx(0.4 / 0.6, rel=1e-12)
    assert yes_probability({1: 2.0, 2: 2.0}, FORMS) == pytest.approx(0.5)
    assert yes_probability(np.array([9.0, 0, 0, 9, -np.inf, -np.inf, -np.inf]), FORMS) == pytest.approx(0.5)


def test_an_absent_form_counts_as_impossible() -> None:
    assert yes_probability({4: -3.0}, FORMS) == 1.0
    assert yes_probability({6: -3.0, 0: 0.0}, FORMS) == 0.0


@pytest.mark.parametrize("logprobs", [{}, {0: -1.0}, {1: math.nan, 2: 0.0}, {1: math.inf, 2: 0.0}, np.full(7, -np.inf)])
def test_no_probability_is_made_up(logprobs: Any) -> None:
    with pytest.raises(EngineError, match=r"no probability.*1, 4, 2, 5, 6"):
        yes_probability(logprobs, FORMS)


@given(st.lists(st.floats(-1e5, 1e5), min_size=5, max_size=5), st.floats(-1e5, 1e5))
def test_any_logits_give_a_probability_that_a_shift_keeps_and_swapping_complements(
    logits: list[float], shift: float
) -> None:
    by_id = dict(zip(FORMS.ids, logits, strict=True))
    probability = yes_probability(by_id, FORMS)
    assert 0 <= probability <= 1
    array = np.zeros(7)
    array[list(FORMS.ids)] = logits
    assert yes_probability(array, FORMS) == probability
    shifted = yes_probability({i: value + shift for i, value in by_id.items()}, FORMS)
    assert shifted == pytest.approx(probability, abs=1e-9)
    assert yes_probability(by_id, Answers(FORMS.no, FORMS.yes)) == pytest.approx(1 - probability, abs=1e-9)
