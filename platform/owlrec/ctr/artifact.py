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

from owlrec.ctr.arms import arm_parts, arm_sources
from owlrec.ctr.experiment import Trial, grid_folder
from owlrec.ctr.export import VOCABULARIES, read_vocabularies, write_items
from owlrec.ctr.features import ItemFeatures
from owlrec.ctr.model_card import Reads
from owlrec.ctr.profiles import FOLDER as PROFILES
from owlrec.ctr.profiles import EncodeProfiles
from owlrec.encoding.vector_shards import VectorShards
from owlrec.runner import Pool, run_stage
from owlrec.shards import Shard
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

FOLDER = "models"
PROGRAM = "program.pt2"
# The sources whose vectors a release holds. Metadata is a control, and shuffled knowledge is another.
RELEASED = ("none", "knowledge", "collective", "both", "streaming")


def artifact_folder(grid: str, trial: Trial) -> str:
    """Where the artifact of a trial lives, relative to the workspace."""
    return f"{FOLDER}/{grid[:16]}-{trial.path.replace('/', '-')}"


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
