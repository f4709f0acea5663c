"""An engine as somebody would add it: it says a text of its own, whatever is asked. `ENGINES` gets one line for it."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from owlrec.generation.engines import Completion, Engine, EngineConfig, SamplingConfig
from owlrec_decoding import DecodingConfig


class ParrotConfig(EngineConfig):
    """What it says, and how many feathers it has, which changes no answer."""

    shapes_output: ClassVar[tuple[str, ...]] = ("type", "words")

    type: Literal["parrot"]
    words: str
    feathers: int = 3000

    @property
    def model_identity(self) -> str:
        return "parrot"

    def start(self, decoding: DecodingConfig) -> "Parrot":
        return Parrot(self)

    def token_counter(self) -> Callable[[str], int]:
        return len


class Parrot(Engine):
    """A token is a character."""

    def __init__(self, config: ParrotConfig) -> None:
        self.config = config

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        return Completion(self.config.words, len(prompt), len(self.config.words), "stop")

    def count_tokens(self, text: str) -> int:
        return len(text)
