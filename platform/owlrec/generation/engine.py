"""The engine interface: what turns one prompt into one text, whatever runs behind it.

An engine takes single requests and batches them itself (vLLM's continuous batching, an HTTP server's), so callers
just keep enough of them in flight; no caller ever waits for the slowest row of a batch. A failed row raises a
`RowError`, which the caller writes to the dead-letter table; any other exception means that the engine itself is gone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from owlrec.config import Config
from owlrec.errors import EngineError
from owlrec_decoding import DecodingConfig
from owlrec_decoding.controller import DecoderCounters


class SamplingConfig(Config):
    """How tokens are chosen. Greedy by default: knowledge should be repeatable, and drafts from earlier texts accept
    best.
    """

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    # 1.0 = off. A penalty scans all earlier tokens of each row at each step and slows a small model markedly.
    repetition_penalty: float = Field(1.0, gt=0)


class EngineStopped(EngineError):
    """The engine itself has failed: every request in flight is lost and it must be built again."""


class RowError(EngineError):
    """One request failed for good; the engine lives on. `name` becomes the dead-letter row's error."""

    attempts = 1

    @property
    def name(self) -> str:
        """The kind of failure."""
        return type(self).__name__


class PromptTooLong(RowError):
    """Prompt and answer do not fit the model's context together."""


class EmptyPrompt(RowError):
    """The row gave nothing to ask about: no title, no behaviour."""


class BadRow(RowError):
    """The row itself cannot be read: a wrong type, invalid text, a page in place of a title."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self._name = name

    @property
    def name(self) -> str:
        """What is wrong with the row."""
        return self._name


class RequestFailed(RowError):
    """The server failed the request after all attempts."""

    def __init__(self, message: str, attempts: int = 1) -> None:
        super().__init__(message)
        self.attempts = attempts


class RequestRefused(RequestFailed):
    """The server or vLLM will not take the request, however often it is sent."""


class RequestTimedOut(RequestFailed):
    """No answer came in time, in any attempt."""


class FailedQuality(RequestFailed):
    """The quality gate dropped the answer."""


@dataclass(frozen=True)
class Completion:
    """An engine's answer. Draft counts are 0 where no speculative decoder ran."""

    text: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str  # "stop" (the model ended) or "length" (max_tokens reached)
    drafted: int = 0
    accepted: int = 0
    relaxed: int = 0

    def after(self, discarded: "Completion") -> "Completion":
        """This answer, with the tokens of an earlier one that was thrown away counted in."""
        counts = ("prompt_tokens", "output_tokens", "drafted", "accepted", "relaxed")
        return replace(self, **{name: getattr(self, name) + getattr(discarded, name) for name in counts})


class Engine(ABC):
    """One LLM, ready to answer. Made by `build_engine`, closed by `close`."""

    counters: DecoderCounters | None = None  # of the speculative decoder since the start; None where none runs

    @abstractmethod
    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        """The answer to `prompt` after the system turn `system` ("" for the model's own).

        extra: vLLM's `extra_args` of this request (see decoding.request_arguments); other engines ignore it.
        Raises RowError where this request fails for good.
        """

    async def first_tokens(self, system: str, prompt: str) -> list[tuple[str, float]]:
        """Texts of the likeliest first tokens of the answer with their log-probabilities, at least one.

        Raises RowError where this request fails for good, EngineError where the engine does not tell.
        """
        raise EngineError(f"{type(self).__name__} does not tell how likely its tokens are. Ask vLLM or an HTTP server.")

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens of `text` alone, by the model's tokenizer or a close upper estimate."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Frees what the engine holds. Safe to call twice."""


class EngineConfig(Config):
    """What a recipe says of an engine. A new engine is a file with a subclass, and a line in `generation.ENGINES`."""

    shapes_output: ClassVar[tuple[str, ...]]  # the fields that answers depend on: no batch size, threads or time-outs

    type: str  # of a subclass: a Literal of its name in ENGINES
    max_model_len: int = 8192  # tokens of a prompt and its answer together, at most

    def shaping(self) -> dict[str, Any]:
        """What answers depend on besides the weights, as JSON can hold it."""
        return self.model_dump(mode="json", include=set(self.shapes_output))

    @property
    @abstractmethod
    def model_identity(self) -> str:
        """Names the weights that answer, for fingerprints."""

    @abstractmethod
    def start(self, decoding: DecodingConfig) -> Engine:
        """The engine, ready to answer. Raises EngineError where it cannot start.

        decoding: how vLLM drafts and verifies; other engines ignore it.
        """

    @abstractmethod
    def token_counter(self) -> Callable[[str], int]:
        """What counts tokens as the engine would, without starting it."""


def check_length(prompt_tokens: int, sampling: SamplingConfig, context_tokens: int) -> None:
    """Raises PromptTooLong where the prompt leaves no room for `max_tokens` more."""
    if prompt_tokens + sampling.max_tokens > context_tokens:
        raise PromptTooLong(
            f"prompt has {prompt_tokens} tokens, with max_tokens {sampling.max_tokens} that exceeds the context of "
            f"{context_tokens}. Lower prompts.history_tokens or raise engine.max_model_len."
        )
