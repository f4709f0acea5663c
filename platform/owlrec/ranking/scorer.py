"""Scores candidates with an LLM behind vLLM: the probability of Yes, from the logits of Yes and No alone.

ReLLa (WWW 2024) needs 500 ms a candidate, one prompt at a time. Here any number of candidates of any number of users
are one call: vLLM batches them, and reads once what the prompts of neighbours share (prompting.rella), so questions
about one user should stand side by side. The answers' tokens are asked for by id, never looked for among the likeliest,
where an unlikely answer would silently count as impossible. The last layer runs in float32: in bf16 logits of about 20
lie 0.125 apart, and half the candidates of a list would tie.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from owlrec.decoding import DecodingConfig
from owlrec.errors import EngineError
from owlrec.generation import EngineConfig, VllmEngineConfig, build_engine
from owlrec.generation.chat import render_chat
from owlrec.generation.engine import BadRow, EmptyPrompt, RowError
from owlrec.generation.models import load_tokenizer
from owlrec.generation.vllm_engine import VllmEngine
from owlrec.ranking.answers import Answers, find_answers, likely_answers, yes_probability

Question = tuple[str, str]  # system turn and user turn, as prompting.rella.rank_prompt writes them
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


class Scorer(PairScorer):
    """A vLLM engine in this process, as the model is or with an adapter."""

    def __init__(
        self,
        config: VllmEngineConfig,
        *,
        lora_rank: int | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts the engine. lora_rank: the largest of the adapters that will be asked for; None where none will.

        template_options: of the chat template, such as enable_thinking. Raises EngineError where the engine cannot
        start, or the model's Yes and No cannot be told by the first token of its answer.
        """
        self._tokenizer = load_tokenizer(config.model, config.revision)
        self._options = template_options
        self.answers = find_answers(self._tokenizer)
        likely_answers(self._tokenizer, self.answers, template_options=template_options)
        self.engine = VllmEngine(scoring_engine(config, lora_rank), DecodingConfig())
        self._in_flight = 4 * config.max_num_seqs

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    async def _ask(self, question: Question, adapter: str | None) -> tuple[float, int, int]:
        system, text = _turns(question)
        token_ids = render_chat(self._tokenizer, system, text, self._options)
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


def open_scorer(
    config: EngineConfig, *, lora_rank: int | None = None, template_options: Mapping[str, Any] | None = None
) -> PairScorer:
    """What answers Yes or No behind a recipe's engine. Arguments and errors: as of Scorer; vLLM alone reads them."""
    if isinstance(config, VllmEngineConfig):
        return Scorer(config, lora_rank=lora_rank, template_options=template_options)
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
