"""Prompts to knowledge: the LLM reads every user's history and every item, shard by shard, on Ray Data."""

import time
from dataclasses import replace

from owlrec.decoding import DecodingConfig
from owlrec.decoding.release_pools import find_pools
from owlrec.generation import VllmEngineConfig
from owlrec.generation.batch import build_job, check_dead_share, generate
from owlrec.generation.models import model_identity
from owlrec.generation.shards import finished_shard, keep_counters, plan_shards
from owlrec.ops.console import note, progress, stage_header
from owlrec.recipe import Recipe
from owlrec.store.release import current_release
from owlrec.workspace import (
    StageManifest,
    Stopwatch,
    Workspace,
    fingerprint,
    finish_stage,
    finished_stage,
    forget_stages,
)
from pipelines.session import ray_session
from pipelines.stage import from_stage, main


def run(recipe: Recipe, workspace: Workspace) -> StageManifest:
    """Does every shard that is not done under this very job; starts no engine where all are."""
    model = getattr(recipe.engine, "model", recipe.engine.type)
    stage_header("generate", f"{recipe.prompts.framework} prompts, {model}, decoding {recipe.decoding.mode}")
    job = build_job(recipe.domain, recipe.prompts, recipe.sampling, recipe.engine, recipe.decoding)
    shards = plan_shards(workspace)
    manifests = [m for s in shards if (m := finished_shard(workspace, job, s)) is not None]
    done = [m.shard for m in manifests]
    pending = [s for s in shards if s not in done]
    watch = Stopwatch()
    if pending:
        forget_stages(workspace, from_stage("generate"))
        job = replace(job, decoding=_with_released_pools(recipe, workspace))
        note(f"{len(pending)} of {len(shards)} shards to do; engine log: {workspace.log_path('engine')}")
        total = sum(workspace.count_rows(s.table, s.part) for s in pending)
        with ray_session(recipe.ray, workspace.log_path("ray")), progress("writing knowledge", total) as advance:
            generated = generate(
                workspace,
                job,
                recipe.engine,
                recipe.generate,
                pending,
                on_shard=lambda m: advance(m.rows_in, tokens=m.output_tokens),
            )
        manifests += generated.manifests
        if generated.counters is not None:
            note(f"decoder: {keep_counters(workspace, job, generated.counters).summary}")
    else:
        note(f"all {len(shards)} shards done already, nothing to do")
    check_dead_share(workspace, job, manifests, recipe.generate)
    counts = {
        f"{kind}_{name}": sum(getattr(m, name) for m in manifests if m.shard.kind == kind)
        for kind in ("user", "item")
        for name in ("rows_out", "rows_dead", "prompt_tokens", "output_tokens")
    }
    print_ = fingerprint(job.fingerprint, [s.input_fingerprint for s in shards])
    before = finished_stage(workspace, "generate", print_)
    if before is not None and not pending:
        return before
    manifest = StageManifest(
        stage="generate",
        fingerprint=print_,
        seconds=round(watch.seconds, 3),
        finished=time.time(),
        counts={**counts, "shards": len(shards), "shards_this_run": len(pending)},
        outputs={"knowledge": job.folder},
    )
    finish_stage(workspace, manifest)
    return manifest


def _with_released_pools(recipe: Recipe, workspace: Workspace) -> DecodingConfig:
    """The recipe's decoding, drafting from the current release's pools where it names none itself."""
    decoding, engine, release = recipe.decoding, recipe.engine, current_release(workspace)
    if decoding.mode == "off" or decoding.pools or release is None or not isinstance(engine, VllmEngineConfig):
        return decoding
    pools, why = find_pools(workspace, release, model_identity(engine.model, engine.revision))
    note(why)
    return decoding.model_copy(update={"pools": pools})


if __name__ == "__main__":
    main(run, __doc__ or "")
