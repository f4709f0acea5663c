"""Tables shared out between two workers by TorchRec: they learn what one worker learns, and need half its memory."""

import os
import pickle
import resource
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from two_ranks import be_a_rank, run_two_ranks  # type: ignore[import-not-found]

from owlrec.ctr import trainer
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.features import FeatureOptions, build_features
from owlrec.ctr.model import CTRModel, ModelSpec
from owlrec.ctr.trainer import CheckpointFile, TrainingData, Worker, all_weights, train_one
from owlrec.schema import SAMPLES
from owlrec.workspace import Workspace

pytestmark = pytest.mark.skipif(find_spec("torchrec") is None, reason="needs the extra `torchrec`")
TRIAL = Trial(backbone="dcnv2", arm="none", seed=0)
CONFIG = CTRConfig(batch_size=128, epochs=3, patience=3, embed_dim=16, hidden_dims=(16, 8), learning_rate=5e-3)
ABOVE = 50  # rows of a table that is shared out, in place of ten million
HUGE = 1 << 24  # rows of 16 float32: 1 GiB


def data(hashed: int = 64, users: int = 240) -> TrainingData:
    """Items differ in quality and users in mood, which only their ids tell."""
    rng = np.random.default_rng(0)
    quality, mood = rng.normal(size=120), rng.normal(size=users)
    rows = []
    for user in range(users):
        split = ("train", "train", "train", "valid", "test")[user % 5]
        for item in rng.choice(120, 30, replace=False).tolist():
            label = float(rng.random() < 1 / (1 + np.exp(-2 * quality[item] - 0.3 * mood[user])))
            rows.append((user, item, label, 0, [], [], [], split))
    samples = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SAMPLES)
    table = pa.table({"user_id": range(users), "raw_id": map(str, range(users))})
    items = pa.table({"item_id": range(120), "raw_id": map(str, range(120)), "title": ["t"] * 120})
    ids = {"user_id": FeatureOptions(hash=hashed)}
    return TrainingData(build_features(table, items, samples, features={"users": ids}, min_item_count=1), {})


def first_weights(world: TrainingData) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    spec = ModelSpec.of(world.features.spec, TRIAL.backbone, 0, CONFIG)
    return CTRModel(spec, world.features.items).state_dict()


@pytest.mark.process
def test_two_workers_learn_what_one_learns_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SPARSE_ABOVE_ROWS", ABOVE)
    world = data()
    (tmp_path / "data.pickle").write_bytes(pickle.dumps(world))
    run_two_ranks(__file__, tmp_path)
    one = train_one(TRIAL, world, CONFIG, begin=lambda model, _: model.load_state_dict(first_weights(world)))
    two = np.load(tmp_path / "0.npz")
    assert 0.7 < one.result.test.auc < 0.95
    assert abs(two["auc"] - one.result.test.auc) < 0.003
    assert two["resumed_auc"] == two["auc"]
    # The same sums of Adagrad, and so the same rows up to rounding.
    expected = one.model.state_dict()["item.weight"].numpy()
    assert two["item"].shape == expected.shape
    np.testing.assert_allclose(two["item"], expected, atol=5e-3)


@pytest.mark.process
def test_a_table_beyond_one_workers_memory_trains_on_two(tmp_path: Path) -> None:
    (tmp_path / "data.pickle").write_bytes(pickle.dumps(data(HUGE, users=40)))
    (tmp_path / "limited").touch()
    run_two_ranks(__file__, tmp_path)
    alone, first, second = ((tmp_path / name).read_text() for name in ("alone", "0", "1"))
    assert "memory" in alone
    assert first == second  # the test AUC
    assert float(first) > 0.5


def _with_limit(folder: Path, rank: int, worker: Worker, world: TrainingData) -> None:
    """80 % of the table's bytes, for all that is allocated from here on."""
    train_one(TRIAL, data(users=40), CONFIG.model_copy(update={"epochs": 1}))  # libraries and arenas are there
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + int(0.8 * HUGE * 64), resource.RLIM_INFINITY))
    config = CONFIG.model_copy(update={"epochs": 1})
    if rank == 0:
        try:
            train_one(TRIAL, world, config)
        except (RuntimeError, MemoryError) as error:
            (folder / "alone").write_text(f"{error} (memory)" if isinstance(error, MemoryError) else str(error))
    result = train_one(TRIAL, world, config, worker).result
    (folder / str(rank)).write_text(str(result.test.auc))


def _rank(rank: int, port: int, folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trainer.SPARSE_ABOVE_ROWS = trainer.SHARD_ABOVE_ROWS = ABOVE
    world, worker = pickle.loads((folder / "data.pickle").read_bytes()), Worker(rank, 2)
    if (folder / "limited").exists():
        _with_limit(folder, rank, worker, world)
        return
    weights = first_weights(world)

    def begin(model: CTRModel, _: object) -> None:
        own = dict(weights)
        assert list(model.sharded_tables) == ["item", "tables.0"]
        for name, table in model.sharded_tables.items():
            table.load(own.pop(f"{name}.weight"), rank)
        model.load_state_dict(own)

    trained = train_one(TRIAL, world, CONFIG, worker, begin=begin)
    item = all_weights(trained.model, worker).get("item.weight", torch.zeros(0)).numpy()
    checkpoint, epochs = CheckpointFile(Workspace(folder / "ws"), "c.safetensors", every_steps=7), []
    scored = trainer.score

    def interrupted(*arguments: object) -> np.ndarray:
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return scored(*arguments)  # type: ignore[arg-type]

    trainer.score = interrupted
    try:
        train_one(TRIAL, world, CONFIG, worker, checkpoint, begin)
    except KeyboardInterrupt:
        trainer.score = scored
    resumed = train_one(TRIAL, world, CONFIG, worker, checkpoint, begin)
    assert resumed.result.resumed == 1
    np.savez(folder / f"{rank}.npz", auc=trained.result.test.auc, resumed_auc=resumed.result.test.auc, item=item)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    be_a_rank(_rank)
