"""Ranking as a Ray Serve application: `serve run serve_apps.rank:app workspace=runs/shop artifact=models/…`.

Deployments that are scaled each for itself: the ingress, which holds the deadline; the CTR scorer, which opens an
artifact that `owlrec export-ctr` wrote and follows the current release; and, with `recipe=shop.yaml`, the LLM that
re-ranks (serve_apps.rank_llm). A new artifact or adapter is taken in by `reconfigure`: change `user_config` in the
Serve configuration and deploy; no replica restarts. (A change of `args` builds the application again.)
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from owlrec.config import Config
from owlrec.environment import api_keys
from owlrec.errors import ServingError
from owlrec.serving.guard import Limits
from owlrec.serving.keys import KeyRing
from owlrec.serving.problems import Problem
from owlrec.serving.rank_api import build_rank_api
from owlrec.serving.ranking import Cascade
from owlrec.serving.schemas import Rank
from owlrec.serving.served import REFRESH_S, WorkspaceReleases, following
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
_READY_WITHIN_S = 2.0


class RankArgs(Config):
    """The arguments of `app`, as `key=value` on the command line or under `args` in a Serve configuration."""

    workspace: str
    artifact: str  # relative to the workspace
    recipe: str | None = None  # with a `ranking:` section: its LLM re-ranks; None = no LLM
    adapter: str | None = None  # that `owlrec tune-ranker` wrote, relative to the workspace; None = the model as it is
    calibration: str | None = None  # of the LLM's scores; None = what was fitted with the adapter, if there is one
    keys_file: str | None = None
    max_active: int = Field(64, ge=1)  # of one replica of the ingress; beyond it and Serve's queue, requests get 503
    max_replicas: int = Field(1, ge=1)  # of the ingress
    max_ctr_replicas: int = Field(2, ge=1)
    max_llm_replicas: int = Field(1, ge=1)
    llm_cpus: float = Field(1.0, gt=0)  # of each LLM replica: the cores that its engine may use
    ctr_threads: int = Field(1, ge=1)  # of torch, in each replica
    num_cpus: float = Field(0.5, ge=0)  # of each deployment's replicas


class CtrReplica:
    """Scores candidates with an exported CTR model, over the current release.

    Without @serve.batch: a request is a batch already, of one user whose side is computed once, and waiting for the
    requests of others would cost each of them that wait.
    """

    def __init__(self, workspace: str, threads: int) -> None:
        """workspace: that holds the artifacts."""
        import torch

        torch.set_num_threads(threads)
        log_with_serve()
        self._workspace = Workspace(workspace)
        self._telemetry = RayTelemetry("rank")
        self._scorer: Any = None
        self._following = AsyncExitStack()

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Opens {"artifact": folder} and the current release; requests at work keep the scorer that they began with."""
        from owlrec.ctr.scoring import Artifact
        from owlrec.serving.live import LiveScorer

        artifact = await asyncio.to_thread(Artifact.open, self._workspace, config["artifact"])
        scorer, stack = LiveScorer(artifact, WorkspaceReleases(self._workspace)), AsyncExitStack()
        await stack.enter_async_context(following(scorer.served, REFRESH_S, self._telemetry))
        before, self._scorer = self._scorer, scorer
        stopped, self._following = self._following, stack
        await stopped.aclose()
        if before is not None:
            before.served.close()

    async def problem(self) -> str | None:
        """What keeps it from scoring; None where nothing does."""
        problem: str | None = self._scorer.problem()
        return problem

    async def score(self, asked: dict[str, Any], candidates: Sequence[int]) -> list[float]:
        """See owlrec.serving.ranking.Backend."""
        from owlrec.ctr.scoring import User

        history = asked["history"]
        user = User(
            user_id=asked["user_id"],
            history=None if history is None else [b["item_id"] for b in history],
            ratings=None if history is None else [b["rating"] for b in history],
            taken=None if history is None else [b["taken"] for b in history],
            profile=asked["profile"],
        )
        # A thread: torch lets go of the interpreter, and the replica goes on taking requests.
        try:
            scores = await asyncio.to_thread(self._scorer.score, user, candidates)
        except Problem as problem:  # which cannot travel between processes
            raise ServingError(str(problem)) from None
        return [float(score) for score in scores]


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

    def __init__(self, args: dict[str, Any], ctr: DeploymentHandle, llm: DeploymentHandle | None = None) -> None:
        """args: of RankArgs. llm: a deployment with a method `score` like CtrReplica's; None where none ranks."""
        settings = RankArgs.model_validate(args)
        self._keys = KeyRing(settings.keys_file, api_keys())
        refuse_open_binding(self._keys)
        log_with_serve()
        self._limits = Limits(max_active=settings.max_active, timeout_s=35.0)  # above the longest deadline
        self._telemetry = RayTelemetry("rank")
        self._problem = ctr.problem
        self._ctr = _Remote(ctr)
        self._cascade = Cascade(self._ctr, _Remote(llm) if llm else None, self._telemetry)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_rank_api(self._cascade, self._keys, self._limits, self._telemetry, self._ready, asked_to_stop)

    async def rank(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What POST /v1/rank answers, for other applications of the cluster. Raises ServingError where it is 503."""
        try:
            return (await self._cascade.rank(Rank.model_validate(asked))).model_dump()
        except Problem as problem:  # which cannot travel between processes
            raise ServingError(str(problem)) from None

    async def _ready(self) -> str | None:
        try:
            async with asyncio.timeout(_READY_WITHIN_S):
                return await self._problem.remote()
        except Exception as error:
            return f"the CTR model does not answer ({type(error).__name__})"


def app(args: RankArgs) -> serve.Application:
    """Builds the application: what `serve run` and `serve deploy` call, with one argument."""
    if args.recipe is None:
        return rank_application(args, None)
    from owlrec.serving.rankers import RankerChoice
    from serve_apps.rank_llm import llm_scorer

    choice = RankerChoice(adapter=args.adapter, calibration=args.calibration)
    return rank_application(args, llm_scorer(args.workspace, args.recipe, choice, args.max_llm_replicas, args.llm_cpus))


def rank_application(args: RankArgs, llm: serve.Application | None) -> serve.Application:
    """The ingress and the CTR scorer around a deployment that re-ranks. llm: has a method `score` like CtrReplica's;
    None where none ranks.
    """
    busy = BackpressureConfig(status_code=503, retry_after_s=1)
    ctr = serve.deployment(
        CtrReplica,
        name="CtrScorer",
        ray_actor_options={"num_cpus": args.num_cpus},
        user_config={"artifact": args.artifact},
        autoscaling_config={**_SCALING, "max_replicas": args.max_ctr_replicas, "target_ongoing_requests": 4},
        max_ongoing_requests=16,
        max_queued_requests=args.max_active,
        **_WATCHED,
    ).bind(args.workspace, args.ctr_threads)
    ingress = serve.deployment(
        RankReplica,
        name="Rank",
        ray_actor_options={"num_cpus": args.num_cpus},
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
    application: serve.Application = ingress.bind(args.model_dump(), ctr, llm)
    return application
