"""vLLM behind the engine interface, on CPU and GPU.

On a CPU the engine core must run in this process: vLLM's usual split into front end, core and worker processes
leaves the model one core less, since the core busy-waits on a queue (measured on 2 cores: half the
tokens/s). On a GPU vLLM's own default applies.
"""

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from owlrec.config import Config
from owlrec.errors import EngineError
from owlrec.generation.engines import (
    PACKAGED,
    Completion,
    Engine,
    EngineConfig,
    EngineStopped,
    RequestRefused,
    RowError,
    SamplingConfig,
    check_length,
    load_tokenizer,
    model_identity,
    render_chat,
    resolve_model,
)
from owlrec_decoding import DecodingConfig, DraftLimits, VllmError, engine_arguments
from owlrec_decoding.controller import DecoderCounters
from owlrec_decoding.options import is_cpu_build

# -------------------------------------------------------------------------------------------------------- vllm stepping
# One thread steps a vllm.LLMEngine; any number of callers await their rows.
#
# A row whose caller has given up is dropped: a ranking past its deadline must not delay the next.


_COUNT_EVERY_S = 1.0  # in a full batch a row ends at most steps; reading counts each time costs too much


@dataclass
class EngineAnswer:
    """Answer to one request."""

    output: Any  # vLLM's CompletionOutput
    counts: tuple[int, int, int]  # tokens drafted, accepted, and accepted only by the relaxed rule
    cached_tokens: int  # prompt tokens reused from the cache


@dataclass
class _Call:
    """A function of the engine's workers, for its thread to call between steps."""

    method: str
    arguments: tuple[Any, ...]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


@dataclass
class _Pending:
    prompt_token_ids: list[int]
    params: Any
    adapter: str | None
    future: asyncio.Future[Any]  # of an EngineAnswer
    loop: asyncio.AbstractEventLoop


