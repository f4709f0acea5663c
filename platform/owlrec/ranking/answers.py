"""Which tokens say Yes and which No, and the probability of Yes that follows from their logits (ReLLa, WWW 2024).

The released code has Llama's two token ids written into it, so that any other model silently scores nonsense. Here they
are looked up in the model's own vocabulary, in every casing, with and without the space that tokenizers keep at the
front of a word. All are summed: a chat template makes one form likely, but a model that hesitates spreads its answer
over several.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from owlrec.errors import EngineError

_SPACES = ("", " ", "Ġ", "▁")  # at the front of a token: byte-level BPE writes a space as Ġ, SentencePiece as ▁


@dataclass(frozen=True)
class Answers:
    """Token ids, ascending; no id says both."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids, those of yes first: what to ask of an engine (vLLM's `logprob_token_ids`)."""
        return self.yes + self.no


def find_answers(tokenizer: Any) -> Answers:
    """The ids of all tokens of a transformers tokenizer that are the word yes, or the word no, whole.

    Raises EngineError where a word has no token of its own, or the two share one.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    yes, no = (_ids_of(word, vocabulary) for word in ("yes", "no"))
    if not yes or not no:
        missing = " and ".join(word for word, ids in (("Yes", yes), ("No", no)) if not ids)
        raise EngineError(
            f"the tokenizer {_name(tokenizer)} has no single token for {missing}, so the first token of an answer does "
            "not tell it. Rank with a model whose tokenizer has both, such as those of Llama, Qwen, Mistral, Gemma or "
            "SmolLM."
        )
    if shared := set(yes) & set(no):
        raise EngineError(
            f"the tokenizer {_name(tokenizer)} gives Yes and No the same token ({min(shared)}). Its vocabulary is "
            "damaged: copy the model's tokenizer files again, or rank with another model."
        )
    return Answers(yes, no)


def likely_answers(tokenizer: Any, answers: Answers, *, template_options: Mapping[str, Any] | None = None) -> Answers:
    """The one id of each answer that the chat template makes likely: what a model tuned on the template has learnt to
    say first.

    Found by rendering a conversation with either answer: ChatML's header ends a line, so that Yes follows without a
    space; Llama 2's ends in a bracket, and a space follows. template_options: of the chat template, such as
    enable_thinking. Raises EngineError where the tokenizer has no chat template, or the first token after the
    assistant's header is none of `answers`, as where a thinking block opens there: the scorer would read the wrong
    place.
    """
    if not tokenizer.chat_template:
        raise EngineError(
            f"the tokenizer {_name(tokenizer)} has no chat template. Name the instruction-tuned model of the family."
        )
    options = {"tokenize": True, "return_dict": False, **(template_options or {})}
    asked = [{"role": "user", "content": "?"}]
    opened = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options))
    yes, no = (
        list(tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": word}], **options))
        for word in ("Yes", "No")
    )
    start = len(opened)
    found = Answers(tuple(yes[start : start + 1]), tuple(no[start : start + 1]))
    follows = yes[:start] == no[:start] == opened
    if not follows or not set(found.yes) & set(answers.yes) or not set(found.no) & set(answers.no):
        raise EngineError(
            f"the chat template of {_name(tokenizer)} lets no answer follow the assistant's header at once; a "
            f"conversation reads {tokenizer.decode(yes)!r}. Switch its thinking block off (enable_thinking: false, "
            "where the template knows it), or rank with another model."
        )
    return found


def yes_probability(logprobs: Mapping[int, float] | np.ndarray, answers: Answers) -> float:
    """exp(yes) / (exp(yes) + exp(no)), each summed over all its tokens.

    logprobs: logits or log-probabilities by token id, of which only the answers' count: an array [vocabulary], or a
    mapping, which may hold the most likely ones only. An id that is absent counts as impossible: where all tokens of
    one answer are, the result is 0 or 1. So ask an engine for `answers.ids` rather than for its most likely tokens.
    Raises EngineError where all tokens of both are absent, or a score is not a number.
    """
    with np.errstate(invalid="ignore"):  # what is not a number is refused below
        yes, no = (_sum_exp(logprobs, ids) for ids in (answers.yes, answers.no))
        either = float(np.logaddexp(yes, no))
    if not math.isfinite(either):
        raise EngineError(
            f"the model's scores of Yes and No are {yes} and {no}: no probability follows. Ask the engine for the "
            f"log-probabilities of tokens {', '.join(map(str, answers.ids))}; if it gave them, its weights are damaged."
        )
    return math.exp(yes - either)


def _ids_of(word: str, vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    casings = map("".join, itertools.product(*((letter, letter.upper()) for letter in word)))
    forms = (space + casing for casing, space in itertools.product(casings, _SPACES))
    return tuple(sorted({vocabulary[form] for form in forms if form in vocabulary}))


def _sum_exp(logprobs: Mapping[int, float] | np.ndarray, ids: tuple[int, ...]) -> float:
    """The logarithm of the sum of the exponentials; -inf for nothing."""
    values = [logprobs.get(i, -math.inf) for i in ids] if isinstance(logprobs, Mapping) else logprobs[list(ids)]
    return float(np.logaddexp.reduce(np.asarray(values, dtype=np.float64)))


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
