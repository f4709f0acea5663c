import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec_decoding.options import Relaxation

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", autouse=True)
def _cpu_kernels() -> None:
    """What vLLM does when a worker starts: its Triton kernels are replaced by C++ ones on a CPU."""
    from vllm.platforms import current_platform

    import owlrec_decoding.index  # noqa: F401  # before the search through modules, which numba's would end

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()


rows_of_logits = st.lists(st.floats(-6, 6, width=32), min_size=5, max_size=5)
rules = st.builds(
    Relaxation,
    k=st.integers(1, 5),
    min_prob=st.floats(0, 0.9),
    margin=st.one_of(st.none(), st.floats(0, 1)),
)


def brute_force(logits: list[float], token: int, rule: Relaxation) -> bool:
    """The rule of DARE and TensorRT-LLM, by a full softmax and a full ranking."""
    if token < 0:
        return False
    if logits[token] == max(logits) and logits.index(max(logits)) == token:
        return True
    total = sum(math.exp(x) for x in logits)
    p = [math.exp(x) / total for x in logits]
    near = rule.margin is None or max(p) - p[token] <= rule.margin
    return rule.k > 1 and sum(x > logits[token] for x in logits) < rule.k and p[token] > rule.min_prob and near


def boundary(logits: list[float], token: int, rule: Relaxation) -> bool:
    """Whether rounding alone decides."""
    p = np.exp(np.array(logits) - np.logaddexp.reduce(logits))
    edges = [p[token] - rule.min_prob, p.max() - p[token] - (rule.margin if rule.margin is not None else 9)]
    return any(abs(e) < 1e-5 for e in edges)


def verify(
    rows: list[tuple[list[list[float]], list[int]]],
    rules_: list[Relaxation | None],
    metadata: Any = None,
    ends: list[bool] | None = None,
) -> tuple[list[list[int]], Any]:
    """Runs the verifier on rows of (logits of each draft and of the bonus, drafts)."""
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    from owlrec_decoding.verification import Verifier, row_rules

    counts = [len(drafts) for _, drafts in rows]
    starts = np.cumsum([0, *[n + 1 for n in counts]])
    spec = SpecDecodeMetadata.make_dummy([d for _, d in rows], torch.device("cpu"))
    places = [range(s, s + n) for s, n in zip(starts, counts, strict=False)]
    spec.target_logits_indices = torch.tensor([i for p in places for i in p], dtype=torch.int32)
    spec.bonus_logits_indices = torch.tensor([s + n for s, n in zip(starts, counts, strict=False)], dtype=torch.int32)
    sampling = metadata or SimpleNamespace(
        all_greedy=True,
        no_penalties=True,
        max_num_logprobs=None,
        logprob_token_ids=None,
        bad_words_token_ids={},
        allowed_token_ids_mask=None,
        thinking_budget_state_holder=None,
        logitsprocs=LogitsProcessors([]),
    )
    verifier = Verifier(Sampler(), None, torch.device("cpu"))
    verifier.rules = row_rules(rules_)
    if ends is not None:
        verifier.rules = replace(verifier.rules, ends=np.array(ends))
    logits = torch.tensor([x for ls, _ in rows for x in ls], dtype=torch.float32)
    output = verifier(spec, None, logits, sampling).sampled_token_ids
    return [[t for t in row if t != -1] for row in output.tolist()], verifier.verdict


# The likeliest token of each is 4, then 3 (p about .38), 2 (.14): logits 5 4.5 3.5 are probabilities .54 .33 .12 of
# these three.
LADDER = [0.0, 0.0, 3.5, 4.5, 5.0]


def test_strict_rows_stop_at_the_first_token_that_is_not_the_likeliest() -> None:
    texts, verdict = verify([([LADDER] * 3, [4, 3]), ([LADDER], []), ([LADDER] * 2, [4])], [None, None, None])
    assert texts == [[4, 4], [4], [4, 4]]
    assert list(verdict.accepted) == [1, 0, 1]
    assert list(verdict.relaxed) == [0, 0, 0]


