"""Speeds worked out by hand from cards."""

import pytest

from owlrec.ops.report import throughput
from owlrec.shards import Card


def shard(worker: str, began: float, seconds: float, tokens: int, **more: int) -> Card:
    counts = {"prompt_tokens": 1, "output_tokens": tokens, **more}
    return Card(
        stage="generate", shard=f"user/{began:08.0f}", fingerprint="f", counts=counts, seconds=seconds,
        finished=began + seconds, worker=worker,
    )  # fmt: skip


def test_tokens_are_spread_over_the_time_that_they_took() -> None:
    rates = throughput([shard("a", 0, 120, 1200), shard("b", 60, 60, 600)])
    assert list(rates.over_time.values()) == pytest.approx([10.0] * 6 + [20.0] * 6)
    assert next(iter(rates.over_time)) == "0.0 to 0.2 min"
    assert rates.by_replica == pytest.approx({"a": 10.0, "b": 10.0})


def test_a_short_job_keeps_its_slices_apart() -> None:
    rates = throughput([shard("a", 0, 6, 60)])
    assert list(rates.over_time.values()) == pytest.approx([10.0] * 12)
    assert next(iter(rates.over_time)) == "0.0 to 0.5 s"


def test_replicas_speed_counts_the_gap_between_its_shards() -> None:
    rates = throughput([shard("a", 0, 10, 300), shard("a", 20, 10, 300)])
    assert rates.by_replica == pytest.approx({"a": 20.0})


def test_flags_and_actions_add_up_and_a_job_without_tokens_has_no_speed() -> None:
    shards = [shard("a", 0, 0, 0, flag_empty=2), shard("a", 0, 1, 0, flag_empty=1, quality_dropped=1)]
    rates = throughput(shards)
    assert (rates.texts_by_flag, rates.actions) == ({"empty": 3}, {"dropped": 1})
    assert not rates.over_time
    assert throughput([]).by_replica == {}
