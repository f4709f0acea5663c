"""Engines without a model in this process: `echo` answers by a rule, `http` calls an OpenAI-compatible server."""

import asyncio
import hashlib
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import httpx
from pydantic import Field

from owlrec.errors import EngineError
from owlrec.generation.engine import (
    Completion,
    Engine,
    EngineConfig,
    PromptTooLong,
    RequestFailed,
    RequestRefused,
    RequestTimedOut,
    SamplingConfig,
    check_length,
)
from owlrec.process import secret
from owlrec_decoding import DecodingConfig

# ----------------------------------------------------------------------------------------------------------------- echo
# A deterministic engine without a model: it answers with a digest of the prompt and words chosen by the digest.
#
# It is for tests, and for scale runs of everything around an engine. The answer depends only on the prompt, so two
# runs must agree to the byte, and it passes the quality gate like a good text of its length. It is never the
# default, because its knowledge is worthless.


_VOCABULARY = """
amber bright calm daring early faint gentle humble icy jolly keen light mellow noble odd plain quiet rapid sober
tender urban vivid warm young ancient blunt crisp dense eager frank grave harsh idle just kind loose modest narrow
open proud queer rough sharp thin usual vast wild zealous above across along around before behind beneath beside
between beyond during inside near outside over past since through toward under until upon within without anchor basket
candle desert engine forest garden harbor island jacket kitchen ladder mirror needle orchard pillar quarry river
shelter tunnel valley window bridge cabin door echo field gate hill lamp meadow night ocean path rain stone tower wave
bends carries drifts enters follows gathers holds invites joins keeps leads mends needs offers passes questions
returns settles turns unites visits waits yields answers builds climbs divides expects finds grows
"""
_ONE_TOKEN = SamplingConfig(max_tokens=1)
_SENTENCE = 15  # words; random sentences repeat as little as good texts
_DRAW = random.Random(0)
_SENTENCES = [" ".join(_DRAW.sample(_VOCABULARY.split(), _SENTENCE)) + "." for _ in range(1 << 12)]


class EchoEngineConfig(EngineConfig):
    """Length and latency of answers."""

    shapes_output: ClassVar[tuple[str, ...]] = ("type", "answer_tokens")

    type: Literal["echo"]
    max_model_len: int = 4096
    latency_s: float = 0.0  # time for a whole answer
    answer_tokens: int = 60  # approximate; at most sampling.max_tokens

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
    """An engine whose tokens are separated by blanks."""

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
        """See Engine.first_tokens: Yes and No, with probabilities from the prompt's digest."""
        check_length(count_words(system) + count_words(prompt), _ONE_TOKEN, self.config.max_model_len)
        yes = (int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6]) + 0.5) / (1 << 48)
        return [("Yes", math.log(yes)), ("No", math.log1p(-yes))]

    def count_tokens(self, text: str) -> int:
        """See count_words."""
        return count_words(text)


def count_words(text: str) -> int:
    """Words separated by blanks."""
    return text.count(" ") + 1 if text else 0


# ---------------------------------------------------------------------------------------------------------- http engine
# Any server that speaks the OpenAI chat-completions protocol: vLLM, SGLang, TGI, llama.cpp or a hosted API.
#
# Retries with exponential back-off and full jitter on 429, 5xx, time-outs and refused connections, respecting Retry-
# After; other 4xx are final, since a repeated bad request stays bad. User histories leave the machine with this
# engine: the recipe must name the server.


_BACKOFF_S = 1.0  # at most, before the second attempt; doubles after each, up to a minute
_TOP_LOGPROBS = 20  # OpenAI's and vLLM's highest
_T = TypeVar("_T")


class HttpEngineConfig(EngineConfig):
    """base_url ends before /chat/completions, for example http://localhost:8000/v1."""

    shapes_output: ClassVar[tuple[str, ...]] = ("type",)

    type: Literal["http"]
    base_url: str
    model: str
    revision: str = ""  # the server's model version, if it has one: part of the fingerprint
    api_key_env: str | None = None  # environment variable with the key
    concurrency: int = Field(32, ge=1)
    timeout_s: float = Field(120.0, gt=0)
    max_attempts: int = Field(5, ge=1)

    @property
    def model_identity(self) -> str:
        """See EngineConfig.model_identity."""
        return f"{self.model}@{self.revision}"

    def start(self, decoding: DecodingConfig) -> "HttpEngine":
        """See EngineConfig.start; the server's own decoding applies."""
        return HttpEngine(self)

    def token_counter(self) -> Callable[[str], int]:
        """See estimate_tokens."""
        return estimate_tokens


