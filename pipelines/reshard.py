"""Twice as many shards, for a population that outgrew those it was first prepared with."""

from collections.abc import Sequence

from owlrec.errors import WorkspaceError
from owlrec.ops.console import progress, stage_header
from owlrec.recipe import Recipe
from owlrec.refresh.state import CLAIM, REFRESH_FOLDER, read_state, unfinished_plans
from owlrec.reshard import reshard
from owlrec.runner import Pool
from owlrec.schema import Kind
from owlrec.shards import claimed, needed_stage
from owlrec.workspace import Workspace
from pipelines.prepare import HERE_ROWS
from pipelines.session import ray_session


def run(recipe: Recipe, workspace: Workspace, kinds: Sequence[Kind] = ()) -> dict[Kind, int]:
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
            return reshard(workspace, kinds, pool, lambda card: advance(card.rows_in))

        if rows <= HERE_ROWS:
            return doubled(Pool())
        with ray_session(recipe.ray, workspace.log_path("ray")):
            return doubled(Pool(here=False, max_workers=1 << 10, log_path=str(workspace.log_path("reshard"))))