class Stepping:
    """The thread, and the engine inside it."""

    def __init__(self, start: Callable[[], Any], *, drafts: bool) -> None:
        """start: builds the engine; its exceptions are raised here. drafts: whether the engine has the retrieval
        decoder, whose counts are then read.
        """
        self.counters: DecoderCounters | None = None
        self._start, self._drafts = start, drafts
        self._inbox: queue.SimpleQueue[_Pending | _Call | None] = queue.SimpleQueue()
        self._closing = False
        self._fatal: BaseException | None = None
        ready = threading.Event()
        # Built and stepped by the same thread: OpenMP keeps one team of worker threads for each thread that
        # starts them.
        self._thread = threading.Thread(target=self._run, args=(ready,), name="vllm-step", daemon=True)
        self._thread.start()
        ready.wait()
        if self._fatal is not None:
            raise self._fatal

    async def ask(self, token_ids: Sequence[int], params: Any, adapter: str | None = None) -> EngineAnswer:
        """Answers a prompt. params: vLLM's SamplingParams. adapter: a LoRA folder.

        Raises RequestRefused if vLLM does not accept the request, and EngineStopped if vLLM itself has failed.
        """
        answer: EngineAnswer = await self._put(partial(_Pending, list(token_ids), params, adapter))
        return answer

    async def call(self, method: str, *arguments: Any) -> None:
        """Calls a function of the engine's workers between two steps. Raises EngineStopped if vLLM has failed."""
        await self._put(partial(_Call, method, arguments))

    async def _put(self, asked: Callable[[asyncio.Future[Any], asyncio.AbstractEventLoop], _Pending | _Call]) -> Any:
        if self._fatal is not None:
            raise EngineStopped(f"vLLM has stopped: {self._fatal}")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._inbox.put(asked(future, loop))
        return await future

    def close(self) -> None:
        """Finishes requests in flight, then stops the thread and the engine."""
        if not self._closing:
            self._closing = True
            self._inbox.put(None)
            self._thread.join(timeout=60)

    def _run(self, ready: threading.Event) -> None:
        try:
            engine = self._start()
        except Exception as error:
            self._fatal = error
            return
        finally:
            ready.set()
        waiting: dict[str, _Pending] = {}
        try:
            self._step_until_closed(engine, waiting)
        except Exception as error:
            self._fatal = error
            for pending in waiting.values():
                _resolve(pending, EngineStopped(f"vLLM has stopped: {error}"))
            while not self._inbox.empty():
                if (late := self._inbox.get()) is not None:
                    _resolve(late, EngineStopped(f"vLLM has stopped: {error}"))

    def _step_until_closed(self, engine: Any, waiting: dict[str, _Pending]) -> None:
        from vllm.exceptions import VLLMClientError

        counter, counted = 0, 0.0
        adapters: dict[str, Any] = {}
        while True:
            while not self._inbox.empty() or not engine.has_unfinished_requests():
                pending = self._inbox.get()
                if pending is None:
                    return
                if pending.future.cancelled():
                    continue
                if isinstance(pending, _Call):
                    engine.collective_rpc(pending.method, args=pending.arguments)
                    _resolve(pending, None)
                    continue
                counter += 1
                try:
                    prompt = {"prompt_token_ids": pending.prompt_token_ids}
                    lora = _lora_request(pending.adapter, adapters)
                    engine.add_request(name := str(counter), prompt, pending.params, lora_request=lora)
                    waiting[name] = pending
                except (
                    ValueError,
                    VLLMClientError,
                ) as error:  # only this request: a length or option that vLLM refuses
                    _resolve(pending, RequestRefused(f"vLLM refused the request: {error}"))
            if given_up := [name for name, pending in waiting.items() if pending.future.cancelled()]:
                engine.abort_request(given_up)
                for name in given_up:
                    del waiting[name]
                continue
            finished = [output for output in engine.step() if output.finished and output.request_id in waiting]
            counts: dict[str, tuple[int, int, int]] = {}
            if finished and self._drafts:
                ids = [output.request_id for output in finished]
                counts = engine.collective_rpc("owlrec_request_counts", args=(ids,))[0]
                if len(finished) == len(waiting) or time.monotonic() - counted > _COUNT_EVERY_S:
                    counters = engine.collective_rpc("owlrec_counters")[0]
                    self.counters = DecoderCounters.model_validate_json(counters)
                    counted = time.monotonic()
            for output in finished:
                counted_tokens = counts.get(output.request_id, (0, 0, 0))
                answer = EngineAnswer(output.outputs[0], counted_tokens, output.num_cached_tokens or 0)
                _resolve(waiting.pop(output.request_id), answer)


def _lora_request(folder: str | None, known: dict[str, Any]) -> Any:
    """vLLM's name of an adapter: the same for the same folder, since cached prefixes depend on it."""
    if folder is None:
        return None
    from vllm.lora.request import LoRARequest

    return known.setdefault(folder, LoRARequest(folder, len(known) + 1, folder))


def _resolve(pending: _Pending | _Call, result: Any) -> None:
    def settle() -> None:
        if pending.future.cancelled():
            return
        if isinstance(result, BaseException):
            pending.future.set_exception(result)
        else:
            pending.future.set_result(result)

    pending.loop.call_soon_threadsafe(settle)


# ---------------------------------------------------------------------------------------------------------- vllm engine


_REMEMBERED_COUNTS = 1 << 16
_MOST_ROWS = 1024  # vLLM's own choice on the largest GPUs
# vllm.EngineArgs for speed, hardware and monitoring, which do not change answers. All others
# count as changing answers.
_NAMES = """
    gpu_memory_utilization gpu_memory_utilization_limit kv_cache_memory_bytes block_size num_gpu_blocks_override
    enable_prefix_caching prefix_caching_hash_algo swap_space cpu_offload_gb kv_offloading_size
    max_num_batched_tokens max_num_seqs max_num_partial_prefills max_long_partial_prefills
    long_prefill_token_threshold enable_chunked_prefill async_scheduling scheduling_policy scheduler_cls
    scheduler_reserve_full_isl stream_interval tensor_parallel_size pipeline_parallel_size data_parallel_size
    data_parallel_backend decode_context_parallel_size prefill_context_parallel_size enable_expert_parallel
    distributed_executor_backend max_parallel_loading_workers disable_custom_all_reduce worker_cls
    worker_extension_cls ray_workers_use_nsight load_format download_dir safetensors_load_strategy
    model_loader_extra_config ignore_patterns use_tqdm_on_load disable_log_stats disable_log_requests
    enable_log_requests otlp_traces_endpoint collect_detailed_traces show_hidden_metrics_for_version
    kv_cache_metrics cudagraph_metrics enable_mfu_metrics enforce_eager compilation_config
    cudagraph_capture_sizes max_cudagraph_capture_size optimization_level
    performance_mode seed_device trust_remote_code hf_token
    device numa_bind disable_hybrid_kv_cache_manager kv_transfer_config kv_events_config
"""
_OPERATIONAL = frozenset(_NAMES.split())
_FP8 = {"quantization": "fp8", "kv_cache_dtype": "fp8"}  # vllm.EngineArgs of `precision: fp8`


