"""The thread around an engine: what nobody waits for any more is not computed."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from owlrec.generation.vllm_engine import EngineAnswer, Stepping


class Engine:
    """Answers all that it holds in the third step after it came; a step takes until it is let go."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.added: list[list[int]] = []
        self.aborted: list[str] = []
        self.stepping, self.let_go = threading.Event(), threading.Semaphore(0)

    def add_request(self, name: str, prompt: dict[str, Any], params: Any, lora_request: Any) -> None:
        self.held[name] = 0
        self.added.append(prompt["prompt_token_ids"])

    def has_unfinished_requests(self) -> bool:
        return bool(self.held)

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        for name in names:
            del self.held[name]

    def step(self) -> list[Any]:
        self.stepping.set()
        self.let_go.acquire(timeout=20)
        self.held = {name: steps + 1 for name, steps in self.held.items()}
        done = [name for name, steps in self.held.items() if steps == 3]
        for name in done:
            del self.held[name]
        return [SimpleNamespace(request_id=n, finished=True, outputs=[n], num_cached_tokens=7) for n in done]


def test_rows_that_are_given_up_are_dropped_and_others_answered() -> None:
    engine = Engine()
    stepping = Stepping(lambda: engine, drafts=False)

    async def ask_and_give_up() -> list[EngineAnswer]:
        started = asyncio.create_task(stepping.ask([1], None))
        await asyncio.to_thread(engine.stepping.wait, 20)
        kept, waiting = (asyncio.create_task(stepping.ask([token], None)) for token in (2, 3))
        await asyncio.sleep(0)  # both are in the inbox
        started.cancel()
        waiting.cancel()
        await asyncio.gather(started, waiting, return_exceptions=True)
        engine.let_go.release(10)
        return [await kept, await stepping.ask([4], None)]

    answers = asyncio.run(asyncio.wait_for(ask_and_give_up(), 20))
    stepping.close()
    assert engine.added == [[1], [2], [4]]  # 3 never came so far
    assert engine.aborted == ["1"]
    assert answers == [EngineAnswer(name, (0, 0, 0), 7) for name in ("2", "3")]
