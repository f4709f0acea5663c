"""The folder that a serving process opens to score, and all that it needs: `scoring.Scorer` reads it.

    spec.json, model.safetensors   the trained trial
    vocabularies.parquet           how values become codes
    items.safetensors              the item table's ids and codes
    users/                         each user's last behaviours and profile (user_states)
    adapted-user/, adapted-item/   the fields that the model makes of each id's knowledge, and of missing knowledge
    program.pt2                    the same model as a torch.export program
    model.json                     what it is; written last

A request then neither reads a knowledge vector nor runs the adaptor: an id costs 32 numbers, not 384, and most of the
weights lie idle. JSON, Arrow, safetensors and .npy only, no pickle.
"""

from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from owlrec.ctr.experiment import Trial, TrialResult, grid_folder
from owlrec.ctr.export import VOCABULARIES, load_trial, read_vocabularies
from owlrec.ctr.features import ItemFeatures, SampleFeatures
from owlrec.ctr.fitting import SplitTensors, Tables
from owlrec.ctr.knowledge import KnowledgeTable
from owlrec.ctr.model import CTRModel
from owlrec.ctr.model_card import AGAIN, Precision
from owlrec.ctr.user_states import UserStates
from owlrec.errors import WorkspaceError
from owlrec.workspace import Workspace

FOLDER = "models"
PROGRAM = "program.pt2"
_IDS_A_PASS = 8192


class Adapted:
    """What the model makes of one side's knowledge: float32 [w] an id, its fields in a row, and [w] for ids without."""

    def __init__(self, table: KnowledgeTable, default: np.ndarray) -> None:
        self.table, self.default = table, default

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """float32 [b, w]. ids: int64 [b]."""
        found, known = self.table.gather(ids)
        return np.where(known[:, None], found, self.default)

    @classmethod
    def of(cls, model: CTRModel, tables: Tables, side: str, precision: Precision) -> "Adapted":
        """Of every id of a side ("user" or "item") that has knowledge of any source."""
        ids = np.unique(np.concatenate([t.ids for t in (tables.users if side == "user" else tables.items)]))
        nobody = np.setdiff1d(np.arange(len(ids) + 1), ids)[:1]
        default = _made_of(model, tables, side, nobody)
        outputs = np.empty((len(ids), default.shape[1]), dtype=precision)
        for start in range(0, len(ids), _IDS_A_PASS):
            outputs[start : start + _IDS_A_PASS] = _made_of(model, tables, side, ids[start : start + _IDS_A_PASS])
        return cls(KnowledgeTable(ids, outputs), default[0])

    @classmethod
    def open(cls, folder: Path) -> "Adapted":
        """What `save` wrote, the outputs memory-mapped."""
        return cls(KnowledgeTable.open(folder), np.load(folder / "default.npy", allow_pickle=False))

    def save(self, folder: Path) -> None:
        """Writes the outputs, and the default beside them."""
        self.table.save(folder)
        np.save(folder / "default.npy", self.default, allow_pickle=False)


def artifact_folder(grid: str, trial: Trial) -> str:
    """Where the artifact of a trial lives, relative to the workspace."""
    return f"{FOLDER}/{grid[:16]}-{trial.path.replace('/', '-')}"


def write_artifact(
    workspace: Workspace,
    grid: str,
    result: TrialResult,
    items: ItemFeatures,
    tables: Tables | None,
    *,
    precision: Precision = "float32",
) -> str:
    """Writes all but the program, and model.json (`finish_artifact`); returns the folder.

    grid: the fingerprint of the grid whose trial this is. items: of the whole items table. tables: the vectors that
    the trial read.
    """
    trial, folder = result.trial, artifact_folder(grid, result.trial)
    source = f"{grid_folder(grid)}/{trial.path}"
    workspace.delete_dir(folder)
    for name in ("spec.json", "model.safetensors"):
        workspace.write_bytes(f"{folder}/{name}", workspace.read_bytes(f"{source}/{name}"))
    vocabularies = workspace.read_bytes(f"{grid_folder(grid)}/{VOCABULARIES}")
    workspace.write_bytes(f"{folder}/{VOCABULARIES}", vocabularies)
    arrays = {name: torch.from_numpy(getattr(items, name)) for name in ("ids", "codes", "attributes")}
    workspace.write_bytes(f"{folder}/items.safetensors", safetensors.torch.save(arrays))
    model = load_trial(workspace, source, items)
    states = UserStates.build(
        workspace,
        items,
        read_vocabularies(workspace, f"{folder}/{VOCABULARIES}"),
        model.spec.features.history_length,
    )
    states.save(workspace.local_path(folder, "users"))
    if tables is not None:
        for side in ("user", "item"):
            Adapted.of(model, tables, side, precision).save(workspace.local_path(folder, f"adapted-{side}"))
    return folder


def read_items(workspace: Workspace, folder: str) -> ItemFeatures:
    """The items that the artifact knows."""
    try:
        arrays = safetensors.torch.load(workspace.read_bytes(f"{folder}/items.safetensors"))
        return ItemFeatures(**{name: tensor.numpy() for name, tensor in arrays.items()})
    except (TypeError, safetensors.SafetensorError) as error:
        raise WorkspaceError(f"{workspace.path(folder)}: items.safetensors is damaged ({error}). {AGAIN}") from None


def _made_of(model: CTRModel, tables: Tables, side: str, ids: np.ndarray) -> np.ndarray:
    """float32 [n, w]: the side's half of what the model reads of rows with these ids."""
    n = len(ids)
    nothing, codes = np.zeros(n, np.int32), np.zeros((n, 0), np.int32)
    rows = SampleFeatures(ids, ids, nothing, codes, codes, codes, np.zeros(n, np.float32))
    with torch.inference_mode():
        fields = model.adapted(SplitTensors(rows, tables, "cpu").batch(torch.arange(n)))
    assert fields is not None
    of_side: np.ndarray = fields.chunk(2, dim=1)[("user", "item").index(side)].flatten(1).numpy()
    return of_side
