"""Knowledge and vectors to an immutable release, current the moment one pointer file is swapped."""

from owlrec.errors import WorkspaceError
from owlrec.generation.shards import iterate_knowledge
from owlrec.ops.console import note, progress
from owlrec.recipe import Recipe
from owlrec.store.publishing import ReleaseInfo, publish
from owlrec.store.release import current_release
from owlrec.workspace import StageManifest, Workspace, finished_stage
from pipelines.stage import Counts, Outputs, execute, main


def run(recipe: Recipe, workspace: Workspace) -> StageManifest:
    """Publishes what `encode` finished. Publishing the same contents again makes the same release current."""
    encoded = finished_stage(workspace, "encode")
    if encoded is None:
        raise WorkspaceError(f"{workspace.root}: no vectors yet. Run `encode` first, with the same recipe.")

    def body() -> tuple[Counts, Outputs]:
        vectors = (
            workspace.read_parquet(f"{encoded.outputs['vectors']}/knowledge-{k}.parquet") for k in ("user", "item")
        )
        info = ReleaseInfo(
            fingerprint=encoded.fingerprint,
            model=getattr(recipe.engine, "model", recipe.engine.type),
            encoder=recipe.encoder.model,
            parent=current_release(workspace),
        )
        with progress("publishing", None) as advance:
            manifest = publish(
                workspace,
                knowledge=iterate_knowledge(workspace, encoded.outputs["knowledge"]),
                vectors=vectors,
                info=info,
                on_rows=advance,
            )
        note(f"release {manifest.name} is current: {workspace.path('releases', manifest.name)}")
        counts: Counts = {f"knowledge_{k}": n for k, n in manifest.knowledge.items()}
        return counts, {"release": manifest.name}

    return execute(workspace, "publish", encoded.fingerprint, "an immutable release", body)


if __name__ == "__main__":
    main(run, __doc__ or "")
