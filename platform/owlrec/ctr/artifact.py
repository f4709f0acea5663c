"""The folder that a serving process opens to score, and all that it needs: `scoring.Scorer` reads it.

    spec.json, model.safetensors   the trained trial
    vocabularies.parquet           how values become codes
    items.safetensors              the item table's ids and codes
    users/                         by shard, each user's last behaviors and profile (user_states)
    adapted-user/, adapted-item/   by shard, the fields that the model makes of each id's knowledge
    defaults.safetensors           the fields that it makes of missing knowledge
    projection.*                   how vectors of an encoder become those that the model reads, where they are reduced
    program.pt2                    the same model as a torch.export program
    cards/                         that shards are done, so that an interrupted export goes on
    model.json                     what it is; written last

A request then neither reads a knowledge vector nor runs the adaptor: an id costs 32 numbers, not 384, and most of the
weights lie idle. JSON, Arrow and safetensors only, no pickle.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy
import torch

from owlrec.ctr.batches import SplitTensors, Tables
from owlrec.ctr.experiment import Trial, TrialResult, grid_folder
from owlrec.ctr.export import VOCABULARIES, load_trial, read_items, read_vocabularies, write_items
from owlrec.ctr.features import Histories, ItemFeatures, SampleFeatures
from owlrec.ctr.model import CTRModel
from owlrec.ctr.model_card import AGAIN, Precision
from owlrec.ctr.user_states import UserStates
from owlrec.errors import WorkspaceError
from owlrec.ordered import rows_of
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.schema import by_shard
from owlrec.shards import Shard
from owlrec.workspace import Workspace, fingerprint, shard_file

FOLDER = "models"
PROGRAM = "program.pt2"
SIDES = ("user", "item")
_DEFAULTS = "defaults.safetensors"
_IDS_PER_PASS = 8192
_SHARDS_OPEN = 256  # of a side; each holds a file descriptor
_HELD_BYTES = 1 << 26  # of a side's fields: up to so many are read into memory
_NO_ID = -1  # ids are not negative

Fields = tuple[np.ndarray, np.ndarray]  # ids, int64 [n], ascending, and their fields [n, w]


class Adapted:
    """What the model makes of one side's knowledge: float32 [w] for each id, its fields in a row, and [w] for ids
    without.
    """

    def __init__(self, shard: Callable[[int], Fields], n_shards: int, default: np.ndarray) -> None:
        self._shard, self._n_shards, self.default = shard, n_shards, default

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """float32 [b, w]. ids: int64 [b]."""
        found = np.tile(self.default, (len(ids), 1))
        for number, at in by_shard(ids, self._n_shards):
            known, fields = self._shard(number)
            rows = rows_of(known, ids[at])
            found[at[rows >= 0]] = fields[rows[rows >= 0]]
        return found

    @classmethod
    def of(cls, model: CTRModel, tables: Tables, side: str, precision: Precision = "float32") -> "Adapted":
        """Of every id of a side that has knowledge of any source, in memory."""
        fields = _fields_of_shard(model, tables, side, 0, 1, precision)
        return cls(lambda number: fields, 1, _made_of(model, tables, side, np.array([_NO_ID]))[0])

    @classmethod
    def open(cls, workspace: Workspace, folder: str, side: str) -> "Adapted":
        """What an artifact's folder holds, mapped where it is large. Raises WorkspaceError where it is damaged."""
        path = f"{folder}/adapted-{side}"
        entries = workspace.entries(path)
        try:
            default = safetensors.numpy.load(workspace.read_bytes(f"{folder}/{_DEFAULTS}"))[side]
        except (KeyError, safetensors.SafetensorError) as error:
            raise WorkspaceError(f"{workspace.path(folder)}: {_DEFAULTS} is damaged ({error}). {AGAIN}") from None

        def read(number: int) -> Fields:
            table = workspace.map_arrow(f"{path}/{shard_file(number, '.arrow')}")
            return table["id"].to_numpy(), _matrix(table["fields"].combine_chunks())

        if sum(entry.bytes for entry in entries.values()) > _HELD_BYTES:
            return cls(lru_cache(maxsize=_SHARDS_OPEN)(read), len(entries), default)
        # Copied one by one, so that no more than one file is open.
        copies = [tuple(map(np.array, read(number))) for number in range(len(entries))]
        ids, fields = (np.concatenate(arrays) for arrays in zip(*copies, strict=True))
        order = np.argsort(ids, kind="stable")
        held = ids[order], fields[order]
        return cls(lambda number: held, 1, default)


