"""A grid: what it writes, what a rerun skips; and two Ray Train workers: one killed, and how a complaint arrives."""

import signal
import threading
import time
from typing import Any

import psutil
import pytest
from processes import command_lines
from worlds import write_vectors, write_world

from owlrec.ctr.experiment import CTRConfig, Trial, TrialResult, WorkersConfig, grid_folder
from owlrec.ctr.trainer import read_vocabularies, train_one
from owlrec.ctr.training import train_trials
from owlrec.errors import RecipeError, WorkspaceError
from owlrec.runs.models import vector_folders
from owlrec.workspace import Workspace

CONFIG = CTRConfig(batch_size=256, learning_rate=0.01, epochs=4, embed_dim=8, hidden_dims=(16, 8))
FINGERPRINT = "c0ffee" * 10
KINDS = ("user", "item")
SOURCES = ("knowledge", "metadata")  # no vectors of the second are there: no arm of the grid reads them
GRID = [Trial(backbone=b, arm=a, seed=0) for b, a in (("dcnv2", "knowledge"), ("din", "none"), ("din", "shuffled"))]


def prepare(workspace: Workspace, world: Any) -> None:
    write_world(workspace, world, n_shards=2)
    for table, kind in zip(world.vectors, KINDS, strict=True):
        write_vectors(workspace, "vectors/abc", f"knowledge-{kind}", table)


def train(
    workspace: Workspace,
    grid: list[Trial],
    seen: list[TrialResult],
    config: CTRConfig = CONFIG,
    *,
    here: bool = False,
    **options: int,
) -> list[TrialResult]:
    return train_trials(
        workspace,
        config,
        grid,
        knowledge={source: dict.fromkeys(KINDS, "vectors/abc") for source in SOURCES},
        fingerprint=FINGERPRINT,
        features={"items": ("genres",), "users": ()},
        workers=WorkersConfig(num_workers=1 if here else 2),
        here=here,
        on_trial=seen.append,
        **options,
    )


def test_grid_is_trained_once_announced_and_resumed(
    workspace: Workspace, toy_world: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare(workspace, toy_world)
    threads = threading.active_count()
    seen: list[TrialResult] = []
    results = train(workspace, GRID[:2], seen, here=True)
    assert [r.trial for r in results] == GRID[:2]
    assert seen == results
    assert results[0].test.auc > 0.95
    assert results[1].test.auc < 0.65
    folder = f"ctr/{FINGERPRINT[:16]}"
    assert workspace.names(folder, "din", "none", "seed-0") == [
        "model.safetensors",
        "result.json",
        "spec.json",
        "test_scores.parquet",
    ]
    assert read_vocabularies(workspace, grid_folder(FINGERPRINT)).items.to_pylist() == list(range(20))

    weights = workspace.read_bytes(f"{folder}/dcnv2/knowledge/seed-0/model.safetensors")
    workspace.delete_file(f"{folder}/din/none/seed-0/result.json")
    again = train(workspace, GRID, seen, here=True)
    assert [r.trial for r in again] == GRID
    assert again[0] == results[0]
    assert again[1].test == results[1].test
    assert [r.trial for r in seen[2:]] == GRID[1:]
    assert workspace.read_bytes(f"{folder}/dcnv2/knowledge/seed-0/model.safetensors") == weights

    assert train(workspace, GRID, seen) == again  # nothing is pending: no worker group starts, and Ray is not there
    assert len(seen) == 4
    assert threading.active_count() <= threads
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def _kill_a_worker_after(path: str, workspace: Workspace, killed: list[int]) -> threading.Thread:
    """Kills one of the two Train workers, as a spot machine's end does, once the checkpoint `path` is there."""

    def watch() -> None:
        while not workspace.exists(path):
            time.sleep(0.01)
        lines = command_lines(psutil.Process().children(recursive=True))
        worker = max((p for p, line in lines.items() if "TrainWorker" in line), key=lambda p: p.create_time())
        killed.append(worker.pid)
        worker.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.ray
def test_a_killed_workers_group_goes_on_at_the_next_sample(
    ray_local: None, workspace: Workspace, toy_world: Any
) -> None:
    """Two workers and one see the same batches; a kill changes nothing of what the two find."""
    prepare(workspace, toy_world)
    handler = signal.getsignal(signal.SIGINT)
    trial, config = GRID[0], CONFIG.model_copy(update={"batch_size": 16, "epochs": 2, "learning_rate": 0.002})
    one = train_one(trial, toy_world.data, config)
    killed: list[int] = []
    path = f"ctr/{FINGERPRINT[:16]}/{trial.path}/checkpoint.safetensors"
    thread = _kill_a_worker_after(path, workspace, killed)
    (result,) = train(workspace, [trial], [], config, checkpoint_steps=50)
    thread.join(timeout=10)
    assert killed
    assert result.resumed == 1
    assert result.epochs == one.result.epochs
    assert result.test.auc == pytest.approx(one.result.test.auc, abs=0.003)
    assert not workspace.exists(path)
    assert workspace.names("ctr", "ray") == []
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.ray
def test_a_workers_complaint_arrives_as_it_was_raised(ray_local: None, workspace: Workspace, toy_world: Any) -> None:
    prepare(workspace, toy_world)
    workspace.delete_dir("vectors")
    with pytest.raises(WorkspaceError, match=r"knowledge-user holds no vectors.*Run `encode` again"):
        train(workspace, GRID[:1], [], max_failures=0)


def test_a_source_that_was_not_given_is_missed_before_anything_is_trained(workspace: Workspace) -> None:
    grid = [GRID[1], Trial(backbone="din", arm="both", seed=0)]
    with pytest.raises(RecipeError, match="arm 'both' needs collective vectors"):
        train(workspace, grid, [])
    assert workspace.names("ctr") == []


def test_every_source_that_encode_wrote_is_offered(workspace: Workspace) -> None:
    for name in (
        "knowledge-user",
        "knowledge-item",
        "knowledge-cohort",
        "collective-user",
        "quantizers/knowledge-user",
    ):
        workspace.write_bytes(f"vectors/abc/{name}/00000000.arrow", b"")
    assert vector_folders(workspace, "vectors/abc") == {
        "knowledge": {"user": "vectors/abc", "item": "vectors/abc"},
        "collective": {"user": "vectors/abc"},
    }
    assert vector_folders(workspace, "vectors/other") == {}
