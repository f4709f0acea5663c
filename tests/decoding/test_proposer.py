"""The proposer without an engine: requests come and go, and so do pools, while it drafts."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_engine import Eager  # type: ignore[import-not-found]
from vllm.sampling_params import SamplingParams

from owlrec_decoding import DecodingConfig, DraftLimits, engine_arguments, request_arguments
from owlrec_decoding.controller import StepTimes
from owlrec_decoding.drafter import RetrievalProposer
from owlrec_decoding.index import CONTEXT, LIVE, NOTHING, SEALED, TEXT, SealedPool, SearchSet, build_pool
from owlrec_decoding.options import DOCUMENT, POOLS
from owlrec_decoding.pools import Drafts, draft_rows

pytestmark = pytest.mark.vllm
VOCABULARY, WIDTH, MAX_DRAFT, END = 40, 120, 6, 1
NAMES = [f"pool {i}" for i in range(6)]


def make_proposer(live_tokens: int = 1 << 10) -> RetrievalProposer:
    limits = DraftLimits(max_draft=MAX_DRAFT, live_tokens=live_tokens)
    settings = engine_arguments(DecodingConfig(mode="strict"), limits=limits, cpu=True)["additional_config"]
    model = SimpleNamespace(max_model_len=WIDTH, get_vocab_size=lambda: VOCABULARY)
    proposer = RetrievalProposer(SimpleNamespace(additional_config=settings, model_config=model))
    proposer.load_model(None)
    return proposer


def test_a_pool_with_tokens_that_the_model_lacks_is_left_out_and_counted() -> None:
    proposer = make_proposer()
    proposer.open_pools({"a": build_pool([[1, 2]], [7]), "b": build_pool([[3, 4]])})
    proposer.open_pools({"a": build_pool([[1, VOCABULARY]], [7]), "c": build_pool([[5, VOCABULARY - 1]])})
    assert [name for name in "abc" if proposer.pools.known(name)] == ["b", "c"]  # nor the earlier texts of "a"
    assert proposer.counts["refused_pools"] == 1


class Batch:
    """Rows that write texts of a Markov chain, as vLLM's runner would hand them to the proposer, and the pools that
    are open. What the proposer finds is compared with a search in the same pools alone, in places of their own.
    """

    def __init__(self, seed: int, rows: int) -> None:
        self.rng, self.rows, self.compared, self.fresh = np.random.default_rng(seed), rows, 0, 0
        self.followers = self.rng.integers(0, VOCABULARY, (VOCABULARY, 3))
        self.proposer = make_proposer()
        self.open: dict[str, SealedPool] = {}
        self.contexts, self.lengths = np.zeros((rows, WIDTH), np.int32), np.zeros(rows, np.int32)
        self.input = SimpleNamespace(req_ids=[], num_prompt_tokens=np.zeros(rows, np.int32))
        self.runner = SimpleNamespace(requests={}, input_batch=self.input)
        self.verifier = SimpleNamespace(verdict=SimpleNamespace(relaxed=np.zeros(rows, np.int64)), rules=None)
        controller = Eager(StepTimes([1, 2], [1.0, 1.0]), max_draft=MAX_DRAFT, max_step_tokens=100)
        self.proposer.bind(self.runner, self.verifier, controller)
        self.search, self.proposer._search = self.proposer._search, self.compare  # type: ignore[method-assign]
        self.named: dict[str, list[str]] = {}  # of each request, those that were open in its first step
        self.own: dict[str, np.ndarray] = {}  # its own earlier text, when it first drafted
        self.outputs: dict[str, list[int]] = {}
        self.drafts: list[list[int]] = []

    def text(self, length: int) -> list[int]:
        tokens = [int(self.rng.integers(0, VOCABULARY))]
        while len(tokens) < length:
            tokens.append(int(self.followers[tokens[-1], min(2, self.rng.geometric(0.7) - 1)]))
        return tokens

    def change_pools(self) -> None:
        name = str(self.rng.choice(NAMES))
        if name in self.open and self.rng.random() < 0.5:
            self.proposer.pools.close(name)
            del self.open[name]
            return
        texts = [self.text(int(self.rng.integers(1, 40))) for _ in range(int(self.rng.integers(0, 8)))]
        pool = build_pool(texts, list(range(len(texts))), searchable=self.rng.random() < 0.6)
        self.open[name] = pool
        self.proposer.open_pools({name: SealedPool.from_bytes(pool.to_bytes())})

    def finish(self, row: int) -> None:
        """The last row takes the place of one that ends."""
        ids, last = self.input.req_ids, len(self.input.req_ids) - 1
        id_, prompt = ids[row], self.contexts[row, : self.input.num_prompt_tokens[row]].tolist()
        self.proposer.finish(id_, prompt, self.outputs.pop(id_), {END})
        for array in (self.contexts, self.lengths, self.input.num_prompt_tokens):
            array[row] = array[last]
        ids[row], self.drafts[row] = ids[last], self.drafts[last]
        ids.pop()
        self.drafts.pop()
        self.named.pop(id_, None)
        self.own.pop(id_, None)
        del self.runner.requests[id_]

    def admit(self) -> None:
        row, id_, prompt = len(self.input.req_ids), f"{self.fresh}", self.text(int(self.rng.integers(1, WIDTH - 2)))
        self.fresh += 1
        names = [str(name) for name in self.rng.permutation(NAMES)[: self.rng.integers(0, 5)]]
        extra = request_arguments(names, int(self.rng.integers(0, 8)))
        most, stops = int(self.rng.integers(1, 60)), [END] if self.rng.random() < 0.5 else None
        params = SamplingParams(max_tokens=most, temperature=0.0, stop_token_ids=stops, extra_args=extra)
        self.runner.requests[id_] = SimpleNamespace(sampling_params=params)
        self.contexts[row, : len(prompt)], self.lengths[row] = prompt, len(prompt)
        self.input.num_prompt_tokens[row], self.outputs[id_] = len(prompt), []
        self.input.req_ids.append(id_)
        self.drafts.append([])

    def step(self) -> None:
        scheduled, emitted = {}, list[list[int]]()
        for row, id_ in enumerate(self.input.req_ids):
            draft = self.drafts[row][: int(self.rng.integers(0, MAX_DRAFT + 2))]  # the scheduler cuts some
            if draft:
                scheduled[id_] = len(draft)
            accepted = min(int(self.rng.geometric(0.4)) - 1, len(draft))
            new = [*draft[:accepted], self.text(1)[0]] if self.rng.random() < 0.9 else []  # not scheduled
            new = new[: WIDTH - int(self.lengths[row])]
            self.contexts[row, self.lengths[row] : self.lengths[row] + len(new)] = new
            self.lengths[row] += len(new)
            self.outputs[id_] += new
            emitted.append(new)
        if scheduled or any(emitted):
            for id_, request in self.runner.requests.items():
                asked = request.sampling_params.extra_args[POOLS][:4]
                self.named.setdefault(id_, [name for name in asked if name in self.open])
        rows = len(emitted)
        self.verifier.verdict.relaxed = np.zeros(rows, np.int64)
        self.proposer.begin_step(scheduled)
        self.drafts = self.proposer.propose(emitted, self.lengths[:rows], self.contexts)

    def compare(self, rows: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> Drafts:
        found = self.search(rows, lengths, tokens)
        for i, row in enumerate(rows):
            id_ = self.input.req_ids[row]
            slot, params = self.proposer.requests.slots[id_], self.runner.requests[id_].sampling_params
            alone, sources = SearchSet(), list[tuple[int, int]]()
            if id_ not in self.own:
                document = params.extra_args[DOCUMENT]
                texts = (self.open[name].document(document) for name in self.named[id_] if name in self.open)
                self.own[id_] = next((text for text in texts if len(text)), np.zeros(0, np.int32))
            if len(self.own[id_]):
                sources.append((TEXT, alone.add_text(self.own[id_])))
            for name in [*self.named[id_], "default"]:
                if name in self.open and len(self.open[name].order):
                    sources.append((SEALED, alone.add_sealed(self.open[name])))
                if name in self.proposer.pools._live:
                    sources.append((LIVE, alone.add_live(self.proposer.pools._live[name][0])))
            sources.append((CONTEXT, 0))
            groups = self.proposer.requests.groups[slot]
            padded = np.array([[*sources, *[(NOTHING, 0)] * (len(groups) - len(sources))]])
            prompt = int(self.input.num_prompt_tokens[row])
            room = min(WIDTH - lengths[row] - 1, prompt + params.max_tokens - lengths[row] - 1, MAX_DRAFT)
            expected = draft_rows(
                tokens[row : row + 1],
                np.zeros(1, np.int64),
                lengths[row : row + 1].astype(np.int64),
                np.array([prompt]),
                np.array([max(room, 0)], np.int64),
                padded,
                groups[None].copy(),
                alone,
                self.proposer.rates.factors,
                self.proposer._ends,
                depth=MAX_DRAFT,
                floor=0.01,
            )
            assert found.count[i] == expected.count[0]
            assert found.tokens[i].tolist() == expected.tokens[0].tolist()
            assert found.chance[i].tolist() == expected.chance[0].tolist()
            self.compared += int(found.count[i])
        return found


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_and_goes_beside_a_request_changes_nothing_that_it_drafts(seed: int) -> None:
    batch = Batch(seed, rows=2 + 2 * seed)
    for _ in range(120):
        batch.change_pools()
        for row in reversed(range(len(batch.input.req_ids))):
            id_ = batch.input.req_ids[row]
            full = batch.lengths[row] >= WIDTH
            most = batch.runner.requests[id_].sampling_params.max_tokens
            if full or len(batch.outputs[id_]) >= most or batch.rng.random() < 0.03:
                batch.finish(row)
        while len(batch.input.req_ids) < batch.rows and batch.rng.random() < 0.7:
            batch.admit()
        batch.step()
    counts: Any = batch.proposer.counts
    assert batch.compared > 100
    assert min(counts[f"hits_{of}"] for of in ("named", "own", "live", "context")) > 0
