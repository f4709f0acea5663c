"""The decoder inside a real vLLM engine: tiny random models in float32, plain decoding (mode off, same engine) as
the oracle."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_engine import EOS, VOCAB, Decoder, half_right, prompts, tiny_model, token_lists  # type: ignore[import-not-found]

from owlrec_decoding import DecodingConfig, DraftLimits, VllmError, request_arguments
from owlrec_decoding.drafter import MAX_RELAXED, profiled_drafts
from owlrec_decoding.pools import CELLS, AcceptanceRates

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    folder = tmp_path_factory.mktemp("llama")
    config = DecodingConfig(mode="strict")
    limits = DraftLimits(max_draft=6, live_tokens=0)
    decoder = Decoder(tiny_model(folder / "model", "Llama"), config, limits)
    plain = token_lists(decoder.run(prompts(), "off"))
    texts = [p[-2:] + t for p, t in zip(prompts(), plain, strict=True)]
    decoder.open("right", texts, list(range(len(texts))))
    decoder.open("half", half_right(texts))
    yield decoder
    decoder.close()


def test_the_memory_of_as_many_drafts_as_a_step_may_have_is_profiled(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = llama.engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner, verified = worker.model_runner, []
    forward = type(worker.verifier).forward

    def recorded(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling: Any) -> Any:
        verified.append((len(metadata.draft_token_ids), tuple(logits.shape)))
        return forward(self, metadata, draft_probs, logits, sampling)

    monkeypatch.setattr(type(worker.verifier), "forward", recorded)
    assert worker._max_drafts() == 8 * 6  # of each row as many as the limits allow
    with profiled_drafts(runner, worker._max_drafts()):
        runner._dummy_sampler_run(runner._dummy_run(8)[1])
    assert set(verified) == {(48, (96, VOCAB))}
    verified.clear()
    runner._dummy_sampler_run(runner._dummy_run(8)[1])
    assert set(verified) == {(8, (16, VOCAB))}  # vLLM's own


def test_mode_off_never_drafts(llama: Decoder) -> None:
    assert all(o.counts == (0, 0, 0) for o in llama.run(prompts(), "off", ["right"]))


@pytest.mark.parametrize("pool", ["right", "half", "unknown-pool"])
def test_strict_texts_are_those_of_plain_decoding(llama: Decoder, pool: str) -> None:
    plain, strict = llama.run(prompts(), "off"), llama.run(prompts(), "strict", [pool])
    assert token_lists(strict) == token_lists(plain)
    assert sum(o.counts[0] for o in strict) >= sum(o.counts[1] for o in strict)
    assert (sum(o.counts[1] for o in strict) > 0) or pool == "unknown-pool"
    assert all(o.counts[2] == 0 for o in strict)


def test_no_file_is_read_while_the_engine_steps(llama: Decoder) -> None:
    """Pools, documents and texts just finished are in memory."""
    opened: list[str] = []
    stepping = [False]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:  # stays for the rest of the process
        if stepping[0] and event in ("open", "mmap.__new__"):
            opened.append(f"{event} {arguments[0]}")

    sys.addaudithook(watch)
    ids = llama.ask(prompts(), "strict", ["right", "half"], extra={"owlrec_document": 0})
    while llama.engine.has_unfinished_requests():
        stepping[0] = True
        llama.step()
        stepping[0] = False
    assert sum(llama.done[i].counts[1] for i in ids) > 0
    assert opened == []


def test_unknown_pool_is_counted_and_the_default_serves(llama: Decoder) -> None:
    before = llama.counts().get("unknown_pools", 0)
    llama.run(prompts(2), "strict", ["nobody", "right"])
    assert llama.counts()["unknown_pools"] == before + 2


def test_an_earlier_text_of_the_request_itself_is_found_by_its_id(llama: Decoder) -> None:
    before = llama.counts().get("hits_own", 0)
    proposer = llama.proposer
    learnt, proposer.rates = proposer.rates, AcceptanceRates(proposer.rates.groups)
    proposer.rates.factors[CELLS:] = 0.01  # else the pool as such, which holds that text too, may promise more
    llama.run(prompts(1), "strict", ["right"], extra={"owlrec_document": 0})
    proposer.rates = learnt
    assert llama.counts()["hits_own"] > before


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"min_tokens": 30, "stop_token_ids": [5, 9, 17]},
        {"stop_token_ids": [5, 9, 17, 33]},
        {"allowed_token_ids": list(range(2, 60))},
        {"logprobs": 2},
    ],
    ids=lambda p: next(iter(p)),
)
def test_options_of_a_request_mean_the_same_with_drafts(llama: Decoder, params: dict[str, Any]) -> None:
    plain, strict = llama.run(prompts(), "off", **params), llama.run(prompts(), "strict", ["half"], **params)
    assert token_lists(strict) == token_lists(plain)
    assert [o.finish_reason for o in strict] == [o.finish_reason for o in plain]
    if "logprobs" in params:
        for ours, theirs in zip(strict, plain, strict=True):
            for a, b, token in zip(ours.logprobs, theirs.logprobs, ours.token_ids, strict=True):
                assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-3)


def test_requests_with_and_without_temperature_share_a_batch(llama: Decoder) -> None:
    """On a CPU, vLLM 0.32 reads uninitialized temperatures here; the greedy rows must not notice, nor the others end
    early."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    plain = token_lists(llama.run(prompts(), "off"))
    answers: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts()):
        params = SamplingParams(
            max_tokens=40,
            temperature=0.0 if i % 2 else 0.8,
            top_k=0 if i % 2 else 5,
            detokenize=False,
            ignore_eos=not i % 2,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=request_arguments(["right"], mode="strict"),
        )
        llama.engine.add_request(f"mixed{i}", {"prompt_token_ids": prompt}, params)
    while llama.engine.has_unfinished_requests():
        answers.update({o.request_id: list(o.outputs[0].token_ids) for o in llama.engine.step() if o.finished})
    for i in range(len(plain)):
        if i % 2:
            assert answers[f"mixed{i}"] == plain[i]
        else:
            assert len(answers[f"mixed{i}"]) == 40


