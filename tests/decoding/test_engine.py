"""The decoder inside a real vLLM engine: tiny random models in float32, plain decoding (mode off, same engine) as
the oracle."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owlrec.decoding import DecodingConfig, engine_arguments, request_arguments
from owlrec.decoding.acceptance import AcceptanceRates
from owlrec.decoding.controller import Controller, StepTimes
from owlrec.decoding.pools import write_pool
from owlrec.errors import EngineError

pytestmark = pytest.mark.vllm

VOCAB = 96
EOS = 0
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.4,  # sharp enough that texts differ by prompt and neighbours in rank rarely tie
}


def tiny_model(folder: Path, family: str, **changes: Any) -> str:
    import torch
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    config.architectures = [f"{family}ForCausalLM"]
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).save_pretrained(folder)
    return str(folder)


class Eager(Controller):
    """Drafts whatever is found: on a shared machine, measured step times would make the tests depend on who else
    computes."""

    def observe(self, rows: int, drafts: int, seconds: float) -> None:
        pass

    def worth_searching(self, rows: int) -> bool:
        return True

    def floor(self, rows: int) -> float:
        return 0.01

    def allocate(self, chance: np.ndarray, count: np.ndarray) -> np.ndarray:
        return count


class Decoder:
    """One engine with the decoder on; requests choose their mode."""

    def __init__(self, model: str, config: DecodingConfig, **engine_args: Any) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
        )
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        args: dict[str, Any] = {
            "model": model,
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "block_size": 32,
            "disable_log_stats": True,
            "skip_tokenizer_init": True,
        }
        decoding = engine_arguments(config, "tiny", cpu=True)
        self.engine = LLMEngine.from_engine_args(EngineArgs(**{**args, **decoding, **engine_args}))
        self.names = iter(range(10**9))
        self.proposer = self.engine.engine_core.engine_core.model_executor.driver_worker.worker.proposer
        assert self.proposer.controller is not None  # made from the step times measured at start
        self.proposer.controller = Eager(StepTimes([1, 2], [1.0, 1.0]), max_draft=6, max_step_tokens=100)

    def run(
        self, prompts: Sequence[Sequence[int]], mode: str = "strict", pools: Sequence[str] = (), **params: Any
    ) -> list[Any]:
        """Outputs in the order of `prompts`, each with the request's counts as `.counts`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra = request_arguments(pools, mode=mode)  # type: ignore[arg-type]
        extra.update(params.pop("extra", {}))
        lora = params.pop("lora_request", None)
        settings = {"max_tokens": 40, "temperature": 0.0, "detokenize": False, **params}
        ids = [str(next(self.names)) for _ in prompts]
        for id_, prompt in zip(ids, prompts, strict=True):
            sampling = SamplingParams(**settings, extra_args=extra, output_kind=RequestOutputKind.FINAL_ONLY)
            self.engine.add_request(id_, {"prompt_token_ids": list(prompt)}, sampling, lora_request=lora)
        done: dict[str, Any] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    answer = output.outputs[0]
                    answer.counts = self.call("owlrec_request_counts", [output.request_id])[output.request_id]
                    done[output.request_id] = answer
        return [done[i] for i in ids]

    def call(self, method: str, *args: Any) -> Any:
        return self.engine.collective_rpc(method, args=args)[0]

    def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        del self.engine
        cleanup_dist_env_and_memory()


def token_lists(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(o.token_ids) for o in outputs]


def prompts(n: int = 6, length: int = 12) -> list[list[int]]:
    return np.random.default_rng(3).integers(2, VOCAB, (n, length)).tolist()


