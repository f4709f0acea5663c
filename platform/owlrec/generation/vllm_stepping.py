"""One thread steps a vllm.LLMEngine, any number of callers await their rows.

A row whose caller has given up is dropped: a ranking that missed its deadline must not delay the next.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from owlrec.decoding.counters import DecoderCounters
from owlrec.generation.engine import EngineStopped, RequestRefused

_COUNT_EVERY_S = 1.0  # in a full batch some row ends at most steps; asking each time would cost more than it tells


@dataclass
class Answer:
    """Of one request."""

    output: Any  # vLLM's CompletionOutput
    counts: tuple[int, int, int]  # tokens drafted, accepted, and accepted by the relaxed rule alone
    cached_tokens: int  # of the prompt, that were not computed again


@dataclass
class _Pending:
    prompt_token_ids: list[int]
    params: Any
    adapter: str | None
    future: asyncio.Future[Answer]
    loop: asyncio.AbstractEventLoop


class Stepping:
    """The thread, and the engine that lives in it."""

    def __init__(self, start: Callable[[], Any], *, drafts: bool) -> None:
        """start: makes the engine; what it raises is raised here. drafts: whether the engine has the retrieval decoder,
        whose counts are then asked for.
        """
        self.counters: DecoderCounters | None = None
        self._start, self._drafts = start, drafts
        self._inbox: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
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

    async def ask(self, token_ids: Sequence[int], params: Any, adapter: str | None = None) -> Answer:
        """The answer to a prompt. params: vLLM's SamplingParams. adapter: a LoRA folder.

        Raises RequestRefused where vLLM will not take the request, EngineStopped where vLLM itself has failed.
        """
        if self._fatal is not None:
            raise EngineStopped(f"vLLM has stopped: {self._fatal}")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._inbox.put(_Pending(list(token_ids), params, adapter, future, loop))
        return await future

    def close(self) -> None:
        """Ends the thread after what is in flight, and the engine with it."""
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
        counter, counted = 0, 0.0
        adapters: dict[str, Any] = {}
        while True:
            while not self._inbox.empty() or not engine.has_unfinished_requests():
                pending = self._inbox.get()
                if pending is None:
                    return
                if pending.future.cancelled():
                    continue
                counter += 1
                try:
                    prompt = {"prompt_token_ids": pending.prompt_token_ids}
                    lora = _lora_request(pending.adapter, adapters)
                    engine.add_request(name := str(counter), prompt, pending.params, lora_request=lora)
                    waiting[name] = pending
                except ValueError as error:  # this request only: a length or an option that vLLM refuses
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
                answer = Answer(output.outputs[0], counted_tokens, output.num_cached_tokens or 0)
                _resolve(waiting.pop(output.request_id), answer)


def _lora_request(folder: str | None, known: dict[str, Any]) -> Any:
    """vLLM's name of an adapter: the same for the same folder, since prefixes are kept by it."""
    if folder is None:
        return None
    from vllm.lora.request import LoRARequest

    return known.setdefault(folder, LoRARequest(folder, len(known) + 1, folder))


def _resolve(pending: _Pending, result: Any) -> None:
    def settle() -> None:
        if pending.future.cancelled():
            return
        if isinstance(result, BaseException):
            pending.future.set_exception(result)
        else:
            pending.future.set_result(result)

    pending.loop.call_soon_threadsafe(settle)
