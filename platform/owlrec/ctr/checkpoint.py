"""Where a trial stands, so that a killed one goes on at the very next sample.

One safetensors file holds everything that the next step depends on: weights, the best epoch's weights, both optimisers,
each rank's random state, and the position in the epoch's order of rows, which itself follows from seed and epoch. One
file is replaced atomically, so no kill leaves half a checkpoint; and it is no pickle.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor

from owlrec.ctr.worker import Worker
from owlrec.errors import WorkspaceError
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace


class Progress(BaseModel):
    """How far a trial is."""

    epoch: int = 1  # the current one
    batches: int = 0  # of it that are trained
    steps: int = 0  # of all epochs
    best_auc: float = -1.0
    best_epoch: int = 0
    training_s: float = 0.0  # without evaluation; that which is lost with a kill is not in it
    resumed: int = 0  # times


@dataclass(frozen=True)
class CheckpointFile:
    """A trial's checkpoint in the workspace, written every `every_steps` steps."""

    workspace: Workspace
    path: str
    every_steps: int
    trial: str = ""  # fingerprint of all that the tensors depend on; `of` sets it

    def of(self, *parts: Any) -> "CheckpointFile":
        """The same file, for a trial that `parts` (models or plain values) describe."""
        return replace(self, trial=fingerprint(*parts))

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the file."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"trial": self.trial, "progress": progress.model_dump_json()}
        self.workspace.write_bytes(self.path, safetensors.torch.save(plain, metadata))

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """What `save` wrote, on the CPU; None where nothing was. Raises WorkspaceError where the file is damaged, or of
        another trial.
        """
        if not self.workspace.exists(self.path):
            return None
        data = self.workspace.read_bytes(self.path)
        try:
            tensors = safetensors.torch.load(data)
            metadata = metadata_of(data)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise WorkspaceError(
                f"{self.workspace.path(self.path)} is no readable checkpoint ({error}). Delete it, and the trial "
                f"starts anew."
            ) from None
        if metadata["trial"] != self.trial:
            raise WorkspaceError(
                f"{self.workspace.path(self.path)} is the checkpoint of another model or of other data. Delete it, and "
                f"the trial starts anew."
            )
        progress = Progress.model_validate_json(metadata["progress"])
        progress.resumed += 1
        return progress, tensors

    def delete(self) -> None:
        """Removes the file, if there is one."""
        self.workspace.delete_file(self.path)


def metadata_of(data: bytes) -> dict[str, str]:
    """What stands beside the tensors of a safetensors file, which safetensors itself reads from files only.

    Raises KeyError or ValueError where there is none.
    """
    length = int.from_bytes(data[:8], "little")  # of the JSON header
    found: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return found


def random_states(worker: Worker) -> dict[str, Tensor]:
    """Name -> state of every rank's random generators. All ranks must call it."""
    states = {"cpu": torch.get_rng_state()}
    if torch.device(worker.device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(worker.device)
    if worker.world_size == 1:
        return {f"{name}.{worker.rank}": state for name, state in states.items()}
    found = {}
    for name, state in states.items():
        gathered = [torch.empty_like(state, device=worker.device) for _ in range(worker.world_size)]
        dist.all_gather(gathered, state.to(worker.device))
        found.update({f"{name}.{other}": part.cpu() for other, part in enumerate(gathered)})
    return found


def restore_random_states(states: Mapping[str, Tensor], worker: Worker) -> None:
    """Puts this rank's generators where `random_states` found them."""
    torch.set_rng_state(states[f"cpu.{worker.rank}"])
    if f"cuda.{worker.rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{worker.rank}"], worker.device)
