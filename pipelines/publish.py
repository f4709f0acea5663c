"""Knowledge and vectors to an immutable release, current the moment one pointer file is swapped."""

from contextlib import nullcontext

from owlrec.cohorts.model import CohortNames
from owlrec.decoding.release_pools import FOLDER, write_release_pools
from owlrec.encoding.vectors import read_quantisers
from owlrec.generation import VllmEngineConfig
from owlrec.generation.job import iterate_knowledge
from owlrec.generation.models import load_tokenizer
from owlrec.ops.console import note, progress
from owlrec.recipe import Recipe
from owlrec.releases.build import PART_IDS, ReleaseInfo, ShardRows, publish_rows
from owlrec.releases.release import current_release
from owlrec.runner import Pool
from owlrec.schema import KINDS
from owlrec.shards import Card, needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shards_for
from pipelines.cohorts import cohorts_folder
from pipelines.session import ray_session
from pipelines.stage import Counts, Outputs, execute, main

PARTS_ON_RAY = 8  # from a million users on; fewer parts are built here in less time than Ray takes to start


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Publishes what `encode` finished. Publishing the same contents again makes the same release current."""
    encoded = needed_stage(workspace, "encode", "no vectors yet")
    prepared = needed_stage(workspace, "prepare", "the tables are not prepared")
    named = fingerprint(encoded.fingerprint, prepared.fingerprint)  # of texts and vectors, and of behaviors

    def body() -> tuple[Counts, Outputs]:
        folder = encoded.outputs["vectors"]
        cohorts = cohorts_folder(recipe, workspace) if recipe.prompts.mode != "individual" else None
        n_parts = shards_for(max(int(prepared.counts["users"]), int(prepared.counts["items"])), PART_IDS)
        pool = Pool(here=n_parts < PARTS_ON_RAY, max_workers=n_parts)
        info = ReleaseInfo(
            fingerprint=named,
            model=getattr(recipe.engine, "model", recipe.engine.type),
            encoder=recipe.encoder.model,
            encoder_identity=recipe.encoder.identity,
            history_length=recipe.split.history_length,
            parent=current_release(workspace),
        )
        session = nullcontext() if pool.here else ray_session(recipe.ray, workspace.log_path("ray"))
        with session, progress("publishing", None) as advance:
            manifest = publish_rows(
                workspace,
                info,
                ShardRows(encoded.outputs["knowledge"], folder, cohorts, recipe.split.history_length),
                n_parts,
                quantisers=read_quantisers(workspace, folder, "knowledge"),
                pool=pool,
                on_card=lambda card: advance(card.rows_out),
            )
        note(f"release {manifest.name} is current: {workspace.path('releases', manifest.name)}")
        counts: Counts = {f"knowledge_{k}": n for k, n in manifest.knowledge.items()}
        pools = _write_pools(recipe, workspace, encoded, manifest.name)
        counts |= {f"pool_tokens_{kind}": pools[kind] for kind in KINDS if kind in pools}
        counts |= {"pools": len(pools)} if pools else {}
        return counts, {"release": manifest.name}

    return execute(workspace, "publish", named, "an immutable release", body)


def _write_pools(recipe: Recipe, workspace: Workspace, encoded: Card, release: str) -> dict[str, int]:
    """Retrieval pools of the release's texts, for the next generation to draft from; tokens by pool."""
    engine = recipe.engine
    if recipe.decoding.mode == "off" or not isinstance(engine, VllmEngineConfig):
        return {}
    if not workspace.local:
        note("no retrieval pools: engines map them into memory, which needs a local or mounted workspace")
        return {}
    root, cohorts = workspace.local_path(FOLDER, release), cohorts_folder(recipe, workspace)
    written = write_release_pools(
        root,
        iterate_knowledge(workspace, encoded.outputs["knowledge"]),
        load_tokenizer(engine.model, engine.revision),
        identity=engine.model_identity,
        max_tokens=recipe.decoding.pool_tokens,
        cohorts_of=CohortNames(workspace, cohorts) if cohorts else None,
    )
    kinds = ", ".join(f"{name} {n:,} tokens" for name, n in written.items() if name in KINDS)
    note(f"retrieval pools: {len(written)} ({kinds or 'no texts'}): {root}")
    return written


if __name__ == "__main__":
    main(run, __doc__ or "")
