"""Scores candidates with an LLM behind vLLM: the probability of Yes, from only the logits of Yes and No.

ReLLa (WWW 2024) needs 500 ms per candidate, one prompt at a time. Here any number of candidates of any number of users
are one call: vLLM batches them and reads shared prefixes of neighbors once (prompting.frameworks), so prompts
about one user should be adjacent. The answers' tokens are requested by id, never searched among the most likely ones,
where an unlikely answer would silently count as impossible. The last layer runs in float32: in bf16, logits of about 20
are 0.125 apart, and half the candidates of a list would tie.
"""

import asyncio
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from owlrec.errors import EngineError
from owlrec.generation import EngineConfig, VllmEngineConfig, build_engine
from owlrec.generation.engines import BadRow, EmptyPrompt, RowError, load_tokenizer
from owlrec.generation.vllm_engine import VllmEngine
from owlrec_decoding import DecodingConfig

# -------------------------------------------------------------------------------------------------------------- answers
# Token ids of Yes and No, and the probability of Yes from their logits (ReLLa, WWW 2024).
#
# The released code hard-codes Llama's two token ids, so any other model silently scores nonsense. Here
# they are looked up in the model's own vocabulary, in every casing, with and without the space that tokenizers keep at
# the front of a word. All are summed: a chat template makes one form likely, but a model that hesitates spreads its
# answer over several.


# An answer is one token, so thinking must not come first; chat templates without such a switch ignore it.
TEMPLATE_OPTIONS: Mapping[str, Any] = {"enable_thinking": False}
_SPACES = ("", " ", "Ġ", "▁")  # at the front of a token: byte-level BPE writes a space as Ġ, SentencePiece as ▁


@dataclass(frozen=True)
class Answers:
    """Token ids, ascending; no id is in both."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids, those of yes first: the ids to request from an engine (vLLM's `logprob_token_ids`)."""
        return self.yes + self.no


def find_answers(tokenizer: Any) -> Answers:
    """Ids of all tokens of a transformers tokenizer that are the complete word yes, or no.

    Raises EngineError if a word has no token of its own, or the two share one.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    yes, no = (_ids_of(word, vocabulary) for word in ("yes", "no"))
    if not yes or not no:
        missing = " and ".join(word for word, ids in (("Yes", yes), ("No", no)) if not ids)
        raise EngineError(
            f"the tokenizer {_name(tokenizer)} has no single token for {missing}, so the first token of an "
            "answer does not identify it. Use a model whose tokenizer has both, such as those of Llama, Qwen, "
            "Mistral, Gemma or SmolLM."
        )
    if shared := set(yes) & set(no):
        raise EngineError(
            f"the tokenizer {_name(tokenizer)} gives Yes and No the same token ({min(shared)}). Its vocabulary "
            "is damaged: copy the model's tokenizer files again, or use another model."
        )
    return Answers(yes, no)


def likely_answers(
    tokenizer: Any, answers: Answers, *, template_options: Mapping[str, Any] = TEMPLATE_OPTIONS
) -> Answers:
    """The one id of each answer that the chat template makes likely: the first token that a model tuned on the template
    says.

    Found by rendering a conversation with either answer: ChatML's header ends a line, so Yes follows without a
    space; Llama 2's ends in a bracket, and a space follows. Raises EngineError if the tokenizer has no
    chat template, or if the first token after the assistant's header is none of `answers`, as when a thinking block
    opens there: the scorer would read the wrong place.
    """
    if not tokenizer.chat_template:
        raise EngineError(
            f"the tokenizer {_name(tokenizer)} has no chat template. Use the instruction-tuned version of the model."
        )
    options = {"tokenize": True, "return_dict": False, **template_options}
    asked = [{"role": "user", "content": "?"}]
    opened = list(tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options))
    yes, no = (
        list(tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": word}], **options))
        for word in ("Yes", "No")
    )
    start = len(opened)
    likely = Answers(tuple(yes[start : start + 1]), tuple(no[start : start + 1]))
    follows = yes[:start] == no[:start] == opened
    if not follows or not set(likely.yes) & set(answers.yes) or not set(likely.no) & set(answers.no):
        raise EngineError(
            f"the chat template of {_name(tokenizer)} does not let the answer follow the assistant's header "
            f"directly; a conversation reads {tokenizer.decode(yes)!r}. Its thinking block cannot be turned "
            "off (enable_thinking: false): use another model."
        )
    return likely


def yes_probability(logprobs: Mapping[int, float] | np.ndarray, answers: Answers) -> float:
    """exp(yes) / (exp(yes) + exp(no)), each summed over all its tokens.

    logprobs: logits or log-probabilities by token id, of which only the answers' count: an array [vocabulary], or a
    mapping, which may have only the most likely ones. A missing id counts as impossible: if all tokens of
    one answer are missing, the result is 0 or 1. So request `answers.ids` from an engine rather than its most likely
    tokens. Raises EngineError if all tokens of both are missing, or a score is not a number.
    """
    with np.errstate(invalid="ignore"):  # non-numbers are refused below
        yes, no = (_sum_exp(logprobs, ids) for ids in (answers.yes, answers.no))
        either = float(np.logaddexp(yes, no))
    if not math.isfinite(either):
        raise EngineError(
            f"the model's scores of Yes and No are {yes} and {no}, which give no probability. Request the "
            f"log-probabilities of tokens {', '.join(map(str, answers.ids))} from the engine; if it returned "
            "them, its weights are damaged."
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
_ASKED_AT_ONCE = 256  # prompts in flight for an engine that batches by itself
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM 0.32 supports


@dataclass(frozen=True)
class Scores:
    """Result of `Scorer.score`, aligned with its questions."""

    probabilities: np.ndarray  # float64 [n], of Yes; nan for failed prompts
    failures: Mapping[int, RowError]  # by position: a candidate without text, a prompt too long for the context
    prompt_tokens: int
    cached_tokens: int  # of these, reused from the cache


class PairScorer(ABC):
    """Scores prompts with Yes or No; keeps enough of them in flight for its engine to batch."""

    _in_flight: int  # prompts in flight: enough to batch, without all prompts of a call in memory

    async def score(
        self,
        questions: Sequence[Question],
        adapter: str | None = None,
        on_scored: Callable[[int], None] | None = None,
    ) -> Scores:
        """Probabilities of Yes. adapter: a LoRA folder from `tuning`. on_scored: called with 1 for each.

        Raises EngineStopped if the engine itself has failed; a fault of one question fails only that question.
        """
        probabilities = np.full(len(questions), np.nan)
        failures: dict[int, RowError] = {}
        tokens = np.zeros((len(questions), 2), dtype=np.int64)
        room = asyncio.Semaphore(self._in_flight)

        async def one(place: int, question: Question) -> None:
            async with room:
                try:
                    answer = await self._ask(question, adapter)
                except RowError as error:
                    failures[place] = error
                else:
                    probabilities[place], *tokens[place] = answer
                if on_scored:
                    on_scored(1)

        async with asyncio.TaskGroup() as group:
            for place, question in enumerate(questions):
                group.create_task(one(place, question))
        prompt_tokens, cached_tokens = tokens.sum(axis=0).tolist()
        return Scores(probabilities, failures, prompt_tokens, cached_tokens)

    @abstractmethod
    async def _ask(self, question: Question, adapter: str | None) -> tuple[float, int, int]:
        """The probability, the prompt's tokens, and how many of them came from the cache."""

    @abstractmethod
    def close(self) -> None:
        """Stops the engine."""


