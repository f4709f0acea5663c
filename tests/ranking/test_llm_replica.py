"""The ranking application's LLM replica on a tiny model: questions of a request in, probabilities out."""

import asyncio
import math
from typing import Any

import pyarrow as pa
import pytest
from test_tune_ranker import prepare, recipe_for  # type: ignore[import-not-found]
from tiny_ranker import write_tiny_ranker  # type: ignore[import-not-found]
from toy_taste import toy_texts  # type: ignore[import-not-found]

from owlrec.apps.rank import LlmReplica
from owlrec.errors import OwlRecError, ServingError
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.schema import KNOWLEDGE
from owlrec.sources.splits import last_behaviors
from owlrec.workspace import Workspace

NOWHERE = 10**6  # an item without a title


@pytest.mark.vllm
def test_candidates_are_scored_by_what_the_request_tells(workspace: Workspace, tmp_path: Any) -> None:
    prepare(workspace)
    recipe = recipe_for(workspace, write_tiny_ranker(tmp_path / "model", toy_texts()))
    shards = [workspace.read_shard("interactions", n) for n in workspace.table_shards("interactions")]
    behaviors = [last_behaviors(shard, recipe.split.history_length) for shard in shards]
    info = ReleaseInfo(fingerprint="f" * 64, model="m", encoder="e", history_length=recipe.split.history_length)
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in KNOWLEDGE}
    texts = [pa.Table.from_pylist([empty | {"kind": "item", "text": "A film."}], KNOWLEDGE)]
    publish(workspace, knowledge=texts, vectors=[], behaviors=behaviors, info=info)
    replica = LlmReplica(workspace.root, recipe.model_dump(mode="json"))
    with pytest.raises(ServingError):
        asyncio.run(replica.score({"user_id": 1, "history": None, "profile": {}}, [0]))
    asyncio.run(replica.reconfigure({}))

    def score(candidates: list[int], **asked: Any) -> list[float]:
        return asyncio.run(replica.score({"user_id": None, "history": None, "profile": {}} | asked, candidates))

    known = score([0, 1, NOWHERE], user_id=1)
    assert all(0 < p < 1 for p in known[:2])
    assert math.isnan(known[2])
    # A history that comes with the request stands in the place of the stored one.
    given = [{"item_id": 2, "rating": 5.0}, {"item_id": 3, "rating": 1.0}]
    assert score([0, 1], user_id=1, history=given) != known[:2]
    assert score([1, 0], user_id=1) == pytest.approx(known[1::-1], abs=1e-4)
    with pytest.raises(OwlRecError, match="nowhere"):
        asyncio.run(replica.reconfigure({"adapter": "ranking/nowhere/adapter"}))
    assert score([0, 1], user_id=1) == pytest.approx(known[:2], abs=1e-4)  # what was in force stays
    replica._scorer.close()
