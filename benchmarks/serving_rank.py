"""`/v1/rank` with 100 candidates: by the CTR model alone, and with the ten best re-ranked by the real SmolLM2; and how
a refresh reaches its scores while requests go on.

MovieLens-100K, prepared as pipelines/recipes/movielens-100k-ranker.yaml says; a DIN of one epoch, since a better one is
no slower; the LLM as it is, through owlrec.apps.rank, shown behaviors that are retrieved once for the candidates of
a request, on all cores beside everything else. Every request is of another user, so that no prompt is found in the
engine's cache but what the candidates of one request share.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml

from benchmarks.load import LoadResult, LoadSpec
from benchmarks.serving_processes import free_port, load, owlrec, process, wait_for_answer
from benchmarks.table import Figure
from owlrec.ctr.artifact import CtrArtifact, LiveState
from owlrec.ctr.batches import SplitTensors, Tables
from owlrec.ctr.features import Histories, SampleFeatures
from owlrec.ctr.knowledge_tables import KnowledgeTable
from owlrec.encoding.vectors import HashingEncoder
from owlrec.refresh.events import EVENTS
from owlrec.releases import current_release, open_release
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.schema import KNOWLEDGE, vectors_table
from owlrec.serving.rank_api import live_state
from owlrec.shards import finished_stage
from owlrec.sources.splits import last_behaviors
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

CANDIDATES, RERANKED = 100, 10
RECIPE = Path(__file__).parent.parent / "pipelines" / "recipes" / "movielens-100k-ranker.yaml"
OURS = "owlrec"
CTR_RATE, CASCADE_RATE = 20.0, 0.15  # requests/s
DEADLINE_MS = 3000  # of a cascade
LIVE_RATE = 200.0  # requests/s of ten candidates, while releases come


def measure_rank(folder: Path, options: argparse.Namespace) -> list[Figure]:
    """Latencies at a steady rate, and the share of cascades in which the LLM had its say within the deadline."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, workspace, artifact = _prepare(folder)
    port = free_port()
    address = f"http://127.0.0.1:{port}/rank"
    command = [owlrec(), "serve", str(recipe), "--port", str(port), "--max-replicas", "1"]
    command += ["--artifact", artifact, "--llm", "--llm-cpus", str(os.cpu_count())]
    with process(command):
        bodies = _requests(workspace)
        _wait_for_llm(address, bodies[0])
        job = LoadSpec(url=f"{address}/v1/rank", bodies=_asked(bodies, mode="ctr"), seconds=1)
        load(job, seconds=3, connections=2)
        ctr = load(job, rate=CTR_RATE, seconds=10 if options.quick else 60, connections=100)
        asked = _asked(bodies[::-1], mode="cascade", rerank=RERANKED, deadline_ms=DEADLINE_MS)
        cascade = load(
            job.model_copy(update={"bodies": asked}),
            rate=CASCADE_RATE,
            seconds=40 if options.quick else 240,
            connections=10,
            count='"degraded":false',
            count_within_s=DEADLINE_MS / 1000,
        )
    within = cascade.counted / cascade.asked * 100
    by_ctr = f"ctr, {CANDIDATES} candidates, {CTR_RATE:g} requests/s"
    by_llm = f"cascade, top {RERANKED} by SmolLM2, {CASCADE_RATE:g} requests/s, deadline {DEADLINE_MS / 1000:g} s"
    return [
        _figure(f"{by_ctr}, p50", ctr.ok_p50_ms, "ms"),
        _figure(f"{by_ctr}, p99", ctr.ok_p99_ms, "ms"),
        _figure(f"{by_ctr}, errors", ctr.asked - ctr.statuses.get("200", 0), f"of {ctr.asked:,}"),
        _figure(f"{by_llm}, p50", cascade.ok_p50_ms, "ms"),
        _figure(f"{by_llm}, p99", cascade.ok_p99_ms, "ms"),
        _figure(f"{by_llm}, errors", cascade.asked - cascade.statuses.get("200", 0), f"of {cascade.asked:,}"),
        _figure(f"{by_llm}, re-ranked in time", within, f"% of {cascade.asked:,}"),
    ]


