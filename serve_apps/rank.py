"""Ranking as a Ray Serve application: `serve run serve_apps.rank:app workspace=runs/shop artifact=models/…`.

Two deployments, each scaled for itself: the ingress, which opens an artifact that `owlrec export-ctr` wrote, follows
the current release and holds the deadline; and, with `recipe=shop.yaml`, the LLM that re-ranks (serve_apps.rank_llm).
The CTR model works in the ingress: its millisecond would cost three more as a call to another process.

A new artifact or adapter is taken in by `reconfigure`: change `user_config` in the Serve configuration and deploy; no
replica restarts. (A change of `args` builds the application again.)
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from owlrec.config import Config
from owlrec.ctr.scoring import Artifact, User
from owlrec.environment import api_keys
from owlrec.errors import ServingError
from owlrec.serving.guard import Limits
from owlrec.serving.keys import KeyRing
from owlrec.serving.live import LiveScorer
from owlrec.serving.problems import Problem
from owlrec.serving.rank_api import build_rank_api
from owlrec.serving.ranking import Cascade
from owlrec.serving.schemas import Rank
from owlrec.serving.served import REFRESH_S, WorkspaceReleases, following
from owlrec.serving.telemetry import Telemetry
from owlrec.workspace import Workspace
from serve_apps.binding import refuse_open_binding
from serve_apps.stopping import asked_to_stop
from serve_apps.telemetry import RayTelemetry, log_with_serve

_SCALING = {"min_replicas": 1, "upscale_delay_s": 5, "downscale_delay_s": 120}
# A replica that is stuck, or whose machine is gone, is noticed within 10 s.
_WATCHED: dict[str, Any] = {
    "health_check_period_s": 5,
    "health_check_timeout_s": 10,
    "logging_config": {"encoding": "JSON", "enable_access_log": False},
}


class RankArgs(Config):
    """The arguments of `app`, as `key=value` on the command line or under `args` in a Serve configuration."""

    workspace: str
    artifact: str  # relative to the workspace
    recipe: str | None = None  # with a `ranking:` section: its LLM re-ranks; None = no LLM
    adapter: str | None = None  # that `owlrec tune-ranker` wrote, relative to the workspace; None = the model as it is
    calibration: str | None = None  # of the LLM's scores; None = what was fitted with the adapter, if there is one
    keys_file: str | None = None
    max_active: int = Field(64, ge=1)  # of one replica of the ingress; beyond it and Serve's queue, requests get 503
    max_replicas: int = Field(1, ge=1)  # of the ingress, each with a CTR model
    max_llm_replicas: int = Field(1, ge=1)
    llm_cpus: float = Field(1.0, gt=0)  # of each LLM replica: the cores that its engine may use
    ctr_threads: int = Field(1, ge=1)  # of torch, in each replica
    num_cpus: float = Field(1.0, ge=0)  # of each replica of the ingress


class CtrModel:
    """An exported CTR model over the current release, as the cascade's backend.

    Without @serve.batch: a request is a batch already, of one user whose side is computed once, and waiting for the
    requests of others would cost each of them that wait.
    """

    def __init__(self, workspace: Workspace, telemetry: Telemetry) -> None:
        """workspace: that holds the artifacts."""
        self._workspace = workspace
        self._telemetry = telemetry
        self._scorer: LiveScorer | None = None
        self._following = AsyncExitStack()

    async def open(self, artifact: str) -> None:
        """Opens an artifact and the current release; requests at work keep the model that they began with."""
        opened = await asyncio.to_thread(Artifact.open, self._workspace, artifact)
        scorer, stack = LiveScorer(opened, WorkspaceReleases(self._workspace)), AsyncExitStack()
        await stack.enter_async_context(following(scorer.served, REFRESH_S, self._telemetry))
        before, self._scorer = self._scorer, scorer
        stopped, self._following = self._following, stack
        await stopped.aclose()
        if before is not None:
            before.served.close()

    def problem(self) -> str | None:
        """What keeps it from scoring; None where nothing does."""
        return self._scorer.problem() if self._scorer else "no model is loaded yet"

    async def score(self, asked: Rank, candidates: Sequence[int]) -> Sequence[float]:
        """See owlrec.serving.ranking.Backend. Raises Problem (503) without a release."""
        if self._scorer is None:
            raise Problem(503, "no model is loaded yet", headers={"Retry-After": "1"})
        history = asked.history
        user = User(
            user_id=asked.user_id,
            history=None if history is None else [b.item_id for b in history],
            ratings=None if history is None else [b.rating for b in history],
            taken=None if history is None else [b.taken for b in history],
            profile=asked.profile,
        )
        # Without a thread: torch lets go of the interpreter at every operation, and threads that fight for it halve the
        # rate of requests. It takes milliseconds, and nobody gains by taking turns.
        scores: list[float] = self._scorer.score(user, candidates).tolist()
        return scores


class _Remote:
    """A deployment as the cascade's backend. Giving up on an answer cancels it in the replica as well."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def score(self, asked: Rank, candidates: Sequence[int]) -> Sequence[float]:
        scores: Sequence[float] = await self._handle.score.remote(
            asked.model_dump(include={"user_id", "history", "profile"}), list(candidates)
        )
        return scores