class VllmEngineConfig(EngineConfig):
    """vLLM settings. `engine_args` passes any other vllm.EngineArgs through (quantization, tensor_parallel_size,
    enable_lora, …).
    """

    shapes_output: ClassVar[tuple[str, ...]] = ("type", "dtype", "precision", "revision", "engine_args")

    type: Literal["vllm"]
    model: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    # fp8: weights quantized while loading, and a cache of half the bytes, for GPUs from compute capability 8.9 on.
    precision: Literal["auto", "fp8"] = "auto"
    max_model_len: int = Field(2048, ge=64)
    # Rows at once. None = what vLLM's LLM class takes on the device (1,024 on an H100), but on a CPU no more rows of
    # max_model_len than the cache holds.
    max_num_seqs: int | None = Field(None, ge=1)
    threads: int | None = None  # CPU only; None = all cores
    # CPU only; SmolLM2-135M takes 23 kB per token, so 2 GiB hold 91 rows of 1,024 tokens.
    kv_cache_gib: int = Field(2, ge=1)
    engine_args: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_precision(self) -> "VllmEngineConfig":
        if self.precision != "auto":
            if taken := sorted(_FP8.keys() & self.engine_args.keys()):
                raise ValueError(f"precision and engine_args.{taken[0]} set the same: leave one out")
            if self.dtype == "float32":
                raise ValueError("precision: fp8 computes in bfloat16 or float16: leave out dtype: float32")
        return self

    def shaping(self) -> dict[str, Any]:
        """See EngineConfig.shaping: without engine_args such as a share of the GPU's memory."""
        shaping = super().shaping()
        return shaping | {"engine_args": {k: v for k, v in shaping["engine_args"].items() if k not in _OPERATIONAL}}

    @property
    def rows_at_once(self) -> int:
        """See EngineConfig.rows_at_once."""
        return self.max_num_seqs or _MOST_ROWS

    @property
    def model_identity(self) -> str:
        """See EngineConfig.model_identity."""
        return model_identity(self.model, self.revision)

    def start(self, decoding: DecodingConfig) -> "VllmEngine":
        """See EngineConfig.start."""
        return VllmEngine(self, decoding)

    def token_counter(self) -> Callable[[str], int]:
        """By the model's tokenizer; see count_by."""
        return count_by(load_tokenizer(self.model, self.revision))


@dataclass(frozen=True)
class EngineSize:
    """What an engine computes at once and keeps, as vLLM chose it."""

    rows: int  # at once, at most
    step_tokens: int  # of a step, at most
    cache_tokens: int  # keys and values that the cache holds
    cache_bytes: int


@dataclass(frozen=True)
class NextTokenScores:
    """scores: logits if the engine's logprobs_mode is raw_logits, log-probabilities in vLLM's default mode."""

    scores: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int  # prompt tokens reused from the cache