def test_a_sampled_or_penalized_row_leaves_the_others_the_short_way(llama: Decoder) -> None:
    """Such a row is verified by vLLM's own code, and only that row; the greedy ones write what they write alone."""
    plain = token_lists(llama.run(prompts(), "off"))
    penalized = token_lists(llama.run(prompts(1), "off", repetition_penalty=1.3))
    seen: list[int] = []
    verifier = llama.proposer._verifier
    own = type(verifier).__mro__[1].forward

    def counted(self: Any, metadata: Any, *rest: Any) -> Any:
        seen.append(len(metadata.num_draft_tokens))
        return own(self, metadata, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(verifier).__mro__[1], "forward", counted)
        ids = [
            *llama.ask(prompts(1), "strict", ["half"], repetition_penalty=1.3),
            *llama.ask(prompts()[1:], "strict", ["half"]),
            *llama.ask(prompts(1), "strict", ["half"], temperature=0.7, seed=1),
        ]
        while llama.engine.has_unfinished_requests():
            llama.step()
    texts = token_lists([llama.done[i] for i in ids])
    assert texts[0] == penalized[0]
    assert texts[1:-1] == plain[1:]
    assert sum(llama.done[i].counts[1] for i in ids[1:-1]) > 0
    assert set(seen) <= {1, 2}


@pytest.mark.parametrize("place", [0, 1, 3])
def test_relaxed_rows_neither_end_by_a_draft_nor_relax_without_bound(llama: Decoder, place: int) -> None:
    """A rule that accepts any token: the end that a pool holds is drafted last and not taken, and the cap holds."""
    plain = token_lists(llama.run(prompts(1), "off", max_tokens=120))[0]
    wrong = [(t + 1) % VOCAB or 1 for t in plain]
    llama.open(f"ends{place}", [[*prompts(1)[0][-2:], plain[0], *wrong[1 : 1 + place], EOS, *wrong[1 + place :]]])
    loose = {"owlrec_k": VOCAB, "owlrec_min_prob": 0.0}
    before, seen = llama.counts()["tokens"], len(llama.steps)
    (relaxed,) = llama.run(prompts(1), "relaxed", [f"ends{place}"], extra=loose, max_tokens=120)
    steps = [(d, s.emitted[i]) for s in llama.steps[seen:] for i, d in s.drafts.items()]
    drafted_ends = [(d, emitted) for d, emitted in steps if EOS in d]
    assert drafted_ends
    for drafts, emitted in drafted_ends:
        assert drafts.index(EOS) == len(drafts) - 1
        assert EOS not in emitted[:-1]
    assert relaxed.counts[2] <= MAX_RELAXED + 6
    assert llama.counts()["tokens"] - before == len(relaxed.token_ids)
    llama.call("owlrec_close_pools", [f"ends{place}"])


def test_a_row_near_the_context_limit_leaves_the_others_their_drafts(llama: Decoder) -> None:
    long = np.random.default_rng(4).integers(2, VOCAB, 252).tolist()
    plain = llama.run([long, *prompts(3)], "off", max_tokens=40)
    before = llama.counts()["accepted"]
    strict = llama.run([long, *prompts(3)], "strict", ["right"], max_tokens=40)
    assert token_lists(strict) == token_lists(plain)
    assert len(strict[0].token_ids) == 4
    assert llama.counts()["accepted"] > before


