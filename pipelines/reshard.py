"""Twice as many shards, for a population that outgrew those it was first prepared with."""

from collections.abc import Sequence

from owlrec.ops.console import progress, stage_header
from owlrec.recipe import Recipe
from owlrec.reshard import reshard
from owlrec.runner import Pool
from owlrec.schema import Kind
from owlrec.shards import needed_stage
from owlrec.workspace import Workspace
from pipelines.prepare import HERE_ROWS
from pipelines.session import ray_session


def run(recipe: Recipe, workspace: Workspace, kinds: Sequence[Kind] = ()) -> dict[Kind, int]:
    """Doubles the numbers of shards of some kinds (default: all); the new numbers. Errors: see owlrec.reshard."""
    stage_header("reshard", "twice as many shards")
    rows = int(needed_stage(workspace, "prepare", "the tables are not prepared").counts.get("interactions", 0))
    with progress("splitting shards", None) as advance:

        def doubled(pool: Pool) -> dict[Kind, int]:
            return reshard(workspace, kinds, pool, lambda card: advance(card.rows_in))

        if rows <= HERE_ROWS:
            return doubled(Pool())
        with ray_session(recipe.ray, workspace.log_path("ray")):
            return doubled(Pool(here=False, max_workers=1 << 10, log_path=str(workspace.log_path("reshard"))))