def _prepare(folder: Path) -> tuple[Path, Workspace, str]:
    """A recipe, its workspace and the artifact of a trained model in it."""
    settings = yaml.safe_load(RECIPE.read_text())
    settings |= {"workspace": str(folder / "ws"), "ctr": {"backbones": ["din"], "arms": ["none"], "seeds": [0]}}
    settings["ctr"]["epochs"] = 1
    recipe, workspace, artifact = _run_and_export(folder, settings, last="prepare")
    _publish_behaviors(workspace, settings["split"]["history_length"])
    return recipe, workspace, artifact


def _run_and_export(folder: Path, settings: dict[str, Any], last: str) -> tuple[Path, Workspace, str]:
    """The recipe, its workspace after the stages up to `last`, and the artifact of its one CTR model."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    _run("run", str(recipe), "--to", last)
    _run("ctr", "train", str(recipe))
    _run("ctr", "export", str(recipe))
    workspace = Workspace(settings["workspace"])
    exported = finished_stage(workspace, "export_ctr")
    assert exported is not None
    return recipe, workspace, exported.outputs["model"]


def _run(*arguments: str) -> None:
    command = [sys.executable, "-m", "owlrec", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def _publish_behaviors(workspace: Workspace, length: int) -> None:
    """A release without texts but one, since no LLM has written any: ranking reads behaviors of it."""
    text = {f.name: "" if pa.types.is_string(f.type) else 0 for f in KNOWLEDGE} | {"kind": "item", "text": "A film."}
    info = ReleaseInfo(fingerprint="0" * 64, model="none", encoder="none", history_length=length)
    behaviors = [last_behaviors(shard, length) for shard in _interactions(workspace)]
    knowledge = [pa.Table.from_pylist([text], KNOWLEDGE)]
    publish(workspace, knowledge=knowledge, vectors=[], behaviors=behaviors, info=info)


# ---------------------------------------------------------------------------------------------------------------- live


@dataclass(frozen=True)
class Followed:
    """What requests saw of a refresh and of new items, while a steady load went on."""

    changed_after_s: list[float]  # from the release to another score: of the refresh, of the items' delta
    largest_difference: float  # of scores from the model's own on the release's vectors and behaviors
    new_items: int
    new_item_scores: int  # distinct ones
    load: LoadResult


def measure_live(folder: Path, options: argparse.Namespace) -> list[Figure]:
    """Latency beside frozen fields, in one process; then a refresh of 50 users and 5 new items under load."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, workspace, artifact = prepare_live(folder, {"type": "movielens-100k"})
    live, frozen, new_users = compare_frozen(workspace, artifact, requests=500 if options.quick else 5000)
    followed = refresh_while_serving(recipe, workspace, artifact, users=50, rate=LIVE_RATE)
    errors = followed.load.asked - followed.load.statuses.get("200", 0)
    name = f"ctr in process, {CANDIDATES} candidates"
    return [
        _figure(f"{name}, live fields, p50", live[0], "ms"),
        _figure(f"{name}, live fields, p99", live[1], "ms"),
        _figure(f"{name}, frozen fields, p50", frozen[0], "ms"),
        _figure(f"{name}, frozen fields, p99", frozen[1], "ms"),
        _figure(f"{name}, p99 live / frozen", live[1] / frozen[1], "times"),
        _figure(f"{name}, live fields of users who come first, p50", new_users[0], "ms"),
        _figure(f"{name}, live fields of users who come first, p99", new_users[1], "ms"),
        _figure("refresh of 50 users: other scores after the release", followed.changed_after_s[0], "s"),
        _figure("delta of 5 items: other scores after the release", followed.changed_after_s[1], "s"),
        _figure("scores off the offline scorer's", followed.largest_difference, "at most"),
        _figure("new items with a score of their own", followed.new_item_scores, f"of {followed.new_items}"),
        _figure(f"requests at {LIVE_RATE:g}/s meanwhile, errors", errors, f"of {followed.load.asked:,}"),
        _figure(f"requests at {LIVE_RATE:g}/s meanwhile, p99", followed.load.ok_p99_ms, "ms"),
    ]