class VllmEngine(Engine):
    """A tokenizer with its thread, and the thread that steps a vllm.LLMEngine."""

    def __init__(self, config: VllmEngineConfig, decoding: DecodingConfig, limits: DraftLimits | None = None) -> None:
        """Loads the model; takes seconds on a CPU, minutes for a large model. Raises EngineError if it cannot
        start.
        """
        if decoding.mode != "off" and "speculative_config" in config.engine_args:
            raise EngineError(
                f"engine.engine_args.speculative_config and decoding.mode: {decoding.mode} cannot be combined. "
                "Remove one."
            )
        self.config, self.decoding, self.limits = config, decoding, limits
        self.cpu = on_cpu()
        if self.cpu and config.precision == "fp8":
            raise EngineError(
                "engine.precision: fp8 needs a GPU, but vLLM's CPU build is installed. Leave the key out, or install "
                "owlrec[gpu] on a machine with one."
            )
        self.model = resolve_model(config.model)
        self._rendering = ThreadPoolExecutor(1, "render")
        prepare_environment(config, self.cpu)
        try:
            self._stepping = Stepping(self._start, drafts=decoding.mode != "off")
        except Exception as error:
            raise EngineError(
                f"vLLM could not start {config.model}: {error}. See the log for its own messages."
            ) from error

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        """See Engine.complete. Raises EngineStopped if vLLM itself has failed."""
        token_ids = await self.token_ids(system, prompt)
        check_length(len(token_ids), sampling, self.context_tokens)
        answer = await self._stepping.ask(token_ids, self._params(sampling, extra))
        self.counters, output = self._stepping.counters, answer.output
        return Completion(
            text=output.text.strip(),
            prompt_tokens=len(token_ids),
            output_tokens=len(output.token_ids),
            finish_reason=output.finish_reason or "stop",
            drafted=answer.counts[0],
            accepted=answer.counts[1],
            relaxed=answer.counts[2],
            cached_tokens=answer.cached_tokens,
        )

    async def token_ids(self, system: str, prompt: str, options: Mapping[str, Any] | None = None) -> list[int]:
        """See render_chat. In a thread of its own, so that neither the caller's loop nor the stepping thread waits:
        rows asked at once are tokenized ahead of the engine, in their order.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._rendering, render_chat, self._tokenizer, system, prompt, options)

    async def next_token_scores(
        self, token_ids: Sequence[int], wanted: Sequence[int], adapter: str | None = None
    ) -> NextTokenScores:
        """The model's scores of each `wanted` token as the next one, however unlikely.

        token_ids: a whole prompt. adapter: a LoRA folder, which the engine reads once: a changed one needs another
        name. Engines whose decoder drafts have no such scores. Raises RowError if this request fails permanently,
        and EngineStopped if vLLM itself has failed.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check_length(len(token_ids), SamplingConfig(max_tokens=1), self.context_tokens)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=list(wanted),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        answer = await self._stepping.ask(token_ids, params, adapter)
        logprobs = answer.output.logprobs[0]
        return NextTokenScores(tuple(logprobs[token].logprob for token in wanted), len(token_ids), answer.cached_tokens)

    async def open_texts(self, pools: Mapping[str, Mapping[int, str]], *, searchable: bool = True) -> None:
        """See Engine.open_texts. The indexes are built in a thread, beside the engine's steps."""
        if self.decoding.mode != "off" and pools:
            built = await asyncio.to_thread(lambda: {n: self._pool(texts, searchable) for n, texts in pools.items()})
            await self._stepping.call("owlrec_open_pools", built)

    async def close_texts(self, pools: Sequence[str]) -> None:
        """See Engine.close_texts."""
        if self.decoding.mode != "off":
            await self._stepping.call("owlrec_close_pools", list(pools))

    def _pool(self, texts: Mapping[int, str], searchable: bool) -> list[bytes]:
        from owlrec_decoding.index import build_pool  # here, since importing numba takes a second
        from owlrec_decoding.pools import answer_tokens

        tokens = list(answer_tokens(self._tokenizer, list(texts.values())))
        return build_pool(tokens, list(texts), searchable=searchable).to_bytes()

    def count_tokens(self, text: str) -> int:
        """Exact; see count_by."""
        return self._count(text)

    def close(self) -> None:
        """Finishes requests in flight, stops the threads and frees the model."""
        self._rendering.shutdown(wait=False)
        self._stepping.close()

    def _params(self, sampling: SamplingConfig, extra: Mapping[str, Any] | None) -> Any:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        try:
            return SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=dict(extra) if extra else None,
                **sampling.options,  # vLLM checks them
            )
        except (TypeError, VLLMClientError) as error:
            raise EngineError(f"sampling.options: vLLM does not take them ({error}). Correct the recipe.") from None

    def _start(self) -> Any:
        engine = self._build()
        self._tokenizer = engine.get_tokenizer()
        self._count = count_by(self._tokenizer)
        if not self._tokenizer.chat_template:
            raise EngineError("its tokenizer has no chat template. Use the instruction-tuned version of the model")
        self.context_tokens = int(engine.model_config.max_model_len)
        return engine

    def _build(self) -> Any:
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        args: dict[str, Any] = {
            "model": self.model,
            "revision": self.config.revision,
            "dtype": self.config.dtype,
            "max_model_len": self.config.max_model_len,
            "max_num_seqs": self.config.max_num_seqs,
            # Compiling takes about a minute at the first start, and gains little on a CPU at these batch sizes.
            "enforce_eager": self.cpu,
            "disable_log_stats": True,
        }
        if self.config.precision == "fp8":
            args |= _FP8
        if self.cpu:
            # Prefixes are cached in whole blocks: the CPU default of 128 tokens is longer than the system turn that all
            # rows share.
            args["block_size"] = 32
        args |= engine_arguments(self.decoding, limits=self.limits, cpu=self.cpu) | self.config.engine_args
        if self.cpu and args.get("enable_lora"):
            from vllm.platforms.cpu import CpuPlatform

            CpuPlatform.get_punica_wrapper = classmethod(lambda cls: "owlrec.generation.cpu_lora.RunwiseLora")
        # vLLM chooses batched tokens and rows by device and context of use; only this one is meant for batches.
        context = UsageContext.LLM_CLASS
        settings = EngineArgs(**args).create_engine_config(context)
        if self.cpu and args["max_num_seqs"] is None:
            scheduler = settings.scheduler_config
            scheduler.max_num_seqs = max(1, min(scheduler.max_num_seqs, rows_in_cache(settings)))
        engine = LLMEngine.from_vllm_config(settings, context, disable_log_stats=args["disable_log_stats"])
        scheduler, cache_tokens = settings.scheduler_config, settings.cache_config.kv_cache_size_tokens or 0
        self.size = EngineSize(
            scheduler.max_num_seqs, scheduler.max_num_batched_tokens, cache_tokens, cache_tokens * token_bytes(settings)
        )
        return engine


