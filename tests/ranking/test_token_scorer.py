"""Yes or No from the likeliest tokens that an engine tells: sums by hand."""

import asyncio
import math

import numpy as np
import pytest

from owlrec.errors import EngineError
from owlrec.generation import EchoEngineConfig
from owlrec.generation.engines import RequestFailed
from owlrec.ranking.scorer import Scores, TokenScorer, open_scorer

ECHO = EchoEngineConfig(type="echo")


def score(answers: dict[str, list[tuple[str, float]] | RequestFailed], adapter: str | None = None) -> Scores:
    """answers: by the question's text."""
    scorer = TokenScorer(ECHO)

    async def first_tokens(system: str, prompt: str) -> list[tuple[str, float]]:
        scored = answers[prompt]
        if isinstance(scored, RequestFailed):
            raise scored
        return scored

    scorer.engine.first_tokens = first_tokens  # type: ignore[method-assign]
    return asyncio.run(scorer.score([("s", text) for text in answers], adapter))


def test_all_forms_of_both_words_are_summed_and_other_tokens_left_out() -> None:
    logprobs = [("Yes", 0.3), (" yes", 0.1), ("The", 0.3), ("NO", 0.15), ("No", 0.05), ("Nothing", 0.05), ("not", 0.05)]
    scored = score({"q": [(token, math.log(p)) for token, p in logprobs]})
    assert scored.probabilities[0] == pytest.approx(0.4 / 0.6)


def test_a_word_that_is_not_told_is_as_likely_as_the_least_likely_one_that_is() -> None:
    only_yes = [("Yes", math.log(0.9)), ("Sure", math.log(0.05)), ("Well", math.log(0.01))]
    only_no = [("No", math.log(0.9)), ("Well", math.log(0.01))]
    scored = score({"a": only_yes, "b": only_no})
    np.testing.assert_allclose(scored.probabilities, [0.9 / 0.91, 0.01 / 0.91])


def test_a_question_without_an_answer_fails_alone() -> None:
    logprobs = [("Yes", math.log(0.5)), ("No", math.log(0.5))]
    scored = score({"a": [("Maybe", -0.1)], "b": logprobs, "": logprobs, "c": RequestFailed("down", 3)})
    assert {place: error.name for place, error in scored.failures.items()} == {
        0: "NoAnswer",
        2: "EmptyPrompt",
        3: "RequestFailed",
    }
    assert scored.probabilities[1] == pytest.approx(0.5)
    assert np.isnan(scored.probabilities[[0, 2, 3]]).all()


def test_an_adapter_needs_vllm() -> None:
    with pytest.raises(ExceptionGroup) as group:
        score({"a": []}, adapter="/adapters/x")
    assert group.group_contains(EngineError, match="adapters")


def test_the_echo_engine_answers_by_the_question_alone_and_evenly() -> None:
    scorer = open_scorer(ECHO)
    questions = [("s", f"question {i}") for i in range(2000)]
    first, again = (asyncio.run(scorer.score(questions)).probabilities for _ in range(2))
    scorer.close()
    np.testing.assert_array_equal(first, again)
    shares = np.histogram(first, bins=4, range=(0, 1))[0] / 2000
    np.testing.assert_allclose(shares, 0.25, atol=0.04)
