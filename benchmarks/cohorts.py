"""Cohorts: how fast they are assigned, whether they are real, what their texts cost and are worth.

`speed`: synthetic vectors of 64 components, as many cohorts as the defaults ask for, through the stage's own pass over
shards, at several numbers of users. `real`: MovieLens-100K, the overlap of liked items within cohorts beside random
groups of the same sizes, on what the cohorts were built from and on what users chose later; the agreement of two seeds.
`texts`: the recipe movielens-100k-collective, run with the real model (about 20 minutes at first, in runs/): calls and
tokens, AUC by mode, and how much of a user's text is drafted from their own cohort's pool, a random one's and all
texts.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

import pipelines
from benchmarks.arms import arm_figure
from benchmarks.table import Figure, options_parser, show
from owlrec.cohorts.building import AssignCohorts, build_cohorts, vector_array
from owlrec.cohorts.clustering import ClusterConfig, Codebook, FactorSettings, train_cells, unit
from owlrec.cohorts.cohort_model import CohortModel, CohortsConfig, CohortSettings
from owlrec.ctr.experiment import finished_trials, summarize, trials
from owlrec.recipe import Recipe, load_recipe
from owlrec.runner import Pool, run_stage
from owlrec.runs.stages import ray_session, stage_function
from owlrec.scenario import get_scenario
from owlrec.schema import PROMPTS
from owlrec.shards import Artifact, Shard, finished_stage
from owlrec.workspace import Workspace, shards_for

DIM, SHARD_ROWS = 64, 1 << 17
SCENARIO = get_scenario("movies")
RECIPE = Path(pipelines.__file__).parent / "recipes" / "movielens-100k-collective.yaml"
OVERLAP_GROUPINGS = 5  # random ones of the cohorts' sizes
POOL_USERS = 64  # whose texts are drafted


def main() -> None:
    """Runs what is asked for."""
    parser = options_parser(__doc__)
    parser.add_argument("--only", choices=("speed", "real", "texts"))
    parser.add_argument("--users", type=float, nargs="+", help="of the speed run")
    parser.add_argument("--workspace", default="runs/movielens-100k-collective", help="of the run with texts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_assign(**json.loads(options.worker))))
        return
    figures: list[Figure] = []
    if options.only in (None, "speed"):
        figures += _speed([int(n) for n in options.users or ([10**6] if options.quick else [10**6, 10**7])])
    if options.only in (None, "real"):
        figures += list(_real())
    if options.only == "texts" or (options.only is None and not options.quick):
        figures += list(_texts(load_recipe(RECIPE, workspace=options.workspace)))
    show("cohorts", figures, options)


def _speed(sizes: list[int]) -> list[Figure]:
    figures, first = [], None
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            _world(Workspace(folder), n)
            job = json.dumps({"folder": folder})
            command = [sys.executable, "-m", "benchmarks.cohorts", "--worker", job]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
        assert result["rows"] == n
        speed = n / result["seconds"]
        first = first or speed
        measure = f"{n:,} users, {DIM} dimensions, {ClusterConfig().sizes(n).cohorts:,} cohorts"
        to = f"{sizes[0]:,} users"
        figures += [
            Figure(
                measure=measure, method="owlrec", value=round(speed), unit="users/s", ratio_to=to, ratio=speed / first
            ),
            Figure(
                measure=measure, method="owlrec", value=round(result["peak_gb"], 2), unit="GB at most, all processes"
            ),
        ]
    return figures


def _world(workspace: Workspace, n: int) -> None:
    rng, sizes = np.random.default_rng(0), ClusterConfig().sizes(n)
    centroids = unit(rng.normal(size=(sizes.cohorts, DIM)).astype(np.float32))
    cells = train_cells(centroids, sizes)
    book = Codebook(centroids, np.arange(sizes.cohorts), sizes.cohorts, cells if len(cells) > 1 else None)
    CohortModel({"user-liked": book}, {}).save(workspace, "c")
    n_shards = shards_for(n, SHARD_ROWS)
    workspace.fix_shards({"user": n_shards})
    for number in range(n_shards):
        ids = np.arange(number, n, n_shards)
        near = centroids[rng.integers(sizes.cohorts, size=len(ids))]
        vectors = unit(near + 0.1 * rng.standard_normal((len(ids), DIM), dtype=np.float32))
        table = pa.table({"id": ids, "liked": vector_array(vectors, np.ones(len(ids), bool))})
        workspace.write_arrow(f"c/{Shard('user-vectors', number).file('.arrow')}", table, table.schema)


def _assign(folder: str) -> dict[str, float]:
    """The stage's own pass, in a process of its own; Ray's start is not counted, that of its workers is."""
    workspace, peak, stop = Workspace(folder), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total / 1e9)

    with ray_session("local", workspace.log_path("ray")):
        threading.Thread(target=watch, daemon=True).start()
        start = time.perf_counter()
        shards = dict.fromkeys((Shard("user", n) for n in range(workspace.n_shards("user"))), "")
        pool = Pool(here=False, max_workers=len(shards))
        cards = run_stage(workspace, AssignCohorts("c", CohortsConfig(), SCENARIO), shards, pool)
        seconds = time.perf_counter() - start
        stop.set()
    return {"seconds": seconds, "peak_gb": peak[0], "rows": sum(card.rows_out for card in cards.values())}


def _real() -> Iterator[Figure]:
    from sklearn.metrics import adjusted_rand_score

    with tempfile.TemporaryDirectory() as folder:
        recipe, workspace = load_recipe(RECIPE, workspace=folder), Workspace(folder)
        _stages(recipe, workspace, "prepare")
        labels = []
        for seed in (0, 1):
            build_cohorts(
                workspace,
                f"c{seed}",
                recipe.cohorts or CohortsConfig(),
                recipe.domain,
                _no_prompts,
                shard_rows=recipe.shard_rows,
                settings=CohortSettings(factors=FactorSettings(seed=seed), seed=seed),
            )
            labels.append(_labels(workspace, f"c{seed}", "user", "liked"))
        users = sorted(labels[0].keys() & labels[1].keys())
        score = adjusted_rand_score(*([cohort[u] for u in users] for cohort in labels))
        yield Figure(
            measure="users' cohorts of two seeds", method="owlrec", value=round(score, 3), unit="adjusted Rand index"
        )
        liked = _liked(workspace, recipe)
        for what, user_sets in liked.items():
            within, random = _overlap(labels[0], user_sets)
            unit_ = "mean Jaccard of liked items"
            yield Figure(measure=what, method="random groups of these sizes", value=round(random, 4), unit=unit_)
            yield Figure(
                measure=what,
                method="owlrec",
                value=round(within, 4),
                unit=unit_,
                ratio_to="random",
                ratio=within / random,
            )


def _no_prompts(profiles: pa.Table) -> pa.Table:
    return PROMPTS.empty_table()


def _stages(recipe: Recipe, workspace: Workspace, *names: str) -> None:
    for name in names:
        stage_function(name)(recipe, workspace)


def _labels(workspace: Workspace, folder: str, kind: str, facet: str) -> dict[int, str]:
    labels = {}
    for part in workspace.names(folder, kind):
        for row in workspace.read_parquet(f"{folder}/{kind}/{part}").to_pylist():
            if row["facet"] == facet and row["source"] == "collaborative":
                labels[row["id"]] = row["cohort"]
    return labels


def _liked(workspace: Workspace, recipe: Recipe) -> dict[str, dict[int, set[int]]]:
    """What each user liked, in the histories that cohorts are built from and in the samples that come after."""
    read: dict[int, set[int]] = {}
    for row in workspace.read_table("histories").to_pylist():
        pairs = zip(row["items"], row["ratings"], strict=True)
        read[row["user_id"]] = {i for i, r in pairs if r > recipe.domain.positive_above}
    later: dict[int, set[int]] = {}
    for row in workspace.read_table("samples", ["user_id", "item_id", "label"]).to_pylist():
        if row["label"]:
            later.setdefault(row["user_id"], set()).add(row["item_id"])
    return {"overlap within cohorts, behaviors read": read, "overlap within cohorts, later behaviors": later}


def _overlap(labels: dict[int, str], liked: dict[int, set[int]]) -> tuple[float, float]:
    users = [u for u in labels if liked.get(u)]
    names = [labels[u] for u in users]
    rng = np.random.default_rng(0)
    random = [
        _mean_jaccard([names[i] for i in rng.permutation(len(names))], users, liked) for _ in range(OVERLAP_GROUPINGS)
    ]
    return _mean_jaccard(names, users, liked), float(np.mean(random))


def _mean_jaccard(names: list[str], users: list[int], liked: dict[int, set[int]]) -> float:
    groups: dict[str, list[int]] = {}
    for name, user in zip(names, users, strict=True):
        groups.setdefault(name, []).append(user)
    pairs = [(liked[a], liked[b]) for group in groups.values() for a, b in itertools.combinations(group, 2)]
    return float(np.mean([len(a & b) / len(a | b) for a, b in pairs]))


def _texts(recipe: Recipe) -> Iterator[Figure]:
    workspace = Workspace(recipe.workspace)
    _stages(recipe, workspace, "prepare", "cohorts", "generate", "encode", "publish", "train_ctr")
    yield from _cost(workspace)
    yield from _worth(recipe, workspace)
    yield from _acceptance(recipe, workspace)


def _cost(workspace: Workspace) -> Iterator[Figure]:
    generated = finished_stage(workspace, "generate")
    assert generated is not None
    calls: dict[bool, int] = {True: 0, False: 0}
    tokens = dict(calls)
    for card in Artifact(workspace, generated.outputs["knowledge"]).cards().values():
        collective = Shard.from_name(card.shard).kind == "cohort"
        calls[collective] += card.rows_in
        tokens[collective] += int(card.counts["prompt_tokens"]) + int(card.counts["output_tokens"])
    for unit_, counts in (("calls", calls), ("tokens, prompt and answer", tokens)):
        yield Figure(measure="knowledge of all users and items", method="individual", value=counts[False], unit=unit_)
        yield Figure(
            measure="knowledge of all users and items",
            method="collective",
            value=counts[True],
            unit=unit_,
            ratio_to="fewer",
            ratio=counts[False] / counts[True],
        )


def _worth(recipe: Recipe, workspace: Workspace) -> Iterator[Figure]:
    trained = finished_stage(workspace, "train_ctr")
    assert trained is not None
    results = finished_trials(workspace, trained.outputs["grid"], trials(recipe.ctr))
    for row in summarize(results):
        yield arm_figure(row, method={"knowledge": "individual"}.get(row.arm))


def _acceptance(recipe: Recipe, workspace: Workspace) -> Iterator[Figure]:
    from owlrec.generation import VllmEngine, VllmEngineConfig, token_counter
    from owlrec.generation.job import read_knowledge
    from owlrec.prompting.prompts import Prompt, user_prompts
    from owlrec.sources.splits import ItemCatalog
    from owlrec_decoding import DecodingConfig, DraftLimits, request_arguments

    generated, built = finished_stage(workspace, "generate"), finished_stage(workspace, "cohorts")
    assert generated is not None
    assert built is not None
    assert isinstance(recipe.engine, VllmEngineConfig)
    cohort = _labels(workspace, built.outputs["cohorts"], "user", "liked")
    knowledge = read_knowledge(workspace, generated.outputs["knowledge"], "user")
    texts = dict(zip(knowledge["id"].to_pylist(), knowledge["text"].to_pylist(), strict=True))
    rng = np.random.default_rng(0)
    tried = set(rng.choice(sorted(cohort.keys() & texts.keys()), POOL_USERS, replace=False).tolist())
    pooled = {u: t for u, t in texts.items() if u not in tried}  # nobody drafts from their own text
    members: dict[str, list[int]] = {"all": sorted(pooled)}
    for user in sorted(pooled):
        if user in cohort:
            members.setdefault(cohort[user], []).append(user)
    others = {
        name: rng.choice([c for c in sorted(members) if c not in ("all", name)]) for name in sorted({*cohort.values()})
    }
    count = token_counter(recipe.engine)
    prompts = user_prompts(
        workspace.read_table("users"),
        workspace.read_table("histories"),
        ItemCatalog.load(workspace),
        recipe.prompts,
        recipe.domain,
        count,
    )
    asked = [p for p in prompts if isinstance(p, Prompt) and p.id in tried]
    engine = VllmEngine(
        recipe.engine.model_copy(update={"max_num_seqs": 4}), DecodingConfig(mode="strict"), DraftLimits(live_tokens=0)
    )

    async def open_pools() -> None:
        await engine.open_texts({name: {u: pooled[u] for u in users} for name, users in members.items()})

    async def run(pool_of: Any) -> tuple[int, int, int]:
        gate = asyncio.Semaphore(4)

        async def one(prompt: Prompt) -> Any:
            async with gate:
                extra = request_arguments([pool_of(prompt.id)])
                return await engine.complete(prompt.system, prompt.text, recipe.sampling, extra)

        answers = await asyncio.gather(*(one(p) for p in asked))
        return tuple(sum(getattr(a, n) for a in answers) for n in ("drafted", "accepted", "output_tokens"))

    asyncio.run(open_pools())
    choices = {
        "own cohort": lambda user: cohort[user],
        "random cohort": lambda user: others[cohort[user]],
        "all texts": lambda user: "all",
    }
    for method, pool_of in choices.items():
        drafted, accepted, written = asyncio.run(run(pool_of))
        measure = f"drafts for {len(asked)} users without a text of their own, strict, batch 4"
        yield Figure(
            measure=measure, method=method, value=round(accepted / max(drafted, 1), 3), unit="accepted a draft token"
        )
        yield Figure(
            measure=measure, method=method, value=round(accepted / written, 3), unit="accepted a token written"
        )
    engine.close()


if __name__ == "__main__":
    main()