def on_cpu() -> bool:
    """Whether vLLM's CPU build is installed. Raises EngineError if vLLM is missing or has another version."""
    try:
        return is_cpu_build()
    except VllmError as error:
        raise EngineError(str(error)) from None


def rows_in_cache(settings: Any) -> int:
    """Rows of max_model_len that a cache of a fixed size holds, so that no row is preempted and read again.

    settings: a VllmConfig.
    """
    cache, length = settings.cache_config, settings.model_config.max_model_len
    blocks = cache.kv_cache_memory_bytes // (token_bytes(settings) * cache.block_size)
    return int(blocks // -(-length // cache.block_size))


def token_bytes(settings: Any) -> int:
    """Bytes of a token in a rank's cache: keys and values of every layer, an upper bound for models that keep less.

    settings: a VllmConfig.
    """
    model, parallel = settings.model_config, settings.parallel_config
    heads = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    number_bytes = 1 if settings.cache_config.cache_dtype.startswith("fp8") else model.dtype.itemsize
    return max(1, int(2 * heads * model.get_head_size() * number_bytes))  # a model without attention keeps none


def count_by(tokenizer: Any) -> Callable[[str], int]:
    """Function that counts tokens without special ones. Cached: most titles occur in many histories."""
    return lru_cache(maxsize=_REMEMBERED_COUNTS)(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))


