"""Knowledge over HTTP: an ASGI application over the current release.

Each request leases one release and answers only from it, names it in the header `x-owlrec-release`, and has an
ETag: a release never changes, so its name and the requested fields identify a valid client copy.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Header, Query
from pydantic import Field
from starlette.responses import Response

from owlrec.config import Config
from owlrec.releases.format import Knowledge
from owlrec.releases.release import Release
from owlrec.serving.guard import (
    BYTES,
    PROBLEMS,
    PROBLEMS_OF_ONE,
    Guard,
    Limits,
    NoTelemetry,
    Problem,
    Stopping,
    Telemetry,
    complete_document,
    never_stopping,
)
from owlrec.serving.keys import KeyRing
from owlrec.serving.schemas import (
    BYTES_TYPE,
    DEFAULT_FIELDS,
    DIM_HEADER,
    LARGEST_ID,
    RELEASE_HEADER,
    BatchAnswer,
    BatchGet,
    Health,
    Kind,
    PathId,
    ReleaseAnswer,
    Similar,
    SimilarAnswer,
    SingleAnswer,
    What,
)
from owlrec.serving.served import ServedReleases, SimilarEntities, following_app, vectors_as_bytes, vectors_as_json

_T = TypeVar("_T")


class KnowledgeConfig(Config):
    """Settings of the knowledge application."""

    limits: Limits = Limits()
    refresh_s: float = Field(1.0, gt=0)  # interval of reading the pointer, and so the delay of a swap


def build_knowledge_api(
    served: ServedReleases,
    similar: SimilarEntities,
    keys: KeyRing,
    config: KnowledgeConfig,
    telemetry: Telemetry | None = None,
    stopping: Stopping = never_stopping,
) -> FastAPI:
    """Builds the application. It follows the pointer while it runs; its caller closes `served` and `similar`."""
    telemetry = telemetry or NoTelemetry()
    app = following_app(
        "OwlRec knowledge",
        served,
        similar,
        refresh_s=config.refresh_s,
        telemetry=telemetry,
        stopping=stopping,
        redoc_url=None,
    )
    answers = _Answers(telemetry)
    vectors_as_json(np.zeros((0, 1)))  # builds its table now instead of in the first request

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Health:
        """Whether the process runs."""
        return Health(status="ok", release=served.name, problem=served.error)

    @app.get("/v1/releases/current", response_model=ReleaseAnswer, responses=PROBLEMS)
    async def current_release() -> Response:
        """The release that answers lookups."""
        with served.lease() as release:
            return _json(release, _describe(release).model_dump_json())

    @app.get("/v1/knowledge/{kind}/{id}", response_model=SingleAnswer, responses=PROBLEMS_OF_ONE | BYTES)
    async def get_one(
        kind: Kind,
        id: PathId,
        fields: Annotated[list[What], Query(max_length=4)] = list(DEFAULT_FIELDS),  # noqa: B006
        accept: Annotated[str, Header(max_length=1000)] = "",
        if_none_match: Annotated[str, Header(max_length=1000)] = "",
    ) -> Response:
        """Knowledge about one user, item or cohort; falls back to its cohorts' texts."""
        wanted, number = int(id), list(dict.fromkeys(fields))
        if wanted > LARGEST_ID:
            raise Problem(422, "is not a 64-bit integer", field="id")
        as_bytes = BYTES_TYPE in accept
        with served.lease() as release:
            tag = f'"{release.version}.{"f2" if as_bytes else "json"}"'
            headers = {"etag": tag, "vary": "accept", "cache-control": "no-cache"}
            if tag in [t.strip().removeprefix("W/") for t in if_none_match.split(",")]:
                return Response(None, 304, {**headers, RELEASE_HEADER: release.name})
            if as_bytes:
                return await answers.as_bytes(release, kind, [wanted], headers, single=True)
            [entity] = await answers.entities(release, kind, [wanted], number)
            if not entity.found:
                raise Problem(404, "this id has no knowledge", field="id", headers={RELEASE_HEADER: release.name})
            head = f'{{"release":{json.dumps(release.name)},"kind":"{kind}",'
            return _json(release, head + entity.json[1:], headers)

    @app.post("/v1/knowledge:batchGet", response_model=BatchAnswer, responses=PROBLEMS | BYTES)
    async def get_many(asked: BatchGet, accept: Annotated[str, Header(max_length=1000)] = "") -> Response:
        """Knowledge about up to 1,000 ids, in their order. With `Accept: application/octet-stream`, their vectors
        as rows of little-endian float16; a missing one is all NaN.
        """
        with served.lease() as release:
            if BYTES_TYPE in accept:
                return await answers.as_bytes(release, asked.kind, asked.ids, {})
            entities = await answers.entities(release, asked.kind, asked.ids, asked.fields)
            head = f'{{"release":{json.dumps(release.name)},"kind":"{asked.kind}","results":['
            return _json(release, head + ",".join(e.json for e in entities) + "]}")

    @app.post("/v1/knowledge:similar", response_model=SimilarAnswer, responses=PROBLEMS_OF_ONE)
    async def find_similar(asked: Similar) -> Response:
        """Entities with the nearest vectors, by cosine."""

        def find() -> Response:
            with served.lease() as release:  # held by the thread, which outlives an abandoned request
                neighbors = similar.find(release, asked)
                answer = SimilarAnswer(release=release.name, kind=asked.kind, results=neighbors)
                return _json(release, answer.model_dump_json())

        return await asyncio.to_thread(find)

    app.add_middleware(Guard, keys=keys, limits=config.limits, telemetry=telemetry)
    complete_document(app, keys=keys.required)
    return app


