"""Verification of draft tokens: strict (the text of plain decoding) or relaxed (DARE/LASER, sec.
4.2).

Relaxed: accepts a draft token if it is the argmax, or ranks within the k most likely with a probability above a
threshold (DARE) and, if a margin is set, within that margin of the most likely (TensorRT-LLM's form). Only greedy
requests are relaxed: a sampled one keeps its distribution. vLLM 0.32's own sampler converts, copies and scans all
logits of a draft several times. For purely greedy batches one argmax is enough, and the relaxed rule
checks only tokens that failed it and could still pass.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from owlrec_decoding.options import Relaxation

if TYPE_CHECKING:
    from vllm.v1.sample.metadata import SamplingMetadata

_NO_TOKEN = -1  # vLLM's PLACEHOLDER_TOKEN_ID
# Of SamplingMetadata, by row.
_PENALTIES = ("frequency_penalties", "presence_penalties", "repetition_penalties")
_TENSORS = ("temperature", "top_p", "top_k", "prompt_token_ids", *_PENALTIES)
_NO_MARGIN = 2.0  # larger than any difference of probabilities


def relaxed_accept(
    logits: torch.Tensor, draft: torch.Tensor, *, k: torch.Tensor, min_prob: torch.Tensor, margin: torch.Tensor
) -> torch.Tensor:
    """Draft tokens that the relaxed rule accepts, each judged separately: a chain still ends at its first rejected
    token.

    logits: [n, vocab], after penalties and masks, at temperature 1. draft: int64 [n]; -1 marks padding and is never
    accepted.
    k: int64 [n], 1 accepts only the argmax. min_prob, margin: float32 [n]; a margin of 1 or more has no effect.
    Returns bool [n].
    """
    logits, token = logits.float(), draft.clamp(min=0)
    theirs = logits.gather(1, token[:, None]).squeeze(1)
    top, argmax = logits.max(dim=-1)
    norm = logits.logsumexp(dim=-1)
    probability = (theirs - norm).exp()
    likely = ((logits > theirs[:, None]).sum(dim=-1) < k) & (probability > min_prob)
    likely &= (top - norm).exp() - probability <= margin
    return (draft >= 0) & ((argmax == token) | (likely & (k > 1)))


@dataclass(frozen=True)
class Verdict:
    """Verdict on a step, int64 [rows]: accepted drafts, and those among them accepted only by the relaxed
    rule."""

    accepted: np.ndarray
    relaxed: np.ndarray


@dataclass(frozen=True)
class RowRules:
    """The relaxed rule's parameters, by row or by draft token: k int64, 1 for strict; min_prob and margin float32.
    ends: bool [rows], whether a row's last draft token ends its text, which no relaxed rule accepts."""

    k: np.ndarray
    min_prob: np.ndarray
    margin: np.ndarray
    ends: np.ndarray

    def by_draft(self, counts: np.ndarray) -> "RowRules":
        """For each draft token of a step with `counts` of them by row."""
        k, min_prob, margin, ends = (
            np.repeat(a[: len(counts)], counts) for a in (self.k, self.min_prob, self.margin, self.ends)
        )
        last = np.zeros(len(k), bool)
        last[(np.cumsum(counts) - 1)[counts > 0]] = True
        k[ends & last] = 1
        return RowRules(k, min_prob, margin, ends)

    def accept(self, logits: torch.Tensor, draft: np.ndarray, at: np.ndarray) -> np.ndarray:
        """relaxed_accept for the draft tokens `at`. logits: [len(at), vocab]."""
        k, min_prob, margin, tokens = (
            torch.from_numpy(a[at]).to(logits.device) for a in (self.k, self.min_prob, self.margin, draft)
        )
        return relaxed_accept(logits, tokens, k=k, min_prob=min_prob, margin=margin).cpu().numpy()


def rule_numbers(rule: Relaxation | None) -> tuple[int, float, float]:
    """k, min_prob and margin of a rule; of None, the strict one."""
    if rule is None:
        return 1, 1.0, _NO_MARGIN
    return rule.k, rule.min_prob, _NO_MARGIN if rule.margin is None else rule.margin


