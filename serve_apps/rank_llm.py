"""The LLM of the ranking application: one vLLM engine a replica, which answers Yes or No about each candidate."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from ray import serve

from owlrec.errors import ServingError
from owlrec.ranking.experiment import RankingConfig
from owlrec.recipe import Recipe, load_recipe
from owlrec.serving.problems import Problem
from owlrec.serving.rankers import RankerChoice, RankerInForce, open_ranker
from owlrec.serving.schemas import Rank
from owlrec.serving.served import REFRESH_S, ServedReleases, WorkspaceReleases, following
from owlrec.serving.tables import WorkspaceTables
from owlrec.serving.telemetry import NoTelemetry
from owlrec.workspace import Workspace

_REQUESTS = 4  # at once: more share the engine's steps and all miss their deadlines
_ADAPTER_RANK = 64  # of the largest adapter that may be swapped in


class LlmReplica:
    """Scores candidates with a recipe's ranker."""

    def __init__(self, workspace: str, recipe: dict[str, Any]) -> None:
        """workspace: prepared; recipe: of Recipe. Starts the engine, which takes from seconds to minutes."""
        from owlrec.generation import token_counter
        from owlrec.generation.models import model_identity
        from owlrec.prompting.rella import rank_fingerprint
        from owlrec.ranking.items import item_retriever
        from owlrec.ranking.scorer import Scorer
        from owlrec.serving.questions import QuestionWriter, recent_of

        settings = Recipe.model_validate(recipe)
        config = settings.ranking or RankingConfig()
        engine = config.ranking_engine(settings.engine)
        self._workspace = Workspace(workspace)
        self._served = ServedReleases(WorkspaceReleases(self._workspace))
        self._following = AsyncExitStack()
        self._writer = QuestionWriter(
            WorkspaceTables(self._workspace),
            item_retriever(self._workspace, config.item_encoder(settings.encoder, engine), config.projection),
            settings.domain,
            config,
            recent_of(self._served),
            token_counter(engine),
        )
        self._scorer = Scorer(engine, lora_rank=_ADAPTER_RANK, template_options=config.template_options)
        self._made_for = {
            "model": model_identity(engine.model, engine.revision),
            "wording": rank_fingerprint(config.prompt, settings.domain),
            "shown": config.data.shown[-1],
        }
        self._ranker = RankerInForce(None, None)

    async def reconfigure(self, choice: dict[str, Any]) -> None:
        """Takes in a RankerChoice; requests at work keep the one that they began with."""
        self._ranker = open_ranker(self._workspace, choice, **self._made_for)
        await self._following.aclose()
        await self._following.enter_async_context(following(self._served, REFRESH_S, NoTelemetry()))

    async def score(self, asked: dict[str, Any], candidates: Sequence[int]) -> list[float]:
        """See owlrec.serving.ranking.Backend."""
        try:
            questions = self._writer.write(Rank(**asked, candidates=list(candidates)), candidates)
        except Problem as problem:  # which cannot travel between processes
            raise ServingError(str(problem)) from None
        ranker = self._ranker
        found = await self._scorer.score(questions, ranker.adapter)
        return ranker.probabilities(found.probabilities)


def llm_scorer(workspace: str, recipe: str, choice: RankerChoice, max_replicas: int, cpus: float) -> serve.Application:
    """The deployment. recipe: a file, read here, so that replicas on other machines need not have it. cpus: of a
    replica, to which Ray gives as many threads.

    Raises RecipeError where the recipe has no vLLM engine to rank with.
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
            "downscale_delay_s": 600,  # an engine that was stopped too soon takes minutes to come back
        },
        max_ongoing_requests=_REQUESTS,
        max_queued_requests=_REQUESTS,
        health_check_timeout_s=60,
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    application: serve.Application = deployment.bind(workspace, settings.model_dump(mode="json"))
    return application
