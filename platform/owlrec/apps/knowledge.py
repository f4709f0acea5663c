"""The Ray Serve applications that read a release, knowledge lookup and the explorer, and what all replicas share."""

import asyncio
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import Field
from ray import serve, util
from ray._private import worker
from ray.serve import context
from ray.serve._private import replica
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.util.metrics import Counter, Gauge, Histogram

from owlrec.config import Config
from owlrec.errors import ServingError
from owlrec.machine import api_keys
from owlrec.releases.release import ReleaseSource, open_store
from owlrec.releases.similar import faiss_or_none
from owlrec.serving.explorer.pages import build_explorer
from owlrec.serving.guard import AuditLog, Limits, check_binding
from owlrec.serving.keys import KeyRing
from owlrec.serving.knowledge_api import KnowledgeConfig, build_knowledge_api
from owlrec.serving.questions import WorkspaceTables
from owlrec.serving.schemas import Rank, RankAnswer
from owlrec.serving.served import PINNED_S, ServedReleases, WorkspaceReleases
from owlrec.workspace import Workspace

# -------------------------------------------------------------------------------------------------------------- binding
# The address of Serve's HTTP server, and the refusal to serve it openly.


def refuse_open_binding(keys: KeyRing) -> None:
    """Raises ServingError if other machines may send requests and no API key is required. For replicas."""
    # Serve gives an application no information on its listeners: this is what `serve status` itself uses (Ray 2.60).
    problem = check_binding(context._get_global_client().http_config.host, keys)
    if problem:
        raise ServingError(problem)
    if util.get_node_ip_address() == "127.0.0.1":
        _keep_handles_on_loopback()


def _keep_handles_on_loopback() -> None:
    """Serve's replicas listen on all interfaces for calls of other replicas (Ray 2.60, serve/_private/replica.py,
    _on_initialized, after the application is built): on one machine, loopback is enough.
    """
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


# ------------------------------------------------------------------------------------------------------------- stopping
# Whether Serve has requested this replica to stop.


def asked_to_stop() -> bool:
    """True after a stop request: current requests finish, but load balancers should send no new ones. For replicas."""
    # Serve informs an application only after draining: its own health page uses this (Ray 2.60).
    return any(actor._replica_impl._shutting_down for actor in worker.global_worker.actors.values())


def ongoing_counter() -> Callable[[int], None] | None:
    """Adds to the requests under way that Serve sees, which it scales by and waits for before a stop. For replicas.

    None with another version of Ray than this was written for: then all requests go through Serve's own handling, which
    takes about as long as a lookup (measured with Ray 2.60: route matching, metadata, a log record, context managers).
    """
    if not ray.__version__.startswith("2.60."):
        return None
    managers = [actor._replica_impl._metrics_manager for actor in worker.global_worker.actors.values()]

    def count(change: int) -> None:
        for manager in managers:
            manager._num_ongoing_requests += change

    return count if len(managers) == 1 else None


# ------------------------------------------------------------------------------------------------------------ telemetry
# An application's metrics in the Ray cluster, which every node's agent exports to Prometheus.
#
# `ray_owlrec_serving_requests_total{app="knowledge",route="…",status="200"}`, `…_hits_total{kind}`, `…_misses_total`,
# `…_seconds_bucket{stage}` (request, lookup, …), `…_release_age_s` and others.


_BOUNDS_S = [0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 5.0]
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests by route and status", ("route", "status")),
    "hits": ("Requested ids with knowledge", ("kind",)),
    "misses": ("Requested ids without knowledge", ("kind",)),
    "swaps": ("Release swaps", ()),
    "follow_failures": ("Exceptions in following the current release", ()),
    "degraded": ("Rankings returned without the LLM, by reason", ("reason",)),
}
_FLUSH_S = 1.0
_FLUSHED_AT_ONCE = 100
_GAUGES = {
    "release_looked": "When the current release was last looked for, in seconds since 1970",
    "release_age_s": "Age of the current release",
    "release_texts": "Users, items and cohorts with a text in the current release",
    "release_error": "1 if the current release cannot be served",
}