def row_rules(rules: Sequence[Relaxation | None]) -> RowRules:
    """The rules of some rows."""
    k, min_prob, margin = zip(*map(rule_numbers, rules), strict=True) if rules else ((), (), ())
    numbers = np.array(k, np.int64), np.array(min_prob, np.float32), np.array(margin, np.float32)
    return RowRules(*numbers, np.zeros(len(rules), bool))


class Verifier(RejectionSampler):
    """vLLM's rejection sampler with a fast path for greedy batches, and the relaxed rule.

    rules: of the rows of a step, which the worker sets before it; None if no drafts are verified. verdict: of the last
    step.
    """

    def __init__(self, sampler: Any, spec_config: Any, device: torch.device) -> None:
        super().__init__(sampler, spec_config, device)
        self.rules: RowRules | None = None
        self.verdict = Verdict(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.seconds = 0.0  # time spent here since the start
        # For this step, on the slow path, [n_draft]: tokens, and whether only the relaxed rule accepts them.
        self._draft = np.zeros(0, np.int64)
        self._only_relaxed = np.zeros(0, dtype=bool)

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: "SamplingMetadata",
    ) -> SamplerOutput:
        """See RejectionSampler.forward."""
        start = time.perf_counter()
        counts = np.asarray(metadata.num_draft_tokens, dtype=np.int64)
        others = None if self.synthetic_mode or draft_probs is not None else _other_rows(sampling_metadata, len(counts))
        if others is None or (len(others) and len(others) == len(counts)):
            output = self._verify_any(metadata, draft_probs, logits, sampling_metadata, counts)
        else:
            output = self._verify_greedy(metadata, logits, counts)
            if len(others):
                self._verify_again(others, output, metadata, logits, sampling_metadata, counts)
        self.seconds += time.perf_counter() - start
        return output

    def _verify_any(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: "SamplingMetadata",
        counts: np.ndarray,
    ) -> SamplerOutput:
        """vLLM's own way, for rows of any kind."""
        if not counts.any():
            # vLLM 0.32 calls this in every step, with drafts or not; without drafts, its own code fails for top-k.
            output = self.sampler(logits=logits, sampling_metadata=sampling_metadata)
            self.verdict = Verdict(np.zeros_like(counts), np.zeros_like(counts))
            return output
        self._draft = metadata.draft_token_ids.cpu().numpy().astype(np.int64)
        # vLLM 0.32's CPU kernel reads a probability at -1 and may accept it (vllm#46533 fixed the GPU's):
        # padding is verified as token 0, as the model was fed, and the tokens after it are dropped.
        unpadded = replace(metadata, draft_token_ids=metadata.draft_token_ids.clamp(min=0))
        output = super().forward(unpadded, draft_probs, logits, sampling_metadata)
        kept = torch.from_numpy(_first_failures(self._draft >= 0, counts)).to(logits.device)
        column = torch.arange(metadata.max_spec_len + 1, device=logits.device)
        output.sampled_token_ids[column > kept[:, None]] = _NO_TOKEN
        emitted = (output.sampled_token_ids.cpu().numpy() != _NO_TOKEN).sum(axis=1)
        accepted = np.minimum(np.maximum(emitted - 1, 0), counts)
        self.verdict = Verdict(accepted, _sum_runs(self._only_relaxed, counts, accepted))
        return output

    def _verify_again(
        self,
        rows: np.ndarray,
        output: SamplerOutput,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        sampling_metadata: "SamplingMetadata",
        counts: np.ndarray,
    ) -> None:
        """Puts vLLM's own result in the place of these rows, which are not plainly greedy: a retried or sampled row
        shall not send the whole batch the long way."""
        verdict, rules = self.verdict, self.rules
        if rules is not None:
            self.rules = RowRules(*(a[rows] for a in (rules.k, rules.min_prob, rules.margin, rules.ends)))
        drafts = np.flatnonzero(np.isin(np.repeat(np.arange(len(counts)), counts), rows))
        part = _metadata_of(counts[rows], metadata.draft_token_ids[torch.from_numpy(drafts).to(logits.device)])
        positions = np.flatnonzero(np.isin(np.repeat(np.arange(len(counts)), counts + 1), rows))
        sampled = self._verify_any(
            part,
            None,
            logits[torch.from_numpy(positions).to(logits.device)],
            _rows_of(sampling_metadata, rows),
            counts[rows],
        ).sampled_token_ids
        place = torch.from_numpy(rows).to(logits.device)
        output.sampled_token_ids[place] = _NO_TOKEN
        output.sampled_token_ids[place, : sampled.shape[1]] = sampled.to(output.sampled_token_ids.dtype)
        verdict.accepted[rows], verdict.relaxed[rows] = self.verdict.accepted, self.verdict.relaxed
        self.verdict, self.rules = verdict, rules

    def apply_logits_processors(
        self, logits: torch.Tensor, sampling_metadata: "SamplingMetadata", metadata: SpecDecodeMetadata
    ) -> torch.Tensor:
        """After vLLM's own processors, makes each relaxed token the only choice at its position, so the stock
        kernel accepts it."""
        logits = super().apply_logits_processors(logits, sampling_metadata, metadata)
        counts = np.asarray(metadata.num_draft_tokens, dtype=np.int64)
        self._only_relaxed = np.zeros(len(logits), dtype=bool)
        if self.rules is None:
            return logits
        rules = self.rules.by_draft(counts)
        relaxing = rules.k > 1
        if not sampling_metadata.all_greedy:
            relaxing &= np.repeat((sampling_metadata.temperature.cpu().numpy() == 0)[: len(counts)], counts)
        at = np.flatnonzero(relaxing)
        if len(at):
            draft = self._draft
            part = logits[torch.from_numpy(at).to(logits.device)]
            passed = rules.accept(part, draft, at) & (part.argmax(dim=-1).cpu().numpy() != draft[at])
            rows, tokens = (torch.from_numpy(a).to(logits.device) for a in (at[passed], draft[at[passed]]))
            logits[rows] = float("-inf")
            logits[rows, tokens] = 0.0
            self._only_relaxed[at[passed]] = True
        return logits

    def _verify_greedy(self, metadata: SpecDecodeMetadata, logits: torch.Tensor, counts: np.ndarray) -> SamplerOutput:
        top, best = logits.max(dim=-1)
        likeliest = best.cpu().numpy()
        draft = metadata.draft_token_ids.cpu().numpy().astype(np.int64)
        # The logits of a row's drafts are followed by that of its bonus, so draft i of row r is at i + r.
        place = np.arange(len(draft)) + np.repeat(np.arange(len(counts)), counts)
        exact = (draft >= 0) & (likeliest[place] == draft)
        passed = exact
        if self.rules is not None and (self.rules.k > 1).any():
            rules = self.rules.by_draft(counts)
            passed = exact | self._relaxed_too(logits, top, draft, place, exact, counts, rules)
        accepted = _first_failures(passed, counts)
        output = np.full((len(counts), metadata.max_spec_len + 1), _NO_TOKEN, dtype=np.int32)
        column = np.arange(metadata.max_spec_len + 1)
        output[column < accepted[:, None]] = draft[_in_runs(counts, accepted)]
        starts = np.cumsum(counts) - counts
        output[np.arange(len(counts)), accepted] = likeliest[starts + np.arange(len(counts)) + accepted]
        self.verdict = Verdict(accepted, accepted - _sum_runs(exact, counts, accepted))
        return SamplerOutput(sampled_token_ids=torch.from_numpy(output).to(logits.device), logprobs_tensors=None)

    def _relaxed_too(
        self,
        logits: torch.Tensor,
        top: torch.Tensor,
        draft: np.ndarray,
        place: np.ndarray,
        exact: np.ndarray,
        counts: np.ndarray,
        rules: RowRules,
    ) -> np.ndarray:
        """bool [n_draft]: tokens that only the relaxed rule accepts. Skips those after a token that certainly
        fails."""
        failed = np.flatnonzero(~exact & (draft >= 0) & (rules.k > 1))
        rows, tokens = (torch.from_numpy(a).to(logits.device) for a in (place[failed], draft[failed]))
        # The ratio to the most likely token bounds a probability from above without a sum over the vocabulary.
        ratio = (logits[rows, tokens].float() - top[rows].float()).exp().cpu().numpy()
        possible = exact.copy()
        possible[failed] = ratio > rules.min_prob[failed]
        reached = np.zeros(len(draft), dtype=bool)
        reached[_in_runs(counts, _first_failures(possible, counts))] = True
        at = np.flatnonzero(possible & reached & ~exact)
        accepted = np.zeros(len(draft), dtype=bool)
        if len(at):
            accepted[at] = rules.accept(logits[torch.from_numpy(place[at]).to(logits.device)], draft, at)
        return accepted


