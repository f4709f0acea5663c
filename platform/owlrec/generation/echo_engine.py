"""A deterministic engine without a model: it answers a digest of the prompt and words that the digest chooses.

It is for tests, and for scale runs of everything around an engine.
The answer depends on the prompt alone, so two runs must agree to the byte, and it passes the quality gate as a good
text of its length does. It is never the default: knowledge from it is worthless.
"""

import asyncio
import hashlib
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from owlrec.decoding import DecodingConfig
from owlrec.generation.engine import Completion, Engine, EngineConfig, SamplingConfig, check_length

_VOCABULARY = """
amber bright calm daring early faint gentle humble icy jolly keen light mellow noble odd plain quiet rapid sober
tender urban vivid warm young ancient blunt crisp dense eager frank grave harsh idle just kind loose modest narrow
open proud queer rough sharp thin usual vast wild zealous above across along around before behind beneath beside
between beyond during inside near outside over past since through toward under until upon within without anchor basket
candle desert engine forest garden harbour island jacket kitchen ladder mirror needle orchard pillar quarry river
shelter tunnel valley window bridge cabin door echo field gate hill lamp meadow night ocean path rain stone tower wave
bends carries drifts enters follows gathers holds invites joins keeps leads mends needs offers passes questions
returns settles turns unites visits waits yields answers builds climbs divides expects finds grows
"""
_ONE_TOKEN = SamplingConfig(max_tokens=1)
_SENTENCE = 15  # words; sentences drawn at random repeat themselves as little as good texts do
_DRAW = random.Random(0)
_SENTENCES = [" ".join(_DRAW.sample(_VOCABULARY.split(), _SENTENCE)) + "." for _ in range(1 << 12)]


class EchoEngineConfig(EngineConfig):
    """How long answers are and take."""

    shapes_output: ClassVar[tuple[str, ...]] = ("type", "answer_tokens")

    type: Literal["echo"]
    max_model_len: int = 4096
    latency_s: float = 0.0  # a whole answer's time
    answer_tokens: int = 60  # about; never more than sampling.max_tokens

    @property
    def model_identity(self) -> str:
        """See EngineConfig.model_identity."""
        return "echo"

    def start(self, decoding: DecodingConfig) -> "EchoEngine":
        """See EngineConfig.start."""
        return EchoEngine(self)

    def token_counter(self) -> Callable[[str], int]:
        """See count_words."""
        return count_words


class EchoEngine(Engine):
    """A token is what stands between blanks."""

    def __init__(self, config: EchoEngineConfig) -> None:
        self.config = config

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        """See Engine.complete."""
        n_prompt = count_words(system) + count_words(prompt)
        check_length(n_prompt, sampling, self.config.max_model_len)
        if self.config.latency_s:
            await asyncio.sleep(self.config.latency_s)
        digest = hashlib.sha256(prompt.encode()).digest()
        sentences = max(0, min(self.config.answer_tokens, sampling.max_tokens) - 1) // _SENTENCE
        first, stride = int.from_bytes(digest[:4]), int.from_bytes(digest[4:8]) | 1
        drawn = [_SENTENCES[(first + i * stride) % len(_SENTENCES)] for i in range(sentences)]
        text = " ".join([f"echo-{digest.hex()[:8]}:", *drawn])
        return Completion(text, n_prompt, sentences * _SENTENCE + 1, "stop")

    async def first_tokens(self, system: str, prompt: str) -> list[tuple[str, float]]:
        """See Engine.first_tokens: Yes and No, as likely as the digest of the prompt says."""
        check_length(count_words(system) + count_words(prompt), _ONE_TOKEN, self.config.max_model_len)
        yes = (int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6]) + 0.5) / (1 << 48)
        return [("Yes", math.log(yes)), ("No", math.log1p(-yes))]

    def count_tokens(self, text: str) -> int:
        """See count_words."""
        return count_words(text)


def count_words(text: str) -> int:
    """What stands between blanks."""
    return text.count(" ") + 1 if text else 0
