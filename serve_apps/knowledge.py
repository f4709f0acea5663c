"""Knowledge lookup as a Ray Serve application: `serve run serve_apps.knowledge:app workspace=runs/movielens-demo`.

Every replica of a machine maps the same release files, so that replicas cost memory for their process alone. Off
loopback it refuses to start without API keys: `serve_apps.knowledge:app workspace=… keys_file=keys.txt`, or the
lines of a key file in OWLREC_API_KEYS.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.config import BackpressureConfig

from owlrec.config import Config
from owlrec.machine import api_keys
from owlrec.releases.release import ReleaseSource, open_store
from owlrec.serving.guard import KeyRing, Limits
from owlrec.serving.knowledge_api import KnowledgeConfig, build_knowledge_api
from owlrec.serving.served import ServedReleases, SimilarEntities, WorkspaceReleases
from owlrec.workspace import Workspace
from serve_apps.binding import asked_to_stop, refuse_open_binding
from serve_apps.telemetry import RayTelemetry, log_with_serve

_AT_ONCE_LOCAL = 4  # a lookup in a mapped file computes: more at once only wait for each other
_AT_ONCE_REMOTE = 32  # one in a database waits


class KnowledgeArgs(Config):
    """The arguments of `app`, as `key=value` on the command line or under `args` in a Serve configuration."""

    workspace: str  # a folder or URI; with `store`, only the name under which indexes are cached
    store: str | None = None  # redis://… that `owlrec release push` published to; None = LMDB of the workspace
    keys_file: str | None = None
    verify: bool = False
    max_active: int = Field(64, ge=1)  # of one replica; beyond it and Serve's queue, requests get 503
    max_body_bytes: int = Field(256 * 1024, ge=1)
    timeout_s: float = Field(5.0, gt=0)
    refresh_s: float = Field(1.0, gt=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0)


@serve.ingress()
class KnowledgeReplica:
    """One replica."""

    def __init__(self, args: dict[str, Any]) -> None:
        """args: of KnowledgeArgs."""
        settings = KnowledgeArgs.model_validate(args)
        self._keys = KeyRing(settings.keys_file, api_keys())
        refuse_open_binding(self._keys)
        log_with_serve()
        self._config = KnowledgeConfig(
            limits=Limits(
                max_active=settings.max_active,
                at_once=_AT_ONCE_REMOTE if settings.store else _AT_ONCE_LOCAL,
                max_body_bytes=settings.max_body_bytes,
                timeout_s=settings.timeout_s,
            ),
            refresh_s=settings.refresh_s,
        )
        self._served = ServedReleases(_source(settings))
        self._similar = SimilarEntities(settings.store or settings.workspace)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from serve_apps.gate import GATE  # here: this class travels to its process by value, and the gate must not

        telemetry, limits = RayTelemetry("knowledge"), self._config.limits
        refused = {"route": "unknown", "status": "503"}
        GATE.narrow(limits.max_active, limits.retry_after_s, lambda: telemetry.count("requests", tags=refused))
        return build_knowledge_api(self._served, self._similar, self._keys, self._config, telemetry, asked_to_stop)


def app(args: KnowledgeArgs) -> serve.Application:
    """Builds the application."""
    scaling = {
        "min_replicas": args.min_replicas,
        "max_replicas": max(args.min_replicas, args.max_replicas),
        "target_ongoing_requests": max(1.0, args.max_active / 4),
        "upscale_delay_s": 5,
        "downscale_delay_s": 120,
    }
    deployment = serve.deployment(
        KnowledgeReplica,
        name="Knowledge",
        ray_actor_options={"num_cpus": args.num_cpus},
        autoscaling_config=scaling,
        max_ongoing_requests=args.max_active,
        max_queued_requests=args.max_active,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=20,
        health_check_period_s=5,
        health_check_timeout_s=10,
        logging_config={"encoding": "JSON", "enable_access_log": False},  # the guard writes its own, without paths
    )
    application: serve.Application = deployment.bind(args.model_dump())
    return application


def _source(settings: KnowledgeArgs) -> ReleaseSource:
    if settings.store:
        return open_store(settings.store)
    return WorkspaceReleases(Workspace(settings.workspace), verify=settings.verify)
