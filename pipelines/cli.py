"""The `owlrec` command: run a recipe, look knowledge up, move the release pointer, check the machine."""

import time
from pathlib import Path
from typing import Annotated

import typer

from owlrec.errors import OwlRecError, RecipeError, did_you_mean
from owlrec.ops.console import note, stage_header, table
from owlrec.recipe import load_recipe
from owlrec.store.release import current_release, list_releases, open_release, roll_back
from owlrec.workspace import StageManifest, Workspace, finished_stage
from pipelines.stage import STAGES, Stage, from_stage, open_workspace, plain_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

RecipePath = Annotated[Path, typer.Argument(help="the YAML file that describes the run")]
WorkspaceOption = Annotated[str | None, typer.Option("--workspace", help="in place of the recipe's own workspace")]


@app.command()
def run(
    recipe: RecipePath,
    workspace: WorkspaceOption = None,
    first: Annotated[str, typer.Option("--from", help=f"first stage to run: {', '.join(STAGES)}")] = STAGES[0],
    last: Annotated[str, typer.Option("--to", help="last stage to run")] = STAGES[-1],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would run")] = False,
) -> None:
    """Run all stages of a recipe, or those from --from to --to; what is done already is skipped."""
    with plain_errors():
        for name in (first, last):
            if name not in STAGES:
                raise RecipeError(f"there is no stage '{name}'.{did_you_mean(name, STAGES)}")
        chosen = [s for s in from_stage(first) if s not in from_stage(last)[1:]]
        if not chosen:
            raise RecipeError(f"--from {first} comes after --to {last}. The order is {', '.join(STAGES)}.")
        settings = load_recipe(recipe, workspace=workspace)
        if dry_run:
            store = Workspace(settings.workspace)
            rows = [(s, "has run" if finished_stage(store, s) else "would run") for s in chosen]
            table(f"{settings.name} in {settings.workspace}", ["stage", "state"], rows)
            return
        store = open_workspace(settings)
        manifests = [_stage(name)(settings, store) for name in chosen]
        _summary(manifests)


@app.command()
def lookup(
    kind: Annotated[str, typer.Argument(help="user or item")],
    ids: Annotated[list[int], typer.Argument(help="one or more ids")],
    workspace: Annotated[str | None, typer.Option("--workspace", help="the workspace that holds the releases")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="the recipe whose workspace to use")] = None,
    release: Annotated[str | None, typer.Option("--release", help="a release's name; default: the current one")] = None,
) -> None:
    """Print the published knowledge of users or items, and how long the lookup took."""
    with plain_errors():
        if kind not in ("user", "item", "cohort"):
            raise OwlRecError(f"there is no kind '{kind}'.{did_you_mean(kind, ('user', 'item', 'cohort'))}")
        with open_release(_workspace(workspace, recipe), release) as opened:
            start = time.perf_counter()
            found = opened.store.get(kind, ids)
            took_us = (time.perf_counter() - start) * 1e6
            for id_, knowledge in zip(ids, found, strict=True):
                stage_header(
                    f"{kind} {id_}", f"as of {_date(knowledge.as_of)}" if knowledge and knowledge.as_of else ""
                )
                note(knowledge.text if knowledge else "no knowledge: the model uses its learned default")
            note(f"release {opened.manifest.name}: {len(ids)} ids in {took_us:.0f} µs")


@app.command()
def releases(
    workspace: Annotated[str | None, typer.Option("--workspace")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe")] = None,
) -> None:
    """List the releases of a workspace, the current one marked."""
    with plain_errors():
        store = _workspace(workspace, recipe)
        current = current_release(store)
        rows = [
            (
                "*" if m.name == current else "",
                m.name,
                m.model,
                m.encoder,
                sum(m.knowledge.values()),
                sum(m.vectors.values()),
            )
            for m in list_releases(store)
        ]
        table(f"releases of {store.root}", ["", "release", "model", "encoder", "texts", "vectors"], rows)


@app.command()
def rollback(
    workspace: Annotated[str | None, typer.Option("--workspace")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe")] = None,
    to: Annotated[str | None, typer.Option("--to", help="a release's name; default: the one before")] = None,
) -> None:
    """Make an earlier release current again."""
    with plain_errors():
        note(f"release {roll_back(_workspace(workspace, recipe), to)} is current")


@app.command()
def doctor(
    workspace: Annotated[str | None, typer.Option("--workspace", help="also check that it is writable")] = None,
) -> None:
    """Check versions, cores, memory and packaged assets; say how to mend what is missing."""
    from owlrec.ops.doctor import run_checks

    checks = run_checks(workspace)
    table("owlrec doctor", ["check", "state", "found", "to mend"], [(c.name, c.ok, c.found, c.mend) for c in checks])
    if any(c.ok == "fail" for c in checks):
        raise typer.Exit(1)


def _stage(name: str) -> Stage:
    import importlib

    stage: Stage = importlib.import_module(f"pipelines.{name}").run
    return stage


def _workspace(workspace: str | None, recipe: Path | None) -> Workspace:
    if workspace is None and recipe is None:
        raise OwlRecError("say where the releases are: --workspace FOLDER, or --recipe FILE.")
    return Workspace(workspace if workspace is not None else load_recipe(recipe or "").workspace)


def _summary(manifests: list[StageManifest]) -> None:
    rows = [
        (m.stage, m.seconds, ", ".join(f"{k} {v:,}" for k, v in m.counts.items() if isinstance(v, int)))
        for m in manifests
    ]
    table("summary", ["stage", "seconds", "counts"], rows)


def _date(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(milliseconds / 1000))
