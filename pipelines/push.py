"""`owlrec push`: releases of a workspace to Redis or Valkey, for clusters without a shared disk."""

from typing import Annotated

import typer

from owlrec.ops.console import note, progress
from pipelines.serving import RecipeOption, WorkspaceOption, releases_workspace
from pipelines.stage import plain_errors


def push(
    redis: Annotated[str, typer.Argument(help="redis://host:port/db of a Redis or Valkey")],
    workspace: WorkspaceOption = None,
    recipe: RecipeOption = None,
    release: Annotated[str | None, typer.Option("--release", help="default: the workspace's current one")] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="releases that stay in Redis")] = 3,
    replace: Annotated[bool, typer.Option("--replace", help="write again what is there already")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="only go back to what was current in Redis before")
    ] = False,
) -> None:
    """Copy a release to Redis and make it current there; what Redis holds already is not written again."""
    from owlrec.releases.redis import RedisReleases, roll_back_redis
    from owlrec.releases.redis import push as push_release

    with plain_errors():
        releases = RedisReleases(redis, timeout_s=60.0)
        if rollback:
            note(f"release {roll_back_redis(releases, release)} is current in Redis")
            return
        store = releases_workspace(workspace, recipe)
        with progress("pushing", None) as advance:
            name = push_release(store, releases, release, keep=keep, replace=replace, on_rows=advance)
        note(f"release {name} is current in Redis")
