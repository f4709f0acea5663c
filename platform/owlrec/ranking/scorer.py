"""Scores candidates with an LLM behind vLLM: the probability of Yes, from the logits of Yes and No alone.

ReLLa (WWW 2024) needs 500 ms a candidate, one prompt at a time. Here any number of candidates of any number of users
are one call: vLLM batches them, and reads once what the prompts of neighbours share (prompting.rella), so questions
about one user should stand side by side. The answers' tokens are asked for by id, never looked for among the likeliest,
where an unlikely answer would silently count as impossible. The last layer runs in float32: in bf16 logits of about 20
lie 0.125 apart, and half the candidates of a list would tie.
"""

import asyncio
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from owlrec.decoding import DecodingConfig
from owlrec.errors import EngineError
from owlrec.generation import EngineConfig, VllmEngineConfig, build_engine
from owlrec.generation.engines import BadRow, EmptyPrompt, RowError, load_tokenizer, render_chat
from owlrec.generation.vllm_engine import VllmEngine

# -------------------------------------------------------------------------------------------------------------- answers
# Which tokens say Yes and which No, and the probability of Yes that follows from their logits (ReLLa, WWW 2024).
#
# The released code has Llama's two token ids written into it, so that any other model silently scores nonsense. Here
# they are looked up in the model's own vocabulary, in every casing, with and without the space that tokenizers keep at
# the front of a word. All are summed: a chat template makes one form likely, but a model that hesitates spreads its
# answer over several.


# An answer is one token, so thinking must not come first; chat templates that know no such switch ignore it.
TEMPLATE_OPTIONS: Mapping[str, Any] = {"enable_thinking": False}
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


def likely_answers(
    tokenizer: Any, answers: Answers, *, template_options: Mapping[str, Any] = TEMPLATE_OPTIONS
) -> Answers:
    """The one id of each answer that the chat template makes likely: what a model tuned on the template has learnt to
    say first.

    Found by rendering a conversation with either answer: ChatML's header ends a line, so that Yes follows without a
    space; Llama 2's ends in a bracket, and a space follows. Raises EngineError where the tokenizer has no
    chat template, or the first token after the assistant's header is none of `answers`, as where a thinking block opens
    there: the scorer would read the wrong place.
    """
    if not tokenizer.chat_template:
        raise EngineError(
            f"the tokenizer {_name(tokenizer)} has no chat template. Name the instruction-tuned model of the family."
        )
    options = {"tokenize": True, "return_dict": False, **template_options}
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
            f"conversation reads {tokenizer.decode(yes)!r}. Its thinking block cannot be switched off "
            "(enable_thinking: false): rank with another model."
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


# --------------------------------------------------------------------------------------------------------------- scorer


Question = tuple[str, str]  # system turn and user turn, as prompting.frameworks.rank_prompt writes them
_ASKED_AT_ONCE = 256  # of an engine that batches by itself
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 has room for


@dataclass(frozen=True)
class Scores:
    """What a call of `Scorer.score` found, aligned with its questions."""

    probabilities: np.ndarray  # float64 [n], of Yes; nan where the question failed
    failures: Mapping[int, RowError]  # by position: a candidate without text, a prompt too long for the context
    prompt_tokens: int
    cached_tokens: int  # of these, that were not computed again


class PairScorer(ABC):
    """What answers Yes or No; it keeps enough questions in flight for its engine to batch them."""

    _in_flight: int  # questions at once: enough to batch, without all prompts of a call in memory

    async def score(
        self,
        questions: Sequence[Question],
        adapter: str | None = None,
        on_scored: Callable[[int], None] | None = None,
    ) -> Scores:
        """The probabilities of Yes. adapter: a LoRA folder, as `tuning` leaves it. on_scored: called with 1 for each.

        Raises EngineStopped where the engine itself has failed; what is wrong with one question fails that alone.
        """
        probabilities = np.full(len(questions), np.nan)
        failures: dict[int, RowError] = {}
        tokens = np.zeros((len(questions), 2), dtype=np.int64)
        room = asyncio.Semaphore(self._in_flight)

        async def one(place: int, question: Question) -> None:
            async with room:
                try:
                    found = await self._ask(question, adapter)
                except RowError as error:
                    failures[place] = error
                else:
                    probabilities[place], *tokens[place] = found
                if on_scored:
                    on_scored(1)

        async with asyncio.TaskGroup() as group:
            for place, question in enumerate(questions):
                group.create_task(one(place, question))
        prompt_tokens, cached_tokens = tokens.sum(axis=0).tolist()
        return Scores(probabilities, failures, prompt_tokens, cached_tokens)

    @abstractmethod
    async def _ask(self, question: Question, adapter: str | None) -> tuple[float, int, int]:
        """The probability, the prompt's tokens and those of them that were kept from before."""

    @abstractmethod
    def close(self) -> None:
        """Ends the engine."""


