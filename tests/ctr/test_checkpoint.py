"""A trial that is killed and goes on ends as one that never was, at the very same samples; damage is told."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch

from owlrec.ctr import model, trainer
from owlrec.ctr.batches import SplitBatches, Step
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.trainer import CheckpointFile, Optimizers, Progress, train_one
from owlrec.errors import WorkspaceError
from owlrec.workspace import Workspace

torch.set_num_threads(1)
# Dropout (below), both optimizers (20 items are a large table here), knowledge: all that could be forgotten.
CONFIG = CTRConfig(
    batch_size=64,
    learning_rate=0.01,
    epochs=3,
    embed_dim=8,
    hidden_dims=(16, 8),
)
CHECKPOINT_STEPS = 10
TRIAL = Trial(backbone="din", arm="knowledge", seed=3)
TRAINING_ROWS, STEPS_PER_EPOCH = 2200, 35
RESUMED = {(5,): 0, (17,): 1, (35,): 1, (52, 22): 2, (98, 8, 3): 1}


Killer = Callable[[int], None]


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def _a_large_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SPARSE_ABOVE_ROWS", 15)


@pytest.fixture(autouse=True)
def _dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "DROPOUT", 0.2)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The training batches that are drawn."""
    drawn: list[list[int]] = []
    original = SplitBatches.batches

    def spy(self: SplitBatches, steps: Iterable[Step]) -> Iterator[Any]:
        ahead: list[list[int]] = []

        def recorded() -> Iterator[Step]:
            for step in steps:
                ahead.append(step.rows.tolist())
                yield step

        for number, batch in enumerate(original(self, recorded())):
            if len(self.split) == TRAINING_ROWS:
                drawn.append(ahead[number])
            yield batch

    monkeypatch.setattr(SplitBatches, "batches", spy)
    return drawn


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Killer:
    """Ends training after so many further steps, or never again for 0."""
    original = Optimizers.step

    def arrange(steps: int) -> None:
        left = [steps]

        def step(self: Optimizers) -> None:
            original(self)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        monkeypatch.setattr(Optimizers, "step", step)

    return arrange


@pytest.mark.parametrize("kills", [(5,), (17,), (35,), (52, 22), (98, 8, 3)])
def test_killed_trial_ends_bit_for_bit_as_an_undisturbed_one(
    workspace: Workspace,
    toy_world: Any,
    rows: list[list[int]],
    kill_after: Killer,
    kills: tuple[int, ...],
) -> None:
    data = toy_world.data
    whole = train_one(TRIAL, data, CONFIG)
    undisturbed = list(rows)
    assert len(undisturbed) == CONFIG.epochs * STEPS_PER_EPOCH
    checkpoint = CheckpointFile(workspace, "ctr/checkpoint.safetensors", CHECKPOINT_STEPS)
    saved = 0
    for steps in kills:
        rows.clear()
        kill_after(steps)
        with pytest.raises(Killed):
            train_one(TRIAL, data, CONFIG, checkpoint=checkpoint)
        assert rows == undisturbed[saved : saved + steps]
        # The killed step is done but for its checkpoint.
        saved = (saved + steps - 1) // CHECKPOINT_STEPS * CHECKPOINT_STEPS
        assert workspace.exists("ctr/checkpoint.safetensors") == (saved > 0)
    rows.clear()
    kill_after(0)
    again = train_one(TRIAL, data, CONFIG, checkpoint=checkpoint)
    assert rows == undisturbed[saved:]
    assert again.result.resumed == RESUMED[kills]
    assert (again.result.test, again.result.valid) == (whole.result.test, whole.result.valid)
    assert (again.result.epochs, again.result.best_epoch) == (whole.result.epochs, whole.result.best_epoch)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_checkpoint_of_another_model_is_refused(workspace: Workspace, toy_world: Any, kill_after: Killer) -> None:
    checkpoint = CheckpointFile(workspace, "c", 10)
    kill_after(12)
    with pytest.raises(Killed):
        train_one(TRIAL, toy_world.data, CONFIG, checkpoint=checkpoint)
    kill_after(0)
    for changes in ({"embed_dim": 4}, {"learning_rate": 0.02}):
        with pytest.raises(WorkspaceError, match="checkpoint of another model or of other data"):
            train_one(TRIAL, toy_world.data, CONFIG.model_copy(update=changes), checkpoint=checkpoint)
    other = TRIAL.model_copy(update={"seed": 4})
    with pytest.raises(WorkspaceError, match="another model"):
        train_one(other, toy_world.data, CONFIG, checkpoint=checkpoint)
    patience = CONFIG.model_copy(update={"patience": 1})
    assert train_one(TRIAL, toy_world.data, patience, checkpoint=checkpoint).result.resumed == 1


def test_damage_is_told(workspace: Workspace) -> None:
    checkpoint = CheckpointFile(workspace, "c", 10, "print")
    assert checkpoint.load() is None
    checkpoint.save(Progress(epoch=2, batches=7, steps=41), {"a/b": torch.arange(3)})
    loaded = checkpoint.load()
    assert loaded is not None
    assert (loaded[0].epoch, loaded[0].batches, loaded[0].steps, loaded[0].resumed) == (2, 7, 41, 1)
    assert loaded[1]["a/b"].tolist() == [0, 1, 2]
    data = workspace.read_bytes("c")
    for damaged in (data[:-4], data[:20], b"", safetensors.torch.save({"a": torch.zeros(2)})):
        workspace.write_bytes("c", damaged)
        with pytest.raises(WorkspaceError, match=r"not a readable checkpoint.*Delete it"):
            checkpoint.load()
    checkpoint.delete()
    assert checkpoint.load() is None
