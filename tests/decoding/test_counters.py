"""Counters of several engines add up, and speak of all steps."""

import math

import pytest

from owlrec_decoding.controller import DecoderCounters, StepSums, add_counters


def test_counters_of_two_engines_add_up() -> None:
    one = DecoderCounters(
        counts={"rows": 10, "tokens": 25, "drafted": 40},
        by_rows={4: StepSums(steps=5, tokens=20, seconds=1.0, plain_s=2.5), 1: StepSums(steps=1, tokens=5, seconds=1)},
    )
    two = DecoderCounters(counts={"rows": 30, "tokens": 35, "hits_own": 3}, by_rows={4: StepSums(steps=1, seconds=1)})
    both = add_counters([one, two])
    assert both.counts == {"rows": 40, "tokens": 60, "drafted": 40, "hits_own": 3}
    assert both.tokens_per_step == pytest.approx(1.5)
    assert list(both.by_rows) == [1, 4]
    assert both.by_rows[4] == StepSums(steps=6, tokens=20, seconds=2.0, plain_s=2.5)
    assert both.by_rows[4].speed_up == pytest.approx(1.25)
    assert DecoderCounters.model_validate_json(both.model_dump_json()) == both


def test_nothing_counted_gives_no_figure() -> None:
    assert math.isnan(DecoderCounters().tokens_per_step)
    assert math.isnan(StepSums().speed_up)
    assert add_counters([]) == DecoderCounters()


def test_the_measured_speed_up_compares_stretches_of_one_engine() -> None:
    counts = {"yardstick_plain_tokens": 64, "yardstick_plain_s": 32.0, "yardstick_drafting_tokens": 600}
    assert DecoderCounters(counts={**counts, "yardstick_drafting_s": 100.0}).measured_speed_up == pytest.approx(3.0)
    assert math.isnan(DecoderCounters(counts={"steps": 5}).measured_speed_up)
