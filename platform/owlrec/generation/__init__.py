"""Prompts to knowledge: the engines, the shards, and the Ray Data job that runs them."""

from collections.abc import Callable
from typing import Annotated

from owlrec.config import Registry
from owlrec.decoding import DecodingConfig
from owlrec.generation.engines import EchoEngine, EchoEngineConfig, Engine, EngineConfig, HttpEngine, HttpEngineConfig
from owlrec.generation.vllm_engine import VllmEngine, VllmEngineConfig
from owlrec.storage import fingerprint

__all__ = [
    "ENGINES",
    "EchoEngine",
    "EchoEngineConfig",
    "Engine",
    "EngineConfig",
    "EngineSection",
    "HttpEngine",
    "HttpEngineConfig",
    "VllmEngine",
    "VllmEngineConfig",
    "build_engine",
    "engine_fingerprint",
    "token_counter",
]

ENGINES: Registry[EngineConfig] = Registry(
    "engine",
    {
        "vllm": "owlrec.generation.vllm_engine.VllmEngineConfig",
        "http": "owlrec.generation.engines.HttpEngineConfig",
        "echo": "owlrec.generation.engines.EchoEngineConfig",
    },
)
EngineSection = Annotated[EngineConfig, ENGINES]  # a recipe's `engine:` section


def build_engine(config: EngineConfig, decoding: DecodingConfig | None = None) -> Engine:
    """The engine that `config` describes, started.

    decoding: how vLLM drafts and verifies; an HTTP server has its own.
    Raises EngineError where it cannot start.
    """
    return config.start(decoding or DecodingConfig())


def token_counter(config: EngineConfig) -> Callable[[str], int]:
    """What counts tokens as the engine would, without starting one."""
    return config.token_counter()


def engine_fingerprint(config: EngineConfig) -> str:
    """SHA-256 of what an engine's answers depend on: its weights and number formats, not its batch size, threads or
    time-outs.
    """
    return fingerprint(config.model_identity, config.shaping())
