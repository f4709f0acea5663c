"""Renews the texts of users who have moved on: a delta release on top of the current one, for few and short calls."""

import time
from dataclasses import replace

from owlrec.generation import token_counter
from owlrec.generation.job import GenerationJob, build_job, check_dead_share, prompt_inputs, read_knowledge
from owlrec.generation.worker import GenerateStage
from owlrec.ops.console import note, progress, stage_header
from owlrec.ops.shard_log import ShardWatch
from owlrec.ops.watching import StopSignals, repeat
from owlrec.recipe import Recipe, load_recipe
from owlrec.runner import pending_shards
from owlrec.streaming.asking import job_of_plan, too_many_dead, with_latest_pools
from owlrec.streaming.journal import Plan, pending_plan
from owlrec.streaming.planning import make_plan
from owlrec.streaming.settling import finish, publish_delta
from owlrec.streaming.tidying import tidy
from owlrec.workspace import Workspace
from pipelines.generate import write_texts
from pipelines.stage import open_workspace, plain_errors, recipe_parser


def run(
    recipe: Recipe, workspace: Workspace, *, now: int | None = None, signals: StopSignals | None = None
) -> list[Plan]:
    """Finishes what an interrupted refresh left, then takes in the log's new events; gives the plans carried out.

    now: ms since 1970, for tests. signals: where a wish to stop arrives; Stopped is then raised between two steps.
    """
    signals, done = signals or StopSignals(), list[Plan]()
    stage_header("refresh", f"model {getattr(recipe.engine, 'model', recipe.engine.type)}")
    if (plan := pending_plan(workspace)) is not None:
        note("an interrupted refresh left its plan: that one first")
        done.append(_carry_out(recipe, workspace, plan, signals))
    plan = make_plan(
        workspace,
        recipe.streaming,
        recipe.domain,
        encoder=recipe.encoder.model,
        shard_rows=recipe.shard_rows,
        now=round(time.time() * 1000) if now is None else now,
        count_tokens=lambda: token_counter(recipe.engine),
    )
    if plan is None:
        note("no new events, nothing to do")
        return done
    note(", ".join(f"{name} {n:,}" for name, n in plan.counts.items() if n))
    signals.check()
    return [*done, _carry_out(recipe, workspace, plan, signals)]


def _carry_out(recipe: Recipe, workspace: Workspace, plan: Plan, signals: StopSignals) -> Plan:
    """Asks, publishes the answers, and ends the plan."""
    release, answered = plan.parent, set[int]()
    if plan.calls:
        job = build_job(recipe.domain, recipe.prompts, recipe.sampling, recipe.engine, recipe.decoding, recipe.quality)
        job = job_of_plan(job, plan)
        _ask(recipe, workspace, plan, job, signals)
        signals.check()
        knowledge = read_knowledge(workspace, job.folder, "user")
        answered = set(knowledge["id"].to_pylist())
        if answered:
            keep = recipe.streaming.partitions
            release = publish_delta(
                workspace, plan, knowledge, job, engine=recipe.engine, encoder=recipe.encoder, partitions=keep
            )
    finish(workspace, plan, release, answered)
    note(f"{len(answered):,} texts renewed, {plan.calls - len(answered):,} answers failed; in force: {release}")
    if said := tidy(workspace, recipe.streaming):
        note(said)
    return plan


def _ask(recipe: Recipe, workspace: Workspace, plan: Plan, job: GenerationJob, signals: StopSignals) -> None:
    """Generates answers for the plan's prompts that are still pending."""
    inputs, config = prompt_inputs(workspace, "user", plan.prompts), recipe.generate
    pending, done = pending_shards(workspace, job.folder, inputs)
    failed = too_many_dead(done.values(), config)
    again = [s for s in inputs if failed and s.name in done and done[s.name].rows_dead]
    cards = done
    if pending or again:
        rows = {s.name: workspace.count_rows(job.input_file(s)) for s in pending}
        rows |= {s.name: done[s.name].rows_dead for s in again}
        drafting = replace(job, decoding=with_latest_pools(workspace, recipe.engine, recipe.decoding))
        stage = GenerateStage(drafting, recipe.engine, "refresh")
        with progress("renewing", sum(rows.values())) as advance:
            watch = ShardWatch(advance, workspace.log_path("shards"), rows)
            signals.arm()
            cards = write_texts(recipe, workspace, stage, inputs, rows, watch, done=done, again=again)
    if too_many_dead(cards.values(), config):
        check_dead_share(job.artifact(workspace), cards.values(), config)


if __name__ == "__main__":
    parser = recipe_parser("pipelines.refresh", __doc__ or "")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="refresh again and again, so long apart")
    arguments = parser.parse_args()
    with plain_errors():
        settings = load_recipe(arguments.recipe, workspace=arguments.workspace, max_replicas=arguments.max_replicas)
        repeat(lambda signals: run(settings, open_workspace(settings), signals=signals), arguments.watch)
