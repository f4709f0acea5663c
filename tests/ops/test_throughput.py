"""Speeds worked out by hand from manifests."""

import pytest

from owlrec.generation.shards import Shard, ShardManifest
from owlrec.ops.throughput import throughput


def shard(engine: str, began: float, seconds: float, tokens: int, **more: object) -> ShardManifest:
    return ShardManifest(
        shard=Shard(kind="user", part=f"part-{began:05.0f}.parquet", input_fingerprint="f"), job_fingerprint="f",
        rows_in=1, rows_out=1, rows_dead=0, sha256="", dead_sha256="", prompt_tokens=1, output_tokens=tokens,
        accepted=0, seconds=seconds, finished=began + seconds, engine=engine, **more,
    )  # fmt: skip


def test_tokens_are_spread_over_the_time_that_they_took() -> None:
    found = throughput([shard("a", 0, 120, 1200), shard("b", 60, 60, 600)])
    assert list(found.over_time.values()) == pytest.approx([10.0] * 6 + [20.0] * 6)
    assert next(iter(found.over_time)) == "0.0 to 0.2 min"
    assert found.by_replica == pytest.approx({"a": 10.0, "b": 10.0})


def test_replicas_speed_counts_the_gap_between_its_shards() -> None:
    found = throughput([shard("a", 0, 10, 300), shard("a", 20, 10, 300)])
    assert found.by_replica == pytest.approx({"a": 20.0})


def test_flags_and_actions_add_up_and_a_job_without_tokens_has_no_speed() -> None:
    shards = [shard("a", 0, 0, 0, flags={"empty": 2}), shard("a", 0, 1, 0, flags={"empty": 1}, actions={"dropped": 1})]
    found = throughput(shards)
    assert (found.texts_by_flag, found.actions) == ({"empty": 3}, {"dropped": 1})
    assert not found.over_time
    assert throughput([]).by_replica == {}
