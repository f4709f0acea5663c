"""An application's numbers as metrics of the Ray cluster, which every node's agent exposes to Prometheus.

`ray_owlrec_serving_requests_total{app="knowledge",route="…",status="200"}`, `…_hits_total{kind}`, `…_misses_total`,
`…_seconds_bucket{stage}` (request, lookup, …), `…_release_age_s` and their kin.
"""

import logging
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

_BOUNDS_S = [0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 5.0]
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests by route and status", ("route", "status")),
    "hits": ("Ids that something was known of", ("kind",)),
    "misses": ("Ids that nothing was known of", ("kind",)),
    "swaps": ("Releases that took the place of another", ()),
    "degraded": ("Rankings that went out without the LLM, by reason", ("reason",)),
}
_GAUGES = {
    "release_age_s": "Age of the current release",
    "release_texts": "Users, items and cohorts that the current release has a text of",
    "release_error": "1 where the current release cannot be served",
}


class RayTelemetry:
    """Telemetry of one replica (owlrec.serving.guard)."""

    def __init__(self, app: str) -> None:
        """app: tells applications apart; Ray itself tells replicas apart."""
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
        """How long a stage of one request took."""
        self._seconds.observe(seconds, {**self._app, "stage": stage})

    def gauge(self, name: str, value: float) -> None:
        """What something stands at."""
        self._gauges[name].set(value, self._app)


def log_with_serve() -> None:
    """Sends the lines of owlrec.serving where Serve's own go: JSON, a file a replica. For replicas."""
    ours = logging.getLogger("owlrec.serving")
    ours.handlers = logging.getLogger("ray.serve").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False
