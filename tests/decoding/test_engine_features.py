"""vLLM's features with drafts: each gives what plain decoding gives, while drafts are proposed, accepted and
rejected.

Drafts come from the plain texts with every seventh token wrong. Counts are checked against what vLLM was seen to
verify.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import (  # type: ignore[import-not-found]
    SIZES,
    VOCAB,
    Decoder,
    half_right,
    prompts,
    tiny_model,
    token_lists,
    write_tokenizer,
)

from owlrec_decoding import DecodingConfig, DraftLimits

pytestmark = pytest.mark.vllm
BLOCK = 32  # tokens of the engine's cache blocks
CONFIG, LIMITS = DecodingConfig(mode="strict"), DraftLimits(max_draft=6)


def write_adapter(folder: Path, seed: int) -> str:
    """A random LoRA adapter of the attention, large enough to change texts."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    rank, hidden, targets = 4, SIZES["hidden_size"], ["q_proj", "v_proj"]
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for target in targets:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            weights[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=random) * 0.3
            weights[f"{name}.lora_B.weight"] = torch.randn(hidden, rank, generator=random) * 0.3
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def random_tokens(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


def assert_counted_as_seen(decoder: Decoder, ids: Sequence[str]) -> None:
    """Each request's counts against the steps that vLLM ran."""
    for id_ in ids:
        seen = [s for s in decoder.steps if id_ in s.drafts and id_ not in s.padded and s.emitted[id_]]
        drafted, accepted = sum(len(s.drafts[id_]) for s in seen), sum(len(s.emitted[id_]) - 1 for s in seen)
        assert decoder.call("owlrec_request_counts", [id_])[id_] == (drafted, accepted, 0)


def assert_same(strict: Sequence[Any], plain: Sequence[Any]) -> None:
    assert token_lists(strict) == token_lists(plain)
    assert [(o.text, o.finish_reason, o.stop_reason) for o in strict] == [
        (o.text, o.finish_reason, o.stop_reason) for o in plain
    ]
    drafted, accepted, _ = np.sum([o.counts for o in strict], axis=0)
    assert 0 < accepted < drafted


def teach(decoder: Decoder, asked: Sequence[Sequence[int]], plain: Sequence[Any]) -> str:
    """A new pool of texts that are right but for every seventh token; its name."""
    pool = f"half{next(decoder.names)}"
    decoder.learn(pool, half_right([[*p[-2:], *o.token_ids] for p, o in zip(asked, plain, strict=True)]))
    return pool


def ask_both_ways(decoder: Decoder, asked: Sequence[Sequence[int]], **params: Any) -> list[Any]:
    """Asks plainly, then with drafts, and checks that the answers and the counts are right. Returns the second
    answers."""
    decoder.learn("elsewhere", [])
    plain = decoder.run(asked, "off", ["elsewhere"], **params)  # finished texts would teach the default pool
    ids = decoder.ask(asked, "strict", [teach(decoder, asked, plain)], **params)
    while decoder.engine.has_unfinished_requests():
        decoder.step()
    strict = [decoder.done[i] for i in ids]
    assert_same(strict, plain)
    assert_counted_as_seen(decoder, ids)
    return strict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_model(tmp_path_factory.mktemp("features") / "model", "Llama")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(model: str) -> Iterator[Decoder]:
    """The engine of all tests that need no settings of their own."""
    decoder = Decoder(model, CONFIG, LIMITS, skip_tokenizer_init=False, enable_prefix_caching=True)
    yield decoder
    decoder.close()


def test_prefix_caching(decoder: Decoder) -> None:
    shared = random_tokens(1, 2 * BLOCK)
    asked = [[*shared[: BLOCK * (1 + i % 2)], *random_tokens(10 + i, 5 + i)] for i in range(6)]
    first = ask_both_ways(decoder, asked)
    again = ask_both_ways(decoder, asked)
    assert token_lists(again) == token_lists(first)
    assert [o.cached for o in again] == [BLOCK, 2 * BLOCK] * 3


@pytest.mark.parametrize(
    "params",
    [{}, {"repetition_penalty": 1.3, "presence_penalty": 0.4}, {"logprobs": 1}],
    ids=["greedy", "penalties", "logprobs"],
)
def test_padding_of_a_cached_prompt_is_never_accepted(decoder: Decoder, params: dict[str, Any]) -> None:
    """vLLM 0.32 schedules a new request that misses one token of its prompt with drafts of -1
    (v1/core/sched/scheduler.py:1130)."""
    asked = [[*random_tokens(2, BLOCK), i] for i in (5, 6, 7)]
    decoder.run(asked, "off", ["elsewhere"], max_tokens=1)
    before = len(decoder.steps)
    ask_both_ways(decoder, asked, **params)
    padded = [s for s in decoder.steps[before:] if s.padded]
    assert padded
    for step in padded:
        assert all(step.drafts[id_] == [-1] * LIMITS.max_draft for id_ in step.padded)
        assert all(len(step.emitted[id_]) == 1 and step.emitted[id_][0] >= 0 for id_ in step.padded)


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.3}], ids=["short_way", "long_way"])
def test_padding_is_not_accepted_by_the_loosest_relaxed_rule(decoder: Decoder, params: dict[str, Any]) -> None:
    asked = [[*random_tokens(2, BLOCK), i] for i in (5, 6, 7)]
    decoder.run(asked, "off", ["elsewhere"], max_tokens=1)
    before = len(decoder.steps)
    decoder.run(asked, "relaxed", ["nothing"], extra={"owlrec_k": VOCAB, "owlrec_min_prob": 0.0}, **params)
    padded = [s for s in decoder.steps[before:] if s.padded]
    assert padded
    assert all(len(s.emitted[id_]) == 1 and s.emitted[id_][0] >= 0 for s in padded for id_ in s.padded)


