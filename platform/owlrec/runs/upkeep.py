"""Upkeep of a workspace: doubling the shards for a larger population, and forgetting users."""

from collections.abc import Sequence
from contextlib import nullcontext

from owlrec.erasure.forget import Report
from owlrec.erasure.forget import forget as erase
from owlrec.errors import WorkspaceError
from owlrec.ids import Kind
from owlrec.ops.console import progress, stage_header
from owlrec.recipe import Recipe
from owlrec.refresh.state import CLAIM, REFRESH_FOLDER, read_state, unfinished_plans
from owlrec.releases.redis import RedisReleases
from owlrec.reshard import reshard as split_shards
from owlrec.runner import Pool
from owlrec.runs.batch import PREPARED_HERE
from owlrec.runs.stage import ray_session
from owlrec.shards import claimed, finished_stage, needed_stage
from owlrec.workspace import Workspace


def reshard(recipe: Recipe, workspace: Workspace, kinds: Sequence[Kind] = ()) -> dict[Kind, int]:
    """Doubles the numbers of shards of some kinds (default: all); returns the new numbers.

    Errors: see owlrec.reshard. Also raises WorkspaceError if a refresh is running or was interrupted, because its
    answers are in the shards of its plan.
    """
    stage_header("reshard", "doubling the shards")
    rows = int(needed_stage(workspace, "prepare", "there are no prepared tables").counts.get("interactions", 0))
    with claimed(workspace, CLAIM, "refresh"), progress("splitting shards", None) as advance:
        if unfinished_plans(workspace, read_state(workspace).name):
            raise WorkspaceError(
                f"{workspace.path(REFRESH_FOLDER)}: a refresh was interrupted. Run `owlrec refresh` first."
            )

        def resharded(pool: Pool) -> dict[Kind, int]:
            return split_shards(workspace, kinds, pool, lambda card: advance(card.rows_in))

        if rows <= PREPARED_HERE:
            return resharded(Pool())
        with ray_session(recipe.ray, workspace.log_path("ray")):
            return resharded(Pool(here=False, max_workers=1 << 10, log_path=str(workspace.log_path("reshard"))))


def forget(
    workspace: Workspace, raw_ids: list[str], *, redis: RedisReleases | None = None, drop_models: bool = False
) -> Report:
    """Forgets users, on the run's Ray cluster if the tables are large. See owlrec.erasure.forget."""
    stage_header("forget", f"{len(raw_ids):,} users")
    prepared = finished_stage(workspace, "prepare")
    here = prepared is None or int(prepared.counts.get("interactions", 0)) <= PREPARED_HERE
    log = workspace.log_path("forget")
    pool = Pool() if here else Pool(here=False, max_workers=1 << 10, log_path=str(log))
    session = nullcontext() if here else ray_session("local", log)
    with session, progress("erasing rows", None, "rows") as advance:
        return erase(
            workspace,
            raw_ids,
            redis=redis,
            drop_models=drop_models,
            pool=pool,
            on_card=lambda card: advance(card.rows_in),
        )
