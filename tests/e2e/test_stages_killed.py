"""Every stage killed, its files truncated, its disk filled: the same content in the end, every row once.

`pytest tests/e2e/test_stages_killed.py --chaos-seeds 20` runs as many seeds as the project's claim rests on; by default
one does. tests/e2e/test_chaos.py does the same to workers and nodes of a cluster.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chaos  # type: ignore[import-not-found]
import pyarrow as pa
import pytest

from owlrec.encoding.vector_shards import VectorShards
from owlrec.generation.job import read_knowledge
from owlrec.releases import open_release
from owlrec.schema import INTERACTIONS
from owlrec.shards import Artifact, needed_stage
from owlrec.storage import Storage
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("prepare", "generate", "encode", "publish", "refresh")
HARMS = ("kill", "kill", "truncate", "fill disk")
HARMS_PER_STAGE = 3
USERS = 120


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(max(1, metafunc.config.getoption("--chaos-seeds") // 3)))


def write_recipe(path: Path, workspace: Path) -> Path:
    path.write_text(
        f"""
name: killed
scenario: movies
workspace: {workspace}
source: {{type: movielens-100k, max_users: {USERS}, max_items: 160}}
shard_rows: 8
engine: {{type: echo, latency_s: 0.05}}
sampling: {{max_tokens: 40}}
encoder: {{model: hashing, semantic_ids: {{train_sample: 64, codes_per_level: 8}}}}
streaming: {{freeze_behaviours: 4}}
"""
    )
    return path


def start(stage: str, recipe: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        command = [sys.executable, "-m", f"pipelines.{stage}", "--recipe", str(recipe)]
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def add_events(folder: Path) -> None:
    """Twelve more behaviors of each of forty users."""
    workspace = Workspace(folder)
    users = sorted(workspace.read_table("users")["user_id"].to_pylist())[:40]
    items = sorted(workspace.read_table("items")["item_id"].to_pylist())
    latest = max(workspace.read_table("interactions")["timestamp"].to_pylist())
    rows = [(u, items[(u + k) % len(items)], 5.0, latest + 1 + k) for u in users for k in range(12)]
    columns = dict(zip(INTERACTIONS.names, map(list, zip(*rows, strict=True)), strict=True))
    workspace.write_parquet("events/new.parquet", pa.table(columns, schema=INTERACTIONS))


def content(folder: Path) -> dict[str, object]:
    """What a run leaves: tables, texts, vectors and lookups; every card's files hashed."""
    workspace = Workspace(folder)
    encoded = needed_stage(workspace, "encode", "")
    there: dict[str, object] = {
        name: workspace.read_table(name).to_pylist() for name in ("users", "items", "interactions", "samples")
    }
    for artifact in ("tables", encoded.outputs["knowledge"], encoded.outputs["vectors"]):
        cards = Artifact(workspace, artifact).cards()
        assert cards
        for card in cards.values():
            for path, file in card.files.items():
                assert workspace.digest(f"{artifact}/{path}") == file.sha256, (artifact, path)
    with open_release(workspace) as release:
        for kind in ("user", "item"):
            texts = read_knowledge(workspace, encoded.outputs["knowledge"], kind).sort_by("id")
            ids = texts["id"].to_numpy()
            assert len(set(ids.tolist())) == len(ids)
            there[f"{kind} texts"] = texts.select(["id", "text"]).to_pylist()
            vectors = VectorShards(workspace, encoded.outputs["vectors"], f"knowledge-{kind}").gather(ids)[0]
            there[f"{kind} vectors"] = vectors.tobytes()
            there[f"{kind} lookups"] = [(k.as_of, k.text) for k in release.store.get(kind, ids.tolist())]
    return there


def run_undisturbed(recipe: Path, folder: Path, log: Path) -> dict[str, object]:
    for stage in STAGES:
        if stage == "refresh":
            add_events(folder)
        assert start(stage, recipe, log).wait(timeout=120) == 0, log.read_text()[-2000:]
    return content(folder)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_undisturbed(write_recipe(folder / "recipe.yaml", folder / "ws"), folder / "ws", folder / "log")


def newest(folder: Path) -> float:
    """When the workspace was last written to."""
    return max((entry.modified for entry in Storage(folder).entries().values()), default=0.0)


def harm(rng: random.Random, stage: str, recipe: Path, folder: Path, log: Path) -> None:
    """Starts a stage, waits until it writes, and does it some harm."""
    kind, before = rng.choice(HARMS), newest(folder)
    process = start(stage, recipe, log)
    deadline = time.monotonic() + 60
    while newest(folder) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.4)
    if kind == "fill disk":
        chaos.fill(folder / "filler")
        code = process.wait(timeout=120)
        (folder / "filler").unlink()
        assert code == 0 or "Free some space" in log.read_text(), log.read_text()[-3000:]
        return
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if kind == "truncate":
        shards = [p for p in folder.rglob("0*.*") if p.suffix in (".parquet", ".arrow") and "events" not in p.parts]
        made = [p for p in shards if p.stat().st_mtime > before and p.stat().st_size]
        if made:
            os.truncate(victim := rng.choice(sorted(made)), rng.randrange(victim.stat().st_size))


def test_what_is_killed_and_damaged_ends_as_if_nothing_had_happened(
    seed: int, tmp_path: Path, expected: dict[str, object]
) -> None:
    rng, folder, log = random.Random(seed), tmp_path / "ws", tmp_path / "log"
    recipe = write_recipe(tmp_path / "recipe.yaml", folder)
    try:
        with chaos.small_disk(folder, "64m"):
            for stage in STAGES:
                if stage == "refresh":
                    add_events(folder)
                for _ in range(HARMS_PER_STAGE):
                    harm(rng, stage, recipe, folder, log)
                # A file of an earlier stage may have been truncated: every stage is asked again, as `owlrec run` does.
                for again in STAGES[: STAGES.index(stage) + 1]:
                    assert start(again, recipe, log).wait(timeout=120) == 0, log.read_text()[-3000:]
            assert content(folder) == expected
    except PermissionError as error:
        pytest.skip(str(error))
