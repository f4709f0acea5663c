"""The decoder's counters as metrics of the Ray cluster, which every node's agent exposes to Prometheus.

vLLM's own speculation metrics leave out steps without drafts; these count every step. Ray prefixes `ray_` and appends
`_total`: `ray_owlrec_decoder_accepted_total{engine="…"}`.
"""

from typing import Any

from owlrec.decoding.counters import DecoderCounters

_COUNTS = {
    "steps": "Steps of the engine",
    "rows": "Rows of all steps",
    "tokens": "Tokens emitted",
    "drafted": "Draft tokens verified",
    "accepted": "Draft tokens accepted",
    "relaxed": "Draft tokens accepted by the relaxed rule alone",
    "unknown_pools": "Pools named by requests that are not there",
    "bad_rules": "Relaxed rules of requests that were refused",
    "retrieval_s": "Seconds spent on retrieval",
    "verification_s": "Seconds spent on verification",
}
_HITS = "hits_"  # and the source that gave the drafts


class DecoderMetrics:
    """One engine's metrics; made inside a Ray worker."""

    def __init__(self, engine: str) -> None:
        """engine: tells engines of a cluster apart."""
        from ray.util.metrics import Counter

        self._metrics: dict[str, Any] = {
            name: Counter(f"owlrec_decoder_{_full(name)}", about, ("engine",)) for name, about in _COUNTS.items()
        }
        self._hits = Counter(
            "owlrec_decoder_hits", "Drafts proposed, by the source that gave them", ("engine", "source")
        )
        self._tags = {"engine": engine}
        self._before: dict[str, float] = {}

    def update(self, counters: DecoderCounters) -> None:
        """Adds what came since the last call."""
        for name, value in counters.counts.items():
            grown = value - self._before.get(name, 0)
            self._before[name] = value
            if grown <= 0:
                continue
            if name.startswith(_HITS):
                self._hits.inc(grown, {**self._tags, "source": name.removeprefix(_HITS)})
            elif name in self._metrics:
                self._metrics[name].inc(grown, self._tags)


def _full(name: str) -> str:
    return f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name
