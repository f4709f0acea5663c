"""Prompts to knowledge: the LLM reads users' histories and items, or cohorts of them, shard by shard, on Ray Data."""

from dataclasses import replace

from owlrec.decoding import DecodingConfig
from owlrec.decoding.release_pools import find_pools
from owlrec.generation import VllmEngineConfig
from owlrec.generation.batch import build_job, check_dead_share, generate
from owlrec.generation.shards import add_manifests, finished_shards, keep_counters, plan_prompt_shards, plan_shards
from owlrec.ops.console import note, progress, stage_header
from owlrec.ops.shard_log import ShardWatch
from owlrec.recipe import Recipe
from owlrec.shards import Card, Stopwatch, finish_stage, finished_stage, forget_stages
from owlrec.storage import fingerprint
from owlrec.store.release import current_release
from owlrec.workspace import Workspace
from pipelines.cohorts import cohorts_folder
from pipelines.session import ray_session
from pipelines.stage import from_stage, main


def run(recipe: Recipe, workspace: Workspace, *, retry_dead: bool = False) -> Card:
    """Does every shard that is not done under this very job; starts no engine where all are.

    retry_dead: asks for the dead rows of finished shards once more, too.
    """
    model = getattr(recipe.engine, "model", recipe.engine.type)
    stage_header("generate", f"{recipe.prompts.framework} prompts, {model}, decoding {recipe.decoding.mode}")
    job = build_job(recipe.domain, recipe.prompts, recipe.sampling, recipe.engine, recipe.decoding, recipe.quality)
    cohorts = cohorts_folder(recipe, workspace)
    shards = plan_shards(workspace) if recipe.prompts.mode != "collective" else []
    if recipe.prompts.mode != "individual":
        shards += plan_prompt_shards(workspace, "cohort", f"{cohorts}/prompts")
    manifests = {m.shard.name: m for m in finished_shards(workspace, job, shards)}
    pending = [s for s in shards if s.name not in manifests]
    dead = [m.shard for m in manifests.values() if m.rows_dead] if retry_dead else []
    watch = Stopwatch()
    if pending or dead:
        forget_stages(workspace, from_stage("generate"))
        job = replace(job, decoding=_with_released_pools(recipe, workspace), cohorts=cohorts)
        rows = {s.name: workspace.count_rows(s.input_file) for s in pending}
        rows |= {s.name: manifests[s.name].rows_dead for s in dead}
        note(f"{len(pending)} of {len(shards)} shards to do; engine log: {workspace.log_path('engine')}")
        if dead:
            note(f"{sum(rows[s.name] for s in dead)} dead rows of {len(dead)} shards to ask for again")
        log, total, hourly = workspace.log_path("shards"), sum(rows.values()), recipe.generate.hourly_cost
        with (
            ray_session(recipe.ray, workspace.log_path("ray")),
            progress("writing knowledge", total, hourly_cost=hourly) as advance,
        ):
            watching = ShardWatch(advance, log, rows, manifests)
            generated = generate(
                workspace, job, recipe.engine, recipe.generate, pending, on_shard=watching, retry_dead=dead
            )
        manifests |= {m.shard.name: m for m in generated.manifests}
        if generated.counters is not None:
            note(f"decoder: {keep_counters(workspace, job, generated.counters).summary}")
    else:
        note(f"all {len(shards)} shards done already, nothing to do")
    check_dead_share(workspace, job, manifests.values(), recipe.generate)
    # Of contents too: asking again for dead rows adds texts under the same job.
    print_ = fingerprint(job.fingerprint, [(s.input_fingerprint, manifests[s.name].sha256) for s in shards])
    before = finished_stage(workspace, "generate", print_)
    if before is not None and not pending and not dead:
        return before
    counts = add_manifests(manifests.values())
    counts.update(shards=len(shards), shards_this_run=len(pending) + len(dead))
    return finish_stage(
        workspace, "generate", print_, counts=counts, outputs={"knowledge": job.folder}, seconds=watch.seconds
    )


def _with_released_pools(recipe: Recipe, workspace: Workspace) -> DecodingConfig:
    """The recipe's decoding, drafting from the current release's pools where it names none itself."""
    decoding, engine, release = recipe.decoding, recipe.engine, current_release(workspace)
    if decoding.mode == "off" or decoding.pools or release is None or not isinstance(engine, VllmEngineConfig):
        return decoding
    pools, why = find_pools(workspace, release, engine.model_identity)
    note(why)
    return decoding.model_copy(update={"pools": pools})


if __name__ == "__main__":
    main(run, __doc__ or "", retry_dead="ask again for the rows that ended as dead letters")
