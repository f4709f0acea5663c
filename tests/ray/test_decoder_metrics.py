"""The decoder's counters reach the page that Prometheus reads, on a real cluster."""

import re
import time
import urllib.request

import pytest

from owlrec.decoding.counters import DecoderCounters

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def test_counters_of_an_engine_are_exposed_once_each() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Runner:
        def __init__(self) -> None:
            from owlrec.ops.decoder_metrics import DecoderMetrics

            self.metrics = DecoderMetrics("engine-1")

        def count(self, *parts: DecoderCounters) -> None:
            for part in parts:
                self.metrics.update(part)

    first = DecoderCounters(counts={"steps": 5, "accepted": 12, "hits_own": 2, "retrieval_s": 0.25, "tokens_live": 9})
    later = DecoderCounters(counts={"steps": 8, "accepted": 12, "hits_own": 3, "retrieval_s": 0.5, "tokens_live": 4})
    runner = Runner.remote()
    ray.get(runner.count.remote(first, later))
    expected = {"steps_total": 8.0, "accepted_total": 12.0, "retrieval_seconds_total": 0.5, "hits_total own": 3.0}
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, found = time.monotonic() + 40, {}
    while found != expected and time.monotonic() < deadline:
        time.sleep(0.5)
        found = _decoder_metrics(urllib.request.urlopen(url, timeout=5).read().decode())
    assert found == expected  # tokens_live is no counter, since it may fall, and is left out


def _decoder_metrics(page: str) -> dict[str, float]:
    found = {}
    for name, labels, value in re.findall(r"^ray_owlrec_decoder_(\w+){(.*)} (\S+)$", page, re.MULTILINE):
        assert 'engine="engine-1"' in labels
        source = re.search(r'source="(\w+)"', labels)
        found[f"{name} {source[1]}" if source else name] = float(value)
    return found
