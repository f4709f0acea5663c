"""The real engine with the packaged model: answers, limits and a failed start."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from owlrec.errors import EngineError
from owlrec.generation import VllmEngineConfig, build_engine
from owlrec.generation.engines import (
    Completion,
    PromptTooLong,
    RequestRefused,
    SamplingConfig,
    model_identity,
    render_chat,
)
from owlrec.generation.vllm_engine import VllmEngine
from owlrec_decoding import DecodingConfig, request_arguments

pytestmark = pytest.mark.vllm
CONFIG = VllmEngineConfig(type="vllm", model="smollm2-135m", max_model_len=256, max_num_seqs=8, kv_cache_gib=1)


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    engine = build_engine(CONFIG.model_copy(update={"max_num_seqs": None}))
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


def test_many_requests_at_once_get_their_own_answers(engine: VllmEngine) -> None:
    words = ["alpha", "bravo", "castle", "delta", "eagle", "forest", "garden", "harbor", "island", "jungle"]

    async def ask() -> list:
        sampling = SamplingConfig(max_tokens=16)
        return await asyncio.gather(*(engine.complete("", f"Repeat this word: {w}", sampling) for w in words))

    answers = asyncio.run(ask())
    assert sum(w in a.text.lower() for w, a in zip(words, answers, strict=True)) >= 8
    assert all(0 < a.output_tokens <= 16 for a in answers)
    assert all(a.finish_reason in ("stop", "length") for a in answers)


def test_rows_and_tokens_of_a_step_are_vllms_choice_for_batches_as_far_as_the_cache_holds_them(
    engine: VllmEngine,
) -> None:
    token = 2 * 30 * 3 * 64 * 2  # bytes: keys and values, layers, heads, components, bf16
    rows = 2**30 // (32 * token) // (256 // 32)  # whole blocks
    assert (engine.size.rows, engine.size.step_tokens) == (rows, 4096)  # 2,048 tokens in vLLM's other uses
    assert 256 * rows <= engine.size.cache_tokens <= 2**30 // token
    assert engine.size.cache_bytes == engine.size.cache_tokens * token


def test_a_prefix_that_rows_share_is_read_once(engine: VllmEngine) -> None:
    system = "You introduce films to readers who know nothing but a title, in a few clear, brief, neutral sentences. "
    system += "You name genre, director and mood."

    async def ask(word: str) -> Completion:
        return await engine.complete(system, f"{word}?", SamplingConfig(max_tokens=2))

    first, second = asyncio.run(ask("Alien")), asyncio.run(ask("Heat"))
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)  # one block of the CPU's cache


def test_prompts_are_tokenized_in_their_order_by_a_thread_of_its_own(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = list[tuple[str, str]]()

    def record(tokenizer: Any, system: str, prompt: str, options: Any) -> list[int]:
        rendered.append((prompt, threading.current_thread().name.partition("_")[0]))
        return render_chat(tokenizer, system, prompt, options)

    monkeypatch.setattr("owlrec.generation.vllm_engine.render_chat", record)

    async def ask() -> None:
        await asyncio.gather(*(engine.complete("", prompt, SamplingConfig(max_tokens=2)) for prompt in "abcdef"))

    asyncio.run(ask())
    assert rendered == [(prompt, "render") for prompt in "abcdef"]


def test_greedy_answers_repeat(engine: VllmEngine) -> None:
    async def ask() -> str:
        return (await engine.complete("You are brief.", "Name a color.", SamplingConfig(max_tokens=12))).text

    assert asyncio.run(ask()) == asyncio.run(ask())


def test_prompt_beyond_the_context_is_refused_and_the_engine_lives_on(engine: VllmEngine) -> None:
    with pytest.raises(PromptTooLong, match="context of 256"):
        asyncio.run(engine.complete("", "word " * 300, SamplingConfig(max_tokens=16)))
    assert asyncio.run(engine.complete("", "Say hi.", SamplingConfig(max_tokens=4))).output_tokens > 0


def test_a_request_that_vllm_refuses_leaves_the_engine_running(engine: VllmEngine) -> None:
    from vllm import SamplingParams

    with pytest.raises(RequestRefused, match="logprobs"):
        asyncio.run(engine._stepping.ask([1, 2, 3], SamplingParams(max_tokens=4, logprobs=1000)))
    assert asyncio.run(engine.complete("", "Say hi.", SamplingConfig(max_tokens=4))).output_tokens > 0


def test_options_are_vllms_own(engine: VllmEngine) -> None:
    found = asyncio.run(engine.complete("", "Say hi.", SamplingConfig(max_tokens=40, options={"stop": " "})))
    assert found.output_tokens < 40
    for wrong in ({"top_q": 1}, {"top_p": 7}):
        with pytest.raises(EngineError, match=r"sampling\.options"):
            asyncio.run(engine.complete("", "Say hi.", SamplingConfig(options=wrong)))


def test_token_count_is_the_tokenizers(engine: VllmEngine) -> None:
    assert engine.count_tokens("") == 0
    assert 2 <= engine.count_tokens("two words") <= 4


def test_unloadable_model_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EngineError, match="could not start"):
        build_engine(CONFIG.model_copy(update={"model": str(tmp_path)}))


def test_drafts_from_earlier_texts_give_the_same_answers_in_fewer_steps() -> None:
    """float32, so that batch shapes decide no tie; the pools are made of texts, as those of a release are."""
    model = CONFIG.model_copy(update={"dtype": "float32"})
    prompts = [f"Tell me about {topic}." for topic in ("owls", "rivers", "bread", "trains")]

    def answers(decoding: DecodingConfig, texts: Mapping[int, str] | None = None) -> list[Completion]:
        engine = build_engine(model, decoding)
        assert isinstance(engine, VllmEngine)
        assert engine.config.model_identity == model_identity(CONFIG.model)

        async def ask() -> list[Completion]:
            sampling, named = SamplingConfig(max_tokens=60), decoding.mode != "off"
            await engine.open_texts({"item": texts or {}})
            extras = [request_arguments(["item"], i) if named else None for i in range(len(prompts))]
            return await asyncio.gather(
                *(engine.complete("", p, sampling, extra) for p, extra in zip(prompts, extras, strict=True))
            )

        written = asyncio.run(ask())
        if decoding.mode != "off":
            counters = engine.counters
            assert counters is not None
            assert counters.counts["accepted"] == sum(a.accepted for a in written) > 0
            assert counters.counts["drafted"] == sum(a.drafted for a in written)
            assert counters.counts["tokens"] + len(prompts) >= sum(a.output_tokens for a in written)
            assert counters.tokens_per_step > 1.5
            assert sum(s.tokens for s in counters.by_rows.values()) > 0
        engine.close()
        return written

    plain = answers(DecodingConfig())
    drafted = answers(DecodingConfig(mode="strict"), {i: a.text for i, a in enumerate(plain)})
    assert [a.text for a in drafted] == [a.text for a in plain]
    assert all(a.drafted == 0 for a in plain)


def test_fp8_is_refused_on_a_cpu_before_the_model_is_loaded() -> None:
    with pytest.raises(EngineError, match=r"engine\.precision"):
        build_engine(CONFIG.model_copy(update={"precision": "fp8", "model": "/nowhere"}))


def test_two_ways_of_speculating_exclude_each_other() -> None:
    config = CONFIG.model_copy(update={"engine_args": {"speculative_config": {"method": "ngram"}}})
    with pytest.raises(EngineError, match=r"speculative_config and decoding\.mode: strict cannot be combined"):
        build_engine(config, DecodingConfig(mode="strict"))
