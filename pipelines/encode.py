"""Encodes knowledge, and the metadata of the control arm, into shards of vectors with semantic ids."""

from contextlib import nullcontext

from owlrec.ctr.knowledge import DISLIKED, arm_parts
from owlrec.encoding.inputs import (
    Input,
    ItemMetadata,
    KnowledgeTexts,
    Members,
    UserMetadata,
    WithImported,
    imported_vectors,
)
from owlrec.encoding.semantic_ids import CODING
from owlrec.encoding.stage import EncodingJob
from owlrec.errors import SourceError
from owlrec.ops.console import note, progress, stage_header
from owlrec.recipe import Recipe
from owlrec.schema import KINDS, TABLES
from owlrec.shards import Card, Stopwatch, finish_stage, finished_stage, forget_stages, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.cohorts import cohorts_folder
from pipelines.session import ray_session
from pipelines.stage import from_stage, main


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Encodes what `generate` wrote, and of that only what is new or has changed."""
    stage_header("encode", recipe.encoder.model)
    watch, knowledge = Stopwatch(), needed_stage(workspace, "generate", "no knowledge yet").outputs["knowledge"]
    # What changes a vector, and nothing else: no batch size, device or precision (half on a GPU moves a component by up
    # to 3e-4), and not how many texts there are.
    named = fingerprint(recipe.encoder.identity, recipe.encoder.semantic_ids, CODING, knowledge)
    folder = f"vectors/{named[:16]}"
    job = EncodingJob(workspace, folder, recipe.encoder, _inputs(recipe, workspace, knowledge, folder))
    pool = job.pool(str(workspace.log_path("encode")))
    before, pending = finished_stage(workspace, "encode"), job.pending()
    if pending:
        forget_stages(workspace, from_stage("encode"))
    session = nullcontext() if pool.here or not pending else ray_session(recipe.ray, workspace.log_path("ray"))
    with session, progress("encoding", None, "texts") as advance:
        cards = job.run(pool, lambda card: advance(int(card.counts["encoded"])))
    content = {name: [file.sha256 for file in card.files.values()] for name, card in cards.items()}
    if before is not None and before.fingerprint == fingerprint(folder, content) and not pending:
        note("done already, nothing to do")
        return before
    outputs = {"vectors": folder, "knowledge": knowledge}
    return finish_stage(
        workspace,
        "encode",
        fingerprint(folder, content),
        counts=job.counts(cards),
        outputs=outputs,
        seconds=watch.seconds,
    )


def _inputs(recipe: Recipe, workspace: Workspace, knowledge: str, folder: str) -> dict[str, Input]:
    """What the recipe has encoded: knowledge, and what else an arm reads."""
    arms = {arm_parts(arm)[0] for arm in recipe.ctr.arms}
    inputs: dict[str, Input] = {}
    written = workspace.names(knowledge)
    for kind in KINDS:
        texts = KnowledgeTexts(knowledge, kind)
        imported = imported_vectors(workspace, kind)
        if imported is not None:
            _refuse_other_dim(recipe, workspace.path(imported.folder), imported.dim)
            inputs[f"knowledge-{kind}"] = WithImported(texts, imported.folder)
        elif kind in written:
            inputs[f"knowledge-{kind}"] = texts
    if "metadata" in arms:
        inputs |= {"metadata-user": UserMetadata(), "metadata-item": ItemMetadata()}
    # Where there is no individual knowledge, `shuffled` reads that of cohorts.
    reads = {"collective", "both"} | ({"shuffled"} if recipe.prompts.mode == "collective" else set())
    cohorts = cohorts_folder(recipe, workspace) if recipe.prompts.mode != "individual" else None
    if cohorts is not None and arms & reads:
        inputs |= {f"collective-{kind}": Members(cohorts, folder, kind) for kind in TABLES}
        inputs[f"{DISLIKED}-user"] = Members(cohorts, folder, "user", disliked=True)
    return inputs


def _refuse_other_dim(recipe: Recipe, path: str, dim: int) -> None:
    expected = recipe.encoder.load().dimension
    if dim != expected:
        raise SourceError(
            f"{path} has vectors of {dim} components, but the recipe's encoder gives {expected}: a release has one "
            "dimension, and so have the arms of an experiment. Name an encoder of the same, or remove the folder."
        )


if __name__ == "__main__":
    main(run, __doc__ or "")
