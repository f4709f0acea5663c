"""Every stage killed, its files truncated, its disk filled: the same content in the end, every row once, and nothing
that was finished made again.

`pytest tests/e2e/test_stages_killed.py --chaos-seeds 20 -s` runs as many seeds as the project's claim rests on, every
other on Ray, whose workers are killed too; by default one runs. tests/e2e/test_chaos.py harms nodes of a cluster.
"""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import chaos  # type: ignore[import-not-found]
import forked
import psutil
import pyarrow as pa
import pytest

from owlrec.encoding.vectors import VectorShards
from owlrec.generation.job import read_knowledge
from owlrec.refresh.events import EVENTS
from owlrec.releases import open_release
from owlrec.shards import Artifact, Card, needed_stage
from owlrec.storage import Storage
from owlrec.workspace import Workspace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]
STAGES = ("prepare", "generate", "encode", "publish", "refresh")
HARMS = ("kill", "kill", "truncate", "fill disk")
IN_FLIGHT = 4  # shards that one worker may have begun when it dies: what a kill can cost
HARMS_PER_STAGE = 3
ENDS_WITHIN_S = 600  # a stage, Ray's start included, on a machine that is busy with something else
USERS = 120


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--chaos-seeds")))


def write_recipe(path: Path, workspace: Path, replicas: int = 1) -> Path:
    path.write_text(
        f"""
name: killed
scenario: movies
workspace: {workspace}
source: {{type: movielens-100k, max_users: {USERS}, max_items: 160}}
shard_rows: 8
engine: {{type: echo, latency_s: 0.05}}
sampling: {{max_tokens: 40}}
generate: {{replicas: {replicas}, engine_cpus: 1}}
ray: local[2]
encoder: {{model: hashing, replicas: {replicas}, semantic_ids: 3x8}}
streaming: {{freeze_behaviors: 4}}
"""
    )
    return path


# Every stage on Ray, however few rows there are.
EVERYWHERE = dict.fromkeys(
    ("owlrec.runs.stages.PREPARED_HERE", "owlrec.runs.stages.PARTS_ON_RAY",
     "owlrec.runs.upkeep.HERE_ROWS", "owlrec.runs.upkeep.PARTS_ON_RAY"), 0,
)  # fmt: skip


def start(stage: str, recipe: Path, log: Path, *, on_ray: bool = False) -> forked.Forked:
    command = ["refresh", str(recipe)] if stage == "refresh" else ["run", str(recipe), "--only", stage]
    return forked.owlrec(*command, log=log, constants=EVERYWHERE if on_ray else {})


def add_events(folder: Path) -> None:
    """Twelve more behaviors of each of forty users."""
    workspace = Workspace(folder)
    users = sorted(workspace.read_table("users")["user_id"].to_pylist())[:40]
    items = sorted(workspace.read_table("items")["item_id"].to_pylist())
    latest = max(workspace.read_table("interactions")["timestamp"].to_pylist())
    rows = [(u, items[(u + k) % len(items)], 5.0, latest + 1 + k) for u in users for k in range(12)]
    columns = dict(zip(EVENTS.names, map(list, zip(*rows, strict=True)), strict=True))
    workspace.write_parquet("events/new.parquet", pa.table(columns, schema=EVENTS))


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
            texts = read_knowledge(workspace, encoded.outputs["knowledge"], kind)
            texts = texts.sort_by([("id", "ascending"), ("as_of", "ascending")])
            ids, keys = texts["id"].to_numpy(), texts.select(["id", "as_of"]).to_pylist()
            assert len({(key["id"], key["as_of"]) for key in keys}) == len(keys)
            there[f"{kind} texts"] = texts.select(["id", "as_of", "text"]).to_pylist()
            vectors = VectorShards(workspace, encoded.outputs["vectors"], f"knowledge-{kind}").gather(ids)[0]
            there[f"{kind} vectors"] = vectors.tobytes()
            there[f"{kind} lookups"] = [(k.as_of, k.text) for k in release.store.get(kind, ids.tolist())]
    return there


def run_undisturbed(recipe: Path, folder: Path, log: Path) -> dict[str, object]:
    for stage in STAGES:
        if stage == "refresh":
            add_events(folder)
        assert start(stage, recipe, log).wait(timeout=ENDS_WITHIN_S) == 0, log.read_text()[-2000:]
    return content(folder)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_undisturbed(write_recipe(folder / "recipe.yaml", folder / "ws"), folder / "ws", folder / "log")