class _Piece:
    """One entity of a response: its JSON, and whether it was found."""

    __slots__ = ("found", "json")

    def __init__(self, found: bool, text: str) -> None:
        self.found = found
        self.json = text


class _Answers:
    """Reads a release's store and writes its answers."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    async def entities(self, release: Release, kind: Kind, ids: Sequence[int], fields: Sequence[What]) -> list[_Piece]:
        return await self._timed(release, lambda: self._entities(release, kind, ids, fields))

    async def as_bytes(
        self, release: Release, kind: Kind, ids: Sequence[int], headers: dict[str, str], *, single: bool = False
    ) -> Response:
        rows, mask = await self._timed(release, lambda: release.store.vectors(kind, ids))
        self._count(kind, int(mask.sum()), len(ids))
        headers = {**headers, RELEASE_HEADER: release.name, DIM_HEADER: str(rows.shape[1])}
        if single and not mask[0]:
            raise Problem(404, "this id has no vector", field="id", headers={RELEASE_HEADER: release.name})
        return Response(vectors_as_bytes(rows, mask), 200, headers, BYTES_TYPE)

    async def _timed(self, release: Release, look_up: Callable[[], _T]) -> _T:
        start = time.perf_counter()
        try:
            # A memory-mapped store answers within microseconds: a thread would cost more than it saves.
            return await asyncio.to_thread(look_up) if release.store.remote else look_up()
        finally:
            self._telemetry.time("lookup", time.perf_counter() - start)

    def _entities(self, release: Release, kind: Kind, ids: Sequence[int], fields: Sequence[What]) -> list[_Piece]:
        store, n = release.store, len(ids)
        about_text = "text" in fields or "provenance" in fields
        knowledge: list[Knowledge | None] = store.get(kind, ids) if about_text else [None] * n
        present = np.array([k is not None for k in knowledge], dtype=bool)
        vectors: list[str] = []
        if "vector" in fields:
            rows, mask = store.vectors(kind, ids)
            vectors = [v if there else "null" for v, there in zip(vectors_as_json(rows), mask.tolist(), strict=True)]
            present |= mask
        codes = store.own_codes(kind, ids) if "codes" in fields else None
        self._count(kind, int(present.sum()), n)
        pieces = []
        for row, id_ in enumerate(ids):
            known = knowledge[row]
            parts = [f'{{"id":{id_},"found":{"true" if present[row] else "false"}']
            if "text" in fields:
                parts.append(f'"text":{json.dumps(known.text, ensure_ascii=False) if known else "null"}')
            if vectors:
                parts.append(f'"vector":{vectors[row]}')
            if codes is not None:
                parts.append(f'"codes":{json.dumps(codes[row] or None)}')
            if "provenance" in fields:
                parts.append(f'"provenance":{json.dumps(_provenance(release, known)) if known else "null"}')
            pieces.append(_Piece(bool(present[row]), ",".join(parts) + "}"))
        return pieces

    def _count(self, kind: Kind, hits: int, asked: int) -> None:
        for name, n in (("hits", hits), ("misses", asked - hits)):
            if n:
                self._telemetry.count(name, n, {"kind": kind})


def _provenance(release: Release, known: Knowledge) -> dict[str, Any]:
    return {
        "as_of": known.as_of,
        "framework": known.framework,
        "quality": known.quality,
        "model": release.manifest.model,
        "encoder": release.manifest.encoder,
        "from_cohorts": known.kind != "cohort" and known.framework == "collective",
    }


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


def _json(release: Release, body: str, headers: dict[str, str] | None = None) -> Response:
    return Response(
        body.encode("utf-8", "replace"), 200, {**(headers or {}), RELEASE_HEADER: release.name}, "application/json"
    )
