"""Where a tuning run stands, as one safetensors file: adapter, optimiser, the best adapter so far, and the counts.

One file, so that a reader never sees the adapter of one step with the optimiser of another. What else a run depends on
follows from its seed and its step (see `tuning`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from owlrec.config import Config
from owlrec.ctr.checkpoint import metadata_of
from owlrec.errors import WorkspaceError

_VERSION = "1"


class Progress(Config):
    """What has been done so far."""

    step: int = 0
    losses: tuple[float, ...] = ()  # of each step
    valid_aucs: tuple[tuple[int, float], ...] = ()  # step, AUC
    best_auc: float = -1.0
    best_step: int = 0
    stale: int = 0  # evaluations since the best

    def after_step(self, loss: float) -> "Progress":
        """One step later."""
        return self.model_copy(update={"step": self.step + 1, "losses": (*self.losses, loss)})

    def after_evaluation(self, auc: float) -> "Progress":
        """With one more AUC of the valid split."""
        found = {"valid_aucs": (*self.valid_aucs, (self.step, auc))}
        if auc > self.best_auc:
            return self.model_copy(update={**found, "best_auc": auc, "best_step": self.step, "stale": 0})
        return self.model_copy(update={**found, "stale": self.stale + 1})


@dataclass(frozen=True)
class Checkpoint:
    """All tensors by the names of the adapter's weights."""

    progress: Progress
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]  # AdamW's exp_avg and exp_avg_sq
    best: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, progress: Progress, weights: Mapping[str, Tensor], optimiser: Optimizer, best: Mapping[str, Tensor]
    ) -> "Checkpoint":
        """Of a running optimiser."""
        moments = {
            kind: {name: optimiser.state[weight][kind] for name, weight in weights.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return cls(progress, dict(weights), moments, dict(best))

    def restore(self, weights: Mapping[str, Tensor], optimiser: Optimizer) -> None:
        """Puts weights and moments where they were. Raises WorkspaceError where the adapter has another shape."""
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in self.weights.items()}:
            raise WorkspaceError(
                "the checkpoint is of another adapter (other modules, rank or model). Delete it to tune from the start."
            )
        for name, weight in weights.items():
            weight.data.copy_(self.weights[name])
            state: dict[str, Any] = optimiser.state[weight]
            state["step"] = weight.new_tensor(float(self.progress.step), device="cpu")
            for kind, tensors in self.moments.items():
                state[kind] = tensors[name].to(weight.device, weight.dtype).clone()

    def to_bytes(self) -> bytes:
        """The file."""
        groups = {"weights": self.weights, "best": self.best, **self.moments}
        tensors = {f"{group}/{n}": t.detach().cpu().contiguous() for group, of in groups.items() for n, t in of.items()}
        return save(tensors, {"version": _VERSION, "progress": self.progress.model_dump_json()})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """What `to_bytes` wrote. Raises WorkspaceError where it is damaged or of another version."""
        try:
            about = metadata_of(data)
            if about["version"] != _VERSION:
                raise ValueError(f"it is of version {about['version']}")
            groups: dict[str, dict[str, Tensor]] = {g: {} for g in ("weights", "best", "exp_avg", "exp_avg_sq")}
            for path, tensor in load(data).items():
                group, _, name = path.partition("/")
                groups[group][name] = tensor
            progress = Progress.model_validate_json(about["progress"])
        except (SafetensorError, ValidationError, KeyError, ValueError) as error:
            raise WorkspaceError(f"the checkpoint is damaged ({error}). Delete it to tune from the start.") from None
        moments = {kind: groups[kind] for kind in ("exp_avg", "exp_avg_sq")}
        return cls(progress, groups["weights"], moments, groups["best"])
