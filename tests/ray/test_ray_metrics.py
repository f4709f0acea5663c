"""The counters of a worker reach the page that Prometheus reads, on a real cluster."""

import re
import time
import urllib.request
from typing import Any

import pytest

from owlrec.shards import Card
from owlrec_decoding.controller import DecoderCounters

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
NAME = "worker-1"


def test_decoder_counters_are_exposed_once_each() -> None:
    first = DecoderCounters(counts={"steps": 5, "accepted": 12, "hits_own": 2, "retrieval_s": 0.25, "tokens_live": 9})
    later = DecoderCounters(counts={"steps": 8, "accepted": 12, "hits_own": 3, "retrieval_s": 0.5, "tokens_live": 4})
    expected = {"steps_total": 8.0, "accepted_total": 12.0, "retrieval_seconds_total": 0.5, "hits_total own": 3.0}
    # tokens_live is no counter, since it may fall, and is left out
    assert exposed("decoder", expected, first, later) == expected


def test_shards_of_a_stage_add_up() -> None:
    card = Card(
        stage="generate", shard="user/00000000", fingerprint="f", rows_in=10, rows_out=9, rows_dead=1,
        counts={"prompt_tokens": 500, "output_tokens": 90, "flag_cut_off": 4, "quality_fixed": 0, "decoder": "{}"},
        files={}, seconds=1.0, finished=1.0, worker="worker-1",
    )  # fmt: skip
    expected = {"rows_total": 18.0, "dead_rows_total": 2.0, "shards_total": 2.0}
    expected |= {f"counts_total {name}": n for name, n in (("prompt_tokens", 1000.0), ("output_tokens", 180.0))}
    expected["counts_total flag_cut_off"] = 8.0  # what did not happen and what is text is not exported
    expected["shards_in_flight"] = 0.0
    metrics = exposed("stage", expected, card, card)
    assert metrics.pop("cost_total") == pytest.approx(2 * metrics.pop("worker_seconds_total"))  # at 7200 an hour
    assert metrics == expected


def exposed(what: str, expected: dict[str, float], *updates: Any) -> dict[str, float]:
    """What the node's metrics page says after an actor has counted `updates`, as soon as `expected` is part of it."""
    import ray

    @ray.remote(num_cpus=0)
    class Runner:
        def count(self, *parts: Any) -> None:
            from owlrec.generation.job import DecoderMetrics
            from owlrec.runner import StageMetrics

            if what == "decoder":
                decoder = DecoderMetrics(NAME)
                for part in parts:
                    decoder.update(part)
                return
            stage = StageMetrics("generate", NAME, price_per_hour=7200.0)
            for part in parts:
                stage.begin()
                stage.update(part)
                stage.end()

    runner = Runner.remote()
    ray.get(runner.count.remote(*updates))
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, metrics = time.monotonic() + 40, dict[str, float]()
    while not expected.items() <= metrics.items() and time.monotonic() < deadline:
        time.sleep(0.5)
        metrics = _metrics(what, urllib.request.urlopen(url, timeout=5).read().decode())
    return metrics


def _metrics(what: str, page: str) -> dict[str, float]:
    metrics = {}
    for name, labels, value in re.findall(rf"^ray_owlrec_{what}_(\w+){{(.*)}} (\S+)$", page, re.MULTILINE):
        if f'="{NAME}"' in labels:  # other tests' workers count on the same page
            what_counted = re.search(r'(?:source|count)="(\w+)"', labels)
            metrics[f"{name} {what_counted[1]}" if what_counted else name] = float(value)
    return metrics
