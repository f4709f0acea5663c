"""`owlrec forget`: users who asked to be forgotten, out of lookups at once and then out of every place."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from owlrec.erasure.forgetting import Report
from owlrec.erasure.forgetting import forget as erase
from owlrec.errors import SourceError
from owlrec.ops.console import note, progress, stage_header, table
from owlrec.recipe import RayConfig
from owlrec.releases.redis import RedisReleases
from owlrec.runner import Pool
from owlrec.shards import finished_stage
from owlrec.workspace import Workspace
from pipelines.prepare import HERE_ROWS
from pipelines.serving import RecipeOption, WorkspaceOption, releases_workspace
from pipelines.session import ray_session
from pipelines.stage import plain_errors


def forget(
    users: Annotated[list[str] | None, typer.Argument(help="raw ids of users")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="a text file with one raw id a line")] = None,
    workspace: WorkspaceOption = None,
    recipe: RecipeOption = None,
    redis: Annotated[str | None, typer.Option("--redis", help="redis://… that releases were pushed to")] = None,
    drop_models: Annotated[
        bool, typer.Option("--drop-models", help="also delete what was trained on rows of these users")
    ] = False,
) -> None:
    """Forget users: no lookup or stage knows them from now on, and their rows are erased in every place.

    Run it while no stage is running; if it is interrupted, run it again with the same users.
    """
    with plain_errors():
        ids = [*(users or []), *(_read_ids(file) if file else [])]
        if not ids:
            raise SourceError("forget: no users are named. Give raw ids, or --file with one per line.")
        store = releases_workspace(workspace, recipe)
        report = run(store, ids, redis=RedisReleases(redis, timeout_s=60.0) if redis else None, drop_models=drop_models)
        rows = [(p.place, p.done, p.files, p.rows, p.bytes, p.again) for p in report.places]
        table("erased", ["place", "what", "files", "rows", "bytes", "made again by"], rows)
        note(f"{report.users:,} users forgotten, of whom {report.unknown:,} were not known anywhere")
        if report.models:
            note(f"trained on their rows{', and deleted' if drop_models else ''}: {', '.join(report.models)}")
        note(report.note)


def run(
    workspace: Workspace, raw_ids: list[str], *, redis: RedisReleases | None = None, drop_models: bool = False
) -> Report:
    """Forgets users, on the Ray cluster that a run would use where the tables are large. See owlrec.erasure.forget."""
    stage_header("forget", f"{len(raw_ids):,} users")
    prepared = finished_stage(workspace, "prepare")
    here = prepared is None or int(prepared.counts.get("interactions", 0)) <= HERE_ROWS
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


def _read_ids(file: Path) -> list[str]:
    try:
        lines = file.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file}: cannot be read ({error}). Give a UTF-8 text file with one raw id per line."
        ) from None
    return [line for line in lines if line]
