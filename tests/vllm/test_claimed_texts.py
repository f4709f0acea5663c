"""From a release on an object store to the drafts of a real engine: what a claim reads, and what no step reads."""

import asyncio
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import obstore
import pytest
from release_rows import publish_rows, texts  # type: ignore[import-not-found]
from tiny_engine import Eager, tiny_model, write_tokenizer  # type: ignore[import-not-found]

from owlrec.generation import VllmEngineConfig, build_engine
from owlrec.generation.engines import Completion, SamplingConfig
from owlrec.generation.vllm_engine import VllmEngine
from owlrec.releases.earlier_texts import ReleasedTexts
from owlrec.workspace import Workspace
from owlrec_decoding import DecodingConfig, drafter, request_arguments

pytestmark = pytest.mark.vllm
ROWS = 256
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"


class Reads:
    """What is opened, on disk or on the store, by thread, from `start` on."""

    def __init__(self) -> None:
        self.by_thread: dict[str, list[str]] = {}
        self.watching = False
        sys.addaudithook(self._audit)  # Python has no way to remove one

    def note(self, what: str) -> None:
        if self.watching:
            self.by_thread.setdefault(threading.current_thread().name, []).append(what)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "socket.connect"):
            self.note(f"{event} {arguments[0]}")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads()

    def watched(name: str) -> Any:
        actual = getattr(obstore, name)

        def call(store: Any, path: str, *arguments: Any, **named: Any) -> Any:
            reads.note(f"store {path}")
            return actual(store, path, *arguments, **named)

        return call

    for name in ("get", "get_range", "head", "list"):
        monkeypatch.setattr(obstore, name, watched(name))
    return reads


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    from transformers import AutoTokenizer

    folder = tiny_model(tmp_path / "model", "Llama")
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = VllmEngineConfig(
        type="vllm", model=folder, dtype="float32", max_model_len=128, max_num_seqs=ROWS, kv_cache_gib=1
    )
    monkeypatch.setattr(drafter, "Controller", Eager)
    engine = build_engine(config, DecodingConfig(mode="strict"))
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


def test_rows_of_cohorts_on_a_store_draft_from_their_first_step_and_no_step_reads_a_file(
    engine: VllmEngine, s3_root: str, reads: Reads
) -> None:
    workspace = Workspace(s3_root)
    cohorts = {row: [f"c{row % 5}", f"c{row % 7}"] for row in range(ROWS)}

    async def write(pools: Mapping[int, list[str]]) -> list[Completion]:
        ask = SamplingConfig(max_tokens=24)
        return await asyncio.gather(
            *(engine.complete("", f"user {row}", ask, request_arguments(pools[row], row)) for row in range(ROWS))
        )

    written = asyncio.run(write({row: [] for row in range(ROWS)}))
    known = {row: answer.text for row, answer in enumerate(written) if len(answer.text) > 4}
    assert len(known) > ROWS / 2
    publish_rows(workspace, "old", texts({("user", row): text for row, text in known.items()}))

    async def refresh() -> list[Completion]:
        earlier = ReleasedTexts(workspace)
        async with earlier.offered(engine, "shard", "user", list(range(ROWS)), cohorts, {}) as pools:
            return await write(pools)

    before = engine.counters
    reads.watching = True
    again = asyncio.run(refresh())
    reads.watching = False
    assert before is not None
    assert engine.counters is not None
    counts = engine.counters.since(before).counts
    assert [answer.text for answer in again] == [answer.text for answer in written]
    assert all(again[row].accepted > 0 for row in known)
    assert counts["unknown_pools"] == 0
    assert counts["hits_own"] > 0
    assert counts["hits_named"] > 0
    # Everything was read by the claim, in other threads than the one that steps the engine.
    assert any(what.startswith("store releases/") for thread in reads.by_thread.values() for what in thread)
    assert "vllm-step" not in reads.by_thread
