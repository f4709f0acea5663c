"""The exported model's folder, which a serving process opens; `scoring.Scorer` reads it.

    spec.json, model.safetensors   the trained trial, including its adaptor
    vocabularies.parquet           maps values to codes
    items.safetensors              the item table's ids and codes
    profiles/                      by shard, each user's profile as codes, if the model reads any
    projection.*                   projection of the encoder's vectors, if the model reads reduced ones
    program.pt2                    the backbone as a torch.export program
    cards/                         cards of finished shards, so an interrupted export resumes
    model.json                     the model's description and the vectors it needs; written last

The folder contains no texts or behaviors: those come from the current release (ctr.live), so scores follow each
refresh. JSON, Arrow and safetensors only, no pickle.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from owlrec.ctr.experiment import Metrics, Trial, grid_folder
from owlrec.ctr.features import ItemFeatures, value_codes
from owlrec.ctr.knowledge import arm_parts, arm_sources
from owlrec.ctr.trainer import VOCABULARIES, read_vocabularies, write_items
from owlrec.encoding.vectors import VectorShards
from owlrec.errors import ReleaseError, WorkspaceError
from owlrec.ids import shard_of
from owlrec.ordered import rows_of
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.shards import Shard
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

# ----------------------------------------------------------------------------------------------------------- model card
# model.json of an artifact, written last. Read without torch, so programs that only need it start fast.


AGAIN = "Run `owlrec ctr export` again."


class Reads(BaseModel):
    """The knowledge that a model was trained on. Numbers from other encoders and codebooks would mean something
    else.
    """

    user: tuple[str, ...]  # sources, in the order of the adaptor's slots
    item: tuple[str, ...]
    encoder: str  # EncoderConfig.identity
    codebooks: dict[str, str]  # by kind, fingerprints of the codebooks it reads

    def sources(self, kind: str) -> tuple[str, ...]:
        """Sources of users or items."""
        return self.user if kind == "user" else self.item

    def refuse_other(self, release: str, encoder: str, codebooks: Mapping[str, str]) -> None:
        """Raises ReleaseError if a release has vectors of another encoder, or codes of other codebooks.

        encoder, codebooks: of the release.
        """
        again = "Train and export again on its vectors, or roll back to a release with the model's encoder."
        if encoder != self.encoder:
            raise ReleaseError(
                f"release {release} has vectors of encoder '{encoder}', but the model was trained with "
                f"'{self.encoder}'. {again}"
            )
        for kind, codebook in self.codebooks.items():
            if codebooks.get(kind, "") != codebook:
                raise ReleaseError(
                    f"release {release} has {kind} codes of codebooks {codebooks.get(kind, '')[:8] or 'none'}, "
                    f"but the model was trained with {codebook[:8]}. {again}"
                )


class ModelCard(BaseModel):
    """model.json: description of an artifact, with its scores before the export."""

    trial: Trial
    grid: str  # fingerprint
    items: int
    reads: Reads | None  # None for arm "none"
    valid: Metrics
    test: Metrics


def finish_artifact(workspace: Workspace, folder: str, card: ModelCard) -> None:
    """Completes an artifact; a scorer opens only complete ones."""
    workspace.write_json(f"{folder}/model.json", card.model_dump(mode="json"))


def read_card(workspace: Workspace, folder: str) -> ModelCard:
    """Raises WorkspaceError if the folder has no finished artifact."""
    if not workspace.exists(folder, "model.json"):
        raise WorkspaceError(
            f"{workspace.path(folder)}: there is no finished artifact. Run `owlrec ctr export`; it prints the folder."
        )
    try:
        return ModelCard.model_validate(workspace.read_json(f"{folder}/model.json"))
    except ValidationError as error:
        raise WorkspaceError(f"{workspace.path(folder)}: model.json has an unknown format ({error}). {AGAIN}") from None


# ------------------------------------------------------------------------------------------------------------- profiles
# Each user's profile as codes, in mapped shards; only artifacts whose model reads profiles have it.
#
# At 10^8 users, a lookup is one binary search in one file, and the replicas of a machine share the page cache.


PROFILES = "profiles"
_SHARDS_OPEN = 256  # each holds a file descriptor; processes are often limited to 1,024


class EncodeProfiles(Stage):
    """Encodes a shard of the users table with an artifact's vocabularies."""

    name = "export_ctr"

    def __init__(self, folder: str) -> None:
        """folder: the artifact's, with its vocabularies."""
        self.folder = folder

    def run(self, work: Work) -> Result:
        """Writes the shard's only file."""
        profile = read_vocabularies(work.workspace, self.folder).profile
        users = work.workspace.read_shard("users", work.shard.number, ["user_id", *profile]).sort_by("user_id")
        columns = {name: value_codes(users[name], values) for name, values in profile.items()}
        table = pa.table({"user_id": users["user_id"], **{f"profile/{name}": codes for name, codes in columns.items()}})
        path = work.shard.file(".arrow")
        work.check()
        file = work.workspace.write_arrow(work.artifact.path(path), table, table.schema)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))


