"""An application's metrics in the Ray cluster, which every node's agent exports to Prometheus.

`ray_owlrec_serving_requests_total{app="knowledge",route="…",status="200"}`, `…_hits_total{kind}`, `…_misses_total`,
`…_seconds_bucket{stage}` (request, lookup, …), `…_release_age_s` and others.
"""

import logging
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

_BOUNDS_S = [0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 5.0]
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests by route and status", ("route", "status")),
    "hits": ("Requested ids with knowledge", ("kind",)),
    "misses": ("Requested ids without knowledge", ("kind",)),
    "swaps": ("Release swaps", ()),
    "degraded": ("Rankings returned without the LLM, by reason", ("reason",)),
}
_GAUGES = {
    "release_age_s": "Age of the current release",
    "release_texts": "Users, items and cohorts with a text in the current release",
    "release_error": "1 if the current release cannot be served",
}


class RayTelemetry:
    """Telemetry of one replica (owlrec.serving.guard)."""

    def __init__(self, app: str) -> None:
        """app: distinguishes applications; Ray itself distinguishes replicas."""
        self._app = {"app": app}
        self._counters = {
            name: Counter(f"owlrec_serving_{name}", about, ("app", *tags)) for name, (about, tags) in _COUNTERS.items()
        }
        self._gauges = {name: Gauge(f"owlrec_serving_{name}", about, ("app",)) for name, about in _GAUGES.items()}
        self._seconds = Histogram("owlrec_serving_seconds", "Time by stage", _BOUNDS_S, ("app", "stage"))

    def count(self, name: str, n: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """Adds to a counter."""
        self._counters[name].inc(n, {**self._app, **(tags or {})})

    def time(self, stage: str, seconds: float) -> None:
        """Duration of one stage of a request."""
        self._seconds.observe(seconds, {**self._app, "stage": stage})

    def gauge(self, name: str, value: float) -> None:
        """Current value of a gauge."""
        self._gauges[name].set(value, self._app)


def log_with_serve() -> None:
    """Sends the log lines of owlrec.serving to Serve's own logs: JSON, one file per replica. For replicas."""
    ours = logging.getLogger("owlrec.serving")
    ours.handlers = logging.getLogger("ray.serve").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False
