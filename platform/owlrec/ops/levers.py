"""What each way of saving saves: from a plan that does nothing clever down to the one that was asked for.

The ways are pulled one after another, in the order in which they are listed, so that the savings add up to the
difference; what one saves depends on those before it.
"""

from dataclasses import replace

from owlrec.config import Config
from owlrec.ops.fleet import FleetConfig
from owlrec.ops.planning import Plan, Runs, Work, plan
from owlrec.ops.policies import Horizon, Policy, runs_of, stored_of
from owlrec.ops.workload import WorkloadFigures


class Lever(Config):
    """One way of saving, pulled after those before it; the first is where all begins."""

    name: str
    calls: int
    gpu_hours: float
    cost: float
    saved: float  # of the cost; below 0 where it costs more


def levers(
    workload: WorkloadFigures, fleet: FleetConfig, horizon: Horizon, policy: Policy, work: Work
) -> tuple[list[Lever], Plan]:
    """The ways and what they save, expected values, and the plan that they end in.

    Begins with all users and items asked about at every refresh, no drafts, on-demand machines. A way that changes
    nothing is left out. Raises RecipeError as `plan` and `runs_of` do.
    """
    full = runs_of("individual", horizon.model_copy(update={"refreshes": 0}), workload).first
    ours, plain, steady = runs_of(policy, horizon, workload), replace(work, decoder=False), on_demand(fleet)
    steps: list[tuple[str, Runs, Work, FleetConfig]] = [
        ("everything anew each time", Runs(full, full, horizon.refreshes), plain, steady)
    ]
    if policy != "collective" and horizon.refreshes:
        kept = runs_of("individual", horizon, workload)
        steps.append(("texts with the same prompt kept", kept, plain, steady))
    steps += [
        (f"{policy} calls", ours, plain, steady),
        ("retrieval decoder", ours, work, steady),
        ("spot machines", ours, work, fleet),
    ]
    stored, members = stored_of(policy, horizon, workload)
    found: list[Lever] = []
    for number, (name, runs, cut, machines) in enumerate(steps):
        planned = plan(workload, machines, runs, cut, stored=stored, members=members)
        cost = planned.cost.expected
        before = found[-1].cost if found else cost
        if not number or cost != before:
            total = sum(planned.calls.values())
            found.append(
                Lever(name=name, calls=total, gpu_hours=planned.gpu_hours.expected, cost=cost, saved=before - cost)
            )
    return found, planned


def on_demand(fleet: FleetConfig) -> FleetConfig:
    """The fleet as machines that nobody takes away, at the price of such where one is given."""
    groups = [
        group
        if group.on_demand_price_per_gpu_hour is None
        else group.model_copy(
            update={"price_per_gpu_hour": group.on_demand_price_per_gpu_hour, "preemption_rate_per_hour": 0.0}
        )
        for group in fleet.groups
    ]
    return fleet.model_copy(update={"groups": groups})
