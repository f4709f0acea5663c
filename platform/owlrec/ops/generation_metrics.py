"""A generation job as metrics of the Ray cluster, which every node's agent exposes to Prometheus.

`ray_owlrec_generation_rows_total{engine="…"}` and its kin grow shard by shard; with prices, cost so far is a sum over
engines of their seconds.
"""

from typing import Any

from owlrec.generation.shards import ShardManifest

_COUNTS = {
    "rows": "Rows written as knowledge",
    "dead_rows": "Rows sent to the dead letters",
    "prompt_tokens": "Tokens read",
    "output_tokens": "Tokens written",
    "shards": "Shards finished",
}


class GenerationMetrics:
    """One engine's metrics; made inside a Ray worker."""

    def __init__(self, engine: str) -> None:
        """engine: tells engines of a cluster apart."""
        from ray.util.metrics import Counter

        self._metrics: dict[str, Any] = {
            name: Counter(f"owlrec_generation_{name}", about, ("engine",)) for name, about in _COUNTS.items()
        }
        self._flags = Counter("owlrec_generation_flags", "Texts by quality flag", ("engine", "flag"))
        self._tags = {"engine": engine}

    def update(self, manifest: ShardManifest) -> None:
        """Adds a shard that this engine has finished."""
        counts = {
            "rows": manifest.rows_out,
            "dead_rows": manifest.rows_dead,
            "prompt_tokens": manifest.prompt_tokens,
            "output_tokens": manifest.output_tokens,
            "shards": 1,
        }
        for name, value in counts.items():
            if value:
                self._metrics[name].inc(value, self._tags)
        for flag, number in manifest.flags.items():
            self._flags.inc(number, {**self._tags, "flag": flag})
