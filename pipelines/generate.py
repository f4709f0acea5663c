"""Prompts to knowledge: the LLM reads every user's history and every item, shard by shard, on Ray Data."""

import time

from owlrec.generation.batch import build_job, check_dead_share, generate
from owlrec.generation.shards import finished_shard, plan_shards
from owlrec.ops.console import note, progress, stage_header
from owlrec.recipe import Recipe
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
    job = build_job(recipe.domain, recipe.prompts, recipe.sampling, recipe.engine)
    stage_header(
        "generate", f"{recipe.prompts.framework} prompts, {getattr(recipe.engine, 'model', recipe.engine.type)}"
    )
    shards = plan_shards(workspace)
    manifests = [m for s in shards if (m := finished_shard(workspace, job, s)) is not None]
    done = [m.shard for m in manifests]
    pending = [s for s in shards if s not in done]
    watch = Stopwatch()
    if pending:
        forget_stages(workspace, from_stage("generate"))
        note(f"{len(pending)} of {len(shards)} shards to do; engine log: {workspace.log_path('engine')}")
        total = sum(workspace.count_rows(s.table, s.part) for s in pending)
        with ray_session(recipe.ray, workspace.log_path("ray")), progress("writing knowledge", total) as advance:
            manifests += generate(
                workspace,
                job,
                recipe.engine,
                recipe.generate,
                pending,
                on_shard=lambda m: advance(m.rows_in, tokens=m.output_tokens),
            )
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


if __name__ == "__main__":
    main(run, __doc__ or "")
