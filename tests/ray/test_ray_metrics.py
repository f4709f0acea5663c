"""The counters of an engine reach the page that Prometheus reads, on a real cluster."""

import re
import time
import urllib.request
from typing import Any

import pytest

from owlrec.decoding.counters import DecoderCounters
from owlrec.generation.shards import Shard, ShardManifest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def test_decoder_counters_are_exposed_once_each() -> None:
    first = DecoderCounters(counts={"steps": 5, "accepted": 12, "hits_own": 2, "retrieval_s": 0.25, "tokens_live": 9})
    later = DecoderCounters(counts={"steps": 8, "accepted": 12, "hits_own": 3, "retrieval_s": 0.5, "tokens_live": 4})
    expected = {"steps_total": 8.0, "accepted_total": 12.0, "retrieval_seconds_total": 0.5, "hits_total own": 3.0}
    # tokens_live is no counter, since it may fall, and is left out
    assert exposed("decoder", expected, first, later) == expected


def test_shards_of_a_generation_job_add_up() -> None:
    manifest = ShardManifest(
        shard=Shard(kind="user", part="00000000.parquet", input_fingerprint="f"), job_fingerprint="f",
        rows_in=10, rows_out=9, rows_dead=1, sha256="", dead_sha256="", prompt_tokens=500, output_tokens=90,
        accepted=0, seconds=1.0, finished=1.0, engine="engine-1", flags={"cut_off": 4},
    )  # fmt: skip
    counts = {"rows": 18, "dead_rows": 2, "prompt_tokens": 1000, "output_tokens": 180, "shards": 2}
    expected = {f"{name}_total": float(n) for name, n in counts.items()} | {"flags_total cut_off": 8.0}
    found = exposed("generation", expected, manifest, manifest, ignoring=("engine_seconds_total", "cost_total"))
    assert found == expected


def exposed(what: str, expected: dict[str, float], *updates: Any, ignoring: tuple[str, ...] = ()) -> dict[str, float]:
    """What the node's metrics page says after an actor has counted `updates`, as soon as it is what is expected."""
    import ray

    @ray.remote(num_cpus=0)
    class Runner:
        def __init__(self) -> None:
            from owlrec.generation.decoder_metrics import DecoderMetrics
            from owlrec.generation.metrics import GenerationMetrics

            self.metrics: Any = {"decoder": DecoderMetrics, "generation": GenerationMetrics}[what]("engine-1")

        def count(self, *parts: Any) -> None:
            for part in parts:
                self.metrics.update(part)

    runner = Runner.remote()
    ray.get(runner.count.remote(*updates))
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, found = time.monotonic() + 40, {}
    while found != expected and time.monotonic() < deadline:
        time.sleep(0.5)
        page = urllib.request.urlopen(url, timeout=5).read().decode()
        found = {name: value for name, value in _metrics(what, page).items() if name not in ignoring}
    return found


def _metrics(what: str, page: str) -> dict[str, float]:
    found = {}
    for name, labels, value in re.findall(rf"^ray_owlrec_{what}_(\w+){{(.*)}} (\S+)$", page, re.MULTILINE):
        if 'engine="engine-1"' in labels:  # other tests' engines count on the same page
            kind = re.search(r'(?:source|flag)="(\w+)"', labels)
            found[f"{name} {kind[1]}" if kind else name] = float(value)
    return found