def test_relaxed_rows_go_on_behind_a_likely_second_and_are_counted() -> None:
    rule = Relaxation(k=2, min_prob=0.1)
    texts, verdict = verify([([LADDER] * 4, [3, 4, 2]), ([LADDER] * 2, [3])], [rule, None])
    assert texts == [[3, 4, 4], [4]]  # 2 ranks third; the strict row corrects 3 to 4
    assert list(verdict.accepted) == [2, 0]
    assert list(verdict.relaxed) == [1, 0]


def test_a_draft_that_ends_a_text_is_accepted_by_no_relaxed_rule() -> None:
    rule = Relaxation(k=2, min_prob=0.1)
    rows = [([LADDER] * 3, [3, 3]), ([LADDER] * 3, [3, 3]), ([LADDER] * 2, [4])]
    texts, verdict = verify(rows, [rule] * 3, ends=[True, False, True])
    assert texts == [[3, 4], [3, 3, 4], [4, 4]]  # the likeliest token may end a text
    assert list(verdict.relaxed) == [1, 2, 0]


def test_padding_is_never_accepted() -> None:
    everything = Relaxation(k=5, min_prob=0.0)
    texts, verdict = verify([([LADDER] * 3, [-1, -1]), ([LADDER] * 3, [3, -1])], [everything, everything])
    assert texts == [[4], [3, 4]]
    assert list(verdict.accepted) == [0, 1]


@settings(max_examples=200)
@given(rows_of_logits, st.integers(-1, 4), rules)
def test_rule_equals_brute_force(logits: list[float], token: int, rule: Relaxation) -> None:
    import torch

    from owlrec_decoding.verification import relaxed_accept

    if token >= 0 and boundary(logits, token, rule):
        return
    accepted = relaxed_accept(
        torch.tensor([logits]),
        torch.tensor([token]),
        k=torch.tensor([rule.k]),
        min_prob=torch.tensor([rule.min_prob], dtype=torch.float32),
        margin=torch.tensor([2.0 if rule.margin is None else rule.margin], dtype=torch.float32),
    )
    assert bool(accepted[0]) == brute_force(logits, token, rule)


chains = st.lists(st.tuples(rows_of_logits, st.integers(0, 4)), max_size=4)


@settings(max_examples=100)
@given(st.lists(st.tuples(chains, rows_of_logits, st.one_of(st.none(), rules)), min_size=1, max_size=4))
def test_short_way_and_vllms_kernel_agree_with_brute_force(batch: list[Any]) -> None:
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    rows = [([logits for logits, _ in chain] + [bonus], [token for _, token in chain]) for chain, bonus, _ in batch]
    if not any(drafts for _, drafts in rows):
        return
    expected = []
    for chain, bonus, rule in batch:
        text: list[int] = []
        for logits, token in chain:
            if rule is not None and boundary(logits, token, rule):
                return
            if brute_force(logits, token, rule or Relaxation(k=1)):
                text.append(token)
            else:
                text.append(logits.index(max(logits)))
                break
        else:
            text.append(bonus.index(max(bonus)))
        expected.append(text)
    none = torch.empty(0)
    long_way = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[[] for _ in rows],
        allowed_token_ids_mask=torch.zeros((len(rows), 5), dtype=torch.bool),  # masks nothing, but takes the long way
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([]),
    )
    short, verdict = verify(rows, [rule for _, _, rule in batch])
    assert short == expected
    long, verdict_long = verify(rows, [rule for _, _, rule in batch], long_way)
    assert long == expected
    assert list(verdict.accepted) == list(verdict_long.accepted)
    assert list(verdict.relaxed) == list(verdict_long.relaxed)


def test_values_are_repeated_for_each_draft_of_a_row() -> None:
    """vLLM 0.32's own kernel leaves float32 and int32 results uninitialized on a CPU."""
    import torch

    from owlrec_decoding.drafter import expand_batch_to_tokens

    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperature = torch.tensor([0.0, 0.5, 1.3])
    expanded = expand_batch_to_tokens(temperature, ends, 5, replace_from=0, replace_to=1)
    np.testing.assert_allclose(expanded, [1.0, 1.0, 1.3, 1.3, 1.3])
    assert expand_batch_to_tokens(torch.tensor([7, 8, 9], dtype=torch.int32), ends, 5).tolist() == [7, 7, 9, 9, 9]
