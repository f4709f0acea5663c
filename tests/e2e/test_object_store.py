"""The whole chain on S3, over real HTTP: the same content as on disk; jobs that share a bucket do each shard once.

`pytest tests/e2e/test_object_store.py --store-users 100000` runs it on a synthetic world of that size.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import chaos  # type: ignore[import-not-found]
import forked
import httpx
import numpy as np
import pyarrow as pa
import pytest
import s3
from processes import free_port

from benchmarks.worlds import World, write_world
from owlrec.encoding.vectors import VectorShards
from owlrec.generation.job import read_knowledge
from owlrec.refresh.events import EVENTS
from owlrec.releases import current_release, open_release
from owlrec.shards import needed_stage
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e
ITEMS = 120
MOST_USERS = 900  # of MovieLens-100K; larger chains read a synthetic world
MINUTES = 20  # of one command, at most: for 10^5 users


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket whose server is a process of its own, which the environment of all commands names."""
    with s3.s3_server("chain"):
        os.environ["OWLREC_CACHE"] = str(tmp_path_factory.mktemp("cache"))
        yield f"s3://chain/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the recipes read, and how they cut it."""
    users = request.config.getoption("--store-users")
    if users <= MOST_USERS:
        return f"source: {{type: movielens-100k, max_users: {users}, max_items: {ITEMS}}}\nshard_rows: 20"
    folder = tmp_path_factory.mktemp("world")
    write_world(World(users, users // 10, users * 20), folder)
    tables = {name: str(folder / name) for name in ("users", "items", "interactions")}
    return f"source: {json.dumps({'type': 'table', **tables})}\nshard_rows: 4096"


def recipe_for(folder: Path, workspace: str, source: str, engine: str = "{type: echo}") -> Path:
    path = folder / f"{uuid.uuid4().hex}.yaml"
    path.write_text(
        f"""
name: chain
scenario: movies
workspace: {workspace}
{source}
engine: {engine}
sampling: {{max_tokens: 40}}
encoder: {{model: hashing}}
ctr: {{backbones: [dcnv2], arms: [none, knowledge], seeds: [0], epochs: 1}}
ray: local[2]
"""
    )
    return path


def owlrec(folder: Path, *arguments: str) -> str:
    """What the command says. folder: for its log."""
    done = forked.owlrec_run(*arguments, folder=folder)
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextmanager
def served(workspace: str) -> Iterator[httpx.Client]:
    """`owlrec serve` over the workspace, ready."""
    port = free_port()
    command = [sys.executable, "-m", "owlrec", "serve", workspace, "--port", str(port), "--max-replicas=1"]
    server = subprocess.Popen(command, cwd=forked.ROOT, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as web:
            await_answer(lambda: web.get("/readyz").status_code == 200, 120)
            yield web
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)


def await_answer(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until a server answers so."""
    end = time.monotonic() + seconds
    while True:
        with suppress(httpx.TransportError):
            if holds():
                return
        assert time.monotonic() < end
        time.sleep(0.1)


def content(root: str) -> dict[str, object]:
    """Texts, vectors and what a lookup answers."""
    workspace = Workspace(root)
    folder = needed_stage(workspace, "encode", "").outputs["vectors"]
    knowledge = needed_stage(workspace, "generate", "").outputs["knowledge"]
    files: dict[str, object] = {}
    with open_release(workspace) as release:
        for kind in ("user", "item"):
            texts = read_knowledge(workspace, knowledge, kind).sort_by([("id", "ascending"), ("as_of", "ascending")])
            ids = texts["id"].to_numpy()
            files[f"{kind} texts"] = texts.select(["id", "as_of", "text", "prompt_sha256"]).to_pylist()
            files[f"{kind} vectors"] = VectorShards(workspace, folder, f"knowledge-{kind}").gather(ids)[0].tobytes()
            files[f"{kind} lookups"] = [k.text for k in release.store.get(kind, ids.tolist())]
            files[f"{kind} codes"] = release.store.own_codes(kind, ids.tolist())
    return files


def test_the_chain_on_s3_has_the_content_of_the_chain_on_disk(bucket: str, source: str, tmp_path: Path) -> None:
    disk, remote = str(tmp_path / "ws"), f"{bucket}/whole"
    owlrec(tmp_path, "run", str(recipe_for(tmp_path, disk, source)), "--to", "publish")
    recipe = recipe_for(tmp_path, remote, source)
    owlrec(tmp_path, "run", str(recipe))
    assert content(remote) == content(disk)
    assert "shards are already done" in owlrec(tmp_path, "run", str(recipe))
    workspace = Workspace(remote)
    first = current_release(workspace)
    user = workspace.read_table("users")["user_id"][0].as_py()
    latest = max(workspace.read_table("interactions")["timestamp"].to_pylist())
    items = workspace.read_table("items")["item_id"].to_pylist()[:12]
    rows = {"user_id": [user] * 12, "item_id": items, "rating": [5.0] * 12, "timestamp": np.arange(12) + latest + 1}
    workspace.write_parquet("events/new.parquet", pa.table(rows).cast(EVENTS))
    with served(remote) as web:
        before = web.get(f"/v1/knowledge/user/{user}").json()
        owlrec(tmp_path, "refresh", str(recipe))
        second = current_release(workspace)
        assert second != first
        with open_release(workspace) as release:
            (knowledge,) = release.store.get("user", [user])
        assert (knowledge.framework, knowledge.as_of) == ("streaming", latest + 12)
        await_answer(lambda: web.get(f"/v1/knowledge/user/{user}").json()["text"] == knowledge.text)
        owlrec(tmp_path, "release", "rollback", remote)
        assert current_release(workspace) == first
        await_answer(lambda: web.get(f"/v1/knowledge/user/{user}").json() == before)


def test_two_jobs_at_once_ask_about_every_row_once(
    bucket: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = chaos.Oracle(answer_s=0.02)
    host, port = server.server_address[:2]
    engine = f'{{type: http, base_url: "http://{host}:{port}/v1", model: oracle, concurrency: 32}}'
    recipe = recipe_for(tmp_path, f"{bucket}/shared", source, engine)
    try:
        owlrec(tmp_path, "run", str(recipe), "--to", "prepare")
        job = ("run", str(recipe), "--only", "generate")
        jobs = [forked.owlrec(*job, log=tmp_path / f"job-{n}.log") for n in range(2)]
        assert [job.wait(timeout=60 * MINUTES) for job in jobs] == [0, 0]
    finally:
        server.shutdown()
        server.server_close()
    cards = needed_stage(Workspace(f"{bucket}/shared"), "generate", "").counts
    assert server.asked.total() == cards["user_rows_out"] + cards["item_rows_out"]
    assert server.asked.total() > request.config.getoption("--store-users")


def test_a_bucket_that_is_not_there_is_named(bucket: str, source: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "s3://nowhere/ws", source)
    done = forked.owlrec_run("run", str(recipe), "--only", "prepare", folder=tmp_path)
    assert done.returncode == 1
    assert "bucket" in done.stdout
    assert "Traceback" not in done.stdout
