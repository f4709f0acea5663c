"""A deterministic engine without a model: it answers with words of the prompt, for tests and for scale runs of
everything around it.

The answer depends on the prompt alone, so two runs must agree to the byte. It is never the default: knowledge from it
is worthless.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from owlrec.config import Config
from owlrec.generation.engine import Completion, Engine, SamplingConfig, check_length


class EchoEngineConfig(Config):
    """How long answers take."""

    shapes_output: ClassVar[tuple[str, ...]] = ("type",)

    type: Literal["echo"]
    max_model_len: int = 4096
    latency_s: float = 0.0  # a whole answer's time


class EchoEngine(Engine):
    """Answers with a digest and the first words of the prompt; a token is a blank-separated word."""

    def __init__(self, config: EchoEngineConfig) -> None:
        self.config = config
        self.identity = "echo"
        self.context_tokens = config.max_model_len

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        """See Engine.complete."""
        n_prompt = self.count_tokens(system) + self.count_tokens(prompt)
        check_length(n_prompt, sampling, self.context_tokens)
        if self.config.latency_s:
            await asyncio.sleep(self.config.latency_s)
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        words = [f"echo-{digest}", *prompt.split()]
        cut = words[: sampling.max_tokens]
        return Completion(" ".join(cut), n_prompt, len(cut), "length" if len(words) > len(cut) else "stop")

    def count_tokens(self, text: str) -> int:
        """Blank-separated words."""
        return len(text.split())