@serve.ingress()
class RankReplica:
    """Takes requests, and holds their deadline."""

    def __init__(self, args: dict[str, Any], llm: DeploymentHandle | None = None) -> None:
        """args: of RankArgs. llm: a deployment with a method `score` like LlmReplica's; None where none ranks."""
        settings = RankArgs.model_validate(args)
        torch.set_num_threads(settings.ctr_threads)
        self._keys = KeyRing(settings.keys_file, api_keys())
        refuse_open_binding(self._keys)
        log_with_serve()
        self._limits = Limits(max_active=settings.max_active, timeout_s=35.0)  # above the longest deadline
        self._telemetry = RayTelemetry("rank")
        self._ctr = CtrModel(Workspace(settings.workspace), self._telemetry)
        self._cascade = Cascade(self._ctr, _Remote(llm) if llm else None, self._telemetry)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Takes in {"artifact": folder}."""
        await self._ctr.open(config["artifact"])

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_rank_api(self._cascade, self._keys, self._limits, self._telemetry, self._ready, asked_to_stop)

    async def rank(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What POST /v1/rank answers, for other applications of the cluster. Raises ServingError where it is 503."""
        try:
            return (await self._cascade.rank(Rank.model_validate(asked))).model_dump()
        except Problem as problem:  # which cannot travel between processes
            raise ServingError(str(problem)) from None

    async def _ready(self) -> str | None:
        return self._ctr.problem()


def app(args: RankArgs) -> serve.Application:
    """Builds the application: what `serve run` and `serve deploy` call, with one argument."""
    if args.recipe is None:
        return rank_application(args, None)
    from owlrec.serving.rankers import RankerChoice
    from serve_apps.rank_llm import llm_scorer

    choice = RankerChoice(adapter=args.adapter, calibration=args.calibration)
    return rank_application(args, llm_scorer(args.workspace, args.recipe, choice, args.max_llm_replicas, args.llm_cpus))


def rank_application(args: RankArgs, llm: serve.Application | None) -> serve.Application:
    """The ingress around a deployment that re-ranks. llm: has a method `score` like LlmReplica's."""
    busy = BackpressureConfig(status_code=503, retry_after_s=1)
    ingress = serve.deployment(
        RankReplica,
        name="Rank",
        ray_actor_options={"num_cpus": args.num_cpus},
        user_config={"artifact": args.artifact},
        autoscaling_config={
            **_SCALING,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": max(1.0, args.max_active / 4),
        },
        max_ongoing_requests=args.max_active,
        max_queued_requests=args.max_active,
        backpressure_config=busy,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=40,  # above the longest deadline
        **_WATCHED,
    )
    application: serve.Application = ingress.bind(args.model_dump(), llm)
    return application
