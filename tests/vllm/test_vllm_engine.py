"""The real engine with the packaged model: answers, limits and a failed start."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from owlrec.errors import EngineError
from owlrec.generation import VllmEngineConfig, build_engine
from owlrec.generation.engine import PromptTooLong, SamplingConfig
from owlrec.generation.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm
CONFIG = VllmEngineConfig(type="vllm", model="smollm2-135m", max_model_len=256, max_num_seqs=8, kv_cache_gib=1)


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    engine = build_engine(CONFIG)
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


def test_many_requests_at_once_get_their_own_answers(engine: VllmEngine) -> None:
    words = ["alpha", "bravo", "castle", "delta", "eagle", "forest", "garden", "harbour", "island", "jungle"]

    async def ask() -> list:
        sampling = SamplingConfig(max_tokens=16)
        return await asyncio.gather(*(engine.complete("", f"Repeat this word: {w}", sampling) for w in words))

    answers = asyncio.run(ask())
    assert sum(w in a.text.lower() for w, a in zip(words, answers, strict=True)) >= 8
    assert all(0 < a.output_tokens <= 16 for a in answers)
    assert all(a.finish_reason in ("stop", "length") for a in answers)


def test_greedy_answers_repeat(engine: VllmEngine) -> None:
    async def ask() -> str:
        return (await engine.complete("You are brief.", "Name a colour.", SamplingConfig(max_tokens=12))).text

    assert asyncio.run(ask()) == asyncio.run(ask())


def test_prompt_beyond_the_context_is_refused_and_the_engine_lives_on(engine: VllmEngine) -> None:
    with pytest.raises(PromptTooLong, match="context of 256"):
        asyncio.run(engine.complete("", "word " * 300, SamplingConfig(max_tokens=16)))
    assert asyncio.run(engine.complete("", "Say hi.", SamplingConfig(max_tokens=4))).output_tokens > 0


def test_token_count_is_the_tokenizers(engine: VllmEngine) -> None:
    assert engine.count_tokens("") == 0
    assert 2 <= engine.count_tokens("two words") <= 4


def test_unloadable_model_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EngineError, match="could not start"):
        build_engine(CONFIG.model_copy(update={"model": str(tmp_path)}))
