"""What a batch would take before it is paid for: time, GPU-hours, cost and storage, from a small run's figures."""

import argparse
import json
from pathlib import Path

from owlrec.errors import RecipeError, WorkspaceError
from owlrec.generation.shard_plan import consecutive_ids, shard_sizes
from owlrec.ops import planning
from owlrec.ops.console import note, stage_header, table, warn
from owlrec.ops.run_report import hardware_line
from owlrec.ops.workload import WorkloadFigures, measured_workload
from owlrec.recipe import Recipe, load_recipe
from owlrec.workspace import Stopwatch, Workspace
from pipelines.stage import plain_errors


def run(recipe: Recipe, workspace: Workspace, fleet: str, users: str, items: str, json_file: str | None) -> None:
    """Prints the plan. users, items: row counts as typed, such as 1e8. json_file: where to write every figure."""
    machines, rows = planning.load_fleet(fleet), {"users": row_count(users), "items": row_count(items)}
    job, decoding = recipe.generate, recipe.decoding
    workload = measured_workload(workspace, engines=job.most_replicas, in_flight=job.shards_in_flight)
    sizes = {"shard_rows": recipe.shard_rows, "in_flight": job.shards_in_flight}
    pool_tokens = 0 if decoding.mode == "off" else decoding.pool_tokens
    planned = planning.plan(workload, machines, **rows, **sizes, pool_tokens=pool_tokens)
    stage_header("plan", f"estimates, extrapolated from {workload.measured} in {workspace.path(workload.run)}")
    note(f"if this machine made it: {hardware_line()}")
    _print(planned, workload)
    shard_plan = {name: _plan_shards(name, n, recipe.shard_rows) for name, n in rows.items() if n}
    if planned.shards < (wanted := sum(group.engines for group in planned.groups)):
        warn(f"{planned.shards} shards for {wanted} engines: some would stand idle. Make shard_rows smaller.")
    if json_file:
        figures = {"plan": planned.model_dump(), "workload": workload.model_dump(), "shard_plan": shard_plan}
        try:
            Path(json_file).write_text(json.dumps(figures, indent=1), encoding="utf-8")
        except OSError as error:
            raise WorkspaceError(f"{json_file}: cannot be written ({error.strerror}). Name another file.") from None


def row_count(text: str) -> int:
    """A whole number of rows from 1e8, 100000000 or 100_000_000. Raises RecipeError where it is none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0 or not value.is_integer():
        raise RecipeError(f"'{text}' is no number of rows. Write a whole number of 0 or more, such as 1e8.")
    return int(value)


def _print(planned: planning.Plan, workload: WorkloadFigures) -> None:
    totals = {"wall time, h": planned.wall_hours, "GPU-hours": planned.gpu_hours, "cost": planned.cost}
    totals |= {"prompt tokens": planned.prompt_tokens, "output tokens": planned.output_tokens}
    storage = planned.storage_gib | {"cost a month": planned.storage_cost_per_month}
    for title, shown in {f"{planned.users:,} users, {planned.items:,} items": totals, "storage, GiB": storage}.items():
        rows = [(name, e.expected, e.low, e.high) for name, e in shown.items()]
        table(title, ["estimate", "expected", "low", "high"], rows)
    columns = ["group", "engines", "tokens/s of one", "speed from", "share", "GPU-hours", "cost"]
    groups = [
        (g.name, g.engines, g.tokens_per_s.expected, g.speed_from, g.work_share, g.gpu_hours.expected, g.cost.expected)
        for g in planned.groups
    ]
    table("groups, expected", columns, groups)
    for g in planned.groups:
        if g.preemptions:
            note(f"{g.name}: {g.preemptions:,.1f} preemptions, which take {g.repeated_share:.1%} of its working time")
    for name in sorted({"vectors", "release"} - planned.storage_gib.keys()):
        note(f"{name}: not estimated, since the measured run wrote none")
    if workload.tokens_per_step is not None:
        up = ", ".join(f"{value:.2f}x up to {n} rows" for n, value in workload.speed_up.items())
        note(f"decoder, as measured: {workload.tokens_per_step:.2f} tokens a row and step; speed-up {up or 'unknown'}")
    note("low and high show the spread between the measured shards, not how rows to come may differ from those")


def _plan_shards(name: str, n_rows: int, shard_rows: int) -> dict[str, object]:
    watch = Stopwatch()
    plan = shard_sizes(consecutive_ids(n_rows), shard_rows)
    each = "rows a shard: min {:,.0f}, median {:,.0f}, max {:,.0f}".format(*plan.spread)
    note(f"shard plan of {name}: {len(plan.rows):,} shards, {each}; computed in {watch.seconds:.1f} s")
    return {"shards": len(plan.rows), "rows": plan.spread}


def main() -> None:
    """The command line of `python -m pipelines.plan`."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.plan", description=__doc__)
    parser.add_argument("--recipe", required=True, help="the YAML file of the run that was measured")
    parser.add_argument("--workspace", help="where that run's artifacts are, in place of the recipe's own workspace")
    parser.add_argument("--fleet", required=True, help="the machines to plan for, as in cluster/fleet-example.yaml")
    for kind in ("users", "items"):
        parser.add_argument(f"--{kind}", default="0", help="how many, such as 1e8")
    parser.add_argument("--json", help="a file that every figure is written to")
    given = parser.parse_args()
    with plain_errors():
        recipe = load_recipe(given.recipe, workspace=given.workspace)
        run(recipe, Workspace(recipe.workspace), given.fleet, given.users, given.items, given.json)


if __name__ == "__main__":
    main()
