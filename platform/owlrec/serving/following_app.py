"""What the applications over releases share: they follow the release in force, answer mistakes with problem documents,
and tell at /readyz whether they can answer.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from owlrec import __version__
from owlrec.serving.problems import install_problem_handlers
from owlrec.serving.readiness import Stopping, readiness
from owlrec.serving.schemas import Health
from owlrec.serving.served import ServedReleases, following
from owlrec.serving.similar import SimilarEntities
from owlrec.serving.telemetry import Telemetry


def following_app(
    title: str,
    served: ServedReleases,
    similar: SimilarEntities,
    *,
    refresh_s: float,
    telemetry: Telemetry,
    stopping: Stopping,
    **options: Any,
) -> FastAPI:
    """An application without routes of its own. It follows the pointer as long as it runs.

    refresh_s: how often the pointer is asked for. options: of FastAPI.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with following(served, refresh_s, telemetry, on_swap=similar.forget_all_but):
            yield

    app = FastAPI(title=title, version=__version__, lifespan=lifespan, **options)
    install_problem_handlers(app)

    @app.get("/readyz", response_model=Health, responses={503: {"model": Health}})
    async def readyz() -> Response:
        """Whether lookups can be answered: a release is loaded."""
        missing = None if served.name else served.error or "no release is loaded yet"
        return readiness(missing, stopping, release=served.name, note=served.error)

    return app
