"""Costs against numbers worked out by hand, and the schedule of a fleet against a simulation of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fleet_simulation import Machines, Simulation  # type: ignore[import-not-found]

from owlrec.cli import app, row_count
from owlrec.errors import RecipeError, WorkspaceError
from owlrec.generation.job import DECODER
from owlrec.ops.cost import (
    Demand,
    FleetConfig,
    Horizon,
    TextFigures,
    Workload,
    demand,
    estimate_cost,
    load_fleet,
    measured_workload,
    per_row,
    price_per_point,
    savings,
)
from owlrec.refresh.state import State, write_state
from owlrec.releases.format import ReleaseManifest
from owlrec.shards import Artifact, Card
from owlrec.workspace import Workspace
from owlrec_decoding.controller import DecoderCounters, StepSums

EXAMPLE = Path(__file__).resolve().parents[2] / "cluster" / "fleet-example.yaml"
MILLION = 2**20


def text_figures(seconds=4.0, output=200.0):
    exactly = [np.full(3, value) for value in (100.0, output, seconds, 1024.0)]
    return TextFigures(1, *exactly)


def workload(**changes):
    return replace(Workload("knowledge/f", 0.0, {"user": text_figures()}, shard_rows=36), **changes)


def group(name="a", **changes):
    return {"name": name, "accelerator": "x", "gpus": 2, "price_per_gpu_hour": 3.0, "tokens_per_s": 100} | changes


def fleet(*groups, **changes):
    return FleetConfig(groups=list(groups), **changes)


def estimated(*groups, **changes):
    """3600 users of 200 tokens: 7200 s of an engine that writes 100 a second, in 100 shards of 72 s."""
    return estimate_cost(workload(**changes), fleet(*groups), Demand({"user": 3600}))


def test_a_shown_gain_has_a_price_per_point():
    estimate = estimated(group())  # for a cost of 6
    assert price_per_point(workload(gain=0.003), estimate)[1] == pytest.approx(2)
    assert price_per_point(workload(), estimate) is None


def wall_s(estimate):
    return 3600 * estimate.expected("generate: wall hours")


# ------------------------------------------------------------------------------------------------------------ generate


def test_two_gpus_take_half_the_engine_time_and_wait_for_each_other():
    estimate = estimated(group())
    assert (estimate.shards, estimate.expected("output tokens"), estimate.expected("prompt tokens")) == (
        100, 720_000, 360_000
    )  # fmt: skip
    waits = 72 / 2 * (1 - 1 / 2)  # one of the two is done first: by half a shard of 72 s, or not at all
    assert wall_s(estimate) == pytest.approx(3600 + waits)
    assert estimate.expected("generate: GPU-hours") == pytest.approx(2)
    assert estimate.expected("cost") == pytest.approx(6)
    assert wall_s(estimated(group(gpus=1))) == pytest.approx(7200)
    assert wall_s(estimated(group(gpus=1, prefill_tokens_per_s=1000))) == pytest.approx(7200 + 360)


def test_unequal_groups_share_the_work_by_their_speed():
    estimate = estimated(group(gpus=1), group("b", gpus=6, gpus_per_engine=2, tokens_per_s=200))
    begun_s = (7200 - 36 - 6 * 18) / 7  # speeds 1 : 6; then all have half a shard left, of 72 and 36 s
    assert wall_s(estimate) == pytest.approx(begun_s + 36)  # the slow one's, rather than 36 * 5 / 6
    assert estimate.expected("generate on a: GPU-hours") * 3600 == pytest.approx(begun_s + 36)
    assert estimate.expected("generate on b: GPU-hours") * 3600 == pytest.approx(6 * (begun_s + 18))


def test_a_group_that_starts_too_late_costs_nothing():
    assert estimated(group(), group("late", startup_s=4000)).expected("generate on late: GPU-hours") == 0


def test_start_up_and_idleness_are_paid_by_every_gpu_and_a_machine_that_is_waited_for_is_not():
    assert estimated(group(startup_s=360)).expected("generate: GPU-hours") == pytest.approx(2 + 2 * 0.1)
    assert estimated(group(idle_timeout_s=720)).expected("generate: GPU-hours") == pytest.approx(2 + 2 * 0.2)
    waiting = estimated(group(provision_s=360))
    assert waiting.expected("generate: GPU-hours") == pytest.approx(2)
    assert wall_s(waiting) == pytest.approx(wall_s(estimated(group())) + 360)


def test_every_refresh_starts_its_machines_again():
    machines = fleet(group(startup_s=360), group("late", startup_s=3900))
    needed = Demand({"user": 36_000}, {"user": 360}, refreshes=3)
    whole = estimate_cost(workload(), machines, needed)
    first, each = (estimate_cost(workload(), machines, Demand(texts)) for texts in (needed.first, needed.per_refresh))
    assert whole.texts == {"user": 36_000 + 3 * 360}
    assert whole.shards == first.shards + 3 * each.shards
    for figure in ("generate: wall hours", "generate: GPU-hours", "generate on late: GPU-hours", "cost"):
        assert whole.expected(figure) == pytest.approx(first.expected(figure) + 3 * each.expected(figure))
    assert each.expected("generate on late: GPU-hours") == 0 < first.expected("generate on late: GPU-hours")


def test_the_measured_start_up_holds_for_engines_as_measured_alone():
    for changes, seconds in (
        ({"tokens_per_s": None}, 14_400 + 50),
        ({"tokens_per_s": None, "startup_s": 7}, 14_400 + 7),
        ({}, 7200),
    ):
        assert wall_s(estimated(group(gpus=1, **changes), startup_s=50.0)) == pytest.approx(seconds)


def test_preemptions_add_work_until_they_outrun_it():
    lost = (36 + 36) / 3600  # one per hour: half of a shard, and a start
    estimate = estimated(group(gpus=1, preemption_rate_per_hour=1, startup_s=36))
    assert estimate.expected("generate on a: share lost to preemptions") == pytest.approx(lost)
    assert wall_s(estimate) == pytest.approx(36 + 7200 / (1 - lost))
    four = estimated(group(preemption_rate_per_hour=1), in_flight=4)
    assert four.expected("generate on a: share lost to preemptions") == pytest.approx(4 * 36 / 3600)
    with pytest.raises(RecipeError, match="group 'a'"):
        estimated(group(preemption_rate_per_hour=100))


def test_low_and_high_push_all_figures_one_way():
    figures = replace(text_figures(), output_tokens=np.array([100, 200, 400]), engine_s=np.array([0.5, 2, 8]))
    estimate = estimated(group(gpus=1, tokens_per_s=None), texts={"user": figures})
    assert estimate.figures["generate: wall hours"] == pytest.approx([0.5, 2, 8])
    assert estimate.figures["cost"] == pytest.approx([1.5, 6, 24])
    assert estimate.figures["output tokens"] == pytest.approx([360_000, 720_000, 1_440_000])


def test_each_kind_takes_its_own_time():
    texts = {"user": text_figures(seconds=2), "cohort": text_figures(seconds=5, output=50)}
    machines = fleet(group(gpus=1, tokens_per_s=None))
    estimate = estimate_cost(workload(texts=texts), machines, Demand({"user": 100, "cohort": 10}))
    assert wall_s(estimate) == pytest.approx(250)
    assert estimate.expected("output tokens") == 100 * 200 + 10 * 50
    assert estimate.shards == 3 + 1


def test_assumed_tokens_take_the_place_of_measured_ones():
    machines = fleet(
        group(gpus=1, tokens_per_s=None), assume={"prompt_tokens": {"user": 7}, "output_tokens": {"user": 400}}
    )
    estimate = estimate_cost(machines.assume.applied(workload()), machines, Demand({"user": 100}))
    assert (estimate.expected("prompt tokens"), estimate.expected("output tokens")) == (700, 40_000)
    assert wall_s(estimate) == pytest.approx(2 * 400)  # twice the text, in twice the 4 s
    with pytest.raises(RecipeError, match="tokens of a cohort"):
        fleet(group(), assume={"output_tokens": {"cohort": 3}}).assume.applied(workload())


@pytest.mark.parametrize("texts", [{"user": 0}, {"user": -1}, {"user": 10, "item": 5}])
def test_texts_that_cannot_be_estimated_are_refused(texts):
    with pytest.raises(RecipeError, match="cannot be planned"):
        estimate_cost(workload(), fleet(group()), Demand(texts))


FLEETS = {
    "steady": [group("a", gpus=8)],
    "one engine": [group("a", gpus=1)],
    "spot": [group("a", gpus=8, preemption_rate_per_hour=0.2, provision_s=60, startup_s=120, idle_timeout_s=60)],
    "a storm": [group("a", gpus=4, preemption_rate_per_hour=2, provision_s=120, startup_s=120)],
    "slow to come": [group("a", gpus=64, provision_s=600, startup_s=600, idle_timeout_s=300)],
    "large engines": [group("a", gpus=32, gpus_per_engine=8, preemption_rate_per_hour=0.3, startup_s=300)],
    "mixed": [
        group("steady", gpus=2, tokens_per_s=50, startup_s=60),
        group("spot", gpus=12, tokens_per_s=200, preemption_rate_per_hour=0.5, provision_s=120, startup_s=120),
        group("small", gpus=6, tokens_per_s=20, preemption_rate_per_hour=0.1, idle_timeout_s=120),
    ],
}


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("groups", FLEETS.values(), ids=FLEETS)
def test_a_simulation_of_the_fleet_agrees_within_ten_percent(groups, in_flight):
    figures, machines, texts = workload(shard_rows=64, in_flight=in_flight), fleet(*groups), {"user": 100_000}
    estimate = estimate_cost(figures, machines, Demand(texts))
    players = [
        Machines(
            engines=g.engines if estimate.expected(f"generate on {g.name}: GPU-hours") else 0,
            shard_s=float(g.seconds(figures, texts)[1]) / estimate.shards,
            in_flight=in_flight,
            provision_s=g.provision_s,
            startup_s=g.starts_in(figures),
            losses_per_hour=g.preemption_rate_per_hour,
            idle_timeout_s=g.idle_timeout_s,
        )
        for g in machines.groups
    ]
    played = [Simulation(players, estimate.shards, spread=64**-0.5, seed=seed).play() for seed in range(8)]
    hours = np.mean([p.wall_s for p in played]) / 3600
    gpu_hours = np.mean([np.dot(p.paid_s, [g.gpus_per_engine for g in machines.groups]) for p in played]) / 3600
    off = [
        estimate.expected("generate: wall hours") / hours - 1,
        estimate.expected("generate: GPU-hours") / gpu_hours - 1,
    ]
    print("estimate to simulation: wall {:+.1%}, GPU-hours {:+.1%}".format(*off))
    assert off == pytest.approx([0, 0], abs=0.1)


def test_the_simulation_by_hand():
    plain = Simulation([Machines(2, 10)], 7, spread=0).play()
    assert (plain.wall_s, plain.paid_s) == (40, [40 + 30])
    slow = Simulation([Machines(2, 10, provision_s=5, startup_s=7, idle_timeout_s=4)], 3, spread=0).play()
    assert (slow.wall_s, slow.paid_s) == (5 + 7 + 20, [(7 + 20 + 4) + (7 + 10 + 4)])
    assert Simulation([Machines(50, 10, in_flight=2)], 4, spread=0).play().paid_s == [2 * 20]  # no more than needed
    lossy = Simulation([Machines(3, 100, losses_per_hour=6)], 300, spread=0, seed=1).play()
    assert lossy.losses[0] > 10
    assert lossy.paid_s[0] == pytest.approx(300 * 100 + lossy.lost_s)  # nobody starts, nobody idles


# ------------------------------------------------------------------------------------------------- beyond generation


def test_encode_and_publish_by_their_workers():
    figures = workload(encode_s=np.array([0.001, 0.002, 0.004]), publish_s=np.full(3, 0.0001))
    machines = fleet(
        group(),
        encode={"workers": 4, "price_per_worker_hour": 0.5},
        publish={"workers": 2, "price_per_worker_hour": 1.0},
    )
    needed = Demand({"user": 3_600_000}, {"user": 36_000}, refreshes=100, ids=1_800_000)
    estimate = estimate_cost(figures, machines, needed)
    assert estimate.figures["encode: worker-hours"] == pytest.approx([2, 4, 8])  # 7.2 million texts
    assert estimate.figures["encode: wall hours"] == pytest.approx([0.5, 1, 2])
    assert estimate.expected("encode: cost") == pytest.approx(2)
    assert estimate.expected("publish: cost") == pytest.approx(0.15)  # 1.8 million ids and 3.6 million renewed ones
    expected = estimate.expected("generate: cost") + 2 + 0.15
    assert estimate.expected("cost") == pytest.approx(expected)
    given = machines.model_copy(update={"encode": machines.encode.model_copy(update={"rows_per_s": 1000})})
    assert estimate_cost(figures, given, needed).figures["encode: worker-hours"] == pytest.approx([2, 2, 2])
    unmeasured = estimate_cost(workload(), machines, needed)
    assert not [name for name in unmeasured.figures if name.startswith(("encode", "publish"))]


def test_storage_by_artifact_and_its_price():
    texts = {"user": text_figures(), "item": text_figures(), "refresh": text_figures()}
    figures = workload(texts=texts, vector_bytes=np.full(3, 768.0), release_bytes=np.full(3, 2048.0))
    needed = Demand({"user": MILLION, "item": MILLION}, {"refresh": 3 * MILLION}, refreshes=1, ids=MILLION)
    estimate = estimate_cost(figures, fleet(group(), storage_price_per_gib_month=0.5), needed)
    stored = {name: estimate.expected(f"storage: {name}, GiB") for name in ("knowledge", "vectors", "release")}
    assert stored == pytest.approx({"knowledge": 2, "vectors": 1.5, "release": 2})  # a refresh replaces texts
    assert estimate.expected("storage: cost per month") == pytest.approx(0.5 * 5.5)
    members = replace(needed, members={"user": 2**20, "item": 2**20})
    estimate = estimate_cost(replace(figures, behavior_bytes=944.0), fleet(group()), members)
    assert estimate.expected("storage: release, GiB") == pytest.approx(2 + (2 * 40 + 944) / 1024)
    assert "storage: release, GiB" not in estimated(group()).figures  # not measured, and not made up


def test_replicas_and_nodes_for_a_rate_of_requests():
    serving = {
        "requests_per_s": 2100,
        "requests_per_s_per_replica": 1000,
        "load_share": 0.5,
        "replicas_per_node": 2,
        "price_per_node_hour": 0.1,
        "disk_price_per_gib_month": 0.25,
    }
    machines, needed = fleet(group(), serving=serving), Demand({"user": 10}, ids=MILLION)
    figures = workload(release_bytes=np.array([1024.0, 2048.0, 4096.0]))
    estimate = estimate_cost(figures, machines, needed)
    assert (estimate.expected("serving: replicas"), estimate.expected("serving: nodes")) == (5, 3)
    assert estimate.figures["serving: release files per node, GiB"] == pytest.approx([2, 4, 8])  # current and next
    assert estimate.figures["serving: cost per month"] == pytest.approx([3 * (73 + gib / 4) for gib in (2, 4, 8)])


# ------------------------------------------------------------------------------------------------ policies and savings


def measured(**changes):
    """Texts that take 4, 2, 8 and 3 s each."""
    seconds = {"user": 4, "item": 2, "cohort": 8, "refresh": 3}
    figures = {"cohorts_per_user": 0.05, "cohorts_per_item": 0.01, "acting_share": 0.2, "texts_per_acting": 0.5}
    texts = {kind: text_figures(seconds=s) for kind, s in seconds.items()}
    return workload(texts=texts, shard_rows=10, **(figures | changes))


HORIZON = Horizon(users=1000, items=100, refreshes=10)


def test_texts_by_policy():
    assert demand("individual", HORIZON, measured()).texts == {"user": 1000 + 10 * 200, "item": 100}
    assert demand("collective", HORIZON, measured()).texts == {"cohort": 11 * (50 + 1)}
    assert demand("streaming", HORIZON, measured()).texts == {"user": 1000, "item": 100, "refresh": 10 * 100}
    assert demand("streaming", HORIZON, measured()).ids == 1100
    assert demand("collective", HORIZON, measured()).members == {"user": 1000, "item": 100}
    cut_twice = measured(texts_per_user=2.0, texts_per_cohort=1.5)  # texts for two moments, an id all the same
    assert demand("individual", HORIZON, cut_twice).first == {"user": 2000, "item": 100}
    assert demand("collective", HORIZON, cut_twice).first == {"cohort": 76}
    assert [demand(policy, HORIZON, cut_twice).ids for policy in ("individual", "collective")] == [1100, 51]


def test_what_is_given_goes_before_what_was_measured():
    given = HORIZON.model_copy(update={"acting_share": 0.01, "cohorts": 7, "renewed_share": 0.5})
    assert demand("individual", given, measured()).texts == {"user": 1000 + 10 * 10, "item": 100}
    assert demand("collective", given, measured()).texts == {"cohort": 7 + 10 * 4}
    assert demand("streaming", given, measured()).texts["refresh"] == 50
    once = Horizon(users=10, items=5)
    assert demand("streaming", once, measured(acting_share=None, texts_per_acting=None)).texts == {
        "user": 10,
        "item": 5,
    }


@pytest.mark.parametrize(
    ("policy", "missing", "message"),
    [
        ("individual", {"acting_share": None}, "acting-share"),
        ("streaming", {"texts_per_acting": None}, "owlrec refresh"),
        ("collective", {"cohorts_per_item": None}, "cohorts: {}"),
    ],
)
def test_what_was_not_measured_is_asked_for(policy, missing, message):
    with pytest.raises(RecipeError, match=message):
        demand(policy, HORIZON, measured(**missing))


def saved(policy, changes=None, **figures):
    machines = fleet(group(gpus=1, price_per_gpu_hour=3600.0, tokens_per_s=None, **(changes or {})))
    steps, estimate = savings(measured(**figures), machines, HORIZON, policy)
    assert sum(step.saved for step in steps) == pytest.approx(steps[0].cost - estimate.expected("cost"))
    assert steps[-1].cost == pytest.approx(estimate.expected("cost"))
    return {step.name: step.saved for step in steps}


def test_savings_add_up_from_everything_again_to_the_estimate():
    # A GPU-second costs 1. Again: 11 times 1,000 users of 4 s and 100 items of 2 s. Kept: 3,000 users, 100 items once.
    again, kept, streaming = 11 * (4000 + 200), 3000 * 4 + 200, 4000 + 200 + 1000 * 3
    assert saved("streaming") == pytest.approx(
        {
            "regenerate everything each time": 0,
            "keep texts with unchanged prompts": again - kept,
            "streaming texts": kept - streaming,
        }
    )
    collective = {"regenerate everything each time": 0, "collective texts": again - 11 * 51 * 8}
    assert saved("collective") == pytest.approx(collective)
    # A second moment of each user is written about in the full run alone.
    assert saved("collective", texts_per_user=2.0)["collective texts"] == pytest.approx(again + 4000 - 11 * 51 * 8)


def test_decoder_and_spot_machines_save_time_and_price():
    assert saved("collective", plain_factor=1.5)["retrieval decoder"] == pytest.approx(0.5 * 11 * 51 * 8)
    spot = {"price_per_gpu_hour": 1800.0, "on_demand_price_per_gpu_hour": 3600.0, "preemption_rate_per_hour": 9.0}
    machines = fleet(group(gpus=1, tokens_per_s=None, **spot))
    steps, _ = savings(measured(), machines, HORIZON, "collective")
    seconds, shard_s = 11 * 51 * 8, 51 * 8 / 6  # of each of eleven runs, shards of at most ten rows
    half_price = seconds - seconds / (1 - 9 / 3600 * shard_s / 2) / 2
    assert {step.name: step.saved for step in steps}["spot machines"] == pytest.approx(half_price, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- measured run


def test_the_range_is_of_two_standard_errors_of_a_ratio():
    # Ratio 15, residuals -50 and 50: their deviation 70.7 / (sqrt(2) * 10 rows) = 5, so that f = 1 + 2 * 5 / 15.
    assert per_row(np.array([100.0, 200.0]), np.array([10.0, 10.0])) == pytest.approx([9, 15, 25])
    assert per_row(np.array([20.0, 40.0]), np.array([1.0, 2.0])) == pytest.approx([20, 20, 20])
    assert per_row(np.array([100.0]), np.array([10.0])).tolist() == [5, 10, 20]


def write_shard(workspace, folder, stage, name, size, rows, seconds, end, counts, suffix=".parquet"):
    artifact = Artifact(workspace, folder)
    file = f"{name}{suffix}"
    files = {file: workspace.write_bytes(artifact.path(file), b"x" * size)}
    card = Card(stage=stage, shard=name, fingerprint="f", files=files, rows_in=rows, rows_out=rows, counts=counts,
                seconds=seconds, finished=end)  # fmt: skip
    artifact.finish(card)


def write_run(workspace, *, ends=(110, 120, 125), seconds=(10, 20, 15), folder="f", stage="generate", decoded=None):
    """Two shards of 10 users and 100 and 200 tokens, then one of 5 items and 50: done 10 s, 10 s and 5 s one after
    another, though an engine had two of them in flight at a time."""
    shards = [("user/00000000", 10, 100), ("user/00000001", 10, 200), ("item/00000000", 5, 50)]
    for (name, rows, tokens), end, took in zip(shards, ends, seconds, strict=False):
        counts = {"rows_asked": rows, "prompt_tokens": 30 * rows, "output_tokens": tokens}
        counts |= {DECODER: decoded} if decoded and name == shards[0][0] else {}
        write_shard(workspace, f"knowledge/{folder}", stage, name, 40 * rows, rows, took, end, counts)
    if folder == "f":
        finish(workspace, "generate", {"shards": 3, "shards_this_run": 3}, {"knowledge": "knowledge/f"}, 40.0)


def finish(workspace, stage, counts, outputs, seconds=1.0):
    card = Card(stage=stage, fingerprint="f", seconds=seconds, finished=130, counts=counts, outputs=outputs)
    workspace.write_json(f"stages/{stage}.json", card.model_dump(mode="json"))


def test_a_run_is_measured_from_its_shards(workspace):
    write_run(workspace)
    figures = measured_workload(workspace, 36)
    user, item = figures.texts["user"], figures.texts["item"]
    assert (user.rows, item.rows) == (20, 5)
    assert user.output_tokens == pytest.approx([9, 15, 25])
    assert item.output_tokens == pytest.approx([5, 10, 20])
    assert (user.prompt_tokens.tolist(), user.file_bytes.tolist()) == ([30] * 3, [40] * 3)
    assert user.engine_s == pytest.approx([1, 1, 1])  # the second shard began 10 s before the first was done
    assert item.engine_s[1] == 1
    assert figures.startup_s == 10  # the stage began at 90, its first shard at 100
    assert (figures.plain_factor, figures.texts_per_user) == (1, 1)
    assert (figures.encode_s, figures.release_bytes, figures.cohorts_per_user, figures.acting_share) == (None,) * 4


def test_a_pause_between_two_runs_is_in_no_shards_time(workspace):
    write_run(workspace, ends=(110, 120, 5000), seconds=(10, 20, 5))
    finish(workspace, "generate", {"shards": 3, "shards_this_run": 1}, {"knowledge": "knowledge/f"})
    figures = measured_workload(workspace, 36)
    assert figures.texts["item"].engine_s[1] == 1
    assert figures.startup_s is None


def test_refreshes_and_cohorts_are_measured_where_they_are(workspace):
    write_run(workspace)
    write_shard(workspace, "knowledge/f", "generate", "cohort/00000000", 10, 18, 1, 126,
                {"rows_asked": 18, "prompt_tokens": 9, "output_tokens": 9})  # fmt: skip
    write_run(workspace, folder="r", ends=(210, 220), stage="refresh")
    write_run(workspace, folder="old", ends=(20, 30), stage="refresh")
    write_run(workspace, folder="other", ends=(220, 230))  # a job of another recipe
    finish(workspace, "prepare", {"users": 20, "items": 40, "texts": 40}, {})
    finish(workspace, "cohorts", {"user_cohorts": 4, "item_cohorts": 5}, {"cohorts": "cohorts/c"})
    workspace.fix_shards({"user": 1})
    write_state(workspace, State(name="s", n_shards=1, counts={"calls": 3, "users_with_news": 5}), "")
    figures = measured_workload(workspace, 36)
    assert (figures.texts["refresh"].rows, figures.texts["user"].rows) == (20, 20)
    assert figures.texts["refresh"].engine_s == pytest.approx([1, 1, 1])
    assert (figures.cohorts_per_user, figures.cohorts_per_item, figures.texts_per_cohort) == (0.2, 0.125, 2.0)
    assert (figures.acting_share, figures.texts_per_acting, figures.texts_per_user) == (0.25, 0.6, 2.0)


def test_encode_publish_and_the_decoder_are_measured_where_they_ran(workspace):
    steps = StepSums(steps=5, tokens=25, seconds=2, plain_s=3)
    write_run(workspace, decoded=DecoderCounters(counts={"rows": 10}, by_rows={4: steps}).model_dump_json())
    finish(workspace, "prepare", {"users": 20, "items": 5, "interactions": 60}, {})
    for name, rows in (("knowledge-user", 20), ("knowledge-item", 5), ("metadata-user", 20)):
        counts = {"timed_texts": rows, "timed_s": 0.5 * rows if name.startswith("knowledge") else 99.0}
        write_shard(workspace, "vectors/v", "encode", f"{name}/00000000", 50 * rows, rows, 1, 127, counts, ".arrow")
    finish(workspace, "encode", {}, {"vectors": "vectors/v"})
    counts = {"knowledge/user": 20, "knowledge/item": 5, "vectors/user": 20}
    write_shard(workspace, "releases/r", "publish", "part/00000000", 1000, 45, 2, 128, counts, ".lmdb")
    finish(workspace, "publish", {}, {"release": "r"})
    manifest = ReleaseManifest(name="r", created="", fingerprint="f", model="m", encoder="e", knowledge={}, vectors={},
                               dim=4, as_of_min=0, as_of_max=0, parts=[], files={}, history_length=2)  # fmt: skip
    workspace.write_json("releases/r/release.json", manifest.model_dump(mode="json"))
    figures = measured_workload(workspace, 36)
    assert figures.encode_s == pytest.approx([0.5] * 3)
    assert figures.vector_bytes == pytest.approx([50] * 3)
    assert figures.publish_s == pytest.approx([0.04, 0.08, 0.16])  # one part: from half to double
    assert figures.release_bytes == pytest.approx([20, 40, 80])
    assert figures.behavior_bytes == 2 * 25  # the last two of three each
    assert figures.plain_factor == pytest.approx(26 / 25)  # one second of 25 was saved


def test_a_workspace_without_a_finished_run_says_what_to_do(workspace):
    with pytest.raises(WorkspaceError, match="Run a small recipe first"):
        measured_workload(workspace, 36)
    finish(workspace, "generate", {}, {"knowledge": "knowledge/f"})
    with pytest.raises(WorkspaceError, match="no tokens"):
        measured_workload(workspace, 36)


# ---------------------------------------------------------------------------------------------- fleet files and command


FLEET = """
groups:
  - {name: spot, accelerator: x, gpus: 2, price_per_gpu_hour: 3, tokens_per_s: 100, preemption_rate_per_hour: 0.5}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpus:", "gpu:", r"groups\.0\.gpu: .*'gpus'"),
        ("groups:", "group:", r"group: .*'groups'"),
        ("gpus: 2", "gpus: none", r"groups\.0\.gpus: "),
        ("gpus: 2", "gpus: 2, gpus_per_engine: 4", r"groups\.0: 2 GPUs"),
        ("tokens_per_s: 100", "prefill_tokens_per_s: 1", r"groups\.0: prefill_tokens_per_s"),
        ("groups:", "assume: {output_token: {}}\ngroups:", r"assume\.output_token: .*'output_tokens'"),
        ("groups:", "encode: {worker: 1, price_per_worker_hour: 1}\ngroups:", r"encode\.worker: .*'workers'"),
        ("groups:", "serving: {requests_per_s: 0}\ngroups:", r"serving\.requests_per_s: "),
        ("groups:", "groups: [", "YAML"),
        (FLEET, "", "valid dictionary"),
    ],
)
def test_mistakes_in_a_fleet_file_name_the_key(tmp_path, old, new, message):
    file = tmp_path / "fleet.yaml"
    file.write_text(FLEET.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        load_fleet(file)


def test_groups_need_names_of_their_own():
    with pytest.raises(ValueError, match="same name"):
        fleet(group("a"), group("a"))


def test_the_example_fleet_prices_every_part():
    example = load_fleet(EXAMPLE)
    assert len(example.groups) == 1
    assert None not in (example.encode, example.publish, example.serving)


@pytest.fixture
def command(tmp_path):
    """Runs the command over a finished run of 40 users, in 2 shards of 20 rows and 4000 tokens each."""
    workspace = Workspace(tmp_path / "ws")
    for number in range(2):
        counts = {"rows_asked": 20, "prompt_tokens": 2000, "output_tokens": 4000}
        write_shard(workspace, "knowledge/f", "generate", f"user/0000000{number}", 2048, 20, 40.0, 40.0 * (number + 1),
                    counts)  # fmt: skip
    finish(workspace, "generate", {}, {"knowledge": "knowledge/f"}, 80)
    (tmp_path / "recipe.yaml").write_text(
        "{name: demo, scenario: movies, workspace: elsewhere, shard_rows: 36, source: {type: movielens-100k}, "
        "engine: {type: echo}}"
    )
    (tmp_path / "fleet.yaml").write_text(FLEET)

    def run(*switches, **changes):
        given = {"workspace": workspace.root, "fleet": tmp_path / "fleet.yaml", "users": "3.6e3"} | changes
        options = [f"--{name}={value}" for name, value in given.items()]
        with pytest.raises(SystemExit) as ended:
            app(["plan", str(tmp_path / "recipe.yaml"), *options, *switches])
        return ended.value.code

    return run


def test_the_command_says_what_it_extrapolates_from_and_what_is_missing(command, capsys):
    assert command() == 0
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    assert "extrapolated from 40 users (finished " in first
    assert first.endswith("ws/knowledge/f")
    for part in (
        "3,600 users, 0 items, individual, 0 refreshes",
        "GPU-hours",
        "not planned: collective",
        "encode: cost;",
    ):
        assert part in out
    command(users="36")
    assert "1 shards for 2 engines" in capsys.readouterr().out


def test_json_is_every_figure_alone_on_standard_output(command, capsys):
    assert command("--json", refreshes="2", **{"acting-share": "0.5"}) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["estimate"]["texts"] == {"user": 3600 + 2 * 1800}
    # 7200 s and twice 3600 s of an engine in shards of 72 s, each preemption loses half of one; 3 per GPU-hour.
    expected = 3 * 14_400 / 3600 / (1 - 0.5 * 36 / 3600)
    assert figures["estimate"]["figures"]["cost"] == pytest.approx([expected] * 3)
    assert [step["name"] for step in figures["savings"]][:2] == [
        "regenerate everything each time", "keep texts with unchanged prompts"
    ]  # fmt: skip
    assert figures["workload"]["texts"]["user"]["output_tokens"] == [200.0, 200.0, 200.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": "many"}, "'many'"),
        ({"users": "0"}, "cannot be planned"),
        ({"policy": "colective"}, "'collective'"),
        ({"refreshes": "3"}, "--acting-share"),
        ({"fleet": "missing.yaml"}, "missing.yaml: cannot be read"),
        ({"workspace": "/nowhere/at/all"}, "Run a small recipe first"),
    ],
)
def test_mistakes_end_in_one_plain_line(command, capsys, changes, message):
    assert command(**changes) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(("text", "rows"), [("1e8", 10**8), ("1.5e3", 1500), ("1_000", 1000)])
def test_row_counts_are_read_as_people_write_them(text, rows):
    assert row_count(text) == rows


@pytest.mark.parametrize("text", ["", "1.5", "-1", "nan", "inf", "1e400", "ten"])
def test_what_is_not_a_row_count_is_refused(text):
    with pytest.raises(RecipeError, match="Write a whole number"):
        row_count(text)