def _first_failures(passed: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [rows]: number of passing tokens in each row before the first failure. passed: bool [n_draft], row after
    row."""
    ends = np.cumsum(counts)
    failures = np.append(np.flatnonzero(~passed), len(passed))
    first = failures[np.searchsorted(failures, ends - counts)]
    return np.minimum(first, ends) - (ends - counts)


def _in_runs(counts: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Positions, in row order, of the first `taken[r]` of the `counts[r]` tokens of each row."""
    index = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.flatnonzero(index < np.repeat(taken, counts))


def _sum_runs(flags: np.ndarray, counts: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """int64 [rows]: number of flagged tokens among the first `taken[r]` of each row."""
    total = np.concatenate([[0], np.cumsum(flags)])
    starts = np.cumsum(counts) - counts
    return total[starts + taken] - total[starts]


def _other_rows(metadata: "SamplingMetadata", n: int) -> np.ndarray | None:
    """Rows that need more than the argmax of their raw logits, int64; None if rows cannot be told apart."""
    holder = metadata.thinking_budget_state_holder
    if (
        metadata.max_num_logprobs is not None
        or metadata.logprob_token_ids
        or metadata.allowed_token_ids_mask is not None
        or (holder is not None and holder.has_tracked_requests())
        or not all(_idle(processor) for processor in metadata.logitsprocs.non_argmax_invariant)
    ):
        return None
    other = np.zeros(n, dtype=bool)
    if not metadata.all_greedy:
        if any(getattr(processor, "min_p_count", 1) for processor in metadata.logitsprocs.argmax_invariant):
            return None  # it knows rows by their place in the whole batch
        other |= metadata.temperature.cpu().numpy()[:n] != 0
    if not metadata.no_penalties:
        repetition = metadata.repetition_penalties.cpu().numpy()[:n]
        frequency, presence = metadata.frequency_penalties.cpu().numpy(), metadata.presence_penalties.cpu().numpy()
        other |= (repetition != 1) | (frequency[:n] != 0) | (presence[:n] != 0)
    other[[row for row in metadata.bad_words_token_ids if row < n]] = True
    return np.flatnonzero(other)


def _metadata_of(counts: np.ndarray, drafts: torch.Tensor) -> SpecDecodeMetadata:
    """Metadata of rows whose logits follow each other. counts: int64 [rows]; drafts: int32 [n_draft]."""
    device, ends = drafts.device, np.cumsum(counts + 1)
    place = np.arange(int(counts.sum())) + np.repeat(np.arange(len(counts)), counts)
    on_device = lambda a: torch.from_numpy(a.astype(np.int32)).to(device)  # noqa: E731
    return SpecDecodeMetadata(
        draft_token_ids=drafts,
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=on_device(np.cumsum(counts)),
        cu_num_sampled_tokens=on_device(ends),
        target_logits_indices=on_device(place),
        bonus_logits_indices=on_device(ends - 1),
        logits_indices=on_device(np.arange(int(ends[-1]))),
    )


def _rows_of(metadata: "SamplingMetadata", rows: np.ndarray) -> "SamplingMetadata":
    """The part of some rows."""
    parts = {}
    for name in _TENSORS:
        tensor = getattr(metadata, name)
        if tensor is not None and len(tensor):
            parts[name] = tensor[torch.from_numpy(rows).to(tensor.device)]
    numbered = dict(zip(rows.tolist(), range(len(rows)), strict=True))
    greedy = metadata.all_greedy or parts["temperature"].cpu().numpy() == 0
    return replace(
        metadata,
        all_greedy=bool(np.all(greedy)),
        all_random=not np.any(greedy),
        generators={numbered[row]: g for row, g in metadata.generators.items() if row in numbered},
        bad_words_token_ids={numbered[row]: w for row, w in metadata.bad_words_token_ids.items() if row in numbered},
        output_token_ids=[metadata.output_token_ids[row] for row in rows] if metadata.output_token_ids else [],
        spec_token_ids=[metadata.spec_token_ids[row] for row in rows] if metadata.spec_token_ids else None,
        **parts,
    )


def _idle(processor: Any) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    return isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases
