"""Everything through the job API of a head that `ray start` made, whose Python has OwlRec's dependencies but not
OwlRec: from raw ratings to knowledge over HTTP, with the commands that the documentation gives.
"""

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from heads import ROOT, Head, free_port, knowledge_rows, local_head, owlrec, owlrec_command, wait_until

from owlrec.ops.submission import code_packages, job_folder
from owlrec.refresh.events import EVENTS
from owlrec.releases import current_release
from owlrec.shards import finished_stage
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e
# On Ray's actors and on Ray Train's workers, which begin in folders of their own.
ON_RAY = """
streaming: {partitions: 3}
generate: {replicas: [2, 2], engine_cpus: 1}
training: {num_workers: 2}
"""


@pytest.fixture(scope="module")
def head(python: Path) -> Iterator[Head]:
    with local_head(python, cpus=4) as head:  # a job may run beside another
        yield head


def test_from_ratings_to_answers_over_http(echo_recipe: Path, tmp_path: Path, head: Head, python: Path) -> None:
    plain_recipe = tmp_path / "plain.yaml"
    plain_recipe.write_text(echo_recipe.read_text().replace("latency_s: 0.3", "latency_s: 0.01"))
    echo_recipe.write_text(plain_recipe.read_text() + ON_RAY)
    workspace = Workspace(tmp_path / "ws")

    plain = ray_job(head, python, "python", "-m", "pipelines.prepare", str(echo_recipe))
    assert plain.returncode == 0, plain.stdout + plain.stderr
    for stage in ("generate", "encode", "publish", "train_ctr"):
        submit(head, stage, echo_recipe)
        assert finished_stage(workspace, stage) is not None
    assert knowledge_rows(tmp_path / "ws") == rows_of_the_local_command(plain_recipe, tmp_path / "local")
    # A driver that joined the head has a Ray job id; one that started a cluster of its own inside the job has none, nor
    # has one of a stage that takes seconds.
    on_ray = {
        stage: job["job_id"] for job in head.jobs() for stage in ("generate", "ctr train") if stage in job["entrypoint"]
    }
    assert len(on_ray) == 2
    assert all(on_ray.values())

    url = deploy(head, python, tmp_path)
    wait_until(lambda: answers(url), 120, "the application")
    published = current_release(workspace)
    assert httpx.get(f"{url}/v1/releases/current").json()["release"] == published
    before = {r["id"]: r["text"] for r in knowledge_rows(tmp_path / "ws") if r["kind"] == "user"}
    moved = write_events(workspace)
    submit(head, "refresh", echo_recipe)
    renewed = current_release(workspace)
    assert renewed != published
    wait_until(lambda: httpx.get(f"{url}/v1/releases/current").json()["release"] == renewed, 30, "the refresh")
    body = {"kind": "user", "ids": moved, "fields": ["text"]}
    texts = [r["text"] for r in httpx.post(f"{url}/v1/knowledge:batchGet", json=body).json()["results"]]
    assert all(text.startswith("echo-") for text in texts)
    assert any(text != before[user] for user, text in zip(moved, texts, strict=True))


def test_what_cannot_run_is_refused_before_it_starts(echo_recipe: Path, head: Head) -> None:
    before = len([j for j in head.jobs() if "-m owlrec " in j["entrypoint"]])  # the preflight's are "-m owlrec.ops…"
    asking = echo_recipe.with_name("gpu.yaml")
    asking.write_text(echo_recipe.read_text() + "generate: {engine_gpus: 1}\n")
    commands = (
        (str(echo_recipe), "prepare", "--workspace", "/proc/nowhere"),
        (str(asking), "generate"),
    )
    with ThreadPoolExecutor() as pool:  # at once: each starts a command and a job
        nowhere, no_gpu = pool.map(lambda words: owlrec(head, "submit", *words, "--address", head.address), commands)
    assert (nowhere.returncode, no_gpu.returncode) == (1, 1)
    assert "error: /proc/nowhere cannot be used from" in nowhere.stderr
    assert "generate.engine_gpus asks for 1 x 1 GPU; the cluster has 0" in no_gpu.stderr
    assert len([j for j in head.jobs() if "-m owlrec " in j["entrypoint"]]) == before


def test_standard_library_platform_wins_in_a_task_with_working_dir(head: Head, python: Path) -> None:
    """Ray puts the working directory, here the repository's root, first on the path; see tests/test_layout.py."""
    code = (
        "import ray; ray.init(); f = ray.remote(lambda: __import__('platform').system() + __import__('os').getcwd()); "
        "print(ray.get(f.remote()))"
    )
    submitted = ray_job(head, python, "python", "-c", code)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "Linux/" in submitted.stdout
    assert "working_dir_files" in submitted.stdout


def submit(head: Head, stage: str, recipe: Path) -> None:
    # Without the look at the cluster, which takes seconds each time; other tests take it.
    ran = owlrec(head, "submit", str(recipe), stage, "--address", head.address, "--no-preflight")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def ray_job(head: Head, python: Path, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """Submits from the repository's root and waits; tries again while the head has no agent for jobs yet."""
    submit = [python, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.address, "--working-dir", "."]
    for _ in range(60):
        command = [*submit, "--", *entrypoint]
        ran = subprocess.run(command, cwd=ROOT, env=head.env, capture_output=True, text=True, check=False)
        if "No available agent" not in ran.stderr:
            break
        time.sleep(1)
    return ran


def rows_of_the_local_command(recipe: Path, workspace: Path) -> list[dict]:
    command = owlrec_command("run", str(recipe), "--workspace", str(workspace), "--to", "generate")
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = knowledge_rows(workspace)
    assert len(rows) == 180
    return rows


def deploy(head: Head, python: Path, folder: Path) -> str:
    """`serve deploy` of the knowledge application; the code comes as an archive that all machines can read."""
    with job_folder(None, code_packages()) as code:
        archive = shutil.make_archive(str(folder / "owlrec"), "zip", code)
    port = free_port()
    application = {
        "name": "knowledge",
        "route_prefix": "/",
        "import_path": "owlrec.apps.knowledge:app",
        "args": {"workspace": str(folder / "ws"), "num_cpus": 0.1},
        "runtime_env": {"working_dir": f"file://{archive}", "env_vars": {"PYTHONPATH": "platform"}},
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [python, "-m", "ray.serve.scripts", "deploy", str(folder / "serve.yaml"), "--address", head.address]
    deployed = subprocess.run(command, env=head.env, capture_output=True, text=True, check=False)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    return f"http://127.0.0.1:{port}"


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def write_events(workspace: Workspace) -> list[int]:
    """Ten users act again, later than all that the tables hold; their ids."""
    interactions = workspace.read_table("interactions")
    newest = max(interactions["timestamp"].to_pylist()) + 24 * 3_600_000
    done = Counter(interactions["user_id"].to_pylist())
    users = sorted(user for user, n in done.items() if n >= 20)[:10]
    items = sorted(set(interactions["item_id"].to_pylist()))
    rows = [(user, items[k], 4.0, newest + number * 36_000 + k) for number, user in enumerate(users) for k in range(8)]
    columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), EVENTS, strict=True)]
    Path(workspace.path("events")).mkdir()
    pq.write_table(pa.table(columns, schema=EVENTS), workspace.path("events", "new.parquet"))
    return users
