"""The folder that a serving process opens to score; `scoring.Scorer` reads it.

    spec.json, model.safetensors   the trained trial, its adaptor included
    vocabularies.parquet           how values become codes
    items.safetensors              the item table's ids and codes
    profiles/                      by shard, each user's profile as codes, where the model reads any
    projection.*                   how an encoder's vectors become those that the model reads, where they are reduced
    program.pt2                    the backbone as a torch.export program
    cards/                         that shards are done, so that an interrupted export goes on
    model.json                     what it is, and whose vectors it must be given; written last

Nothing in it follows from texts or behaviors: those are read from the current release (ctr.live), so that a refresh
reaches the scores. JSON, Arrow and safetensors only, no pickle.
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
# model.json of an artifact, which is written last: read without torch, so that who only asks for it starts fast.


AGAIN = "Run `owlrec ctr export` again."


class Reads(BaseModel):
    """The knowledge that a model was trained on. Other encoders and codebooks would give it numbers that mean something
    else.
    """

    user: tuple[str, ...]  # sources, in the order of the adaptor's slots
    item: tuple[str, ...]
    encoder: str  # EncoderConfig.identity
    codebooks: dict[str, str]  # by kind, fingerprints of those whose codes it reads

    def sources(self, kind: str) -> tuple[str, ...]:
        """Of users or items."""
        return self.user if kind == "user" else self.item

    def refuse_other(self, release: str, encoder: str, codebooks: Mapping[str, str]) -> None:
        """Raises ReleaseError where a release has the vectors of another encoder, or codes of other codebooks.

        encoder, codebooks: of the release.
        """
        again = "Train and export again on its vectors, or roll back to a release that the model was trained on."
        if encoder != self.encoder:
            raise ReleaseError(
                f"release {release} has vectors of encoder '{encoder}', but the model was trained on those of "
                f"'{self.encoder}'. {again}"
            )
        for kind, codebook in self.codebooks.items():
            if codebooks.get(kind, "") != codebook:
                raise ReleaseError(
                    f"release {release} has {kind} codes of codebooks {codebooks.get(kind, '')[:8] or 'none'}, but the "
                    f"model was trained on those of {codebook[:8]}. {again}"
                )


class ModelCard(BaseModel):
    """model.json: what an artifact is, and how it scored before it was exported."""

    trial: Trial
    grid: str  # fingerprint
    items: int
    reads: Reads | None  # None for arm "none"
    valid: Metrics
    test: Metrics


def finish_artifact(workspace: Workspace, folder: str, card: ModelCard) -> None:
    """Completes an artifact: only now does a scorer open it."""
    workspace.write_json(f"{folder}/model.json", card.model_dump(mode="json"))


def read_card(workspace: Workspace, folder: str) -> ModelCard:
    """Raises WorkspaceError where the folder holds no finished artifact."""
    if not workspace.exists(folder, "model.json"):
        raise WorkspaceError(
            f"{workspace.path(folder)}: no finished artifact is there. `owlrec ctr export` writes one and names it."
        )
    try:
        return ModelCard.model_validate(workspace.read_json(f"{folder}/model.json"))
    except ValidationError as error:
        raise WorkspaceError(f"{workspace.path(folder)}: model.json is of no known form ({error}). {AGAIN}") from None


# ------------------------------------------------------------------------------------------------------------- profiles
# The profile of each user as codes, in mapped shards: what an artifact holds of users, as far as its model reads it.
#
# One of 10^8 users then costs a binary search in one file, and replicas of one machine share the page cache.


PROFILES = "profiles"
_SHARDS_OPEN = 256  # each holds a file descriptor, of which a process often has no more than 1,024


class EncodeProfiles(Stage):
    """Encodes a shard of the users table by an artifact's vocabularies."""

    name = "export_ctr"

    def __init__(self, folder: str) -> None:
        """folder: of the artifact, with its vocabularies."""
        self.folder = folder

    def run(self, work: Work) -> Result:
        """Writes the shard's one file."""
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
        """folder: of the shards, as many as the users had when they were written.

        Raises WorkspaceError where shards are missing, or the first one is damaged.
        """
        self._workspace, self._folder = workspace, folder
        self._n_shards = len(workspace.names(folder))
        if self._n_shards == 0 or self._n_shards & (self._n_shards - 1):
            raise WorkspaceError(
                f"{workspace.path(folder)} holds {self._n_shards} shards of users, and not a power of two: some are "
                "missing. Run `export_ctr` again."
            )
        self._shard = lru_cache(maxsize=_SHARDS_OPEN)(self._open)
        self._shard(0)

    def find(self, user_id: int) -> np.ndarray | None:
        """A user's codes, int32 [fields]; None for a user who is not there."""
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
# The sources whose vectors a release holds. Metadata is a control, and shuffled knowledge is another.
RELEASED = ("none", "knowledge", "collective", "both", "streaming")


def artifact_folder(grid: str, trial: Trial) -> str:
    """Where the artifact of a trial lives, relative to the workspace."""
    return f"{MODELS}/{grid[:16]}-{trial.path.replace('/', '-')}"


def read_by(workspace: Workspace, trial: Trial, folders: Mapping[str, Mapping[str, str]]) -> Reads | None:
    """What a trial's model was given, and must be given where it serves; None where that is nothing.

    folders: source -> side -> the folder of the vectors that the trial read.
    """
    sources, (_, form) = arm_sources(trial.arm, folders), arm_parts(trial.arm)
    if not sources.user:
        return None
    codebooks = {}
    shards = {
        kind: VectorShards(workspace, folders[sources.user[0]][kind], f"{sources.user[0]}-{kind}")
        for kind in ("user", "item")
    }
    for kind, of_kind in shards.items() if form != "vectors" else ():
        quantiser = of_kind.quantiser()
        codebooks[kind] = quantiser.fingerprint if quantiser else ""
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
    """Writes all but the program, and model.json (`finish_artifact`), into `artifact_folder`, which it returns; an
    interrupted one goes on.

    grid: the fingerprint of the grid whose trial this is. items: of the whole items table. projection: the folder of
    the projection that made the vectors that the trial read, None where they are the encoder's.
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
