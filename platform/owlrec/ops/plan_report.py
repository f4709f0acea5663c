"""What a plan looks like: tables for a terminal, a waterfall of what saves what, and a check by simulation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from owlrec.errors import RecipeError
from owlrec.generation.shard_plan import consecutive_ids, shard_sizes
from owlrec.ops.charts import standalone, waterfall_chart
from owlrec.ops.console import note, table, warn
from owlrec.ops.fleet import FleetConfig
from owlrec.ops.levers import Lever, levers
from owlrec.ops.planning import Plan, Runs, Work, engine_seconds, plan
from owlrec.ops.policies import POLICIES, Horizon, Policy, runs_of, stored_of
from owlrec.ops.simulation import SimulatedGroup, simulate
from owlrec.ops.workload import Call, WorkloadFigures
from owlrec.shards import Stopwatch

_MOST_SIMULATED = 200_000  # shards, a second or two


@dataclass(frozen=True)
class Report:
    """What was printed, for files."""

    figures: dict[str, Any]
    waterfall: str  # SVG


def report(workload: WorkloadFigures, fleet: FleetConfig, horizon: Horizon, policy: Policy, work: Work) -> Report:
    """Prints a plan, the policies beside it, what saves what, and how a simulation of it went."""
    ways, planned = levers(workload, fleet, horizon, policy, work)
    note(
        f"{horizon.users:,} users, {horizon.items:,} items, {policy}, {horizon.refreshes:,} refreshes after a full run"
    )
    print_plan(planned, workload)
    policies, lacking = plans_by_policy(workload, fleet, horizon, work)
    print_policies(policies, lacking)
    print_levers(ways)
    note(check_by_simulation(runs_of(policy, horizon, workload).first, workload, fleet, work))
    if planned.shards < (wanted := sum(group.engines for group in planned.groups)):
        warn(f"{planned.shards} shards for {wanted} engines: some would stand idle. Make shard_rows smaller.")
    first_run = stored_of(policy, horizon, workload)[0]
    figures = {
        "shard_plan": {call: plan_shards(call, n, work.shard_rows) for call, n in first_run.items() if n},
        "plan": planned.model_dump(),
        "policies": {name: p.model_dump() for name, p in policies.items()},
        "levers": [way.model_dump() for way in ways],
        "workload": workload.model_dump(),
    }
    return Report(figures, levers_svg(ways))


def plans_by_policy(
    workload: WorkloadFigures, fleet: FleetConfig, horizon: Horizon, work: Work
) -> tuple[dict[Policy, Plan], dict[Policy, str]]:
    """A plan for each policy, and why there is none for the others."""
    found: dict[Policy, Plan] = {}
    lacking: dict[Policy, str] = {}
    for policy in POLICIES:
        try:
            stored, members = stored_of(policy, horizon, workload)
            runs = runs_of(policy, horizon, workload)
            found[policy] = plan(workload, fleet, runs, work, stored=stored, members=members)
        except RecipeError as error:
            lacking[policy] = str(error)
    return found, lacking


def print_plan(planned: Plan, workload: WorkloadFigures) -> None:
    """Totals, storage and groups, each with its range."""
    totals = {"wall time, h": planned.wall_hours, "GPU-hours": planned.gpu_hours, "cost": planned.cost}
    totals |= {"prompt tokens": planned.prompt_tokens, "output tokens": planned.output_tokens}
    storage = planned.storage_gib | {"cost a month": planned.storage_cost_per_month}
    about: dict[Call, str] = {"refresh": "to renew users"}
    calls = ", ".join(f"{n:,} {about.get(call, f'about {call}s')}" for call, n in planned.calls.items())
    for title, shown in {f"{sum(planned.calls.values()):,} calls: {calls}": totals, "storage, GiB": storage}.items():
        table(
            title, ["estimate", "expected", "low", "high"], [(n, e.expected, e.low, e.high) for n, e in shown.items()]
        )
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


def print_policies(found: Mapping[Policy, Plan], lacking: Mapping[Policy, str]) -> None:
    """The policies side by side, and what those that cannot be planned lack."""
    columns = ["policy", "calls", "prompt tokens", "output tokens", "GPU-hours", "wall time, h", "cost"]
    rows = [
        (policy, sum(p.calls.values()), *(e.expected for e in
         (p.prompt_tokens, p.output_tokens, p.gpu_hours, p.wall_hours, p.cost)))
        for policy, p in found.items()
    ]  # fmt: skip
    table("policies, expected", columns, rows)
    for reason in lacking.values():
        note(f"not planned: {reason}")


def print_levers(found: Sequence[Lever]) -> None:
    """What each way of saving saves."""
    begin = found[0].cost
    shares = [f"{lever.saved / begin:.1%}" if begin else "" for lever in found]
    rows = [(way.name, way.calls, way.gpu_hours, way.cost, way.saved, s) for way, s in zip(found, shares, strict=True)]
    table("what saves what, expected", ["one after another", "calls", "GPU-hours", "cost", "saved", "of all"], rows)


def levers_svg(found: Sequence[Lever]) -> str:
    """The waterfall of costs, as a file of its own."""
    first, *rest = found
    return standalone(waterfall_chart(first.name, first.cost, {lever.name: -lever.saved for lever in rest}, "cost"))


def check_by_simulation(calls: Mapping[Call, int], workload: WorkloadFigures, fleet: FleetConfig, work: Work) -> str:
    """Plays a run once, loss by loss, or as much of it as can be played in a moment; what came out beside the formula,
    in words."""
    shards = sum(-(-n // work.shard_rows) for n in calls.values())
    part = {call: -(-n * min(shards, _MOST_SIMULATED) // shards) for call, n in calls.items()}
    one = plan(workload, fleet, Runs(part), work)
    played = simulate(simulated_groups(one, workload, fleet, work), one.shards, spread=work.shard_rows**-0.5)
    hours = sum(s * g.gpus_per_engine for s, g in zip(played.paid_s, fleet.groups, strict=True)) / 3600
    what = "the full run" if one.shards == shards else f"{one.shards:,} shards of the full run"
    return (
        f"{what} played as a simulation: {played.wall_s / 3600:,.4g} h, {hours:,.4g} GPU-hours, "
        f"{sum(played.losses):,} preemptions "
        f"(formula: {one.wall_hours.expected:,.4g} h, {one.gpu_hours.expected:,.4g} GPU-hours)"
    )


def simulated_groups(planned: Plan, workload: WorkloadFigures, fleet: FleetConfig, work: Work) -> list[SimulatedGroup]:
    """The fleet's groups with the expected time of a shard of the plan; those without a share of it have no engines."""
    workload = fleet.assume.applied(workload)
    return [
        SimulatedGroup(
            engines=group.engines if plan_.work_share else 0,
            shard_s=float(engine_seconds(group, workload, planned.calls, work)[1]) / planned.shards,
            shards_at_once=work.shards_at_once,
            provision_s=group.provision_s,
            startup_s=group.starts_in(workload),
            losses_per_hour=group.preemption_rate_per_hour,
            idle_timeout_s=group.idle_timeout_s,
        )
        for group, plan_ in zip(fleet.groups, planned.groups, strict=True)
    ]


def plan_shards(name: str, n_rows: int, shard_rows: int) -> dict[str, object]:
    """Cuts consecutive ids into shards, as far as that can be done before any real id is there; the sizes."""
    watch = Stopwatch()
    found = shard_sizes(consecutive_ids(n_rows), shard_rows)
    each = "rows a shard: min {:,.0f}, median {:,.0f}, max {:,.0f}".format(*found.spread)
    note(f"shard plan of {name}s: {len(found.rows):,} shards, {each}; computed in {watch.seconds:.1f} s")
    return {"shards": len(found.rows), "rows": found.spread}
