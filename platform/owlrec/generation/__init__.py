"""Prompts to knowledge: the engines, the shards, and the Ray Data job that runs them."""

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated

from pydantic import Field

from owlrec.decoding import DecodingConfig
from owlrec.generation.echo_engine import EchoEngine, EchoEngineConfig, count_words
from owlrec.generation.engine import Engine
from owlrec.generation.http_engine import HttpEngine, HttpEngineConfig, estimate_tokens
from owlrec.generation.models import load_tokenizer, model_identity
from owlrec.generation.vllm_engine import VllmEngine, VllmEngineConfig
from owlrec.workspace import fingerprint

EngineConfig = Annotated[VllmEngineConfig | HttpEngineConfig | EchoEngineConfig, Field(discriminator="type")]


def build_engine(
    config: VllmEngineConfig | HttpEngineConfig | EchoEngineConfig, decoding: DecodingConfig | None = None
) -> Engine:
    """The engine that `config` describes, started.

    decoding: how vLLM drafts and verifies; an HTTP server has its own.
    Raises EngineError where it cannot start.
    """
    if isinstance(config, VllmEngineConfig):
        return VllmEngine(config, decoding or DecodingConfig())
    return HttpEngine(config) if isinstance(config, HttpEngineConfig) else EchoEngine(config)


def token_counter(
    config: VllmEngineConfig | HttpEngineConfig | EchoEngineConfig,
) -> Callable[[str], int]:
    """What counts tokens as the engine would, without starting one."""
    if isinstance(config, HttpEngineConfig):
        return estimate_tokens
    if isinstance(config, EchoEngineConfig):
        return count_words
    tokenizer = load_tokenizer(config.model, config.revision)
    return lru_cache(maxsize=1 << 16)(lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def engine_fingerprint(config: VllmEngineConfig | HttpEngineConfig | EchoEngineConfig) -> str:
    """SHA-256 of what an engine's answers depend on: its weights and number formats, not its batch size, threads or
    time-outs.
    """
    if isinstance(config, VllmEngineConfig):
        model = model_identity(config.model, config.revision)
    else:
        model = f"{config.model}@{config.revision}" if isinstance(config, HttpEngineConfig) else "echo"
    return fingerprint(model, config.model_dump(mode="json", include=set(config.shapes_output)))