class LlmScorer(PairScorer):
    """A vLLM engine in this process, as the model is or with an adapter."""

    def __init__(self, config: VllmEngineConfig, *, lora_rank: int | None = None) -> None:
        """Starts the engine. lora_rank: the largest of the adapters that will be asked for; None where none will.

        Raises EngineError where the engine cannot start, or the model's Yes and No cannot be told by the first token of
        its answer.
        """
        self._tokenizer = load_tokenizer(config.model, config.revision)
        self.answers = find_answers(self._tokenizer)
        likely_answers(self._tokenizer, self.answers)
        self.engine = VllmEngine(scoring_engine(config, lora_rank), DecodingConfig())
        self._in_flight = 4 * config.max_num_seqs

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    async def _ask(self, question: Question, adapter: str | None) -> tuple[float, int, int]:
        system, text = _turns(question)
        token_ids = render_chat(self._tokenizer, system, text, TEMPLATE_OPTIONS)
        found = await self.engine.next_token_scores(token_ids, self.answers.ids, adapter)
        scores = dict(zip(self.answers.ids, found.scores, strict=True))
        return yes_probability(scores, self.answers), found.prompt_tokens, found.cached_tokens


class TokenScorer(PairScorer):
    """Any engine that tells how likely the first tokens of its answer are: an HTTP server, say.

    A server tells the likeliest tokens only. Where one of the two answers is not among them, it is taken to be as
    likely as the least likely one that was told: an upper bound.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Raises EngineError where the engine cannot start."""
        self.engine = build_engine(config)
        self._in_flight = _ASKED_AT_ONCE

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    async def _ask(self, question: Question, adapter: str | None) -> tuple[float, int, int]:
        if adapter is not None:
            raise EngineError(f"{type(self.engine).__name__} takes no adapter. Rank with vLLM.")
        found = await self.engine.first_tokens(*_turns(question))
        ids = {word: [i for i, (t, _) in enumerate(found) if t.strip().lower() == word] for word in ("yes", "no")}
        if not ids["yes"] and not ids["no"]:
            raise BadRow(f"neither Yes nor No is among the likeliest tokens: {[t for t, _ in found]}", "NoAnswer")
        scores = {i: logprob for i, (_, logprob) in enumerate(found)}
        scores[len(found)] = min(scores.values())
        yes, no = (tuple(ids[word]) or (len(found),) for word in ("yes", "no"))
        return yes_probability(scores, Answers(yes, no)), 0, 0


def open_scorer(config: EngineConfig, *, lora_rank: int | None = None) -> PairScorer:
    """What answers Yes or No behind a recipe's engine. Arguments and errors: as of Scorer; vLLM alone reads them."""
    if isinstance(config, VllmEngineConfig):
        return LlmScorer(config, lora_rank=lora_rank)
    return TokenScorer(config)


def _turns(question: Question) -> Question:
    if not question[1]:
        raise EmptyPrompt("the candidate has no title, so there is nothing to ask about. Give the item a title.")
    return question


def scoring_engine(config: VllmEngineConfig, lora_rank: int | None = None) -> VllmEngineConfig:
    """`config` with what scoring needs: raw logits, a last layer in float32, room for an adapter.

    What engine_args says of its own stands. Raises EngineError for a rank that vLLM has no room for.
    """
    own = config.engine_args
    args = {"logprobs_mode": "raw_logits", **own}
    args["hf_overrides"] = {"head_dtype": "float32", **own.get("hf_overrides", {})}
    if lora_rank is not None:
        room = next((rank for rank in _LORA_RANKS if rank >= lora_rank), None)
        if room is None:
            raise EngineError(f"the adapter's rank is {lora_rank}, but vLLM takes {_LORA_RANKS[-1]} at most.")
        args = {"enable_lora": True, "max_lora_rank": room, **args}
    return config.model_copy(update={"engine_args": args})