class HttpEngine(Engine):
    """A client with bounded concurrency."""

    def __init__(self, config: HttpEngineConfig) -> None:
        """Raises EngineError if the named API key variable is not set."""
        self.config = config
        key = secret(config.api_key_env)
        if config.api_key_env and not key:
            raise EngineError(
                f"engine.api_key_env: the variable {config.api_key_env} is not set. Export it before the run."
            )
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(config.concurrency)

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        """See Engine.complete; `extra` is sent as vLLM's `vllm_xargs`.

        Raises RequestFailed with the last status after `max_attempts`.
        """
        body = self._body(system, prompt, sampling)
        if extra:
            body["vllm_xargs"] = dict(extra)
        async with self._slots:
            return await self._with_retries(body, _completion)

    async def first_tokens(self, system: str, prompt: str) -> list[tuple[str, float]]:
        """See Engine.first_tokens: as many as OpenAI's protocol returns. Raises RequestFailed like `complete`."""
        body = self._body(system, prompt, SamplingConfig(max_tokens=1))
        async with self._slots:
            return await self._with_retries(body | {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}, _first_tokens)

    def _body(self, system: str, prompt: str, sampling: SamplingConfig) -> dict[str, Any]:
        check_length(self.count_tokens(system) + self.count_tokens(prompt), sampling, self.config.max_model_len)
        messages = [{"role": "system", "content": system}] if system else []
        return {
            "model": self.config.model,
            "messages": [*messages, {"role": "user", "content": prompt}],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            **sampling.options,
        }

    async def _with_retries(self, body: dict[str, Any], read: Callable[[httpx.Response, str, int], _T]) -> _T:
        if self._client is None:  # created here, since a client belongs to the event loop of its first use
            limits = httpx.Limits(max_connections=self.config.concurrency)
            self._client = httpx.AsyncClient(timeout=self.config.timeout_s, headers=self._headers, limits=limits)
        url = self.config.base_url.rstrip("/") + "/chat/completions"
        for attempt in range(1, self.config.max_attempts + 1):
            wait = random.uniform(0, min(60.0, _BACKOFF_S * 2 ** (attempt - 1)))
            try:
                response = await self._client.post(url, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} at {url}: {error}"
                failure = RequestTimedOut if isinstance(error, httpx.TimeoutException) else RequestFailed
            else:
                failure = RequestFailed
                if response.status_code == 200:
                    return read(response, url, attempt)
                problem = f"HTTP {response.status_code} from {url}: {response.text[:200]}"
                if response.status_code == 400 and "context" in response.text.lower():
                    raise PromptTooLong(problem)
                if response.status_code != 429 and response.status_code < 500:
                    raise RequestRefused(problem, attempt)
                wait = max(wait, _retry_after_s(response))
            if attempt < self.config.max_attempts:
                await asyncio.sleep(wait)
        raise failure(f"{problem} (gave up after {self.config.max_attempts} attempts)", self.config.max_attempts)

    def count_tokens(self, text: str) -> int:
        """See estimate_tokens."""
        return estimate_tokens(text)


def estimate_tokens(text: str) -> int:
    """An upper estimate for any tokenizer of western text: a token per three bytes of UTF-8."""
    return -(-len(text.encode()) // 3)


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return min(60.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:  # an HTTP date; use only the back-off
        return 0.0


def _first_tokens(response: httpx.Response, url: str, attempt: int) -> list[tuple[str, float]]:
    try:
        likeliest = response.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(str(entry["token"]), float(entry["logprob"])) for entry in [likeliest[0], *likeliest[1:]]]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestFailed(
            f"{url} returned 200 without log-probabilities ({type(error).__name__}: {error})", attempt
        ) from None


def _completion(response: httpx.Response, url: str, attempt: int) -> Completion:
    try:
        answer = response.json()
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        return Completion(
            text=(choice["message"]["content"] or "").strip(),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            output_tokens=int(usage.get("completion_tokens", 0)),
            finish_reason=choice.get("finish_reason") or "stop",
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestFailed(
            f"{url} returned 200 without a chat completion ({type(error).__name__}: {error})", attempt
        ) from None
