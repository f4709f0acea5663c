"""Ranking over HTTP: an ASGI application around a cascade."""

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.responses import Response

from owlrec import __version__
from owlrec.serving.guard import Guard, Limits
from owlrec.serving.keys import KeyRing
from owlrec.serving.openapi import PROBLEMS, complete_document
from owlrec.serving.problems import install_problem_handlers
from owlrec.serving.ranking import Cascade
from owlrec.serving.readiness import Stopping, never_stopping, readiness
from owlrec.serving.schemas import Health, Rank, RankAnswer
from owlrec.serving.telemetry import Telemetry


def build_rank_api(
    cascade: Cascade,
    keys: KeyRing,
    limits: Limits,
    telemetry: Telemetry,
    ready: Callable[[], Awaitable[str | None]],
    stopping: Stopping = never_stopping,
) -> FastAPI:
    """The application. ready: what keeps it from ranking now; None where nothing does."""
    app = FastAPI(title="OwlRec ranking", version=__version__, redoc_url=None)
    install_problem_handlers(app)

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Health:
        """Whether the process runs."""
        return Health(status="ok")

    @app.get("/readyz", response_model=Health, responses={503: {"model": Health}})
    async def readyz() -> Response:
        """Whether requests can be ranked: the CTR model answers."""
        return readiness(await ready(), stopping)

    @app.post("/v1/rank", response_model=RankAnswer, response_model_exclude_none=True, responses=PROBLEMS)
    async def rank(asked: Rank) -> RankAnswer:
        """Candidates in order, at the deadline at the latest; `degraded` where the LLM did not have its say."""
        return await cascade.rank(asked)

    app.add_middleware(Guard, keys=keys, limits=limits, telemetry=telemetry)
    complete_document(app, keys=keys.required)
    return app
