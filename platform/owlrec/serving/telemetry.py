"""What an application says about itself while it serves: one line of log a request, and numbers for Prometheus.

Neither holds what was asked about or answered: a request is logged under its route, never under its path or body.
"""

import json
import logging
from collections.abc import Mapping
from typing import Protocol

_log = logging.getLogger("owlrec.serving.access")


class Telemetry(Protocol):
    """Where numbers go."""

    def count(self, name: str, n: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """Adds to a counter."""

    def time(self, stage: str, seconds: float) -> None:
        """How long a stage of one request took."""

    def gauge(self, name: str, value: float) -> None:
        """What something stands at."""


class NoTelemetry:
    """Numbers go nowhere."""

    def count(self, name: str, n: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """See Telemetry.count."""

    def time(self, stage: str, seconds: float) -> None:
        """See Telemetry.time."""

    def gauge(self, name: str, value: float) -> None:
        """See Telemetry.gauge."""


def log_request(*, request_id: str, key: str, method: str, route: str, status: int, seconds: float) -> None:
    """One JSON line. route: the template of the path. key: the name of the API key, never the key."""
    line = {
        "request_id": request_id,
        "key": key,
        "method": method,
        "route": route,
        "status": status,
        "ms": round(seconds * 1e3, 2),
    }
    _log.info(json.dumps(line))
