"""Prompts to knowledge: the LLM reads users' histories and items, or cohorts of them, shard by shard."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from owlrec.decoding import DecodingConfig
from owlrec.decoding.release_pools import find_pools
from owlrec.generation import EngineConfig, VllmEngineConfig
from owlrec.generation.job import (
    SHARDS_IN_FLIGHT,
    GenerateConfig,
    add_cards,
    build_job,
    check_dead_share,
    decoder_counters,
    prompt_inputs,
    table_inputs,
)
from owlrec.generation.worker import GenerateStage
from owlrec.ops.console import ShardWatch, note, progress, stage_header
from owlrec.recipe import Recipe
from owlrec.releases.release import current_release
from owlrec.runner import Pool, Stage, pending_shards, run_stage
from owlrec.shards import Card, Shard, Stopwatch, finish_stage, finished_stage, forget_stages
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace
from pipelines.cohorts import cohorts_folder
from pipelines.session import ray_session
from pipelines.stage import from_stage, main

_HERE_ROWS = 20_000  # an engine without a model answers so many before Ray would have started


def run(recipe: Recipe, workspace: Workspace, *, retry_dead: bool = False) -> Card:
    """Does every shard that is not done under this very job; starts no engine where all are.

    retry_dead: asks for the dead rows of finished shards once more, too.
    """
    model = getattr(recipe.engine, "model", recipe.engine.type)
    stage_header("generate", f"{recipe.prompts.framework} prompts, {model}, decoding {recipe.decoding.mode}")
    cohorts = cohorts_folder(recipe, workspace)
    job = build_job(
        recipe.domain,
        recipe.prompts,
        recipe.sampling,
        recipe.engine,
        recipe.decoding,
        recipe.quality,
        ready={"cohort": f"{cohorts}/prompts"} if recipe.prompts.mode != "individual" else {},
        cohorts=cohorts,
    )
    inputs = table_inputs(workspace) if recipe.prompts.mode != "collective" else {}
    for kind, folder in job.ready.items():
        inputs |= prompt_inputs(workspace, "cohort", folder) if kind == "cohort" else {}
    pending, done = pending_shards(workspace, job.folder, inputs)
    dead = [shard for shard in inputs if retry_dead and shard.name in done and done[shard.name].rows_dead]
    watch, cards = Stopwatch(), done
    if pending or dead:
        forget_stages(workspace, from_stage("generate"))
        job = replace(job, decoding=_with_released_pools(recipe, workspace))
        rows = {s.name: job.count_prompts(workspace, s) for s in pending}
        rows |= {s.name: done[s.name].rows_dead for s in dead}
        note(f"{len(pending)} of {len(inputs)} shards to do; engine log: {workspace.log_path('engine')}")
        if dead:
            note(f"{sum(rows[s.name] for s in dead)} dead rows of {len(dead)} shards to ask for again")
        with progress("writing knowledge", sum(rows.values()), hourly_cost=recipe.generate.hourly_cost) as advance:
            on_card = ShardWatch(advance, workspace.log_path("shards"), rows)
            stage = GenerateStage(job, recipe.engine)
            cards = write_texts(recipe, workspace, stage, inputs, rows, on_card, done=done, again=dead)
        if counters := decoder_counters(c for name, c in cards.items() if name in rows):
            note(f"decoder: {counters.summary}")
    else:
        note(f"all {len(inputs)} shards done already, nothing to do")
    check_dead_share(job.artifact(workspace), cards.values(), recipe.generate)
    # Of contents too: asking again for dead rows adds texts under the same job.
    texts = [(shard.name, cards[shard.name].files[shard.file()].sha256) for shard in inputs]
    named = fingerprint(job.fingerprint, texts)
    before = finished_stage(workspace, "generate", named)
    if before is not None and not pending and not dead:
        return before
    counts = add_cards(cards.values()) | {"shards": len(inputs), "shards_this_run": len(pending) + len(dead)}
    return finish_stage(
        workspace, "generate", named, counts=counts, outputs={"knowledge": job.folder}, seconds=watch.seconds
    )


def write_texts(
    recipe: Recipe,
    workspace: Workspace,
    stage: Stage,
    inputs: Mapping[Shard, str],
    rows: Mapping[str, int],
    on_card: Callable[[Card], None],
    *,
    done: Mapping[str, Card],
    again: Collection[Shard] = (),
    engine: EngineConfig | None = None,
) -> dict[str, Card]:
    """Runs a stage that asks an engine on its replicas (`generate:` in the recipe), in this process where that takes
    seconds.

    rows: of the shards to do, by their names. engine: default: the recipe's.
    """
    config, engine = recipe.generate, engine or recipe.engine
    light = not isinstance(engine, VllmEngineConfig) and config.most_replicas == 1
    pool = Pool(
        here=light and sum(rows.values()) <= _HERE_ROWS,
        min_workers=config.min_replicas,
        max_workers=config.most_replicas,
        cpus=engine_cpus(engine, config),
        gpus=config.engine_gpus,
        in_flight=SHARDS_IN_FLIGHT,
        price_per_hour=config.price_per_replica_hour,
        log_path=str(workspace.log_path("engine")),
    )
    if pool.here:
        return run_stage(workspace, stage, inputs, pool, on_card, done=done, again=again)
    with ray_session(recipe.ray, workspace.log_path("ray")):
        return run_stage(workspace, stage, inputs, pool, on_card, done=done, again=again)


def engine_cpus(engine: EngineConfig, config: GenerateConfig) -> float:
    """Logical CPUs of one replica."""
    if config.engine_cpus is not None:
        return config.engine_cpus
    if isinstance(engine, VllmEngineConfig) and not config.engine_gpus:
        return float(engine.threads or os.cpu_count() or 1)
    return 1.0


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
