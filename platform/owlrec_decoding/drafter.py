"""The proposer that vLLM 0.32's `custom_class` speculation calls once per step: retrieval, then the controller's limit.

vLLM passes token ids but not their requests (custom_class_proposer.py, gpu_model_runner.py:4778), so the worker binds
the model runner after building it; requests then name their pools in `extra_args`. State is kept by request id, because
rows change places between steps.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from owlrec_decoding import options
from owlrec_decoding.controller import Controller
from owlrec_decoding.index import CONTEXT, LIVE, NOTHING, SEALED, TEXT, LivePool, SearchSet, build_pool
from owlrec_decoding.options import DEFAULT_POOL, DecodingConfig, DraftLimits, Relaxation
from owlrec_decoding.pools import Pools
from owlrec_decoding.retrieval import AcceptanceRates, Drafts, draft_rows

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
    proposed: tuple[int, np.ndarray] | None = None  # group of the last proposed tokens, and the cell of each
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
            np.full(1, 2),
            np.array([texts]),
            np.zeros((1, len(texts)), np.int64),
            search_set,
            self.rates.rates,
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
        groups, cells, fates = [], [], []
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
            group, cell = state.proposed
            seen = min(accepted + 1, scheduled, len(cell))
            groups.append(np.full(seen, group))
            cells.append(cell[:seen])
            fates.append(np.arange(seen) < accepted)
            state.proposed = None
        if groups:
            self.rates.observe(np.concatenate(groups), np.concatenate(cells), np.concatenate(fates))

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
        written = n - self._runner.input_batch.num_prompt_tokens[rows]
        missing = np.array([s.min_tokens for s in states]) - written
        room = np.where(missing > 0, np.minimum(room, missing - 1), room)
        room = np.minimum(room, np.array([s.max_tokens for s in states]) - written - 1)
        limits = np.where(drafting, np.clip(room, 0, self.limits.max_draft), 0)
        relaxed = np.array([s.rule is not None for s in states], np.int64) * len(CLASSES)
        groups = np.stack([s.classes for s in states]) + relaxed[:, None]
        sources = np.stack([s.sources for s in states])
        floor = self.controller.floor(len(rows))
        depth = self.limits.max_draft
        return draft_rows(
            tokens, rows, n, limits, sources, groups, self.pools.search_set, self.rates.rates, depth=depth, floor=floor
        )

    def _propose(self, rows: list[int], states: list[RequestState], proposals: Drafts, drafts: list[list[int]]) -> None:
        assert self.controller is not None
        shares = self.controller.allocate(proposals.chance, proposals.count)
        for at in np.flatnonzero(shares):
            state, share, source = states[at], int(shares[at]), int(proposals.source[at])
            class_ = int(state.classes[source])
            group = class_ + (len(CLASSES) if state.rule is not None else 0)
            drafts[rows[at]] = proposals.tokens[at, :share].tolist()
            state.proposed = (group, proposals.cell[at, :share].astype(np.int64))
            self.counts[f"hits_{CLASSES[class_]}"] += 1


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