def half_right(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The texts with every seventh token wrong: drafts that begin well and fail."""
    return [[(t + 1) % VOCAB if i % 7 == 3 else t for i, t in enumerate(text)] for text in texts]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    folder = tmp_path_factory.mktemp("llama")
    root = folder / "pools"
    root.mkdir()
    config = DecodingConfig(mode="strict", pools=str(root), max_draft=6, live_tokens=0)
    decoder = Decoder(tiny_model(folder / "model", "Llama"), config)
    plain = token_lists(decoder.run(prompts(), "off"))
    texts = [p[-2:] + t for p, t in zip(prompts(), plain, strict=True)]
    write_pool(root, "right", texts, list(range(len(texts))), identity="tiny", max_tokens=10**6)
    write_pool(root, "half", half_right(texts), None, identity="tiny", max_tokens=10**6)
    yield decoder
    decoder.close()


def test_mode_off_never_drafts(llama: Decoder) -> None:
    assert all(o.counts == (0, 0, 0) for o in llama.run(prompts(), "off", ["right"]))


@pytest.mark.parametrize("pool", ["right", "half", "unknown-pool"])
def test_strict_texts_are_those_of_plain_decoding(llama: Decoder, pool: str) -> None:
    plain, strict = llama.run(prompts(), "off"), llama.run(prompts(), "strict", [pool])
    assert token_lists(strict) == token_lists(plain)
    assert sum(o.counts[0] for o in strict) >= sum(o.counts[1] for o in strict)
    assert (sum(o.counts[1] for o in strict) > 0) or pool == "unknown-pool"
    assert all(o.counts[2] == 0 for o in strict)


def test_unknown_pool_is_counted_and_the_default_serves(llama: Decoder) -> None:
    before = llama.call("owlrec_counters").get("unknown_pools", 0)
    llama.run(prompts(2), "strict", ["nobody", "right"])
    assert llama.call("owlrec_counters")["unknown_pools"] == before + 2


def test_an_earlier_text_of_the_request_itself_is_found_by_its_id(llama: Decoder) -> None:
    before = llama.call("owlrec_counters").get("hits_own", 0)
    proposer = llama.proposer
    learnt, proposer.rates = proposer.rates, AcceptanceRates(len(proposer.rates.rates))
    proposer.rates.rates[1:] = 0.01  # else the pool as such, which holds that text too, may promise more
    llama.run(prompts(1), "strict", ["right"], extra={"owlrec_document": 0})
    proposer.rates = learnt
    assert llama.call("owlrec_counters")["hits_own"] > before


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"min_tokens": 30, "stop_token_ids": [5, 9, 17]},
        {"stop_token_ids": [5, 9, 17, 33]},
        {"allowed_token_ids": list(range(2, 60))},
        {"logprobs": 2},
    ],
    ids=lambda p: next(iter(p)),
)
def test_options_of_a_request_mean_the_same_with_drafts(llama: Decoder, params: dict[str, Any]) -> None:
    plain, strict = llama.run(prompts(), "off", **params), llama.run(prompts(), "strict", ["half"], **params)
    assert token_lists(strict) == token_lists(plain)
    assert [o.finish_reason for o in strict] == [o.finish_reason for o in plain]
    if "logprobs" in params:
        for ours, theirs in zip(strict, plain, strict=True):
            for a, b, token in zip(ours.logprobs, theirs.logprobs, ours.token_ids, strict=True):
                assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-3)


def test_requests_with_and_without_temperature_share_a_batch(llama: Decoder) -> None:
    """On a CPU, vLLM 0.32 reads uninitialised temperatures here; the greedy rows must not notice, nor the others end
    early."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    plain = token_lists(llama.run(prompts(), "off"))
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts()):
        params = SamplingParams(
            max_tokens=40,
            temperature=0.0 if i % 2 else 0.8,
            top_k=0 if i % 2 else 5,
            detokenize=False,
            ignore_eos=not i % 2,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=request_arguments(["right"], mode="strict"),
        )
        llama.engine.add_request(f"mixed{i}", {"prompt_token_ids": prompt}, params)
    while llama.engine.has_unfinished_requests():
        found.update({o.request_id: list(o.outputs[0].token_ids) for o in llama.engine.step() if o.finished})
    for i in range(len(plain)):
        if i % 2:
            assert found[f"mixed{i}"] == plain[i]
        else:
            assert len(found[f"mixed{i}"]) == 40