def test_nothing_is_drafted_beyond_the_last_token_that_a_request_may_write(llama: Decoder) -> None:
    plain = llama.run(prompts(), "off", max_tokens=10)
    strict = llama.run(prompts(), "strict", ["right"], max_tokens=10)
    assert token_lists(strict) == token_lists(plain)
    # The prompt's step writes a token, and each verified step one more than it accepts.
    assert max(o.counts[0] for o in strict) <= 8
    assert sum(o.counts[1] for o in strict) > 0


def test_relaxed_texts_follow_the_pool_where_the_rule_lets_them(llama: Decoder) -> None:
    loose = {"owlrec_k": VOCAB, "owlrec_min_prob": 0.0}
    outputs = llama.run(prompts(), "relaxed", ["half"], extra=loose)
    assert sum(o.counts[2] for o in outputs) > 0
    assert all(o.counts[2] <= o.counts[1] <= o.counts[0] for o in outputs)
    strictly = llama.run(prompts(), "relaxed", ["half"], extra={"owlrec_k": 1, "owlrec_min_prob": 0.0})
    assert token_lists(strictly) == token_lists(llama.run(prompts(), "off"))


def test_a_bad_rule_of_one_request_is_verified_strictly(llama: Decoder) -> None:
    outputs = llama.run(prompts(), "relaxed", ["half"], extra={"owlrec_min_prob": 7.0})
    assert token_lists(outputs) == token_lists(llama.run(prompts(), "off"))
    assert llama.counts()["bad_rules"] >= 6


def test_finished_texts_draft_for_later_ones_unless_they_were_relaxed(tmp_path: Path) -> None:
    decoder = Decoder(tiny_model(tmp_path / "model", "Llama"), DecodingConfig(mode="strict"), DraftLimits(max_draft=6))
    try:
        decoder.open("cohort", [])
        plain = token_lists(decoder.run(prompts(4), "off", ["cohort"]))
        again = decoder.run(prompts(4), "strict", ["cohort"])
        assert token_lists(again) == plain
        assert sum(o.counts[1] for o in again) > 80  # of 160 tokens
        assert decoder.counts()["hits_live"] > 0
        decoder.run([[2, 3]], "off", max_tokens=1)  # finished requests are taken in with the next step
        before = decoder.counts()["tokens_live"]
        loose = {"owlrec_k": VOCAB, "owlrec_min_prob": 0.0}
        strangers = np.random.default_rng(5).integers(2, VOCAB, (4, 12)).tolist()
        relaxed = decoder.run(strangers, "relaxed", ["cohort"], extra=loose)
        assert any(o.counts[2] for o in relaxed)
        decoder.run([[2, 3]], "off", max_tokens=1)
        learnt = 2 + 1 + 1 + sum(8 + len(o.token_ids) + 1 for o in relaxed if not o.counts[2])  # lead, text, border
        assert decoder.counts()["tokens_live"] == before + learnt
    finally:
        decoder.close()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Qwen2", {}),
        ("Qwen3", {}),
        ("Mistral", {"sliding_window": None}),
        ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("GPTNeoX", {}),
    ],
)
def test_strict_is_lossless_for(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", architecture, **changes)
    decoder = Decoder(model, DecodingConfig(mode="strict"), DraftLimits(max_draft=6))
    try:
        plain = decoder.run(prompts(), "off")
        strict = decoder.run(prompts(), "strict")  # drafts come from the live pool, which holds the plain texts
        assert token_lists(strict) == token_lists(plain)
        assert sum(o.counts[1] for o in strict) > 0
    finally:
        decoder.close()


def test_another_version_of_vllm_is_refused() -> None:
    from owlrec_decoding.drafter import check_version

    check_version("0.32.0+cpu")
    with pytest.raises(VllmError, match=r"needs vLLM 0\.32\.0, but 0\.33\.0 is installed"):
        check_version("0.33.0")


def test_a_step_is_told_apart_into_rows_drafts_prompts_and_context() -> None:
    from owlrec_decoding.drafter import _describe

    cached, new = SimpleNamespace(num_computed_tokens=[100, 50]), SimpleNamespace(num_computed_tokens=16)
    step = SimpleNamespace(
        scheduled_spec_decode_tokens={"a": [7, 8, 9]},
        num_scheduled_tokens={"a": 4, "b": 1, "c": 30},
        total_num_scheduled_tokens=35,
        scheduled_cached_reqs=cached,
        scheduled_new_reqs=[new],
    )
    described = _describe(step, 2.0)
    assert described is not None
    assert described._asdict() == {"began": 2.0, "rows": 2, "drafts": 3, "prefill": 30, "context": 166}
    step.num_scheduled_tokens, step.total_num_scheduled_tokens = {}, 0
    assert _describe(step, 2.0) is None
