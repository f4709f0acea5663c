"""Ranking on Ray Serve, over real HTTP, with a trained CTR model: orders, a killed LLM, a model swapped in place."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from processes import free_port
from release_rows import Rows, tables

from owlrec import schema
from owlrec.ctr.artifact import CtrArtifact, ModelCard, finish_artifact, write_artifact
from owlrec.ctr.experiment import CTRConfig, Trial, grid_folder
from owlrec.ctr.features import build_features
from owlrec.ctr.trainer import TrainingData, export_trial, train_one, write_vocabularies
from owlrec.releases import current_release
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.serving.guard import NoTelemetry, Problem
from owlrec.serving.rank_api import LiveScorer
from owlrec.serving.schemas import Rank
from owlrec.serving.served import WorkspaceReleases
from owlrec.sources.splits import last_behaviors
from owlrec.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
USERS, ITEMS = 60, 20


def write_artifacts(workspace):
    """Two trained models over a small world in which everybody likes even items; their folders."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows = [
        (user, item, float(item % 2 == 0), 1000, rng.integers(0, ITEMS, 4).tolist(), [3.0] * 4, [1.0] * 4, split)
        for user in range(USERS)
        for item in range(ITEMS)
        for split in ["train" if user < 40 else "valid" if user < 50 else "test"]
    ]
    samples = pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema.SAMPLES)
    ids, titles = pa.array(range(ITEMS), pa.int64()), [f"Film {i}" for i in range(ITEMS)]
    items = pa.table({"item_id": ids, "raw_id": titles, "title": titles, "genres": [["A"]] * ITEMS})
    users = pa.table({"user_id": pa.array(range(USERS), pa.int64())})
    events = pa.table(
        {"user_id": samples["user_id"], "item_id": samples["item_id"],
         "rating": pa.array([3.0] * samples.num_rows, pa.float32()), "timestamp": samples["timestamp"],
         "label": samples["label"], "split": pa.nulls(samples.num_rows, pa.int8()),
         "weight": pa.array([1.0] * samples.num_rows, pa.float32())}
    )  # fmt: skip
    text = Rows(texts={("item", 0): (0, "a film", "ok")})
    info = ReleaseInfo(fingerprint="f" * 64, model="m", encoder="e", history_length=4)
    publish(workspace, **tables(text) | {"behaviors": [last_behaviors(events, 4)]}, info=info)
    features = build_features(users, items, samples, features={"items": ("genres",), "users": ()}, min_item_count=1)
    config = CTRConfig(batch_size=128, epochs=3, embed_dim=8, hidden_dims=(16, 8), learning_rate=1e-2)
    folders = []
    for backbone in ("din", "dcnv2"):
        trial, grid = Trial(backbone=backbone, arm="none", seed=0), "ab" * 32
        data = TrainingData(features, {})
        trained = train_one(trial, data, config)
        export_trial(workspace, grid, trained)
        write_vocabularies(workspace, grid_folder(grid), features.vocabularies)
        folder = write_artifact(workspace, grid, trial, features.items)
        figures = {"valid": trained.result.valid, "test": trained.result.test}
        finish_artifact(workspace, folder, ModelCard(trial=trial, grid=grid, items=ITEMS, reads=None, **figures))
        folders.append(folder)
    return folders


def contrarian():
    """In the place of an LLM: likes odd items, the greatest most. Made here, since workers cannot import tests."""

    class Contrarian:
        def score(self, asked, candidates):
            if asked["profile"].get("mood") == "slow":
                time.sleep(30)
            return [c / 100 if c % 2 else 0.0 for c in candidates]

    return Contrarian


@pytest.fixture(scope="module")
def served(ray_local, tmp_path_factory):
    """The address, the workspace, the artifacts, and a function that deploys with one of them."""
    from ray import serve

    from owlrec.apps.rank import RankArgs, rank_application

    workspace = Workspace(tmp_path_factory.mktemp("rank") / "ws")
    folders = write_artifacts(workspace)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    llm = serve.deployment(contrarian(), name="Llm", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=4)

    def deploy(artifact):
        args = RankArgs(workspace=workspace.path(), artifact=artifact, num_cpus=0.1)
        serve.run(rank_application(args, llm.bind()), name="rank", route_prefix="/")

    deploy(folders[0])
    yield f"http://127.0.0.1:{port}", workspace, folders, deploy
    serve.shutdown()


def own_scores(workspace, folder):
    """What the scorer of an artifact says of user 55 over the current release."""
    scorer = LiveScorer(CtrArtifact.open(workspace, folder), WorkspaceReleases(workspace))
    assert scorer.served.refresh()
    try:
        return scorer.score(55, range(ITEMS))
    finally:
        scorer.served.close()


def ask(address, **asked):
    body = {"user_id": 55, "candidates": list(range(ITEMS)), "top_k": ITEMS, "deadline_ms": 5000, **asked}
    response = httpx.post(f"{address}/v1/rank", json=body, timeout=40)
    assert response.status_code == 200, response.text
    return response.json()