class LlmScorer(PairScorer):
    """A vLLM engine in this process, untuned or with an adapter."""

    def __init__(self, config: VllmEngineConfig, *, lora_rank: int | None = None) -> None:
        """Starts the engine. lora_rank: the largest rank of the adapters to be used; None for none.

        Raises EngineError if the engine cannot start, or if the first token of an answer does not separate the model's
        Yes and No.
        """
        tokenizer = load_tokenizer(config.model, config.revision)
        self.answers = find_answers(tokenizer)
        likely_answers(tokenizer, self.answers)
        self.engine = VllmEngine(scoring_engine(config, lora_rank), DecodingConfig())
        self._in_flight = 4 * self.engine.size.rows

    def close(self) -> None:
        """Stops the engine."""
        self.engine.close()

    async def _ask(self, question: Question, adapter: str | None) -> tuple[float, int, int]:
        system, text = _turns(question)
        token_ids = await self.engine.token_ids(system, text, TEMPLATE_OPTIONS)
        answer = await self.engine.next_token_scores(token_ids, self.answers.ids, adapter)
        scores = dict(zip(self.answers.ids, answer.scores, strict=True))
        return yes_probability(scores, self.answers), answer.prompt_tokens, answer.cached_tokens


class TokenScorer(PairScorer):
    """Any engine that returns the probabilities of its answer's first tokens, such as an HTTP server.

    A server returns only the most likely tokens. If one of the two answers is not among them, its probability is taken
    to be that of the least likely returned token, which is an upper bound.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Raises EngineError if the engine cannot start."""
        self.engine = build_engine(config)
        self._in_flight = _ASKED_AT_ONCE

    def close(self) -> None:
        """Stops the engine."""
        self.engine.close()

    async def _ask(self, question: Question, adapter: str | None) -> tuple[float, int, int]:
        if adapter is not None:
            raise EngineError(f"{type(self.engine).__name__} does not support adapters. Use vLLM.")
        candidates = await self.engine.first_tokens(*_turns(question))
        ids = {word: [i for i, (t, _) in enumerate(candidates) if t.strip().lower() == word] for word in ("yes", "no")}
        if not ids["yes"] and not ids["no"]:
            raise BadRow(f"neither Yes nor No is among the likeliest tokens: {[t for t, _ in candidates]}", "NoAnswer")
        scores = {i: logprob for i, (_, logprob) in enumerate(candidates)}
        scores[len(candidates)] = min(scores.values())
        yes, no = (tuple(ids[word]) or (len(candidates),) for word in ("yes", "no"))
        return yes_probability(scores, Answers(yes, no)), 0, 0


def open_scorer(config: EngineConfig, *, lora_rank: int | None = None) -> PairScorer:
    """Scorer for a recipe's engine. Arguments and errors: see Scorer; only vLLM uses them."""
    if isinstance(config, VllmEngineConfig):
        return LlmScorer(config, lora_rank=lora_rank)
    return TokenScorer(config)


def _turns(question: Question) -> Question:
    if not question[1]:
        raise EmptyPrompt("the candidate has no title, so it has no prompt. Add a title.")
    return question


def scoring_engine(config: VllmEngineConfig, lora_rank: int | None = None) -> VllmEngineConfig:
    """`config` with the settings for scoring: raw logits, a last layer in float32, room for an adapter.

    Settings in engine_args take precedence. Raises EngineError for a rank that vLLM does not support.
    """
    own = config.engine_args
    args = {"logprobs_mode": "raw_logits", **own}
    args["hf_overrides"] = {"head_dtype": "float32", **own.get("hf_overrides", {})}
    if lora_rank is not None:
        room = next((rank for rank in _LORA_RANKS if rank >= lora_rank), None)
        if room is None:
            raise EngineError(f"the adapter's rank is {lora_rank}, but vLLM supports at most {_LORA_RANKS[-1]}.")
        args = {"enable_lora": True, "max_lora_rank": room, **args}
    return config.model_copy(update={"engine_args": args})
