"""Prompts to knowledge: the engines, the shards, and the job that runs them."""

from collections.abc import Callable
from typing import Annotated

from owlrec.config import Registry
from owlrec.generation.engines import EchoEngine, EchoEngineConfig, Engine, EngineConfig, HttpEngine, HttpEngineConfig
from owlrec.generation.vllm_engine import VllmEngine, VllmEngineConfig
from owlrec.storage import fingerprint
from owlrec_decoding import DecodingConfig

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
    """Starts the engine described by `config`.

    decoding: drafting and verification in vLLM; an HTTP server has its own.
    Raises EngineError if it cannot start.
    """
    return config.start(decoding or DecodingConfig())


def token_counter(config: EngineConfig) -> Callable[[str], int]:
    """Function that counts tokens like the engine, without starting one."""
    return config.token_counter()


def engine_fingerprint(config: EngineConfig) -> str:
    """SHA-256 of everything an engine's answers depend on: its weights and number formats, not its batch size, threads
    or time-outs.
    """
    return fingerprint(config.model_identity, config.shaping())
