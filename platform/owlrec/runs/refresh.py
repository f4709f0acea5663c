"""Updates the behaviors of users with new events, and the texts of changed users and items, in a
delta release on top of the current one, with few and short calls.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from owlrec.encoding.stage import EncodingJob
from owlrec.generation.job import build_job, check_dead_share
from owlrec.generation.worker import GenerateStage
from owlrec.ops.console import ShardWatch, note, progress, stage_header
from owlrec.ops.watching import StopSignals
from owlrec.recipe import Recipe
from owlrec.refresh.apply import (
    Delta,
    Renewed,
    interrupted_plan,
    job_of_plan,
    published_delta,
    settle,
    tidy,
    too_many_dead,
    with_latest_pools,
)
from owlrec.refresh.plan import Moved, RefreshPlanner
from owlrec.refresh.state import CLAIM, RefreshPlan, RefreshPrompts, State, read_state, sweep, write_state
from owlrec.releases.build import PART_IDS
from owlrec.releases.release import pointer as release_pointer
from owlrec.runner import Pool, Stage, pending_shards, run_stage
from owlrec.runs.batch import PARTS_ON_RAY, write_texts
from owlrec.runs.stage import ray_session
from owlrec.shards import Card, Shard, claimed
from owlrec.workspace import Workspace, shards_for

HERE_ROWS = 300_000  # up to this many users or events in this process, in about ten seconds


def run(
    recipe: Recipe, workspace: Workspace, *, now: int | None = None, signals: StopSignals | None = None
) -> list[State]:
    """Finishes an interrupted refresh, then reads the log's new events; yields the state after each.

    now: ms since 1970, for tests. signals: requests to stop; Stopped is then raised between two steps.
    Raises WorkspaceError if another refresh of the workspace is running.
    """
    stage_header("refresh", f"model {getattr(recipe.engine, 'model', recipe.engine.type)}")
    with claimed(workspace, CLAIM, "refresh"):
        refresh, done = Refresh(recipe, workspace, signals or StopSignals()), list[State]()
        base = read_state(workspace)
        if (plan := interrupted_plan(workspace, base.name, refresh.planner.recipe)) is not None:
            note("finishing the plan of an interrupted refresh first")
            done.append(refresh.carry_out(plan, base))
            base = done[-1]
        plan = refresh.planner.read_log(base, round(time.time() * 1000) if now is None else now)
        if plan is None:
            note("no new events")
            return done
        refresh.signals.check()
        return [*done, refresh.carry_out(plan, base)]


@dataclass
class Refresh:
    """Refreshes of a workspace with a recipe."""

    recipe: Recipe
    workspace: Workspace
    signals: StopSignals

    @property
    def planner(self) -> RefreshPlanner:
        """Planner of the refreshes."""
        recipe = self.recipe
        tokens = recipe.prompts.history_tokens, recipe.sampling.max_tokens
        prompts = RefreshPrompts(recipe.domain, recipe.engine, *tokens)
        framework = recipe.prompts.framework
        return RefreshPlanner(self.workspace, recipe.streaming, prompts, framework, recipe.encoder, self.run_stage)

    def carry_out(self, plan: RefreshPlan, base: State) -> State:
        """Reads items, updates users, generates, publishes and settles. Finished steps find their cards."""
        recipe, workspace = self.recipe, self.workspace
        moved = self.planner.move_on(plan, base)
        note(", ".join(f"{name} {n:,}" for name, n in moved.state.counts.items() if n))
        self.signals.check()
        renewed = Renewed(plan.parent)
        if moved.prompts or moved.behaviors:
            renewed = published_delta(workspace, plan) or self._renew(moved)
        state = settle(moved, renewed, recipe.encoder, self.run_stage)
        write_state(workspace, state, plan.base)
        sweep(workspace, state)
        users, items = state.counts["renewed"], state.counts["items_renewed"]
        failed = state.calls + state.item_calls - users - items
        note(f"texts for {users:,} user partitions and {items:,} items; {failed:,} answers failed")
        note(f"current: {renewed.release}")
        if said := tidy(workspace):
            note(said)
        return state

    def run_stage(self, stage: Stage, inputs: Mapping[Shard, str], rows: int, about: str) -> dict[str, Card]:
        """Runs a stage, in this process if it has few rows. See plan.RunStage."""
        pending, done = pending_shards(self.workspace, stage.folder, inputs)
        if not pending:
            return done
        pool = Pool(here=rows <= HERE_ROWS, max_workers=1 << 10, log_path=str(self.workspace.log_path("refresh")))
        shown = nullcontext(None) if pool.here else progress(about, len(pending), "shards")
        with self._session(pool.here), shown as advance:
            self.signals.arm()
            on_card = (lambda card: advance(1)) if advance else None
            return run_stage(self.workspace, stage, inputs, pool, on_card, done=done)

    def encode(self, job: EncodingJob) -> dict[str, Card]:
        """Runs the encoder in the recipe's place."""
        pool = job.pool(str(self.workspace.log_path("encode")))
        with self._session(pool.here or not job.pending()), progress("encoding", None, "texts") as advance:
            return job.run(pool, lambda card: advance(int(card.counts["encoded"])))

    def _session(self, here: bool) -> AbstractContextManager[None]:
        return nullcontext() if here else ray_session(self.recipe.ray, self.workspace.log_path("ray"))

    def _renew(self, moved: Moved) -> Renewed:
        """Generates, and publishes answers and behaviors."""
        recipe, plan = self.recipe, moved.plan
        release_pointer(self.workspace).refuse_hold()  # before paying for answers
        job = build_job(recipe.domain, recipe.prompts, recipe.sampling, recipe.engine, recipe.decoding, recipe.quality)
        job = job_of_plan(job, plan)
        texts = self._ask(moved, GenerateStage(job, recipe.engine, "refresh")) if moved.prompts else {}
        self.signals.check()
        if not moved.behaviors and not any(card.rows_out for card in texts.values()):
            return Renewed(plan.parent, job.folder)
        delta = Delta(
            self.workspace,
            moved,
            job,
            texts,
            recipe.engine,
            recipe.encoder,
            recipe.streaming.partitions,
            self.encode,
        )
        state = moved.state
        n_parts = shards_for(max(state.calls + state.item_calls, state.counts["users_with_news"]), PART_IDS)
        pool = Pool(here=n_parts < PARTS_ON_RAY, max_workers=n_parts)
        with self._session(pool.here):
            return delta.publish(n_parts, pool)

    def _ask(self, moved: Moved, stage: GenerateStage) -> Mapping[str, Card]:
        """Generates answers for the plan's prompts that are still pending."""
        recipe, workspace, job, config = self.recipe, self.workspace, stage.job, self.recipe.generate
        inputs = {shard: file.sha256 for shard, file in moved.prompts.items()}
        pending, done = pending_shards(workspace, job.folder, inputs)
        failed = too_many_dead(done.values(), config)
        again = [s for s in inputs if failed and s.name in done and done[s.name].rows_dead]
        cards: Mapping[str, Card] = done
        if pending or again:
            rows = {s.name: workspace.count_rows(job.input_file(s)) for s in pending}
            rows |= {s.name: done[s.name].rows_dead for s in again}
            drafting = replace(job, decoding=with_latest_pools(workspace, recipe.engine, recipe.decoding))
            stage = GenerateStage(drafting, recipe.engine, stage.name)
            with progress("renewing", sum(rows.values())) as advance:
                watch = ShardWatch(advance, workspace.log_path("shards"), rows)
                self.signals.arm()
                cards = write_texts(recipe, workspace, stage, inputs, rows, watch, done=done, again=again)
        if too_many_dead(cards.values(), config):
            check_dead_share(job.artifact(workspace), cards.values(), config)
        return cards