def prepare_environment(config: VllmEngineConfig, cpu: bool) -> None:
    """Sets variables that vLLM and its libraries read only from the environment, on import."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.path.isdir(config.model) or config.model == PACKAGED:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)
        os.environ["OMP_NUM_THREADS"] = str(config.threads or len(os.sched_getaffinity(0)))


# --------------------------------------------------------------------------------------------------------- engine sweep
# A small grid over an engine's settings, measured on a sample of the recipe's own prompts.
#
# Modeled on datatrove's inference benchmark (examples/inference/benchmark): failures stay rows of the table, and it
# ends in a recipe. One axis after the other is tried from the best so far, so that four axes take about seven engines
# in place of 36. Each engine has its own process: it holds global state, and one that dies takes nothing with it.


_CLEARLY = 1.02  # times the best rate so far: a smaller gain is noise
WARM_UP = 8  # prompts before the clock starts
_SETTING_S = 3600.0  # for loading the model and answering the sample
_REASON = 500  # characters of a failure's reason
_CHILD = "import sys; from owlrec.generation.vllm_engine import measure_file; measure_file(*sys.argv[1:])"


class EngineSetting(Config):
    """One point of the grid. None = vLLM's choice."""

    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    precision: Literal["auto", "fp8"] = "auto"
    decoding: Literal["off", "strict", "relaxed"] = "off"

    @classmethod
    def of(cls, engine: VllmEngineConfig, decoding: DecodingConfig) -> "EngineSetting":
        """The setting that a recipe has."""
        args = engine.engine_args
        rows, tokens = args.get("max_num_seqs", engine.max_num_seqs), args.get("max_num_batched_tokens")
        return cls(max_num_seqs=rows, max_num_batched_tokens=tokens, precision=engine.precision, decoding=decoding.mode)

    @property
    def label(self) -> str:
        """One line of text."""
        rows, tokens = self.max_num_seqs or "default", self.max_num_batched_tokens or "default"
        return f"{rows} rows, {tokens} tokens per step, precision {self.precision}, decoding {self.decoding}"

    def lines(self, engine: VllmEngineConfig, decoding: DecodingConfig) -> dict[str, dict[str, Any]]:
        """The recipe's sections with this setting: the keys in which it differs from the recipe's own."""
        before, ours, args = EngineSetting.of(engine, decoding), dict[str, Any](), dict(engine.engine_args)
        if self.max_num_seqs != before.max_num_seqs:
            ours["max_num_seqs"] = self.max_num_seqs
            args.pop("max_num_seqs", None)  # would win over ours
        if self.precision != before.precision:
            ours["precision"] = self.precision
        if self.max_num_batched_tokens != before.max_num_batched_tokens:
            args["max_num_batched_tokens"] = self.max_num_batched_tokens
        if args != engine.engine_args:
            ours["engine_args"] = args
        changed = {"mode": self.decoding} if self.decoding != before.decoding else {}
        return {name: keys for name, keys in (("engine", ours), ("decoding", changed)) if keys}


class MeasuredSetting(Config):
    """What an engine with one setting did; only `error` where it failed."""

    setting: EngineSetting
    prompts_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    cached_share: float = 0.0  # of the prompts' tokens
    rows: int = 0
    step_tokens: int = 0
    cache_tokens: int = 0
    cache_gib: float = 0.0
    startup_s: float = 0.0
    failed_rows: int = 0
    error: str = ""

    def beats(self, other: "MeasuredSetting") -> bool:
        """Whether it answers clearly more prompts per second."""
        return not self.error and (bool(other.error) or self.prompts_per_s > _CLEARLY * other.prompts_per_s)


