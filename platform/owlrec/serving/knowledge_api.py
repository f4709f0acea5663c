"""Knowledge over HTTP: an ASGI application over the current release.

Each request leases one release and answers only from it, names it in the header `x-owlrec-release`, and has an
ETag: a release never changes, so its name and the requested fields identify a valid client copy.
"""

import asyncio
from typing import Annotated

from fastapi import APIRouter, FastAPI, Header, Path, Query, Request
from pydantic import Field
from starlette.responses import Response

from owlrec.config import Config
from owlrec.releases.release import Release
from owlrec.serving.guard import (
    BINARY,
    PINNED,
    PROBLEMS,
    PROBLEMS_OF_ONE,
    READ_KEY,
    AuditLog,
    Guard,
    Limits,
    NoTelemetry,
    Stopping,
    Telemetry,
    complete_document,
    never_stopping,
)
from owlrec.serving.http_lookup import Lookups
from owlrec.serving.keys import KeyRing
from owlrec.serving.schemas import (
    BATCH_PATH,
    DEFAULT_FIELDS,
    LONGEST_RAW_ID,
    ONE_PATH,
    RELEASE_HEADER,
    BatchAnswer,
    BatchGet,
    Health,
    Kind,
    ReleaseAnswer,
    Similar,
    SimilarAnswer,
    SingleAnswer,
    What,
)
from owlrec.serving.served import ServedReleases, following_app, similar_entities


class KnowledgeConfig(Config):
    """Settings of the knowledge application."""

    limits: Limits = Limits()
    refresh_s: float = Field(1.0, gt=0)  # interval of reading the pointer, and so the delay of a swap


def build_knowledge_api(
    served: ServedReleases,
    keys: KeyRing,
    config: KnowledgeConfig,
    telemetry: Telemetry | None = None,
    stopping: Stopping = never_stopping,
    audit: AuditLog | None = None,
) -> FastAPI:
    """Builds the application. It follows the pointer while it runs; its caller closes `served`."""
    telemetry = telemetry or NoTelemetry()
    app = following_app(
        "OwlRec knowledge",
        served,
        refresh_s=config.refresh_s,
        telemetry=telemetry,
        stopping=stopping,
        redoc_url=None,
    )

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Health:
        """Whether the process runs."""
        return Health(status="ok", release=served.name, problem=served.error)

    @app.get("/v1/releases/current", response_model=ReleaseAnswer, responses=PROBLEMS)
    async def current_release() -> Response:
        """The release that answers lookups."""
        with served.lease() as release:
            return _json(release, _describe(release).model_dump_json())

    @app.post("/v1/knowledge:similar", response_model=SimilarAnswer, responses=PROBLEMS_OF_ONE)
    async def find_similar(request: Request, asked: Similar) -> Response:
        """Entities with the nearest vectors, by cosine."""
        request.scope[READ_KEY] = [(asked.kind, [] if asked.id is None else [asked.id])]

        def find() -> Response:
            with served.lease() as release:  # held by the thread, which outlives an abandoned request
                neighbors = similar_entities(release, asked)
                answer = SimilarAnswer(release=release.name, kind=asked.kind, results=neighbors)
                return _json(release, answer.model_dump_json())

        return await asyncio.to_thread(find)

    app.add_middleware(
        Guard,
        keys=keys,
        limits=config.limits,
        scope="lookup",
        telemetry=telemetry,
        direct=Lookups(served, telemetry),
        audit=audit,
    )
    complete_document(app, keys=keys.required, direct=described.routes)
    return app


# --------------------------------------------------------------------------------------------------------- the document
# What http_lookup.Lookups answers, described for the OpenAPI document: FastAPI reads signatures and models from here,
# and no request ever comes here. tests/serving compare both.


described = APIRouter()


@described.get(ONE_PATH, response_model=SingleAnswer, responses=PROBLEMS_OF_ONE | BINARY | PINNED)
async def get_one(
    kind: Kind,
    id: Annotated[str, Path(max_length=LONGEST_RAW_ID, description="an id, or a raw id such as B007")],
    fields: Annotated[list[What], Query(max_length=4)] = list(DEFAULT_FIELDS),  # noqa: B006
    accept: Annotated[str, Header()] = "",
    if_none_match: Annotated[str, Header()] = "",
    if_release: Annotated[str, Header(description="answer from this release, or not at all")] = "",
) -> None:
    """Knowledge about one user, item or cohort; falls back to its cohorts' texts."""


@described.post(BATCH_PATH, response_model=BatchAnswer, responses=PROBLEMS | BINARY | PINNED)
async def get_many(
    asked: BatchGet, accept: Annotated[str, Header()] = "", if_release: Annotated[str, Header()] = ""
) -> None:
    """Knowledge about up to 1,000 ids, in their order. With `Accept: application/vnd.apache.arrow.stream`, an Arrow
    table; with `application/octet-stream`, their vectors as rows of little-endian float16, a missing one all NaN.
    """


def _describe(release: Release) -> ReleaseAnswer:
    manifest = release.manifest
    return ReleaseAnswer(
        release=manifest.name,
        chain=[m.name for m in release.chain],
        knowledge=manifest.totals,
        **manifest.model_dump(
            include={"created", "model", "encoder", "parent", "delta", "dim", "as_of_min", "as_of_max"}
        ),
    )


def _json(release: Release, body: str) -> Response:
    return Response(body.encode("utf-8", "replace"), 200, {RELEASE_HEADER: release.name}, "application/json")