def newest(folder: Path) -> float:
    """When the workspace was last written to."""
    return max((entry.modified for entry in Storage(folder).entries().values()), default=0.0)


def finished(folder: Path) -> dict[Path, tuple[str, float]]:
    """What every shard was made from and when, by its card."""
    cards = {}
    for path in folder.glob("**/cards/*/*/*.json"):
        with suppress(ValueError, OSError):
            card = Card.model_validate_json(path.read_text())
            cards[path] = card.fingerprint, card.finished
    return cards


class Counted:
    """A seed's runs: how many finished shards were made again, and how many may have been."""

    def __init__(self, folder: Path, recipe: Path, log: Path, *, on_ray: bool) -> None:
        self.folder, self.recipe, self.log, self.on_ray = folder, recipe, log, on_ray
        self.again = self.damaged = self.in_flight = self.kills = 0
        self.before: dict[Path, tuple[str, float]] = {}
        self.started = 0.0

    def start(self, stage: str) -> forked.Forked:
        self.before, self.started = finished(self.folder), time.time()
        return start(stage, self.recipe, self.log, on_ray=self.on_ray)

    def count(self) -> None:
        """After a run: what was finished before it, of the same inputs, and made again nevertheless."""
        now = finished(self.folder)
        self.again += sum(now.get(path, card) != card and now[path][0] == card[0] for path, card in self.before.items())

    def count_kill(self, workers: int) -> None:
        """After a kill: what was being made stays claimed."""
        held = [p for p in self.folder.glob("claims/**/0*") if p.is_file() and p.stat().st_mtime >= self.started]
        self.in_flight += len(held)
        self.kills += 1
        assert len(held) <= IN_FLIGHT * workers, held


def harm(rng: random.Random, stage: str, runs: Counted) -> None:
    """Starts a stage, waits until it writes, and does it some harm."""
    folder, log = runs.folder, runs.log
    kind, before = rng.choice((*HARMS, "kill worker") if runs.on_ray else HARMS), newest(folder)
    process = runs.start(stage)
    deadline = time.monotonic() + 60
    while newest(folder) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.4)
    if kind == "fill disk":
        chaos.fill(folder / "filler")
        code = process.wait(timeout=ENDS_WITHIN_S)
        (folder / "filler").unlink()
        assert code == 0 or "Free some space" in log.read_text(), log.read_text()[-3000:]
    elif kind == "kill worker":
        for pid in rng.sample(pids := chaos.replica_pids(), min(1, len(pids))):
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        assert process.wait(timeout=ENDS_WITHIN_S) == 0, log.read_text()[-3000:]
    elif process.poll() is None:
        workers = max(1, len(chaos.replica_pids()))
        process.send_signal(signal.SIGKILL)
        process.wait()
        runs.count_kill(workers)
    runs.count()
    if kind == "truncate":
        shards = [p for p in folder.rglob("0*.*") if p.suffix in (".parquet", ".arrow") and "events" not in p.parts]
        made = [p for p in shards if p.stat().st_mtime > before and p.stat().st_size]
        if made:
            os.truncate(victim := rng.choice(sorted(made)), rng.randrange(victim.stat().st_size))
            runs.damaged += 1


def test_what_is_killed_and_damaged_ends_as_if_nothing_had_happened(
    seed: int, tmp_path: Path, expected: dict[str, object]
) -> None:
    rng, folder, on_ray = random.Random(seed), tmp_path / "ws", seed % 2 == 1
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, 2 if on_ray else 1)
    runs = Counted(folder, recipe, tmp_path / "log", on_ray=on_ray)
    try:
        with chaos.small_disk(folder, "64m"):
            for stage in STAGES:
                if stage == "refresh":
                    add_events(folder)
                for _ in range(HARMS_PER_STAGE):
                    harm(rng, stage, runs)
                # A file of an earlier stage may have been truncated: every stage is asked again, as `owlrec run` does.
                for again in STAGES[: STAGES.index(stage) + 1]:
                    assert runs.start(again).wait(timeout=ENDS_WITHIN_S) == 0, runs.log.read_text()[-3000:]
                    runs.count()
            assert content(folder) == expected
    except PermissionError as error:
        pytest.skip(str(error))
    place = "Ray" if on_ray else "one process"
    print(
        f"seed {seed}, {place}: {runs.kills} kills with {runs.in_flight} shards in flight; "
        f"{runs.again} finished shards made again, {runs.damaged} files damaged"
    )
    assert runs.again <= runs.damaged