class RayTelemetry:
    """Telemetry of one replica (owlrec.serving.guard): added up in the process, and handed to Ray each second.

    A Ray metric takes about 5 µs a record, as long as a lookup.
    """

    def __init__(self, app: str) -> None:
        """app: distinguishes applications; Ray itself distinguishes replicas."""
        self._app = {"app": app}
        self._counters = {
            name: Counter(f"owlrec_serving_{name}", about, ("app", *tags)) for name, (about, tags) in _COUNTERS.items()
        }
        self._gauges = {name: Gauge(f"owlrec_serving_{name}", about, ("app",)) for name, about in _GAUGES.items()}
        self._seconds = Histogram("owlrec_serving_seconds", "Time by stage", _BOUNDS_S, ("app", "stage"))
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._times: list[tuple[str, float]] = []
        self._flushing = False

    def count(self, name: str, n: float = 1, tags: Mapping[str, str] | None = None) -> None:
        """Adds to a counter."""
        with self._lock:
            key = name, tuple(tags.items()) if tags else ()
            self._counts[key] = self._counts.get(key, 0) + n
        self._flush_soon()

    def time(self, stage: str, seconds: float) -> None:
        """Duration of one stage of a request."""
        self._times.append((stage, seconds))
        self._flush_soon()

    def gauge(self, name: str, value: float) -> None:
        """Current value of a gauge."""
        self._gauges[name].set(value, self._app)

    def _flush_soon(self) -> None:
        if not self._flushing:
            with suppress(RuntimeError):  # outside of the event loop: with the next request
                asyncio.get_running_loop().call_later(_FLUSH_S, self._flush)
                self._flushing = True

    def _flush(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, {}
        for (name, tags), n in counts.items():
            self._counters[name].inc(n, {**self._app, **dict(tags)})
        times, self._times = self._times, []
        self._flush_times(times, {stage: {**self._app, "stage": stage} for stage, _ in times})

    def _flush_times(self, times: list[tuple[str, float]], tags: Mapping[str, dict[str, str]]) -> None:
        for stage, seconds in times[-_FLUSHED_AT_ONCE:]:
            self._seconds.observe(seconds, tags[stage])
        del times[-_FLUSHED_AT_ONCE:]
        if times:  # requests come in between
            asyncio.get_running_loop().call_soon(self._flush_times, times, tags)
        else:
            self._flushing = False


def audit_log(folder: str | None) -> AuditLog | None:
    """The audit log in a folder, with the secret of OWLREC_AUDIT_SECRET. For replicas."""
    return AuditLog(folder, os.environ.get("OWLREC_AUDIT_SECRET", "")) if folder else None


def answer_steadily() -> None:
    """For a replica whose requests take less than a millisecond: threads hand over the interpreter after 0.5 ms instead
    of 5, and garbage collection does not look at what was imported.
    """
    sys.setswitchinterval(0.0005)
    if faiss := faiss_or_none():
        faiss.omp_set_num_threads(1)  # the machine's other cores have replicas of their own
    gc.collect()
    gc.freeze()


def log_with_serve() -> None:
    """Sends the log lines of owlrec.serving to Serve's own logs: JSON, one file per replica. For replicas."""
    ours = logging.getLogger("owlrec.serving")
    ours.handlers = logging.getLogger("ray.serve").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False


# ------------------------------------------------------------------------------------------------------------ knowledge
# Knowledge lookup as a Ray Serve application: `serve run owlrec.apps.knowledge:app workspace=runs/movielens-demo`.
#
# Every replica of a machine maps the same release files, so that replicas cost memory for their process alone. Off
# loopback it refuses to start without API keys: `owlrec.apps.knowledge:app workspace=… keys_file=keys.txt`, or the
# lines of a key file in OWLREC_API_KEYS.


_AT_ONCE_LOCAL = 4  # a lookup in a mapped file computes: more at once only wait for each other
_AT_ONCE_REMOTE = 32  # one in a database waits
# Lookups run one after another, so few are under way at once unless requests wait. HAProxy sends 16 (haproxy.sh).
_TARGET_ONGOING = 4
_UNREADY_S = 60.0  # without any release, until Serve is told; a first deployment gets so long to be published to


class KnowledgeArgs(Config):
    """Arguments of `app`, as `key=value` on the command line or under `args` in a Serve configuration."""

    workspace: str  # a folder or URI; with `store`, only the name for cached indexes
    store: str | None = None  # redis://… with pushed releases; None = LMDB of the workspace
    keys_file: str | None = None
    audit: str | None = None  # folder of the audit log; None = none
    verify: bool = False
    max_active: int = Field(64, ge=1)  # per replica; beyond it and Serve's queue, requests get 503
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
        self._served = ServedReleases(_source(settings), pinned_s=PINNED_S)
        self._audit = audit_log(settings.audit)
        self._unready_since: float | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        from owlrec.serving.guard import GATE  # here, since this class is pickled by value and the gate must not be

        answer_steadily()
        telemetry, limits = RayTelemetry("knowledge"), self._config.limits
        refused = {"route": "unknown", "status": "503"}
        GATE.narrow(
            limits.max_active,
            limits.retry_after_s,
            lambda: telemetry.count("requests", tags=refused),
            lambda: self._served.unready,
            ongoing_counter(),
        )
        return build_knowledge_api(self._served, self._keys, self._config, telemetry, asked_to_stop, self._audit)

    def check_health(self) -> None:
        """Asked by Serve, which restarts a replica that fails: one that has stopped following the current release, or
        that has had none for a minute. Load balancers skip it at once, as long as `/-/healthz` is 503.
        """
        problem = self._served.unhealthy
        unready = self._served.unready if self._served.name is None else None
        self._unready_since = (self._unready_since or time.monotonic()) if unready else None
        if self._unready_since and time.monotonic() - self._unready_since > _UNREADY_S:
            problem = problem or unready
        if problem:
            raise ServingError(problem)


def app(args: KnowledgeArgs) -> serve.Application:
    """Builds the application."""
    scaling = {
        "min_replicas": args.min_replicas,
        "max_replicas": max(args.min_replicas, args.max_replicas),
        "target_ongoing_requests": _TARGET_ONGOING,
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
    return WorkspaceReleases(Workspace(settings.workspace), verify=settings.verify, similar=True)


# ------------------------------------------------------------------------------------------------------------- explorer
# The explorer as a Ray Serve application: `serve run owlrec.apps.knowledge:explorer_app workspace=runs/movielens-demo`.
#
# Pages for people, over the same release as lookups; off loopback a browser asks for a key (any name, the key as the
# password). It reads a workspace's tables as well, for names and histories.


class ExplorerArgs(Config):
    """Arguments of `app`, as `key=value` on the command line or under `args` in a Serve configuration."""

    workspace: str
    rank_app: str = "rank"  # name of the ranking application; if missing, the page says so
    keys_file: str | None = None
    audit: str | None = None  # folder of the audit log; None = none
    timeout_s: float = Field(10.0, gt=0)
    num_cpus: float = Field(0.1, ge=0)  # people rarely click


@serve.ingress()
class ExplorerReplica:
    """The only replica."""

    def __init__(self, args: dict[str, Any]) -> None:
        """args: of ExplorerArgs."""
        settings = ExplorerArgs.model_validate(args)
        self._keys = KeyRing(settings.keys_file, api_keys())
        refuse_open_binding(self._keys)
        log_with_serve()
        self._config = KnowledgeConfig(limits=Limits(max_active=16, timeout_s=settings.timeout_s))
        self._rank_app = settings.rank_app
        workspace = Workspace(settings.workspace)
        self._served = ServedReleases(WorkspaceReleases(workspace, similar=True))
        self._audit = audit_log(settings.audit)
        self._tables = WorkspaceTables(workspace)

    def __serve_build_asgi_app__(self) -> FastAPI:
        telemetry = RayTelemetry("explorer")
        return build_explorer(
            self._served, self._tables, self._keys, self._config, telemetry, self._rank, asked_to_stop, self._audit
        )

    async def _rank(self, asked: Rank) -> RankAnswer:
        try:
            handle = serve.get_app_handle(self._rank_app)
        except RayServeException:
            raise ServingError("no ranking application is deployed with this page") from None
        return RankAnswer.model_validate(await handle.rank.remote(asked.model_dump()))


def explorer_app(args: ExplorerArgs) -> serve.Application:
    """Builds the application."""
    deployment = serve.deployment(
        ExplorerReplica,
        name="Explorer",
        ray_actor_options={"num_cpus": args.num_cpus},
        max_ongoing_requests=16,
        max_queued_requests=64,
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    application: serve.Application = deployment.bind(args.model_dump())
    return application
