"""`/v1/rank` with 100 candidates: by the CTR model alone, and with the ten best re-ranked by the real SmolLM2.

MovieLens-100K, prepared as pipelines/recipes/movielens-100k-ranker.yaml says; a DIN of one epoch, since a better one is
no slower; the LLM as it is, through serve_apps.rank_llm, shown behaviors that are retrieved once for the candidates of
a request, on all cores beside everything else. Every request is of another user, so that no prompt is found in the
engine's cache but what the candidates of one request share.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import yaml

from benchmarks.load import LoadJob
from benchmarks.serving_processes import free_port, load, owlrec, process
from benchmarks.table import Figure
from owlrec.shards import finished_stage
from owlrec.workspace import Workspace

CANDIDATES, RERANKED = 100, 10
RECIPE = Path(__file__).parent.parent / "pipelines" / "recipes" / "movielens-100k-ranker.yaml"
OURS = "owlrec"
CTR_RATE, CASCADE_RATE = 20.0, 0.15  # requests/s
DEADLINE_MS = 3000  # of a cascade


def measure_rank(folder: Path, options: argparse.Namespace) -> list[Figure]:
    """Latencies at a steady rate, and the share of cascades in which the LLM had its say within the deadline."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, workspace, artifact = _prepare(folder)
    port = free_port()
    address = f"http://127.0.0.1:{port}/rank"
    command = [owlrec(), "serve", "--recipe", str(recipe), "--port", str(port), "--max-replicas", "1"]
    command += ["--artifact", artifact, "--llm", "--llm-cpus", str(os.cpu_count())]
    with process(command):
        bodies = _requests(workspace)
        _wait_for_llm(address, bodies[0])
        job = LoadJob(url=f"{address}/v1/rank", bodies=_asked(bodies, mode="ctr"), seconds=1)
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
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    for command in (
        [owlrec(), "run", str(recipe), "--to", "prepare"],
        [sys.executable, "-m", "pipelines.train_ctr", "--recipe", str(recipe)],
        [owlrec(), "export-ctr", str(recipe)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    workspace = Workspace(settings["workspace"])
    exported = finished_stage(workspace, "export_ctr")
    assert exported is not None
    return recipe, workspace, exported.outputs["model"]


def _requests(workspace: Workspace) -> list[dict[str, object]]:
    """A request of each user, with candidates drawn from the catalogue."""
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
