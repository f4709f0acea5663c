"""Calls of each policy, and savings, against numbers worked out by hand."""

import pytest

from owlrec.errors import RecipeError
from owlrec.ops.cost import (
    Estimate,
    FleetConfig,
    Horizon,
    KindFigures,
    Work,
    WorkloadFigures,
    levers,
    runs_of,
    stored_of,
)


def exactly(value):
    return Estimate(low=value, expected=value, high=value)


def kind(seconds):
    """A call that takes so long, and writes a token a second."""
    return KindFigures(
        rows=1, shards=1, prompt_tokens=exactly(10.0), output_tokens=exactly(float(seconds)),
        seconds=exactly(float(seconds)), knowledge_bytes=exactly(1.0), vector_bytes=None,
    )  # fmt: skip


def measured(**changes):
    kinds = {"user": kind(4), "item": kind(2), "cohort": kind(8), "refresh": kind(3)}
    figures = {"cohorts_per_user": 0.05, "cohorts_per_item": 0.01, "acting_share": 0.2, "calls_per_acting": 0.5}
    return WorkloadFigures(run="r", finished=0, kinds=kinds, tokens_per_s=exactly(1.0), **(figures | changes))


def fleet(**changes):
    group = {"name": "a", "accelerator": "x", "gpus": 1, "price_per_gpu_hour": 3600.0} | changes
    return FleetConfig(groups=[group])  # a GPU-second costs 1


HORIZON = Horizon(users=1000, items=100, refreshes=10)


def test_calls_by_policy():
    assert runs_of("individual", HORIZON, measured()).total == {"user": 1000 + 10 * 200, "item": 100}
    assert runs_of("collective", HORIZON, measured()).total == {"cohort": 11 * (50 + 1)}
    assert runs_of("streaming", HORIZON, measured()).total == {"user": 1000, "item": 100, "refresh": 10 * 100}


def test_what_is_said_goes_before_what_was_measured():
    asked = HORIZON.model_copy(
        update={"acting_share": 0.01, "cohorts": 7, "renewed_share": 0.5, "calls_per_acting": 1.0}
    )
    assert runs_of("individual", asked, measured()).total == {"user": 1000 + 10 * 10, "item": 100}
    assert runs_of("collective", asked, measured()).total == {"cohort": 7 + 10 * 4}
    assert runs_of("streaming", asked, measured()).total["refresh"] == 100


def test_a_single_run_needs_no_share_of_acting_users():
    once = Horizon(users=10, items=5)
    assert runs_of("streaming", once, measured(acting_share=None, calls_per_acting=None)).total == {
        "user": 10,
        "item": 5,
    }


def test_what_is_kept():
    assert stored_of("streaming", HORIZON, measured()) == ({"user": 1000, "item": 100}, 0)
    assert stored_of("collective", HORIZON, measured()) == ({"cohort": 51}, 1100)


@pytest.mark.parametrize(
    ("policy", "missing", "message"),
    [
        ("individual", {"acting_share": None}, "what share of the users acts"),
        ("streaming", {"calls_per_acting": None}, "never refreshed"),
        ("collective", {"cohorts_per_item": None}, "asked about no cohorts"),
    ],
)
def test_what_was_not_measured_is_asked_for(policy, missing, message):
    with pytest.raises(RecipeError, match=message):
        runs_of(policy, HORIZON, measured(**missing))


def saved(policy, machines, **changes):
    found, planned = levers(measured(**changes), machines, HORIZON, policy, Work(10))
    assert sum(lever.saved for lever in found) == pytest.approx(found[0].cost - planned.cost.expected)
    assert found[-1].cost == pytest.approx(planned.cost.expected)
    return {lever.name: lever.saved for lever in found}


def test_savings_add_up_from_everything_anew_to_the_plan():
    # Anew: 11 times 1,000 users of 4 s and 100 items of 2 s. Kept: 3,000 users and 100 items once.
    found = saved("streaming", fleet())
    anew, kept, streaming = 11 * (4000 + 200), 3000 * 4 + 200, 4000 + 200 + 1000 * 3
    assert found == pytest.approx(
        {
            "everything anew each time": 0,
            "texts with the same prompt kept": anew - kept,
            "streaming calls": kept - streaming,
        }
    )
    assert saved("collective", fleet()) == pytest.approx(
        {"everything anew each time": 0, "collective calls": anew - 11 * 51 * 8}
    )


def test_the_decoder_saves_what_it_saved_in_the_measured_run():
    found = saved("collective", fleet(), plain_factor=1.5)
    assert found["retrieval decoder"] == pytest.approx(0.5 * 11 * 51 * 8)


def test_spot_machines_save_the_price_less_what_is_lost():
    spot = {"price_per_gpu_hour": 1800.0, "on_demand_price_per_gpu_hour": 3600.0, "preemption_rate_per_hour": 9.0}
    seconds, shard_s = 11 * 51 * 8, 51 * 8 / 6  # of each of eleven runs, shards of at most ten rows
    lost = 9 / 3600 * shard_s / 2
    assert saved("collective", fleet(**spot))["spot machines"] == pytest.approx(
        seconds - seconds / (1 - lost) / 2, rel=1e-3
    )
