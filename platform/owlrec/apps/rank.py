"""Ranking as a Ray Serve application: `serve run owlrec.apps.rank:app workspace=runs/shop artifact=models/…`.

Two deployments, each scaled for itself: the ingress, which opens an artifact that `owlrec ctr export` wrote, follows
the current release and holds the deadline; and, with `recipe=shop.yaml`, the LLM that re-ranks (owlrec.apps.rank).
The CTR model works in the ingress: its millisecond would cost three more as a call to another process.

A new artifact or adapter is taken in by `reconfigure`: change `user_config` in the Serve configuration and deploy; no
replica restarts. (A change of `args` builds the application again.)
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from owlrec.apps.knowledge import RayTelemetry, asked_to_stop, audit_log, log_with_serve, refuse_open_binding
from owlrec.config import Config
from owlrec.ctr.artifact import CtrArtifact, User
from owlrec.errors import ServingError
from owlrec.machine import api_keys
from owlrec.ranking.samples import RankingConfig
from owlrec.recipe import Recipe, load_recipe
from owlrec.serving.guard import Limits, NoTelemetry, Problem, Telemetry
from owlrec.serving.keys import KeyRing
from owlrec.serving.questions import WorkspaceTables
from owlrec.serving.rank_api import Cascade, CurrentRanker, LiveScorer, RankerChoice, build_rank_api, open_ranker
from owlrec.serving.schemas import Rank
from owlrec.serving.served import REFRESH_S, ServedReleases, WorkspaceReleases, following
from owlrec.workspace import Workspace

# ------------------------------------------------------------------------------------------------------------- rank llm
# The LLM of the ranking application: one vLLM engine a replica, which answers Yes or No about each candidate.


_REQUESTS = 4  # at once: more share the engine's steps and all miss their deadlines
_ADAPTER_RANK = 64  # of the largest adapter that may be swapped in


class LlmReplica:
    """Scores candidates with a recipe's ranker."""

    def __init__(self, workspace: str, recipe: dict[str, Any]) -> None:
        """workspace: prepared; recipe: of Recipe. Starts the engine, which takes seconds to minutes."""
        from owlrec.generation import token_counter
        from owlrec.generation.engines import model_identity
        from owlrec.prompting.frameworks import rank_fingerprint
        from owlrec.ranking.behavior_retrieval import item_retriever
        from owlrec.ranking.scorer import LlmScorer
        from owlrec.serving.questions import QuestionWriter, recent_of

        settings = Recipe.model_validate(recipe)
        config = settings.ranking or RankingConfig()
        engine = config.ranking_engine(settings.engine)
        self._workspace = Workspace(workspace)
        self._served = ServedReleases(WorkspaceReleases(self._workspace))
        self._following = AsyncExitStack()
        self._writer = QuestionWriter(
            WorkspaceTables(self._workspace),
            item_retriever(self._workspace, settings.encoder),
            settings.domain,
            config,
            recent_of(self._served),
            token_counter(engine),
        )
        self._scorer = LlmScorer(engine, lora_rank=_ADAPTER_RANK)
        self._made_for = {
            "model": model_identity(engine.model, engine.revision),
            "wording": rank_fingerprint(config.prompt, settings.domain),
            "shown": config.data.shown[-1],
        }
        self._ranker = CurrentRanker(None, None)

    async def reconfigure(self, choice: dict[str, Any]) -> None:
        """Applies a RankerChoice; current requests keep the one they started with."""
        self._ranker = open_ranker(self._workspace, choice, **self._made_for)
        await self._following.aclose()
        await self._following.enter_async_context(following(self._served, REFRESH_S, NoTelemetry()))

    async def score(self, asked: dict[str, Any], candidates: Sequence[int]) -> list[float]:
        """See owlrec.serving.rank_api.Backend."""
        try:
            questions = self._writer.write(Rank(**asked, candidates=list(candidates)), candidates)
        except Problem as problem:  # which cannot be pickled between processes
            raise ServingError(str(problem)) from None
        ranker = self._ranker
        answer = await self._scorer.score(questions, ranker.adapter)
        return ranker.probabilities(answer.probabilities)


def llm_scorer(workspace: str, recipe: str, choice: RankerChoice, max_replicas: int, cpus: float) -> serve.Application:
    """The deployment. recipe: a file, read here, so replicas on other machines do not need it. cpus: per
    replica, which Ray also uses as the number of threads.

    Raises RecipeError if the recipe has no vLLM engine for ranking.
    """
    settings = load_recipe(recipe)
    (settings.ranking or RankingConfig()).ranking_engine(settings.engine)
    deployment = serve.deployment(
        LlmReplica,
        name="LlmScorer",
        ray_actor_options={"num_cpus": cpus, "num_gpus": settings.generate.engine_gpus},
        user_config=choice.model_dump(),
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": max_replicas,
            "target_ongoing_requests": _REQUESTS / 2,
            "upscale_delay_s": 10,
            "downscale_delay_s": 600,  # an engine stopped too soon takes minutes to restart
        },
        max_ongoing_requests=_REQUESTS,
        max_queued_requests=_REQUESTS,
        health_check_timeout_s=60,
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    application: serve.Application = deployment.bind(workspace, settings.model_dump(mode="json"))
    return application


# ----------------------------------------------------------------------------------------------------------------- rank