@pytest.mark.parametrize("kept", [False, True], ids=["cut", "kept"])
def test_stop_strings(decoder: Decoder, kept: bool) -> None:
    texts = [o.text for o in decoder.run(prompts(), "off", ["elsewhere"], detokenize=True)]
    # Two characters from the middle of four texts: their ends fall inside what one step emits.
    stop = [text[at : at + 2] for text, at in zip(texts[:4], (9, 14, 20, 27), strict=True)]
    params = {"detokenize": True, "stop": stop, "include_stop_str_in_output": kept}
    strict = ask_both_ways(decoder, prompts(), **params)
    assert sum(o.finish_reason == "stop" and o.stop_reason in stop for o in strict) >= 4
    for text, output in zip(texts, strict, strict=True):
        ends = [at + 2 * kept for s in stop if (at := text.find(s)) >= 0]
        assert output.text == text[: min(ends, default=len(text))]


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "([a-f]{3}[0-9 ])+"},
        {"choice": ["comedy and drama", "comedy or war films", "drama, then comedy", "documentaries"]},
        {
            "json": {
                "type": "object",
                "properties": {"age": {"type": "integer"}, "name": {"type": "string", "maxLength": 20}},
                "required": ["age", "name"],
                "additionalProperties": False,
            }
        },
    ],
    ids=lambda g: next(iter(g)),
)
def test_structured_output(decoder: Decoder, grammar: dict[str, Any]) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    before = len(decoder.steps)
    params = {"structured_outputs": StructuredOutputsParams(**grammar), "detokenize": True, "max_tokens": 60}
    outputs = ask_both_ways(decoder, prompts(), **params)
    steps = list(pairwise(decoder.steps[before:]))
    proposed = {(n, id_): d for n, (s, _) in enumerate(steps) for id_, d in s.proposed.items() if d}
    cut = [
        len(d) - len(steps[n][1].drafts.get(id_, [])) for (n, id_), d in proposed.items() if id_ in steps[n][1].emitted
    ]
    assert sum(cut) > 0  # drafts that broke the grammar
    if "choice" in grammar:
        assert {o.text for o in outputs} <= set(grammar["choice"])
    if "json" in grammar:
        finished = [json.loads(o.text) for o in outputs if o.finish_reason == "stop"]
        assert finished
        assert all(isinstance(answer["age"], int) for answer in finished)


@pytest.mark.parametrize(
    "params",
    [
        {"bad_words": ["e", "V", "Oq", "n2", "a"]},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"min_tokens": 30, "stop_token_ids": [5, 9, 17, 33, 60, 71]},
    ],
    ids=lambda p: next(iter(p)),
)
def test_what_is_forbidden_or_penalized(decoder: Decoder, params: dict[str, Any]) -> None:
    free = decoder.run(prompts(), "off", ["elsewhere"], detokenize=True)
    outputs = ask_both_ways(decoder, prompts(), detokenize=True, **params)
    assert token_lists(outputs) != token_lists(free)
    if "bad_words" in params:
        assert not any(word in o.text for word in params["bad_words"] for o in outputs)
        assert any(word in o.text for word in params["bad_words"] for o in free)
    if "min_tokens" in params:
        assert min(len(o.token_ids) for o in outputs) > params["min_tokens"]
        assert {o.finish_reason for o in outputs} == {"stop", "length"}


