"""Knowledge and vectors to an immutable release, current the moment one pointer file is swapped."""

from owlrec.decoding.release_pools import FOLDER, write_release_pools
from owlrec.errors import WorkspaceError
from owlrec.generation import VllmEngineConfig
from owlrec.generation.models import load_tokenizer, model_identity
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
        counts |= {f"pool_tokens_{k}": n for k, n in _write_pools(recipe, workspace, encoded, manifest.name).items()}
        return counts, {"release": manifest.name}

    return execute(workspace, "publish", encoded.fingerprint, "an immutable release", body)


def _write_pools(recipe: Recipe, workspace: Workspace, encoded: StageManifest, release: str) -> dict[str, int]:
    """Retrieval pools of the release's texts, for the next generation to draft from; tokens by pool."""
    engine = recipe.engine
    if recipe.decoding.mode == "off" or not isinstance(engine, VllmEngineConfig):
        return {}
    if not workspace.local:
        note("no retrieval pools: engines map them into memory, which needs a local or mounted workspace")
        return {}
    root = workspace.local_path(FOLDER, release)
    written = write_release_pools(
        root,
        iterate_knowledge(workspace, encoded.outputs["knowledge"]),
        load_tokenizer(engine.model, engine.revision),
        identity=model_identity(engine.model, engine.revision),
        max_tokens=recipe.decoding.pool_tokens,
    )
    note(f"retrieval pools: {', '.join(f'{name} {n:,} tokens' for name, n in written.items()) or 'none'}: {root}")
    return written


if __name__ == "__main__":
    main(run, __doc__ or "")
