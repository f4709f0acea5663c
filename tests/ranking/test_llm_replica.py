"""The ranking application's LLM replica on a tiny model: questions of a request in, probabilities out."""

import asyncio
import math
from typing import Any

import pytest
from test_tune_ranker import prepare, recipe_for  # type: ignore[import-not-found]
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]
from toy_taste import toy_texts  # type: ignore[import-not-found]

from owlrec.errors import OwlRecError
from owlrec.workspace import Workspace
from serve_apps.rank_llm import LlmReplica

NOWHERE = 10**6  # an item without a title


@pytest.mark.vllm
def test_candidates_are_scored_by_what_the_request_tells(workspace: Workspace, tmp_path: Any) -> None:
    prepare(workspace)
    recipe = recipe_for(workspace, write_tiny_ranker(tmp_path / "model", toy_texts()))
    replica = LlmReplica(workspace.root, recipe.model_dump(mode="json"))

    def score(candidates: list[int], **asked: Any) -> list[float]:
        return asyncio.run(replica.score({"user_id": None, "history": None, "profile": {}} | asked, candidates))

    known = score([0, 1, NOWHERE], user_id=1)
    assert all(0 < p < 1 for p in known[:2])
    assert math.isnan(known[2])
    # A history that comes with the request stands in the place of the stored one.
    told = [{"item_id": 2, "rating": 5.0}, {"item_id": 3, "rating": 1.0}]
    assert score([0, 1], user_id=1, history=told) != known[:2]
    assert score([1, 0], user_id=1) == pytest.approx(known[1::-1], abs=1e-4)
    with pytest.raises(OwlRecError, match="nowhere"):
        replica.reconfigure({"adapter": "ranking/nowhere/adapter"})
    assert score([0, 1], user_id=1) == pytest.approx(known[:2], abs=1e-4)  # what was in force stays
    replica._scorer.close()
