"""The engine interface: turns one prompt into one text, with any backend.

An engine takes single requests and batches them itself (vLLM's continuous batching, or an HTTP server's), so callers
only keep enough of them in flight and never wait for the slowest row of a batch. A failed row raises a
`RowError`, which the caller writes to the dead-letter table; any other exception means that the engine itself is dead.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field, field_validator

from owlrec.config import Config
from owlrec.errors import EngineError
from owlrec_decoding import DecodingConfig
from owlrec_decoding.controller import DecoderCounters

# By SamplingConfig itself, by the engines, or by requests.
_SET_ELSEWHERE = {
    *("max_tokens", "temperature", "output_kind", "extra_args", "model", "messages", "stream", "n", "vllm_xargs"),
    *("logprobs", "top_logprobs"),
}


class SamplingConfig(Config):
    """Sampling of tokens. Greedy by default: knowledge should be repeatable, and drafts from earlier texts are accepted
    most often.
    """

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0)
    # Whatever else vLLM's SamplingParams take, or an HTTP server: {top_p: 0.8}. A repetition_penalty scans all earlier
    # tokens of each row at each step and slows a small model noticeably.
    options: dict[str, float | int | bool | str] = {}

    @field_validator("options")
    @classmethod
    def _others(cls, options: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_SET_ELSEWHERE & set(options)):
            raise ValueError(f"{', '.join(taken)} cannot stand here")
        return options


class EngineStopped(EngineError):
    """The engine itself has failed: every request in flight is lost and it must be rebuilt."""


class RowError(EngineError):
    """One request failed permanently; the engine keeps running. `name` becomes the dead-letter row's error."""

    attempts = 1

    @property
    def name(self) -> str:
        """The kind of failure."""
        return type(self).__name__


class PromptTooLong(RowError):
    """The prompt and its answer together do not fit the model's context."""


class EmptyPrompt(RowError):
    """The row has nothing for a prompt: no title, no behavior."""


class BadRow(RowError):
    """The row itself is unreadable: a wrong type, invalid text, a page instead of a title."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self._name = name

    @property
    def name(self) -> str:
        """The fault of the row."""
        return self._name


class RequestFailed(RowError):
    """The server failed the request after all attempts."""

    def __init__(self, message: str, attempts: int = 1) -> None:
        super().__init__(message)
        self.attempts = attempts


class RequestRefused(RequestFailed):
    """The server or vLLM will never accept the request."""


class RequestTimedOut(RequestFailed):
    """No answer arrived in time in any attempt."""


class FailedQuality(RequestFailed):
    """The quality gate dropped the answer."""


@dataclass(frozen=True)
class Completion:
    """An engine's answer. Draft counts are 0 without a speculative decoder."""

    text: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str  # "stop" (the model ended) or "length" (max_tokens reached)
    drafted: int = 0
    accepted: int = 0
    relaxed: int = 0

    def after(self, discarded: "Completion") -> "Completion":
        """This answer plus the token counts of an earlier, discarded one."""
        counts = ("prompt_tokens", "output_tokens", "drafted", "accepted", "relaxed")
        return replace(self, **{name: getattr(self, name) + getattr(discarded, name) for name in counts})


class Engine(ABC):
    """One LLM, ready to answer. Created by `build_engine`, closed by `close`."""

    counters: DecoderCounters | None = None  # of the speculative decoder since the start; None without one

    @abstractmethod
    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        """The answer to `prompt` after the system turn `system` ("" for the model's own).

        extra: vLLM's `extra_args` of this request (see decoding.request_arguments); other engines ignore it.
        Raises RowError if this request fails permanently.
        """

    async def first_tokens(self, system: str, prompt: str) -> list[tuple[str, float]]:
        """Texts of the most likely first tokens of the answer with their log-probabilities, at least one.

        Raises RowError if this request fails permanently, and EngineError if the engine does not return them.
        """
        raise EngineError(f"{type(self).__name__} does not return token probabilities. Use vLLM or an HTTP server.")

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens of `text` alone, from the model's tokenizer or a close upper estimate."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Frees the engine's resources. Safe to call twice."""


class EngineConfig(Config):
    """A recipe's engine section. A new engine is a file with a subclass, and a line in `generation.ENGINES`."""

    shapes_output: ClassVar[tuple[str, ...]]  # fields that change answers: not batch size, threads or time-outs

    type: str  # in a subclass: a Literal of its name in ENGINES
    max_model_len: int = 8192  # maximum tokens of a prompt and its answer together

    def shaping(self) -> dict[str, Any]:
        """Everything besides the weights that answers depend on, in JSON types."""
        return self.model_dump(mode="json", include=set(self.shapes_output))

    @property
    @abstractmethod
    def model_identity(self) -> str:
        """Name of the weights, for fingerprints."""

    @abstractmethod
    def start(self, decoding: DecodingConfig) -> Engine:
        """Starts the engine. Raises EngineError if it cannot start.

        decoding: drafting and verification in vLLM; other engines ignore it.
        """

    @abstractmethod
    def token_counter(self) -> Callable[[str], int]:
        """Function that counts tokens like the engine, without starting it."""


def check_length(prompt_tokens: int, sampling: SamplingConfig, context_tokens: int) -> None:
    """Raises PromptTooLong if the prompt leaves no room for `max_tokens` more."""
    if prompt_tokens + sampling.max_tokens > context_tokens:
        raise PromptTooLong(
            f"prompt has {prompt_tokens} tokens; together with max_tokens {sampling.max_tokens} it exceeds the "
            f"context of {context_tokens}. Lower prompts.history_tokens or raise engine.max_model_len."
        )