def prepare_live(folder: Path, source: dict[str, object]) -> tuple[Path, Workspace, str]:
    """A published run on invented texts, and the artifact of a DIN that reads them."""
    settings = {
        "name": "live",
        "scenario": "movies",
        "workspace": str(folder / "ws"),
        "source": source,
        "shard_rows": 128,
        "engine": {"type": "echo"},
        "sampling": {"max_tokens": 40},
        "encoder": {"model": "hashing"},
        "ctr": {"backbones": ["din"], "arms": ["knowledge"], "seeds": [0], "epochs": 1},
        "features": {"users": []},  # the offline scores that are compared know no profiles
    }
    return _run_and_export(folder, settings, last="publish")


class _Frozen(LiveState):
    """What artifacts once held: the fields of all ids and the last behaviors of all users, computed beforehand."""

    def __init__(self, live: LiveState, users: np.ndarray, items: np.ndarray) -> None:
        """users, items: ids, ascending."""
        self.model, self._widths, self._nobody = live.model, live._widths, live._nobody
        self._ids = {"user": users, "item": items}
        self._frozen = {kind: live._parts(kind, ids) for kind, ids in self._ids.items()}
        self._behaviors = {user: live.behaviors(user) for user in users.tolist()}

    def behaviors(self, user_id: int) -> np.ndarray | None:
        return self._behaviors[user_id]

    def _parts(self, kind: str, ids: np.ndarray) -> list[np.ndarray]:
        rows = np.searchsorted(self._ids[kind], ids)
        return [part[rows] for part in self._frozen[kind]]


def compare_frozen(workspace: Workspace, artifact: str, requests: int) -> list[tuple[float, float]]:
    """p50 and p99 in ms of requests in turns: over the current release, over frozen fields, and over the release where
    nothing is held of the user.
    """
    torch.set_num_threads(1)
    opened, draw = CtrArtifact.open(workspace, artifact), np.random.default_rng(0)
    with open_release(workspace) as release:
        live = live_state(opened, release)
        users = np.sort(workspace.read_table("users", ["user_id"])["user_id"].to_numpy())
        items = opened.scorer.items.ids
        fresh = live_state(opened, release)
        ways, took = (live, _Frozen(fresh, users, items), fresh), np.zeros((requests, 3))
        for number in range(-50, requests):  # the first ones warm caches
            user, candidates = int(draw.choice(users)), draw.choice(items, min(CANDIDATES, len(items)), replace=False)
            for way in draw.permutation(3):
                if way == 2:
                    fresh.held["user"] = fresh.held["user"].without(users)
                start = time.perf_counter()
                opened.scorer.score(user, candidates, ways[way])
                if number >= 0:
                    took[number, way] = (time.perf_counter() - start) * 1e3
    return [(float(p50), float(p99)) for p50, p99 in np.percentile(took, [50, 99], axis=0).T]


