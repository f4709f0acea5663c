"""Tiny random models in real vLLM engines, for the tests that ask whether drafts change what is written.

A model of two layers starts in two seconds and serves as well as a large one, since what is compared is an engine with
and without drafts. What each step had to verify is recorded outside the decoder, as the oracle of its counts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from owlrec_decoding import DecodingConfig, DraftLimits, engine_arguments, request_arguments
from owlrec_decoding.controller import Controller, DecoderCounters, StepTimes
from owlrec_decoding.index import build_pool

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
    "initializer_range": 0.4,  # sharp enough that texts differ by prompt and neighbors in rank rarely tie
}


def tiny_model(folder: Path, architecture: str, **changes: Any) -> str:
    import torch
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **changes})
    config.architectures = [f"{architecture}ForCausalLM"]
    getattr(transformers, f"{architecture}ForCausalLM")(config).to(torch.float32).save_pretrained(folder)
    return str(folder)


def write_tokenizer(folder: str) -> None:
    """One token a printable ASCII character, at its code less 31; 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<eos>", "Ġ", *[chr(code) for code in range(33, 31 + VOCAB)]]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


class Eager(Controller):
    """Drafts whatever is found: on a shared machine, measured step times would make the tests depend on who else
    computes."""

    def observe(self, *step: Any, **beside: Any) -> None:
        pass

    def worth_searching(self, rows: int) -> bool:
        return True

    def floor(self, rows: int) -> float:
        return 0.01

    def allocate(self, chance: np.ndarray, count: np.ndarray) -> np.ndarray:
        return count


@dataclass(frozen=True)
class Step:
    """One step of the engine, by request.

    drafts: what vLLM had verified; -1 is its own padding. emitted: what came out, nothing for a part of a prompt.
    resumed: requests that had been preempted. proposed: drafts for the next step, before the scheduler cuts them.
    """

    drafts: dict[str, list[int]]
    emitted: dict[str, list[int]]
    resumed: set[str]
    proposed: dict[str, list[int]]

    @property
    def padded(self) -> set[str]:
        """The requests whose drafts are vLLM's padding."""
        return {id_ for id_, drafts in self.drafts.items() if drafts[0] < 0}


