"""Upkeep of a workspace: twice as many shards for a population that outgrew them, users who asked to be forgotten."""

from collections.abc import Sequence
from contextlib import nullcontext

from owlrec.erasure.forgetting import Report
from owlrec.erasure.forgetting import forget as erase
from owlrec.errors import WorkspaceError
from owlrec.ids import Kind
from owlrec.ops.console import progress, stage_header
from owlrec.recipe import RayConfig, Recipe
from owlrec.refresh.state import CLAIM, REFRESH_FOLDER, read_state, unfinished_plans
from owlrec.releases.redis import RedisReleases
from owlrec.reshard import reshard as split_shards
from owlrec.runner import Pool
from owlrec.runs.batch import PREPARED_HERE
from owlrec.runs.stage import ray_session
from owlrec.shards import claimed, finished_stage, needed_stage
from owlrec.workspace import Workspace


def reshard(recipe: Recipe, workspace: Workspace, kinds: Sequence[Kind] = ()) -> dict[Kind, int]:
    """Doubles the numbers of shards of some kinds (default: all); the new numbers.

    Errors: see owlrec.reshard. Raises WorkspaceError where a refresh is running or was interrupted, too: its answers
    lie in the shards that it was planned with.
    """
    stage_header("reshard", "twice as many shards")
    rows = int(needed_stage(workspace, "prepare", "the tables are not prepared").counts.get("interactions", 0))
    with claimed(workspace, CLAIM, "refresh"), progress("splitting shards", None) as advance:
        if unfinished_plans(workspace, read_state(workspace).name):
            raise WorkspaceError(
                f"{workspace.path(REFRESH_FOLDER)}: a refresh was interrupted. Run `owlrec refresh` first."
            )

        def doubled(pool: Pool) -> dict[Kind, int]:
            return split_shards(workspace, kinds, pool, lambda card: advance(card.rows_in))

        if rows <= PREPARED_HERE:
            return doubled(Pool())
        with ray_session(recipe.ray, workspace.log_path("ray")):
            return doubled(Pool(here=False, max_workers=1 << 10, log_path=str(workspace.log_path("reshard"))))


def forget(
    workspace: Workspace, raw_ids: list[str], *, redis: RedisReleases | None = None, drop_models: bool = False
) -> Report:
    """Forgets users, on the Ray cluster that a run would use where the tables are large. See owlrec.erasure.forget."""
    stage_header("forget", f"{len(raw_ids):,} users")
    prepared = finished_stage(workspace, "prepare")
    here = prepared is None or int(prepared.counts.get("interactions", 0)) <= PREPARED_HERE
    log = workspace.log_path("forget")
    pool = Pool() if here else Pool(here=False, max_workers=1 << 10, log_path=str(log))
    session = nullcontext() if here else ray_session(RayConfig(), log)
    with session, progress("erasing rows", None, "rows") as advance:
        return erase(
            workspace,
            raw_ids,
            redis=redis,
            drop_models=drop_models,
            pool=pool,
            on_card=lambda card: advance(card.rows_in),
        )