def refresh_while_serving(
    recipe: Path, workspace: Workspace, artifact: str, *, users: int, rate: float, seconds: int = 45, nice: int = 19
) -> Followed:
    """Serves the artifact under a steady load, refreshes so many users, then publishes five new items.

    rate: requests/s, of ten candidates each. seconds: of the load. nice: of the refresh, which on one machine takes the
    server's cores; a cluster has others for it.
    """
    known = np.sort(workspace.read_table("users", ["user_id"])["user_id"].to_numpy())
    moved, new = known[:users], np.arange(5) + 9_000_001
    items = np.sort(workspace.read_table("items", ["item_id"])["item_id"].to_numpy())
    port = free_port()
    address = f"http://127.0.0.1:{port}/rank/v1/rank"
    serve = [sys.executable, "-m", "owlrec", "serve", str(recipe)]
    draw, changed = np.random.default_rng(0), []
    bodies = [
        json.dumps({"user_id": int(draw.choice(known)), "candidates": draw.choice(items, 10, replace=False).tolist()})
        for _ in range(500)
    ]
    with process([*serve, "--port", str(port), "--max-replicas", "1", "--artifact", artifact]):
        wait_for_answer(f"http://127.0.0.1:{port}/explorer/readyz")
        wait_for_answer(f"http://127.0.0.1:{port}/rank/readyz")
        job = LoadSpec(url=address, bodies=bodies, seconds=1)
        load(job, seconds=3, connections=2)
        with ThreadPoolExecutor(1) as pool:
            under_load = pool.submit(load, job, rate=rate, seconds=seconds, connections=200)
            _log_events(workspace, moved, items)
            changed.append(_followed(address, workspace, int(moved[0]), items[:10], partial(_refresh, recipe, nice)))
            publish_new = partial(_publish_items, workspace, new)
            changed.append(_followed(address, workspace, int(moved[0]), np.r_[items[:5], new], publish_new))
            result = under_load.result()
        candidates = np.r_[items[:: max(1, len(items) // 40)], new]
        asked = {user: _scores(address, user, candidates) for user in moved.tolist()}
    differences = [
        np.abs(np.array(scores) - own).max()
        for (_, scores), own in zip(
            asked.items(), offline_scores(workspace, artifact, list(asked), candidates), strict=True
        )
    ]
    distinct = len(set(np.round(asked[int(moved[0])][-len(new) :], 12)))
    return Followed(changed, float(max(differences)), len(new), distinct, result)


def offline_scores(workspace: Workspace, artifact: str, users: list[int], candidates: np.ndarray) -> list[np.ndarray]:
    """What the trained model itself says of each user's candidates, on the vectors and behaviors of the current
    release, in the way of training.
    """
    opened = CtrArtifact.open(workspace, artifact)
    model, length = opened.scorer.model, opened.scorer.model.spec.features.history_length
    items, grades = opened.scorer.items, opened.scorer.vocabularies.grades
    scores = []
    with open_release(workspace) as release, torch.inference_mode():
        for user in users:
            (behaviors,) = release.store.behaviors([user])
            assert behaviors is not None
            tables = []
            read = np.unique(np.r_[candidates, behaviors["item"]])  # similarities read the history's items, too
            for kind, ids in (("user", np.array([user])), ("item", read)):
                vectors, there = release.store.own_vectors(kind, ids, 1)
                own = vectors[there[:, 0], 0]
                if opened.projection:
                    own = opened.projection.of(f"knowledge-{kind}").apply(own).astype(np.float16)
                tables.append(KnowledgeTable(ids[there[:, 0]], own))
            n = len(candidates)
            outcomes = grades.tokens(behaviors["rating"].astype(float), behaviors["label"])
            starts, lengths = np.zeros(n, np.int64), np.full(n, len(behaviors), np.int32)
            histories = Histories(starts, lengths, items.rows(behaviors["item"]), outcomes, length)
            none = np.zeros((n, 0, 1), np.int32), np.zeros((n, 0), np.float32)
            user_ids = np.full(n, user)
            samples = SampleFeatures(user_ids, candidates, items.rows(candidates), histories, *none, np.zeros(n))
            batch = SplitTensors(samples, Tables((tables[0],), (tables[1],), item_ids=items.ids), "cpu").batch(
                torch.arange(n)
            )
            scores.append(model(batch).double().sigmoid().numpy())
    return scores


def _log_events(workspace: Workspace, users: np.ndarray, items: np.ndarray) -> None:
    """Twelve events of each user, after all that the tables hold: their text is due."""
    newest = max(int(pc.max(shard["timestamp"]).as_py()) for shard in _interactions(workspace))
    rows = [
        {
            "user_id": user,
            "item_id": int(items[(7 * n + user) % len(items)]),
            "rating": 5.0,
            "timestamp": newest + n + 1,
        }
        for user in users.tolist()
        for n in range(12)
    ]
    workspace.write_parquet("events/one.parquet", pa.Table.from_pylist(rows, EVENTS))


def _interactions(workspace: Workspace) -> Iterator[pa.Table]:
    return (workspace.read_shard("interactions", n) for n in workspace.table_shards("interactions"))


def _refresh(recipe: Path, nice: int) -> None:
    subprocess.run(["nice", "-n", str(nice), sys.executable, "-m", "owlrec", "refresh", str(recipe)], check=True)


def _publish_items(workspace: Workspace, ids: np.ndarray) -> None:
    """New items, which stand in no table: texts and vectors, as a delta."""
    texts = [f"A film that nobody has seen yet, number {n}, of {'war' if n % 2 else 'love'}." for n in range(len(ids))]
    empty = {f.name: "" if pa.types.is_string(f.type) else 0 for f in KNOWLEDGE}
    rows = [empty | {"kind": "item", "id": i, "text": text} for i, text in zip(ids.tolist(), texts, strict=True)]
    vectors = vectors_table("item", ids, HashingEncoder().encode(texts))
    parent = current_release(workspace)
    info = ReleaseInfo(fingerprint=fingerprint(texts), model="none", encoder="hashing", parent=parent, delta=True)
    publish(workspace, knowledge=[pa.Table.from_pylist(rows, KNOWLEDGE)], vectors=[vectors], info=info)


def _followed(
    address: str, workspace: Workspace, user: int, candidates: np.ndarray, release: Callable[[], None]
) -> float:
    """Seconds from the moment at which what `release` makes is current to that from which on ten answers in a row have
    other scores: every replica follows by itself.
    """
    before, first = _scores(address, user, candidates), current_release(workspace)
    with ThreadPoolExecutor(1) as pool:
        made, moved, since, changed = pool.submit(release), 0.0, 0.0, 0
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if made.done():
                made.result()
            if not moved and current_release(workspace) != first:
                moved = time.monotonic()
            asked = time.monotonic()
            try:
                now = _scores(address, user, candidates)
            except urllib.error.HTTPError as error:  # overloaded for a moment: the load counts it
                error.close()
                continue
            changed = changed + 1 if now != before else 0
            since = asked if changed <= 1 else since
            if moved and changed >= 10:
                made.result()
                return max(0.0, since - moved)
            time.sleep(0.05)
    raise SystemExit("the scores have not changed within 300 s")


def _scores(address: str, user: int, candidates: np.ndarray) -> list[float]:
    """Of the candidates, in their order."""
    asked = {"user_id": user, "candidates": candidates.tolist(), "top_k": len(candidates), "deadline_ms": 20_000}
    body = urllib.request.Request(address, json.dumps(asked).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(body, timeout=60) as answer:
        scores = {result["id"]: result["score"] for result in json.load(answer)["results"]}
    return [scores[item] for item in candidates.tolist()]


def _requests(workspace: Workspace) -> list[dict[str, object]]:
    """A request of each user, with candidates drawn from the catalog."""
    random = np.random.default_rng(0)
    users = workspace.read_table("users", ["user_id"])["user_id"].to_numpy()
    items = workspace.read_table("items", ["item_id"])["item_id"].to_numpy()
    return [
        {"user_id": user, "candidates": random.choice(items, CANDIDATES, replace=False).tolist()}
        for user in random.permutation(users).tolist()
    ]


def _asked(requests: list[dict[str, object]], **more: object) -> list[str]:
    return [json.dumps(request | more) for request in requests]


def _wait_for_llm(address: str, request: dict[str, object], seconds: float = 900) -> None:
    """Until the LLM has its say: its engine starts long after the CTR model."""
    body = json.dumps(request | {"mode": "cascade", "rerank": 2, "deadline_ms": 30_000}).encode()
    asked = urllib.request.Request(f"{address}/v1/rank", body, {"content-type": "application/json"})
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                if not json.load(answer)["degraded"]:
                    return
        except OSError:
            pass
        if time.monotonic() > end:
            raise SystemExit(f"the LLM did not rank within {seconds:g} s. Does `owlrec serve --llm` start it?")
        time.sleep(1)


def _figure(measure: str, value: float, unit: str) -> Figure:
    return Figure(measure=measure, method=OURS, value=round(float(value), 3), unit=unit)