def test_a_row_near_the_context_limit_leaves_the_others_their_drafts(llama: Decoder) -> None:
    long = np.random.default_rng(4).integers(2, VOCAB, 252).tolist()
    plain = llama.run([long, *prompts(3)], "off", max_tokens=40)
    before = llama.call("owlrec_counters")["accepted"]
    strict = llama.run([long, *prompts(3)], "strict", ["right"], max_tokens=40)
    assert token_lists(strict) == token_lists(plain)
    assert len(strict[0].token_ids) == 4
    assert llama.call("owlrec_counters")["accepted"] > before


def test_relaxed_texts_follow_the_pool_where_the_rule_lets_them(llama: Decoder) -> None:
    loose = {"owlrec_k": VOCAB, "owlrec_min_prob": 0.0}
    outputs = llama.run(prompts(), "relaxed", ["half"], extra=loose)
    assert sum(o.counts[2] for o in outputs) > 0
    assert all(o.counts[2] <= o.counts[1] <= o.counts[0] for o in outputs)
    strictly = llama.run(prompts(), "relaxed", ["half"], extra={"owlrec_k": 1, "owlrec_min_prob": 0.0})
    assert token_lists(strictly) == token_lists(llama.run(prompts(), "off"))


def test_a_bad_rule_of_one_request_is_verified_strictly(llama: Decoder) -> None:
    outputs = llama.run(prompts(), "relaxed", ["half"], extra={"owlrec_min_prob": 7.0})
    assert token_lists(outputs) == token_lists(llama.run(prompts(), "off"))
    assert llama.call("owlrec_counters")["bad_rules"] >= 6


def test_finished_texts_draft_for_later_ones_unless_they_were_relaxed(tmp_path: Path) -> None:
    decoder = Decoder(tiny_model(tmp_path / "model", "Llama"), DecodingConfig(mode="strict", max_draft=6))
    try:
        plain = token_lists(decoder.run(prompts(4), "off", ["cohort"]))
        again = decoder.run(prompts(4), "strict", ["cohort"])
        assert token_lists(again) == plain
        assert sum(o.counts[1] for o in again) > 80  # of 160 tokens
        assert decoder.call("owlrec_counters")["hits_named"] > 0
        decoder.run([[2, 3]], "off", max_tokens=1)  # finished requests are taken in with the next step
        before = decoder.call("owlrec_counters")["tokens_live"]
        loose = {"owlrec_k": VOCAB, "owlrec_min_prob": 0.0}
        strangers = np.random.default_rng(5).integers(2, VOCAB, (4, 12)).tolist()
        relaxed = decoder.run(strangers, "relaxed", ["cohort"], extra=loose)
        assert any(o.counts[2] for o in relaxed)
        decoder.run([[2, 3]], "off", max_tokens=1)
        learnt = 2 + 1 + 1 + sum(8 + len(o.token_ids) + 1 for o in relaxed if not o.counts[2])  # lead, text, border
        assert decoder.call("owlrec_counters")["tokens_live"] == before + learnt
    finally:
        decoder.close()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": None}),
        ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("GPTNeoX", {}),
    ],
)
def test_strict_is_lossless_for(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    decoder = Decoder(tiny_model(tmp_path / "model", family, **changes), DecodingConfig(mode="strict", max_draft=6))
    try:
        plain = decoder.run(prompts(), "off")
        strict = decoder.run(prompts(), "strict")  # drafts come from the live pool, which holds the plain texts
        assert token_lists(strict) == token_lists(plain)
        assert sum(o.counts[1] for o in strict) > 0
    finally:
        decoder.close()


def test_another_version_of_vllm_is_refused() -> None:
    from owlrec.decoding.worker import check_version

    check_version("0.32.0+cpu")
    with pytest.raises(EngineError, match=r"needs vLLM 0\.32\.0, but 0\.33\.0 is installed"):
        check_version("0.33.0")