class Decoder:
    """One engine with the decoder on; requests choose their mode."""

    running = 0  # engines of this process, which share one distributed environment

    def __init__(self, model: str, config: DecodingConfig, limits: DraftLimits, **engine_args: Any) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
        )
        import torch
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        # Threads that wait for each other where others compute too cost these models many times what they save.
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
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
        decoding = engine_arguments(config, texts=engine_args.pop("texts", None), limits=limits, cpu=True)
        self.engine = LLMEngine.from_engine_args(EngineArgs(**{**args, **decoding, **engine_args}))
        Decoder.running += 1
        self.names = iter(range(10**9))
        self.done: dict[str, Any] = {}
        self.steps: list[Step] = []
        worker = self.engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.proposer = worker.proposer
        self._record_steps(worker)
        assert self.proposer.controller is not None  # made from the step times measured at start
        self.proposer.controller = Eager(StepTimes([1, 2], [1.0, 1.0]), max_draft=6, max_step_tokens=100)

    def run(
        self, prompts: Sequence[Sequence[int]], mode: str = "strict", pools: Sequence[str] = (), **params: Any
    ) -> list[Any]:
        """Outputs in the order of `prompts`, each with the request's counts as `.counts` and, as `.cached`, how many
        tokens of its prompt were not computed again."""
        ids = self.ask(prompts, mode, pools, **params)
        while self.engine.has_unfinished_requests():
            self.step()
        return [self.done[i] for i in ids]

    def ask(
        self, prompts: Sequence[Sequence[int]], mode: str = "strict", pools: Sequence[str] = (), **params: Any
    ) -> list[str]:
        """Adds requests, one a prompt, and returns their ids; `step` and `done` then serve them.

        params: SamplingParams; `extra`, more of its extra_args; `loras`, a LoRA request or None for each prompt.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra = {**request_arguments(pools, mode=mode), **params.pop("extra", {})}  # type: ignore[arg-type]
        loras = params.pop("loras", [None] * len(prompts))
        settings = {"max_tokens": 40, "temperature": 0.0, "detokenize": False, **params}
        ids = [str(next(self.names)) for _ in prompts]
        for id_, prompt, lora in zip(ids, prompts, loras, strict=True):
            sampling = SamplingParams(**settings, extra_args=extra, output_kind=RequestOutputKind.FINAL_ONLY)
            self.engine.add_request(id_, {"prompt_token_ids": list(prompt)}, sampling, lora_request=lora)
        return ids

    def step(self) -> None:
        """One step of the engine."""
        for output in self.engine.step():
            if output.finished:
                answer = output.outputs[0]
                answer.counts = self.call("owlrec_request_counts", [output.request_id])[output.request_id]
                answer.cached = output.num_cached_tokens
                self.done[output.request_id] = answer

    def open(self, pool: str, texts: Sequence[Sequence[int]], ids: Sequence[int] | None = None) -> None:
        """Gives the engine a pool."""
        self.call("owlrec_open_pools", {pool: build_pool(texts, ids).to_bytes()})

    def learn(self, pool: str, texts: Sequence[Sequence[int]]) -> None:
        """Puts texts into the live tier of a pool, a new one if there is none of that name."""
        if not self.proposer.pools.known(pool):
            self.open(pool, [])
        for text in texts:
            self.proposer.pools.insert(pool, list(text))

    def call(self, method: str, *args: Any) -> Any:
        return self.engine.collective_rpc(method, args=args)[0]

    def counts(self) -> dict[str, float]:
        """The decoder's counters since the start."""
        return DecoderCounters.model_validate_json(self.call("owlrec_counters")).counts

    def close(self) -> None:
        import torch
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        torch.set_num_threads(self.threads)
        self.engine.engine_core.shutdown()
        del self.engine
        Decoder.running -= 1
        if not Decoder.running:
            cleanup_dist_env_and_memory()

    def _record_steps(self, worker: Any) -> None:
        execute, sample, propose = worker.execute_model, worker.sample_tokens, self.proposer.propose
        scheduled: list[Any] = []
        proposed: list[list[list[int]]] = []

        def execute_model(scheduler_output: Any) -> Any:
            scheduled.append(scheduler_output)
            return execute(scheduler_output)

        def keep_proposed(*args: Any, **kwargs: Any) -> list[list[int]]:
            proposed.append(propose(*args, **kwargs))
            return proposed[-1]

        def sample_tokens(grammar_output: Any) -> Any:
            output, step = sample(grammar_output), scheduled.pop()
            rows = {_given_id(id_): row for id_, row in output.req_id_to_index.items()}
            drafts = proposed.pop()
            self.steps.append(
                Step(
                    {_given_id(i): list(d) for i, d in step.scheduled_spec_decode_tokens.items()},
                    {i: list(output.sampled_token_ids[row]) for i, row in rows.items()},
                    {_given_id(i) for i in step.scheduled_cached_reqs.resumed_req_ids},
                    {i: list(drafts[row]) for i, row in rows.items()},
                )
            )
            return output

        worker.execute_model, worker.sample_tokens = execute_model, sample_tokens
        self.proposer.propose = keep_proposed


def _given_id(request_id: str) -> str:
    return request_id.rsplit("-", 1)[0]


def token_lists(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(o.token_ids) for o in outputs]


def prompts(n: int = 6, length: int = 12) -> list[list[int]]:
    return np.random.default_rng(3).integers(2, VOCAB, (n, length)).tolist()


def half_right(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The texts with every seventh token wrong: drafts that begin well and fail."""
    return [[(t + 1) % VOCAB if i % 7 == 3 else t for i, t in enumerate(text)] for text in texts]
