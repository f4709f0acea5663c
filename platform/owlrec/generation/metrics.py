"""A generation job as metrics of the Ray cluster, which every node's agent exposes to Prometheus.

`ray_owlrec_generation_rows_total{engine="…"}` and its kin grow shard by shard; so does the time since the engine began
to load its model, and what that costs where the recipe names a price.
"""

import time
from typing import Any

from owlrec.generation.shards import ShardManifest

_COUNTS = {
    "rows": "Rows written as knowledge",
    "dead_rows": "Rows sent to the dead letters",
    "prompt_tokens": "Tokens read",
    "output_tokens": "Tokens written",
    "shards": "Shards finished",
    "engine_seconds": "Time since the engine began to load its model, as of its last shard",
    "cost": "What that time costs, in the currency of generate.price_per_replica_hour",
}


class GenerationMetrics:
    """One engine's metrics; made inside a Ray worker."""

    def __init__(self, engine: str, price_per_hour: float | None = None) -> None:
        """engine: tells engines of a cluster apart. price_per_hour: of one engine."""
        from ray.util.metrics import Counter, Gauge

        self._metrics: dict[str, Any] = {
            name: Counter(f"owlrec_generation_{name}", about, ("engine",)) for name, about in _COUNTS.items()
        }
        self._flags = Counter("owlrec_generation_flags", "Texts by quality flag", ("engine", "flag"))
        self._at_hand = Gauge("owlrec_generation_shards_at_hand", "Shards begun and not finished", ("engine",))
        self._tags = {"engine": engine}
        self._price_per_s = (price_per_hour or 0.0) / 3600
        self._shards, self._counted = 0, time.monotonic()

    def begin(self) -> None:
        """A shard is begun."""
        self._shards += 1
        self._at_hand.set(self._shards, self._tags)

    def end(self) -> None:
        """A shard that was begun is finished, or given up."""
        self._shards -= 1
        self._at_hand.set(self._shards, self._tags)

    def update(self, manifest: ShardManifest) -> None:
        """Adds a shard that this engine has finished."""
        now = time.monotonic()
        seconds, self._counted = now - self._counted, now
        counts = {
            "engine_seconds": seconds,
            "cost": seconds * self._price_per_s,
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
