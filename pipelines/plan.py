"""What knowledge would take before it is paid for: time, GPU-hours, cost and storage, from a small run's figures."""

import json
from pathlib import Path
from typing import Annotated

import typer

from owlrec.errors import RecipeError, WorkspaceError, did_you_mean
from owlrec.generation.job import SHARDS_IN_FLIGHT
from owlrec.ops import cost as plan_report
from owlrec.ops.console import note, stage_header
from owlrec.ops.cost import POLICIES, Horizon, Work, load_fleet, measured_workload
from owlrec.recipe import Recipe, load_recipe
from owlrec.workspace import Workspace
from pipelines.stage import plain_errors

_Recipe = Annotated[Path | None, typer.Argument(help="the YAML file of the run that was measured")]
_RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="the same, by name")]
_Workspace = Annotated[str | None, typer.Option("--workspace", help="in place of the recipe's own workspace")]
_Fleet = Annotated[str, typer.Option("--fleet", help="the machines to plan for, as in cluster/fleet-example.yaml")]
_Share = Annotated[float | None, typer.Option("--acting-share", min=0, max=1, help="of users, between two refreshes")]


def plan(
    recipe: _Recipe = None,
    fleet: _Fleet = "",
    named: _RecipeOption = None,
    workspace: _Workspace = None,
    users: Annotated[str, typer.Option("--users", help="how many, such as 1e8")] = "0",
    items: Annotated[str, typer.Option("--items", help="how many, such as 1e7")] = "0",
    policy: Annotated[str, typer.Option("--policy", help=", ".join(POLICIES))] = POLICIES[0],
    refreshes: Annotated[int, typer.Option("--refreshes", min=0, help="after the first full run")] = 0,
    acting_share: _Share = None,
    cohorts: Annotated[str, typer.Option("--cohorts", help="default: in proportion, as measured")] = "0",
    renewed_share: Annotated[float, typer.Option(min=0, max=1, help="of cohorts, asked again at a refresh")] = 1.0,
    json_file: Annotated[str | None, typer.Option("--json", help="a file that every figure is written to")] = None,
    plot: Annotated[str | None, typer.Option("--plot", help="an .svg file: what saves what, as a waterfall")] = None,
) -> None:
    """Estimate GPU-hours, time, storage and cost of a large batch from the figures of a small run."""
    from owlrec.ops.report import hardware_line

    with plain_errors():
        if (file := recipe or named) is None or not fleet:
            raise RecipeError("name the recipe of the measured run, and the machines (--fleet FILE).")
        if (chosen := next((p for p in POLICIES if p == policy), None)) is None:
            raise RecipeError(f"there is no policy '{policy}'.{did_you_mean(policy, POLICIES)}")
        counts = {"users": row_count(users), "items": row_count(items), "cohorts": row_count(cohorts) or None}
        shares = {"acting_share": acting_share, "renewed_share": renewed_share}
        horizon = Horizon.model_validate({**counts, **shares, "refreshes": refreshes})
        settings = load_recipe(file, workspace=workspace)
        store, machines, work = Workspace(settings.workspace), load_fleet(fleet), _work(settings)
        workload = measured_workload(store)
        stage_header("plan", f"estimates, extrapolated from {workload.measured} in {store.path(workload.run)}")
        note(f"if this machine made it: {hardware_line()}")
        report = plan_report.report(workload, machines, horizon, chosen, work)
        _write(json_file, json.dumps(report.figures, indent=1))
        _write(plot, report.waterfall)


def _work(recipe: Recipe) -> Work:
    decoding = recipe.decoding
    batch = getattr(recipe.engine, "max_num_seqs", getattr(recipe.engine, "concurrency", 1))
    at_once = max(1, min(SHARDS_IN_FLIGHT, round(batch / recipe.shard_rows)))
    return Work(recipe.shard_rows, at_once, 0 if decoding.mode == "off" else decoding.pool_tokens)


def row_count(text: str) -> int:
    """A whole number of rows from 1e8, 100000000 or 100_000_000. Raises RecipeError where it is none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0 or not value.is_integer():
        raise RecipeError(f"'{text}' is no number of rows. Write a whole number of 0 or more, such as 1e8.")
    return int(value)


def _write(file: str | None, text: str) -> None:
    if file:
        try:
            Path(file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise WorkspaceError(f"{file}: cannot be written ({error.strerror}). Name another file.") from None


def main() -> None:
    """The command line of `python -m pipelines.plan`."""
    typer.run(plan)


if __name__ == "__main__":
    main()