def kill(deployment):
    """Kills a replica as a lost process is lost: nobody asks it to stop."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    actor = next(a for a in actors if a["name"].startswith(f"SERVE_REPLICA::rank#{deployment}#"))
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)


def order(answer):
    return [r["id"] for r in answer["results"]]


def test_the_ctr_order_is_the_scorers_own(served):
    address, workspace, folders, _ = served
    assert httpx.get(f"{address}/readyz").status_code == 200
    scores = own_scores(workspace, folders[0])
    answer = ask(address)
    assert order(answer) == np.argsort(-scores, kind="stable").tolist()
    assert {i % 2 for i in order(answer)[:10]} == {0}
    np.testing.assert_allclose([r["score"] for r in answer["results"]], np.sort(scores)[::-1], atol=1e-6)
    inline = ask(
        address, user_id=None, history=[{"item_id": 3, "rating": 4}, {"item_id": 10**12}], candidates=[1, 2, 99]
    )
    assert order(inline)[0] == 2


def test_a_cascade_re_ranks_the_head(served):
    answer = ask(served[0], mode="cascade", rerank=12, explain=True)
    head, tail = answer["results"][:12], answer["results"][12:]
    assert {r["by"] for r in head} == {"llm"}
    assert {r["by"] for r in tail} == {"ctr"}
    assert [r["id"] % 2 for r in head] == [1] * 2 + [0] * 10  # the two odd items of the head lead it
    assert not answer["degraded"]


def test_a_slow_llm_is_not_waited_for(served):
    start = time.monotonic()
    answer = ask(served[0], mode="cascade", deadline_ms=300, profile={"mood": "slow"})
    assert time.monotonic() - start < 3
    assert (answer["degraded"], answer["reason"]) == (True, "the LLM did not answer within the deadline")
    assert order(answer) == order(ask(served[0]))


def test_without_the_llm_the_ctr_order_goes_out_and_it_comes_back(served):
    kill("Llm")
    start = time.monotonic()
    answers = [ask(served[0], mode="llm", deadline_ms=500)]
    assert time.monotonic() - start < 5
    by_ctr = order(ask(served[0]))
    while answers[-1]["degraded"]:
        assert order(answers[-1]) == by_ctr
        assert time.monotonic() - start < 60
        answers.append(ask(served[0], mode="llm", deadline_ms=500))
    assert order(answers[-1])[:2] == [19, 17]


def test_a_killed_replica_is_replaced(served):
    kill("Rank")  # the only one: Serve's proxy holds a request until there is another, or `request_timeout_s`
    body = {"user_id": 55, "candidates": [1, 2, 3], "mode": "ctr", "deadline_ms": 500}
    statuses, slowest, end = [], 0.0, time.monotonic() + 60
    while statuses[-5:] != [200] * 5:
        assert time.monotonic() < end, statuses
        start = time.monotonic()
        statuses.append(httpx.post(f"{served[0]}/v1/rank", json=body, timeout=20).status_code)
        slowest = max(slowest, time.monotonic() - start)
        time.sleep(0.1)
    assert set(statuses) <= {200, 500, 503}
    assert slowest < 30


def test_what_is_at_work_is_finished_when_replicas_are_asked_to_stop(served):
    from ray import serve

    address = served[0]
    asked = {"mode": "llm", "deadline_ms": 8000, "profile": {"mood": "slow"}}
    with ThreadPoolExecutor(1) as pool:
        at_work = pool.submit(ask, address, **asked)
        time.sleep(1)
        serve.delete("rank", _blocking=False)
        end = time.monotonic() + 7
        while httpx.get(f"{address}/readyz").status_code == 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not at_work.done()  # not ready comes first
        answer = at_work.result()
    assert answer["reason"] == "the LLM did not answer within the deadline"
    assert len(answer["results"]) == ITEMS


def test_a_replica_takes_in_another_model_without_a_restart(served):
    """What Serve calls where only `user_config` of its configuration has changed."""
    from owlrec.apps.rank import CtrModel

    _, workspace, folders, _ = served
    asked = Rank(user_id=55, candidates=list(range(ITEMS)))

    async def scored():
        model = CtrModel(workspace, NoTelemetry())
        for folder in folders:
            await model.open(folder)
            assert model.problem() is None
            yield folder, await model.score(asked, asked.candidates)

    async def both():
        return [pair async for pair in scored()]

    for folder, scores in asyncio.run(both()):
        np.testing.assert_allclose(scores, own_scores(workspace, folder), atol=1e-6)


def test_a_release_of_another_encoder_is_not_ready(ray_local, tmp_path):
    from owlrec.apps.rank import CtrModel

    workspace = Workspace(tmp_path / "ws")
    (folder, _) = write_artifacts(workspace)
    card = workspace.read_json(f"{folder}/model.json")
    reads = {"user": ["knowledge"], "item": ["knowledge"], "encoder": "minilm@256", "codebooks": {}}
    workspace.write_json(f"{folder}/model.json", card | {"reads": reads})

    async def problem():
        model = CtrModel(workspace, NoTelemetry())
        await model.open(folder)
        with pytest.raises(Problem):
            await model.score(Rank(user_id=55, candidates=[1, 2]), [1, 2])
        return model.problem()

    reason = asyncio.run(problem())
    assert current_release(workspace) in reason
    assert "minilm@256" in reason
