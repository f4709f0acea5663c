"""A stage as metrics of the Ray cluster, which every node's agent exposes to Prometheus.

`ray_owlrec_stage_rows_total{stage="generate", worker="…"}` and its kin grow shard by shard; so does the time since the
worker began, and what that costs where the recipe names a price.
"""

import time
from typing import Any

from owlrec.shards import Card

_COUNTS = {
    "rows": "Rows written",
    "dead_rows": "Rows sent to the dead letters",
    "shards": "Shards finished",
    "worker_seconds": "Time since the worker began to load its model, as of its last shard",
    "cost": "What that time costs, in the currency of the recipe's price_per_replica_hour",
}
_TAGS = ("stage", "worker")


class StageMetrics:
    """One worker's metrics; made inside a Ray worker."""

    def __init__(self, stage: str, worker: str, price_per_hour: float | None = None) -> None:
        """worker: tells workers of a cluster apart. price_per_hour: of one worker."""
        from ray.util.metrics import Counter, Gauge

        self._metrics: dict[str, Any] = {
            name: Counter(f"owlrec_stage_{name}", about, _TAGS) for name, about in _COUNTS.items()
        }
        self._counts = Counter("owlrec_stage_counts", "What else shards count: tokens, flags", (*_TAGS, "count"))
        self._in_flight = Gauge("owlrec_stage_shards_in_flight", "Shards begun and not finished", _TAGS)
        self._tags = {"stage": stage, "worker": worker}
        self._price_per_s = (price_per_hour or 0.0) / 3600
        self._shards, self._counted = 0, time.monotonic()

    def begin(self) -> None:
        """A shard is begun."""
        self._shards += 1
        self._in_flight.set(self._shards, self._tags)

    def end(self) -> None:
        """A shard that was begun is finished, or given up."""
        self._shards -= 1
        self._in_flight.set(self._shards, self._tags)

    def update(self, card: Card) -> None:
        """Adds a shard that this worker has finished."""
        now = time.monotonic()
        seconds, self._counted = now - self._counted, now
        values = {
            "worker_seconds": seconds,
            "cost": seconds * self._price_per_s,
            "rows": card.rows_out,
            "dead_rows": card.rows_dead,
            "shards": 1,
        }
        for name, value in values.items():
            if value:
                self._metrics[name].inc(value, self._tags)
        for count, number in card.counts.items():
            if isinstance(number, int | float) and number > 0:
                self._counts.inc(number, {**self._tags, "count": count})