class Profiles:
    """All users' profiles on disk."""

    def __init__(self, workspace: Workspace, folder: str) -> None:
        """folder: of the shards, one per user shard at the time of export.

        Raises WorkspaceError if shards are missing or the first one is damaged.
        """
        self._workspace, self._folder = workspace, folder
        self._n_shards = len(workspace.names(folder))
        if self._n_shards == 0 or self._n_shards & (self._n_shards - 1):
            raise WorkspaceError(
                f"{workspace.path(folder)} has {self._n_shards} user shards, which is not a power of two: some "
                "are missing. Run `export_ctr` again."
            )
        self._shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)
        self._shard(0)

    def find(self, user_id: int) -> np.ndarray | None:
        """A user's codes, int32 [fields]; None for an unknown user."""
        ids, codes = self._shard(int(shard_of(np.array([user_id]), self._n_shards)[0]))
        row = int(rows_of(ids, np.array([user_id]))[0])
        return None if row < 0 else np.array([column[row] for column in codes], dtype=np.int32)

    def _open(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        table = self._workspace.map_arrow(f"{self._folder}/{shard_file(number, '.arrow')}")
        ids, *codes = (column.to_numpy() for column in table.columns)
        return ids, codes


# ------------------------------------------------------------------------------------------------------------- artifact


MODELS = "models"
PROGRAM = "program.pt2"
# The sources whose vectors a release has. Metadata and shuffled knowledge are controls.
RELEASED = ("none", "knowledge", "collective", "both", "streaming")


def artifact_folder(grid: str, trial: Trial) -> str:
    """Folder of a trial's artifact, relative to the workspace."""
    return f"{MODELS}/{grid[:16]}-{trial.path.replace('/', '-')}"


def read_by(workspace: Workspace, trial: Trial, folders: Mapping[str, Mapping[str, str]]) -> Reads | None:
    """The inputs of a trial's model, which it also needs in serving; None if there are none.

    folders: source -> kind -> folder of the vectors that the trial read.
    """
    sources, (_, form) = arm_sources(trial.arm, folders), arm_parts(trial.arm)
    if not sources.user:
        return None
    codebooks = {}
    shards = {
        kind: VectorShards(workspace, folders[sources.user[0]][kind], f"{sources.user[0]}-{kind}")
        for kind in ("user", "item")
    }
    for kind, kind_shards in shards.items() if form != "vectors" else ():
        quantizer = kind_shards.quantizer()
        codebooks[kind] = quantizer.fingerprint if quantizer else ""
    first = next((s for n in shards["item"].numbers if (s := shards["item"].shard(n)) is not None), None)
    return Reads(user=sources.user, item=sources.item, encoder=first.encoder if first else "", codebooks=codebooks)


def write_artifact(
    workspace: Workspace,
    grid: str,
    trial: Trial,
    items: ItemFeatures,
    *,
    projection: str | None = None,
    pool: Pool | None = None,
) -> str:
    """Writes everything but the program and model.json (`finish_artifact`) into `artifact_folder`, which it returns.
    Resumes if interrupted.

    grid: fingerprint of the trial's grid. items: the whole items table. projection: folder of
    the projection of the trial's vectors, or None if they are the encoder's own.
    """
    folder, source = artifact_folder(grid, trial), f"{grid_folder(grid)}/{trial.path}"
    if workspace.exists(folder, "model.json"):
        workspace.delete_dir(folder)
    for name in ("spec.json", "model.safetensors"):
        workspace.write_bytes(f"{folder}/{name}", workspace.read_bytes(f"{source}/{name}"))
    workspace.write_bytes(f"{folder}/{VOCABULARIES}", workspace.read_bytes(f"{grid_folder(grid)}/{VOCABULARIES}"))
    write_items(workspace, folder, items)
    for name in workspace.names(projection) if projection else ():
        if name.startswith("projection."):
            workspace.write_bytes(f"{folder}/{name}", workspace.read_bytes(f"{projection}/{name}"))
    if read_vocabularies(workspace, folder).profile:
        shards = [Shard(PROFILES, number) for number in workspace.table_shards("users")]
        run_stage(workspace, EncodeProfiles(folder), dict.fromkeys(shards, fingerprint(grid, trial)), pool)
    return folder