_SCALING = {"min_replicas": 1, "upscale_delay_s": 5, "downscale_delay_s": 120}
# A replica that is stuck, or whose machine is gone, is noticed within 10 s.
_WATCHED: dict[str, Any] = {
    "health_check_period_s": 5,
    "health_check_timeout_s": 10,
    "logging_config": {"encoding": "JSON", "enable_access_log": False},
}


class RankArgs(Config):
    """Arguments of `app`, as `key=value` on the command line or under `args` in a Serve configuration."""

    workspace: str
    artifact: str  # relative to the workspace
    recipe: str | None = None  # with a `ranking:` section: its LLM re-ranks; None = no LLM
    adapter: str | None = None  # of `owlrec ranker tune`, relative to the workspace; None = the untuned model
    calibration: str | None = None  # of the LLM's scores; None = the adapter's own, if there is one
    keys_file: str | None = None
    audit: str | None = None  # folder of the audit log; None = none
    max_active: int = Field(64, ge=1)  # per ingress replica; beyond it and Serve's queue, requests get 503
    max_replicas: int = Field(1, ge=1)  # of the ingress, each with a CTR model
    max_llm_replicas: int = Field(1, ge=1)
    llm_cpus: float = Field(1.0, gt=0)  # per LLM replica: the cores of its engine
    ctr_threads: int = Field(1, ge=1)  # of torch, per replica
    num_cpus: float = Field(1.0, ge=0)  # per ingress replica


class CtrModel:
    """An exported CTR model over the current release, as the cascade's backend.

    Without @serve.batch: a request is already a batch, for one user whose side is computed once, and waiting for other
    requests would only add latency.
    """

    def __init__(self, workspace: Workspace, telemetry: Telemetry) -> None:
        """workspace: has the artifacts."""
        self._workspace = workspace
        self._telemetry = telemetry
        self._scorer: LiveScorer | None = None
        self._following = AsyncExitStack()

    async def open(self, artifact: str) -> None:
        """Opens an artifact and the current release; current requests keep the model they started with."""
        opened = await asyncio.to_thread(CtrArtifact.open, self._workspace, artifact)
        scorer, stack = LiveScorer(opened, WorkspaceReleases(self._workspace)), AsyncExitStack()
        await stack.enter_async_context(following(scorer.served, REFRESH_S, self._telemetry))
        before, self._scorer = self._scorer, scorer
        stopped, self._following = self._following, stack
        await stopped.aclose()
        if before is not None:
            before.served.close()

    def problem(self) -> str | None:
        """The problem that prevents scoring; None if there is none."""
        return self._scorer.problem() if self._scorer else "no model is loaded yet"

    async def score(self, asked: Rank, candidates: Sequence[int]) -> Sequence[float]:
        """See owlrec.serving.rank_api.Backend. Raises Problem (503) without a release."""
        return next(iter((await self.score_labels(asked, candidates)).values()))

    async def score_labels(self, asked: Rank, candidates: Sequence[int]) -> Mapping[str, Sequence[float]]:
        """See owlrec.serving.rank_api.LabelBackend. Raises Problem (503) without a release."""
        if self._scorer is None:
            raise Problem(503, "no model is loaded yet", headers={"Retry-After": "1"})
        history = asked.history
        user = User(
            user_id=asked.user_id,
            history=None if history is None else [b.item_id for b in history],
            ratings=None if history is None else [b.rating for b in history],
            taken=None if history is None else [b.taken for b in history],
            events=None if history is None else [b.event for b in history],
            profile=asked.profile,
            context=asked.context,
            time=asked.time,
        )
        # Without a thread: torch releases the interpreter lock at every operation, and threads competing for it halve
        # the rate of requests. It takes milliseconds, so concurrency gains nothing.
        return {name: scores.tolist() for name, scores in self._scorer.score_labels(user, candidates).items()}


class _Remote:
    """A deployment as the cascade's backend. Giving up on an answer also cancels it in the replica."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def score(self, asked: Rank, candidates: Sequence[int]) -> Sequence[float]:
        scores: Sequence[float] = await self._handle.score.remote(
            asked.model_dump(include={"user_id", "history", "profile"}), list(candidates)
        )
        return scores


@serve.ingress()
class RankReplica:
    """Receives requests and enforces their deadline."""

    def __init__(self, args: dict[str, Any], llm: DeploymentHandle | None = None) -> None:
        """args: of RankArgs. llm: a deployment with a method `score` like LlmReplica's; None for none."""
        settings = RankArgs.model_validate(args)
        torch.set_num_threads(settings.ctr_threads)
        self._keys = KeyRing(settings.keys_file, api_keys())
        refuse_open_binding(self._keys)
        log_with_serve()
        self._limits = Limits(max_active=settings.max_active, timeout_s=35.0)  # above the longest deadline
        self._telemetry = RayTelemetry("rank")
        self._audit = audit_log(settings.audit)
        self._ctr = CtrModel(Workspace(settings.workspace), self._telemetry)
        self._cascade = Cascade(self._ctr, _Remote(llm) if llm else None, self._telemetry)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Applies {"artifact": folder}."""
        await self._ctr.open(config["artifact"])

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_rank_api(
            self._cascade, self._keys, self._limits, self._telemetry, self._ready, asked_to_stop, self._audit
        )

    async def rank(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer of POST /v1/rank, for other applications of the cluster. Raises ServingError for a 503."""
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
    from owlrec.serving.rank_api import RankerChoice

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
