import subprocess
import sys

import pytest
from pydantic import ValidationError

from owlrec_decoding import DecodingConfig, DraftLimits, Relaxation, VllmError, engine_arguments, request_arguments


def test_off_changes_nothing() -> None:
    assert engine_arguments(DecodingConfig(), cpu=True) == {}


@pytest.mark.parametrize(("cpu", "worker"), [(True, "RetrievalCpuWorker"), (False, "RetrievalGpuWorker")])
def test_engine_arguments_name_proposer_and_worker(cpu: bool, worker: str) -> None:
    arguments = engine_arguments(DecodingConfig(mode="strict"), texts="t.csv", limits=DraftLimits(max_draft=6), cpu=cpu)
    assert arguments["speculative_config"]["num_speculative_tokens"] == 6
    assert arguments["worker_cls"] == f"owlrec_decoding.drafter.{worker}"
    assert arguments["additional_config"]["owlrec_decoding"]["texts"] == "t.csv"


def test_runner_v2_is_set_up_for_a_speculator_that_it_knows() -> None:
    config = DecodingConfig(mode="strict")
    arguments = engine_arguments(config, limits=DraftLimits(max_draft=6), cpu=False, runner="v2")
    assert arguments["speculative_config"] == {
        "method": "ngram_gpu",
        "num_speculative_tokens": 6,
        "enable_adaptive_verification": True,
    }
    assert arguments["worker_cls"] == "owlrec_decoding.runner_v2.RetrievalV2Worker"
    with pytest.raises(VllmError, match="v1"):
        engine_arguments(config, cpu=True, runner="v2")


@pytest.mark.parametrize(
    "wrong", [{"k": 2}, {"min_prob": 1.0}, {"min_prob": -0.1}, {"margin": 0.5}, {"mode": "loose"}, {"topk": 2}]
)
def test_rules_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DecodingConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"min_prob": 1.0}, {"margin": 1.5}])
def test_a_requests_rule_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Relaxation(**wrong)


def test_request_arguments_hold_only_what_http_can_carry() -> None:
    extra = request_arguments(["a", "b"], 7, mode="relaxed", relaxation=Relaxation(k=3, min_prob=0.05, margin=0.2))
    assert extra == {
        "owlrec_pools": ["a", "b"],
        "owlrec_document": 7,
        "owlrec_mode": "relaxed",
        "owlrec_k": 3,
        "owlrec_min_prob": 0.05,
        "owlrec_margin": 0.2,
    }


@pytest.mark.process
def test_the_recipe_needs_neither_torch_nor_numba_nor_vllm() -> None:
    code = "import sys, owlrec_decoding; assert not {'torch', 'numba', 'vllm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