@pytest.mark.parametrize(
    "params", [{"logit_bias": {3: 5.0}}, {"temperature": 1.0, "min_p": 0.1}], ids=["logit_bias", "min_p"]
)
def test_what_vllm_cannot_speculate_with_is_refused_and_the_others_go_on(
    decoder: Decoder, params: dict[str, Any]
) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        decoder.ask(prompts(1), **params)
    assert len(decoder.run(prompts(1), max_tokens=5)[0].token_ids) == 5


def test_aborted_request_leaves_the_others_their_texts(decoder: Decoder) -> None:
    plain = decoder.run(prompts(), "off", ["elsewhere"])
    pool = teach(decoder, prompts(), plain)
    ids = decoder.ask(prompts(), "strict", [pool])
    for _ in range(4):
        decoder.step()
    gone = {ids[0], ids[3]}
    assert all(decoder.steps[-1].drafts[id_] for id_ in gone)
    decoder.engine.abort_request(sorted(gone))
    late = decoder.ask(prompts(2), "strict", [pool])  # takes the places that became free
    while decoder.engine.has_unfinished_requests():
        decoder.step()
    others = [i for i, id_ in enumerate(ids) if id_ not in gone]
    assert_same([decoder.done[ids[i]] for i in others], [plain[i] for i in others])
    assert_same([decoder.done[id_] for id_ in late], plain[:2])
    assert_counted_as_seen(decoder, [*ids, *late])
    decoder.run(prompts(1), max_tokens=1)  # finished requests are taken in with the next step
    assert len(decoder.proposer.requests.slots) <= 1


def test_chunked_prefill(model: str) -> None:
    decoder = Decoder(model, CONFIG, LIMITS, max_num_batched_tokens=32, max_num_seqs=4, enable_prefix_caching=False)
    try:
        asked = [random_tokens(20 + i, length) for i, length in enumerate((9, 150, 14, 120, 70, 33, 5, 101))]
        ask_both_ways(decoder, asked)
        # A part of a prompt, which emits nothing, beside rows whose drafts are verified.
        mixed = [s for s in decoder.steps if s.drafts and any(not e for e in s.emitted.values())]
        assert len(mixed) >= 3
        assert any(len(e) > 1 for s in mixed for e in s.emitted.values())
    finally:
        decoder.close()


def test_preempted_requests_are_resumed_where_they_were(model: str) -> None:
    # Nine blocks for six requests that need three or four each in the end.
    decoder = Decoder(model, CONFIG, LIMITS, num_gpu_blocks_override=10, enable_prefix_caching=True)
    try:
        for length in (28, 30, 33):  # such that a request is resumed one token behind its cache, and padded
            asked = prompts(6, length)
            decoder.learn("elsewhere", [])
            plain = [decoder.run([p], "off", ["elsewhere"], max_tokens=70)[0] for p in asked]
            before = len(decoder.steps)
            ids = decoder.ask(asked, "strict", [teach(decoder, asked, plain)], max_tokens=70)
            while decoder.engine.has_unfinished_requests():
                decoder.step()
            assert any(s.resumed for s in decoder.steps[before:])
            assert_same([decoder.done[i] for i in ids], plain)
            assert_counted_as_seen(decoder, ids)
        assert any(s.resumed & s.padded for s in decoder.steps)
    finally:
        decoder.close()


def test_adapters_beside_the_base_model(model: str, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    adapters = [LoRARequest(f"a{i}", i, write_adapter(tmp_path / f"a{i}", i)) for i in (1, 2)]
    # On a CPU, vLLM 0.32 gives rows without an adapter that of the last place, if others of the step have one
    # (vllm#48421): the third place stays empty.
    decoder = Decoder(model, CONFIG, LIMITS, enable_lora=True, max_loras=3, max_lora_rank=8)
    try:
        loras = [None, *adapters, None, *adapters, None, adapters[0]]
        asked = [prompts(3)[i // 3] for i in range(8)]
        outputs = ask_both_ways(decoder, asked, loras=loras)
        assert all(o.counts[1] > 0 for o in outputs)
        texts = token_lists(outputs)
        assert texts == [token_lists(decoder.run([p], "off", loras=[a]))[0] for p, a in zip(asked, loras, strict=True)]
        assert texts[0] != texts[1] != texts[2] != texts[0]
    finally:
        decoder.close()
