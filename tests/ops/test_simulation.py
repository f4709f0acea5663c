"""The simulation by hand where nothing is left to chance, and beside the planner's formula where much is."""

import numpy as np
import pytest

from owlrec.ops.cost import (
    Estimate,
    FleetConfig,
    KindFigures,
    Runs,
    Work,
    WorkloadFigures,
    check_by_simulation,
    plan,
    simulated_groups,
)
from owlrec.ops.simulation import SimulatedGroup, simulate

SEEDS = 8


def exactly(spread, **group):
    return simulate([SimulatedGroup(**group)], spread, spread=0)


def test_shards_follow_one_another_on_each_engine():
    found = exactly(7, engines=2, shard_s=10)
    assert (found.wall_s, found.paid_s, found.losses, found.lost_s) == (40, [40 + 30], [0], 0)


def test_machines_come_start_idle_and_go():
    found = exactly(3, engines=2, shard_s=10, provision_s=5, startup_s=7, idle_timeout_s=4)
    assert found.wall_s == 5 + 7 + 20
    assert found.paid_s == [(7 + 20 + 4) + (7 + 10 + 4)]


def test_no_more_machines_are_asked_for_than_there_is_work():
    assert exactly(3, engines=50, shard_s=10, startup_s=1).paid_s == [3 * 11]
    assert exactly(4, engines=50, shard_s=10, shards_at_once=2).paid_s == [2 * 20]  # two at a time take twice as long


def test_a_slow_group_does_what_it_can():
    found = simulate([SimulatedGroup(1, 10), SimulatedGroup(1, 30)], 8, spread=0)
    assert found.wall_s == 60  # six shards of the fast one beside two of the slow one
    assert found.paid_s == [60, 60]


def test_lost_shards_are_done_again_and_lost_time_is_told():
    found = simulate([SimulatedGroup(3, 100, losses_per_hour=6)], 300, spread=0, seed=1)
    assert found.losses[0] > 10
    assert found.lost_s > 0
    assert found.paid_s[0] == pytest.approx(300 * 100 + found.lost_s)  # nobody starts, nobody idles


def test_the_same_seed_is_the_same_play_and_another_is_not():
    group = SimulatedGroup(4, 60, losses_per_hour=1)
    assert simulate([group], 200, seed=3) == simulate([group], 200, seed=3)
    assert simulate([group], 200, seed=3) != simulate([group], 200, seed=4)


@pytest.mark.parametrize(("engines", "shards", "losses"), [(0, 5, 0), (2, 0, 0), (1, 5, 10_000)])
def test_what_cannot_end_is_refused(engines, shards, losses):
    with pytest.raises(ValueError, match=r"nothing to play|leave no time"):
        simulate([SimulatedGroup(engines, 60, losses_per_hour=losses)], shards)


def group(name, **changes):
    return {"name": name, "accelerator": "x", "gpus": 8, "price_per_gpu_hour": 1, "tokens_per_s": 100} | changes


FLEETS = {
    "steady": [group("a")],
    "one engine": [group("a", gpus=1)],
    "spot": [group("a", preemption_rate_per_hour=0.2, provision_s=60, startup_s=120, idle_timeout_s=60)],
    "a storm": [group("a", gpus=4, preemption_rate_per_hour=2, provision_s=120, startup_s=120)],
    "slow to come": [group("a", gpus=64, provision_s=600, startup_s=600, idle_timeout_s=300)],
    "large engines": [group("a", gpus=32, gpus_per_engine=8, preemption_rate_per_hour=0.3, startup_s=300)],
    "mixed": [
        group("steady", gpus=2, tokens_per_s=50, startup_s=60),
        group("spot", gpus=12, tokens_per_s=200, preemption_rate_per_hour=0.5, provision_s=120, startup_s=120),
        group("small", gpus=6, tokens_per_s=20, preemption_rate_per_hour=0.1, idle_timeout_s=120),
    ],
}


def measured():
    one, tokens = Estimate(low=1, expected=1, high=1), Estimate(low=200, expected=200, high=200)
    kind = KindFigures(
        rows=1, shards=1, prompt_tokens=one, output_tokens=tokens, seconds=one, knowledge_bytes=one, vector_bytes=None
    )
    return WorkloadFigures(run="r", finished=0, kinds={"user": kind}, tokens_per_s=one)


def test_of_a_large_plan_a_part_is_played():
    fleet, work = FleetConfig(groups=[group("a", gpus=1000)]), Work(10)
    said = [check_by_simulation({"user": rows}, measured(), fleet, work) for rows in (1_000_000, 30_000_000)]
    assert said[0].startswith("the full run played as a simulation: ")
    assert said[1].startswith("200,000 shards of the full run played as a simulation: ")


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("groups", FLEETS.values(), ids=FLEETS)
def test_formula_and_simulation_agree_within_ten_percent(groups, at_once):
    workload = measured()
    fleet, work = FleetConfig(groups=groups), Work(64, shards_at_once=at_once)
    planned = plan(workload, fleet, Runs({"user": 100_000}), work)
    players = simulated_groups(planned, workload, fleet, work)
    played = [simulate(players, planned.shards, spread=64**-0.5, seed=seed) for seed in range(SEEDS)]
    hours = np.mean([p.wall_s for p in played]) / 3600
    gpus_each = [g.gpus_per_engine for g in fleet.groups]
    gpu_hours = np.mean([np.dot(p.paid_s, gpus_each) for p in played]) / 3600
    losses = np.mean([sum(p.losses) for p in played])
    off = [planned.wall_hours.expected / hours - 1, planned.gpu_hours.expected / gpu_hours - 1]
    print("formula to simulation: wall {:+.1%}, GPU-hours {:+.1%}".format(*off))
    assert planned.wall_hours.expected == pytest.approx(hours, rel=0.1)
    assert planned.gpu_hours.expected == pytest.approx(gpu_hours, rel=0.1)
    assert sum(g.preemptions for g in planned.groups) == pytest.approx(losses, rel=0.25, abs=2)
