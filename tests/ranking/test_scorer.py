"""Scores from a real vLLM engine with a tiny random model, beside transformers and peft in float32."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]

from owlrec.errors import EngineError
from owlrec.generation import VllmEngineConfig
from owlrec.generation.engines import EmptyPrompt, PromptTooLong, load_tokenizer, render_chat
from owlrec.prompting.frameworks import RankPromptConfig, rank_prompt
from owlrec.ranking.scorer import LlmScorer, Question, Scores, scoring_engine
from owlrec.scenario import get_scenario

pytestmark = pytest.mark.vllm
BLOCK = 32  # tokens that the engine's cache keeps or forgets at once
TITLES = [f"{word} {noun}" for word in ("Red", "Lost", "Quiet", "Last") for noun in ("River", "Star", "House", "Song")]


def question(candidate: str, watched: list[str]) -> Question:
    config = RankPromptConfig()
    recent = [(title, float(1 + i % 5)) for i, title in enumerate(watched)]
    movies = get_scenario("movies")
    return rank_prompt(movies, {"age": "33"}, candidate, config, lambda text: len(text.split()), recent=recent)


def questions(n: int, seed: int = 0) -> list[Question]:
    rng = np.random.default_rng(seed)
    return [question(str(rng.choice(TITLES)), list(rng.choice(TITLES, rng.integers(0, 9)))) for _ in range(n)]


def write_adapter(model: str, folder: Path, seed: int) -> str:
    """A random LoRA of peft's, large enough to reorder candidates."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(folder)
    return str(folder)


def reference(model: str, asked: list[Question], adapter: str | None = None) -> np.ndarray:
    """P(Yes) by transformers, one prompt at a time, from the logits of all of the answers' tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model)
    vocabulary = tokenizer.get_vocab()
    yes, no = ([i for t, i in vocabulary.items() if t.strip("Ġ").lower() == word] for word in ("yes", "no"))
    assert len(yes) == len(no) == 4
    net: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    net = PeftModel.from_pretrained(net, adapter) if adapter else net
    scores = []
    with torch.no_grad():
        for system, text in asked:
            ids = torch.tensor([render_chat(tokenizer, system, text)])
            logits = net(ids).logits[0, -1].double()
            scores.append(torch.sigmoid(logits[yes].logsumexp(0) - logits[no].logsumexp(0)).item())
    return np.array(scores)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ranker")
    return write_tiny_ranker(folder, (" ".join(q) for q in questions(60, seed=9)))


@pytest.fixture(scope="module")
def scorer(model: str) -> Iterator[LlmScorer]:
    config = VllmEngineConfig(type="vllm", model=model, dtype="float32", max_model_len=512, threads=1, kv_cache_gib=1)
    scorer = LlmScorer(config, lora_rank=4)
    yield scorer
    scorer.close()


def score(scorer: LlmScorer, asked: list[Question], adapter: str | None = None) -> Scores:
    return asyncio.run(scorer.score(asked, adapter))


def test_scores_are_those_of_transformers(model: str, scorer: LlmScorer) -> None:
    asked = questions(200)
    scores, expected = score(scorer, asked).probabilities, reference(model, asked)
    assert expected.std() > 0.05
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_an_adapter_scores_as_in_peft(model: str, scorer: LlmScorer, tmp_path: Path) -> None:
    asked = questions(200)
    plain = score(scorer, asked).probabilities
    orders = []
    for seed in (1, 2):
        adapter = write_adapter(model, tmp_path / f"adapter-{seed}", seed)
        scores, expected = score(scorer, asked, adapter).probabilities, reference(model, asked, adapter)
        np.testing.assert_allclose(scores, expected, atol=1e-3)
        pairs = np.triu_indices(len(asked), 1)
        same = np.sign(np.subtract.outer(scores, scores)) == np.sign(np.subtract.outer(expected, expected))
        assert same[pairs].mean() >= 0.99
        orders.append(np.argsort(scores).tolist())
    assert orders[0] != orders[1] != np.argsort(plain).tolist()
    np.testing.assert_array_equal(score(scorer, asked).probabilities, plain)  # without an adapter again


def test_an_answer_far_from_likely_is_not_taken_for_impossible(scorer: LlmScorer) -> None:
    """Yes and No of a random model rank anywhere among 600 tokens: none of a top 20 would hold all eight."""
    asked = questions(30)
    scores = score(scorer, asked).probabilities
    assert ((scores > 0.001) & (scores < 0.999)).all()


def test_rows_with_and_without_an_adapter_share_an_engine(scorer: LlmScorer, model: str, tmp_path: Path) -> None:
    adapter, asked = write_adapter(model, tmp_path / "adapter", 3), questions(20)

    async def both() -> tuple[Scores, Scores]:
        plain, tuned = await asyncio.gather(scorer.score(asked), scorer.score(asked, adapter))
        return plain, tuned

    plain, tuned = asyncio.run(both())
    np.testing.assert_allclose(plain.probabilities, reference(model, asked), atol=1e-4)
    np.testing.assert_allclose(tuned.probabilities, reference(model, asked, adapter), atol=1e-3)


def test_what_a_users_candidates_share_is_read_once(model: str, scorer: LlmScorer) -> None:
    watched = [TITLES[i % len(TITLES)] for i in range(30)]
    asked = [question(f"{title} {i}", watched) for i, title in enumerate(TITLES)]
    scores = score(scorer, asked)
    # Some are scheduled in the very step that computes what they share.
    np.testing.assert_allclose(scores.probabilities, reference(model, asked), atol=1e-4)
    fresh = scores.prompt_tokens - scores.cached_tokens
    longest = scores.prompt_tokens / len(asked)
    assert fresh < longest + len(asked) * (BLOCK + 40)  # one whole prompt, and of each other its end
    assert scores.cached_tokens > 0.6 * scores.prompt_tokens


def test_what_is_wrong_with_one_question_fails_it_alone(scorer: LlmScorer) -> None:
    long = question("Red River", [f"Title number {i} of many" for i in range(60)])
    asked = [question("", ["Red Star"]), *questions(3), long]
    seen: list[int] = []
    scores = asyncio.run(scorer.score(asked, on_scored=seen.append))
    assert {place: type(error) for place, error in scores.failures.items()} == {0: EmptyPrompt, 4: PromptTooLong}
    assert np.isnan(scores.probabilities).tolist() == [True, False, False, False, True]
    np.testing.assert_array_equal(scores.probabilities[1:4], score(scorer, asked[1:4]).probabilities)
    assert seen == [1] * 5
    assert len(score(scorer, []).probabilities) == 0


def test_models_that_cannot_be_asked_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    folder = write_tiny_ranker(tmp_path, ["text"], template=None)
    with pytest.raises(EngineError, match="no chat template"):
        LlmScorer(VllmEngineConfig(type="vllm", model=folder))


def test_a_recipes_own_engine_arguments_stand() -> None:
    own = {"hf_overrides": {"head_dtype": "model", "rope": 1}, "quantization": "fp8", "max_loras": 5}
    config = VllmEngineConfig(type="vllm", model="m", engine_args=own)
    args = scoring_engine(config, lora_rank=9).engine_args
    assert args["hf_overrides"] == own["hf_overrides"]
    assert (args["quantization"], args["max_loras"], args["max_lora_rank"]) == ("fp8", 5, 16)
    assert "enable_lora" not in scoring_engine(config).engine_args
    with pytest.raises(EngineError, match="rank is 1000"):
        scoring_engine(config, lora_rank=1000)