class PrestoreIds(Stage):
    """What an artifact holds of a shard of ids: users/, adapted-user/ or adapted-item/, by the shard's kind."""

    name = "export_ctr"

    def __init__(self, folder: str, source: str, tables: Tables | None, precision: Precision) -> None:
        """folder: of the artifact, with its items and vocabularies; source: of the trial; tables: that it read."""
        self.folder, self.source, self.tables, self.precision = folder, source, tables, precision

    def open(self, workspace: Workspace, worker: str) -> None:
        """Loads items, vocabularies and model."""
        self._items, _ = read_items(workspace, self.folder)
        self._vocabularies = read_vocabularies(workspace, self.folder)
        self._model = load_trial(workspace, self.source, self._items)

    def run(self, work: Work) -> Result:
        """Writes the shard's one file."""
        workspace, number = work.workspace, work.shard.number
        side = work.shard.kind.removeprefix("adapted-")
        if side in SIDES:
            assert self.tables is not None
            n_shards = workspace.n_shards("user" if side == "user" else "item")
            ids, fields = _fields_of_shard(self._model, self.tables, side, number, n_shards, self.precision)
            flat = pa.FixedSizeListArray.from_arrays(pa.array(fields.reshape(-1)), fields.shape[1])
            table = pa.table({"id": ids, "fields": flat})
        else:
            length = self._model.spec.features.history_length
            states = UserStates.of_shard(workspace, number, self._items, self._vocabularies, length)
            table = states.table(list(self._vocabularies.profile))
        path = work.shard.file(".arrow")
        work.check()
        file = workspace.write_arrow(work.artifact.path(path), table, table.schema)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))


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
    projection: str | None = None,
    pool: Pool | None = None,
) -> dict[str, int]:
    """Writes all but the program, and model.json (`finish_artifact`), into `artifact_folder`; an interrupted one goes
    on. Returns how many ids each of its folders by shard holds.

    grid: the fingerprint of the grid whose trial this is. items: of the whole items table. tables: the vectors that
    the trial read. projection: the folder of the projection that made these, None where they are the encoder's.
    """
    trial, folder = result.trial, artifact_folder(grid, result.trial)
    source = f"{grid_folder(grid)}/{trial.path}"
    if workspace.exists(folder, "model.json"):
        workspace.delete_dir(folder)
    for name in ("spec.json", "model.safetensors"):
        workspace.write_bytes(f"{folder}/{name}", workspace.read_bytes(f"{source}/{name}"))
    workspace.write_bytes(f"{folder}/{VOCABULARIES}", workspace.read_bytes(f"{grid_folder(grid)}/{VOCABULARIES}"))
    write_items(workspace, folder, items)
    for name in workspace.names(projection) if projection and tables else ():
        if name.startswith("projection."):
            workspace.write_bytes(f"{folder}/{name}", workspace.read_bytes(f"{projection}/{name}"))
    shards = [Shard("users", number) for number in workspace.table_shards("users")]
    if tables is not None:
        model = load_trial(workspace, source, items)
        nobody = np.array([_NO_ID])
        defaults = {side: np.ascontiguousarray(_made_of(model, tables, side, nobody)[0]) for side in SIDES}
        workspace.write_bytes(f"{folder}/{_DEFAULTS}", safetensors.numpy.save(defaults))
        for side, table in zip(SIDES, ("users", "items"), strict=True):
            shards += [Shard(f"adapted-{side}", number) for number in workspace.table_shards(table)]
    inputs = dict.fromkeys(shards, fingerprint(grid, trial, precision))
    cards = run_stage(workspace, PrestoreIds(folder, source, tables, precision), inputs, pool)
    rows: dict[str, int] = {}
    for shard in shards:
        rows[shard.kind] = rows.get(shard.kind, 0) + cards[shard.name].rows_out
    return rows


def _fields_of_shard(
    model: CTRModel, tables: Tables, side: str, number: int, n_shards: int, precision: Precision
) -> Fields:
    of_side = tables.users if side == "user" else tables.items
    ids = np.unique(np.concatenate([table.ids_in(number, n_shards) for table in of_side]))
    passes = [_made_of(model, tables, side, ids[a : a + _IDS_PER_PASS]) for a in range(0, len(ids), _IDS_PER_PASS)]
    width = _made_of(model, tables, side, np.array([_NO_ID])).shape[1]
    return ids, np.concatenate([np.zeros((0, width), np.float32), *passes]).astype(precision)


def _made_of(model: CTRModel, tables: Tables, side: str, ids: np.ndarray) -> np.ndarray:
    """float32 [n, w]: the side's half of what the model reads of rows with these ids."""
    n = len(ids)
    nothing, codes = np.zeros(n, np.int32), np.zeros((n, 0), np.int32)
    histories = Histories(np.zeros(n, np.int64), nothing, nothing[:0], np.zeros(0, np.uint8), width=0)
    rows = SampleFeatures(ids, ids, nothing, histories, codes, np.zeros(n, np.float32))
    with torch.inference_mode():
        fields = model.adapted(SplitTensors(rows, tables, "cpu").batch(torch.arange(n)))
    assert fields is not None
    of_side: np.ndarray = fields.chunk(2, dim=1)[SIDES.index(side)].flatten(1).numpy()
    return of_side


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), column.type.list_size)