def default_axes(first: MeasuredSetting, *, cpu: bool) -> dict[str, list[Any]]:
    """Values to try by field of EngineSetting: half and twice what the first engine took, then other ways to run."""
    rows, tokens = first.rows or 128, first.step_tokens or 4096  # where the first one failed
    axes: dict[str, list[Any]] = {
        "max_num_seqs": [max(1, rows // 2), 2 * rows],
        "max_num_batched_tokens": [max(1, tokens // 2), 2 * tokens],
    }
    if not cpu:
        axes["precision"] = ["auto", "fp8"]
    axes["decoding"] = ["off", "strict"]
    return axes


def sweep(
    first: EngineSetting,
    axes: Mapping[str, Sequence[Any]],
    measure: Callable[[EngineSetting], MeasuredSetting],
    *,
    cpu: bool,
) -> tuple[list[MeasuredSetting], MeasuredSetting]:
    """All measured settings in order, and the best.

    axes: values by field of EngineSetting; fields without have those of default_axes, and none if empty.
    """
    rows = [measure(first)]
    best = rows[0]
    for name, values in (default_axes(best, cpu=cpu) | dict(axes)).items():
        start = best.setting
        for value in values:
            setting = start.model_copy(update={name: value})
            if any(row.setting == setting for row in rows):
                continue
            rows.append(measure(setting))
            if rows[-1].beats(best):
                best = rows[-1]
    return rows, best


def measure_setting(
    setting: EngineSetting,
    engine: VllmEngineConfig,
    decoding: DecodingConfig,
    sampling: SamplingConfig,
    prompts: Sequence[tuple[str, str]],
    log: Path,
) -> MeasuredSetting:
    """Answers `prompts`, pairs of system and user turn, by a new engine in a process of its own.

    log: file for that process's output.
    """
    lines = setting.lines(engine, decoding)
    job = {
        "setting": setting.model_dump(),
        "engine": engine.model_dump() | lines.get("engine", {}),
        "decoding": decoding.model_dump() | lines.get("decoding", {}),
        "sampling": sampling.model_dump(),
        "prompts": list(prompts),
    }
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps(job))
        command = [sys.executable, "-c", _CHILD, str(asked), str(answered)]
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(_SETTING_S)
        except subprocess.TimeoutExpired:
            return MeasuredSetting(setting=setting, error=f"took more than {_SETTING_S:,.0f} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # vLLM's own processes, too
            process.wait()
        if answered.exists():
            return MeasuredSetting.model_validate_json(answered.read_bytes())
    return MeasuredSetting(setting=setting, error=f"the engine's process ended with {code}; see {log}")


def measure_file(asked: str, answered: str) -> None:
    """Entry point of measure_setting's process: reads a job and writes a MeasuredSetting, both JSON."""
    job = json.loads(Path(asked).read_bytes())
    setting = EngineSetting.model_validate(job["setting"])
    try:
        engine = VllmEngineConfig.model_validate(job["engine"])
        decoding, sampling = DecodingConfig(**job["decoding"]), SamplingConfig(**job["sampling"])
        measured = asyncio.run(_measure(setting, engine, decoding, sampling, job["prompts"]))
    except (EngineError, ValidationError) as error:
        measured = MeasuredSetting(setting=setting, error=" ".join(str(error).split())[:_REASON])
    Path(answered).write_text(measured.model_dump_json())


async def _measure(
    setting: EngineSetting,
    config: VllmEngineConfig,
    decoding: DecodingConfig,
    sampling: SamplingConfig,
    prompts: Sequence[tuple[str, str]],
) -> MeasuredSetting:
    start = time.perf_counter()
    engine = VllmEngine(config, decoding)
    startup_s = time.perf_counter() - start

    async def ask(system: str, prompt: str) -> Completion | None:
        try:
            return await engine.complete(system, prompt, sampling)
        except RowError:
            return None

    try:
        await asyncio.gather(*(ask(*turns) for turns in prompts[:WARM_UP]))
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(*turns) for turns in prompts[WARM_UP:]))
        seconds = time.perf_counter() - start
    finally:
        engine.close()
    done = [answer for answer in answers if answer is not None]
    read, cached, written = (
        sum(getattr(answer, name) for answer in done) for name in ("prompt_tokens", "cached_tokens", "output_tokens")
    )
    return MeasuredSetting(
        setting=setting,
        prompts_per_s=len(done) / seconds,
        output_tokens_per_s=written / seconds,
        cached_share=cached / read if read else 0.0,
        rows=engine.size.rows,
        step_tokens=engine.size.step_tokens,
        cache_tokens=engine.size.cache_tokens,
        cache_gib=engine.size.cache_bytes / 2**30,
        startup_s=startup_s,
        failed_rows=len(answers) - len(done),
    )
